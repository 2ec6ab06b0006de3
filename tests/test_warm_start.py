"""What a new sweep is told by earlier ones: ledgers whose trials are written out here."""

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import tiny
from rich.console import Console

from raysweep.cli import build_parser
from raysweep.commands.tune import TuneRequest, _extend_resumed_space
from raysweep.pipeline.stage import StageContext, TrainingOverrides
from raysweep.pipeline.stage_sweep import _create_sweep
from raysweep.spec import SpecError
from raysweep.stores import open_path
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import Distribution, SearchSpace
from raysweep.sweep.trial import Trial
from raysweep.sweep.warm_start import (
    EarlierResult,
    WarmStart,
    collect_warm_start,
    load_warm_start,
    save_warm_start,
)
from raysweep.training.trainer import train_model

LAM = "method.terms.pgd.weight.lam"
BURN_IN = "method.terms.pgd.weight.burn_in"
SPACE = {
    "method": "gairat",
    "trials": 6,
    "sampler": {"kind": "tpe", "n_startup_trials": 2},
    "scheduler": {"kind": "none"},
    "space": {LAM: {"float": [-3.0, 3.0]}, BURN_IN: {"int": [1, 6]}},
}


def write_sweep(folder: Path, scores: dict[float, float], **changes: object) -> Ledger:
    """A sweep with a trial for each lambda, and its robust accuracy; the first has a checkpoint."""
    ledger = Ledger.create(folder, SearchSpace.from_data({**SPACE, **changes}))
    for number, (lam, robust) in enumerate(scores.items()):
        best = {"epoch": 5.0, "robust_worst": robust, "clean": 0.9, "masking_gap": 0.0}
        params = {LAM: lam} | ({BURN_IN: 2} if BURN_IN in ledger.space.space else {})
        state = "failed" if robust > 1 else "finished"
        ledger.save_trial(Trial(number, params, state, epoch=8, best=best, burn_in=2))  # type: ignore[arg-type]
    return ledger


@pytest.fixture
def fingerprint(tmp_path: Path) -> str:
    """Fingerprint of the data of a run whose checkpoint `give_checkpoint` copies."""
    saved = train_model(tiny("at", epochs=1), tmp_path / "run").last_checkpoint
    return str(saved.meta["data_fingerprint"])


def give_checkpoint(ledger: Ledger, tmp_path: Path) -> Ledger:
    """Give the run's checkpoint to the first trial."""
    shutil.copytree(
        tmp_path / "run" / "epoch-0001", tmp_path / ledger.name / "trials/0000/epoch-0001"
    )
    return ledger


def test_results_on_the_same_data_are_told_and_the_best_is_tried_first(
    tmp_path: Path, fingerprint: str
) -> None:
    scores = {-1.0: 0.5, 2.0: 0.75, 0.0: 0.625, 1.0: 2.0}
    earlier = give_checkpoint(write_sweep(tmp_path / "earlier", scores), tmp_path)
    # Another seed is the same experiment.
    own_point = {LAM: -1.0, BURN_IN: 3}
    space = SearchSpace.from_data(
        {**SPACE, "base": {"seed": 7}, "points_to_evaluate": [own_point, {LAM: 2.0, BURN_IN: 2}]}
    )
    found = collect_warm_start(space, fingerprint, [earlier])
    told = {result.params[LAM]: result.best["robust_worst"] for result in found.results}
    assert told == {-1.0: 0.5, 2.0: 0.75, 0.0: 0.625}, "not the one that failed"
    assert found.points == ({LAM: 2.0, BURN_IN: 2},)
    assert found.add_points(space).points_to_evaluate == ({LAM: 2.0, BURN_IN: 2}, own_point)
    assert found.describe() == (
        "warm start: the sampler is told 3 earlier results, and 1 point of earlier sweeps is "
        "tried first"
    )
    new = Ledger.create(tmp_path / "new", found.add_points(space))
    save_warm_start(found, new.path)
    assert load_warm_start(new.path) == found
    new.delete_if_empty()
    assert not (tmp_path / "new").exists()
    # The best one was interrupted: what it would have come to is not known.
    earlier.save_trial(replace(earlier.load_trials()[1], state="running"))
    found = collect_warm_start(space, fingerprint, [earlier])
    assert [result.params[LAM] for result in found.results] == [0.0, -1.0]
    assert found.points == ({LAM: 2.0, BURN_IN: 2},)


