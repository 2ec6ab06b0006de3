"""Measure the cost of the sweep's objective relative to training: floating-point operations and
seconds of a validation, divided by those of an epoch.

    python benchmarks/objective_cost.py                 # all methods
    python benchmarks/objective_cost.py --methods at    # fewer
    python benchmarks/objective_cost.py --trained 3 12  # AT on digits, processor seconds only

Digits are trained, and the times of the run count. For CIFAR-10 (ResNet-18, 50,000 training
images), the cost of one row of training and of each attack is measured on a few rows. It is then
multiplied by the rows of an epoch, and by the validation examples that each attack gets if 85% are
classified correctly and 50% are robust. That is about the end of adversarial training; earlier
epochs cost less.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from command_line import create_parser
from measure import Flops, Ratio, describe_machine, format_table, medians
from torch import Tensor, nn

from raysweep.attacks import AnyAttack
from raysweep.data import Batch
from raysweep.evaluation.attack_model import make_attack_model
from raysweep.models import ModelSpec
from raysweep.rng import ExampleRng
from raysweep.spec import apply_overrides
from raysweep.training import trainer
from raysweep.training.config import TrainingConfig, build_training_config
from raysweep.training.model_variants import ModelVariants
from raysweep.training.speed_settings import ComputeSpec
from raysweep.training.trainer import compute_step_gradients, train_model

TRAIN, CLEAN, ROBUST = 50_000, 0.85, 0.5
METHODS = ("at", "gairat", "trades", "lrat")


def measure_row_cost(run: Callable[[], object], rows: int) -> tuple[float, float]:
    """Return FLOP and processor seconds per row of a second run."""
    with Flops() as counted:
        run()
    started = time.process_time()
    run()
    return counted.total / rows, (time.process_time() - started) / rows


def measure_cifar10(method: str, rows: int, network: str) -> tuple[list[str], float]:
    """Return a line of the table, and the objective's share of an epoch's FLOP."""
    config = build_training_config(
        method, {"data.name": "cifar10", "model.name": network}
    ).resolve_at(99)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(rows, 3, 32, 32, generator=generator)
    model = ModelSpec(name=config.model.name).build_model(3, 10, 0)
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    rng = ExampleRng.for_examples(torch.arange(rows), 0)
    faces = ModelVariants(model.train(), x[:1], ComputeSpec().resolve(torch.device("cpu")))
    step = measure_row_cost(
        lambda: compute_step_gradients(config.method, faces, Batch(x, y, rng.example_ids), rng),
        rows,
    )
    examples = min(config.validation.size or config.data.val_size, config.data.val_size)
    # Without the padding to the least number of rows, which a few rows would pay for.
    judged = make_attack_model(model, x).model
    cost = [
        examples * part for part in measure_row_cost(lambda: run_clean_pass(judged, x, y), rows)
    ]
    for attacks, share in ((config.validation.attacks, CLEAN), (config.validation.finish, ROBUST)):
        for attack in attacks.values():
            each = measure_row_cost(
                lambda attack=attack: shrink_ball(attack)(judged, x, y, rng), rows
            )
            cost = [total + examples * share * part for total, part in zip(cost, each, strict=True)]
    epoch = [(TRAIN - config.data.val_size) * part for part in step]
    shares = [
        part / whole / config.validation.every for part, whole in zip(cost, epoch, strict=True)
    ]
    flop, seconds = (f"{share:.1%}" for share in shares)
    row = [
        method,
        f"cifar10, {network}",
        f"{examples} every {config.validation.every}",
        flop,
        seconds,
    ]
    return row, shares[0]


def shrink_ball(attack: AnyAttack) -> AnyAttack:
    """Shrink the attack's ball so that no row is broken and dropped from the batch."""
    return apply_overrides(attack, {"eps": 1e-9})


def run_clean_pass(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Do the forward pass over clean images and compute its gradient."""
    point = x.detach().requires_grad_()
    torch.autograd.grad(model(point).gather(1, y[:, None]).sum(), point)


def measure_digits(method: str, epochs: int, small: bool = False) -> tuple[list[str], float]:
    few = {
        "*.attacks.*.steps": 2,
        "validation.finish.*.steps": 2,
        "data.train_size": 64,
        "data.val_size": 16,
    }
    config: TrainingConfig = build_training_config(
        method, {"epochs": epochs, **(few if small else {})}
    )
    with TemporaryDirectory() as folder:
        history = train_model(config, Path(folder)).last_checkpoint.history[1:]
    seconds = medians(
        {name: [r[name] for r in history] for name in ("validation_seconds", "train/seconds")}
    )
    share = seconds["validation_seconds"] / seconds["train/seconds"]
    examples = min(config.validation.size or config.data.val_size, config.data.val_size)
    return [
        method,
        f"digits, {config.model.name}",
        f"{examples} every {config.validation.every}",
        "",
        f"{share:.0%}",
    ], share


def measure_trained(method: str, epochs: Sequence[int]) -> None:
    """Measure the processor seconds of an epoch on digits, and of the objective after it.

    With another version of raysweep in `PYTHONPATH`, that version is measured.

    Args:
        method: Name of the method.
        epochs: Numbers of the epochs to measure, from 1.
    """
    config = build_training_config(method, {"epochs": max(epochs)})
    spent: dict[str, list[float]] = {"_run_steps": [], "_validate": []}

    def timed(name: str) -> Callable[..., object]:
        function = getattr(trainer._TrainingRun, name)

        def run(*arguments: object) -> object:
            began = time.thread_time()
            result = function(*arguments)
            spent[name].append(time.thread_time() - began)
            return result

        return run

    with TemporaryDirectory() as folder, ExitStack() as patches:
        for name in spent:
            patches.enter_context(mock.patch.object(trainer._TrainingRun, name, timed(name)))
        train_model(config, Path(folder))
    rows = []
    for number in epochs:
        steps, objective = (seconds[number - 1] for seconds in spent.values())
        cells = (f"{steps:.2f} s", f"{objective:.2f} s", f"{objective / steps:.0%}")
        rows.append([f"after {number} epochs", *cells])
    print(f"\nThe objective of {method} on digits, processor seconds; {describe_machine()}\n")
    print(format_table(["network", "epoch", "objective", "share"], rows), flush=True)


def measure(
    methods: tuple[str, ...], rows: int, epochs: int, network: str = "resnet18", small: bool = False
) -> list[Ratio]:
    lines, worst = [], 0.0
    for method in methods:
        line, share = measure_cifar10(method, rows, network)
        worst = max(worst, share)
        lines.append(line)
    lines += [measure_digits(method, epochs, small)[0] for method in methods]
    print(
        f"\nThe objective over an epoch of training; {rows} rows, {epochs - 1} epochs of digits; "
        f"{describe_machine()}\n"
    )
    print(
        format_table(
            ["method", "data", "examples every n epochs", "share of FLOP", "share of seconds"],
            lines,
        ),
        flush=True,
    )
    return [
        Ratio(
            "objective over an epoch, cifar10, at most", f"{worst:.1%}", "10%", f"{rows} rows, FLOP"
        )
    ]


def run(full: bool = False) -> list[Ratio]:
    """Run the part of `python benchmarks`; small sizes unless `full`."""
    return measure(METHODS, 8, 4) if full else measure(("at",), 2, 2, "digits_cnn", small=True)


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=4, help="of digits")
    parser.add_argument("--trained", type=int, nargs="+", metavar="EPOCHS")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.trained:
        measure_trained("at", args.trained)
        return
    measure(tuple(args.methods), args.rows, args.epochs)


if __name__ == "__main__":
    main()
