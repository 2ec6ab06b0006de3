"""Facts of stages: their JSON, and reading what other versions wrote."""

import json
import math
from pathlib import Path

import pytest
from pipeline_builders import build_candidate, build_evaluation_result

from raysweep.errors import DamagedFileError
from raysweep.pipeline.artifact import Artifact, StageFacts
from raysweep.pipeline.facts import (
    ChampionComparison,
    PromoteFacts,
    RegisterFacts,
    ReportChanges,
    ReportFacts,
    SweepFacts,
    SweepSummary,
    TrialSummary,
)
from raysweep.pipeline.published_results import PaperComparison
from raysweep.pipeline.statistics import AccuracySummary, McNemarResult
from raysweep.spec import JsonDict

ARTIFACTS = Path(__file__).parent / "data" / "written_by_0_1" / "runs" / "pipelines" / "digits"
TEST = McNemarResult(6, 0, 56, 0.03125, 0.1, (0.05, 0.15), "better")


def store_facts(facts: StageFacts) -> Artifact:
    """An artifact with these facts, as it is read from a file."""
    return Artifact(kind="k", key="k", stage={}, inputs=(), facts=facts.to_stored_dict())


@pytest.mark.parametrize(
    ("kind", "facts_type"),
    [
        ("tune", SweepFacts),
        ("promote", PromoteFacts),
        ("autoattack", StageFacts),
        ("register", RegisterFacts),
        ("report", ReportFacts),
    ],
)
def test_facts_of_0_1_are_written_as_they_were_read(
    kind: str, facts_type: type[StageFacts]
) -> None:
    (folder,) = ARTIFACTS.glob(f"*-{kind}-*")
    artifact = Artifact.read_if_finished(folder)
    assert artifact is not None
    assert artifact.read_facts(facts_type).to_stored_dict() == artifact.facts


def test_a_sweep_as_json() -> None:
    trial = TrialSummary(
        number=1, state="failed", params={"x": 1}, score=None, masking_gap=math.nan
    )
    sweep = SweepSummary(path="p", epochs_completed=5, epochs_trained=3, trials=(trial,))
    facts = PromoteFacts(sweeps=(sweep,), n_candidates=4, left_out=("a",))
    expected: JsonDict = {
        "number": 1,
        "state": "failed",
        "settings": {"x": 1},
        "score": None,
        "masking_gap": "NaN",
        "reason": "",
    }
    assert facts.to_stored_dict() == {
        "sweeps": [
            {
                "path": "p",
                "method": "",
                "metric": "",
                "asked": 5,
                "trained": 3,
                "seconds": 0.0,
                "trials": [expected],
            }
        ],
        "of": 4,
        "left_out": ["a"],
    }
    (again,) = store_facts(facts).read_facts(SweepFacts).sweeps
    assert again.trials[0].masking_gap is not None and math.isnan(again.trials[0].masking_gap)


def test_a_comparison_that_did_not_take_place_is_left_out() -> None:
    comparison = ChampionComparison(verdict="cannot tell", reason="why")
    facts = RegisterFacts(name="m", version="3", candidate="a", **dict(comparison))
    names = {"name": "m", "version": "3", "candidate": "a"}
    assert facts.to_stored_dict() == names | {"verdict": "cannot tell", "reason": "why"}
    complete = facts.replace(champion="3", test=TEST, previous_champion="2")
    assert complete.to_stored_dict() == facts.to_stored_dict() | {
        "champion": "3",
        "test": {
            "gained": 6,
            "lost": 0,
            "examples": 56,
            "p": 0.03125,
            "difference": 0.1,
            "interval": [0.05, 0.15],
            "verdict": "better",
        },
        "before": "2",
    }
    assert store_facts(complete).read_facts(RegisterFacts) == complete
    assert complete.to_json_dict()["previous_champion"] == "2"
    assert "previous_champion" not in facts.to_json_dict()


def test_a_report_as_json() -> None:
    best = build_evaluation_result(build_candidate("a", 0.5), 0.4)
    line = PaperComparison(
        row="AT",
        checkpoint_kind="best",
        metric="AA",
        ours=AccuracySummary(0.4, None, 0.3, 0.5, 1),
        paper=48.5,
        paper_sd=None,
        difference=-8.5,
        tolerance=1.5,
        verdict="cannot tell",
        reasons=(),
    )
    first = ReportFacts(best=best, paper=(line,))
    assert first.to_stored_dict()["since"] == {}
    (row,) = first.to_stored_dict()["paper"]
    assert row == {
        "row": "AT",
        "which": "best",
        "metric": "AA",
        "ours": [0.4, None, 0.3, 0.5, 1],
        "paper": 48.5,
        "sd": None,
        "difference": -8.5,
        "tolerance": 1.5,
        "verdict": "cannot tell",
        "reasons": [],
    }
    changes = ReportChanges(
        previous_time="then", best=("a", "b"), robust=(0.5, 0.4), clean=(0.9, 0.8)
    )
    second = first.replace(changes=changes, regressions=("worse",))
    assert second.to_stored_dict()["since"] == {
        "when": "then",
        "best": ["a", "b"],
        "robust": [0.5, 0.4],
        "clean": [0.9, 0.8],
        "different": [],
        "medians": {},
    }
    assert json.dumps(second.to_stored_dict())
    for facts in (first, second, first.replace(changes=changes.replace(test=TEST))):
        assert store_facts(facts).read_facts(ReportFacts) == facts


def test_facts_of_other_versions_are_read() -> None:
    artifact = Artifact(
        kind="tune",
        key="k",
        stage={},
        inputs=(),
        facts={"sweeps": [{"path": "p", "later": 1}], "later": 2},
    )
    assert artifact.read_facts(SweepFacts).sweeps == (SweepSummary(path="p"),)
    assert artifact.read_facts(StageFacts) == StageFacts()
    assert artifact.facts["later"] == 2
    assert store_facts(StageFacts()).read_facts(SweepFacts).sweeps == ()
    with pytest.raises(DamagedFileError, match="facts of tune: best is missing"):
        artifact.read_facts(ReportFacts)
