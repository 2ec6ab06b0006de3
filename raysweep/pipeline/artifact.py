"""The artifact of a stage: `artifact.json`, and the files beside it in the same folder.

The folder is written atomically: it exists completely or not at all.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import (
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from raysweep.atomic_files import atomic_folder
from raysweep.bounded_files import read_regular_file
from raysweep.errors import DamagedFileError, InfrastructureError
from raysweep.spec import JsonDict, Spec
from raysweep.stored_data import parse_stored_json
from raysweep.training.selection import RunRank
from raysweep.training.validation import DEFAULT_OBJECTIVE, is_robust_objective

ARTIFACT_FILE = "artifact.json"

CheckpointKind = Literal["best", "last"]


class Candidate(Spec):
    """A checkpoint that a stage passes to the next stages."""

    stored_keys: ClassVar[Mapping[str, str]] = {
        "checkpoint_kind": "which",
        "params": "settings",
        "exceeds_masking_gap": "masked",
    }
    later_fields: ClassVar[frozenset[str]] = frozenset(
        {
            "is_ineligible",
            "selection_split",
            "threat",
            "autoattack",
            "is_below_finalists",
            "n_seeds",
            "mean_score",
            "average",
            "margin_factor",
            "score_epochs",
        }
    )

    label: str
    """Row in the report; all seeds of a run share it."""
    method: str
    """Name of the training method."""
    checkpoint: str
    """Path relative to `--out`; an absolute path or a URI for a checkpoint outside of it."""
    checkpoint_kind: str = "best"
    """`best` for the epoch with the best validation result, `last` for the last epoch."""
    seed: int = 0
    """Seed of the training run."""
    epoch: int
    """Epoch of the checkpoint, from 1."""
    epochs: int
    """Number of epochs of the training run."""
    metrics: dict[str, float]
    """Validation metrics of the checkpoint."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Searched parameters of the trial, by dotted path."""
    exceeds_masking_gap: bool = False
    """Whether the masking gap exceeds the limit of the search space."""
    is_ineligible: bool = False
    """Whether the epoch cannot represent its run: an instance weight had not acted yet, the model
    was at chance, or the best epoch lies outside `validation.window`."""
    selection_split: str = "val"
    """Images on which the best epoch was chosen, `val` or `test`."""
    objectives: tuple[str, ...] = (DEFAULT_OBJECTIVE,)
    """Validation metrics that the sweep maximized."""
    threat: str = ""
    """Norm and radius of the validation attacks, such as `Linf eps 0.031`; "" if unknown."""

    autoattack: float | None = None
    """Accuracy under AutoAttack on the validation images, in [0, 1]; null if it was not run."""
    is_below_finalists: bool = False
    """Whether AutoAttack attacked other trials of the sweep, which are ranked above this one."""

    n_seeds: int = 1
    """Number of seeds with which the sweep trained the settings of the trial."""
    mean_score: float | None = None
    """The sweep's objective as the mean over these seeds; null for one seed."""
    average: float | None = None
    """Score by which the sweep ranks the trial (`Trial.score`), as the mean over the seeds; null
    for a last checkpoint, and if the score is the objective of the best epoch."""
    margin_factor: float = 0.0
    """Factor of the margin in `average` (`SearchSpace.margin_factor`); 0 if it has no margin."""
    score_epochs: int = 1
    """Number of epochs that `average` averages (`SearchSpace.score_epochs`)."""

    def score(self, metric: str) -> float:
        """Return the score by which the sweep ranked the trial (`average`), if there is one and the
        metric is the sweep's objective; otherwise `checkpoint_value`.
        """
        if self.average is not None and metric == self.objectives[0]:
            return self.average
        return self.checkpoint_value(metric)

    def checkpoint_value(self, metric: str) -> float:
        """Return a validation metric, as the mean over the seeds if the sweep repeated the trial;
        -inf if the checkpoint does not have it.
        """
        if self.mean_score is not None and metric == self.objectives[0]:
            return self.mean_score
        return self.metrics.get(metric, float("-inf"))

    def final_value(self, metric: str) -> float:
        """Return `checkpoint_value`; `autoattack` in its place if there is one and the metric is
        an accuracy under attacks.
        """
        if self.autoattack is None or not is_robust_objective(metric):
            return self.checkpoint_value(metric)
        return self.autoattack

    def corrected_score(self, metric: str) -> float:
        """Return the score, lowered by as much as AutoAttack lowers the metric of the checkpoint
        (see `Trial.corrected_score`).
        """
        if self.autoattack is None or not is_robust_objective(metric):
            return self.score(metric)
        return self.autoattack + (self.score(metric) - self.checkpoint_value(metric))

    @property
    def has_attacked_finalists(self) -> bool:
        """Whether AutoAttack decided between trials of the sweep that this is from."""
        return self.autoattack is not None or self.is_below_finalists

    @property
    def run_folder(self) -> str:
        """Folder of the run, as `checkpoint`."""
        return self.checkpoint.rpartition("/")[0]

    @property
    def row(self) -> tuple[str, str]:
        """Label and kind of checkpoint, which the seeds of one config share."""
        return self.label, self.checkpoint_kind

    @property
    def title(self) -> str:
        """Label, seed and kind of checkpoint, for messages."""
        where = " chosen on the test images" if self.is_chosen_on_test else ""
        return f"{self.label}, seed {self.seed}, {self.checkpoint_kind} epoch{where}"

    @property
    def is_chosen_on_test(self) -> bool:
        """Whether the test images decided which epoch this is."""
        return self.selection_split == "test" and self.checkpoint_kind == "best"


