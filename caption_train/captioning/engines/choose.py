"""Chooses what makes the captions of a run. No torch, unless the model is in this process."""

from __future__ import annotations

from caption_train.adapters.record import Base
from caption_train.captioning.engines.engine import Engine
from caption_train.config.captioning import CaptionOptions
from caption_train.families.base import Family
from caption_train.system.memory import pausing_garbage_collection
from caption_train.system.processes import Processes


def make_engine(family: Family, base: Base, options: CaptionOptions, processes: Processes) -> Engine:
    """Return what the flags say: `--endpoint`, `--engine ray`, or this process."""
    if options.endpoint:
        from caption_train.captioning.engines.endpoint import ServerEngine as Chosen
    elif options.engine == "ray":
        from caption_train.captioning.engines.cluster.engine import RayEngine as Chosen
    else:
        with pausing_garbage_collection():
            from caption_train.captioning.engines.local import LocalEngine as Chosen
    return Chosen(family, base, options, processes)
