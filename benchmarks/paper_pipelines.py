"""Run the pipelines of the papers' tables and figures from end to end, reduced to minutes on a CPU.

    python benchmarks/paper_pipelines.py --data-dir CIFAR10 --out reduced --figures docs/figures

Each pipeline is `raysweep run NAME` with less data, a small network and few epochs. The numbers of
epochs in the presets (drops of the learning rate, burn-ins, schedules of tau) shrink in proportion:
a burn-in of 30 of 100 epochs is one of 3 of 10. Learning rates are scaled so that the largest is
0.05. The tables in `ON_CIFAR10` use the images in CIFAR10 (`train.npz` and `test.npz`, the data set
`arrays`), everything else scikit-learn's digits. Rows of wide networks are left out: with the same
small network they are those of ResNet-18. All pipelines share one Ray cluster.

Copies the figures of the reports to `--figures` and prints a Markdown table: seconds of all stages,
and the lowest and highest accuracies of the evaluated checkpoints. Pipelines that are finished in
`--out` are not run again.
"""

import contextlib
import io
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from command_line import create_parser
from measure import describe_machine, format_table
from PIL import Image

from raysweep.cli import main as run_command_line
from raysweep.data import DataSpec, load_data
from raysweep.errors import ExitCode, WorkFailed
from raysweep.pipeline.artifact import Artifact
from raysweep.pipeline.builtin_pipelines import list_builtin_pipelines
from raysweep.pipeline.pipeline import load_pipeline
from raysweep.pipeline.train import TrainStage
from raysweep.training.config import TrainingConfig

LARGEST_LEARNING_RATE = 0.05
# Networks that stay at chance with that rate.
LARGEST_LEARNING_RATES = {"small_cnn": 0.01}
N_TRAIN_DIGITS, N_VAL_DIGITS = 300, 80
SHORT_VALIDATION: Mapping[str, Any] = {"validation.finish": {}, "validation.scales": []}
ON_DIGITS: Mapping[str, Any] = {
    **SHORT_VALIDATION,
    "data.name": "digits",
    "data.train_size": N_TRAIN_DIGITS,
    "data.val_size": N_VAL_DIGITS,
    "batch_size": 20,
    "model.name": "digits_cnn",
    "*.eps": 0.15,
    "*.step_size": 0.03,
    "stages.autoattack.n": 10,
    "stages.train.seeds": [0],
}
ON_CIFAR10: Mapping[str, Any] = {
    **SHORT_VALIDATION,
    "validation.size": 60,
    "data.name": "arrays",
    "data.train_size": 600,
    "data.val_size": 60,
    "batch_size": 32,
    "model.name": "digits_cnn",
    "method.attacks.*.steps": 5,
    "method.attacks.*.step_size": 2 / 255,
    "stages.autoattack.n": 20,
    "stages.train.seeds": [0],
}
# No figure shows AutoAttack, which takes as long as the training.
OF_FIGURES: Mapping[str, Any] = {"stages.autoattack.attacks": {"PGD-20": "pgd20"}}
TABLES_ON_CIFAR10 = ("gairat-table1", "lrat-table1")
RADII = (0.02, 0.04, 0.08, 0.22, 0.3)


@dataclass(frozen=True)
class Reduction:
    """How a pipeline on digits is reduced.

    Attributes:
        epochs: Training epochs of the rows that have the most.
        settings: Settings of `--set` beside those of all pipelines; None leaves one of these out.
        rows: Rows that take the place of those of the pipeline, by label; {} to keep these.
    """

    epochs: int = 10
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def reduce_radii(name: str, figures: Sequence[str]) -> Reduction:
    """Return the reduction of GAIRAT's figures 2, 5 and 6: other networks and larger radii."""
    rows: dict[str, dict[str, Any]] = {}
    for label, preset, model, eps in (
        ("ST SmallCNN", f"{name}-standard", "small_cnn", 0.15),
        ("AT digits_cnn", name, "digits_cnn", 0.15),
        ("AT SmallCNN", name, "small_cnn", 0.15),
        *((f"AT eps {eps}", name, "digits_cnn", eps) for eps in RADII),
    ):
        changes = {"model.name": model, "*.eps": eps, "*.step_size": eps / 4}
        rows[label] = {"preset": preset, "set": changes}
    panels = {
        "networks": list(rows)[:3],
        "radii (digits_cnn is 0.15)": sorted(
            [*list(rows)[3:], "AT digits_cnn"],
            key=lambda label: rows[label]["set"]["*.eps"],
        ),
    }
    settings = {
        **{f"stages.report.figures.{figure}.panels": panels for figure in figures},
        **dict.fromkeys(("model.name", "*.eps", "*.step_size")),
        "data.train_size": 200,
        "validation.train_examples": 200,
    }
    return Reduction(10, settings, rows)


