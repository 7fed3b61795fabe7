"""Train the tiny Florence-2 on the sample set with Flora at several ranks: what it learns, what it holds.

python benchmarks/flora.py                      every row, into flora.json
python benchmarks/flora.py --rows 0 3           some of them

Every weight is trained (`--train_method full`), so that ranks below the width of 128 compress. Quality is the
loss and the share of captions that are right word for word on the held-out pictures; bytes are counted from
the tensors: optimizer state after the last step, accumulated gradients before it.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import ROOT, Results, count_bytes, make_parser, run_measurement  # noqa: E402

RANKS = (2, 8, 32, 128)
FLORA = {"optimizer_name": "Flora"}
COMPRESSED = {**FLORA, "accumulation_compression": True, "optimizer_rank": 128}
ROWS: dict[str, dict] = {
    "AdamW": {"optimizer_name": "AdamW"},
    "AdamW8bit": {"optimizer_name": "AdamW8bit"},
    "Adafactor (Flora without momentum)": FLORA,
    **{f"Flora, momentum at rank {rank}": {**FLORA, "optimizer_rank": rank} for rank in RANKS},
    **{f"Flora, gradients at rank {rank}": {**COMPRESSED, "accumulation_rank": rank} for rank in RANKS},
    **{
        f"Flora, both at rank {rank}": {**COMPRESSED, "optimizer_rank": rank, "accumulation_rank": rank}
        for rank in RANKS
    },
}
RECIPE = {"train_method": "full", "learning_rate": 1e-3, "batch_size": 4, "gradient_accumulation_steps": 2}


def measure(row: str, seed: int, epochs: int) -> dict:
    """Train one row in this process; return what it learned and held."""
    from caption_train.config.training import TrainOptions
    from caption_train.families import get_family
    from caption_train.training.prepare import prepare_training

    shapes = ROOT / "examples" / "shapes"
    with tempfile.TemporaryDirectory() as folder, _without_momentum("Adafactor" in row):
        options = TrainOptions(
            dataset_dir=shapes / "train",
            validation_dir=shapes / "heldout",
            output_dir=Path(folder),
            model_id=str(ROOT / "examples" / "bases" / "florence2-tiny"),
            metrics=["exact_match"],
            metric_samples=100,
            eval_every_n_epochs=epochs,
            epochs=epochs,
            seed=seed,
            device="cpu",
            **RECIPE,
            **ROWS[row],
        )
        trainer = prepare_training(options, get_family("florence"))
        gradients = _count_gradients(trainer)
        trainer.train()
        log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    state = [value for values in trainer.run.optimizer.state.values() for value in values.values()]
    evaluation = next(line for line in reversed(log) if "eval_loss" in line)
    return {
        "state": count_bytes(state),
        "gradients": gradients[-1],
        "loss": evaluation["eval_loss"],
        "exact_match": evaluation["eval_exact_match"],
    }


@contextmanager
def _without_momentum(wanted: bool) -> Iterator[None]:
    """Leave Flora's first moment out: what is left of it is Adafactor."""
    with (
        mock.patch("caption_train.training.optim.optimizer.FLORA_BETA1", None) if wanted else mock.MagicMock()
    ):
        yield


def _count_gradients(trainer) -> list[int]:
    """Return a list that gets the bytes of the gradients, or of their packs, at every optimizer step."""
    accelerator, counts = trainer.run.accelerator, []
    clip = accelerator.clip_grad_norm_

    def count(parameters, *arguments):
        held = list(getattr(accelerator, "packs", {}).values()) + [p.grad for p in parameters]
        counts.append(count_bytes(held))
        return clip(parameters, *arguments)

    accelerator.clip_grad_norm_ = count
    return counts


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", nargs="+", type=int, help=f"of {dict(enumerate(ROWS))}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    results = Results("flora.json")
    for index, row in enumerate(ROWS):
        for seed in arguments.seeds if arguments.rows is None or index in arguments.rows else []:
            # A process each: the Accelerator keeps its settings in state that processes share.
            results.add(row, str(seed), run_measurement(__file__, [row, seed, arguments.epochs]))


if __name__ == "__main__":
    main()
