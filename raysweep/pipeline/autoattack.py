"""The proof: promoted checkpoints under full AutoAttack, or other attacks, on the test set, once
each.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from raysweep.attacks import (
    AnyAttack,
    AttackCascade,
    MinimalPerturbation,
    SingleAttack,
    attack_by_name,
)
from raysweep.checkpoint_evaluation import (
    choose_evaluation_folder,
    evaluate_checkpoint,
    log_evaluation,
    resolve_threat_model,
    save_evaluation_files,
)
from raysweep.evaluation import RobustnessReport
from raysweep.pipeline.artifact import Candidate, EvaluationResult
from raysweep.pipeline.stage import (
    Stage,
    StageContext,
    StageResult,
    TrainingOverrides,
    UpstreamResults,
)
from raysweep.schedules import Number
from raysweep.spec import SpecError
from raysweep.sweep.executors import open_executor
from raysweep.tracking import checkpoint_run_tags
from raysweep.training.config import TrainingConfig
from raysweep.training.model_loading import load_checkpoint_target


def _make_default_attacks() -> dict[str, str | AnyAttack]:
    return {"AA": "autoattack"}


class AutoAttackStage(Stage):
    """Attacks on the test set. attacks: column of the report -> name (`autoattack`, `pgd20`, ...)
    or settings.

    n: only the first so many test examples; eps: null for what the checkpoint was validated at.
    """

    kind: Literal["autoattack"] = "autoattack"
    attacks: Annotated[dict[str, str | AnyAttack], Field(min_length=1)] = Field(
        default_factory=_make_default_attacks
    )
    n: Annotated[int, Field(ge=1)] | None = None
    eps: Annotated[Number, Field(gt=0)] | None = None
    norm: Literal["Linf", "L2"] = "Linf"
    seed: int = 0
    batch_size: Annotated[int, Field(ge=1)] = 500
    gpus: Annotated[Number, Field(ge=0)] = 1.0

    def find_problems(self) -> list[str]:
        lines = []
        for label, attack in self.attacks.items():
            if isinstance(attack, MinimalPerturbation):
                lines.append(
                    f"attacks.{label}.kind = 'minimal': looks for the smallest perturbation, not for a verdict"
                )
            elif isinstance(attack, str):
                try:
                    self.build_attack(label, 8 / 255 if self.eps is None else self.eps)
                except SpecError as error:
                    lines += [f"attacks.{label}: {line}" for line in error.problems]
        return lines

    def describe_stage(self, training_overrides: TrainingOverrides) -> str:
        names = ", ".join(
            f"{k} ({v})" if isinstance(v, str) and v != k else k for k, v in self.attacks.items()
        )
        return f"{names} on {'the whole test set' if self.n is None else f'{self.n} test examples'}, once each"

    def run_stage(self, context: StageContext, upstream: UpstreamResults) -> StageResult:
        judged = []
        with open_executor(context.address, self.gpus) as shards:
            for candidate in upstream.candidates:
                for label in self.attacks:
                    judged.append(self._evaluate_candidate(context, candidate, label, shards))
        return StageResult(evaluations=tuple(judged))

    def build_attack(self, label: str, eps: float) -> AttackCascade | SingleAttack:
        attack = self.attacks[label]
        if isinstance(attack, str):
            return attack_by_name(attack, eps, self.norm)
        assert not isinstance(attack, MinimalPerturbation)
        return attack

    def _evaluate_candidate(
        self, context: StageContext, candidate: Candidate, label: str, executor: Any
    ) -> EvaluationResult:
        subject = load_checkpoint_target(context.resolve_reference(candidate.checkpoint), {})
        assert subject.checkpoint is not None
        config = subject.checkpoint.config
        assert subject.data is not None
        data = subject.data
        eps = (
            self.eps if self.eps is not None else resolve_threat_model(subject, config.data.name)[0]
        )
        attack = self.build_attack(label, eps)
        count = min(self.n or len(data.test), len(data.test))
        folder = choose_evaluation_folder(
            context.out, subject, attack, config.data, count, self.seed
        )
        context.print_line(f"{label} on {candidate.title}: {count} test examples")
        report = evaluate_checkpoint(
            subject,
            data,
            attack,
            count,
            folder,
            executor,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        save_evaluation_files(report, folder, subject, config.data)
        name = self.attacks[label]
        run = context.tracker.find_run(checkpoint_run_tags(subject.checkpoint))
        label_of = name if isinstance(name, str) else label
        run = log_evaluation(
            context.tracker, run, subject, report, folder, label_of, count == len(data.test)
        )
        return EvaluationResult(
            candidate=candidate,
            attack=label,
            is_autoattack=report.is_autoattack,
            test_examples=len(data.test),
            run_id=run,
            folder=context.make_reference(folder),
            protocol=_extract_protocol(config, report, data.fingerprint),
            **_extract_numbers(report),
        )


def _extract_numbers(report: RobustnessReport) -> dict[str, Any]:
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


def _extract_protocol(
    config: TrainingConfig, report: RobustnessReport, fingerprint: str
) -> dict[str, Any]:
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