GetScore = Callable[[Candidate, str], float]
"""Function that returns the score of a candidate by a metric, such as `Candidate.score`."""

_SCORES_BEFORE_AUTOATTACK: Mapping[GetScore, GetScore] = {
    Candidate.corrected_score: Candidate.score,
    Candidate.final_value: Candidate.checkpoint_value,
}


class EvaluationResult(Spec):
    """Result of one attack on one candidate, on test examples."""

    stored_keys: ClassVar[Mapping[str, str]] = {
        "is_autoattack": "standard",
        "accuracy_after": "after",
        "run_id": "run",
    }

    candidate: Candidate
    """The evaluated checkpoint."""
    attack: str
    """Label of the attack in the stage that ran it."""
    is_autoattack: bool
    """Whether the attack is AutoAttack's standard version."""
    examples: int
    """Number of attacked test examples."""
    test_examples: int
    """Size of the test set."""
    eps: float
    """Radius of the perturbations, in units of pixel values in [0, 1]."""
    norm: str
    """Norm of the perturbations, `Linf` or `L2`."""
    clean: float
    """Accuracy without an attack, in [0, 1]."""
    robust: float
    """Accuracy under the whole attack, in [0, 1]."""
    intervals: dict[str, tuple[float, float]]
    """95% confidence intervals of `clean`, `robust` and the accuracy after each attack."""
    accuracy_after: dict[str, float]
    """Accuracy that remains after each attack of the cascade, in order."""
    per_class: dict[str, dict[str, float]]
    """Number of examples, clean and robust accuracy of each class."""
    masking_gap: float | None
    """Accuracy under the first attack minus `robust`, if that is PGD or APGD; else None."""
    seconds: float
    """Run time of the attacks in seconds."""
    queries: int
    """Number of forward passes of single examples."""
    warnings: tuple[str, ...]
    """Warnings of the evaluation, for example about gradient masking."""
    run_id: str
    """MLflow run that holds the numbers."""
    folder: str
    """Folder with the results of each example, relative to `--out` or a URI."""
    protocol: dict[str, Any]
    """Settings that must agree with a paper's to compare the numbers."""

    def describe_examples(self) -> str:
        """Return `100 of 450 test examples`, and how a part of them was chosen if that is known."""
        text = f"{self.examples} of {self.test_examples} test examples"
        return f"{text} ({self.protocol['subset']})" if "subset" in self.protocol else text


