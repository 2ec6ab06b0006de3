"""Measure AutoAttack: its verdicts, its time, and the passes through the model that it does and
that the settings of 'standard' prescribe.

    python benchmarks/autoattack.py digits --norm Linf
        the robust digits network of the tests
    python benchmarks/autoattack.py torchattacks
        time beside torchattacks 3.5.1, if it is installed
    python benchmarks/autoattack.py defences
        models whose outputs mislead gradients: verdicts beside the official package's
    python benchmarks/autoattack.py mnist --data DATA
        10,000 MNIST images; an exact verifier gives the lower bound
    python benchmarks/autoattack.py square --data DATA
        MNIST images that only Square breaks, step by step
    python benchmarks/autoattack.py hard --data DATA
        MNIST images on which gradient attacks fail

DATA contains `mnist/` (the four idx .gz files) and `models/` (published networks with `archs.py`).
Every process has one thread.
"""

import argparse
import gzip
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from command_line import create_parser
from measure import Ratio
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import autoattack_limit

from raysweep.attacks import (
    APGD,
    FAB,
    PGD,
    AttackCascade,
    AutoAttackVersion,
    Square,
    autoattack,
    true_class_margin,
)
from raysweep.evaluation import (
    ProcessPoolMap,
    RobustnessReport,
    evaluate,
    show_evaluation_progress,
)
from raysweep.evaluation.attack_model import FixedSizeBatches
from raysweep.models.device import get_model_device
from raysweep.rng import ExampleRng

# Of the 10,000 images: a minute each at most.
SHARDS = 100
# Settings that shorten AutoAttack, to check only that the benchmark works.
SHORT = {"attacks.*.steps": 10, "attacks.*.targets": 2, "attacks.*.queries": 50}
# MNIST images of WK17a that gradients leave and Square breaks, not all of them with every seed.
OF_SQUARE = [211, 2610, 4477, 4929, 6101, 479, 6035, 8, 3511]
# cpu seconds of the official package, one thread, on the machine that recorded tests/data/aa.
OFFICIAL_CPU_S = {
    "Linf": {"apgd-ce": 3.24, "apgd-t": 10.53, "fab-t": 18.54, "square": 17.92},
    "L2": {"apgd-ce": 2.96, "apgd-t": 11.62, "fab-t": 20.17, "square": 25.42},
}


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument(
        "what", choices=["digits", "torchattacks", "defences", "mnist", "square", "hard"]
    )
    parser.add_argument("--norm", choices=["Linf", "L2"], default="Linf")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[0], help="0: in this process")
    parser.add_argument("--examples", type=int, nargs="+", default=[0], help="0: all")
    parser.add_argument("--resume", type=Path, help="mnist: a folder to go on from after a kill")
    args = parser.parse_args()
    torch.set_num_threads(1)
    {
        "digits": digits_benchmark,
        "torchattacks": torchattacks_benchmark,
        "defences": defences_benchmark,
        "mnist": mnist_benchmark,
        "square": square_benchmark,
        "hard": hard_benchmark,
    }[args.what](args)


def run(full: bool = False) -> list[Ratio]:
    """Run the part of `python benchmarks`: the robust digits network of the tests, with one thread
    and with two processes.
    """
    from robust_digits import OFFICIAL, digits, robust_digits

    found: list[Ratio] = []
    count = 450 if full else 8
    model, (x, y), n = robust_digits(), digits(count), f"{count} images"
    for norm, eps in (("Linf", 0.2), ("L2", 0.7)) if full else (("Linf", 0.2),):
        if full:
            report, _, cpu = time_evaluation(model, x, y, eps, norm, 0, 0)
            robust = OFFICIAL[f"{norm}.square"].sum()
            speedup = sum(OFFICIAL_CPU_S[norm].values()) / cpu
            value = f"{speedup:.2f} ({report.robust.sum()} robust, official {robust})"
            found.append(
                Ratio(
                    f"AutoAttack {norm} over the official package, as recorded elsewhere",
                    value,
                    "2",
                    n,
                )
            )
        if (ratio := compare_with_torchattacks(model, x, y, eps, norm, 0, None)) is not None:
            found.append(Ratio(f"AutoAttack {norm} over torchattacks", ratio, "2", n))
        over = autoattack_limit.measure(norm, 0, count, None if full else SHORT)
        found.append(Ratio(f"AutoAttack {norm}, time over its passes'", f"{over:.2f}", "1.15", n))
    attack = "autoattack" if full else "apgd-ce"
    one, two = (
        time_evaluation(model, x, y, 0.2, "Linf", 0, processes, attack) for processes in (1, 2)
    )
    assert np.array_equal(one[0].robust, two[0].robust), "the verdict depends on the workers"
    cores = f"2 on idle cores (load {os.getloadavg()[0]:.0f})"
    found.append(Ratio(f"1 to 2 workers of {attack}", f"{one[1] / two[1]:.2f}", cores, n))
    return found


