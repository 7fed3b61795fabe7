"""Measures CLIPScore, which needs no references: how close a caption is to its image for a CLIP-like model.

Hessel et al., EMNLP 2021, arXiv 2104.08718: 2.5 times the cosine of image and "A photo depicts CAPTION", 0 at
the least.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from caption_train.data.images import open_image
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import ProgressBar
from caption_train.system.damage import explaining_damage

SCALE = 2.5
PREFIX = "A photo depicts "


def measure_clip(
    folder: Path,
    images: Sequence[Path],
    captions: Sequence[Sequence[str]],
    *,
    device: torch.device,
    batch_size: int,
) -> list[list[float]]:
    """Return the CLIPScore of M models' captions of N images, M lists of N.

    Args:
        folder: the folder of a CLIP-like model: one with `get_image_features` and `get_text_features`.
        images: the N files.
        captions: M lists of N captions. What is longer than the model reads is cut.
        device: where the model runs.
        batch_size: images at once.

    Raises:
        UsageError: the folder holds no such model.
        CaptionTrainError: the model cannot be loaded or run.
    """
    model, processor = _load(folder, device)
    scores: list[list[float]] = [[] for _ in captions]
    with (
        explaining_damage(f"--clip_model {folder}: cannot score captions"),
        torch.inference_mode(),
        ProgressBar(len(images), "scoring with CLIP", "image") as bar,
    ):
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            opened = [open_image(path) for path in images[part]]
            seen = _normalize(
                model.get_image_features(**processor(images=opened, return_tensors="pt").to(device))
            )
            for column, texts in zip(scores, captions, strict=True):
                inputs = _tokenize(model, processor, texts[part]).to(device)
                read = _normalize(model.get_text_features(**inputs))
                column += (SCALE * (seen * read).sum(-1).clamp(min=0)).tolist()
            for _ in opened:
                bar.update()
    return scores


def _load(folder: Path, device: torch.device) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoProcessor

    if not (folder / "config.json").is_file():
        raise UsageError(f"--clip_model {folder}: no folder with a model (config.json) there")
    with explaining_damage(f"--clip_model {folder}: cannot be loaded"):
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model, info = AutoModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise UsageError(f"--clip_model {folder}: {type(model).__name__} does not compare images with texts")
    if missing := sorted(info["missing_keys"]):
        raise CaptionTrainError(f"--clip_model {folder}: {missing[0]} is not in it and would be random")
    return model.to(device).eval(), processor


def _tokenize(model: Any, processor: Any, captions: Sequence[str]) -> Any:
    text = model.config.text_config
    # SigLIP was trained with texts padded to its full length, and pads by itself.
    padding = "max_length" if "siglip" in model.config.model_type else True
    return processor(
        text=[PREFIX + caption for caption in captions],
        padding=padding,
        truncation=True,
        max_length=text.max_position_embeddings,
        return_tensors="pt",
    )


def _normalize(features: Any) -> torch.Tensor:
    vectors = features if isinstance(features, torch.Tensor) else features.pooler_output
    return vectors / vectors.norm(dim=-1, keepdim=True)
