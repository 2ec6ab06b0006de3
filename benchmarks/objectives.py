"""Which cheap validation metric ranks models as AutoAttack does? Kendall's tau over many small models on digits.

    python benchmarks/objectives.py --models 48 --examples 200 --out objectives.json

Trains each model (methods x seeds x epochs, in parallel processes), measures the candidates on the validation split
and full AutoAttack on test examples, and prints a Markdown table. Finished models are kept in --out and not redone.
"""

import argparse
import itertools
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from scipy.stats import kendalltau

from raysweep.attacks import APGD, PGD, Square
from raysweep.data import load
from raysweep.evaluation import evaluate
from raysweep.evaluation.validation import Validation
from raysweep.spec import override
from raysweep.training.config import run_config
from raysweep.training.trainer import fit

METHODS = ("at", "gairat", "trades", "mart", "lrat", "gair-mart", "mail-at", "gair-fat")
EPS = 0.15


def jobs(count: int) -> list[tuple[str, int, int]]:
    """(method, seed, epochs), the methods in turn."""
    grid = [(m, seed, epochs) for seed, epochs in itertools.product(range(20), (4, 6, 8)) for m in METHODS]
    return grid[:count]


def measure(job: tuple[str, int, int], examples: int) -> dict[str, float]:
    torch.set_num_threads(1)
    method, seed, epochs = job
    lr = {"kind": "piecewise", "boundaries": [epochs - 2], "values": [0.05, 0.01]}
    config = run_config(method, {"epochs": epochs, "seed": seed, "optim.lr": lr})
    config = override(config, {"*.burn_in": epochs // 2}, missing="ignore")
    data = load(config.data)
    with TemporaryDirectory() as folder:
        model = fit(config, Path(folder), data=data).last.load_model(config.model.build(1, 10, 0)).eval()
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
    )
    scores = candidates(model, data.val)
    del scores["robust_worst"], scores["masking_gap"], scores["zero_gradient"]
    ours = config.validation(model, data.val)
    scores |= {"default objective": ours["robust_worst"], "min(pgd20, cw20)": min(scores["pgd20"], scores["cw20"])}
    x, y = data.test.images(slice(0, examples)), data.test.y[:examples]
    report = evaluate(model, x, y, "autoattack", EPS, batch_size=examples)
    return {**scores, "autoattack": report.robust_accuracy, "masking_gap": ours["masking_gap"]}


def table(rows: list[dict[str, float]]) -> str:
    truth = [row["autoattack"] for row in rows]
    names = [name for name in rows[0] if name not in ("autoattack", "masking_gap")]
    taus = {name: kendalltau([row[name] for row in rows], truth).statistic for name in names}
    lines = [f"| metric on validation | tau to AutoAttack on test (n = {len(rows)} models) |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {tau:.2f} |" for name, tau in sorted(taus.items(), key=lambda t: -t[1])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=48)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("objectives.json"))
    args = parser.parse_args()
    done = json.loads(args.out.read_text()) if args.out.exists() else {}
    with ProcessPoolExecutor(args.processes) as pool:
        waiting = {pool.submit(measure, j, args.examples): str(j) for j in jobs(args.models) if str(j) not in done}
        for future in as_completed(waiting):
            done[waiting[future]] = future.result()
            args.out.write_text(json.dumps(done, indent=1))
            print(f"{len(done)}/{args.models} {waiting[future]} {done[waiting[future]]}", flush=True)
    print(table(list(done.values())))


if __name__ == "__main__":
    main()
