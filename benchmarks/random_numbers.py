"""Time the random numbers of one training step: those of 128 CIFAR-10 images, for one attack.

    python benchmarks/random_numbers.py

On a CPU, numpy computes uniform numbers in blocks that stay in the cache. They are compared, bit by
bit and in time, with those of torch's operations on whole tensors, which other devices use.
"""

from collections.abc import Callable
from unittest import mock

import torch
from command_line import create_parser
from measure import Ratio, describe_machine, format_table, medians, time_rounds
from torch import Tensor

from raysweep.rng import ExampleRng

SHAPE = (3, 32, 32)
# Milliseconds: a tenth of what the first implementation took.
GOALS = {"uniform": 1.4, "normal": 5.0}


def by_torch(draw: Callable[[], Tensor]) -> Tensor:
    """Draw numbers as on other devices."""
    with mock.patch.object(ExampleRng, "_uniform_by_numpy", ExampleRng._uniform_by_torch):
        return draw()


def measure(rows: int, n: int) -> list[Ratio]:
    """Time each distribution in n interleaved rounds."""
    rng = ExampleRng.for_examples(torch.arange(rows), 0, "train", 0)
    draws = {
        "uniform": lambda: rng.symmetric_uniform(SHAPE),
        "normal": lambda: rng.normal(SHAPE),
    }
    variants: dict[str, Callable[[], object]] = {}
    for name, draw in draws.items():
        assert torch.equal(draw(), by_torch(draw)), name
        variants |= {name: draw, f"{name}, torch": lambda draw=draw: by_torch(draw)}
    time_of = medians(time_rounds(variants, n))
    lines = [
        [
            name,
            f"{1000 * time_of[f'{name}, torch']:.2f}",
            f"{1000 * time_of[name]:.2f}",
            f"{time_of[f'{name}, torch'] / time_of[name]:.2f}",
        ]
        for name in draws
    ]
    print(
        f"\nRandom numbers of {rows} images of {SHAPE}, ms, median of {n} interleaved rounds; "
        f"{describe_machine()}\n"
    )
    print(format_table(["numbers", "torch, ms", "numpy, ms", "speedup"], lines), flush=True)
    return [
        Ratio(
            f"{name} numbers, {rows} images",
            f"{1000 * time_of[name]:.2f} ms",
            f"{goal} ms",
            f"{n} rounds",
        )
        for name, goal in GOALS.items()
    ]


def run(full: bool = False) -> list[Ratio]:
    """Run the part of `python benchmarks`; small sizes unless `full`."""
    return measure(128, 100) if full else measure(4, 2)


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    measure(args.rows, args.rounds)


if __name__ == "__main__":
    main()
