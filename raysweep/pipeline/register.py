"""The model registry: candidate, AutoAttack-verified, champion."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from raysweep.pipeline.artifact import Judgement, chosen
from raysweep.pipeline.compare import EXAMPLES, differences, facts_of, paired
from raysweep.pipeline.stage import Outcome, Past, Settings, Stage, StageFailed, Work
from raysweep.spec import Json, is_plain
from raysweep.training import checkpoint

_CARD = "card.json"
_PREFIX = "raysweep."
_ABOUT = (
    "Checkpoints that pipelines of raysweep promoted. candidate: registered last; aa-verified: judged by AutoAttack "
    "standard; champion: better than the one before it on the same examples (McNemar's test). Card and outcome of each "
    "example are among the artifacts of a version's source run, under `registered`."
)


class Register(Stage):
    """Put the promoted checkpoint that validation prefers into MLflow's model registry under `name`.

    Aliases: `candidate`; `aa-verified` once AutoAttack standard has judged it; `champion` if there was none, or if
    McNemar's test over the same examples finds it better than the one before. about: authors, link, venue of the card.
    """

    kind: Literal["register"] = "register"
    name: str
    about: dict[str, Any] = Field(default_factory=dict)

    def problems(self) -> list[str]:
        # It becomes part of a URI.
        wrong = f"name = {self.name!r}: use letters, digits, '-', '_' and '.', not starting with '.'"
        return [] if is_plain(self.name) else [wrong]

    def describe(self, settings: Settings) -> str:
        return f"as {self.name}: candidate, aa-verified, and champion if AutoAttack says better"

    def run(self, work: Work, past: Past) -> Outcome:
        judgement = verdict_on_chosen(past)
        saved = checkpoint.read(work.path(judgement.candidate.checkpoint))
        card = self._card(work, judgement, saved)
        facts = facts_of(judgement)
        tags = {f"{_PREFIX}{key}": str(value) for key, value in facts.items()}
        tags |= {
            "autoattack.robust_accuracy": f"{judgement.robust:.6f}",
            "autoattack.examples": str(judgement.examples),
        }
        run = judgement.run
        work.tracker.artifact(run, card, f"registered/{_CARD}")
        work.tracker.file(run, work.out / judgement.folder / EXAMPLES, "registered")
        version = work.tracker.register(self.name, run, tags, _ABOUT)
        work.tracker.alias(self.name, "candidate", version)
        found: Json = {"name": self.name, "version": version, "candidate": judgement.candidate.title}
        if judgement.standard:
            work.tracker.alias(self.name, "aa-verified", version)
            found |= self._against_champion(work, judgement, version)
        else:
            found |= {"verdict": "cannot tell", "reason": "not judged by AutoAttack standard"}
        if found.get("champion") == version:
            work.tracker.alias(self.name, "champion", version)
        card["aliases"] = [
            "candidate", *(["aa-verified"] if judgement.standard else []),
            *(["champion"] if found.get("champion") == version else []),
        ]  # fmt: skip
        verdict = f"{found['verdict']}, {found['reason']}"
        work.say(f"{self.name} version {version}: {verdict}")
        work.tracker.describe_version(self.name, version, f"{_summary(judgement)} As a champion: {verdict}.")

        def files(folder: Path) -> None:
            (folder / _CARD).write_text(json.dumps(card, indent=2) + "\n")
            shutil.copy2(work.out / judgement.folder / EXAMPLES, folder / EXAMPLES)

        return Outcome(facts=found, files=files)

    def _against_champion(self, work: Work, judgement: Judgement, version: str) -> Json:
        """Who is champion, and why."""
        champion = work.tracker.model_at(self.name, "champion")
        if champion is None:
            return {"champion": version, "verdict": "better", "reason": "there was no champion"}
        before, run, tags = champion
        if before == version:
            return {"champion": version, "verdict": "tie", "reason": "it is the champion"}
        old = {key.removeprefix(_PREFIX): value for key, value in tags.items()}
        stays = {"champion": before, "before": before}
        if reasons := differences(facts_of(judgement), old):
            return {**stays, "verdict": "cannot tell", "reason": "other protocol: " + "; ".join(reasons)}
        examples = work.tracker.download(run, f"registered/{EXAMPLES}", work.folder / ".champion" / run)
        test = paired(work.out / judgement.folder / EXAMPLES, examples)
        if test is None:
            return {**stays, "verdict": "cannot tell", "reason": "judged on other examples"}
        reason = (
            f"{100 * test.difference:+.2f} points against version {before} on {test.examples} shared examples "
            f"({test.gained} gained, {test.lost} lost, p = {test.p:.3g})"
        )
        facts = {"verdict": test.verdict, "reason": reason, "test": test._asdict(), "before": before}
        return {**facts, "champion": version if test.verdict == "better" else before}

    def _card(self, work: Work, judgement: Judgement, saved: checkpoint.Checkpoint) -> Json:
        """RobustBench's fields, and what else a number needs to be believed."""
        card: Json = json.loads((work.out / judgement.folder / _CARD).read_text())
        return {
            **card,
            "name": self.name,
            **self.about,
            "norm": judgement.norm,
            "eps_value": judgement.eps,
            "examples": judgement.examples,
            "attacks": list(judgement.after),
            "autoattack_interval": judgement.intervals["robust"],
            "protocol": "checkpoint and settings chosen on a validation split of the training set; test set seen once",
            "seed": saved.config.seed,
            "config": saved.config.json_dict(),
            "environment": saved.meta["environment"],
        }


def _summary(judgement: Judgement) -> str:
    """The number and what it holds for, in a line."""
    low, high = judgement.intervals["robust"]
    return (
        f"{judgement.candidate.title}: {judgement.robust:.2%} under {judgement.attack} (95% {low:.2%} to {high:.2%}), "
        f"{judgement.clean:.2%} clean, {judgement.norm} eps {judgement.eps:.4g}, "
        f"{judgement.examples} of {judgement.test_examples} test examples."
    )


def verdict_on_chosen(past: Past, attack: str | None = None) -> Judgement:
    """The judgement of the candidate that validation prefers: AutoAttack's if there is one, or a given attack's."""
    best = chosen(past.pool)
    own = [j for j in past.judged if j.candidate.checkpoint == best.checkpoint and attack in (None, j.attack)]
    if not own:
        raise StageFailed(f"{best.title} was not judged")
    return next((j for j in own if j.standard), own[-1])
