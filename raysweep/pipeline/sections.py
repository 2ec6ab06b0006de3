"""The parts of a report, each from what the stages left. A part with nothing to say is left out."""

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from raysweep.pipeline import figures
from raysweep.pipeline.artifact import Artifact, Judgement, ranked_by
from raysweep.pipeline.document import Picture, Section, Table, Text
from raysweep.pipeline.paper import Comparison, PaperTable
from raysweep.pipeline.statistics import Summary, kendall_tau, summary
from raysweep.spec import Json
from raysweep.wording import duration

_SHOWN = 6
# A masking gap that deserves a word: four times what methods without masking have on digits.
_GAP = 0.02
_ALWAYS = ("robust_worst", "clean")
_PER_PART = {
    "train/kappa_": "mean κ under",
    "train/ess_": "effective share of the sample,",
}


def paper(table: PaperTable | None, lines: Sequence[Comparison]) -> list[Section]:
    """Ours beside the paper's."""
    if table is None:
        return []
    rows = [
        [c.row, c.which, c.metric, _ours(c.ours), _interval(c.ours), _theirs(c), f"{c.difference:+.2f}",
         f"{c.tolerance:.1f}", c.verdict]
        for c in lines
    ]  # fmt: skip
    headers = ["row", "epoch", "metric", "ours", "95%", "paper", "difference", "tolerance", "verdict"]
    parts: list[Any] = [
        Text(
            f"{table.source}. Test accuracy in percent: median ± standard deviation over seeds; the interval has the "
            "seeds and the finite test set in it. Reproduced: within the tolerance, and known as exactly as that."
        ),
        Table(headers, rows, text=("epoch", "metric", "verdict")),
    ]
    reasons = dict.fromkeys((c.row, "; ".join(c.reasons)) for c in lines if c.reasons)
    parts += [Text(f"{row} is not comparable: {why}.", quiet=True) for row, why in reasons]
    parts += [Text(note, quiet=True) for note in table.notes]
    if lines:
        parts.append(Picture("Ours and the paper's", figures.against_paper(lines), wide=len(lines) > 8))
    return [Section("Beside the paper", parts)]


def evaluation(judged: Sequence[Judgement], best: Judgement) -> list[Section]:
    """Accuracies of everything that was judged; per attack and per class for the first few."""
    groups = _groups(judged)
    metric = ranked_by(j.candidate for j in judged)[0]
    rows = []
    for (label, which, attack), members in groups.items():
        clean, robust = (summary([getattr(j, name) for j in members], members[0].examples) for name in _ACCURACIES)
        validation = [j.candidate for j in members]
        gaps = [c.metrics.get("masking_gap") for c in validation]
        gap = max((g for g in gaps if g is not None), default=None)
        rows.append(
            [
                label + (" (chosen)" if best.candidate.label == label and best.candidate.which == which else ""),
                f"{which} ({_span([c.epoch for c in validation])})",
                attack,
                str(robust.seeds),
                f"{100 * median(c.score(metric) for c in validation):.2f}",
                _ours(clean),
                _ours(robust),
                _interval(robust),
                "" if gap is None else f"{100 * gap:.2f}",
                "" if gap is None else "stands out" if gap > _GAP else "none",
            ]
        )
    headers = [
        "checkpoint",
        "epoch",
        "attack",
        "seeds",
        "validation",
        "clean",
        "robust",
        "95%",
        "masking gap",
        "masking",
    ]
    parts: list[Any] = [
        Text(
            "On the test set, in percent. Masking gap: what PGD alone overstates on validation; over "
            f"{100 * _GAP:.0f} points it stands out. Each checkpoint saw the test set once."
        ),
        Table(headers, rows, text=("epoch", "attack", "masking")),
    ]
    parts += [Text(f"{j.candidate.title}: {warning}") for j in judged for warning in j.warnings]
    shown = _shown(judged)
    steps = list(dict.fromkeys(name for j in shown.values() for name in j.after))
    parts.append(
        Table(
            ["left after", "clean", *steps],
            [[n, _percent(j.clean), *(_percent(j.after.get(s)) for s in steps)] for n, j in shown.items()],
        )
    )
    classes = list(dict.fromkeys(c for j in shown.values() for c in j.per_class))
    by_class = [
        [n, *(_percent(j.per_class.get(c, {}).get("robust_accuracy")) for c in classes)] for n, j in shown.items()
    ]
    parts.append(Table(["robust, by class", *classes], by_class))
    parts.append(Picture("Accuracy left after each attack", figures.after_attacks(shown)))
    parts.append(Picture("Robust accuracy of each class", figures.per_class(shown)))
    return [Section("Under attack", parts)]


def objective(judged: Sequence[Judgement]) -> list[Section]:
    """Whether what the sweep went by ranks as AutoAttack does."""
    metric = ranked_by(j.candidate for j in judged)[0]
    standard = [j for j in judged if j.standard and metric in j.candidate.metrics]
    if len(standard) < 2:
        return []
    scores = [j.candidate.score(metric) for j in standard]
    tau = kendall_tau(scores, [j.robust for j in standard])
    said = "cannot be told: one of them is constant" if tau is None else f"{tau:+.2f}"
    line = f"Kendall's tau between the objective and AutoAttack over {len(standard)} judged checkpoints: {said}."
    few = [Text("So few checkpoints say little: 1 and -1 are both likely by chance.", quiet=True)]
    return [
        Section(
            "Does the objective rank as AutoAttack does?",
            [
                Text(line),
                *(few if len(standard) < 5 else []),
                Picture("Objective and AutoAttack", figures.objective_against_autoattack(standard, scores)),
            ],
        )
    ]


