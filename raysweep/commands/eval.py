"""raysweep eval"""

import json
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from raysweep import storage
from raysweep.attacks import attack_by_name
from raysweep.checkpoint_evaluation import (
    choose_evaluation_folder,
    evaluate_checkpoint,
    log_evaluation,
    resolve_threat_model,
    save_evaluation_files,
)
from raysweep.commands import (
    find_sweep_or_trial,
    format_ui_command,
    make_writable_folder,
    open_tracker,
    parse_data_overrides,
    resolve_runs_folder,
)
from raysweep.data import DataSpec, load_data
from raysweep.data.unlabeled import (
    predict_pseudo_labels,
    read_unlabeled_file,
    write_pseudo_labeled_npz,
)
from raysweep.evaluation import RobustnessReport
from raysweep.results import load_sweep
from raysweep.robustness_bundle import verify_bundle, write_bundle
from raysweep.spec import SpecError, apply_overrides, describe_unknown_name
from raysweep.sweep.executors import open_executor
from raysweep.tracking import Tracker, checkpoint_run_tags
from raysweep.training.model_loading import (
    EvaluationTarget,
    load_checkpoint_target,
    load_factory_target,
)

_FACTORY_PATTERN = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
_RUN_ID_PATTERN = re.compile(r"^[0-9a-f]{32}$")


