"""Measure the time that raysweep's own networks lose to the checks of models of other people.

    python benchmarks/model_checks.py               # 9 pairs of runs of each
    python benchmarks/model_checks.py --rounds 3    # fewer

Each round runs an evaluation (AutoAttack on digits) and a training run (adversarial training of
digits) with the checks and without: without, each fast path is taken untried, images are not
copied, and nobody looks whether rows depend on their batch. The two take turns, so that both have
the same machine. With one thread the times are processor seconds.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from command_line import create_parser
from measure import describe_machine, format_table, time_rounds
from torch import Tensor, nn

from raysweep.data import DataSpec, load_data
from raysweep.evaluation import attack_model, evaluate, model_inspection
from raysweep.evaluation.attack_model import FixedSizeBatches, copy_model
from raysweep.models import ModelSpec
from raysweep.training import model_variants, trainer
from raysweep.training.config import TrainingConfig, build_training_config

EPS = 0.03


def _apply_all_fast_paths(model: nn.Module, x: Tensor) -> nn.Module:
    fast_model = copy_model(model)
    assert fast_model is not None
    for apply in attack_model._FAST_PATHS.values():
        fast_model = apply(fast_model, x)
    return fast_model


def _forward_without_copy(self: FixedSizeBatches, x: Tensor, min_rows: int) -> Tensor:
    n_rows = len(x)
    if n_rows < min_rows:
        x = x.repeat(-(-min_rows // n_rows), *(1 for _ in x.shape[1:]))[:min_rows]
    logits: Tensor = self.model(x).to(x.dtype)
    return logits[:n_rows]


@contextmanager
def leave_out_checks() -> Iterator[None]:
    """In this block models are trusted, as if all were raysweep's own."""
    with ExitStack() as stack:
        for place, name, replacement in (
            (attack_model, "_apply_fast_paths", _apply_all_fast_paths),
            (FixedSizeBatches, "_forward_filled", _forward_without_copy),
            (model_inspection, "_depends_on_batch", lambda model, x: False),
            (trainer, "check_model_output", lambda *arguments: None),
            (trainer, "can_use_channels_last", lambda model, images: True),
            (model_variants, "follows_model", lambda *arguments: True),
            (model_variants, "needs_adapter", lambda model, images: False),
        ):
            stack.enter_context(patch.object(place, name, replacement))
        yield


def build_evaluation(examples: int) -> Callable[[], object]:
    """AutoAttack on digits that a network of raysweep classifies right; most remain so."""
    data = load_data(DataSpec(val_size=100))
    model = ModelSpec(name="digits_cnn").build_model(1, 10, 0).eval()
    x = data.test.get_float_images(slice(0, 450))
    with torch.no_grad():
        logits = model(x)
    top = logits.topk(2, dim=1).values
    surest = (top[:, 0] - top[:, 1]).argsort(descending=True)[:examples]
    return lambda: evaluate(model, x[surest], logits.argmax(1)[surest], "autoattack", EPS)


def build_training(epochs: int) -> Callable[[], object]:
    """Adversarial training of digits, with a validation after each epoch."""
    config: TrainingConfig = build_training_config(
        "at", {"epochs": epochs, "data.val_size": 100, "batch_size": 64}
    )
    data = load_data(config.data)

    def run() -> None:
        with TemporaryDirectory() as folder:
            trainer.train_model(config, Path(folder), data=data)

    return run


def compute_interval(ratios: Sequence[float]) -> tuple[float, float]:
    """The smallest and largest of n: they hold the median with probability 1 - 2^(1 - n)."""
    return min(ratios), max(ratios)


def measure(name: str, run: Callable[[], object], rounds: int) -> list[str]:
    """Return a line of the table."""

    def run_without() -> None:
        with leave_out_checks():
            run()

    seconds = time_rounds({"with": run, "without": run_without}, rounds)
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    low, high = compute_interval(ratios)
    return [
        name,
        f"{statistics.median(seconds['with']):.2f}",
        f"{statistics.median(seconds['without']):.2f}",
        f"{statistics.median(ratios):.3f}",
        f"{low:.3f} to {high:.3f}",
        "1.02",
        str(rounds),
    ]


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        measure(
            f"AutoAttack on {args.examples} digits", build_evaluation(args.examples), args.rounds
        ),
        measure(f"{args.epochs} epochs on digits", build_training(args.epochs), args.rounds),
    ]
    print(describe_machine())
    print()
    head = ["run", "with, s", "without, s", "ratio", "of the pairs", "goal", "n"]
    print(format_table(head, rows))


if __name__ == "__main__":
    main()
