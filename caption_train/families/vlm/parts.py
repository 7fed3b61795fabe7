"""A checkpoint's parts and LoRA targets, from its config.json on the meta device: no weights are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from caption_train.errors import UsageError
from caption_train.families.base import ModelFacts
from caption_train.families.vlm.checkpoint import find_model_class
from caption_train.families.vlm.presets import find_prompts

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

PROJECTORS = re.compile(r"merger|projector|connector|resampler|aligner|perceiver", re.IGNORECASE)
"""Names of what leads from an image's features to the text model, also where it stands inside the vision
tower, as Qwen's `visual.merger` and `visual.deepstack_merger_list` do."""
ROUTERS = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")
"""A mixture's choice of experts: it is left as it is, a LoRA on it unbalances the experts."""


def make_empty_model(
    config: PretrainedConfig, model_class: type, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Return a model of the config's true shapes whose tensors hold nothing: about a second at any size."""
    import torch

    with torch.device("meta"):
        return model_class._from_config(config, dtype=dtype or torch.float32)


def find_parts(model: PreTrainedModel, model_id: str) -> dict[str, str]:
    """Return `vision`, `projector`, `language`: regular expressions that match a part's module names in full.

    Language is the decoder and what stands behind it, such as `lm_head`; vision is the image encoder; all
    other modules with weights are the projector, and inside vision those that are named like one. What
    `find_dead` finds, and what hears, is no part, so never trained.

    Raises:
        UsageError: the model has no decoder or no image encoder apart from the rest.
    """
    names = {id(module): name for name, module in model.named_modules()}
    decoder, encoder = model.get_decoder(), model.get_encoder("image")
    language, vision = names.get(id(decoder)), names.get(id(encoder))
    if not language or not vision or language.startswith(f"{vision}.") or vision.startswith(f"{language}."):
        raise UsageError(
            f"--model_id {model_id}: vision and language cannot be told apart in {type(model).__name__}"
        )
    dead = find_dead(model, encoder, decoder)
    inside = [name for name in _outermost(_holders(encoder)) if PROJECTORS.search(name)]
    inside = [f"{vision}.{name}" for name in inside]
    heads = [name for name, module in model.named_children() if module is model.get_output_embeddings()]
    audio = names.get(id(model.get_encoder("audio")))
    tops = [top for top in (language, vision, audio, *heads) if top]
    rest = [name for name in _holders(model) if not _is_below(name, tops)]
    # A parameter of the whole, such as LLaVA-NeXT's `image_newline`: the module itself, not what is in it.
    bare = [name for name in rest if any(_is_below(top, [name]) for top in tops)]
    projector = [*_outermost(name for name in rest if name not in bare), *inside]
    patterns = [_pattern(projector, without=dead)] if projector else []
    return {
        "vision": _pattern([vision], without=[*inside, *dead]),
        "projector": "|".join([*patterns, *map(re.escape, bare)]) or r"(?!)",
        "language": _pattern([language, *heads]),
    }


def list_outside_language(model: PreTrainedModel) -> tuple[list[nn.Module], dict[str, nn.Parameter]]:
    """Return all that may read an image: modules, and parameters of modules that hold the decoder too.

    Those are such as LLaVA-NeXT's `image_newline`.
    """
    names = {id(module): name for name, module in model.named_modules()}
    heads = [model.get_output_embeddings(), model.get_decoder(), model.get_encoder("audio")]
    tops = [name for module in heads if (name := names.get(id(module)))]
    rest = [name for name in _holders(model) if not _is_below(name, tops)]
    bare = [name for name in rest if any(_is_below(top, [name]) for top in tops)]
    parameters = {
        f"{name}.{key}": parameter
        for name in bare
        for key, parameter in model.get_submodule(name).named_parameters(recurse=False)
    }
    kept: list[str] = []
    for name in rest:
        if name not in bare and not _is_below(name, kept):
            kept.append(name)
    return [model.get_submodule(name) for name in kept], parameters


def find_dead(model: PreTrainedModel, encoder: nn.Module, decoder: nn.Module) -> list[str]:
    """Return modules of the image encoder whose output nothing reads, so that no gradient reaches them.

    They are the layers behind LLaVA's `vision_feature_layer`, the pooling head of a SigLIP tower, and the
    mergers of Qwen3-VL that would add to what the last text layer has already put out.
    """
    from torch import nn

    names = {id(module): name for name, module in model.named_modules()}
    lists = [m for m in encoder.modules() if isinstance(m, nn.ModuleList)]
    layers = max((m for m in lists if not PROJECTORS.search(names[id(m)])), key=len, default=[])
    feature = getattr(model.config, "vision_feature_layer", None)
    feature = getattr(model.config, "vision_feature_layers", None) if feature is None else feature
    dead = []
    if feature is not None:
        # Entry 0 of the hidden states is what goes into the first layer.
        asked = feature if isinstance(feature, list | tuple) else [feature]
        used = max(index if index >= 0 else len(layers) + 1 + index for index in asked)
        dead += [names[id(layer)] for layer in list(layers)[used:]]
    dead += [names[id(m)] for name, m in encoder.named_modules() if name.rpartition(".")[2] == "head"]
    depth = max((len(m) for m in decoder.modules() if isinstance(m, nn.ModuleList)), default=0)
    for module in lists:
        if names[id(module)].endswith("deepstack_merger_list"):
            dead += [names[id(merger)] for merger in list(module)[max(depth - 1, 0) :]]
    return dead


def find_targets(model: nn.Module, parts: Mapping[str, str]) -> tuple[str, ...]:
    """Return the last names of all Linears of the language part, its head and routers of experts left out.

    They may name Linears of other parts too; `--train_parts` keeps those out.
    """
    from torch import nn

    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(parts["language"], name)
    ]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kept = [name for name in names if model.get_submodule(name) is not head and not ROUTERS.search(name)]
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in kept))