class StageFacts(Spec):
    """Base class of the facts that a stage reports besides candidates and evaluations.

    Facts of other versions stay readable: unknown keys are ignored and most fields have defaults.
    """

    model_config = ConfigDict(extra="ignore")

    # Fields that are left out of the JSON if they are None.
    omitted_if_none: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _write_stored_keys(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> JsonDict:
        """Write the stored keys, without the fields that may be missing."""
        data = super()._write_stored_keys(handler, info)
        for name in self.omitted_if_none:
            if getattr(self, name) is None:
                data.pop(name, None)
                data.pop(self.stored_keys.get(name, name), None)
        return data


FactsT = TypeVar("FactsT", bound=StageFacts)


class Artifact(Spec):
    """A finished stage: its settings, its inputs and its results."""

    stored_keys: ClassVar[Mapping[str, str]] = {"finish_time": "finished", "evaluations": "judged"}

    kind: str
    """Kind of the stage."""
    key: str
    """Digest of the stage and of everything that goes into it."""
    stage: JsonDict
    """Settings of the stage, with the keys of 0.1."""
    inputs: tuple[str, ...]
    """Digests of the stages before it that it depends on."""
    finish_time: float = 0.0
    """Time of the end in seconds since 1970."""
    seconds: float = 0.0
    """Wall-clock time of the last run of the stage."""
    candidates: tuple[Candidate, ...] = ()
    """Checkpoints for the next stages."""
    evaluations: tuple[EvaluationResult, ...] = ()
    """Results of attacks on the test set."""
    facts: JsonDict = Field(default_factory=dict)
    """Further results as plain data; `read_facts` gives them types."""

    def read_facts(self, facts_type: type[FactsT]) -> FactsT:
        """Return the further results as typed facts.

        Args:
            facts_type: Class of the facts, which depends on the kind of the stage.

        Raises:
            SpecError: If a fact is missing that has no default, or has another type.
        """
        return facts_type.from_data(self.facts, f"facts of {self.kind}", stored=True)

    def write(self, folder: Path, write_files: Callable[[Path], None] | None = None) -> None:
        """Write `folder` atomically.

        Args:
            folder: Folder to create or to replace.
            write_files: Called with a temporary folder; its files end up beside `artifact.json`.
        """
        with atomic_folder(folder) as partial:
            if write_files is not None:
                write_files(partial)
            (partial / ARTIFACT_FILE).write_text(
                json.dumps(self.to_stored_dict(), indent=1), encoding="utf-8"
            )

    @classmethod
    def read_if_finished(cls, folder: Path) -> "Artifact | None":
        """Read the artifact of a stage.

        Args:
            folder: Folder of the artifact, which may not exist.

        Returns:
            The artifact, or None if the stage has not finished.

        Raises:
            DamagedFileError: If `artifact.json` is not an artifact.
            InfrastructureError: If it cannot be read.
        """
        file = folder / ARTIFACT_FILE
        try:
            data = parse_stored_json(read_regular_file(file), str(file), {})
        except FileNotFoundError:
            return None
        except ValueError as error:
            reason = "it is no JSON object" if isinstance(error, DamagedFileError) else error
            raise DamagedFileError(
                f"{file}: cannot be read: {reason}; delete the folder"
            ) from error
        except OSError as error:
            raise InfrastructureError(f"{file}: cannot be read: {error.strerror}") from error
        return cls.from_data(data, str(file), stored=True)


def select_ranking_metrics(candidates: Iterable[Candidate]) -> tuple[str, ...]:
    """Return the objectives that rank the candidates, the main one first.

    Candidates of different objectives are ranked by the default objective, which every validation
    measures.

    Args:
        candidates: Candidates of any stages.
    """
    objectives = {c.objectives for c in candidates}
    return objectives.pop() if len(objectives) == 1 else (DEFAULT_OBJECTIVE,)


def choose_score(candidates: Sequence[Candidate], metric: str) -> GetScore:
    """Choose by what candidates of any sweeps are compared: by values of one scale.

    Scores (`average`) are of one scale only if all candidates have one for this metric, by the
    same rule (`score_epochs`, `margin_factor`). Otherwise the metric of the checkpoints is
    compared.

    Args:
        candidates: Candidates of any stages.
        metric: The first of `select_ranking_metrics`.

    Returns:
        Function of a candidate and a metric. If all candidates are of sweeps whose finalists
        AutoAttack has attacked, it takes AutoAttack into account: finalists must then rank above
        all others, whose values are those before AutoAttack.
    """
    rules = {(candidate.score_epochs, candidate.margin_factor) for candidate in candidates}
    has_one_rule = len(rules) == 1 and all(
        candidate.average is not None and metric == candidate.objectives[0]
        for candidate in candidates
    )
    if all(candidate.has_attacked_finalists for candidate in candidates):
        return Candidate.corrected_score if has_one_rule else Candidate.final_value
    return Candidate.score if has_one_rule else Candidate.checkpoint_value


def rank_candidates(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Sort candidates by their validation results, best first; the test set plays no part.

    The same order as that of a sweep's trials (see `selection.RunRank`), except that the seeds of
    one config share a rank, which has the mean of their scores. Within it the better seed comes
    first. Candidates that were validated on the test images come last: their scores are too high.

    Candidates of different sweeps are compared by what `choose_score` chooses. Where that is not
    what their sweep ranks them by, the trials of one sweep still keep their order in the sweep:
    they exchange their places in the common order. This is so for the trials of a sweep that
    repeated its best trials; of a sweep with finalists, if others have none; and of a sweep with
    scores, if checkpoints are compared.

    Args:
        candidates: Candidates of any stages.
    """
    metric = select_ranking_metrics(candidates)[0]
    get_score = choose_score(candidates, metric)
    score_before = _SCORES_BEFORE_AUTOATTACK.get(get_score, get_score)
    ranked = sorted(candidates, key=_make_rank_key(candidates, metric, score_before))
    # Stable: candidates with equal results keep their order before AutoAttack.
    ranked.sort(key=_make_rank_key(candidates, metric, get_score))
    rank_by_sweep = _make_rank_key(candidates, metric, Candidate.corrected_score)
    placed = {_sweep_folder(c) for c in candidates if c.n_seeds > 1}
    if get_score not in _SCORES_BEFORE_AUTOATTACK:
        placed |= {_sweep_folder(c) for c in candidates if c.has_attacked_finalists}
    if score_before is Candidate.checkpoint_value:
        placed |= {_sweep_folder(c) for c in candidates if c.average is not None}
    members: dict[str, list[Candidate]] = {folder: [] for folder in placed}
    for candidate in ranked:
        if _sweep_folder(candidate) in placed:
            members[_sweep_folder(candidate)].append(candidate)

    def rank_in_sweep(candidate: Candidate) -> tuple[Any, ...]:
        is_of_test, rank, *others = rank_by_sweep(candidate)
        n_seeds = 0 if candidate.autoattack is not None else candidate.n_seeds
        return (is_of_test, rank._replace(negated_seeds=-n_seeds), *others)

    in_order = {folder: iter(sorted(group, key=rank_in_sweep)) for folder, group in members.items()}
    return [
        next(in_order[folder]) if (folder := _sweep_folder(candidate)) in placed else candidate
        for candidate in ranked
    ]


def _sweep_folder(candidate: Candidate) -> str:
    """Return the folder of the trials of a candidate's sweep."""
    return candidate.run_folder.rpartition("/")[0]


def _make_rank_key(
    candidates: Sequence[Candidate], metric: str, get_score: GetScore
) -> Callable[[Candidate], tuple[bool, RunRank, float, int]]:
    """Return the sort key of candidates: by their scores, averaged over the seeds of a row."""
    scores: dict[tuple[str, str], list[float]] = {}
    for candidate in candidates:
        scores.setdefault(candidate.row, []).append(get_score(candidate, metric))
    is_after_autoattack = get_score in _SCORES_BEFORE_AUTOATTACK

    def rank(candidate: Candidate) -> tuple[bool, RunRank, float, int]:
        run_rank = RunRank(
            has_failed=False,
            has_ineligible_best=candidate.is_ineligible,
            exceeds_masking_gap=candidate.exceeds_masking_gap,
            is_below_finalists=is_after_autoattack and candidate.is_below_finalists,
            negated_seeds=0,
            negated_score=-mean(scores[candidate.row]),
        )
        is_of_test = candidate.selection_split == "test"
        return is_of_test, run_rank, -get_score(candidate, metric), candidate.seed

    return rank


def select_best_candidate(candidates: tuple[Candidate, ...]) -> Candidate:
    """Return the first candidate of `rank_candidates`; last epochs only if there are no best ones.

    Args:
        candidates: One candidate or more.
    """
    best = [c for c in candidates if c.checkpoint_kind == "best"] or list(candidates)
    return rank_candidates(best)[0]
