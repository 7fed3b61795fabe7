"""Finds the models to compare: the base, and each adapter on it. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from caption_train.adapters.record import Base, find_adapter, read_adapter, read_request, resolve_base
from caption_train.config.evaluation import EvaluateOptions
from caption_train.errors import UsageError
from caption_train.families import FAMILIES, get_family
from caption_train.families.base import Family
from caption_train.families.weight_files import fetch_commit, hash_model
from caption_train.system.files import hash_file

BASE = "base"


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate.

    Attributes:
        name: how it is called in the report.
        adapter: the adapter's folder; None for the base alone.
        base: the base, with the prompt that this candidate is given.
        identity: a hash of the weights of base and adapter, as far as they are known.
    """

    name: str
    adapter: Path | None
    base: Base
    identity: str


def find_family(options: EvaluateOptions) -> Family:
    """Return the family of the models.

    Raises:
        UsageError: it is not known, or two adapters have different ones.
    """
    named = {str(folder): read_adapter(folder).family for folder in options.peft_model}
    known = {name: family for name, family in named.items() if family}
    if len(set(known.values()) | ({options.family} - {None})) > 1:
        said = [f"--family {options.family}"] if options.family else []
        said += [f"--peft_model {name} is of {family}" for name, family in known.items()]
        raise UsageError(f"one family at a time: {', '.join(said)}")
    name = options.family or next(iter(known.values()), None)
    if name is None:
        raise UsageError(f"--peft_model {options.peft_model[0]} does not say its family: give --family")
    if name not in FAMILIES:
        raise UsageError(f"--family {name}: the families are {', '.join(FAMILIES)}")
    family = get_family(name)
    for setting in ("system_prompt", "max_pixels"):
        if getattr(options, setting) is not None and setting not in family.settings:
            raise UsageError(f"--{setting}: {family.title} has no such setting")
    family.cache_converted = options.cache_converted
    return family


def find_candidates(options: EvaluateOptions, family: Family) -> list[Candidate]:
    """Return the base, then the adapters. The base gets the first adapter's prompt and settings.

    Raises:
        UsageError: two adapters have different bases, or an adapter does not fit `--base_model`.
    """
    prompt, settings = read_request(options, family)
    adapters = [read_adapter(folder) for folder in options.peft_model]
    base_model = options.base_model or (adapters[0].base_model if adapters else None)
    for adapter in adapters:
        if options.base_model is None and adapter.base_model not in (None, base_model):
            raise UsageError(
                f"--peft_model {adapter.folder}: trained on {adapter.base_model}, and "
                f"{adapters[0].folder} on {base_model}: evaluate them one by one, or give --base_model"
            )
    bases = [
        resolve_base(family, base_model, options.revision, prompt, adapter, settings=settings)
        for adapter in adapters or [None]
    ]
    model_id, revision = bases[0].model_id, bases[0].revision
    known = hash_model(model_id) or fetch_commit(model_id, revision) or f"{model_id}@{revision}"
    found = [Candidate(BASE, None, bases[0], known)]
    for name, adapter, base in zip(_name([a.folder for a in adapters]), adapters, bases, strict=False):
        found.append(Candidate(name, adapter.folder, base, f"{known}+{_hash_adapter(adapter.folder)}"))
    return found


def _hash_adapter(folder: Path) -> str:
    """Return a hash of an adapter's weights and configuration, wherever its folder is."""
    folder = find_adapter(folder)
    files = sorted(path for path in folder.iterdir() if path.name.startswith("adapter_") and path.is_file())
    hashes = {path.name: hash_file(path) for path in files}
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]


def _name(folders: Sequence[Path]) -> list[str]:
    """Return a name for each folder, with as much of its path as tells it from the others."""
    paths = [folder.resolve().parts for folder in folders]
    names = []
    for index, parts in enumerate(paths):
        others = [other for place, other in enumerate(paths) if place != index]
        length = next((n for n in range(1, len(parts)) if parts[-n:] not in [o[-n:] for o in others]), 0)
        name = "/".join(parts[-length:]) if length else f"{folders[index]} ({index + 1})"
        names.append(f"adapter {name}" if name == BASE else name)
    return names
