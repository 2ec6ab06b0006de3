"""The proof: promoted checkpoints under full AutoAttack, or other attacks, on the test set, once each."""

from typing import Annotated, Any, Literal

from pydantic import Field

from raysweep.attacks import AnyAttack, Minimal, SingleAttack, WorstCase, preset
from raysweep.evaluation import RobustnessReport
from raysweep.pipeline.artifact import Candidate, Judgement
from raysweep.pipeline.judge import folder_of, judge, save, threat_of, track, workers
from raysweep.pipeline.stage import Outcome, Past, Settings, Stage, Work
from raysweep.schedules import Number
from raysweep.spec import SpecError
from raysweep.tracking import run_tags
from raysweep.training.config import RunConfig
from raysweep.training.load import load_checkpoint


def _autoattack() -> dict[str, str | AnyAttack]:
    return {"AA": "autoattack"}


class AutoAttack(Stage):
    """Attacks on the test set. attacks: column of the report -> name (`autoattack`, `pgd20`, ...) or settings.

    n: only the first so many test examples; eps: null for what the checkpoint was validated at.
    """

    kind: Literal["autoattack"] = "autoattack"
    attacks: Annotated[dict[str, str | AnyAttack], Field(min_length=1)] = Field(default_factory=_autoattack)
    n: Annotated[int, Field(ge=1)] | None = None
    eps: Annotated[Number, Field(gt=0)] | None = None
    norm: Literal["Linf", "L2"] = "Linf"
    seed: int = 0
    batch_size: Annotated[int, Field(ge=1)] = 500
    gpus: Annotated[Number, Field(ge=0)] = 1.0

    def problems(self) -> list[str]:
        lines = []
        for label, attack in self.attacks.items():
            if isinstance(attack, Minimal):
                lines.append(
                    f"attacks.{label}.kind = 'minimal': looks for the smallest perturbation, not for a verdict"
                )
            elif isinstance(attack, str):
                try:
                    self.attack(label, 8 / 255 if self.eps is None else self.eps)
                except SpecError as error:
                    lines += [f"attacks.{label}: {line}" for line in error.problems]
        return lines

    def describe(self, settings: Settings) -> str:
        names = ", ".join(f"{k} ({v})" if isinstance(v, str) and v != k else k for k, v in self.attacks.items())
        return f"{names} on {'the whole test set' if self.n is None else f'{self.n} test examples'}, once each"

    def run(self, work: Work, past: Past) -> Outcome:
        judged = []
        with workers(work.address, self.gpus) as shards:
            for candidate in past.pool:
                for label in self.attacks:
                    judged.append(self._judge(work, candidate, label, shards))
        return Outcome(judged=tuple(judged))

    def attack(self, label: str, eps: float) -> WorstCase | SingleAttack:
        attack = self.attacks[label]
        if isinstance(attack, str):
            return preset(attack, eps, self.norm)
        assert not isinstance(attack, Minimal)
        return attack

    def _judge(self, work: Work, candidate: Candidate, label: str, shards: Any) -> Judgement:
        subject = load_checkpoint(work.path(candidate.checkpoint), {})
        assert subject.checkpoint is not None
        config = subject.checkpoint.config
        assert subject.data is not None
        data = subject.data
        eps = self.eps if self.eps is not None else threat_of(subject, config.data.name)[0]
        attack = self.attack(label, eps)
        count = min(self.n or len(data.test), len(data.test))
        folder = folder_of(work.out, subject, attack, config.data, count, self.seed)
        work.say(f"{label} on {candidate.title}: {count} test examples")
        report = judge(subject, data, attack, count, folder, shards, batch_size=self.batch_size, seed=self.seed)
        save(report, folder, subject, config.data)
        name = self.attacks[label]
        run = work.tracker.find(run_tags(subject.checkpoint))
        label_of = name if isinstance(name, str) else label
        run = track(work.tracker, run, subject, report, folder, label_of, count == len(data.test))
        return Judgement(
            candidate=candidate,
            attack=label,
            standard=report.is_autoattack,
            test_examples=len(data.test),
            run=run,
            folder=work.reference(folder),
            protocol=_protocol(config, report, data.fingerprint),
            **_numbers(report),
        )


def _numbers(report: RobustnessReport) -> dict[str, Any]:
    return {
        "examples": len(report.labels),
        "eps": report.eps,
        "norm": report.norm,
        "clean": report.clean_accuracy,
        "robust": report.robust_accuracy,
        "intervals": report.intervals,
        "after": {name: float(rows.mean()) for name, rows in report.robust_after.items()},
        "per_class": {str(label): row for label, row in report.per_class().items()},
        "masking_gap": report.masking_gap,
        "seconds": sum(cost.seconds for cost in report.cost.values()),
        "queries": int(report.queries.sum()),
        "warnings": report.warnings,
    }


def _protocol(config: RunConfig, report: RobustnessReport, fingerprint: str) -> dict[str, Any]:
    return {
        "data": config.data.name,
        "model": config.model.name,
        "epochs": config.epochs,
        "train_size": config.data.train_size,
        "batch_size": config.batch_size,
        "eps": report.eps,
        "norm": report.norm,
        "examples": len(report.labels),
        "fingerprint": fingerprint,
    }
