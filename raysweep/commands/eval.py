"""raysweep eval"""

import json
import math
import os
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from raysweep.attacks import preset
from raysweep.commands import settings, ui_command, writable
from raysweep.data import DataSpec, load
from raysweep.data.unlabeled import pseudo_label
from raysweep.data.unlabeled import read as read_unlabeled
from raysweep.data.unlabeled import write as write_unlabeled
from raysweep.evaluation import Processes, RobustnessReport, bar, evaluate
from raysweep.evaluation.evaluator import Map
from raysweep.files import write_whole
from raysweep.schedules import now
from raysweep.spec import SpecError, digest, override
from raysweep.tracking import Tracker, embedded_store, run_tags
from raysweep.training.load import Subject, load_checkpoint, load_factory
from raysweep.training.profiles import PROFILES

_FACTORY = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
_RUN_ID = re.compile(r"^[0-9a-f]{32}$")


def run(args: Namespace) -> int:
    out = writable(args.out)
    tracker = Tracker(embedded_store(out), out / "mlruns").ready()
    subject, run_id = _subject(args, tracker, out)
    if args.pseudo_label is not None:
        return _pseudo_label(subject, args.pseudo_label, out)
    spec = subject.config.data if subject.config else override(DataSpec(), _data(args))
    split = (subject.data or load(spec)).test
    eps = _eps(args, subject, spec)
    attack = preset(args.attack, eps, args.norm, args.version)
    count = min(args.n or len(split), len(split))
    x, y, index = split.images(slice(0, count)), split.y[:count], split.index[:count]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = _folder(out, subject, digest([attack.json_dict(), spec.json_dict(), count]))
    with _map(args, device) as shards, bar() as progress:
        report = evaluate(
            subject.model.to(device),
            x,
            y,
            attack,
            batch_size=args.batch_size,
            index=index,
            resume_dir=folder / "shards",
            map=shards,
            shards=_shards(count, args.batch_size, shards),
            progress=progress,
            keep_adversarial=args.keep_adversarial,
        )
    _save(report, folder, subject, spec)
    _print(args, report, subject, folder, tracker)
    _track(tracker, run_id, subject, report, folder, args.attack, count == len(split))
    return 0


def _pseudo_label(subject: Subject, source: Path, out: Path) -> int:
    """Write FILE's images with the model's labels, as `data.unlabeled` takes them (Carmon et al. 2019)."""
    x, _ = read_unlabeled(source)
    white = subject.data.test.white if subject.data else 255
    y = pseudo_label(subject.model, torch.from_numpy(x), white).numpy()
    target = out / f"{source.stem}-labelled.npz"
    write_unlabeled(target, x, y)
    print(f"{len(y)} images labelled by {subject.name}; use them with\n  --set data.unlabeled={target}")
    return 0


def _subject(args: Namespace, tracker: Tracker, out: Path) -> tuple[Subject, str | None]:
    """The model, and its MLflow run if it was named by one."""
    if _FACTORY.match(args.what):
        return load_factory(args.what), None
    if _RUN_ID.match(args.what) or args.what.startswith(("runs:/", "models:/")):
        run_id, folder = tracker.checkpoint(args.what, out / "runs" / "from-mlflow")
        return load_checkpoint(folder, _data(args)), run_id
    subject = load_checkpoint(Path(args.what).expanduser().resolve(), _data(args))
    assert subject.checkpoint is not None
    return subject, tracker.find(run_tags(subject.checkpoint))


def _data(args: Namespace) -> dict[str, Any]:
    """What `--set data.*` and `--data-dir` change."""
    changes = settings(args)
    if foreign := [key for key in changes if not key.startswith("data.")]:
        raise SpecError([f"--set {key}: only data.* settings matter to an evaluation" for key in foreign])
    return {key.removeprefix("data."): value for key, value in changes.items()}


def _eps(args: Namespace, subject: Subject, spec: DataSpec) -> float:
    """What was asked for, else what the checkpoint was validated at, else what the data set's profile says."""
    if args.eps is not None:
        if args.norm == "Linf" and args.eps > 1:
            raise SpecError(f"--eps {args.eps:g}: epsilon means pixels in [0, 1]; did you mean {args.eps:g}/255?")
        return float(args.eps)
    radius, norm = _trained_for(subject) or (float(PROFILES.get(spec.name, {}).get("*.eps", 8 / 255)), "Linf")
    if norm != args.norm:
        raise SpecError(f"--norm {args.norm}: the model's own epsilon {radius:.6g} is {norm}; say --eps too")
    return radius