@pytest.mark.parametrize(
    ("changes", "other_data"),
    [({}, True), ({"base": {"epochs": 12}}, False), ({"base": {"*.eps": 0.1}}, False)],
)
def test_results_that_mean_something_else_only_name_points(
    tmp_path: Path, fingerprint: str, changes: dict, other_data: bool
) -> None:
    scores = {-1.0: 0.5, 2.0: 0.75, 0.0: 0.625, 1.0: 0.25}
    earlier = give_checkpoint(write_sweep(tmp_path / "earlier", scores, **changes), tmp_path)
    found = collect_warm_start(
        SearchSpace.from_data(SPACE), "0" * 64 if other_data else fingerprint, [earlier]
    )
    assert found.results == ()
    assert [point[LAM] for point in found.points] == [2.0, 0.0, -1.0], "the best three, in order"


def test_a_setting_that_the_earlier_sweep_fixed_has_its_value_and_ranges_are_kept(
    tmp_path: Path, fingerprint: str
) -> None:
    fixed = {"space": {LAM: {"float": [-9.0, 9.0]}}, "base": {BURN_IN: 4}}
    earlier = give_checkpoint(
        write_sweep(tmp_path / "earlier", {8.0: 0.75, 1.0: 0.5}, **fixed), tmp_path
    )
    found = collect_warm_start(SearchSpace.from_data(SPACE), fingerprint, [earlier])
    assert [result.params for result in found.results] == [{LAM: 1.0, BURN_IN: 4}], (
        "lambda 8 is outside of the new range, so that trial cannot be told"
    )


@pytest.mark.parametrize(
    ("space", "base", "told", "point"),
    [
        # The new sweep has the earlier lambda in its base, outside of the range that it searches.
        ({LAM: {"float": [1.0, 3.0]}, BURN_IN: {"int": [1, 6]}}, {LAM: 0.5}, False, {BURN_IN: 2}),
        # A path with a star, and a list that the earlier sweep had fixed.
        ({LAM: {"float": [-3.0, 3.0]}, "*.burn_in": {"int": [1, 6]}}, {}, True,
         {LAM: 0.5, "*.burn_in": 2}),
        ({LAM: {"float": [-3.0, 3.0]}, "optim.lr.boundaries": {"categorical": [[4, 6], [5, 7]]}},
         {BURN_IN: 2}, True, {LAM: 0.5, "optim.lr.boundaries": [5, 7]}),
        # The condition of lambda does not hold, so the result has all that matters.
        ({BURN_IN: {"int": [1, 6]}, LAM: {"float": [1.0, 3.0], "when": {BURN_IN: [3, 4]}}},
         {LAM: 0.5}, True, {BURN_IN: 2}),
        # The burn-in of 2 and a schedule that ends before it exclude each other.
        ({BURN_IN: {"int": [1, 6]}}, {LAM: {"kind": "linear", "first": 1, "last": 2, "end": 4}},
         False, {BURN_IN: 2}),
    ],
)  # fmt: skip
def test_a_result_is_told_only_with_all_its_settings(
    tmp_path: Path, fingerprint: str, space: dict, base: dict, told: bool, point: dict
) -> None:
    earlier = give_checkpoint(write_sweep(tmp_path / "earlier", {0.5: 0.75}), tmp_path)
    new = SearchSpace.from_data({**SPACE, "space": space, "base": base})
    # The same sweep twice tells nothing more.
    found = collect_warm_start(new, fingerprint, [earlier, Ledger.open(earlier.path)])
    assert found.points == (point,)
    assert [result.params for result in found.results] == [point] * told


