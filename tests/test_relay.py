"""What a sweep's ledger holds after each of Tune's events, and when a sweep ends. No Ray is
started.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial

pytestmark = pytest.mark.needs_ray

LR = "optim.lr"
Told = list[tuple[str, int, float | None]]


class Sweep:
    """A relay on a new ledger with the trials `past`, a clock that tests set, and what its listener
    was told.
    """

    def __init__(self, path: Path, patch: pytest.MonkeyPatch, *past: Trial, **how: Any) -> None:
        from raysweep.sweep.tune_callbacks import Budget, LedgerCallback

        self.now = 1000.0
        patch.setattr(
            "raysweep.sweep.tune_callbacks.time", SimpleNamespace(monotonic=lambda: self.now)
        )
        space: dict[str, Any] = {LR: {"float": [0.01, 0.5]}, **how.pop("space", {})}
        data = {"method": "at", "trials": 4, "scheduler": {"kind": "none"}, "space": space}
        self.ledger = Ledger.create(path / "sweep", SearchSpace.from_data(data))
        for trial in past:
            self.ledger.save_trial(trial)
        self.told: Told = []
        gpus = how.pop("gpus", 0.0)
        self.relay = LedgerCallback(
            self.ledger, 3, [self], gpus_per_trial=gpus, budget=Budget(**how)
        )
        self.tune: dict[int, Any] = {}

    def on_trial_update(self, trial: Trial, epoch_metrics: dict[str, float] | None) -> None:
        assert trial in self.ledger.load_trials(), (
            "the ledger has the change before listeners are told"
        )
        self.told.append(
            (trial.state, trial.epoch, None if epoch_metrics is None else epoch_metrics["epoch"])
        )

    def on_sweep_start(self, ledger: Ledger, concurrency: int) -> None: ...

    def on_finalist_update(self, trial: Trial, n_left: int) -> None: ...

    def on_sweep_end(self, ledger: Ledger, error: BaseException | None = None) -> None: ...

    def event(
        self, name: str, number: int = 0, after: float = 0.0, failures: int = 1, **info: Any
    ) -> None:
        """Send Tune's event `name` of a trial, `after` seconds after the last event."""
        self.now += after
        fresh = SimpleNamespace(
            trial_id=f"t{number}",
            config={"number": number, "params": info.pop("params", {LR: 0.1})},
            error_file=None,
            num_failures=0,
        )
        trial = self.tune.setdefault(number, fresh)
        trial.num_failures = failures
        trial.error_file = info.pop("error_file", None)
        getattr(self.relay, f"on_trial_{name}")(0, [], trial, **info)

    def report(
        self, epoch: int, worst: float, number: int = 0, after: float = 0.0, **more: Any
    ) -> None:
        self.event("result", number, after, result={"epoch": epoch, "robust_worst": worst, **more})

    def load_trial(self, number: int = 0) -> Trial:
        return next(trial for trial in self.ledger.load_trials() if trial.number == number)


@pytest.fixture
def begin_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sweep]:
    return lambda *past, **how: Sweep(tmp_path, monkeypatch, *past, **how)


def test_a_trial_from_its_start_to_its_end(begin_sweep: Callable[..., Sweep]) -> None:
    sweep = begin_sweep()
    sweep.event("start")
    assert sweep.load_trial() == Trial(0, {LR: 0.1}, burn_in=0)
    for epoch, worst in ((1, 0.25), (2, 0.5), (3, 0.375)):
        sweep.report(epoch, worst)
    assert sweep.load_trial().state == "running"
    sweep.event("complete")
    trial = sweep.load_trial()
    assert (trial.state, trial.epoch, trial.trained_epochs, trial.retries) == ("finished", 3, 3, 0)
    assert trial.best == {"epoch": 2.0, "robust_worst": 0.5} and trial.latest == {
        "epoch": 3.0,
        "robust_worst": 0.375,
    }
    assert trial.curve == [[1, 0.25], [2, 0.5], [3, 0.375]]
    assert sweep.told == [
        ("running", 0, None),
        ("running", 1, 1),
        ("running", 2, 2),
        ("running", 3, 3),
        ("finished", 3, None),
    ]


