"""What a stage leaves: `artifact.json` and files beside it, in a folder that is there whole or not
at all.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from raysweep.atomic_files import atomic_folder
from raysweep.spec import JsonDict, Spec, SpecError
from raysweep.training.validation import DEFAULT_OBJECTIVE

ARTIFACT_FILE = "artifact.json"


class Candidate(Spec):
    """A checkpoint that a stage offers to the next. Its path is relative to `--out`, or elsewhere a
    whole path or URI.

    label: its row in a report, the same for all seeds; which: `best` or `last` epoch; metrics: its
    validation; settings: what was searched; masked: PGD overstates it by more than its space
    allows; objectives: the metrics of its space.
    """

    stored_keys: ClassVar[Mapping[str, str]] = {
        "checkpoint_kind": "which",
        "params": "settings",
        "exceeds_masking_gap": "masked",
    }

    label: str
    method: str
    checkpoint: str
    checkpoint_kind: str = "best"
    seed: int = 0
    epoch: int
    epochs: int
    metrics: dict[str, float]
    params: dict[str, Any] = Field(default_factory=dict)
    exceeds_masking_gap: bool = False
    objectives: tuple[str, ...] = (DEFAULT_OBJECTIVE,)

    def score(self, metric: str) -> float:
        return self.metrics.get(metric, float("-inf"))

    @property
    def title(self) -> str:
        return f"{self.label}, seed {self.seed}, {self.checkpoint_kind} epoch"


class EvaluationResult(Spec):
    """A candidate under one attack, on test examples.

    attack: its label; standard: it is AutoAttack standard; test_examples: how many there are;
    folder: where the examples' own outcomes are, relative to `--out`; protocol: settings that
    numbers of a paper must share.
    """

    stored_keys: ClassVar[Mapping[str, str]] = {
        "is_autoattack": "standard",
        "accuracy_after": "after",
        "run_id": "run",
    }

    candidate: Candidate
    attack: str
    is_autoattack: bool
    examples: int
    test_examples: int
    eps: float
    norm: str
    clean: float
    robust: float
    intervals: dict[str, tuple[float, float]]
    accuracy_after: dict[str, float]
    per_class: dict[str, dict[str, float]]
    masking_gap: float | None
    seconds: float
    queries: int
    warnings: tuple[str, ...]
    run_id: str
    folder: str
    protocol: dict[str, Any]


class Artifact(Spec):
    """A finished stage: what it was, from what, and what it found. key: the digest of it and its
    inputs.
    """

    stored_keys: ClassVar[Mapping[str, str]] = {"finish_time": "finished", "evaluations": "judged"}

    kind: str
    key: str
    stage: JsonDict
    inputs: tuple[str, ...]
    finish_time: float = 0.0
    seconds: float = 0.0
    candidates: tuple[Candidate, ...] = ()
    evaluations: tuple[EvaluationResult, ...] = ()
    facts: JsonDict = Field(default_factory=dict)

    def write(self, folder: Path, write_files: Callable[[Path], None] | None = None) -> None:
        """Make `folder` with artifact.json and whatever `files` puts beside it."""
        with atomic_folder(folder) as partial:
            if write_files is not None:
                write_files(partial)
            (partial / ARTIFACT_FILE).write_text(json.dumps(self.to_stored_dict(), indent=1))

    @classmethod
    def read_if_finished(cls, folder: Path) -> "Artifact | None":
        """None where the stage has not finished. Raises SpecError in one line for what is no
        artifact.
        """
        try:
            data = json.loads((folder / ARTIFACT_FILE).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise SpecError(
                f"{folder / ARTIFACT_FILE}: cannot be read: {error}; delete the folder"
            ) from None
        return cls.from_data(data, str(folder / ARTIFACT_FILE), stored=True)


def select_ranking_metrics(candidates: Iterable[Candidate]) -> tuple[str, ...]:
    """The metrics of the space of all; where spaces differ, the default, which all were measured
    by.
    """
    asked = {c.objectives for c in candidates}
    return asked.pop() if len(asked) == 1 else (DEFAULT_OBJECTIVE,)


def select_best_candidate(candidates: tuple[Candidate, ...]) -> Candidate:
    """The one that validation prefers: never the test set's choice."""
    best = [c for c in candidates if c.checkpoint_kind == "best"] or list(candidates)
    metric = select_ranking_metrics(best)[0]
    return max(best, key=lambda c: (not c.exceeds_masking_gap, c.score(metric), -c.seed))


CheckpointKind = Literal["best", "last"]