def test_a_sweep_of_an_unknown_network_names_points(tmp_path: Path, fingerprint: str) -> None:
    earlier = give_checkpoint(write_sweep(tmp_path / "earlier", {0.5: 0.75}), tmp_path)
    sweep_file = tmp_path / "earlier" / "sweep.json"
    stored = json.loads(sweep_file.read_text())
    stored["space"]["base"] = {"model.name": "of_somebody_else"}
    sweep_file.write_text(json.dumps(stored))
    (tmp_path / "earlier/trials/0000/epoch-0001/meta.json").write_text("of no use here")
    earlier = Ledger.open(tmp_path / "earlier")
    found = collect_warm_start(SearchSpace.from_data(SPACE), fingerprint, [earlier])
    assert found.results == () and found.points == ({LAM: 0.5, BURN_IN: 2},)


def test_what_tells_nothing_is_refused_in_a_line(tmp_path: Path, fingerprint: str) -> None:
    failed = write_sweep(tmp_path / "failed", {1.0: 2.0})
    with pytest.raises(SpecError, match="--warm-start failed: it has no result"):
        collect_warm_start(SearchSpace.from_data(SPACE), fingerprint, [failed])
    grid = {**SPACE, "sampler": {"kind": "grid"}, "space": {LAM: {"categorical": [0.0, 1.0]}}}
    with pytest.raises(SpecError, match="a grid tries its points"):
        collect_warm_start(SearchSpace.from_data(grid), fingerprint, [failed])


