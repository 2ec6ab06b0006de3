"""The autoattack stage: runs AutoAttack, or other attacks, on the test set."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from raysweep.attacks import (
    AnyAttack,
    AttackCascade,
    MinimalPerturbation,
    SingleAttack,
    build_named_attack,
)
from raysweep.checkpoint_evaluation import (
    choose_evaluation_folder,
    describe_evaluation,
    evaluate_checkpoint,
    log_evaluation,
    resolve_threat_model,
    save_evaluation_files,
)
from raysweep.data import DEFAULT_SUBSET, SubsetChoice
from raysweep.pipeline.artifact import Candidate, EvaluationResult
from raysweep.pipeline.stage import (
    Stage,
    StageContext,
    StageResult,
    TrainingOverrides,
    UpstreamResults,
)
from raysweep.schedules import Number
from raysweep.spec import JsonDict, SpecError
from raysweep.sweep.shard_mappers import open_executor
from raysweep.training.config import TrainingConfig
from raysweep.training.model_loading import EvaluationTarget, load_checkpoint_target
from raysweep.unrecorded_folders import note_unrecorded

if TYPE_CHECKING:
    from raysweep.evaluation import RobustnessReport


def _make_default_attacks() -> dict[str, str | AnyAttack]:
    """Return the attacks of a stage that names none."""
    return {"AA": "autoattack"}


class AutoAttackStage(Stage):
    """Runs attacks on the test set, once for each candidate and attack."""

    later_fields: ClassVar[frozenset[str]] = frozenset({"subset"})

    kind: Literal["autoattack"] = "autoattack"
    attacks: Annotated[dict[str, str | AnyAttack], Field(min_length=1)] = Field(
        default_factory=_make_default_attacks
    )
    """Attack of each column in the report: a name such as `autoattack` or `pgd20`, or settings."""
    n: Annotated[int, Field(ge=1)] | None = None
    """Number of test examples (null: all)."""
    subset: SubsetChoice = DEFAULT_SUBSET
    """Which `n` test examples: `balanced` (equally many of each class, drawn with a fixed seed),
    `proportional` (each class with its share of the test set) or `first` (the first ones, as
    RobustBench and the official AutoAttack take them)."""
    eps: Annotated[Number, Field(gt=0)] | None = None
    """Radius of named attacks, in units of pixel values in [0, 1] (null: as in the validation)."""
    norm: Literal["Linf", "L2"] = "Linf"
    """Norm of named attacks."""
    seed: int = 0
    """Seed of the attacks."""
    batch_size: Annotated[int, Field(ge=1)] = 500
    """Number of examples that are attacked at once."""
    gpus: Annotated[Number, Field(ge=0)] = 1.0
    """GPUs of an attack process."""

    def find_problems(self) -> list[str]:
        lines = []
        if self.n is None and self.subset != DEFAULT_SUBSET:
            lines.append(f"subset = {self.subset!r}: has no effect without n")
        for label, attack in self.attacks.items():
            if isinstance(attack, MinimalPerturbation):
                lines.append(
                    f"attacks.{label}.kind = 'minimal': finds the smallest perturbation; "
                    "this stage needs an attack with a fixed eps"
                )
            elif isinstance(attack, str):
                try:
                    self.build_attack(label, 8 / 255 if self.eps is None else self.eps)
                except SpecError as error:
                    lines += [f"attacks.{label}: {line}" for line in error.problems]
        return lines

    def to_stored_dict(self) -> JsonDict:
        # Version 0.1 had no `subset`: `n` meant the first examples.
        stored = super().to_stored_dict()
        stored.pop("subset", None)
        is_as_in_0_1 = self.n is None or self.subset == "first"
        return stored if is_as_in_0_1 else {**stored, "subset": self.subset}

    @classmethod
    def from_data(cls, data: Any, source: str = "", *, stored: bool = False) -> Self:
        if stored and isinstance(data, dict) and data.get("n") is not None:
            data = {"subset": "first", **data}
        return super().from_data(data, source, stored=stored)

    def describe_stage(self, training_overrides: TrainingOverrides) -> str:
        names = []
        for label, attack in self.attacks.items():
            is_named = isinstance(attack, str) and attack != label
            names.append(f"{label} ({attack})" if is_named else label)
        examples = (
            "the whole test set" if self.n is None else f"{self.n} test examples ({self.subset})"
        )
        return f"{', '.join(names)} on {examples}, once each"

    def run_stage(self, context: StageContext, upstream: UpstreamResults) -> StageResult:
        evaluations = []
        with open_executor(context.address, self.gpus) as executor:
            for candidate in upstream.candidates:
                for label in self.attacks:
                    evaluations.append(
                        self._evaluate_candidate(context, candidate, label, executor)
                    )
        return StageResult(evaluations=tuple(evaluations))

    def build_attack(self, label: str, eps: float) -> AttackCascade | SingleAttack:
        """Build an attack of the stage.

        Args:
            label: Key in `attacks`.
            eps: Radius for an attack that is given by its name.

        Returns:
            A cascade for a name, or the attack that the settings describe.

        Raises:
            SpecError: If there is no attack of this name.
        """
        attack = self.attacks[label]
        if isinstance(attack, str):
            return build_named_attack(attack, eps, self.norm)
        assert not isinstance(attack, MinimalPerturbation)
        return attack

    def _evaluate_candidate(
        self, context: StageContext, candidate: Candidate, label: str, executor: Any
    ) -> EvaluationResult:
        """Run one attack on one candidate; save and log the results."""
        target = load_checkpoint_target(context.resolve_reference(candidate.checkpoint), {})
        assert target.checkpoint is not None and target.data is not None
        config, data = target.checkpoint.config, target.data
        attack = self._build_attack_for(target, label)
        n_test = len(data.require_test())
        count = min(self.n or n_test, n_test)
        subset = self.subset if count < n_test else "first"
        folder = choose_evaluation_folder(
            context.out, target, attack, config.data, count, self.seed, subset
        )
        context.print_line(f"{label} on {candidate.title}: {count} test examples")
        report = evaluate_checkpoint(
            target,
            data,
            attack,
            count,
            folder,
            executor,
            batch_size=self.batch_size,
            seed=self.seed,
            subset=subset,
        )
        save_evaluation_files(report, folder, target, config.data)
        attack_or_name = self.attacks[label]
        attack_name = attack_or_name if isinstance(attack_or_name, str) else label
        record = describe_evaluation(target, report, attack_name, count == n_test)
        run_ids: list[str] = []
        note_unrecorded(folder, dataclasses.asdict(record))
        context.records.write(
            lambda: run_ids.append(log_evaluation(context.tracker, record, folder))
        )
        context.records.flush(retry=False)
        return EvaluationResult(
            candidate=candidate,
            attack=label,
            is_autoattack=report.is_autoattack,
            test_examples=n_test,
            # Without an answer of MLflow, `register` finds the run later.
            run_id=run_ids[0] if run_ids else "",
            folder=context.make_reference(folder),
            protocol=_extract_protocol(config, report, data.fingerprint),
            **_extract_numbers(report),
        )

    def _build_attack_for(
        self, target: EvaluationTarget, label: str
    ) -> AttackCascade | SingleAttack:
        """Build an attack with the radius of the stage, or else of the candidate's validation."""
        if self.eps is not None:
            return self.build_attack(label, self.eps)
        assert target.checkpoint is not None
        eps, _ = resolve_threat_model(target, target.checkpoint.config.data.name)
        return self.build_attack(label, eps)


