"""One model under one attack on the test set: attacks, files, and the numbers into the run that trained it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from raysweep import storage
from raysweep.attacks import SingleAttack, WorstCase
from raysweep.data import Data, DataSpec
from raysweep.evaluation import Processes, RobustnessReport, bar, evaluate
from raysweep.evaluation.evaluator import Map
from raysweep.files import write_whole
from raysweep.schedules import now
from raysweep.spec import digest
from raysweep.tracking import Tracker
from raysweep.training.load import Subject
from raysweep.training.profiles import PROFILES


def threat_of(subject: Subject, data: str) -> tuple[float, str]:
    """Epsilon and norm that the checkpoint was validated at, else those of the data set's profile."""
    if subject.config is not None:
        first = next(iter(subject.config.at(subject.config.epochs).validation.attacks.values()))
        if hasattr(first, "eps") and hasattr(first, "norm"):
            return float(now(first.eps)), str(first.norm)
    return float(PROFILES.get(data, {}).get("*.eps", 8 / 255)), "Linf"


def folder_of(
    out: Path, subject: Subject, attack: WorstCase | SingleAttack, data: DataSpec, count: int, seed: int = 0
) -> Path:
    """Beside the checkpoint that is judged, or under `runs/eval` where that is a bucket's or none of ours."""
    key = digest([attack.json_dict(), data.json_dict(), count, seed])
    if subject.checkpoint is None:
        return out / "runs" / "eval" / f"{subject.name.replace(':', '.')}-{key}"
    path = subject.checkpoint.path
    if storage.is_copy(path):
        return out / "runs" / "eval" / f"{subject.name.replace('/', '-')}-{digest([key, storage.name(path)])}"
    return path.parent / f"eval-{path.name.removeprefix('epoch-')}-{key}"


@contextmanager
def workers(address: str | None, gpus_per_task: float = 1.0) -> Iterator[Map | None]:
    """Ray's workers if a cluster was named, else this machine's cores, else (on a GPU) this process."""
    if address or os.environ.get("RAY_ADDRESS"):
        from raysweep.sweep.cluster import connected
        from raysweep.sweep.launch import RayMap

        with connected(address) as cluster:
            yield RayMap(gpus=gpus_per_task if cluster.get("GPU") else 0)
        return
    cores = len(os.sched_getaffinity(0))
    if torch.cuda.is_available() or cores == 1:
        yield None
        return
    with Processes(cores) as processes:
        yield processes


def judge(
    subject: Subject,
    data: Data,
    attack: WorstCase | SingleAttack,
    count: int,
    folder: Path,
    map: Map | None,
    *,
    batch_size: int = 500,
    seed: int = 0,
    keep_adversarial: bool = False,
) -> RobustnessReport:
    """The first `count` test examples under `attack`; shards that an earlier run finished in `folder` are kept."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    split, rows = data.test, slice(0, count)
    with bar() as progress:
        return evaluate(
            subject.model.to(device),
            split.images(rows),
            split.y[rows],
            attack,
            batch_size=batch_size,
            seed=seed,
            index=split.index[rows],
            resume_dir=folder / "shards",
            map=map,
            progress=progress,
            keep_adversarial=keep_adversarial,
        )


def save(report: RobustnessReport, folder: Path, subject: Subject, data: DataSpec) -> None:
    report.save_parquet(folder / "examples.parquet")
    architecture = subject.config.model.name if subject.config else None
    report.save_card(folder / "card.json", name=subject.name, dataset=data.name, architecture=architecture)
    if report.x_adv is not None:
        report.save_adversarial(folder / "adversarial.npz")
    write_whole(folder / "report.json", json.dumps(report.summary(), indent=1, default=str))


def track(
    tracker: Tracker,
    run_id: str | None,
    subject: Subject,
    report: RobustnessReport,
    folder: Path,
    name: str,
    whole: bool,
) -> str:
    """Numbers and files into the run that trained the model, or into one of their own; its id.

    `aa/...` is for AutoAttack's standard version at the training's epsilon on the whole test set, and for nothing else.
    A seed but the usual one is named too.
    """
    own = run_id is None
    if run_id is None:
        # A path may hold what no filter of MLflow can quote.
        run_id = tracker.run(subject.name, {"raysweep.kind": "eval", "raysweep.evaluation": digest(str(folder))})
        tracker.tag(run_id, {"raysweep.folder": str(folder)})
    trained_for = subject.config is None or threat_of(subject, "") == (report.eps, report.norm)
    full = whole and trained_for and report.is_autoattack
    prefix = "aa" if full else f"eval/{name}-{report.norm}-{report.eps:.4g}-n{len(report.labels)}"
    prefix += f"-seed{report.seed}" if report.seed else ""
    low, high = report.intervals["robust"]
    metrics = {
        "robust_accuracy": report.robust_accuracy,
        "robust_low": low,
        "robust_high": high,
        "clean_accuracy": report.clean_accuracy,
        **{f"after_{key}": float(rows.mean()) for key, rows in report.robust_after.items()},
    }
    tracker.results(run_id, {f"{prefix}/{key}": value for key, value in metrics.items()})
    for file in sorted(folder.glob("*.*")):
        tracker.file(run_id, file, f"eval/{folder.name.rpartition('-')[2]}")
    if own:
        tracker.close(run_id, "FINISHED")
    return run_id
