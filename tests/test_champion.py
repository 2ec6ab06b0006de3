"""Two models on the same examples: what is compared, with SciPy as the oracle, and which one
becomes champion.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny
from pipeline_builders import build_candidate, build_evaluation_result
from rich.console import Console
from scipy import stats
from torch import nn

from raysweep.checkpoint_evaluation import EXAMPLES_FILE
from raysweep.data import DatasetSplits
from raysweep.pipeline.artifact import Artifact, EvaluationResult
from raysweep.pipeline.facts import ChampionComparison
from raysweep.pipeline.paired_comparison import (
    compare_shared_examples,
    extract_comparison_protocol,
    find_protocol_differences,
)
from raysweep.pipeline.register import RegisterStage
from raysweep.pipeline.report.stage import ReportStage, _find_previous_report
from raysweep.pipeline.stage import StageContext, TrainingOverrides, UpstreamResults
from raysweep.stores import open_path
from raysweep.training import checkpoint
from raysweep.training.checkpoint import TrainingCheckpoint


def write_outcomes(folder: Path, held_out: dict[int, bool]) -> Path:
    """Write the file with an evaluation's result for each example, its rows in the order given."""
    folder.mkdir(parents=True, exist_ok=True)
    broken_by = [None if held else "apgd-ce" for held in held_out.values()]
    columns = {
        "index": pa.array(held_out, pa.int64()),
        "broken_by": pa.array(broken_by, pa.string()),
    }
    pq.write_table(
        pa.table(columns | {"margin_after": pa.array([0.0] * len(held_out))}),
        folder / EXAMPLES_FILE,
    )
    return folder / EXAMPLES_FILE


def test_examples_are_paired_by_their_number(tmp_path: Path) -> None:
    """Of examples 0 to 9 the even ones hold out now, those below 6 did before; each file has
    further examples too.
    """
    new = write_outcomes(
        tmp_path / "new", {n: n % 2 == 0 for n in (9, 7, 5, 3, 1, 8, 6, 4, 2, 0, 100, 102)}
    )
    old = write_outcomes(tmp_path / "old", {n: n < 6 for n in (*range(10), 201, 203, 205)})
    found = compare_shared_examples(new, old)
    assert found is not None
    assert (found.gained, found.lost, found.examples) == (2, 3, 10), (
        "6 and 8 are gained; 1, 3 and 5 are lost"
    )
    assert (
        found.difference == pytest.approx(-0.1) and found.p == stats.binomtest(2, 5).pvalue == 1.0
    )
    turned = compare_shared_examples(old, new)
    assert turned is not None and (turned.gained, turned.lost) == (3, 2)
    assert (
        compare_shared_examples(
            new, write_outcomes(tmp_path / "other", dict.fromkeys((11, 13), True))
        )
        is None
    )


def build_result(name: str, folder: Path, out: Path, **more: Any) -> EvaluationResult:
    return build_evaluation_result(
        build_candidate(name, 0.5),
        0.4,
        folder=str(folder.relative_to(out)),
        run=f"run-{name}",
        **more,
    )


def test_verdicts_under_another_protocol_are_not_comparable() -> None:
    candidate = build_candidate("a", 0.5)
    base = extract_comparison_protocol(build_evaluation_result(candidate, 0.4))
    assert base == {
        "attack": "AA",
        "standard": True,
        "eps": "0.0313725",
        "norm": "Linf",
        "data": "cifar10",
        "fingerprint": "f00d",
    }
    assert find_protocol_differences(base, base) == []
    tags = {key: str(value) for key, value in base.items()}
    assert find_protocol_differences(base, tags) == [], "MLflow keeps the facts as strings"
    changes: dict[str, Any] = {
        "attack": "PGD",
        "standard": False,
        "eps": 0.031,
        "norm": "L2",
        "data": "svhn",
        "fingerprint": "beef",
    }
    for key, value in changes.items():
        (line,) = find_protocol_differences(
            extract_comparison_protocol(build_evaluation_result(candidate, 0.4, **{key: value})),
            tags,
        )
        assert line.startswith(f"{key} ") and line.endswith(" now"), line
    assert find_protocol_differences(base, {}) == [
        f"{key} None then, {value!r} now" for key, value in base.items()
    ]
    assert (
        find_protocol_differences(
            extract_comparison_protocol(
                build_evaluation_result(candidate, 0.1, model="vgg13", epochs=3)
            ),
            tags,
        )
        == []
    ), "differences in the training are what is compared"
    # Six digits are compared, so that 8/255 in float32 is the same.
    assert (
        find_protocol_differences(
            extract_comparison_protocol(build_evaluation_result(candidate, 0.4, eps=0.03137255)),
            tags,
        )
        == []
    )


