"""`raysweep eval`: attack a model on the test set."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.commands.options import (
    CommandParsers,
    add_code_option,
    add_command,
    add_json_option,
    add_location_options,
    add_override_options,
    add_verbose_option,
    parse_fraction,
    parse_non_negative,
    parse_positive_int,
)

if TYPE_CHECKING:
    from raysweep.attacks import AttackCascade
    from raysweep.attacks.base import Norm
    from raysweep.attacks.named_attacks import AutoAttackVersion
    from raysweep.code_files import CodeFile
    from raysweep.data import DataSpec, SubsetChoice
    from raysweep.evaluation import RobustnessReport
    from raysweep.tracking import Tracker
    from raysweep.training.model_loading import EvaluationTarget

SUMMARY = "attack a checkpoint, an MLflow run or your own model on the test set"
DESCRIPTION = (
    "Attacks a model on the test set, by default with AutoAttack. Finished shards are kept: after "
    "a kill, run the same command to resume. The model card and the result of each example go to "
    "the folder of the checkpoint (for your own code to runs/eval), accuracies to the MLflow run "
    "that trained the model."
)
EXAMPLES = (
    "raysweep eval g1",
    "raysweep eval g1/0003 --bundle claim",
    "raysweep eval my_models:make --eps 8/255 --n 1000",
)

# Options that only attacks use, with their defaults.
_ATTACK_OPTION_DEFAULTS: dict[str, Any] = {
    "attack": "autoattack",
    "version": "standard",
    "eps": None,
    "norm": "Linf",
    "n": None,
    "batch_size": 500,
    "keep_adversarial": False,
    "bundle": None,
    "sign": None,
    "address": None,
    "gpus_per_task": 1.0,
}
# Options that --verify does not read, with their defaults.
_VERIFY_UNUSED_DEFAULTS: dict[str, Any] = {
    **{name: value for name, value in _ATTACK_OPTION_DEFAULTS.items() if name != "attack"},
    "pseudo_label": None,
    "storage": None,
    "out": Path(),
}

# The setting of an evaluation that is not one of the data set.
_SUBSET_SETTING = "subset"
_FACTORY_PATTERN = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


@dataclass(frozen=True)
class EvalRequest:
    """What the user asked `raysweep eval` to do.

    Attributes:
        model: A sweep, a trial, a folder or URI of a run or checkpoint, an MLflow run id or
            model, or `module:factory`.
        attack: Names of attacks, separated by commas.
        version: Version of AutoAttack.
        eps: Radius of the attack, in pixels of [0, 1]; None for the radius of the training.
        norm: Norm of the radius, "Linf" or "L2".
        max_examples: Number of test examples to attack; None for all.
        subset: Which test examples, if not all (see `choose_subset_rows`).
        batch_size: Number of examples that are attacked at a time.
        pseudo_label_file: Images to label with the model, instead of an attack; or None.
        keep_adversarial: Whether to save the adversarial examples.
        bundle: New folder for a bundle (card, weights, adversarial examples); or None.
        signing_key: File of the SSH key that signs the bundle; or None.
        address: Ray cluster to use; None for $RAY_ADDRESS or the cores of this machine.
        gpus_per_task: GPUs of each task on a cluster.
        data_overrides: {path below `data`: value} of `--set data.*` and `--data-dir`.
        data_dir: Folder of the data set; None for the default of the data set.
        out: Folder of `runs` and `mlflow.db`.
        code: The file of `--code`; or None.
        storage: Folder or URI of sweeps; None for `runs` in `out`.
        as_json: Whether to print JSON on stdout.
    """

    model: str
    attack: str
    version: AutoAttackVersion
    eps: float | None
    norm: Norm
    max_examples: int | None
    subset: SubsetChoice
    batch_size: int
    pseudo_label_file: Path | None
    keep_adversarial: bool
    bundle: Path | None
    signing_key: Path | None
    address: str | None
    gpus_per_task: float
    data_overrides: dict[str, Any]
    data_dir: Path | None
    code: CodeFile | None
    out: Path
    storage: str | None
    as_json: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> EvalRequest:
        """Convert parsed arguments.

        Raises:
            SpecError: `--set` is malformed, or an option has no effect on what was asked for.
        """
        from raysweep.code_files import open_code_file
        from raysweep.commands.common import parse_data_overrides
        from raysweep.spec import SpecError

        if args.pseudo_label is not None:
            _reject_unused_options(args, "--pseudo-label attacks nothing", _ATTACK_OPTION_DEFAULTS)
        if args.sign is not None and args.bundle is None:
            raise SpecError("--sign: signs a bundle; give --bundle DIR too")
        return cls(
            model=args.what,
            attack=args.attack,
            version=args.version,
            eps=args.eps,
            norm=args.norm,
            max_examples=args.n,
            subset=_read_subset(args),
            batch_size=args.batch_size,
            pseudo_label_file=args.pseudo_label,
            keep_adversarial=args.keep_adversarial,
            bundle=args.bundle,
            signing_key=args.sign,
            address=args.address,
            gpus_per_task=args.gpus_per_task,
            data_overrides=parse_data_overrides(
                args.set, args.data_dir, "an evaluation", [_SUBSET_SETTING]
            ),
            data_dir=args.data_dir,
            code=None if args.code is None else open_code_file(args.code),
            out=args.out,
            storage=args.storage,
            as_json=args.json,
        )


def _read_subset(args: argparse.Namespace) -> SubsetChoice:
    """Return the value of `--set subset=`. Raises SpecError if it is unknown or has no effect."""
    from raysweep.commands.common import parse_overrides
    from raysweep.data import DEFAULT_SUBSET, SUBSET_CHOICES
    from raysweep.spec import SpecError

    subset: SubsetChoice = parse_overrides(args.set, None).get(_SUBSET_SETTING, DEFAULT_SUBSET)
    if subset not in SUBSET_CHOICES:
        raise SpecError(
            f"--set {_SUBSET_SETTING}={subset}: allowed are {', '.join(SUBSET_CHOICES)}"
        )
    if args.n is None and subset != DEFAULT_SUBSET:
        raise SpecError(f"--set {_SUBSET_SETTING}={subset}: has no effect without --n")
    return subset


def _reject_unused_options(
    args: argparse.Namespace, mode: str, unused_defaults: dict[str, Any]
) -> None:
    """Raise SpecError for options that have no effect in a mode."""
    from raysweep.spec import SpecError

    unused_flags = [
        f"--{name.replace('_', '-')}"
        for name, default in unused_defaults.items()
        if getattr(args, name) != default
    ]
    if unused_flags:
        raise SpecError(f"{mode}: leave out {', '.join(unused_flags)}")


def add_parser(parsers: CommandParsers) -> None:
    """Add the arguments of `raysweep eval` to the command line."""
    parser = add_command(
        parsers, "eval", run_command, summary=SUMMARY, description=DESCRIPTION, examples=EXAMPLES
    )
    parser.add_argument(
        "what",
        metavar="WHAT",
        help="a sweep (its best trial), a trial (SWEEP/0003), a training run, the folder of one or "
        "of a checkpoint, an MLflow run id, models:/NAME@ALIAS, or module:factory",
    )
    _add_attack_options(parser)
    _add_output_options(parser)
    _add_cluster_options(parser)
    parser.set_defaults(**_ATTACK_OPTION_DEFAULTS)
    add_override_options(parser)
    add_code_option(parser)
    add_location_options(parser)
    add_json_option(parser)
    add_verbose_option(parser)


def _add_attack_options(parser: argparse.ArgumentParser) -> None:
    """Add what is attacked and how."""
    parser.add_argument(
        "--attack",
        help="an attack of `raysweep list`, or several separated by commas; a repeated name is a "
        "restart: apgd-ce,square (default: autoattack); with --verify a number of examples",
    )
    parser.add_argument(
        "--version",
        choices=("standard", "plus", "rand", "tf32"),
        help="version of AutoAttack; tf32 runs the standard attacks in TF32 on NVIDIA GPUs and "
        "verifies each adversarial example in float32 (default: standard)",
    )
    parser.add_argument(
        "--eps",
        type=parse_fraction,
        help="0.031 or 8/255, in pixels of [0, 1] (default: that of the training)",
    )
    parser.add_argument("--norm", choices=("Linf", "L2"), help="norm of --eps (default: Linf)")
    parser.add_argument(
        "--n",
        type=parse_positive_int,
        help="attack N test examples, equally many of each class; --set subset=first takes the "
        "first N, subset=proportional keeps the classes' shares (default: all)",
    )
    parser.add_argument(
        "--batch-size",
        type=parse_positive_int,
        metavar="N",
        help="examples at a time (default: 500)",
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add what is written besides the result, and the modes that attack nothing."""
    parser.add_argument(
        "--pseudo-label",
        type=Path,
        metavar="FILE",
        help="attack nothing: label the images x of FILE, for data.unlabeled",
    )
    parser.add_argument(
        "--keep-adversarial", action="store_true", help="save the adversarial examples too"
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="write model card, weights and adversarial examples to a new folder, to publish them",
    )
    parser.add_argument(
        "--sign",
        type=Path,
        metavar="KEY",
        help="sign the bundle with this SSH key (by ssh-keygen), to show who made it",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="WHAT is a bundle: say what it shows, and which of its claims are false; with "
        "--attack N attack N of the examples afresh that it claims robust",
    )


