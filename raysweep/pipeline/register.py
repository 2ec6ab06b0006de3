"""The model registry: candidate, AutoAttack-verified, champion."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from raysweep.pipeline.artifact import EvaluationResult, select_best_candidate
from raysweep.pipeline.paired_comparison import (
    EXAMPLES_FILE,
    compare_shared_examples,
    extract_comparison_protocol,
    find_protocol_differences,
)
from raysweep.pipeline.stage import (
    Stage,
    StageContext,
    StageFailed,
    StageResult,
    TrainingOverrides,
    UpstreamResults,
)
from raysweep.spec import JsonDict, is_safe_name
from raysweep.training import checkpoint

_CARD_FILE = "card.json"
_TAG_PREFIX = "raysweep."
_REGISTRY_DESCRIPTION = (
    "Checkpoints that pipelines of raysweep promoted. candidate: registered last; aa-verified: judged by AutoAttack "
    "standard; champion: better than the one before it on the same examples (McNemar's test). Card and outcome of each "
    "example are among the artifacts of a version's source run, under `registered`."
)


class RegisterStage(Stage):
    """Put the promoted checkpoint that validation prefers into MLflow's model registry under
    `name`.

    Aliases: `candidate`; `aa-verified` once AutoAttack standard has judged it; `champion` if there
    was none, or if McNemar's test over the same examples finds it better than the one before.
    about: authors, link, venue of the card.
    """

    stored_keys: ClassVar[Mapping[str, str]] = {"card_fields": "about"}

    kind: Literal["register"] = "register"
    name: str
    card_fields: dict[str, Any] = Field(default_factory=dict)

    def find_problems(self) -> list[str]:
        # It becomes part of a URI.
        wrong = (
            f"name = {self.name!r}: use letters, digits, '-', '_' and '.', not starting with '.'"
        )
        return [] if is_safe_name(self.name) else [wrong]

    def describe_stage(self, training_overrides: TrainingOverrides) -> str:
        return f"as {self.name}: candidate, aa-verified, and champion if AutoAttack says better"

    def run_stage(self, context: StageContext, upstream: UpstreamResults) -> StageResult:
        judgement = find_chosen_evaluation(upstream)
        saved = checkpoint.read_checkpoint(
            context.resolve_reference(judgement.candidate.checkpoint)
        )
        card = self._build_model_card(context, judgement, saved)
        facts = extract_comparison_protocol(judgement)
        tags = {f"{_TAG_PREFIX}{key}": str(value) for key, value in facts.items()}
        tags |= {
            "autoattack.robust_accuracy": f"{judgement.robust:.6f}",
            "autoattack.examples": str(judgement.examples),
        }
        run = judgement.run_id
        context.tracker.log_json(run, card, f"registered/{_CARD_FILE}")
        context.tracker.log_file(run, context.out / judgement.folder / EXAMPLES_FILE, "registered")
        version = context.tracker.register_model(self.name, run, tags, _REGISTRY_DESCRIPTION)
        context.tracker.set_model_alias(self.name, "candidate", version)
        found: JsonDict = {
            "name": self.name,
            "version": version,
            "candidate": judgement.candidate.title,
        }
        if judgement.is_autoattack:
            context.tracker.set_model_alias(self.name, "aa-verified", version)
            found |= self._compare_with_champion(context, judgement, version)
        else:
            found |= {"verdict": "cannot tell", "reason": "not judged by AutoAttack standard"}
        if found.get("champion") == version:
            context.tracker.set_model_alias(self.name, "champion", version)
        card["aliases"] = [
            "candidate", *(["aa-verified"] if judgement.is_autoattack else []),
            *(["champion"] if found.get("champion") == version else []),
        ]  # fmt: skip
        verdict = f"{found['verdict']}, {found['reason']}"
        context.print_line(f"{self.name} version {version}: {verdict}")
        context.tracker.set_version_description(
            self.name, version, f"{_summarize_evaluation(judgement)} As a champion: {verdict}."
        )

        def files(folder: Path) -> None:
            (folder / _CARD_FILE).write_text(json.dumps(card, indent=2) + "\n")
            shutil.copy2(context.out / judgement.folder / EXAMPLES_FILE, folder / EXAMPLES_FILE)

        return StageResult(facts=found, write_files=files)

    def _compare_with_champion(
        self, context: StageContext, evaluation: EvaluationResult, version: str
    ) -> JsonDict:
        """Who is champion, and why."""
        champion = context.tracker.find_model_by_alias(self.name, "champion")
        if champion is None:
            return {"champion": version, "verdict": "better", "reason": "there was no champion"}
        before, run, tags = champion
        if before == version:
            return {"champion": version, "verdict": "tie", "reason": "it is the champion"}
        old = {key.removeprefix(_TAG_PREFIX): value for key, value in tags.items()}
        stays = {"champion": before, "before": before}
        if reasons := find_protocol_differences(extract_comparison_protocol(evaluation), old):
            return {
                **stays,
                "verdict": "cannot tell",
                "reason": "other protocol: " + "; ".join(reasons),
            }
        examples = context.tracker.download_artifact(
            run, f"registered/{EXAMPLES_FILE}", context.artifacts_folder / ".champion" / run
        )
        test = compare_shared_examples(context.out / evaluation.folder / EXAMPLES_FILE, examples)
        if test is None:
            return {**stays, "verdict": "cannot tell", "reason": "judged on other examples"}
        reason = (
            f"{100 * test.difference:+.2f} points against version {before} on {test.examples} shared examples "
            f"({test.gained} gained, {test.lost} lost, p = {test.p:.3g})"
        )
        facts = {
            "verdict": test.verdict,
            "reason": reason,
            "test": test._asdict(),
            "before": before,
        }
        return {**facts, "champion": version if test.verdict == "better" else before}

    def _build_model_card(
        self,
        context: StageContext,
        evaluation: EvaluationResult,
        checkpoint: checkpoint.TrainingCheckpoint,
    ) -> JsonDict:
        """RobustBench's fields, and what else a number needs to be believed."""
        card: JsonDict = json.loads((context.out / evaluation.folder / _CARD_FILE).read_text())
        return {
            **card,
            "name": self.name,
            **self.card_fields,
            "norm": evaluation.norm,
            "eps_value": evaluation.eps,
            "examples": evaluation.examples,
            "attacks": list(evaluation.accuracy_after),
            "autoattack_interval": evaluation.intervals["robust"],
            "protocol": "checkpoint and settings chosen on a validation split of the training set; test set seen once",
            "seed": checkpoint.config.seed,
            "config": checkpoint.config.to_json_dict(),
            "environment": checkpoint.meta["environment"],
        }


def _summarize_evaluation(evaluation: EvaluationResult) -> str:
    """The number and what it holds for, in a line."""
    low, high = evaluation.intervals["robust"]
    return (
        f"{evaluation.candidate.title}: {evaluation.robust:.2%} under {evaluation.attack} (95% {low:.2%} to {high:.2%}), "
        f"{evaluation.clean:.2%} clean, {evaluation.norm} eps {evaluation.eps:.4g}, "
        f"{evaluation.examples} of {evaluation.test_examples} test examples."
    )


def find_chosen_evaluation(
    upstream: UpstreamResults, attack: str | None = None
) -> EvaluationResult:
    """The judgement of the candidate that validation prefers: AutoAttack's if there is one, or a
    given attack's.
    """
    best = select_best_candidate(upstream.candidates)
    own = [
        j
        for j in upstream.evaluations
        if j.candidate.checkpoint == best.checkpoint and attack in (None, j.attack)
    ]
    if not own:
        raise StageFailed(f"{best.title} was not judged")
    return next((j for j in own if j.is_autoattack), own[-1])