def test_what_tune_adds_to_a_report_is_no_metric(begin_sweep: Callable[..., Sweep]) -> None:
    sweep = begin_sweep()
    sweep.event("start")
    tune = {
        "timestamp": 1,
        "time_this_iter_s": 1.0,
        "time_total_s": 1.0,
        "time_since_restore": 1.0,
        "pid": 1,
    }
    tune |= {
        "iterations_since_restore": 1,
        "training_iteration": 7,
        "done": False,
        "hostname": "h",
        "trial_id": "x",
    }
    sweep.report(
        1, 0.25, **tune, flag=True, config={"number": 0}, **{"train/seconds": 2, "val/gap": 0.5}
    )
    row = sweep.load_trial().latest
    assert row == {"epoch": 1.0, "robust_worst": 0.25, "train/seconds": 2.0, "val/gap": 0.5}
    assert all(type(value) is float for value in row.values())


def test_epochs_that_were_reported_before_are_ignored(begin_sweep: Callable[..., Sweep]) -> None:
    """After a restart a trial repeats its reports. Epochs shared from other trials do not count as
    trained.
    """
    sweep = begin_sweep()
    sweep.event("start")
    sweep.report(1, 0.25, shared=1.0)
    sweep.report(2, 0.5)
    before, heard = sweep.load_trial(), len(sweep.told)
    for epoch in (1, 2):
        sweep.report(epoch, 0.875, after=5.0)
    assert sweep.load_trial() == before and len(sweep.told) == heard
    sweep.report(3, 0.375)
    assert (sweep.load_trial().epoch, sweep.load_trial().trained_epochs) == (3, 2)


@pytest.mark.parametrize(("epochs", "state"), [(2, "stopped"), (3, "finished"), (4, "finished")])
def test_a_trial_that_ends_before_its_last_epoch_was_stopped(
    begin_sweep: Callable[..., Sweep], epochs: int, state: str
) -> None:
    sweep = begin_sweep()
    sweep.event("start")
    for epoch in range(1, epochs + 1):
        sweep.report(epoch, 0.5)
    sweep.event("complete")
    assert sweep.load_trial().state == state and sweep.told[-1] == (state, epochs, None)


@pytest.mark.parametrize(
    ("epochs", "state"), [(1, "stopped"), (2, "finished"), (4, "stopped"), (5, "finished")]
)
def test_where_epochs_are_searched_each_trial_has_its_own_last_one(
    begin_sweep: Callable[..., Sweep], epochs: int, state: str
) -> None:
    """A trial of two and one of five epochs, in a sweep whose base has three."""
    sweep = begin_sweep(space={"epochs": {"int": [2, 5]}})
    sweep.event("start", params={LR: 0.1, "epochs": 2 if epochs <= 2 else 5})
    for epoch in range(1, epochs + 1):
        sweep.report(epoch, 0.5)
    sweep.event("complete")
    assert sweep.load_trial().state == state


@pytest.mark.parametrize(("epochs", "state"), [(2, "running"), (3, "finished")])
def test_a_trial_that_a_budget_ends_can_be_resumed(
    begin_sweep: Callable[..., Sweep], epochs: int, state: str
) -> None:
    sweep = begin_sweep(wall_seconds=60.0)
    sweep.event("start")
    for epoch in range(1, epochs + 1):
        sweep.report(epoch, 0.5)
    sweep.now += 60.0
    sweep.event("complete")
    assert sweep.load_trial().state == state


def test_a_trial_that_never_started_leaves_nothing(begin_sweep: Callable[..., Sweep]) -> None:
    sweep = begin_sweep(wall_seconds=0.0)
    sweep.event("complete")
    sweep.event("recover")
    assert sweep.ledger.load_trials() == [] and sweep.told == []


def test_a_reported_failure_ends_the_trial(begin_sweep: Callable[..., Sweep]) -> None:
    sweep = begin_sweep()
    sweep.event("start")
    sweep.report(1, 0.5)
    sweep.event(
        "result", result={"failed": "the loss became nan in epoch 2", "training_iteration": 2}
    )
    failed = sweep.load_trial()
    assert (failed.state, failed.epoch, failed.reason) == (
        "failed",
        1,
        "the loss became nan in epoch 2",
    )
    assert failed.best["robust_worst"] == 0.5 and sweep.told[-1] == ("failed", 1, None)
    sweep.event("complete")
    assert sweep.load_trial() == failed, "neither stopped nor finished"
    assert sweep.relay.bug_tracebacks == [] and not sweep.relay.has_reached_limit, (
        "the settings explain the failure: it is no bug"
    )