class FakeRegistry:
    """Replaces MLflow's registry: versions with their tags and, in a folder, their files. New ones
    are version 5.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.champion: tuple[str, str, dict[str, str]] | None = None
        self.aliases: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.described = ""

    def log_model(self, run_id: str, trained: TrainingCheckpoint, data: DatasetSplits) -> None:
        assert run_id == "run-new" and trained.config.data.name == "digits" and data.classes == 10

    def log_json(self, run: str, data: Any, name: str) -> None:
        assert (run, name) == ("run-new", "registered/card.json") and json.dumps(data)

    def log_file(self, run_id: str, path: Path, artifact_folder: str) -> None:
        assert (run_id, path.name, artifact_folder) == (
            "run-new",
            EXAMPLES_FILE,
            "registered",
        ) and path.is_file()

    def register_model(
        self, model_name: str, run_id: str, tags: dict[str, str], description: str
    ) -> str:
        assert (model_name, run_id) == ("model", "run-new") and description
        self.tags = tags
        return "5"

    def set_model_alias(self, model_name: str, alias: str, version: str) -> None:
        self.aliases[alias] = version

    def set_version_description(self, model_name: str, version: str, description: str) -> None:
        assert (model_name, version) == ("model", "5")
        self.described = description

    def find_model_by_alias(
        self, model_name: str, alias: str
    ) -> tuple[str, str, dict[str, str]] | None:
        return self.champion if (model_name, alias) == ("model", "champion") else None

    def download_artifact(self, run_id: str, artifact_path: str, target_folder: Path) -> Path:
        assert artifact_path == f"registered/{EXAMPLES_FILE}"
        return self.folder / run_id / EXAMPLES_FILE


@pytest.fixture
def work(tmp_path: Path) -> StageContext:
    folder = tmp_path / "runs" / "pipelines" / "p"
    made = StageContext(
        "p",
        tmp_path,
        folder,
        open_path(tmp_path / "runs"),
        TrainingOverrides({}, {}),
        Console(),
        None,
        ExitStack(),
    )
    made.storage = open_path(tmp_path.parent)
    made.__dict__["tracker"] = FakeRegistry(tmp_path / "shelf")
    return made


def compare_with_champion(
    work: StageContext, gained: int, lost: int, same: int = 50, **more: Any
) -> ChampionComparison:
    """Compare a new version with the champion, version 4: it gains and loses this many examples."""
    new = [True] * gained + [False] * lost + [True] * same
    old = [False] * gained + [True] * lost + [True] * same
    ours = write_outcomes(work.out / "new", dict(enumerate(new))).parent
    write_outcomes(work.out / "shelf" / "run-old", dict(enumerate(old)))
    tags = {
        f"raysweep.{key}": str(value)
        for key, value in extract_comparison_protocol(build_result("old", ours, work.out)).items()
    }
    work.tracker.champion = ("4", "run-old", tags | {"autoattack.robust_accuracy": "0.4"})
    return RegisterStage(name="model")._compare_with_champion(
        work, build_result("new", ours, work.out, **more), "5"
    )


def test_without_a_champion_the_first_version_becomes_it(work: StageContext) -> None:
    ours = write_outcomes(work.out / "new", {0: True}).parent
    found = RegisterStage(name="model")._compare_with_champion(
        work, build_result("new", ours, work.out), "1"
    )
    assert found.to_stored_dict() == {
        "champion": "1",
        "verdict": "better",
        "reason": "there was no champion",
    }


@pytest.mark.parametrize(
    ("gained", "lost", "champion", "verdict"),
    [(6, 0, "5", "better"), (5, 0, "4", "cannot tell"), (0, 6, "4", "worse"), (0, 0, "4", "tie")],
)
def test_only_a_better_version_becomes_champion(
    work: StageContext, gained, lost, champion, verdict
) -> None:
    """p = 2 / 64 if all of six differences are gains, 2 / 32 for five of five."""
    found = compare_with_champion(work, gained, lost)
    assert (found.champion, found.verdict, found.previous_champion) == (champion, verdict, "4")
    p = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert found.test.p == pytest.approx(p)
    points = 100 * (gained - lost) / (50 + gained + lost)
    assert found.reason == (
        f"{points:+.2f} points against version 4 on {50 + gained + lost} shared examples "
        f"({gained} gained, {lost} lost, p = {p:.3g})"
    )


def test_under_another_protocol_the_champion_stays(work: StageContext) -> None:
    found = compare_with_champion(work, 30, 0, norm="L2")
    assert found.to_stored_dict() == {
        "champion": "4",
        "before": "4",
        "verdict": "cannot tell",
        "reason": "other protocol: norm 'Linf' then, 'L2' now",
    }


def test_on_other_examples_the_champion_stays(work: StageContext) -> None:
    compare_with_champion(work, 6, 0)
    ours = write_outcomes(work.out / "elsewhere", {1000: True, 1001: True}).parent
    found = RegisterStage(name="model")._compare_with_champion(
        work, build_result("new", ours, work.out), "5"
    )
    assert (found.champion, found.verdict, found.reason) == (
        "4",
        "cannot tell",
        "evaluated on other examples",
    )


def test_the_champion_ties_with_itself(work: StageContext) -> None:
    compare_with_champion(work, 6, 0)
    ours = work.out / "new"
    found = RegisterStage(name="model")._compare_with_champion(
        work, build_result("new", ours, work.out), "4"
    )
    assert found.to_stored_dict() == {
        "champion": "4",
        "verdict": "tie",
        "reason": "it is the champion",
    }


@pytest.fixture(scope="module")
def saved_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a network that no test runs."""
    path, model = tmp_path_factory.mktemp("trained") / "run" / "epoch-0001", nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return checkpoint.save_checkpoint(
        path,
        tiny("at", seed=7),
        checkpoint.TrainingState.copy_from(model, optimizer),
        [{"epoch": 1.0}],
        "f00d",
    ).path


