"""Keys of raysweep 0.1 in files that people wrote."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysweep.pipeline.pipeline import Pipeline, load_pipeline
from raysweep.spec import FormerNameWarning, SpecError
from raysweep.sweep.search_space import SearchSpace, load_space

SPACE: dict[str, Any] = {
    "method": "at",
    "base": {"data.name": "digits"},
    "sampler": {"kind": "random", "startup": 3},
    "scheduler": {"grace": 1, "factor": 3},
    "space": {"optim.lr": {"float": [0.01, 0.1], "log": True}},
    "start": [{"optim.lr": 0.05}],
}
PRESENT_SPACE: dict[str, Any] = {
    **{key: value for key, value in SPACE.items() if key != "start"},
    "sampler": {"kind": "random", "n_startup_trials": 3},
    "scheduler": {"grace_period": 1, "reduction_factor": 3},
    "points_to_evaluate": SPACE["start"],
}


def make_pipeline(space: dict[str, Any]) -> dict[str, Any]:
    return {"stages": [{"kind": "tune", "space": space}]}


def test_a_space_inside_a_stage_has_one_digest_under_both_names() -> None:
    with pytest.warns(FormerNameWarning) as caught:
        former = Pipeline.from_data(make_pipeline(SPACE), "p.yaml")
    assert sorted(str(warning.message) for warning in caught) == [
        "p.yaml: 'factor' is now called 'reduction_factor'",
        "p.yaml: 'grace' is now called 'grace_period'",
        "p.yaml: 'start' is now called 'points_to_evaluate'",
        "p.yaml: 'startup' is now called 'n_startup_trials'",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FormerNameWarning)
        present = Pipeline.from_data(make_pipeline(PRESENT_SPACE), "p.yaml")
        again = Pipeline.from_data(former.to_stored_dict(), stored=True)
    assert former == present == again
    assert former.stages[0].to_json_dict()["space"] == PRESENT_SPACE
    # What 0.1 computed digests of, and what it wrote into artifacts.
    assert present.stages[0].to_stored_dict()["space"] == SPACE


def test_a_space_inside_a_stage_is_changed_under_both_names(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump(make_pipeline(PRESENT_SPACE)))
    point = [{"optim.lr": 0.02}]
    _, present, _ = load_pipeline(str(file), {"stages.tune.space.points_to_evaluate": point})
    with pytest.warns(FormerNameWarning, match="'space.start' is now called"):
        _, former, _ = load_pipeline(str(file), {"stages.tune.space.start": point})
    assert former == present
    assert former.stages[0].to_json_dict()["space"]["points_to_evaluate"] == point


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"points_to_evaluate": []},
            "'start' and 'points_to_evaluate' are the same setting; keep 'points_to_evaluate' only",
        ),
        (
            {"sampler": {"startup": 3, "n_startup_trials": 4}},
            "sampler: 'startup' and 'n_startup_trials' are the same setting; "
            "keep 'n_startup_trials' only",
        ),
        (
            {"for": {"digits": {"start": [], "points_to_evaluate": []}}},
            "'start' and 'points_to_evaluate' are the same setting; keep 'points_to_evaluate' only",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::raysweep.spec.FormerNameWarning")
def test_one_setting_has_one_name_in_a_file(
    changes: dict[str, Any], line: str, tmp_path: Path
) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(SPACE | changes))
    with pytest.raises(SpecError) as caught:
        load_space("", {}, file)
    (problem,) = caught.value.problems
    assert re.sub(r":\d+: ", ": ", problem, count=1) == f"{file}: {line}"
    if "for" not in changes:
        with pytest.raises(SpecError):
            SearchSpace.from_data(SPACE | changes)
