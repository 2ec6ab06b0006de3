"""Test accuracy against one thing that differs: a setting (lambda, burn-in, alpha, C), or the steps
of the attack.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from raysweep.attacks import PGD, AnyAttack, AttackCascade
from raysweep.pipeline.artifact import Artifact, EvaluationResult
from raysweep.pipeline.autoattack import AutoAttackStage
from raysweep.pipeline.report import figures
from raysweep.pipeline.report.document import CaptionedFigure, Section
from raysweep.spec import flatten_spec, json_digest
from raysweep.sweep.search_space import param_labels
from raysweep.training.config import TrainingConfig

_MIN_VALUES = 3
AccuracyCurves = dict[str, dict[float, float]]


def build_ablation_sections(
    evaluations: Sequence[EvaluationResult],
    configs: Mapping[str, TrainingConfig],
    artifacts: Sequence[Artifact],
) -> list[Section]:
    """A picture for each setting that has several values and nothing else beside it. configs:
    checkpoint -> its run.
    """
    pictures = [
        CaptionedFigure(
            f"Test accuracy against {path} (medians over seeds)",
            figures.plot_accuracy_curves(lines, name),
        )
        for path, lines in _iter_param_ablations(evaluations, configs)
        for name in param_labels([path]).values()
    ]
    if lines := _collect_pgd_step_curves(evaluations, artifacts):
        # G fig. 21
        pictures.append(
            CaptionedFigure(
                "Test accuracy against the steps of PGD",
                figures.plot_accuracy_curves(lines, "PGD steps"),
            )
        )
    return [Section("One thing varied", pictures)] if pictures else []


def _iter_param_ablations(
    evaluations: Sequence[EvaluationResult], configs: Mapping[str, TrainingConfig]
) -> Iterator[tuple[str, AccuracyCurves]]:
    flat = {
        place: {k: v for k, v in flatten_spec(config).items() if k != "seed"}
        for place, config in configs.items()
    }
    numbers = {
        path
        for settings in flat.values()
        for path, value in settings.items()
        if path.startswith("method.")
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    }
    for path in sorted(numbers):
        alike: dict[str, dict[str, float]] = {}
        for place, settings in flat.items():
            if isinstance(settings.get(path), int | float):
                alike.setdefault(json_digest({**settings, path: None}), {})[place] = settings[path]
        group = max(alike.values(), key=lambda members: len(set(members.values())))
        if len(set(group.values())) >= _MIN_VALUES:
            yield (
                path,
                _collect_accuracy_curves(
                    [
                        (j, group[j.candidate.checkpoint])
                        for j in evaluations
                        if j.candidate.checkpoint in group
                    ]
                ),
            )


def _collect_accuracy_curves(points: Sequence[tuple[EvaluationResult, float]]) -> AccuracyCurves:
    """Clean accuracy and that under each attack, for the best and the last epochs."""
    found: dict[str, dict[float, list[float]]] = {}
    for judgement, value in points:
        which = judgement.candidate.checkpoint_kind
        found.setdefault(f"clean, {which}", {}).setdefault(value, []).append(judgement.clean)
        found.setdefault(f"{judgement.attack}, {which}", {}).setdefault(value, []).append(
            judgement.robust
        )
    return _take_curve_medians(found)


def _collect_pgd_step_curves(
    evaluations: Sequence[EvaluationResult], artifacts: Sequence[Artifact]
) -> AccuracyCurves:
    """Accuracy under PGD attacks that differ in their number of steps only."""
    stages = [
        AutoAttackStage.from_data(artifact.stage, stored=True)
        for artifact in artifacts
        if artifact.kind == "autoattack"
    ]
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for j in evaluations:
        pgd = next(
            (
                _extract_plain_pgd(stage.build_attack(j.attack, j.eps))
                for stage in stages
                if j.attack in stage.attacks
            ),
            None,
        )
        if pgd is not None:
            alike = pgd.replace(steps=1).digest()
            points = found.setdefault(
                (f"{j.candidate.label}, {j.candidate.checkpoint_kind}", alike), {}
            )
            points.setdefault(pgd.steps, []).append(j.robust)
    return _take_curve_medians(
        {name: points for (name, _), points in found.items() if len(points) >= _MIN_VALUES}
    )


def _extract_plain_pgd(attack: AnyAttack) -> PGD | None:
    if isinstance(attack, AttackCascade) and len(attack.attacks) == 1:
        (attack,) = attack.attacks.values()
    return attack if isinstance(attack, PGD) and attack.loss == "ce" else None


def _take_curve_medians(
    accuracies: Mapping[str, Mapping[float, Sequence[float]]],
) -> AccuracyCurves:
    return {
        name: {value: median(shares) for value, shares in points.items()}
        for name, points in accuracies.items()
    }
