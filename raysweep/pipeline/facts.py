"""Facts: what each kind of stage reports besides candidates and evaluations.

A stage builds its facts as a value, and `artifact.json` stores them under `facts`. Later stages
and the report read them with `Artifact.read_facts`. The stage autoattack reports no facts.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, field_validator

from raysweep.pipeline.artifact import EvaluationResult, StageFacts
from raysweep.pipeline.published_results import PaperComparison
from raysweep.pipeline.statistics import McNemarResult, PairedVerdict
from raysweep.spec import JsonDict


class TrialSummary(StageFacts):
    """One trial of a sweep."""

    stored_keys: ClassVar[Mapping[str, str]] = {"params": "settings"}

    number: int = 0
    """Number of the trial in its sweep, from 0."""
    state: str
    """`running`, `finished`, `stopped` or `failed`."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Searched parameters, by dotted path."""
    score: float | None = None
    """Main objective at the best epoch; None if the trial did not report it."""
    masking_gap: float | None = None
    """Masking gap at the best epoch, if known."""
    reason: str = ""
    """Why the trial failed or was stopped."""


class SweepSummary(StageFacts):
    """Cost and trials of one sweep."""

    stored_keys: ClassVar[Mapping[str, str]] = {
        "epochs_completed": "asked",
        "epochs_trained": "trained",
    }

    path: str
    """Folder of the sweep, relative to `--out` or a URI."""
    method: str = ""
    """Name of the training method."""
    metric: str = ""
    """Main objective of the sweep."""
    epochs_completed: int = 0
    """Epochs that all trials finished together, including reused ones."""
    epochs_trained: int = 0
    """Epochs that were trained; the rest came from the prefix cache."""
    seconds: float = 0.0
    """Run time of all trials together, in seconds."""
    trials: tuple[TrialSummary, ...] = ()
    """All trials, by number."""


class SweepFacts(StageFacts):
    """Facts of the stages tune and train."""

    later_fields: ClassVar[frozenset[str]] = frozenset({"row_notes"})

    sweeps: tuple[SweepSummary, ...] = ()
    """The sweeps that the stage ran."""
    row_notes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """What the presets of the rows say of settings that their paper does not give, by label."""


class PromoteFacts(SweepFacts):
    """Facts of the stage promote; its sweeps are the runs that it trained again."""

    stored_keys: ClassVar[Mapping[str, str]] = {"n_candidates": "of"}

    n_candidates: int = 0
    """Number of candidates to choose from."""
    left_out: tuple[str, ...] = ()
    """Labels of the candidates that were not promoted."""


class ChampionComparison(StageFacts):
    """Outcome of the comparison of a new version with the champion of the registry."""

    stored_keys: ClassVar[Mapping[str, str]] = {"previous_champion": "before"}
    omitted_if_none: ClassVar[frozenset[str]] = frozenset({"champion", "test", "previous_champion"})

    champion: str | None = None
    """Version that is champion afterwards; None if the new version could not be compared."""
    verdict: PairedVerdict
    """Result of the comparison for the new version."""
    reason: str
    """Reason for the verdict, for people."""
    test: McNemarResult | None = None
    """Test on the examples that both versions were attacked on, if there was one."""
    previous_champion: str | None = None
    """Version that the new one was compared with."""


class RegisterFacts(ChampionComparison):
    """Facts of the stage register."""

    name: str
    """Name of the model in the registry."""
    version: str
    """Version that the registry gave the checkpoint."""
    candidate: str
    """Title of the registered checkpoint."""


class ReportChanges(StageFacts):
    """What changed since the previous report of the pipeline."""

    stored_keys: ClassVar[Mapping[str, str]] = {
        "previous_time": "when",
        "protocol_differences": "different",
    }
    omitted_if_none: ClassVar[frozenset[str]] = frozenset({"test"})

    previous_time: str
    """Time of the previous report, as local date and time."""
    best: tuple[str, str]
    """Title of the best checkpoint, before and now."""
    robust: tuple[float, float]
    """Its robust accuracy, before and now."""
    clean: tuple[float, float]
    """Its accuracy without an attack, before and now."""
    protocol_differences: tuple[str, ...] = ()
    """Why the two checkpoints cannot be compared; empty if they can."""
    medians: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Median robust accuracy of each method and attack in both reports, before and now."""
    test: McNemarResult | None = None
    """Test of the two checkpoints on their shared test examples, if there was one."""


class ReportFacts(StageFacts):
    """Facts of the stage report."""

    stored_keys: ClassVar[Mapping[str, str]] = {"changes": "since"}
    later_fields: ClassVar[frozenset[str]] = frozenset({"verdict"})

    best: EvaluationResult
    """Evaluation of the candidate with the best validation result."""
    protocol: dict[str, Any] = Field(default_factory=dict)
    """Settings that an evaluation must share with `best` to be compared with it."""
    changes: ReportChanges | None = None
    """What changed since the previous report; None if this is the first one."""
    regressions: tuple[str, ...] = ()
    """One line for each regression; empty if there is none."""
    paper: tuple[PaperComparison, ...] = ()
    """Numbers beside those of a paper."""
    medians: dict[str, float] = Field(default_factory=dict)
    """Median robust accuracy of each method and attack."""
    verdict: str = ""
    """The report in one line; empty in reports of version 0.1."""

    @field_validator("changes", mode="before")
    @classmethod
    def _read_changes(cls, value: Any) -> Any:
        """Read the empty mapping of a first report as None."""
        return value or None

    @field_serializer("changes", mode="wrap")
    def _write_none_as_empty(
        self, value: ReportChanges | None, handler: SerializerFunctionWrapHandler
    ) -> JsonDict:
        """Write None as an empty mapping."""
        return {} if value is None else handler(value)
