"""Measure how well cheap validation metrics rank models in the order of AutoAttack: Kendall's tau
over many small models on digits.

    python benchmarks/objectives.py --models 48 --examples 200 --out objectives.json

Trains each model (methods x seeds x epochs, in parallel processes), measures the candidates on the
validation split and full AutoAttack on test examples, and prints two Markdown tables: each
candidate's Kendall tau with a 95% interval (models drawn with replacement), and each method's
symptoms of gradient masking. Finished models are stored in --out and not repeated.
"""

import ast
import itertools
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from command_line import create_parser
from scipy.stats import kendalltau

from raysweep.attacks import APGD, PGD, Square
from raysweep.data import load_data
from raysweep.evaluation import evaluate
from raysweep.spec import apply_overrides
from raysweep.training.config import build_training_config
from raysweep.training.trainer import train_model
from raysweep.training.validation import Validation

METHODS = ("at", "gairat", "trades", "mart", "lrat", "gair-mart", "mail-at", "gair-fat")
EPS = 0.15
SYMPTOMS = ("masking_gap", "val/ce_cw_gap", "val/scaling_gap", "zero_gradient")


def jobs(count: int, lengths: list[int]) -> list[tuple[str, int, int]]:
    """List (method, seed, epochs) of the models to train, cycling through the methods."""
    grid = [
        (m, seed, epochs) for seed, epochs in itertools.product(range(20), lengths) for m in METHODS
    ]
    return grid[:count]


def measure(job: tuple[str, int, int], examples: int, train: int, val: int) -> dict[str, float]:
    torch.set_num_threads(1)
    method, seed, epochs = job
    lr = {"kind": "piecewise", "boundaries": [epochs - 1], "values": [0.05, 0.01]}
    sizes = {"data.train_size": train, "data.val_size": val, "validation.every": epochs}
    config = build_training_config(
        method, {"epochs": epochs, "seed": seed, "optim.lr": lr, **sizes}
    )
    config = apply_overrides(config, {"*.burn_in": epochs // 2}, on_missing="ignore")
    data = load_data(config.data)
    with TemporaryDirectory() as folder:
        model = (
            train_model(config, Path(folder), data=data)
            .last_checkpoint.load_weights(config.model.build_model(1, 10, 0))
            .eval()
        )
    step = {"eps": EPS, "step_size": EPS / 4, "steps": 20}
    candidates = Validation(
        attacks={
            "pgd20": PGD(**step),
            "cw20": PGD(**step, loss="cw"),
            "apgd_ce20": APGD(eps=EPS, steps=20),
            "apgd_t20x3": APGD(eps=EPS, steps=20, loss="dlr-targeted", targets=3),
            "square200": Square(eps=EPS, queries=200),
        },
        finish={},
        scales=(),
    )
    scores = candidates(model, data.val)
    scores = {name: scores[name] for name in ("clean", *candidates.attacks)}
    ours = config.validation(model, data.val)
    scores |= {
        "default objective": ours["robust_worst"],
        "min(pgd20, cw20)": min(scores["pgd20"], scores["cw20"]),
    }
    x, y = data.test.get_float_images(slice(0, examples)), data.test.y[:examples]
    report = evaluate(model, x, y, "autoattack", EPS, batch_size=examples)
    return {
        **scores,
        "autoattack": report.robust_accuracy,
        **{name: ours[name] for name in SYMPTOMS},
    }


def table(rows: list[dict[str, float]]) -> str:
    names = [name for name in rows[0] if name not in ("autoattack", *SYMPTOMS)]
    chance = np.random.default_rng(0)
    draws = [chance.integers(len(rows), size=len(rows)) for _ in range(1000)]
    truth = np.array([row["autoattack"] for row in rows])
    found = []
    for name in names:
        values = np.array([row[name] for row in rows])
        low, high = np.nanpercentile(
            [kendalltau(values[d], truth[d]).statistic for d in draws], (2.5, 97.5)
        )
        found.append(
            (kendalltau(values, truth).statistic, f"| {name} | %.2f | {low:.2f} .. {high:.2f} |")
        )
    head = [
        f"| metric on validation | tau to AutoAttack on test (n = {len(rows)} models) | 95% |",
        "|---|---|---|",
    ]
    return "\n".join(head + [line % tau for tau, line in sorted(found, reverse=True)])


def symptoms(done: dict[str, dict[str, float]]) -> str:
    """Return a table of means over each method's models, in percent.

    `overstated` is the accuracy under PGD-20 on validation minus that under AutoAttack on test.
    """
    lines = [
        f"| method | overstated | {' | '.join(SYMPTOMS)} |",
        "|---" * (2 + len(SYMPTOMS)) + "|",
    ]
    for method in METHODS:
        rows = [row for job, row in done.items() if ast.literal_eval(job)[0] == method]
        means = [np.mean([row["pgd20"] - row["autoattack"] for row in rows])]
        means += [np.mean([row[name] for row in rows]) for name in SYMPTOMS]
        lines.append(f"| {method} | {' | '.join(f'{100 * mean:.1f}' for mean in means)} |")
    return "\n".join(lines)


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--models", type=int, default=48)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--epochs", type=int, nargs="+", default=[4, 6, 8])
    parser.add_argument("--train", type=int, default=1047, help="training images")
    parser.add_argument("--val", type=int, default=300, help="validation images")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("objectives.json"))
    args = parser.parse_args()
    done = json.loads(args.out.read_text()) if args.out.exists() else {}
    with ProcessPoolExecutor(args.processes) as pool:
        missing = [job for job in jobs(args.models, args.epochs) if str(job) not in done]
        waiting = {
            pool.submit(measure, job, args.examples, args.train, args.val): str(job)
            for job in missing
        }
        for future in as_completed(waiting):
            done[waiting[future]] = future.result()
            args.out.write_text(json.dumps(done, indent=1))
            print(
                f"{len(done)}/{args.models} {waiting[future]} {done[waiting[future]]}", flush=True
            )
    print(table(list(done.values())), symptoms(done), sep="\n\n")


if __name__ == "__main__":
    main()