def _trained_for(subject: Subject) -> tuple[float, str] | None:
    """Radius and norm that a checkpoint of ours was validated at."""
    if subject.config is None:
        return None
    first = next(iter(subject.config.at(subject.config.epochs).validation.attacks.values()))
    return (float(now(first.eps)), first.norm) if hasattr(first, "eps") and hasattr(first, "norm") else None


def _folder(out: Path, subject: Subject, key: str) -> Path:
    """Beside the checkpoint that it judges, or under `runs/eval`."""
    if subject.checkpoint is None:
        return out / "runs" / "eval" / f"{subject.name.replace(':', '.')}-{key}"
    path = subject.checkpoint.path
    return path.parent / f"eval-{path.name.removeprefix('epoch-')}-{key}"


@contextmanager
def _map(args: Namespace, device: torch.device) -> Iterator[Map | None]:
    """Ray's workers if a cluster was named, else this machine's cores, else (on a GPU) this process."""
    if args.address or os.environ.get("RAY_ADDRESS"):
        from raysweep.sweep.cluster import connected
        from raysweep.sweep.launch import RayMap

        with connected(args.address) as cluster:
            yield RayMap(gpus=args.gpus_per_task if cluster.get("GPU") else 0)
        return
    cores = len(os.sched_getaffinity(0))
    if device.type == "cuda" or cores == 1:
        yield None
        return
    with Processes(cores) as processes:
        yield processes


def _shards(count: int, batch_size: int, shards: Map | None) -> int:
    """Enough that every worker has several: a slow one does not hold up the rest, a killed one loses little."""
    return max(math.ceil(count / batch_size), 4 * getattr(shards, "width", 1))


def _save(report: RobustnessReport, folder: Path, subject: Subject, spec: DataSpec) -> None:
    report.save_parquet(folder / "examples.parquet")
    architecture = subject.config.model.name if subject.config else None
    report.save_card(folder / "card.json", name=subject.name, dataset=spec.name, architecture=architecture)
    if report.x_adv is not None:
        report.save_adversarial(folder / "adversarial.npz")
    write_whole(folder / "report.json", json.dumps(report.summary(), indent=1, default=str))


def _track(
    tracker: Tracker,
    run_id: str | None,
    subject: Subject,
    report: RobustnessReport,
    folder: Path,
    name: str,
    whole: bool,
) -> None:
    """Numbers and files into the run that trained the model, or into one of their own.

    `aa/...` is for AutoAttack's standard version at the training's epsilon on the whole test set, and for nothing else.
    """
    own = run_id is None
    run_id = run_id or tracker.run(subject.name, {"raysweep.kind": "eval", "raysweep.folder": str(folder)})
    full = whole and report.is_autoattack and _trained_for(subject) in (None, (report.eps, report.norm))
    prefix = "aa" if full else f"eval/{name}-{report.norm}-{report.eps:.4g}-n{len(report.labels)}"
    low, high = report.intervals["robust"]
    metrics = {
        "robust_accuracy": report.robust_accuracy,
        "robust_low": low,
        "robust_high": high,
        "clean_accuracy": report.clean_accuracy,
        **{f"after_{key}": float(rows.mean()) for key, rows in report.robust_after.items()},
    }
    step = subject.checkpoint.epoch if subject.checkpoint else 0
    tracker.metrics(run_id, {f"{prefix}/{key}": value for key, value in metrics.items()}, step)
    for file in sorted(folder.glob("*.*")):
        tracker.file(run_id, file, f"eval/{folder.name.rpartition('-')[2]}")
    if own:
        tracker.close(run_id, "FINISHED")


def _print(args: Namespace, report: RobustnessReport, subject: Subject, folder: Path, tracker: Tracker) -> None:
    for warning in report.warnings:
        print(f"raysweep: warning: {warning}", file=sys.stderr)
    if args.json:
        print(json.dumps({**report.summary(), "model": subject.name, "folder": str(folder)}, indent=1, default=str))
        return
    print(f"{subject.name}: {len(report.labels)} test examples, {report.norm} eps {report.eps:.6g}")
    rows = {"clean": report.clean, **{f"after {name}": rows for name, rows in report.robust_after.items()}}
    for (name, flags), interval in zip(rows.items(), report.intervals.values(), strict=False):
        print(f"  {name:<16} {flags.mean():7.2%}   95% {interval[0]:.2%} .. {interval[1]:.2%}")
    if report.masking_gap is not None:
        print(f"  {'masking gap':<16} {report.masking_gap:7.2%}")
    print(f"files\n  {folder}\ncompare with\n  {ui_command(tracker.uri)}")