def test_a_night_begins_with_the_best_of_the_night_before(
    tmp_path: Path, fingerprint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nights = {"2026-03-01": {-1.0: 0.5, 0.5: 0.75}, "2026-03-02": {2.0: 0.875}, "2026-03-04": {}}
    for night, scores in nights.items():
        folder = tmp_path / "nights" / night
        write_sweep(folder / "p-01-gairat-11111111", scores)
        write_sweep(folder / "p-02-lrat-11111111", {3.0: 1.0})
    printed: list[str] = []
    tonight = open_path(tmp_path / "nights" / "2026-03-03")
    context = StageContext(
        "p", tmp_path, tmp_path, tonight, TrainingOverrides({}, {}), Console(), None, ExitStack(),
        1, "22222222ff",
    )  # fmt: skip
    monkeypatch.setattr(context, "print_line", printed.append)
    earlier = context.find_earlier_sweep_folders("gairat")
    assert [folder.parent.name for folder in earlier] == ["2026-03-02", "2026-03-01"]
    ledger = _create_sweep(
        context, context.choose_sweep_folder("gairat"), SearchSpace.from_data(SPACE), earlier
    )
    assert ledger.space.points_to_evaluate == ({LAM: 2.0, BURN_IN: 2},)
    assert load_warm_start(ledger.path).results == (), (
        "no checkpoint says that the data is the same"
    )
    assert printed == [
        "p-01-gairat-22222222: warm start: the sampler is told 0 earlier results, and 1 point of "
        "earlier sweeps is tried first"
    ]


@pytest.mark.needs_ray
def test_the_sampler_learns_from_earlier_results(tmp_path: Path, fingerprint: str) -> None:
    """The best lambda is 2: a sampler that knows it proposes near it from the second trial on."""
    from raysweep.sweep.optuna_search import LedgerSearcher

    scores = {lam / 4: 0.75 - abs(lam / 4 - 2.0) / 16 for lam in range(-12, 13)}
    earlier = give_checkpoint(write_sweep(tmp_path / "earlier", scores), tmp_path)
    sampler = {"sampler": {"kind": "gp", "n_startup_trials": 2}}
    space = SearchSpace.from_data(SPACE | sampler)
    found = collect_warm_start(space, fingerprint, [earlier])
    new = Ledger.create(tmp_path / "new", found.add_points(space))
    save_warm_start(found, new.path)
    search = LedgerSearcher(new)
    first, second = (search.suggest(name)["params"] for name in "ab")
    assert first == {LAM: 2.0, BURN_IN: 2}
    assert abs(second[LAM] - 2.0) < 0.75
    # The sweep goes on with a narrower range; somebody has changed the file.
    narrow = space.replace(space={**space.space, LAM: Distribution(float=(1.0, 3.0))})
    results = list(found.results)
    results[0] = replace(results[0], best={"epoch": 5.0})
    save_warm_start(replace(found, results=tuple(results)), new.path)
    trials = LedgerSearcher(Ledger(new.path, narrow, new.key))._study.trials
    assert sorted(trial.params[LAM] for trial in trials if trial.values) == [
        1.0, 1.25, 1.5, 1.75, 2.25, 2.5, 2.75, 3.0
    ]  # fmt: skip


def test_a_resumed_sweep_with_another_space_file_keeps_what_it_has(
    tmp_path: Path, fingerprint: str
) -> None:
    """The file has a wider range and a starting point of its own, and sets no finalists, except
    for another data set.
    """
    settings = {"finalists": 1, "until": "told-apart", "repeat": 2, "prefix_gib": 3.0}
    scores = {-1.0: 0.5, 2.0: 0.75, -3.0: 0.7}
    earlier = give_checkpoint(write_sweep(tmp_path / "earlier", scores), tmp_path)
    space = SearchSpace.from_data({**SPACE, **settings})
    # The data are others: three points are tried first.
    found = collect_warm_start(space, "0" * 64, [earlier])
    new = Ledger.create(tmp_path / "new", found.add_points(space))
    save_warm_start(found, new.path)
    new.save_trial(Trial(0, {LAM: 2.0, BURN_IN: 2}, "finished"))
    own_point = {LAM: 3.5, BURN_IN: 1}
    changed = {**SPACE, "points_to_evaluate": [own_point], "until": None}
    changed["space"] = {LAM: {"float": [-2.0, 4.0]}, BURN_IN: {"int": [1, 6]}}
    others = {"finalists": 5, "prefix_gib": 9.0, "score_epochs": 2, "margin_factor": 1.0}
    changed["for"] = {"cifar10": others}
    file = tmp_path / "wider.yaml"
    file.write_text(yaml.safe_dump(changed))
    arguments = ["tune", "--resume", "new", "--space", str(file), "--set", "repeat=3"]
    request = TuneRequest.from_args(build_parser().parse_args(arguments))
    extended = _extend_resumed_space(request, Ledger.open(new.path))
    # -3.0 lies outside of the changed range.
    points = ({LAM: 2.0, BURN_IN: 2}, {LAM: -1.0, BURN_IN: 2}, own_point)
    assert extended.points_to_evaluate == points
    kept = {name: getattr(extended, name) for name in settings}
    assert kept == settings | {"until": None, "repeat": 3}
    new.extend_space(extended)
    # A sweep that an earlier version warmed up has no points in its file.
    content = json.loads((tmp_path / "new" / "warm_start.json").read_text())
    assert [point[LAM] for point in content.pop("points")] == [2.0, -3.0, -1.0]
    (tmp_path / "new" / "warm_start.json").write_text(json.dumps(content))
    assert load_warm_start(new.path) == replace(found, points=())


@pytest.mark.parametrize(("kind", "limit"), [("gp", 500), ("tpe", None), ("random", None)])
def test_a_gaussian_process_is_told_a_limited_number_of_results(
    kind: str, limit: int | None
) -> None:
    """Of 1,500 results the best 250, and of the other 1,250 each fifth."""
    space = SearchSpace.from_data(SPACE | {"sampler": {"kind": kind}})
    scores = np.random.default_rng(0).permutation(1500) / 1500
    results = [
        EarlierResult("earlier", number, {LAM: 0.0, BURN_IN: 2}, {"robust_worst": float(score)})
        for number, score in enumerate(scores)
    ]
    out_of_range = EarlierResult("earlier", 1500, {LAM: 9.0, BURN_IN: 2}, {"robust_worst": 2.0})
    told = WarmStart((*results, out_of_range)).select_results(space)
    ranks = [round(1499 - 1500 * result.best["robust_worst"]) for result in told]
    if limit is None:
        assert told == results
    else:
        assert ranks == [*range(250), *range(250, 1500, 5)] and len(told) == limit
    assert WarmStart(tuple(results[:500])).select_results(space) == results[:500]
