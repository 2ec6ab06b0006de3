"""What a stage leaves: `artifact.json` and files beside it, in a folder that is there whole or not at all."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import Field

from raysweep.evaluation.validation import OBJECTIVE
from raysweep.files import whole_folder
from raysweep.spec import Json, Spec, SpecError

FILE = "artifact.json"


class Candidate(Spec):
    """A checkpoint that a stage offers to the next. Its path is relative to `--out`, or elsewhere a whole path or URI.

    label: its row in a report, the same for all seeds; which: `best` or `last` epoch; metrics: its validation;
    settings: what was searched; masked: PGD overstates it by more than its space allows; objectives: the metrics of its
    space.
    """

    label: str
    method: str
    checkpoint: str
    which: str = "best"
    seed: int = 0
    epoch: int
    epochs: int
    metrics: dict[str, float]
    settings: dict[str, Any] = Field(default_factory=dict)
    masked: bool = False
    objectives: tuple[str, ...] = (OBJECTIVE,)

    def score(self, metric: str) -> float:
        return self.metrics.get(metric, float("-inf"))

    @property
    def title(self) -> str:
        return f"{self.label}, seed {self.seed}, {self.which} epoch"


class Judgement(Spec):
    """A candidate under one attack, on test examples.

    attack: its label; standard: it is AutoAttack standard; test_examples: how many there are; folder: where the
    examples' own outcomes are, relative to `--out`; protocol: settings that numbers of a paper must share.
    """

    candidate: Candidate
    attack: str
    standard: bool
    examples: int
    test_examples: int
    eps: float
    norm: str
    clean: float
    robust: float
    intervals: dict[str, tuple[float, float]]
    after: dict[str, float]
    per_class: dict[str, dict[str, float]]
    masking_gap: float | None
    seconds: float
    queries: int
    warnings: tuple[str, ...]
    run: str
    folder: str
    protocol: dict[str, Any]


class Artifact(Spec):
    """A finished stage: what it was, from what, and what it found. key: the digest of it and its inputs."""

    kind: str
    key: str
    stage: Json
    inputs: tuple[str, ...]
    finished: float = 0.0
    seconds: float = 0.0
    candidates: tuple[Candidate, ...] = ()
    judged: tuple[Judgement, ...] = ()
    facts: Json = Field(default_factory=dict)

    def write(self, folder: Path, files: Callable[[Path], None] | None = None) -> None:
        """Make `folder` with artifact.json and whatever `files` puts beside it."""
        with whole_folder(folder) as partial:
            if files is not None:
                files(partial)
            (partial / FILE).write_text(json.dumps(self.json_dict(), indent=1))

    @classmethod
    def read(cls, folder: Path) -> "Artifact | None":
        """None where the stage has not finished. Raises SpecError in one line for what is no artifact."""
        try:
            data = json.loads((folder / FILE).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise SpecError(f"{folder / FILE}: cannot be read: {error}; delete the folder") from None
        return cls.load(data, str(folder / FILE))


def ranked_by(candidates: Iterable[Candidate]) -> tuple[str, ...]:
    """The metrics of the space of all; where spaces differ, the default, which all were measured by."""
    asked = {c.objectives for c in candidates}
    return asked.pop() if len(asked) == 1 else (OBJECTIVE,)


def chosen(candidates: tuple[Candidate, ...]) -> Candidate:
    """The one that validation prefers: never the test set's choice."""
    best = [c for c in candidates if c.which == "best"] or list(candidates)
    metric = ranked_by(best)[0]
    return max(best, key=lambda c: (not c.masked, c.score(metric), -c.seed))
