"""What every stage has, what it is given, and what it may use."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from raysweep import storage
from raysweep.data import Data, DataSpec, load
from raysweep.pipeline.artifact import Artifact, Candidate, Judgement
from raysweep.spec import Json, Spec
from raysweep.tracking import Tracker, embedded_store
from raysweep.training.config import RunConfig


class StageFailed(RuntimeError):
    """A stage could not do its work: every trial failed, for one."""


@dataclass(frozen=True)
class Settings:
    """Training settings from around a stage: the pipeline's give way to the stage's own, the command line's do not."""

    pipeline: Mapping[str, Any]
    command: Mapping[str, Any]

    def around(self, own: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.pipeline, **own, **self.command}


@dataclass(frozen=True)
class Past:
    """What the earlier stages left, in order."""

    artifacts: tuple[Artifact, ...] = ()

    @property
    def pool(self) -> tuple[Candidate, ...]:
        """Candidates that are still in the running: tune and train add, promote replaces."""
        pool: tuple[Candidate, ...] = ()
        for artifact in self.artifacts:
            pool = artifact.candidates if artifact.kind == "promote" else (*pool, *artifact.candidates)
        return pool

    @property
    def judged(self) -> tuple[Judgement, ...]:
        """Verdicts on the candidates that are still in the running."""
        pool = {candidate.checkpoint for candidate in self.pool}
        return tuple(j for a in self.artifacts for j in a.judged if j.candidate.checkpoint in pool)


@dataclass(frozen=True)
class Outcome:
    """What a stage found; `files` writes what belongs beside it."""

    candidates: tuple[Candidate, ...] = ()
    judged: tuple[Judgement, ...] = ()
    facts: Json = field(default_factory=dict)
    files: Callable[[Path], None] | None = None


@dataclass
class Work:
    """Where a pipeline works. sweeps: the folder of its sweeps; folder: of its artifacts; address: Ray's."""

    name: str
    out: Path
    folder: Path
    sweeps: Path
    settings: Settings
    console: Console
    address: str | None
    stack: ExitStack
    number: int = 0
    digest: str = ""
    _data: dict[str, Data] = field(default_factory=dict)

    @cached_property
    def tracker(self) -> Tracker:
        """Connected when a stage first needs it: a pipeline with nothing to do needs no store."""
        return Tracker(embedded_store(self.out), self.out / "mlruns")

    def data(self, spec: DataSpec) -> Data:
        """Read once, whichever stage asks."""
        key = spec.digest()
        if key not in self._data:
            self._data[key] = load(spec)
        return self._data[key]

    def cluster(self) -> dict[str, float]:
        """Resources of the cluster, which stays connected until the pipeline ends."""
        from raysweep.sweep.cluster import connected

        return self.stack.enter_context(connected(self.address))

    def sweep(self, part: str) -> Path:
        """The folder of this stage's sweep of `part`; its name is that of the sweep in MLflow."""
        plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in part)
        return self.sweeps / f"{self.name}-{self.number:02d}-{plain}-{self.digest[:8]}"

    def reference(self, path: Path) -> str:
        """What an artifact calls a file: relative to `--out`, or elsewhere by its whole path or URI."""
        path = path.resolve()
        inside = path.is_relative_to(self.out) and not storage.is_copy(path)
        return str(path.relative_to(self.out)) if inside else storage.name(path)

    def path(self, reference: str) -> Path:
        """The file that an artifact calls so."""
        return storage.at(reference) if storage.is_uri(reference) else self.out / reference

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class Training(NamedTuple):
    """Runs of one config, at most so many at once, and the epochs of all together (None: not known beforehand)."""

    config: RunConfig
    at_once: int
    epochs: float | None


class Stage(Spec):
    """One step of a pipeline. Its class says what it needs, whether it is sound, and what it does."""

    kind: str

    def trainings(self, settings: Settings, before: Sequence[RunConfig]) -> list[Training]:
        """What this stage trains, as far as it is known beforehand. Raises SpecError.

        before: the runs whose checkpoints it finds.
        """
        return []

    def configs(self, settings: Settings, before: Sequence[RunConfig] = ()) -> list[RunConfig]:
        """The runs of `trainings`."""
        return [one.config for one in self.trainings(settings, before)]

    def content(self, settings: Settings) -> Json:
        """What the files that it names, and the settings around it, make of this stage: part of its digest."""
        return {}

    def labels(self, settings: Settings) -> list[str]:
        """What the candidates of this stage are called."""
        return []

    def problems(self) -> list[str]:
        """What is wrong with the stage itself, one line each."""
        return []

    def describe(self, settings: Settings) -> str:
        """One line for `--plan`."""
        raise NotImplementedError

    def run(self, work: Work, past: Past) -> Outcome:
        """Do the work, going on where a killed run of it stopped."""
        raise NotImplementedError