def test_three_errors_of_the_code_end_the_sweep(begin_sweep: Callable[..., Sweep]) -> None:
    from raysweep.sweep.tune_callbacks import SweepFailed

    sweep = begin_sweep()
    assert sweep.relay.start_round_if_needed()
    for number in range(3):
        assert not sweep.relay.has_reached_limit
        sweep.relay.require_round_progress()
        sweep.event("start", number)
        sweep.event(
            "result", number, result={"failed": "KeyError: 'no'", "bug": f"Traceback {number}"}
        )
        sweep.event("complete", number)
    assert (
        sweep.relay.has_reached_limit
        and [trial.state for trial in sweep.ledger.load_trials()] == ["failed"] * 3
    )
    with pytest.raises(
        SweepFailed, match="3 trials failed with errors in the code, the first:\nTraceback 0"
    ):
        sweep.relay.require_round_progress()


def write_error_file(path: Path, *failures: str) -> str:
    """Write an error file as Tune does: every failure of a trial, the last one at the end."""
    file = path / "error.txt"
    file.write_text(
        "".join(f"Failure # {n} (occurred at noon)\n{text}\n" for n, text in enumerate(failures, 1))
    )
    return str(file)


@pytest.mark.parametrize(
    ("failures", "reason"),
    [
        ((), "its process or its node died"),
        (("The worker died.",), "its process or its node died"),
        (("The node was preempted.",), "its node was preempted"),
        (
            ("The node was preempted.", "Task was killed due to the node running low on memory."),
            "its process was killed because the node ran out of memory",
        ),
        (
            ("Task was killed due to the node running low on memory.", "The worker died."),
            "its process or its node died",
        ),
    ],
)
def test_a_lost_process_is_a_retry_with_the_last_reason(
    begin_sweep: Callable[..., Sweep], failures: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    sweep = begin_sweep(Trial(0, {LR: 0.1}, epoch=1, retries=2))
    sweep.event("start")
    sweep.event("recover", error_file=write_error_file(tmp_path, *failures) if failures else None)
    lost = sweep.load_trial()
    assert (lost.state, lost.epoch, lost.retries, lost.reason) == ("running", 1, 3, reason)
    sweep.event("start")
    assert sweep.load_trial() == lost and len(sweep.told) == 2, (
        "listeners are not told of a second start"
    )
    sweep.report(2, 0.5)
    assert (sweep.load_trial().retries, sweep.load_trial().reason) == (3, "")


def test_a_missing_error_file_means_a_lost_process(
    begin_sweep: Callable[..., Sweep], tmp_path: Path
) -> None:
    sweep = begin_sweep()
    sweep.event("start")
    sweep.event("recover", error_file=str(tmp_path / "nowhere.txt"))
    assert sweep.load_trial().reason == "its process or its node died"


@pytest.mark.parametrize(("failures", "state"), [(20, "running"), (21, "failed")])
def test_a_trial_that_loses_its_process_too_often_has_failed(
    begin_sweep: Callable[..., Sweep], failures: int, state: str
) -> None:
    sweep = begin_sweep()
    assert sweep.relay.start_round_if_needed()
    sweep.event("start")
    sweep.report(1, 0.5)
    sweep.event("error", failures=failures)
    trial = sweep.load_trial()
    assert trial.state == state
    assert trial.reason == ("its process or its node died, 21 times" if state == "failed" else "")
    sweep.relay.require_round_progress()
    assert sweep.relay.start_round_if_needed() == (state == "running"), (
        "a trial that has not failed needs another round of Tune"
    )
    assert not sweep.relay.start_round_if_needed(), "a round is asked for once"


def test_a_sweep_whose_trials_cannot_start_says_so(begin_sweep: Callable[..., Sweep]) -> None:
    from raysweep.sweep.tune_callbacks import SweepFailed

    sweep = begin_sweep()
    assert sweep.relay.start_round_if_needed(), "the first time"
    sweep.event("error", 0)
    sweep.event("error", 1)
    with pytest.raises(SweepFailed, match="no trial could start: its process or its node died"):
        sweep.relay.require_round_progress()
    assert sweep.relay.start_round_if_needed()
    sweep.event("start", 2)
    sweep.event("error", 0)
    with pytest.raises(SweepFailed, match="no trial could start"):
        sweep.relay.require_round_progress()
    assert sweep.relay.start_round_if_needed()
    sweep.report(1, 0.5, number=2)
    sweep.event("error", 0)
    sweep.relay.require_round_progress()
    assert sweep.relay.start_round_if_needed(), (
        "some trial makes progress: the others may start later"
    )
    sweep.event("error", 0)
    with pytest.raises(SweepFailed, match="no trial could start"):
        sweep.relay.require_round_progress()
    assert sweep.relay.start_round_if_needed()
    sweep.event("result", 2, result={"failed": "the loss became nan"})
    sweep.event("error", 0)
    sweep.relay.require_round_progress()


def test_a_spent_budget_ends_the_rounds_too(begin_sweep: Callable[..., Sweep]) -> None:
    sweep = begin_sweep(wall_seconds=60.0)
    assert sweep.relay.start_round_if_needed()
    sweep.event("error", 0)
    sweep.now += 60.0
    assert not sweep.relay.start_round_if_needed() and sweep.relay.limit_reached


def test_seconds_count_while_a_process_holds_resources(begin_sweep: Callable[..., Sweep]) -> None:
    """The 15 s of a lost epoch count; the 75 s until a new process starts do not."""
    sweep = begin_sweep(Trial(0, {LR: 0.1}, epoch=0, seconds=100.0), gpus=2.0, gpu_seconds=130.0)
    sweep.event("start")
    sweep.report(1, 0.25, after=10.0)
    sweep.event("recover", after=15.0)
    assert sweep.load_trial().seconds == 125.0
    sweep.now += 75.0
    assert not sweep.relay.has_reached_limit, "a waiting trial holds nothing"
    sweep.event("start")
    sweep.report(2, 0.25, after=30.0)
    sweep.report(2, 0.25, after=4.0)
    sweep.event("complete", after=5.0)
    assert sweep.load_trial().seconds == 164.0 and sweep.load_trial().state == "stopped"
    assert not sweep.relay.has_reached_limit, "64 s of two GPUs are 128"
    sweep.event("start", 1)
    sweep.now += 0.9
    assert not sweep.relay.has_reached_limit
    sweep.now += 0.1
    assert sweep.relay.has_reached_limit and sweep.relay.update_limit_reached()


def test_gpus_of_trials_that_run_at_once_add_up(begin_sweep: Callable[..., Sweep]) -> None:
    sweep = begin_sweep(gpus=0.5, gpu_seconds=40.0)
    sweep.event("start", 0)
    sweep.event("start", 1, after=20.0)
    sweep.event("error", 0, after=20.0)
    sweep.now += 19.0
    assert not sweep.relay.has_reached_limit, "40 s and 39 s of half a GPU"
    sweep.now += 1.0
    assert sweep.relay.has_reached_limit


def test_a_budget_of_wall_seconds_counts_this_call_only(begin_sweep: Callable[..., Sweep]) -> None:
    sweep = begin_sweep(Trial(0, {LR: 0.1}, seconds=1e6), wall_seconds=60.0)
    sweep.event("start")
    sweep.now += 59.9
    assert (
        not sweep.relay.has_reached_limit
        and not sweep.relay.update_limit_reached()
        and not sweep.relay.limit_reached
    )
    sweep.now += 0.1
    assert sweep.relay.has_reached_limit and not sweep.relay.limit_reached, (
        "reading the property does not end the sweep"
    )
    assert sweep.relay.update_limit_reached() and sweep.relay.limit_reached


@pytest.mark.parametrize(
    ("budget", "spent", "over"),
    [
        ({"wall_seconds": 10.0}, (10.0, 0.0), True),
        ({"wall_seconds": 10.0}, (9.999, 1e9), False),
        ({"gpu_seconds": 10.0}, (0.0, 10.0), True),
        ({"gpu_seconds": 10.0}, (1e9, 9.999), False),
        ({"wall_seconds": 10.0, "gpu_seconds": 20.0}, (9.0, 20.0), True),
        ({"wall_seconds": 10.0, "gpu_seconds": 20.0}, (10.0, 19.0), True),
        ({"wall_seconds": 0.0}, (0.0, 0.0), True),
        ({}, (1e12, 1e12), False),
    ],
)
def test_a_budget_is_spent_when_it_is_reached(
    budget: dict, spent: tuple[float, float], over: bool
) -> None:
    from raysweep.sweep.tune_callbacks import Budget

    assert Budget(**budget).is_exhausted(*spent) is over


def test_tune_is_told_to_stop_all_trials_and_never_one(begin_sweep: Callable[..., Sweep]) -> None:
    from raysweep.sweep.tune_callbacks import BudgetStopper

    sweep = begin_sweep(wall_seconds=60.0)
    stop = BudgetStopper(sweep.relay)
    assert not stop.stop_all()
    sweep.now += 60.0
    assert stop.stop_all() and sweep.relay.limit_reached
    assert not stop("t0", {"robust_worst": 0.0})


def test_a_resumed_trial_keeps_its_past_and_its_number(begin_sweep: Callable[..., Sweep]) -> None:
    """Trials that had ended run again when a sweep has grown."""
    row = {"epoch": 2.0, "robust_worst": 0.75}
    past = Trial(
        7,
        {LR: 0.25},
        "running",
        2,
        row,
        row,
        [[1, 0.5], [2, 0.75]],
        1,
        30.0,
        1,
        "its node was preempted",
    )
    sweep = begin_sweep(Trial(3, {LR: 0.5}, "finished", 3), past)
    sweep.event("start", 7, params={LR: 0.25})
    assert sweep.load_trial(7) == replace(past, burn_in=0)
    sweep.event("start", 3, params={LR: 0.5})
    assert (sweep.load_trial(3).state, sweep.load_trial(3).epoch) == ("running", 3)
    sweep.report(3, 0.5, number=7, after=2.0)
    sweep.event("complete", 7, after=1.0)
    trial = sweep.load_trial(7)
    assert trial.best == row and trial.curve == [[1, 0.5], [2, 0.75], [3, 0.5]]
    assert (trial.state, trial.trained_epochs, trial.seconds, trial.retries) == (
        "finished",
        2,
        33.0,
        1,
    )
    assert [trial.number for trial in sweep.ledger.load_trials()] == [3, 7]
    assert json.loads((sweep.ledger.path / "trials/0007/trial.json").read_text())["epoch"] == 3


def test_another_round_of_tune_continues_the_records_of_the_last(
    begin_sweep: Callable[..., Sweep],
) -> None:
    """Tune has other names for the trials of its next round, and the same numbers."""
    sweep = begin_sweep()
    sweep.event("start")
    sweep.report(1, 0.75, after=10.0)
    sweep.event("recover", after=2.0)
    sweep.event("error")
    assert sweep.relay.start_round_if_needed()
    before = sweep.load_trial()
    assert (before.epoch, before.seconds, before.retries) == (1, 12.0, 1)
    sweep.tune.clear()
    sweep.tune[0] = SimpleNamespace(trial_id="other", config={"number": 0, "params": {LR: 0.1}})
    sweep.event("start", after=50.0)
    assert sweep.load_trial() == before
    sweep.report(2, 0.5, after=3.0)
    assert sweep.load_trial().curve == [[1, 0.75], [2, 0.5]] and sweep.load_trial().seconds == 15.0


def test_trials_do_not_mix(begin_sweep: Callable[..., Sweep]) -> None:
    sweep = begin_sweep()
    for number in (0, 1):
        sweep.event("start", number, params={LR: 0.1 + number / 10})
    sweep.report(1, 0.25, number=0)
    sweep.report(1, 0.75, number=1)
    sweep.report(2, 0.5, number=0)
    sweep.event("recover", 1)
    first, second = sweep.ledger.load_trials()
    assert (first.epoch, first.best["robust_worst"], first.retries) == (2, 0.5, 0)
    assert (second.epoch, second.best["robust_worst"], second.retries) == (1, 0.75, 1)
    assert [first.params, second.params] == [{LR: 0.1}, {LR: 0.2}]


def test_failures_of_the_surroundings_are_marked_and_those_of_settings_are_not(
    begin_sweep: Callable[..., Sweep],
) -> None:
    sweep = begin_sweep()
    reports = ({"failed": "disk full", "infrastructure": "yes"}, {"failed": "the loss became nan"})
    for number, result in enumerate(reports):
        sweep.event("start", number, params={LR: 0.1 + number / 10})
        sweep.event("result", number, result=result)
    sweep.event("start", 2, params={LR: 0.3})
    sweep.event("error", 2, failures=21)
    trials = sweep.ledger.load_trials()
    assert [trial.state for trial in trials] == ["failed"] * 3
    assert [trial.is_infrastructure_failure for trial in trials] == [True, False, True]