def _extract_numbers(report: RobustnessReport) -> dict[str, Any]:
    """Return the fields of an `EvaluationResult` that a report has."""
    return {
        "examples": len(report.labels),
        "eps": report.eps,
        "norm": report.norm,
        "clean": report.clean_accuracy,
        "robust": report.robust_accuracy,
        "intervals": report.intervals,
        "accuracy_after": {name: float(rows.mean()) for name, rows in report.robust_after.items()},
        "per_class": {str(label): row for label, row in report.per_class().items()},
        "masking_gap": report.masking_gap,
        "seconds": sum(cost.seconds for cost in report.cost.values()),
        "queries": int(report.queries.sum()),
        "warnings": report.warnings,
    }


def _extract_protocol(
    config: TrainingConfig, report: RobustnessReport, fingerprint: str
) -> dict[str, Any]:
    """Return the settings that must agree with a paper's to compare the numbers."""
    subset = {} if report.subset is None else {"subset": report.subset}
    return {
        "data": config.data.name,
        "model": config.model.name,
        "epochs": config.epochs,
        "train_size": config.data.train_size,
        "batch_size": config.batch_size,
        "eps": report.eps,
        "norm": report.norm,
        "examples": len(report.labels),
        **subset,
        "fingerprint": fingerprint,
    }