@pytest.mark.parametrize(
    ("standard", "gained", "lost", "aliases"),
    [
        (True, 6, 0, ["candidate", "aa-verified", "champion"]),
        (True, 0, 6, ["candidate", "aa-verified"]),
        (True, 5, 0, ["candidate", "aa-verified"]),
        (False, 6, 0, ["candidate"]),
    ],
)
def test_a_version_gets_the_aliases_that_it_earned(
    work: StageContext, saved_checkpoint: Path, capsys, standard, gained, lost, aliases
) -> None:
    """`aa-verified` if standard AutoAttack judged it, `champion` if that found it better,
    `candidate` always.
    """
    compare_with_champion(work, gained, lost)
    (work.out / "new" / "card.json").write_text('{"autoattack_acc": "40.00", "name": null}')
    candidate = build_candidate("new", 0.5, checkpoint=str(saved_checkpoint))
    best = build_evaluation_result(
        candidate,
        0.4,
        folder="new",
        run="run-new",
        standard=standard,
        examples=56,
        after={"apgd-ce": 0.4},
    )
    past = UpstreamResults(
        (
            Artifact(
                kind="train",
                key="k",
                stage={},
                inputs=(),
                candidates=(candidate,),
                evaluations=(best,),
            ),
        )
    )
    outcome = RegisterStage(name="model", card_fields={"authors": "us"}).run_stage(work, past)
    assert work.tracker.aliases == dict.fromkeys(aliases, "5")
    assert work.tracker.tags == {
        "raysweep.attack": "AA",
        "raysweep.standard": str(standard),
        "raysweep.eps": "0.0313725",
        "raysweep.norm": "Linf",
        "raysweep.data": "cifar10",
        "raysweep.fingerprint": "f00d",
        "autoattack.robust_accuracy": "0.400000",
        "autoattack.examples": "56",
    }, "the facts that the next version is compared with"
    assert work.tracker.described.startswith(
        "new, seed 0, best epoch: 40.00% under AA (95% 39.00% to 41.00%), 90.00% clean, Linf eps "
        "0.03137, "
        "56 of 10000 test examples. As a champion: "
    )
    verdict = f"{outcome.facts.verdict}, {outcome.facts.reason}"
    assert work.tracker.described.endswith(f" As a champion: {verdict}.")
    assert capsys.readouterr().out == f"model version 5: {verdict}\n"
    assert (outcome.facts.version, outcome.facts.name) == ("5", "model")
    assert outcome.facts.champion == ("5" if "champion" in aliases else "4" if standard else None)
    beside = work.out / "beside"
    beside.mkdir()
    outcome.write_files(beside)
    card = json.loads((beside / "card.json").read_text())
    assert card["aliases"] == aliases and (beside / EXAMPLES_FILE).is_file()
    assert (card["name"], card["authors"], card["autoattack_acc"]) == ("model", "us", "40.00")
    assert card["attacks"] == ["apgd-ce"] and card["autoattack_interval"] == pytest.approx(
        [0.39, 0.41]
    )
    assert (card["seed"], card["norm"], card["examples"]) == (7, "Linf", 56)