def _add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add the cluster and what a task holds of it."""
    parser.add_argument(
        "--address",
        metavar="ADDR",
        help="run on this Ray cluster (default: $RAY_ADDRESS, else the cores of this machine)",
    )
    parser.add_argument(
        "--gpus-per-task",
        type=parse_non_negative,
        metavar="N",
        help="GPUs of a task on a cluster, may be a fraction (default: 1)",
    )


def run_command(args: argparse.Namespace) -> None:
    """Run `raysweep eval`."""
    if args.verify:
        _verify_bundle(args)
        return
    request = EvalRequest.from_args(args)
    from raysweep.commands.common import make_writable_folder
    from raysweep.spec import SpecError

    out = make_writable_folder(request.out)
    target, run_id = _load_target(request, out)
    if request.code is not None and (target.config is None or target.config.model.code is None):
        raise SpecError(f"--code {request.code.path}: has no effect: {target.name} needs no code")
    if request.pseudo_label_file is not None:
        _write_pseudo_labels(request, target, request.pseudo_label_file, out)
    else:
        _evaluate(request, target, run_id, out)


def _verify_bundle(args: argparse.Namespace) -> None:
    """Run `raysweep eval --verify`."""
    from raysweep.commands._bundle_verification import VerificationRequest, verify_bundle_claims

    _reject_unused_options(args, "--verify", _VERIFY_UNUSED_DEFAULTS)
    default_attack = _ATTACK_OPTION_DEFAULTS["attack"]
    verify_bundle_claims(VerificationRequest.from_args(args, default_attack))


def _load_target(request: EvalRequest, out: Path) -> tuple[EvaluationTarget, str | None]:
    """Load the model.

    Returns:
        The model, and its MLflow run id if MLflow named it; otherwise None, and MLflow is not
        opened.
    """
    from raysweep.commands.common import open_tracker, resolve_runs_folder
    from raysweep.run_lookup import (
        download_from_mlflow,
        find_checkpoint_folder,
        is_mlflow_reference,
    )
    from raysweep.training.model_loading import load_checkpoint_target, load_factory_target

    name = request.model
    if _FACTORY_PATTERN.match(name):
        return load_factory_target(name), None
    if is_mlflow_reference(name):
        run_id, folder = download_from_mlflow(name, open_tracker(out), out)
        return load_checkpoint_target(folder, request.data_overrides), run_id
    runs_folder = resolve_runs_folder(request.out, request.storage, for_writing=False)
    path = find_checkpoint_folder(name, runs_folder)
    return load_checkpoint_target(path, request.data_overrides), None


def _write_pseudo_labels(
    request: EvalRequest, target: EvaluationTarget, source: Path, out: Path
) -> None:
    """Label the images of a file with the model, for `data.unlabeled` (Carmon et al. 2019)."""
    import torch

    from raysweep.data.unlabeled import (
        predict_pseudo_labels,
        read_unlabeled_file,
        write_pseudo_labeled_npz,
    )
    from raysweep.user_folders import expand_home

    source = expand_home(source)
    x, _ = read_unlabeled_file(source)
    pixel_max = target.data.test.pixel_max if target.data else 255
    y = predict_pseudo_labels(target.model, torch.from_numpy(x), pixel_max).numpy()
    labelled_file = out / f"{source.stem}-labelled.npz"
    write_pseudo_labeled_npz(labelled_file, x, y)
    if request.as_json:
        summary = {"model": target.name, "images": len(y), "file": str(labelled_file)}
        print(json.dumps(summary, indent=1))
    else:
        print(
            f"{len(y)} images labelled by {target.name}; use them with\n"
            f"  --set data.unlabeled={labelled_file}"
        )


def _evaluate(
    request: EvalRequest, target: EvaluationTarget, run_id: str | None, out: Path
) -> None:
    """Attack the model; write, print and log the report."""
    from raysweep.checkpoint_evaluation import (
        choose_evaluation_folder,
        describe_evaluation,
        evaluate_checkpoint,
        log_evaluation,
        save_evaluation_files,
    )
    from raysweep.commands.common import open_tracker
    from raysweep.data import load_test_data
    from raysweep.logs import log_to_folder
    from raysweep.record_queue import RecordQueue
    from raysweep.robustness_bundle import write_bundle
    from raysweep.sweep.shard_mappers import open_executor
    from raysweep.unrecorded_folders import note_unrecorded

    data_spec = _resolve_data_spec(request, target)
    attack = _make_attack(request, target, data_spec)
    bundle = _check_bundle_folder(request, target)
    dataset = target.data or load_test_data(data_spec)
    tracker = open_tracker(out)
    n_test = len(dataset.require_test())
    n_examples = min(request.max_examples or n_test, n_test)
    is_whole_test_set = n_examples == n_test
    subset: SubsetChoice = "first" if is_whole_test_set else request.subset
    folder = choose_evaluation_folder(out, target, attack, data_spec, n_examples, subset=subset)
    with (
        log_to_folder(folder),
        open_executor(request.address, request.gpus_per_task) as executor,
    ):
        report = evaluate_checkpoint(
            target,
            dataset,
            attack,
            n_examples,
            folder,
            executor,
            batch_size=request.batch_size,
            keep_adversarial=request.keep_adversarial or bundle is not None,
            subset=subset,
        )
    save_evaluation_files(report, folder, target, data_spec)
    if bundle is not None and target.checkpoint is not None:
        write_bundle(
            bundle,
            report,
            target.checkpoint,
            data_spec,
            target.name,
            test=dataset.test,
            signing_key=request.signing_key,
        )
    _print_report(request, report, target, folder, tracker)
    attack_name = request.attack
    if request.version != "standard":
        attack_name = f"{request.attack}-{request.version}"
    if not tracker.uri:
        return
    record = describe_evaluation(target, report, attack_name, is_whole_test_set, run_id)
    note_unrecorded(folder, dataclasses.asdict(record))
    records = RecordQueue("MLflow store", tracker.uri)
    records.write(lambda: log_evaluation(tracker, record, folder))
    records.finish("; `raysweep sync` writes them")


def _resolve_data_spec(request: EvalRequest, target: EvaluationTarget) -> DataSpec:
    """Return the data set of the training; for the user's own code, the one of `--set`."""
    from raysweep.data import DataSpec
    from raysweep.spec import apply_overrides
    from raysweep.training.config import name_dataset

    if target.config:
        return target.config.data
    changes = name_dataset({f"data.{key}": value for key, value in request.data_overrides.items()})
    # Only the test set is used. A validation split of 1 fits every training set.
    return apply_overrides(
        DataSpec(val_size=1),
        {path.removeprefix("data."): value for path, value in changes.items()},
    )


