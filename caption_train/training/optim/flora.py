"""Flora inside accelerate's loop, with exactly the formulas of the package flora-opt ("upstream" below).

Hao, Cao, Mou: "Flora: Low-Rank Adapters Are Secretly Gradient Compressors", ICML 2024. A gradient G [m, n] is
held as A @ G [r, n] if m < n, else as G @ A.T [m, r], with A ~ N(0, 1/r). It is decompressed as A.T @ (A @
G), whose expectation over A is G. Importing this module takes seconds, so do it only if Flora is used.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from accelerate.optimizer import AcceleratedOptimizer
from flora_opt.optimizers.torch import flora as upstream

from caption_train.training.optim.flora_step import step_weight


def take_gradient(p: torch.Tensor) -> torch.Tensor | None:
    """Return the gradient of `p` and remove it from `p`, so that its memory can be freed."""
    gradient, p.grad = p.grad, None
    return gradient


class Flora(upstream.Flora):
    """Adafactor with its momentum compressed to `rank`. The random projection changes every `kappa` steps."""

    @staticmethod
    def _get_options(param_group: dict, param_shape: tuple[int, ...]) -> tuple[bool, bool, bool]:
        """Return whether the second moment is factored, a first moment exists, and the first is compressed.

        Upstream also compresses if the rank equals the dimension, which only adds noise. And it takes each
        matrix whose sides have a ratio above 4 for an embedding, as every LoRA matrix has. Here, embeddings
        are in a group whose rank is None.
        """
        factored = len(param_shape) == 2 and param_group["factorize_second_moment"]
        has_momentum = bool(param_group["beta1"])
        return factored, has_momentum, factored and has_momentum and shrinks(param_shape, param_group["rank"])

    @torch.no_grad()
    def step(self, closure=None, take_gradient: Callable = take_gradient) -> None:
        """Step one parameter at a time.

        Args:
            closure: not used; torch's interface has it.
            take_gradient: returns the gradient of a parameter, or None to leave the parameter unchanged.
        """
        for group in self.param_groups:
            for p in group["params"]:
                # In a list, from which the step removes it: a variable here would keep the gradient alive.
                held = [take_gradient(p)]
                if held[0] is not None:
                    step_weight(p, held, self.state[p], group, self._get_options(group, p.shape)[2])

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state in its own dtype; torch would round float32 state to the dtype of a bf16 weight."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            state = self.state[parameters[index]]
            for key, value in saved.items():
                if isinstance(value, torch.Tensor):
                    state[key] = value.detach().clone().to(parameters[index].device)


class CompressedAccelerator(upstream.FloraAccelerator):
    """FloraAccelerator whose backward pass only compresses gradients; the loop takes the step.

    Upstream steps inside the backward hooks. So gradients cannot be clipped or refused, the schedule does not
    reach the hooks' group, ranks drift apart, and no checkpoint holds the seeds. Here, a hook adds each
    gradient to its compressed sum, the "pack", and frees it. `clip_grad_norm_` averages the packs over the
    ranks and measures the norm after decompression. `CompressedOptimizer.step` decompresses and steps one
    parameter at a time.
    """

    def __init__(self, rank: int, **settings) -> None:
        super().__init__(None, **settings)
        self.proj_rank = rank
        self._reduced = False

    def is_factorized(self, p: torch.Tensor) -> bool:
        """Tell whether the pack of `p` is smaller than its gradient; if not, the pack is the gradient."""
        return p.dim() == 2 and shrinks(p.shape, self.proj_rank)

    def prepare_model(self, model: torch.nn.Module, device_placement=None, evaluation_mode: bool = False):
        """Prepare without DistributedDataParallel, whose buckets are as large as all gradients together.

        Ranks start equal because rank 0's trainable weights are sent to all, and stay equal because packs are
        averaged.
        """
        model = super().prepare_model(model, device_placement, evaluation_mode=True)
        if self.num_processes > 1 and not evaluation_mode:
            for p in model.parameters():
                if p.requires_grad:
                    torch.distributed.broadcast(p.data, src=0)
        return model

    def prepare_optimizer(self, optimizer: Flora, device_placement=None) -> "CompressedOptimizer":
        """Attach the compressing hooks to every trainable parameter of the optimizer."""
        placement = self.device_placement if device_placement is None else device_placement
        prepared = CompressedOptimizer(self, optimizer, device_placement=placement)
        for index, p in enumerate(prepared.trainable()):
            self.seeds[p] = index
            p.register_post_accumulate_grad_hook(self._compress)
        self._optimizers.append(prepared)
        return prepared

    @torch.no_grad()
    def _compress(self, p: torch.Tensor) -> None:
        pack = self._down_project(self.seeds[p], p.grad) if self.is_factorized(p) else p.grad
        self.packs[p] = self.packs[p].add_(pack) if p in self.packs else pack
        p.grad = None

    @torch.no_grad()
    def decompress(self, p: torch.Tensor) -> torch.Tensor:
        """Return the accumulated gradient of `p`, in the shape of `p`."""
        return self._up_project(self.seeds[p], p, self.packs[p]) if self.is_factorized(p) else self.packs[p]

    def take_gradient(self, p: torch.Tensor) -> torch.Tensor | None:
        """Return the accumulated gradient of `p`, delete its pack and draw its next projection."""
        if p not in self.packs:
            return None
        gradient = self.decompress(p)
        del self.packs[p]
        self.seeds[p] = upstream.next_seed(self.seeds[p])
        return gradient

    @torch.no_grad()
    def clip_grad_norm_(self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2):
        """Average the packs over all ranks, then clip the norm of the gradients that they decompress to.

        Args:
            parameters: the parameters to clip.
            max_norm: the largest norm that is allowed; infinity clips nothing.
            norm_type: the p of the p-norm.

        Returns:
            The norm [] before clipping, the same on every rank.
        """
        self.reduce_packs()
        packed = [p for p in parameters if p in self.packs]
        norms = [torch.linalg.vector_norm(self.decompress(p), norm_type) for p in packed]
        norm = torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros(())
        if packed and max_norm != float("inf"):
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for p in packed:
                self.packs[p].mul_(scale.to(self.packs[p].dtype))
        return norm

    @torch.no_grad()
    def reduce_packs(self) -> None:
        """Average the packs over the ranks, once per optimizer step.

        Compression is linear, so the result is the pack of the average gradient, for rank / dimension of the
        traffic. A rank without a gradient for a parameter counts as zero.
        """
        if self.num_processes == 1 or self._reduced:
            return
        self._reduced = True
        parameters = list(self.seeds)
        present = torch.tensor([p in self.packs for p in parameters], dtype=torch.uint8, device=self.device)
        torch.distributed.all_reduce(present, torch.distributed.ReduceOp.MAX)
        waiting = []
        for p in (p for p, anywhere in zip(parameters, present.tolist(), strict=True) if anywhere):
            if p not in self.packs:
                self.packs[p] = self._empty_pack(p)
            self.packs[p] = self.packs[p].contiguous().div_(self.num_processes)
            waiting.append(torch.distributed.all_reduce(self.packs[p], async_op=True))
        for work in waiting:
            work.wait()

    def _empty_pack(self, p: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros_like(p, memory_format=torch.contiguous_format)
        return self._down_project(self.seeds[p], zeros) if self.is_factorized(p) else zeros

    def clear_packs(self) -> None:
        self.packs.clear()
        self._reduced = False


class CompressedOptimizer(AcceleratedOptimizer):
    """Flora as `CompressedAccelerator` prepares it. Its state includes that of the accumulation."""

    def __init__(self, accelerator: CompressedAccelerator, optimizer: Flora, device_placement: bool) -> None:
        self.accelerator = accelerator
        super().__init__(optimizer, device_placement=device_placement)

    def trainable(self) -> Iterator[torch.Tensor]:
        """Yield the trained parameters in the order in which the state is saved."""
        for group in self.param_groups:
            yield from (p for p in group["params"] if p.requires_grad)

    def step(self, closure=None) -> None:
        """Step every parameter that has a pack, at the end of an accumulation only."""
        if self.gradient_state.sync_gradients:
            self.accelerator.reduce_packs()
            self.optimizer.step(take_gradient=self.accelerator.take_gradient)
            self.accelerator.clear_packs()

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Delete the accumulated gradients, also if the step was skipped."""
        super().zero_grad(set_to_none)
        if self.gradient_state.sync_gradients:
            self.accelerator.clear_packs()

    def state_dict(self) -> dict:
        """Return the optimizer's state; "accumulation" holds each parameter's seed and pack by index."""
        parameters, accelerator = list(self.trainable()), self.accelerator
        packs = {i: accelerator.packs[p] for i, p in enumerate(parameters) if p in accelerator.packs}
        seeds = [accelerator.seeds[p] for p in parameters]
        return {**self.optimizer.state_dict(), "accumulation": {"seeds": seeds, "packs": packs}}

    def load_state_dict(self, state_dict: dict) -> None:
        state_dict = dict(state_dict)
        accumulation = state_dict.pop("accumulation")
        super().load_state_dict(state_dict)
        parameters = list(self.trainable())
        self.accelerator.seeds.update(zip(parameters, accumulation["seeds"], strict=True))
        self.accelerator.clear_packs()
        for index, pack in accumulation["packs"].items():
            self.accelerator.packs[parameters[index]] = pack.to(parameters[index].device, copy=True)


def shrinks(shape: tuple[int, ...], rank: int | None) -> bool:
    """Tell whether a matrix of this shape is smaller when it is held at `rank`."""
    return rank is not None and rank < min(shape)
