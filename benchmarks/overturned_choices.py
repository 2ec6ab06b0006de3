"""Run real sweeps on digits, and count how often AutoAttack overturns the objective's choice.

    python benchmarks/overturned_choices.py --methods gairat lrat --seeds 0 1 2 3 --out overturned

Each sweep is `raysweep tune METHOD` with its shipped search space, the seed for the sampler and for
the trials, and five finalists. `--metric pgd` searches for the highest accuracy under PGD-20, as
the papers choose their checkpoints, instead of the default objective. Prints a Markdown table:
which trial the objective chooses, which full AutoAttack on the same validation images chooses, and
by how much it is better under AutoAttack. Sweeps that are finished in `--out` are not run again, so
that other settings need another folder. Further arguments, such as `--trials 5` or `--set`, are
those of `raysweep tune`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from measure import describe_machine, format_table

from raysweep.cli import main as run_command_line
from raysweep.errors import WorkFailed
from raysweep.sweep.finalist_summary import FinalistSummary, summarize_finalists
from raysweep.sweep.ledger import Ledger
from raysweep.training.validation import DEFAULT_OBJECTIVE

N_FINALISTS = 5


def run_sweep(
    method: str, metric: str, seed: int, out: Path, options: Sequence[str] = ()
) -> FinalistSummary:
    """Run one sweep, unless it is finished; return what AutoAttack says of its finalists."""
    name = f"{method}-{seed}" if metric == DEFAULT_OBJECTIVE else f"{method}-{metric}-{seed}"
    folder = out / "runs" / name
    if not folder.exists():
        settings = {
            "metric": metric,
            "sampler.seed": seed,
            "seed": seed,
            "finalists": N_FINALISTS,
            "base_runs": 0,
        }
        overrides = [
            argument
            for path, value in settings.items()
            for argument in ("--set", f"{path}={value}")
        ]
        command = ["tune", method, "--name", name, "--out", str(out), *overrides, *options]
    else:
        command = ["tune", "--resume", name, "--out", str(out)]
    if exit_code := run_command_line(command):
        raise WorkFailed(f"{' '.join(command)}: exit code {exit_code}")
    summary = summarize_finalists(Ledger.open(folder))
    assert summary is not None
    return summary


def format_row(method: str, seed: int, summary: FinalistSummary) -> list[str]:
    """Return the row of a sweep."""
    metric = summary.objective
    chosen_by_objective, chosen = summary.by_objective[0], summary.by_autoattack[0]
    attacked = ", ".join(
        f"{trial.number:04d} {trial.score(metric):.4f} / {trial.final_value(metric):.4f}"
        for trial in summary.by_objective
    )
    is_overturned = chosen.number != chosen_by_objective.number
    return [
        method,
        metric,
        str(seed),
        attacked,
        f"{chosen_by_objective.number:04d}",
        f"{chosen.number:04d}",
        f"{summary.gain:.4f}" if is_overturned else "same",
    ]


def main() -> None:
    """Read the arguments, run the sweeps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["gairat", "lrat"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument(
        "--metric", choices=["robust_worst", "pgd", "cw"], default=DEFAULT_OBJECTIVE
    )
    parser.add_argument("--out", type=Path, default=Path("overturned"))
    args, options = parser.parse_known_args()
    rows = [
        format_row(method, seed, run_sweep(method, args.metric, seed, args.out, options))
        for method in args.methods
        for seed in args.seeds
    ]
    n_overturned = sum(row[-1] != "same" for row in rows)
    head = [
        "method",
        "metric",
        "seed",
        "finalists: objective / AutoAttack",
        "objective's",
        "chosen",
        "gain",
    ]
    print(f"\n{describe_machine()}\n\n{format_table(head, rows)}\n")
    print(f"AutoAttack overturned {n_overturned} of {len(rows)} choices")


if __name__ == "__main__":
    main()
