"""Report section about ablations: test accuracy against one setting.

The setting is a parameter of the method (lambda, burn-in, alpha, C) or the steps of the attack.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from raysweep.attacks import PGD, AnyAttack, AttackCascade
from raysweep.pipeline.artifact import Artifact, EvaluationResult
from raysweep.pipeline.autoattack import AutoAttackStage
from raysweep.pipeline.report import figures
from raysweep.pipeline.report.document import CaptionedFigure, Section
from raysweep.spec import flatten_spec, json_digest
from raysweep.sweep.search_space import param_labels
from raysweep.training.config import TrainingConfig

# A setting with fewer values is not plotted.
_MIN_VALUES = 3
# Curve -> value of the setting -> accuracy.
AccuracyCurves = dict[str, dict[float, float]]


def build_ablation_sections(
    evaluations: Sequence[EvaluationResult],
    configs: Mapping[str, TrainingConfig],
    artifacts: Sequence[Artifact],
) -> list[Section]:
    """Plot test accuracy against each setting that is the only difference between some runs.

    Args:
        evaluations: Results on the test set.
        configs: Training config of each checkpoint.
        artifacts: Artifacts of all stages.

    Returns:
        One section; empty if no setting has enough values.
    """
    pictures = []
    for path, curves in _iter_param_ablations(evaluations, configs):
        (label,) = param_labels([path]).values()
        caption = f"Test accuracy against {path} (medians over seeds)"
        pictures.append(CaptionedFigure(caption, figures.plot_accuracy_curves(curves, label)))
    if curves := collect_pgd_step_curves(evaluations, artifacts):
        # GAIRAT, fig. 21.
        figure = figures.plot_accuracy_curves(curves, "PGD steps")
        pictures.append(CaptionedFigure("Test accuracy against the steps of PGD", figure))
    return [Section("Ablations", pictures)] if pictures else []


def _iter_param_ablations(
    evaluations: Sequence[EvaluationResult], configs: Mapping[str, TrainingConfig]
) -> Iterator[tuple[str, AccuracyCurves]]:
    """Yield each parameter of the method that varies alone, with its curves."""
    settings_of = {}
    for checkpoint, config in configs.items():
        settings = flatten_spec(config)
        settings_of[checkpoint] = {k: v for k, v in settings.items() if k != "seed"}
    for path in _find_numeric_params(settings_of):
        values = _find_largest_ablation(settings_of, path)
        if len(set(values.values())) >= _MIN_VALUES:
            points = [
                (e, values[e.candidate.checkpoint])
                for e in evaluations
                if e.candidate.checkpoint in values
            ]
            yield path, _collect_accuracy_curves(points)


def _find_numeric_params(settings_of: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Find the parameters of the method that are a number in some checkpoint."""
    paths = set()
    for settings in settings_of.values():
        for path, value in settings.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if path.startswith("method.") and is_number:
                paths.add(path)
    return sorted(paths)


def _find_largest_ablation(
    settings_of: Mapping[str, Mapping[str, Any]], path: str
) -> dict[str, float]:
    """Find the checkpoints that differ in one parameter only.

    If there are several groups of such checkpoints, the group with most values is used.

    Returns:
        Value of the parameter for each checkpoint of the group.
    """
    groups: dict[str, dict[str, float]] = {}
    for checkpoint, settings in settings_of.items():
        if isinstance(settings.get(path), int | float):
            others = json_digest({**settings, path: None})
            groups.setdefault(others, {})[checkpoint] = settings[path]
    return max(groups.values(), key=lambda values: len(set(values.values())))


def _collect_accuracy_curves(points: Sequence[tuple[EvaluationResult, float]]) -> AccuracyCurves:
    """Collect clean and robust accuracy, for best and last epochs.

    Args:
        points: Evaluations with the value of the setting.
    """
    accuracies: dict[str, dict[float, list[float]]] = {}
    for evaluation, value in points:
        kind = evaluation.candidate.checkpoint_kind
        clean = accuracies.setdefault(f"clean, {kind}", {})
        clean.setdefault(value, []).append(evaluation.clean)
        robust = accuracies.setdefault(f"{evaluation.attack}, {kind}", {})
        robust.setdefault(value, []).append(evaluation.robust)
    return _take_curve_medians(accuracies)


def collect_pgd_step_curves(
    evaluations: Sequence[EvaluationResult], artifacts: Sequence[Artifact]
) -> AccuracyCurves:
    """Collect the accuracy under PGD attacks that differ in their number of steps only.

    Args:
        evaluations: Results on the test set.
        artifacts: Artifacts of all stages.

    Returns:
        Row and kind of checkpoint -> number of steps -> accuracy, for three or more numbers.
    """
    stages = [
        AutoAttackStage.from_data(artifact.stage, stored=True)
        for artifact in artifacts
        if artifact.kind == "autoattack"
    ]
    accuracies: dict[tuple[str, str], dict[float, list[float]]] = {}
    for evaluation in evaluations:
        pgd = _find_plain_pgd(stages, evaluation)
        if pgd is not None:
            candidate = evaluation.candidate
            curve = f"{candidate.label}, {candidate.checkpoint_kind}"
            other_settings = pgd.replace(steps=1).digest()
            points = accuracies.setdefault((curve, other_settings), {})
            points.setdefault(pgd.steps, []).append(evaluation.robust)
    return _take_curve_medians(
        {curve: points for (curve, _), points in accuracies.items() if len(points) >= _MIN_VALUES}
    )


def _find_plain_pgd(stages: Sequence[AutoAttackStage], evaluation: EvaluationResult) -> PGD | None:
    """Return the attack of an evaluation if it is PGD on the cross-entropy, else None."""
    for stage in stages:
        if evaluation.attack in stage.attacks:
            return _extract_plain_pgd(stage.build_attack(evaluation.attack, evaluation.eps))
    return None


def _extract_plain_pgd(attack: AnyAttack) -> PGD | None:
    """Return PGD on the cross-entropy, also from a cascade of one attack; None for others."""
    if isinstance(attack, AttackCascade) and len(attack.attacks) == 1:
        (attack,) = attack.attacks.values()
    return attack if isinstance(attack, PGD) and attack.loss == "ce" else None


def _take_curve_medians(
    accuracies: Mapping[str, Mapping[float, Sequence[float]]],
) -> AccuracyCurves:
    """Replace the accuracies of several seeds by their median."""
    return {
        curve: {value: median(shares) for value, shares in points.items()}
        for curve, points in accuracies.items()
    }
