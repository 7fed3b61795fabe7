"""A network small enough to train in a test, and the loop of training.py around it."""

import math

import torch

from caption_train.config.training import TrainOptions
from caption_train.training.distributed.accelerator import accumulate, make_accelerator
from caption_train.training.optim.optimizer import make_lr_scheduler, make_optimizer


class Network(torch.nn.Module):
    """A regression with an embedding, matrices tall and wide, a norm and a LoRA pair."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(40, 24)
        self.norm = torch.nn.LayerNorm(24)
        self.wide = torch.nn.Linear(24, 16)
        self.tall = torch.nn.Linear(16, 32)
        self.lora_A = torch.nn.Linear(32, 8, bias=False)
        self.lora_B = torch.nn.Linear(8, 32, bias=False)
        torch.nn.init.zeros_(self.lora_B.weight)

    def forward(self, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        hidden = self.tall(torch.tanh(self.wide(self.norm(self.embed(ids)))))
        return torch.nn.functional.mse_loss(hidden + self.lora_B(self.lora_A(hidden)), target)


def make_options(**changes) -> TrainOptions:
    return TrainOptions(**{"device": "cpu", "output_dir": "unused", "learning_rate": 1e-2, **changes})


def make_network() -> Network:
    torch.manual_seed(0)
    return Network()


def make_updates(count: int, micro: int = 2) -> list[list[tuple]]:
    generator = torch.Generator().manual_seed(1)
    return [
        [
            (
                torch.randint(0, 40, (4, 3), generator=generator),
                torch.randn(4, 3, 32, generator=generator),
            )
            for _ in range(micro)
        ]
        for _ in range(count)
    ]


class Run:
    """One training run, step by step."""

    def __init__(self, options: TrainOptions, model: Network | None = None, total_steps: int = 20) -> None:
        self.options = options
        self.accelerator = make_accelerator(options)
        model = model or make_network()
        optimizer = make_optimizer(options, model)
        self.lr_scheduler = make_lr_scheduler(options, optimizer, total_steps)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def step(self, batches: list[tuple]) -> tuple[float, float]:
        losses = []
        for i, batch in enumerate(batches):
            with accumulate(self.accelerator, self.model, last=i == len(batches) - 1):
                loss = self.model(*batch) / len(batches)
                self.accelerator.backward(loss)
            losses.append(loss.item())
        limit = self.options.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit).item()
        if math.isfinite(norm):
            self.optimizer.step()
            self.lr_scheduler.step()
        self.optimizer.zero_grad()
        return sum(losses), norm

    def train(self, updates: list) -> list[tuple[float, float]]:
        return [self.step(batches) for batches in updates]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}