def curves(histories: Mapping[str, Sequence[Mapping[str, float]]], notes: Mapping[str, Sequence[str]]) -> list[Section]:
    """Training of what was judged, epoch by epoch: {run: all its epochs}, and what stands out of each, in words."""
    wanted = {
        "robust_worst": "worst case on validation",
        "clean": "clean accuracy on validation",
        "masking_gap": "masking gap on validation",
        "train/loss": "training loss",
    }
    there = {key for history in histories.values() for row in history for key in row}
    for prefix, label in _PER_PART.items():
        names = [key.removeprefix(prefix) for key in sorted(there) if key.startswith(prefix) and "median" not in key]
        wanted |= {f"{prefix}{name}": f"{label} {name}" for name in names}
    pictures = [
        Picture(
            f"{label[0].upper()}{label[1:]} over epochs",
            figures.curves(histories, key, label.replace(" of the sample", "")),
        )
        for key, label in wanted.items()
        if key in there and (key in _ALWAYS or _differs(histories, key))
    ]
    words = [Text(f"{name}: {line}.") for name, lines in notes.items() for line in lines]
    return [Section("Training", [*words, *pictures])] if pictures else []


def _differs(histories: Mapping[str, Sequence[Mapping[str, float]]], key: str) -> bool:
    """Without reweighting, the effective sample is the whole sample in each epoch."""
    return len({round(row[key], 4) for history in histories.values() for row in history if key in row}) > 1


def cost(artifacts: Sequence[Artifact]) -> list[Section]:
    """Epochs and seconds, and what was taken over instead of trained."""
    rows = []
    for sweep in _sweeps(artifacts):
        saved = sweep["asked"] - sweep["trained"]
        share = f"{saved / sweep['asked']:.0%}" if sweep["asked"] else ""
        states = [t["state"] for t in sweep["trials"]]
        numbers = [len(states), states.count("stopped"), states.count("failed"), sweep["asked"], sweep["trained"]]
        rows.append(
            [sweep["path"].rpartition("/")[2], *map(str, numbers), f"{saved} ({share})", duration(sweep["seconds"])]
        )
    headers = ["sweep", "trials", "stopped", "failed", "epochs asked", "trained", "saved by sharing", "trial time"]
    stages = [[a.kind, duration(a.seconds)] for a in artifacts]
    queries = sum(j.queries for a in artifacts for j in a.judged)
    parts: list[Any] = [Table(headers, rows), Table(["stage", "wall time of its last run"], stages)]
    parts.append(Text(f"The attacks on the test set took {queries:,} forward passes."))
    return [Section("Cost", parts)]


def registry(artifacts: Sequence[Artifact]) -> list[Section]:
    rows = [
        [
            f"{a.facts['name']} version {a.facts['version']}",
            a.facts["candidate"],
            a.facts["verdict"],
            a.facts["reason"],
            f"version {a.facts['champion']}" if "champion" in a.facts else "none",
        ]
        for a in artifacts
        if a.kind == "register"
    ]
    headers = ["registered", "checkpoint", "against the champion", "why", "champion now"]
    return [Section("Registry", [Table(headers, rows, text=headers)])] if rows else []


def provenance(artifacts: Sequence[Artifact], environment: Json) -> Section:
    """Enough to do it again."""
    stages = [[a.kind, a.key, time.strftime("%Y-%m-%d %H:%M", time.localtime(a.finished))] for a in artifacts]
    versions = [[name, str(version)] for name, version in environment.items() if version]
    return Section(
        "Provenance",
        [Table(["stage", "digest", "finished"], stages), Table(["", "version"], versions, text=("version",))],
    )


_ACCURACIES = ("clean", "robust")


def _groups(judged: Sequence[Judgement]) -> dict[tuple[str, str, str], list[Judgement]]:
    groups: dict[tuple[str, str, str], list[Judgement]] = {}
    for j in judged:
        groups.setdefault((j.candidate.label, j.candidate.which, j.attack), []).append(j)
    return groups


def _shown(judged: Sequence[Judgement]) -> dict[str, Judgement]:
    """One of each group, AutoAttack's where there is any."""
    standard = [j for j in judged if j.standard] or list(judged)
    names = {f"{label}, {which}, {attack}": members[0] for (label, which, attack), members in _groups(standard).items()}
    return dict(list(names.items())[:_SHOWN])


def _sweeps(artifacts: Sequence[Artifact], kind: str | None = None) -> list[Json]:
    return [sweep for a in artifacts if kind in (None, a.kind) for sweep in a.facts.get("sweeps", [])]


def _ours(value: Summary) -> str:
    spread = "" if value.sd is None else f" ± {100 * value.sd:.2f}"
    return f"{100 * value.median:.2f}{spread}"


def _theirs(line: Comparison) -> str:
    return f"{line.paper:.2f}" + ("" if line.sd is None else f" ± {line.sd:.2f}")


def _interval(value: Summary) -> str:
    return f"{100 * value.low:.2f} to {100 * value.high:.2f}"


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"
