"""Gradients and optimizer state cut over the processes by DeepSpeed (ZeRO 2); each of them has all weights.

accelerate's configuration says whether; the engine is made here, not by accelerate (1.15), which gives it one
process on CPUs, so that nothing of it could be tested, and steps inside of its own `backward`, where a step
whose loss or gradient is no number can no longer be left out. DeepSpeed is imported where it is asked for.
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
"""Numbers sent at once, which are held a second time meanwhile. DeepSpeed's default takes 2 GB of them."""
OLDEST = "0.19.8"
"""0.19.7 calls the norm of a gradient that is not finite 1.0; older ones ignore settings they do not know."""
STATE = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter, in its shape."""


def find_unsupported() -> list[str]:
    """Return a sentence for each setting of accelerate's DeepSpeed configuration that would not be heeded."""
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
    """Accelerator of plain data parallelism whose one model and optimizer DeepSpeed's engine works on.

    The engine's hooks add up each process's part of the mean gradient in every backward pass; the weights
    change in `ZeroOptimizer.step` alone.
    """

    def __init__(self, **settings: Any) -> None:
        if settings["cpu"]:
            # It looks for the device itself as it is imported, and would take a GPU.
            os.environ["DS_ACCELERATOR"] = "cpu"
        _check_installed()
        with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):
            super().__init__(**settings)

    def prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        """Return the engine, which runs as the model does, and the optimizer of this process's part."""
        import deepspeed

        # For autocast and the device: evaluation_mode leaves out DistributedDataParallel.
        model = self.prepare_model(model, evaluation_mode=True)
        engine = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,  # Only for its own statistics.
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
        """Add this process's part of the mean gradient of all losses [] to what it has."""
        self.optimizer.engine.backward(loss, **settings)

    def no_sync(self, model: torch.nn.Module) -> AbstractContextManager:
        """Hold nothing back: a process keeps its part of a gradient only, so every part is sent at once."""
        return nullcontext()

    def clip_grad_norm_(self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2):
        """Have the step scale the gradient to `max_norm`; return its norm [] before that."""
        return self.optimizer.clip(max_norm)


class ZeroOptimizer:
    """AdamW on this process's part of all parameters, which saves its state as AdamW on the whole would."""

    step_was_skipped = False

    def __init__(self, engine: Any, adamw: torch.optim.Optimizer) -> None:
        self.engine, self.zero, self.adamw = engine, engine.optimizer, adamw

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups that the learning rate is in; the parameters in them are this process's flat parts."""
        return self.adamw.param_groups

    def clip(self, max_norm: float) -> torch.Tensor:
        """Finish the gradient; return its norm [], infinite if it is not finite; note what to scale it to."""
        self.zero.finalize_gradient_accumulation_boundary()
        self.zero.clip_grad = 0.0 if max_norm == float("inf") else max_norm
        return self.zero.scaled_global_norm()

    def step(self) -> None:
        """Change the weights by the gradient that `clip` has finished."""
        self.zero.step()

    def zero_grad(self) -> None:
        """Forget the gradient, also that of a step which was left out."""
        self.zero.zero_grad()
        self.zero.micro_step_id = -1
        self.zero.averaged_gradients.clear()
        self.zero.all_grad_tensors.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return in the main process what AdamW's would be without DeepSpeed, no state in the others.

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
                    # A step of its own for each, or one that all of them count up would be loaded.
                    state[number] = {"step": kept["step"].cpu().clone(), **whole}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take this process's part of a state that AdamW saved. Raises ValueError where it does not fit."""
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
        """Yield each group of AdamW, this process's flat part of it, and the parameters it is a part of."""
        for group, members in zip(self.adamw.param_groups, self.zero.bit16_groups, strict=True):
            yield group, group["params"][0], members


def _find_part(p: torch.Tensor, flat: torch.Tensor, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of what this process keeps of `p`: in its flat part, and in a tensor shaped like `p`."""
    if (mapping := p._hp_mapping) is None:
        return flat[:0], whole.flatten()[:0]
    here, there = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
    return flat.narrow(0, here.start, here.numel), whole.view(-1).narrow(0, there.start, there.numel)


def _gather(p: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """Return the state of `p` whole in the main process, in the others its part among zeros."""
    whole = torch.zeros(p.shape, dtype=flat.dtype, device=flat.device)
    here, there = _find_part(p, flat, whole)
    there.copy_(here)
    torch.distributed.reduce(whole, 0)
    return whole.cpu()


def _check_installed() -> None:
    try:
        import deepspeed
    except Exception as error:  # Of its own where it finds no CUDA toolkit; in one line, as all it may be.
        problem = f"cannot be imported ({' '.join(str(error).split())})"
    else:
        if Version(deepspeed.__version__) >= Version(OLDEST):
            return
        problem = f"is of version {deepspeed.__version__}"
    raise UsageError(
        f"accelerate's configuration asks for DeepSpeed, which {problem}: pip install 'deepspeed>={OLDEST}', "
        "or use --config_file examples/accelerate/fsdp.yaml"
    )