def _make_attack(
    request: EvalRequest, target: EvaluationTarget, data_spec: DataSpec
) -> AttackCascade:
    """Return the attack. Raises SpecError if its name, version or radius is wrong."""
    from raysweep.attacks import build_named_attack
    from raysweep.commands.common import print_warnings
    from raysweep.training.config_warnings import find_short_attacks

    eps = _resolve_eps(request, target, data_spec)
    cascade = build_named_attack(request.attack, eps, request.norm, request.version)
    print_warnings(
        f"{warning.setting} = {warning.value}: {warning.effect.partition(';')[0]}"
        for warning in find_short_attacks(cascade.attacks)
    )
    return cascade


def _resolve_eps(request: EvalRequest, target: EvaluationTarget, data_spec: DataSpec) -> float:
    """Return the requested radius, or the one that the model was trained for."""
    from raysweep.checkpoint_evaluation import resolve_threat_model
    from raysweep.spec import SpecError

    eps = request.eps
    if eps is not None:
        if request.norm == "Linf" and eps > 1:
            raise SpecError(
                f"--eps {eps:g}: epsilon means pixels in [0, 1]; did you mean {eps:g}/255?"
            )
        return eps
    trained_eps, trained_norm = resolve_threat_model(target, data_spec.name)
    if trained_norm != request.norm:
        raise SpecError(
            f"--norm {request.norm}: the model's own epsilon {trained_eps:.6g} is {trained_norm}; "
            "give --eps too"
        )
    return trained_eps