def find_experts(model: nn.Module) -> list[str]:
    """Return the modules whose weights are one tensor for many experts, which no LoRA by name reaches."""
    return [
        name
        for name, module in model.named_modules()
        if any(p.dim() == 3 for p in module.parameters(recurse=False)) and "expert" in name
    ]


def _holders(module: nn.Module) -> Iterator[str]:
    """Yield the names of the modules that have parameters of their own."""
    for name, child in module.named_modules():
        if name and any(True for _ in child.parameters(recurse=False)):
            yield name


def _outermost(names: Iterable[str]) -> list[str]:
    """Return where the names' branches begin: `a.projector` for `a.projector.fc1` and `a.projector.fc2`."""
    chosen: list[str] = []
    for name in names:
        parts = name.split(".")
        cut = next((i for i, part in enumerate(parts) if PROJECTORS.search(part)), len(parts) - 1)
        top = ".".join(parts[: cut + 1])
        if not _is_below(top, chosen):
            chosen.append(top)
    return chosen


def _is_below(name: str, tops: Iterable[str]) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in tops)


def _pattern(tops: Iterable[str], without: Iterable[str] = ()) -> str:
    names = "|".join(re.escape(top) for top in tops)
    excluded = "|".join(re.escape(name) for name in without)
    return (rf"(?!(?:{excluded})(?:\.|$))" if excluded else "") + rf"(?:{names})(?:\..*)?"


def read_facts(folder: Path, model_id: str) -> ModelFacts:
    """Return a checkpoint's parts, LoRA targets and default prompt, from its config.json."""
    config, model_class = find_model_class(folder, model_id)
    model = make_empty_model(config, model_class)
    parts = find_parts(model, model_id)
    notes = []
    if experts := find_experts(model):
        notes.append(
            f"{model_id} is a mixture of experts: the experts' weights ({len(experts)} modules such as "
            f"{experts[0]}) stay as they are, a LoRA trains the Linears beside them"
        )
    prompt = find_prompts(model_id, config.model_type)["prompt"]
    return ModelFacts(find_targets(model, parts), parts, prompt, tuple(notes))