def digits_benchmark(args: argparse.Namespace) -> None:
    from robust_digits import OFFICIAL, digits, robust_digits

    model, (x, y), eps = robust_digits(), digits(), {"Linf": 0.2, "L2": 0.7}[args.norm]
    for seed in args.seeds:
        for count in (c or len(x) for c in args.examples):
            for processes in args.processes:
                report, wall, cpu = time_evaluation(
                    model, x[:count], y[:count], eps, args.norm, seed, processes
                )
                print(
                    f"\n{args.norm} eps {eps} seed {seed}, {count} examples, "
                    f"{processes or 'this'} process(es)"
                )
                for name, rows in report.robust_after.items():
                    print(
                        f"  {name:8} {rows.sum():4} robust, official "
                        f"{OFFICIAL[f'{args.norm}.{name}'][:count].sum():4}"
                    )
                official = sum(OFFICIAL_CPU_S[args.norm].values())
                print(
                    f"  wall {wall:.1f} s, cpu {cpu:.1f} s; official package cpu {official:.1f} s "
                    "where it was recorded"
                )
                for what in ("prescribed", "done"):
                    print(f"  passes {what}:", dict(count_passes(report, done=what == "done")))


def defences_benchmark(args: argparse.Namespace) -> None:
    """Compare our verdicts with the official ones on the first 150 images, for models with masked,
    saturated, softmax and randomised outputs.
    """
    from robust_digits import DEFENCES, OFFICIAL, Wrapped, digits

    for name in ("quant4", "scale1000", "softmax", "random"):
        for seed in args.seeds:
            report = evaluate(Wrapped(DEFENCES[name]), *digits(150), eps=0.2, seed=seed)
            counts = [
                f"{key} {rows.sum()}/{OFFICIAL[f'{name}.{key}'].sum()}"
                for key, rows in report.robust_after.items()
            ]
            print(
                f"{name} seed {seed}, robust ours/official: {', '.join(counts)}",
                *report.warnings,
                sep="\n  ",
                flush=True,
            )


def time_evaluation(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str,
    seed: int,
    processes: int,
    attack: str = "autoattack",
) -> tuple[RobustnessReport, float, float]:
    """Evaluate; return the report, wall seconds, and cpu seconds of this process only."""
    if not processes:
        wall, cpu = time.monotonic(), time.process_time()
        report = evaluate(model, x, y, attack, eps, norm=norm, seed=seed)
        return report, time.monotonic() - wall, time.process_time() - cpu
    with ProcessPoolMap(processes) as pool:
        evaluate(model, x[:8], y[:8], attack="pgd20", eps=eps, norm=norm, map=pool)  # start them
        wall, cpu = time.monotonic(), time.process_time()
        report = evaluate(model, x, y, attack, eps, norm=norm, seed=seed, map=pool)
        return report, time.monotonic() - wall, time.process_time() - cpu


def count_passes(report: RobustnessReport, done: bool) -> Counter[str]:
    """Count passes of one row through the model, by kind: from the report's counts if `done`, else
    those that the settings prescribe.
    """
    total: Counter[str] = Counter()
    live = int(report.clean.sum())
    for name, attack in autoattack(report.eps, report.norm).attacks.items():  # type: ignore[arg-type]
        queries = report.cost[name].queries
        if isinstance(attack, APGD):
            runs = 9 if attack.loss == "dlr-targeted" else 1
            total["forward+backward"] += queries if done else live * runs * (attack.steps + 1)
        elif isinstance(attack, FAB):
            total["forward+backward"] += queries // 2 if done else live * 9 * attack.steps
            total["forward"] += queries // 2 if done else live * 9 * attack.steps
        elif isinstance(attack, Square):
            total["forward"] += queries if done else live * (attack.queries + 1)
        live = int(report.robust_after[name].sum())
    return total


