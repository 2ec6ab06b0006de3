"""raysweep eval"""

import json
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from raysweep import storage
from raysweep.attacks import preset
from raysweep.commands import data_settings, named_sweep, open_tracker, runs_in, ui_command, writable
from raysweep.data import DataSpec, load
from raysweep.data.unlabeled import pseudo_label
from raysweep.data.unlabeled import read as read_unlabeled
from raysweep.data.unlabeled import write as write_unlabeled
from raysweep.evaluation import RobustnessReport
from raysweep.pipeline.bundle import verify_bundle, write_bundle
from raysweep.pipeline.judge import folder_of, judge, save, threat_of, track, workers
from raysweep.results import load_sweep
from raysweep.spec import SpecError, override, unknown_name
from raysweep.tracking import Tracker, run_tags
from raysweep.training.load import Subject, load_checkpoint, load_factory

_FACTORY = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
_RUN_ID = re.compile(r"^[0-9a-f]{32}$")


# Options that are of attacks alone, as they are where they were not given.
_OF_ATTACKS: dict[str, Any] = {
    "attack": "autoattack",
    "version": "standard",
    "eps": None,
    "norm": "Linf",
    "n": None,
    "batch_size": 500,
    "keep_adversarial": False,
    "bundle": None,
    "address": None,
    "gpus_per_task": 1.0,
}


def run(args: Namespace) -> int:
    if args.verify:
        _refuse(args, "--verify", {**_OF_ATTACKS, "pseudo_label": None, "set": [], "storage": None, "out": Path()})
        return _verify(args)
    if args.pseudo_label is not None:
        _refuse(args, "--pseudo-label", _OF_ATTACKS)
    out = writable(args.out)
    subject, run_id = _subject(args, out)
    if args.pseudo_label is not None:
        return _pseudo_label(args, subject, out)
    # For a model that we did not train, the training set is not used: however small, it will do.
    spec = subject.config.data if subject.config else override(DataSpec(val_size=1), _data(args))
    attack = preset(args.attack, _eps(args, subject, spec), args.norm, args.version)
    bundle = _bundle(args, subject)
    data = subject.data or load(spec)
    tracker = open_tracker(out)
    if run_id is None and subject.checkpoint is not None:
        run_id = tracker.find(run_tags(subject.checkpoint))
    count = min(args.n or len(data.test), len(data.test))
    folder = folder_of(out, subject, attack, spec, count)
    options = {"batch_size": args.batch_size, "keep_adversarial": args.keep_adversarial or bundle is not None}
    with workers(args.address, args.gpus_per_task) as shards:
        report = judge(subject, data, attack, count, folder, shards, **options)
    save(report, folder, subject, spec)
    if bundle is not None and subject.checkpoint is not None:
        write_bundle(bundle, report, subject.checkpoint, spec, subject.name)
    _print(args, report, subject, folder, tracker)
    name = args.attack if args.version == "standard" else f"{args.attack}-{args.version}"
    track(tracker, run_id, subject, report, folder, name, count == len(data.test))
    return 0


def _refuse(args: Namespace, mode: str, unused: dict[str, Any]) -> None:
    """Raises SpecError for options that mean nothing to a mode that attacks nothing."""
    given = [f"--{name.replace('_', '-')}" for name, default in unused.items() if getattr(args, name) != default]
    if given:
        raise SpecError(f"{mode} attacks nothing: leave out {', '.join(given)}")


def _bundle(args: Namespace, subject: Subject) -> Path | None:
    """Where a bundle is to go. SpecError, before the attacks, for what would make it impossible."""
    if args.bundle is None:
        return None
    if subject.checkpoint is None:
        raise SpecError(f"--bundle: {subject.name} is code of your own: only checkpoints of ours can be bundled")
    folder: Path = args.bundle.expanduser().resolve()
    if folder.exists():
        raise SpecError(f"--bundle {args.bundle}: is there already")
    return folder


def _verify(args: Namespace) -> int:
    """Exit code 1 if a claim of the bundle does not hold."""
    data_dir = args.data_dir.expanduser().resolve() if args.data_dir else None
    card, problems = verify_bundle(Path(args.what).expanduser().resolve(), data_dir)
    if args.json:
        print(json.dumps({"bundle": args.what, "sound": not problems, "problems": problems, "card": card}, indent=1))
    elif not problems:
        print(f"{card['name']}: sound; {card['examples']} examples, {card['robust_accuracy']:.2%} robust")
    for line in problems:
        print(f"raysweep: {args.what}: {line}", file=sys.stderr)
    return 1 if problems else 0


def _subject(args: Namespace, out: Path) -> tuple[Subject, str | None]:
    """The model, and its MLflow run if it was named by one: for anything else no store is opened."""
    if _FACTORY.match(args.what):
        return load_factory(args.what), None
    if _RUN_ID.match(args.what) or args.what.startswith(("runs:/", "models:/")):
        run_id, folder = open_tracker(out).checkpoint(args.what, out / "runs" / "from-mlflow")
        return load_checkpoint(folder, _data(args)), run_id
    return load_checkpoint(_place(args), _data(args)), None


def _place(args: Namespace) -> Path:
    """A checkpoint's or run's folder, by path or URI or by the name of a sweep, which stands for its best trial."""
    here = storage.is_uri(args.what) or Path(args.what).expanduser().exists()
    runs = runs_in(args, write=False)
    found = None if here else named_sweep(args.what, runs)
    if not here and not found and (sweeps := storage.folders(runs, "sweep.json")):
        raise SpecError(unknown_name("sweep, trial or folder", args.what, sweeps))
    if found and found[1] is not None:
        return found[0].run_path(found[1])
    path = found[0].path if found else storage.reach(args.what)
    return load_sweep(path).best if storage.pull_file(path / "sweep.json") else path


def _data(args: Namespace) -> dict[str, Any]:
    return data_settings(args, "an evaluation")


def _eps(args: Namespace, subject: Subject, spec: DataSpec) -> float:
    """What was asked for, else what the model was trained for."""
    if args.eps is not None:
        if args.norm == "Linf" and args.eps > 1:
            raise SpecError(f"--eps {args.eps:g}: epsilon means pixels in [0, 1]; did you mean {args.eps:g}/255?")
        return float(args.eps)
    radius, norm = threat_of(subject, spec.name)
    if norm != args.norm:
        raise SpecError(f"--norm {args.norm}: the model's own epsilon {radius:.6g} is {norm}; say --eps too")
    return radius


def _pseudo_label(args: Namespace, subject: Subject, out: Path) -> int:
    """Write FILE's images with the model's labels, as `data.unlabeled` takes them (Carmon et al. 2019)."""
    source = args.pseudo_label.expanduser()
    x, _ = read_unlabeled(source)
    white = subject.data.test.white if subject.data else 255
    y = pseudo_label(subject.model, torch.from_numpy(x), white).numpy()
    target = out / f"{source.stem}-labelled.npz"
    write_unlabeled(target, x, y)
    if args.json:
        print(json.dumps({"model": subject.name, "images": len(y), "file": str(target)}, indent=1))
    else:
        print(f"{len(y)} images labelled by {subject.name}; use them with\n  --set data.unlabeled={target}")
    return 0


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
    print(f"files\n  {folder}")
    if tracker.uri:
        print(f"compare with\n  {ui_command(tracker.uri)}")