REDUCTIONS: Mapping[str, Reduction] = {
    "gairat-fig2": reduce_radii("gairat-fig2", ("gairat-fig2", "gairat-fig5")),
    "gairat-fig6": reduce_radii("gairat-fig6", ("gairat-fig6",)),
    "gairat-fig7": Reduction(
        settings={
            "stages.report.figures.gairat-fig7.attack.eps": 0.15,
            "stages.report.figures.gairat-fig7.attack.step_size": 0.0375,
        }
    ),
    "gairat-fig16": Reduction(
        8,
        {
            "model.name": None,
            "data.train_size": 200,
            "data.val_size": 50,
            "batch_size": 20,
            "method.attacks.*.steps": 5,
            "validation.attacks.*.steps": 10,
        },
    ),
    "gairat-fig21": Reduction(
        settings={
            "stages.autoattack.attacks": None,
            "stages.autoattack.n": 200,
            "stages.autoattack.attacks.*.eps": 0.15,
            "stages.autoattack.attacks.*.step_size": 2.5 * 0.15 / 100,
        }
    ),
    # AutoAttack would take as long as the rest; GAIRAT's table has none.
    "gairat-table1": Reduction(
        8,
        {
            "stages.autoattack.attacks": {"PGD-20": "pgd20", "PGD+": "pgd+"},
            "stages.autoattack.n": 50,
        },
    ),
    "lrat-table1": Reduction(
        8,
        {
            "stages.autoattack.attacks": {"PGD": "pgd20", "CW": "cw20"},
            "stages.autoattack.n": 50,
        },
    ),
    "gairat-table2": Reduction(
        settings={
            "stages.autoattack.attacks.PGD-20.eps": 0.15,
            "stages.autoattack.attacks.PGD-20.step_size": 0.015,
        }
    ),
}


def build_settings(name: str, out: Path) -> dict[str, Any]:
    """Return the settings of `--set` that reduce a pipeline, by dotted path."""
    is_on_cifar10 = name in TABLES_ON_CIFAR10
    reduction = REDUCTIONS.get(name, Reduction())
    of_figures = OF_FIGURES if "-fig" in name else {}
    settings = {
        **(ON_CIFAR10 if is_on_cifar10 else ON_DIGITS),
        **of_figures,
        **reduction.settings,
    }
    settings = {path: value for path, value in settings.items() if value is not None}
    if name == "gairat-table3":
        settings["data.unlabeled"] = str(write_unlabeled_digits(out))
    rows = {"stages.train.runs": reduction.rows} if reduction.rows else {}
    of_stages = {path: value for path, value in settings.items() if path.startswith("stages.")}
    _, pipeline, overrides = load_pipeline(name, {**of_stages, **rows})
    stage = pipeline.stages[0]
    assert isinstance(stage, TrainStage)
    configs = stage.list_training_configs(overrides)
    most_epochs = max(config.epochs for config in configs)
    reduced_rows = {}
    for (label, row), config in zip(stage.runs.items(), configs, strict=True):
        if "WRN" in label:
            continue
        changes = dict(iter_reduced_settings(config, reduction.epochs, most_epochs))
        reduced_rows[label] = {**row.to_stored_dict(), "set": {**row.set, **changes}}
    return {**settings, "stages.train.runs": reduced_rows}


