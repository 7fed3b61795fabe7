"""Pretraining of the tiny Moondream 2. It trains what `pretrain.py` would, in a third of the time.

A scene is told in several captions behind one image, each blind to the others, and the vision layers that let
everything through are left out. Legend: B scenes, K captions each, L tokens of the longest, N image tokens, D
width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from examples.pretrain import TRAIN_STREAM, CellHead, draw_photo, measure_exact_match
from examples.scenes import place_things, sample_scene
from examples.styles import STYLES, sample_style, write_caption
from examples.tiny_moondream import TASK_STYLES, TRAINED_LAYERS, generate, make_model

STEPS, BATCH_SIZE, LEARNING_RATE = 1000, 24, 2e-3
CAPTIONS = 3


class SceneBatches(Dataset):
    """Step → its batch: a function of the seed and the step alone, so that workers can make it."""

    def __init__(self, processor: Any, seed: int) -> None:
        self.processor = processor
        self.seed = seed

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.seed, TRAIN_STREAM, step])
        scenes = [sample_scene(rng) for _ in range(BATCH_SIZE)]
        places = [place_things(scene, rng) for scene in scenes]
        images = [draw_photo(scene, rng, where) for scene, where in zip(scenes, places, strict=True)]
        pixels = self.processor.image_processor.preprocess(images, return_tensors="pt")["pixel_values"]
        examples = [self._make_example(scene, rng) for scene in scenes for _ in range(CAPTIONS)]
        length = max(len(prompt) + len(answer) for prompt, answer in examples)
        tokens = torch.zeros(len(examples), length, dtype=torch.long)
        labels = torch.full_like(tokens, -100)
        for row, (prompt, answer) in enumerate(examples):
            end = len(prompt) + len(answer)
            tokens[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        return {
            "pixel_values": pixels,
            "tokens": tokens.view(len(scenes), CAPTIONS, length),
            "labels": labels.view(len(scenes), CAPTIONS, length),
            "scenes": scenes,
            "places": places,
        }

    def _make_example(self, scene: Any, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Return the ids of a prompt, and of the answer with its end."""
        style = sample_style(rng)
        asks_task = style in TASK_STYLES and rng.random() < 0.7
        prompt = self.processor.prompt_ids(TASK_STYLES[style] if asks_task else STYLES[style].prompt)
        return prompt, [*self.processor.text_ids(write_caption(scene, style, rng)), 0]


def embed_images(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Return the image embeddings [B, N, D], through the trained vision layers alone."""
    tower = model.model.vision_tower
    hidden = tower.embeddings(pixels)
    for layer in tower.encoder.layers[:TRAINED_LAYERS]:
        hidden = layer(hidden, None)
    hidden = tower.post_layernorm(hidden)
    # A scene has one window, so whole and local features are the same.
    return model.model.multi_modal_projector(torch.cat([hidden, hidden], dim=-1))


def caption_loss(model: nn.Module, features: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean cross-entropy of all captions, K of them behind each image's features [B, N, D]."""
    tokens = batch["tokens"]
    scenes, captions, length = tokens.shape
    embed = model.get_input_embeddings()
    start = embed(torch.zeros(scenes, 1, dtype=torch.long))
    hidden = torch.cat([start, features, embed(tokens.flatten(1))], dim=1)
    prefix = features.shape[1] + 1
    positions = torch.cat([torch.arange(prefix), (prefix + torch.arange(length)).repeat(captions)])
    owner = torch.cat([torch.full((prefix,), -1), torch.arange(captions).repeat_interleave(length)])
    causal = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    mask = (owner == -1) | ((owner[:, None] == owner) & causal)
    outputs = model.model.language_model(
        inputs_embeds=hidden,
        attention_mask=mask.expand(scenes, 1, -1, -1),
        position_ids=positions[None],
        use_cache=False,
    ).last_hidden_state[:, prefix:]
    outputs = outputs.unflatten(1, (captions, length))[:, :, :-1]
    following = batch["labels"][:, :, 1:]
    due = following != -100
    return F.cross_entropy(model.lm_head(outputs[due]), following[due])


def pretrain(seed: int, save: Callable, log: Callable = print) -> tuple[nn.Module, Any]:
    """Train the tiny Moondream 2 from random weights; `save(model, processor)` every 200 steps."""
    torch.manual_seed(seed)
    model, processor = make_model()
    model.model.vision_tower.encoder.layers[TRAINED_LAYERS:].requires_grad_(False)
    head = CellHead(model.config.hidden_size)
    parameters = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-2)
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1, cycle_momentum=False
    )
    started = time.time()
    loader = DataLoader(SceneBatches(processor, seed), batch_size=None, num_workers=1, prefetch_factor=4)
    for step, batch in enumerate(loader, start=1):
        features = embed_images(model.train(), batch["pixel_values"])
        loss = caption_loss(model, features, batch)
        cell_loss = head(features, batch["scenes"], batch["places"])
        optimizer.zero_grad()
        (loss + cell_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        lr_scheduler.step()
        if step % 50 == 0:
            log(f"step {step}/{STEPS} loss {loss:.3f} cells {cell_loss:.3f} {time.time() - started:.0f} s")
        if step % 200 == 0 or step == STEPS:
            log(f"exact match {measure_exact_match(MOONDREAM, model, processor, seed, count=50):.2f}")
            save(model, processor)
    return model.eval(), processor


MOONDREAM = SimpleNamespace(name="moondream-tiny", pretrain=pretrain, generate=generate)
