"""Measure the ratio of each attack's time in AutoAttack to the time of its passes through the
model alone, on the robust digits network of the tests.

    python benchmarks/autoattack_limit.py --norm L2

The cost of a pass depends on its batch size and on the load of the machine. So right before every
EVERY-th pass of the run, the same pass is done alone (a forward, or a forward and the gradient of
the summed logits). Its cpu seconds times EVERY are the limit; they do not count as the attack's
time. There is one thread.
"""

import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from command_line import create_parser
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from robust_digits import digits, robust_digits

from raysweep.attacks import Norm, autoattack
from raysweep.evaluation.attack_model import make_attack_model
from raysweep.rng import ExampleRng
from raysweep.spec import apply_overrides

EVERY = 8
FORWARD, BOTH = "forward", "forward+backward"


class Sampled(nn.Module):
    """A model that does every EVERY-th pass twice, to sample the cost of a pass alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.reset()

    def reset(self) -> None:
        self.calls: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.sampled_rows: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    def forward(self, x: Tensor) -> Tensor:
        kind = BOTH if x.requires_grad else FORWARD
        self.calls[kind] += 1
        self.rows[kind] += len(x)
        if self.calls[kind] % EVERY == 0:
            began = time.process_time()
            self._bare(x)
            self.seconds[kind] += time.process_time() - began
            self.sampled_rows[kind] += len(x)
        return self.model(x)

    def _bare(self, x: Tensor) -> None:
        if not x.requires_grad:
            with torch.inference_mode():
                self.model(x)
            return
        point = x.detach().requires_grad_()
        torch.autograd.grad(self.model(point).sum(), point)

    @property
    def unit(self) -> dict[str, float]:
        """Seconds a row, by kind of pass."""
        return {kind: self.seconds[kind] / self.sampled_rows[kind] for kind in self.seconds}

    @property
    def limit(self) -> float:
        return sum(self.rows[kind] * cost for kind, cost in self.unit.items())


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--norm", choices=["Linf", "L2"], default="Linf")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    measure(args.norm, args.seed)


def measure(
    norm: Norm, seed: int = 0, count: int = 450, changes: Mapping[str, object] | None = None
) -> float:
    """Print the table for the first `count` of the 450 images and return the ratio over all
    attacks.

    changes: settings of the attacks to override.
    """
    model, (x, y), eps = robust_digits(), digits(count), {"Linf": 0.2, "L2": 0.7}[norm]
    live = (model(x).argmax(1) == y).nonzero()[:, 0]
    sampled, all_cpu, all_limit = Sampled(make_attack_model(model, x[:32])), 0.0, 0.0
    print(
        "| attack | robust | passes | rows a pass | us a row, forward | forward+backward | "
        "cpu s | limit s | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, attack in apply_overrides(
        autoattack(eps, norm), changes or {}, on_missing="ignore"
    ).attacks.items():
        sampled.reset()
        began = time.process_time()
        found = attack(
            sampled, x[live], y[live], ExampleRng.for_examples(live, seed).derive_stream(name)
        )
        cpu = time.process_time() - began - sum(sampled.seconds.values())
        live = live[model(found.x_adv).argmax(1) == y[live]]
        rows, calls, unit, limit = sampled.rows, sampled.calls, sampled.unit, sampled.limit
        costs = [f"{1e6 * unit[kind]:.1f}" if kind in unit else "" for kind in (FORWARD, BOTH)]
        size = rows.total() / calls.total()
        cells = [
            name,
            len(live),
            calls.total(),
            f"{size:.0f}",
            *costs,
            f"{cpu:.2f}",
            f"{limit:.2f}",
            f"{cpu / limit:.3f}" if limit else "",
        ]
        print("|", " | ".join(map(str, cells)), "|", flush=True)
        all_cpu, all_limit = all_cpu + cpu, all_limit + limit
    print(
        f"| all | {len(live)} | | | | | {all_cpu:.2f} | {all_limit:.2f} | "
        f"{all_cpu / all_limit:.3f} |"
    )
    return all_cpu / all_limit


if __name__ == "__main__":
    main()
