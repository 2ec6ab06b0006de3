"""Test accuracy against one thing that differs: a setting (lambda, burn-in, alpha, C), or the steps of the attack."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from raysweep.attacks import PGD, AnyAttack, WorstCase
from raysweep.pipeline import figures
from raysweep.pipeline.artifact import Artifact, Judgement
from raysweep.pipeline.autoattack import AutoAttack
from raysweep.pipeline.document import Picture, Section
from raysweep.spec import digest, flatten
from raysweep.sweep.space import labels
from raysweep.training.config import RunConfig

_ENOUGH = 3
Lines = dict[str, dict[float, float]]


def varied(
    judged: Sequence[Judgement], configs: Mapping[str, RunConfig], artifacts: Sequence[Artifact]
) -> list[Section]:
    """A picture for each setting that has several values and nothing else beside it. configs: checkpoint -> its run."""
    pictures = [
        Picture(f"Test accuracy against {path} (medians over seeds)", figures.against_setting(lines, name))
        for path, lines in _settings(judged, configs)
        for name in labels([path]).values()
    ]
    if lines := _strengths(judged, artifacts):
        # G fig. 21
        pictures.append(Picture("Test accuracy against the steps of PGD", figures.against_setting(lines, "PGD steps")))
    return [Section("One thing varied", pictures)] if pictures else []


def _settings(judged: Sequence[Judgement], configs: Mapping[str, RunConfig]) -> Iterator[tuple[str, Lines]]:
    flat = {place: {k: v for k, v in flatten(config).items() if k != "seed"} for place, config in configs.items()}
    numbers = {
        path
        for settings in flat.values()
        for path, value in settings.items()
        if path.startswith("method.") and isinstance(value, int | float) and not isinstance(value, bool)
    }
    for path in sorted(numbers):
        alike: dict[str, dict[str, float]] = {}
        for place, settings in flat.items():
            if isinstance(settings.get(path), int | float):
                alike.setdefault(digest({**settings, path: None}), {})[place] = settings[path]
        group = max(alike.values(), key=lambda members: len(set(members.values())))
        if len(set(group.values())) >= _ENOUGH:
            yield path, _lines([(j, group[j.candidate.checkpoint]) for j in judged if j.candidate.checkpoint in group])


def _lines(points: Sequence[tuple[Judgement, float]]) -> Lines:
    """Clean accuracy and that under each attack, for the best and the last epochs."""
    found: dict[str, dict[float, list[float]]] = {}
    for judgement, value in points:
        which = judgement.candidate.which
        found.setdefault(f"clean, {which}", {}).setdefault(value, []).append(judgement.clean)
        found.setdefault(f"{judgement.attack}, {which}", {}).setdefault(value, []).append(judgement.robust)
    return _medians(found)


def _strengths(judged: Sequence[Judgement], artifacts: Sequence[Artifact]) -> Lines:
    """Accuracy under PGD attacks that differ in their number of steps only."""
    stages = [AutoAttack.load(artifact.stage) for artifact in artifacts if artifact.kind == "autoattack"]
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for j in judged:
        pgd = next((_pgd(stage.attack(j.attack, j.eps)) for stage in stages if j.attack in stage.attacks), None)
        if pgd is not None:
            alike = pgd.model_copy(update={"steps": 1}).digest()
            points = found.setdefault((f"{j.candidate.label}, {j.candidate.which}", alike), {})
            points.setdefault(pgd.steps, []).append(j.robust)
    return _medians({name: points for (name, _), points in found.items() if len(points) >= _ENOUGH})


def _pgd(attack: AnyAttack) -> PGD | None:
    if isinstance(attack, WorstCase) and len(attack.attacks) == 1:
        (attack,) = attack.attacks.values()
    return attack if isinstance(attack, PGD) and attack.loss == "ce" else None


def _medians(found: Mapping[str, Mapping[float, Sequence[float]]]) -> Lines:
    return {name: {value: median(shares) for value, shares in points.items()} for name, points in found.items()}