def _check_bundle_folder(request: EvalRequest, target: EvaluationTarget) -> Path | None:
    """Return the folder of the bundle, or None if none was asked for.

    Raises:
        SpecError: The model is no checkpoint, the folder exists, or the key is none.
        InfrastructureError: ssh-keygen is missing.
    """
    from raysweep.robustness_bundle import check_signing_key
    from raysweep.spec import SpecError
    from raysweep.user_folders import expand_home

    if request.bundle is None:
        return None
    if target.checkpoint is None:
        raise SpecError(
            f"--bundle: {target.name} is your own code: only checkpoints of raysweep can be bundled"
        )
    folder = expand_home(request.bundle).resolve()
    if folder.exists():
        raise SpecError(f"--bundle {request.bundle}: exists already")
    if request.signing_key is not None:
        check_signing_key(request.signing_key)
    return folder


def _print_report(
    request: EvalRequest,
    report: RobustnessReport,
    target: EvaluationTarget,
    folder: Path,
    tracker: Tracker,
) -> None:
    """Print accuracies with their 95% intervals, the files, and how to open MLflow."""
    from raysweep.commands.common import format_ui_command, print_warnings

    print_warnings(report.warnings)
    if request.as_json:
        summary = {**report.summary(), "model": target.name, "folder": str(folder)}
        print(json.dumps(summary, indent=1, default=str))
        return
    examples = f"{len(report.labels)} test examples"
    if report.subset is not None:
        examples += f" ({report.subset})"
    print(f"{target.name}: {examples}, {report.norm} eps {report.eps:.6g}")
    rows = {"clean": report.clean}
    for name, is_robust in report.robust_after.items():
        rows[f"after {name}"] = is_robust
    for (name, is_correct), (low, high) in zip(
        rows.items(), report.intervals.values(), strict=False
    ):
        print(f"  {name:<16} {is_correct.mean():7.2%}   95% {low:.2%} .. {high:.2%}")
    if report.masking_gap is not None:
        print(f"  {'masking gap':<16} {report.masking_gap:7.2%}")
    print(f"files\n  {folder}")
    if tracker.uri:
        print(f"compare with\n  {format_ui_command(tracker.uri)}")
