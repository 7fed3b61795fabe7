"""Captioning in several ways: ours, image by image, a plain batched loop, the pipeline of transformers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.sides import Gate

PLAIN = {"one at a time": 1, "batched, adapter beside": None, "batched, no adapter": None}
"""Sides in plain transformers and PEFT, and their batch sizes; None is ours."""


def work(spec: dict[str, Any]) -> None:
    """Caption all images of the folder each time; answer with the tokens."""
    import torch

    device, dtype = torch.device(spec["device"]), getattr(torch, spec["dtype"])
    gate = Gate(device, dtype)
    make = {"ours": make_ours, "pipeline": make_pipeline}.get(spec["side"], make_plain)
    caption = make(spec, device, dtype)
    images = sorted(Path(spec["data"]).glob("*.jpg"))
    gate.watch_loaders()
    gate.wait()
    while True:
        gate.wait(tokens=[list(map(int, ids)) for ids in caption(images)])


def make_ours(spec: dict[str, Any], device: Any, dtype: Any) -> Callable[[Sequence[Path]], list[list[int]]]:
    """Return captioning as the scripts do it, with their defaults, and --cuda_graphs on a GPU."""
    from caption_train.adapters.record import read_adapter, resolve_base
    from caption_train.captioning.engines.graphs import DecodeGraphs
    from caption_train.captioning.generate import caption_images, load_captioner, make_generation
    from caption_train.config.captioning import CaptionOptions
    from caption_train.families import get_family

    family = get_family(spec["family"])
    options = CaptionOptions(
        images=[spec["data"]],
        peft_model=Path(spec["adapter"]),
        base_model=spec["base"],
        dtype=spec["dtype"],
        max_token_length=spec["tokens"],
        beams=1,
        batch_size=spec["batch_size"],
    )
    base = resolve_base(family, spec["base"], None, None, read_adapter(spec["adapter"]))
    model, processor = load_captioner(family, base, options, device)
    generation = make_generation(options, base.prompt)
    generation.settings["min_new_tokens"] = spec["tokens"]

    graphs = DecodeGraphs(model) if device.type == "cuda" and family.has_recordable_steps else None

    def caption(images: Sequence[Path]) -> list[list[int]]:
        results = caption_images(
            family,
            model,
            processor,
            images,
            generation,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            graphs=graphs,
        )
        return [result.generated.token_ids for result in results]

    return caption


def load_plainly(spec: dict[str, Any], dtype: Any) -> tuple[Any, Any]:
    """Return model and processor as transformers loads them."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(spec["base"], dtype=dtype)
    processor = AutoProcessor.from_pretrained(spec["base"])
    processor.tokenizer.padding_side = "left" if spec["family"] == "vlm" else "right"
    return model, processor


def make_plain(spec: dict[str, Any], device: Any, dtype: Any) -> Callable[[Sequence[Path]], list[list[int]]]:
    """Return a loop over batches as model cards show it, with the adapter beside the base or with none."""
    import torch
    from peft import PeftModel
    from PIL import Image

    model, processor = load_plainly(spec, dtype)
    if spec["side"] != "batched, no adapter":
        model = PeftModel.from_pretrained(model, spec["adapter"])
    model, size = model.to(device).eval(), PLAIN[spec["side"]] or spec["batch_size"]

    def caption(images: Sequence[Path]) -> list[list[int]]:
        tokens = []
        for start in range(0, len(images), size):
            pictures = [Image.open(path).convert("RGB") for path in images[start : start + size]]
            inputs = encode_plainly(spec["family"], processor, pictures).to(device, dtype)
            with torch.no_grad():
                made = model.generate(**inputs, **forced_length(spec["tokens"]))
            tokens += made[:, -spec["tokens"] :].tolist()
        return tokens

    return caption


def encode_plainly(family: str, processor: Any, pictures: list) -> Any:
    """Return a batch with our default prompt."""
    from caption_train.families import get_family

    if family == "blip":
        return processor(images=pictures, return_tensors="pt")
    prompt = get_family(family).facts.default_prompt
    if family == "vlm":
        prompt = processor.apply_chat_template(conversation(prompt), add_generation_prompt=True)
    return processor(text=[prompt] * len(pictures), images=pictures, padding=True, return_tensors="pt")


def conversation(prompt: str, picture: Any = None) -> list[dict]:
    """Return the messages that ask a chat model for a caption."""
    shown = {"type": "image"} if picture is None else {"type": "image", "image": picture}
    return [{"role": "user", "content": [shown, {"type": "text", "text": prompt}]}]


def forced_length(tokens: int) -> dict[str, Any]:
    """Return settings for greedy captions of that many tokens, whatever the model says."""
    return {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "num_beams": 1}


def make_pipeline(
    spec: dict[str, Any], device: Any, dtype: Any
) -> Callable[[Sequence[Path]], list[list[int]]]:
    """Return the pipeline on the base with the adapter merged, which is the fastest that it can have."""
    from peft import PeftModel
    from transformers import pipeline

    from caption_train.families import get_family

    model, processor = load_plainly(spec, dtype)
    model = PeftModel.from_pretrained(model, spec["adapter"]).merge_and_unload().to(device).eval()
    run = pipeline("image-text-to-text", model=model, processor=processor, device=device)
    prompt = get_family(spec["family"]).facts.default_prompt

    def caption(images: Sequence[Path]) -> list[list[int]]:
        settings = {"batch_size": spec["batch_size"], "return_tensors": True}
        settings |= {"generate_kwargs": forced_length(spec["tokens"])}
        paths = [str(path) for path in images]
        if spec["family"] == "vlm":
            answers = run(text=[conversation(prompt, path) for path in paths], **settings)
        else:
            # Lists of images and texts would be one input, captioned all at once whatever the batch size.
            given = ({"images": path, "text": prompt} for path in paths)
            answers = run(given, **settings)
        flat = [answer[0] if isinstance(answer, list) else answer for answer in answers]
        return [answer["generated_token_ids"][-spec["tokens"] :] for answer in flat]

    return caption
