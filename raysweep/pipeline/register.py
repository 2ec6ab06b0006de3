"""The register stage: adds the best checkpoint to the model registry of MLflow."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from raysweep.checkpoint_evaluation import CARD_FILE, EXAMPLES_FILE
from raysweep.pipeline.artifact import EvaluationResult
from raysweep.pipeline.facts import ChampionComparison, RegisterFacts
from raysweep.pipeline.paired_comparison import (
    compare_shared_examples,
    extract_comparison_protocol,
    find_protocol_differences,
)
from raysweep.pipeline.stage import (
    CONFLICT_MESSAGE,
    Stage,
    StageContext,
    StageFailed,
    StageResult,
    TrainingOverrides,
    UpstreamResults,
    describe_evaluated_threat_conflict,
    find_best_candidate_evaluation,
)
from raysweep.spec import JsonDict, is_safe_name
from raysweep.tracking import checkpoint_run_tags
from raysweep.training import checkpoint

_TAG_PREFIX = "raysweep."
_REGISTRY_DESCRIPTION = (
    "Checkpoints that pipelines of raysweep promoted. candidate: the latest version. aa-verified: "
    "the latest version that AutoAttack standard evaluated. champion: the latest version that was "
    "better than the champion before it on the same examples (McNemar's test). The card and the "
    "results of each example are artifacts of the version's source run, in `registered`."
)


class RegisterStage(Stage):
    """Registers the candidate with the best validation result in MLflow's model registry.

    The new version gets the alias `candidate`, and `aa-verified` if AutoAttack standard evaluated
    it. It becomes `champion` if there is none, or if McNemar's test on the same examples finds it
    better than the champion.
    """

    stored_keys: ClassVar[Mapping[str, str]] = {"card_fields": "about"}

    kind: Literal["register"] = "register"
    name: str
    """Name of the model in the registry: letters, digits, `-`, `_` and `.`."""
    card_fields: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the model card, such as authors, link and venue."""

    def find_problems(self) -> list[str]:
        # The name becomes part of a URI.
        if is_safe_name(self.name):
            return []
        return [
            f"name = {self.name!r}: use letters, digits, '-', '_' and '.', not starting with '.'"
        ]

    def describe_stage(self, training_overrides: TrainingOverrides) -> str:
        return (
            f"as {self.name}: candidate, aa-verified, and champion if it is better under AutoAttack"
        )

    def run_stage(self, context: StageContext, upstream: UpstreamResults) -> StageResult:
        if conflict := describe_evaluated_threat_conflict(upstream.evaluations):
            raise StageFailed(f"{CONFLICT_MESSAGE}: {conflict}; nothing is registered")
        evaluation = find_best_candidate_evaluation(upstream)
        card = self._build_model_card(context, evaluation)
        version = self._register_version(context, evaluation, card)
        comparison = self._compare_and_set_aliases(context, evaluation, version)
        aliases = ["candidate"]
        if evaluation.is_autoattack:
            aliases.append("aa-verified")
        if comparison.champion == version:
            aliases.append("champion")
        card["aliases"] = aliases
        verdict = f"{comparison.verdict}, {comparison.reason}"
        context.print_line(f"{self.name} version {version}: {verdict}")
        description = f"{_summarize_evaluation(evaluation)} As a champion: {verdict}."
        context.tracker.set_version_description(self.name, version, description)

        def write_files(folder: Path) -> None:
            (folder / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
            shutil.copy2(_find_file(context, evaluation, EXAMPLES_FILE), folder / EXAMPLES_FILE)

        facts = RegisterFacts(
            name=self.name,
            version=version,
            candidate=evaluation.candidate.title,
            **dict(comparison),
        )
        return StageResult(facts=facts, write_files=write_files)

    def _register_version(
        self, context: StageContext, evaluation: EvaluationResult, card: JsonDict
    ) -> str:
        """Log the files of the version and register it; return its number."""
        protocol = extract_comparison_protocol(evaluation)
        tags = {f"{_TAG_PREFIX}{key}": str(value) for key, value in protocol.items()}
        tags |= {
            "autoattack.robust_accuracy": f"{evaluation.robust:.6f}",
            "autoattack.examples": str(evaluation.examples),
        }
        tracker, run_id = context.tracker, evaluation.run_id
        if not run_id:
            # MLflow did not answer at the time of the evaluation.
            context.records.flush()
            path = context.resolve_reference(evaluation.candidate.checkpoint)
            run_tags = checkpoint_run_tags(checkpoint.read_checkpoint(path))
            run_id = tracker.find_run(run_tags) or ""
        if not run_id:
            raise StageFailed(
                f"MLflow lacks the run of {evaluation.candidate.title}: run the same command again "
                "when it answers"
            )
        path = context.resolve_reference(evaluation.candidate.checkpoint)
        trained = checkpoint.read_checkpoint(path)
        tracker.log_model(run_id, trained, context.get_dataset(trained.config.data))
        tracker.log_json(run_id, card, f"registered/{CARD_FILE}")
        tracker.log_file(run_id, _find_file(context, evaluation, EXAMPLES_FILE), "registered")
        return tracker.register_model(self.name, run_id, tags, _REGISTRY_DESCRIPTION)

    def _compare_and_set_aliases(
        self, context: StageContext, evaluation: EvaluationResult, version: str
    ) -> ChampionComparison:
        """Give the version its aliases; return its comparison with the champion."""
        tracker = context.tracker
        tracker.set_model_alias(self.name, "candidate", version)
        if not evaluation.is_autoattack:
            return ChampionComparison(
                verdict="cannot tell", reason="not evaluated by AutoAttack standard"
            )
        tracker.set_model_alias(self.name, "aa-verified", version)
        comparison = self._compare_with_champion(context, evaluation, version)
        if comparison.champion == version:
            tracker.set_model_alias(self.name, "champion", version)
        return comparison

    def _compare_with_champion(
        self, context: StageContext, evaluation: EvaluationResult, version: str
    ) -> ChampionComparison:
        """Compare a version with the champion, on the examples that both were attacked on."""
        champion = context.tracker.find_model_by_alias(self.name, "champion")
        if champion is None:
            return ChampionComparison(
                champion=version, verdict="better", reason="there was no champion"
            )
        old_version, old_run, old_tags = champion
        if old_version == version:
            return ChampionComparison(champion=version, verdict="tie", reason="it is the champion")
        old_protocol = {key.removeprefix(_TAG_PREFIX): value for key, value in old_tags.items()}
        differences = find_protocol_differences(
            extract_comparison_protocol(evaluation), old_protocol
        )
        if differences:
            return ChampionComparison(
                champion=old_version,
                previous_champion=old_version,
                verdict="cannot tell",
                reason="other protocol: " + "; ".join(differences),
            )
        old_examples = context.tracker.download_artifact(
            old_run, f"registered/{EXAMPLES_FILE}", context.artifacts_folder / ".champion" / old_run
        )
        new_examples = _find_file(context, evaluation, EXAMPLES_FILE)
        test = compare_shared_examples(new_examples, old_examples)
        if test is None:
            return ChampionComparison(
                champion=old_version,
                previous_champion=old_version,
                verdict="cannot tell",
                reason="evaluated on other examples",
            )
        return ChampionComparison(
            champion=version if test.verdict == "better" else old_version,
            previous_champion=old_version,
            verdict=test.verdict,
            reason=(
                f"{100 * test.difference:+.2f} points against version {old_version} "
                f"on {test.examples} shared examples "
                f"({test.gained} gained, {test.lost} lost, p = {test.p:.3g})"
            ),
            test=test,
        )

    def _build_model_card(self, context: StageContext, evaluation: EvaluationResult) -> JsonDict:
        """Build the model card: RobustBench's fields, and the settings behind the numbers."""
        saved = checkpoint.read_checkpoint(
            context.resolve_reference(evaluation.candidate.checkpoint)
        )
        card = (context.resolve_reference(evaluation.folder) / CARD_FILE).read_json()
        return {
            **card,
            "name": self.name,
            **self.card_fields,
            "norm": evaluation.norm,
            "eps_value": evaluation.eps,
            "examples": evaluation.examples,
            "attacks": list(evaluation.accuracy_after),
            "autoattack_interval": evaluation.intervals["robust"],
            "protocol": (
                "checkpoint and settings chosen on a validation split of the training set; "
                "test set seen once"
            ),
            "seed": saved.config.seed,
            "config": saved.config.to_json_dict(),
            "environment": saved.meta["environment"],
        }


def _find_file(context: StageContext, evaluation: EvaluationResult, name: str) -> Path:
    """Return the path of a file of an evaluation on this machine."""
    return (context.resolve_reference(evaluation.folder) / name).working_path


def _summarize_evaluation(evaluation: EvaluationResult) -> str:
    """Describe a result in one line: its accuracies and the protocol behind them."""
    low, high = evaluation.intervals["robust"]
    return (
        f"{evaluation.candidate.title}: {evaluation.robust:.2%} under {evaluation.attack} "
        f"(95% {low:.2%} to {high:.2%}), {evaluation.clean:.2%} clean, "
        f"{evaluation.norm} eps {evaluation.eps:.4g}, "
        f"{evaluation.describe_examples()}."
    )