def write_earlier_report(
    work: StageContext,
    key: str,
    finished: float,
    robust: float,
    regressions: list[str],
    held_out: dict,
) -> None:
    """The report of an earlier night."""
    folder = work.artifacts_folder / f"03-report-{key}"
    ours = write_outcomes(work.out / key, held_out).parent
    best = build_result(key, ours, work.out).model_copy(update={"robust": robust})
    facts = {
        "best": best.to_json_dict(),
        "protocol": extract_comparison_protocol(best),
        "regressions": regressions,
        "medians": {"at under AA": robust, "gone under AA": 0.1},
    }
    artifact = Artifact(
        kind="report", key=key, stage={}, inputs=(), finish_time=finished, facts=facts
    )
    artifact.write(
        folder,
        lambda partial: (partial / EXAMPLES_FILE).write_bytes((ours / EXAMPLES_FILE).read_bytes()),
    )


def test_a_night_is_compared_with_the_last_good_one(work: StageContext) -> None:
    """Not with itself, nor with a night that had a regression, unless there is no other."""
    work.stage_digest = "now"
    assert _find_previous_report(work) is None
    examples = dict.fromkeys(range(60), True)
    write_earlier_report(work, "bad", 400.0, 0.1, ["worse"], examples)
    assert _find_previous_report(work)[1].key == "bad", (
        "a night with a regression is better than none"
    )
    write_earlier_report(work, "old", 100.0, 0.5, [], examples)
    write_earlier_report(work, "good", 200.0, 0.6, [], examples)
    write_earlier_report(work, "now", 500.0, 0.7, [], examples)
    folder, artifact = _find_previous_report(work)
    assert (artifact.key, folder.name) == ("good", "03-report-good")


def test_changes_since_an_earlier_night(work: StageContext) -> None:
    work.stage_digest = "now"
    write_earlier_report(work, "then", 100.0, 0.6, [], dict.fromkeys(range(60), True))
    ours = write_outcomes(work.out / "new", {n: n >= 7 for n in range(60)}).parent
    best = build_result("new", ours, work.out, clean=0.8).model_copy(
        update={"candidate": build_candidate("new", 0.5, method="at")}
    )
    candidates = (best.candidate,)
    past = UpstreamResults(
        (
            Artifact(
                kind="autoattack",
                key="k",
                stage={},
                inputs=(),
                candidates=candidates,
                evaluations=(best,),
            ),
        )
    )
    changes = ReportStage()._compare_with_previous(work, past, best)
    assert changes.best == ("then, seed 0, best epoch", "new, seed 0, best epoch")
    assert changes.robust == (0.6, 0.4) and changes.clean == (0.9, 0.8), "before, then now"
    assert changes.medians == {"at under AA": (0.6, 0.4)}, "of what both reports have"
    test = changes.test
    assert (test.gained, test.lost, test.examples, test.verdict) == (0, 7, 60, "worse")
    assert test.p == pytest.approx(stats.binomtest(0, 7).pvalue)
    assert changes.protocol_differences == ()
    other = ReportStage()._compare_with_previous(work, past, best.model_copy(update={"norm": "L2"}))
    assert other.test is None
    assert other.protocol_differences == ("norm 'Linf' then, 'L2' now",)
