"""Shards gradients and optimizer state over the processes with DeepSpeed (ZeRO 2); each holds all weights.

accelerate's configuration decides whether to use it, but the engine is made here, not by accelerate 1.15.
accelerate gives the engine a single process on CPUs, so it could not be tested. And it steps inside its own
`backward`, where a step whose loss or gradient is not finite can no longer be skipped. DeepSpeed is imported
only if it is used.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment
from packaging.version import Version

from caption_train.errors import UsageError
from caption_train.system.processes import is_one_of_several

BUCKET = 20_000_000
"""Numbers sent at once, of which a copy is held meanwhile. With DeepSpeed's default, that is 2 GB."""
OLDEST, TOO_NEW = "0.19.8", "0.20"
"""0.19.7 reports a norm of 1.0 for gradients that are not finite; older ones ignore unknown settings."""
STATE = ("exp_avg", "exp_avg_sq")
"""AdamW's state of each parameter, in the shape of the parameter."""


def find_unsupported() -> list[str]:
    """Return a sentence for each setting in accelerate's DeepSpeed configuration that would be ignored."""
    set_to = {
        name: os.environ.get(f"ACCELERATE_{name}", "none").lower()
        for name in (
            *("DEEPSPEED_ZERO_STAGE", "DEEPSPEED_CONFIG_FILE", "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"),
            *("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "GRADIENT_ACCUMULATION_STEPS", "GRADIENT_CLIPPING"),
        )
    }
    settings = {
        "num_processes: one has nothing to share out, launch it without DeepSpeed": not is_one_of_several(),
        "zero_stage: set it to 2, or use examples/accelerate/fsdp.yaml, which is as stage 3": (
            set_to["DEEPSPEED_ZERO_STAGE"] not in ("none", "2")
        ),
        "deepspeed_config_file: is not read; set zero_stage to 2 instead": (
            set_to["DEEPSPEED_CONFIG_FILE"] != "none"
        ),
        "offload_optimizer_device: set it to none": set_to["DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] != "none",
        "offload_param_device: set it to none": set_to["DEEPSPEED_OFFLOAD_PARAM_DEVICE"] != "none",
        "gradient_accumulation_steps: set it to 1, use --gradient_accumulation_steps": (
            set_to["GRADIENT_ACCUMULATION_STEPS"] not in ("none", "1")
        ),
        "gradient_clipping: drop it, use --max_grad_norm": set_to["GRADIENT_CLIPPING"] != "none",
    }
    return [f"accelerate's configuration, {line}" for line, is_set in settings.items() if is_set]


class ZeroAccelerator(Accelerator):
    """An Accelerator for plain data parallelism whose one model and optimizer belong to DeepSpeed's engine.

    In every backward pass, the engine's hooks add up this process's shard of the mean gradient. The weights
    change only in `ZeroOptimizer.step`.
    """

    def __init__(self, **settings: Any) -> None:
        if settings["cpu"]:
            # DeepSpeed chooses its device when it is imported, and would choose a GPU.
            os.environ["DS_ACCELERATOR"] = "cpu"
        _check_installed()
        with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):
            super().__init__(**settings)

    def prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        """Return the engine, which is called like the model, and the optimizer of this process's shard."""
        import deepspeed

        # This applies autocast and the device; evaluation_mode leaves out DistributedDataParallel.
        model = self.prepare_model(model, evaluation_mode=True)
        engine = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,  # Only for DeepSpeed's own statistics.
                "managed_gradient_accumulation": False,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {
                    "stage": 2,
                    "reduce_bucket_size": BUCKET,
                    "allgather_bucket_size": BUCKET,
                },
            },
        )[0]
        self.optimizer = ZeroOptimizer(engine, optimizer)
        return engine, self.optimizer

    def backward(self, loss: torch.Tensor, **settings: Any) -> None:
        """Add this process's shard of the mean gradient of all processes' losses [] to what it holds."""
        self.optimizer.engine.backward(loss, **settings)

    def no_sync(self, model: torch.nn.Module) -> AbstractContextManager:
        """Do nothing: a process keeps only its shard of a gradient, so gradients are exchanged at once."""
        return nullcontext()

    def clip_grad_norm_(self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2):
        """Let the next step scale the gradient to `max_norm`; return the norm [] before clipping."""
        return self.optimizer.clip(max_norm)