def torchattacks_benchmark(args: argparse.Namespace) -> None:
    """Compare our time with torchattacks', for each attack in turn, with the official 100 steps.

    Without --processes, both run in this process and cpu time counts. With --processes N, ours runs
    in N processes and torchattacks with N threads, and wall time counts.
    """
    from robust_digits import digits, robust_digits

    model, (x, y), eps = robust_digits(), digits(), {"Linf": 0.2, "L2": 0.7}[args.norm]
    for processes in args.processes:
        torch.set_num_threads(processes or 1)
        with ProcessPoolMap(processes) if processes else InThisProcess() as pool:
            evaluate(
                model, x[:8], y[:8], attack="pgd20", eps=eps, norm=args.norm, map=pool
            )  # start them
            for seed in args.seeds:
                compare_with_torchattacks(model, x, y, eps, args.norm, seed, pool)


def compare_with_torchattacks(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str,
    seed: int,
    pool: ProcessPoolMap | None,
    version: AutoAttackVersion = "standard",
) -> str | None:
    """Return the ratio of torchattacks' time to ours, and both verdicts.

    None if torchattacks, which is not a dependency, cannot be imported.
    """
    try:
        from torchattacks.attacks.apgd import APGD as TheirAPGD
        from torchattacks.attacks.apgdt import APGDT as TheirAPGDT
        from torchattacks.attacks.fab import FAB as TheirFAB
        from torchattacks.attacks.square import Square as TheirSquare
    except ImportError as error:
        print(f"torchattacks cannot be imported ({error}): pip install --no-deps torchattacks")
        return None
    on_gpu = get_model_device(model).type == "cuda"
    clock, kind = (time.monotonic, "wall") if pool or on_gpu else (time.process_time, "cpu")

    def right(rows: np.ndarray, x: Tensor) -> np.ndarray:
        with torch.no_grad():
            return (model(x.to(get_model_device(model))).argmax(1).cpu() == y[rows]).numpy()

    frozen = {"eps": eps, "norm": norm, "seed": seed}
    theirs = {
        "apgd-ce": TheirAPGD(model, steps=100, **frozen),
        "apgd-t": TheirAPGDT(model, steps=100, n_classes=10, **frozen),
        "fab-t": TheirFAB(model, steps=100, n_classes=10, multi_targeted=True, **frozen),
        "square": TheirSquare(model, n_queries=5000, **frozen),
    }
    clean = right(np.arange(len(y)), x)
    live, total = {"ours": clean, "theirs": clean.copy()}, Counter()
    cascade = autoattack(eps, norm, version)  # type: ignore[arg-type]
    for name, attack in cascade.attacks.items():
        rows = np.flatnonzero(live["ours"])
        alone = AttackCascade(attacks={name: attack}, tf32=cascade.tf32)
        began = clock()
        report = evaluate(model, x[rows], y[rows], attack=alone, seed=seed, index=rows, map=pool)
        spent = {"ours": clock() - began}
        live["ours"][rows] = report.robust
        rows = np.flatnonzero(live["theirs"])
        began = clock()
        x_adv = theirs[name](x[rows], y[rows])
        spent["theirs"] = clock() - began
        live["theirs"][rows] = right(rows, x_adv)
        total.update(spent)
        print(
            f"  {name:8}",
            "; ".join(f"{who} {spent[who]:.1f} s, {live[who].sum()} robust" for who in spent),
            flush=True,
        )
    ratio = total["theirs"] / total["ours"]
    print(
        f"  {kind}: torchattacks {total['theirs']:.1f} s / ours {total['ours']:.1f} s = {ratio:.2f}"
    )
    return f"{ratio:.2f} ({live['ours'].sum()} robust, theirs {live['theirs'].sum()})"


def mnist_benchmark(args: argparse.Namespace) -> None:
    """Attack WK17a at eps 0.1, where mixed-integer programming proves 438 errors on 10,000 images;
    no attack can find more.
    """
    archs, (x, y) = import_published_models(args.data), load_mnist(args.data)
    with ProcessPoolMap(max(args.processes)) if max(args.processes) else InThisProcess() as pool:
        for seed in args.seeds:
            began = time.monotonic()
            settings = {"seed": seed, "map": pool, "shards": SHARDS, "resume_dir": args.resume}
            with show_evaluation_progress() as progress:
                report = evaluate(
                    archs.load("wk17a_mipverify"), x, y, eps=0.1, progress=progress, **settings
                )
            errors = {name: int((~rows).sum()) for name, rows in report.robust_after.items()}
            print(
                f"wk17a_mipverify eps 0.1 seed {seed}: errors {int((~report.clean).sum())} clean, "
                f"{json.dumps(errors)}"
            )
            print(
                f"  {int((~report.robust).sum())} of at most 438; official 433; "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )


def square_benchmark(args: argparse.Namespace) -> None:
    """Compare which images Square and a plain copy of the official steps break with the same random
    numbers.
    """
    archs, (x, y), rows = (
        import_published_models(args.data),
        load_mnist(args.data),
        torch.tensor(OF_SQUARE),
    )
    model, x, y = FixedSizeBatches(archs.load("wk17a_mipverify")), x[rows].float() / 255, y[rows]
    for seed in args.seeds:
        attack, rng = Square(eps=0.1), ExampleRng.for_examples(rows, seed).derive_stream("square")
        ours = true_class_margin(model(attack(model, x, y, rng).x_adv), y) <= 0
        official = official_square(attack, model, x, y, rng.derive_stream("restart", 0)) <= 0
        fell = [
            [row for row, hit in zip(OF_SQUARE, hits.tolist(), strict=True) if hit]
            for hits in (ours, official)
        ]
        print(
            f"seed {seed}: the official steps break {fell[1]}, ours "
            f"{'the same' if fell[0] == fell[1] else fell[0]}"
        )


@torch.inference_mode()
def official_square(
    attack: Square, model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng
) -> Tensor:
    """Return the margins (N,) after all queries. Each query sets x_best + 2 eps s in a window,
    clamped to the ball and then to [0, 1].
    """
    eps, size = attack.eps, x.shape[-1]
    stripes = torch.where(rng.derive_stream("start").uniform((1, 1, size)) < 0.5, -eps, eps)
    best_x = (x + stripes).clamp(0, 1)
    best = true_class_margin(model(best_x), y)
    for query, (down, right, sign) in enumerate(attack._draw_shared_numbers(rng, 3)):
        live = (best > 0).nonzero()[:, 0]
        if not len(live):
            break
        side = attack._window_side(query, size * size)
        top, left = int(down * (size - side)), int(right * (size - side))
        candidate = best_x[live]
        candidate[..., top : top + side, left : left + side] += -2 * eps if sign < 0.5 else 2 * eps
        candidate = candidate.clamp(x[live] - eps, x[live] + eps).clamp(0, 1)
        least = true_class_margin(model(candidate), y[live])
        better = least < best[live]
        best_x[live[better]], best[live[better]] = candidate[better], least[better]
    return best


def hard_benchmark(args: argparse.Namespace) -> None:
    """Attack images that have proven adversarial examples, of which plain PGD finds none."""
    archs, (x, y) = import_published_models(args.data), load_mnist(args.data)
    for name, file in (
        ("sdp_mnist_cnn_a_adv", "mnist_cnn_a_adv"),
        ("babattack_mnist_madry_tiny", "mnist_MadryCNN_no_maxpool_tiny"),
    ):
        lines = (
            (args.data / "models" / "hard_idx" / f"{file}__mip_unsafe_idx.txt")
            .read_text()
            .replace(",", " ")
            .split()
        )
        rows = torch.tensor([int(line) for line in lines])
        plain = AttackCascade(attacks={"pgd": PGD(eps=0.3, steps=100, step_size=0.01)})
        for attack in (plain, autoattack(0.3), autoattack(0.3, version="plus")):
            for seed in args.seeds:
                report = evaluate(
                    archs.load(name), x[rows], y[rows], attack=attack, seed=seed, index=rows
                )
                fallen = Counter(report.broken_by.tolist())
                print(
                    f"{name}: {len(rows) - fallen['']} of {len(rows)} fall: {dict(fallen)} "
                    f"(seed {seed})",
                    flush=True,
                )


class InThisProcess:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


def load_mnist(data: Path) -> tuple[Tensor, Tensor]:
    """Load the 10,000 test images, uint8 (N, 1, 28, 28), and their labels."""
    read = [
        np.frombuffer(
            gzip.decompress((data / "mnist" / name).read_bytes()), np.uint8, offset=offset
        )
        for name, offset in (("t10k-images-idx3-ubyte.gz", 16), ("t10k-labels-idx1-ubyte.gz", 8))
    ]
    return torch.tensor(read[0]).view(-1, 1, 28, 28), torch.tensor(read[1]).long()


def import_published_models(data: Path):
    sys.path.insert(0, str(data / "models"))
    import archs

    return archs


if __name__ == "__main__":
    main()