# Options that are of attacks alone, as they are where they were not given.
_ATTACK_OPTION_DEFAULTS: dict[str, Any] = {
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


def run_command(args: Namespace) -> int:
    if args.verify:
        _reject_unused_options(
            args,
            "--verify",
            {
                **_ATTACK_OPTION_DEFAULTS,
                "pseudo_label": None,
                "set": [],
                "storage": None,
                "out": Path(),
            },
        )
        return _verify_bundle_claims(args)
    if args.pseudo_label is not None:
        _reject_unused_options(args, "--pseudo-label", _ATTACK_OPTION_DEFAULTS)
    out = make_writable_folder(args.out)
    subject, run_id = _load_target(args, out)
    if args.pseudo_label is not None:
        return _write_pseudo_labels(args, subject, out)
    # For a model that we did not train, the training set is not used: however small, it will do.
    spec = (
        subject.config.data
        if subject.config
        else apply_overrides(DataSpec(val_size=1), _parse_eval_data(args))
    )
    attack = attack_by_name(args.attack, _resolve_eps(args, subject, spec), args.norm, args.version)
    bundle = _check_bundle_folder(args, subject)
    data = subject.data or load_data(spec)
    tracker = open_tracker(out)
    if run_id is None and subject.checkpoint is not None:
        run_id = tracker.find_run(checkpoint_run_tags(subject.checkpoint))
    count = min(args.n or len(data.test), len(data.test))
    folder = choose_evaluation_folder(out, subject, attack, spec, count)
    options = {
        "batch_size": args.batch_size,
        "keep_adversarial": args.keep_adversarial or bundle is not None,
    }
    with open_executor(args.address, args.gpus_per_task) as shards:
        report = evaluate_checkpoint(subject, data, attack, count, folder, shards, **options)
    save_evaluation_files(report, folder, subject, spec)
    if bundle is not None and subject.checkpoint is not None:
        write_bundle(bundle, report, subject.checkpoint, spec, subject.name)
    _print_report(args, report, subject, folder, tracker)
    name = args.attack if args.version == "standard" else f"{args.attack}-{args.version}"
    log_evaluation(tracker, run_id, subject, report, folder, name, count == len(data.test))
    return 0


def _reject_unused_options(args: Namespace, mode: str, unused_defaults: dict[str, Any]) -> None:
    """Raises SpecError for options that mean nothing to a mode that attacks nothing."""
    given = [
        f"--{name.replace('_', '-')}"
        for name, default in unused_defaults.items()
        if getattr(args, name) != default
    ]
    if given:
        raise SpecError(f"{mode} attacks nothing: leave out {', '.join(given)}")


def _check_bundle_folder(args: Namespace, target: EvaluationTarget) -> Path | None:
    """Where a bundle is to go. SpecError, before the attacks, for what would make it impossible."""
    if args.bundle is None:
        return None
    if target.checkpoint is None:
        raise SpecError(
            f"--bundle: {target.name} is code of your own: only checkpoints of ours can be bundled"
        )
    folder: Path = args.bundle.expanduser().resolve()
    if folder.exists():
        raise SpecError(f"--bundle {args.bundle}: is there already")
    return folder


def _verify_bundle_claims(args: Namespace) -> int:
    """Exit code 1 if a claim of the bundle does not hold."""
    data_dir = args.data_dir.expanduser().resolve() if args.data_dir else None
    card, problems = verify_bundle(Path(args.what).expanduser().resolve(), data_dir)
    if args.json:
        print(
            json.dumps(
                {"bundle": args.what, "sound": not problems, "problems": problems, "card": card},
                indent=1,
            )
        )
    elif not problems:
        print(
            f"{card['name']}: sound; {card['examples']} examples, {card['robust_accuracy']:.2%} robust"
        )
    for line in problems:
        print(f"raysweep: {args.what}: {line}", file=sys.stderr)
    return 1 if problems else 0


def _load_target(args: Namespace, out: Path) -> tuple[EvaluationTarget, str | None]:
    """The model, and its MLflow run if it was named by one: for anything else no store is opened."""
    if _FACTORY_PATTERN.match(args.what):
        return load_factory_target(args.what), None
    if _RUN_ID_PATTERN.match(args.what) or args.what.startswith(("runs:/", "models:/")):
        run_id, folder = open_tracker(out).download_checkpoint(
            args.what, out / "runs" / "from-mlflow"
        )
        return load_checkpoint_target(folder, _parse_eval_data(args)), run_id
    return load_checkpoint_target(_resolve_checkpoint_folder(args), _parse_eval_data(args)), None


def _resolve_checkpoint_folder(args: Namespace) -> Path:
    """A checkpoint's or run's folder, by path or URI or by the name of a sweep, which stands for
    its best trial.
    """
    here = storage.is_uri(args.what) or Path(args.what).expanduser().exists()
    runs = resolve_runs_folder(args, for_writing=False)
    found = None if here else find_sweep_or_trial(args.what, runs)
    if not here and not found and (sweeps := storage.list_folders_containing(runs, "sweep.json")):
        raise SpecError(describe_unknown_name("sweep, trial or folder", args.what, sweeps))
    if found and found[1] is not None:
        return found[0].trial_path(found[1])
    path = found[0].path if found else storage.require_reachable(args.what)
    return load_sweep(path).best if storage.pull_file(path / "sweep.json") else path


def _parse_eval_data(args: Namespace) -> dict[str, Any]:
    return parse_data_overrides(args, "an evaluation")


def _resolve_eps(args: Namespace, target: EvaluationTarget, data_spec: DataSpec) -> float:
    """What was asked for, else what the model was trained for."""
    if args.eps is not None:
        if args.norm == "Linf" and args.eps > 1:
            raise SpecError(
                f"--eps {args.eps:g}: epsilon means pixels in [0, 1]; did you mean {args.eps:g}/255?"
            )
        return float(args.eps)
    radius, norm = resolve_threat_model(target, data_spec.name)
    if norm != args.norm:
        raise SpecError(
            f"--norm {args.norm}: the model's own epsilon {radius:.6g} is {norm}; say --eps too"
        )
    return radius


def _write_pseudo_labels(args: Namespace, target: EvaluationTarget, out: Path) -> int:
    """Write FILE's images with the model's labels, as `data.unlabeled` takes them (Carmon et al.
    2019).
    """
    source = args.pseudo_label.expanduser()
    x, _ = read_unlabeled_file(source)
    white = target.data.test.pixel_max if target.data else 255
    y = predict_pseudo_labels(target.model, torch.from_numpy(x), white).numpy()
    labelled_file = out / f"{source.stem}-labelled.npz"
    write_pseudo_labeled_npz(labelled_file, x, y)
    if args.json:
        print(
            json.dumps(
                {"model": target.name, "images": len(y), "file": str(labelled_file)}, indent=1
            )
        )
    else:
        print(
            f"{len(y)} images labelled by {target.name}; use them with\n  --set data.unlabeled={labelled_file}"
        )
    return 0


def _print_report(
    args: Namespace,
    report: RobustnessReport,
    target: EvaluationTarget,
    folder: Path,
    tracker: Tracker,
) -> None:
    for warning in report.warnings:
        print(f"raysweep: warning: {warning}", file=sys.stderr)
    if args.json:
        print(
            json.dumps(
                {**report.summary(), "model": target.name, "folder": str(folder)},
                indent=1,
                default=str,
            )
        )
        return
    print(f"{target.name}: {len(report.labels)} test examples, {report.norm} eps {report.eps:.6g}")
    rows = {
        "clean": report.clean,
        **{f"after {name}": rows for name, rows in report.robust_after.items()},
    }
    for (name, flags), interval in zip(rows.items(), report.intervals.values(), strict=False):
        print(f"  {name:<16} {flags.mean():7.2%}   95% {interval[0]:.2%} .. {interval[1]:.2%}")
    if report.masking_gap is not None:
        print(f"  {'masking gap':<16} {report.masking_gap:7.2%}")
    print(f"files\n  {folder}")
    if tracker.uri:
        print(f"compare with\n  {format_ui_command(tracker.uri)}")