class ZeroOptimizer:
    """AdamW on this process's shard of all parameters. Its saved state is that of plain AdamW."""

    step_was_skipped = False

    def __init__(self, engine: Any, adamw: torch.optim.Optimizer) -> None:
        self.engine, self.zero, self.adamw = engine, engine.optimizer, adamw

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups with the learning rates; the parameters in them are this process's flat shards."""
        return self.adamw.param_groups

    def clip(self, max_norm: float) -> torch.Tensor:
        """Finish the gradient, set what to clip it to; return its norm [], infinite if it is not finite."""
        self.zero.finalize_gradient_accumulation_boundary()
        self.zero.clip_grad = 0.0 if max_norm == float("inf") else max_norm
        return self.zero.scaled_global_norm()

    def step(self) -> None:
        """Change the weights by the gradient that `clip` has finished."""
        self.zero.step()

    def zero_grad(self) -> None:
        """Drop the gradient, also that of a skipped step."""
        self.zero.zero_grad()
        self.zero.micro_step_id = -1
        self.zero.averaged_gradients.clear()
        self.zero.all_grad_tensors.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return in the main process the state that plain AdamW would have; no state in the others.

        All processes must call it.
        """
        groups, state, start = [], {}, 0
        for group, part, members in self._parts():
            numbers = range(start, start := start + len(members))
            groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": [*numbers]})
            kept = self.adamw.state[part]
            for number, p in zip(numbers, members if kept else (), strict=False):
                whole = {name: _gather(p, kept[name]) for name in STATE}
                if torch.distributed.get_rank() == 0:
                    # Cloned, or all parameters would load one shared step tensor, and each would advance it.
                    state[number] = {"step": kept["step"].cpu().clone(), **whole}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load this process's shard of a state that AdamW saved; raise ValueError if it does not fit."""
        state = saved["state"]
        counts = [len(group["params"]) for group in saved["param_groups"]]
        if counts != [len(members) for _, _, members in self._parts()]:
            raise ValueError(f"its parameter groups have {counts} members")
        for (group, part, members), settings in zip(self._parts(), saved["param_groups"], strict=True):
            group.update({name: value for name, value in settings.items() if name != "params"})
            # A parameter that never had a gradient has no state.
            known = [(state[n], p) for n, p in zip(settings["params"], members, strict=True) if n in state]
            kept = {name: torch.zeros_like(part) for name in STATE if known}
            for (values, p), name in itertools.product(known, kept):
                here, there = _find_part(p, kept[name], values[name])
                here.copy_(there)
            if known:
                step = torch.stack([values["step"] for values, _ in known]).max().to(part.device)
                self.adamw.state[part] = {"step": step, **kept}

    def _parts(self) -> Iterator[tuple[dict[str, Any], torch.Tensor, list[torch.Tensor]]]:
        """Yield each group of AdamW, this process's flat shard of it, and the parameters of the group."""
        for group, members in zip(self.adamw.param_groups, self.zero.bit16_groups, strict=True):
            yield group, group["params"][0], members


def _find_part(p: torch.Tensor, flat: torch.Tensor, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of this process's share of `p`: in its flat shard, and in a tensor shaped like `p`."""
    if (mapping := p._hp_mapping) is None:
        return flat[:0], whole.flatten()[:0]
    here, there = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
    return flat.narrow(0, here.start, here.numel), whole.view(-1).narrow(0, there.start, there.numel)


def _gather(p: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """Return the full state of `p` in the main process; in the others, only their share among zeros."""
    whole = torch.zeros(p.shape, dtype=flat.dtype, device=flat.device)
    here, there = _find_part(p, flat, whole)
    there.copy_(here)
    torch.distributed.reduce(whole, 0)
    return whole.cpu()


def _check_installed() -> None:
    try:
        import deepspeed
    except Exception as error:  # DeepSpeed has its own type for a missing CUDA toolkit.
        problem = f"cannot be imported ({' '.join(str(error).split())})"
    else:
        if Version(OLDEST) <= Version(deepspeed.__version__) < Version(TOO_NEW):
            return
        problem = f"is of version {deepspeed.__version__}"
    raise UsageError(
        f"accelerate's configuration asks for DeepSpeed, which {problem}: pip install "
        f"'deepspeed>={OLDEST},<{TOO_NEW}', "
        "or use --config_file examples/accelerate/fsdp.yaml"
    )