def iter_reduced_settings(
    config: TrainingConfig, epochs: int, most_epochs: int
) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a row that count epochs, multiplied by `epochs` / `most_epochs`."""

    def reduce(epoch: int) -> int:
        return epoch * epochs // most_epochs

    def iter_schedules(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        for key, inner in value.items() if isinstance(value, dict) else ():
            inner_path = f"{path}.{key}"
            if key == "burn_in" and inner:
                yield inner_path, reduce(inner)
            elif isinstance(inner, dict) and inner.get("kind") in ("piecewise", "interpolated"):
                times = "boundaries" if inner["kind"] == "piecewise" else "epochs"
                yield inner_path, {**inner, times: [reduce(epoch) for epoch in inner[times]]}
            elif isinstance(inner, dict) and inner.get("kind") in ("linear", "cosine"):
                yield inner_path, {**inner, "end": reduce(inner["end"])}
            elif key == "d_max":
                yield inner_path, 1.5 * ON_DIGITS["*.eps"]
            else:
                yield from iter_schedules(inner, inner_path)

    yield "epochs", reduce(config.epochs)
    yield from iter_schedules(config.method.to_json_dict(), "method")
    for path, lr in iter_schedules({"lr": config.optim.to_json_dict()["lr"]}, "optim"):
        values = lr.get("values", [lr.get("first", 0), lr.get("last", 0)])
        factor = LARGEST_LEARNING_RATES.get(config.model.name, LARGEST_LEARNING_RATE) / max(values)
        scaled = {
            key: [factor * rate for rate in lr[key]] if key == "values" else factor * lr[key]
            for key in ("values", "first", "last")
            if key in lr
        }
        yield path, {**lr, **scaled}
    if config.validation.window is not None:
        yield "validation.window", [reduce(epoch - 1) + 1 for epoch in config.validation.window]


def write_unlabeled_digits(out: Path) -> Path:
    """Write the training digits that no row trains on, with their labels as pseudo-labels."""
    path = (out / "unlabeled.npz").resolve()
    if not path.exists():
        train = load_data(DataSpec(name="digits", val_size=N_VAL_DIGITS)).train
        np.savez(path, x=train.x[N_TRAIN_DIGITS:].numpy(), y=train.y[N_TRAIN_DIGITS:].numpy())
    return path


def run_pipeline(name: str, out: Path, data_dir: Path | None) -> list[Path]:
    """Run a pipeline; return the folders of its stages."""
    settings = build_settings(name, out)
    command = ["run", name, "--out", str(out), "--json"]
    if name in TABLES_ON_CIFAR10:
        command += ["--data-dir", str(data_dir)]
    for path, value in settings.items():
        command += ["--set", f"{path}={value if isinstance(value, str) else json.dumps(value)}"]
    print(f"raysweep {shlex.join(command)}", flush=True)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exit_code = run_command_line(command)
    if exit_code not in (ExitCode.DONE, ExitCode.REGRESSION):
        raise WorkFailed(f"{name}: exit code {exit_code}")
    return [Path(stage["folder"]) for stage in json.loads(output.getvalue())["stages"]]


def copy_with_fewer_colors(picture: Path, target: Path) -> None:
    """Copy a PNG with 64 colors, which makes it half as large."""
    with Image.open(picture) as image:
        image.convert("RGB").quantize(64).save(target, optimize=True)


def format_row(name: str, folders: Sequence[Path]) -> list[str]:
    """Return the row of a finished pipeline."""
    artifacts = [Artifact.read_if_finished(folder) for folder in folders]
    finished = [artifact for artifact in artifacts if artifact is not None]
    evaluations = [evaluation for artifact in finished for evaluation in artifact.evaluations]
    natural = [evaluation.clean for evaluation in evaluations]
    robust = [evaluation.robust for evaluation in evaluations]
    seconds = sum(artifact.seconds for artifact in finished)
    ranges = [f"{min(values):.2f} .. {max(values):.2f}" for values in (natural, robust)]
    return [name, str(len({e.candidate.label for e in evaluations})), f"{seconds:.0f}", *ranges]


def main() -> None:
    """Read the arguments, run the pipelines and print the table."""
    of_papers = [name for name in list_builtin_pipelines() if name not in ("digits", "nightly")]
    parser = create_parser(__doc__)
    parser.add_argument("pipelines", nargs="*", help="default: all of the papers")
    parser.add_argument(
        "--data-dir", type=Path, help="CIFAR-10, for " + ", ".join(TABLES_ON_CIFAR10)
    )
    parser.add_argument("--out", type=Path, default=Path("reduced"))
    parser.add_argument("--figures", type=Path, help="folder for the figures of the reports")
    args = parser.parse_args()
    names = args.pipelines or of_papers
    if args.data_dir is None and (missing := set(names) & set(TABLES_ON_CIFAR10)):
        parser.error(f"{', '.join(sorted(missing))}: --data-dir is needed")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    # Not at the top of the file: a test without Ray imports the rest.
    from raysweep.sweep.cluster import connect_to_cluster

    with connect_to_cluster():
        for name in names:
            folders = run_pipeline(name, args.out, args.data_dir)
            for figure in (folders[-1] / "figures").glob("*.png"):
                if args.figures is not None:
                    copy_with_fewer_colors(figure, args.figures / figure.name)
            rows.append(format_row(name, folders))
            print(" | ".join(rows[-1]), flush=True)
    head = ["pipeline", "rows", "s", "natural", "under attack"]
    print(f"\n{describe_machine()}\n\n{format_table(head, rows)}")


if __name__ == "__main__":
    main()
