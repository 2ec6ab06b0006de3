"""What a sweep prints while it runs, and what it does when nothing is left to run."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace, load_space, param_labels
from raysweep.sweep.trial import Trial
from raysweep.terminal import SweepDisplay, TrialTable

LR = "optim.lr"
SPACE = {"method": "at", "trials": 4, "space": {LR: {"float": [0.01, 0.5]}}, "base": {"epochs": 3}}


def make_ledger(folder: Path, *trials: Trial) -> Ledger:
    ledger = Ledger.create(folder / "sweep", SearchSpace.from_data(SPACE))
    for trial in trials:
        ledger.save_trial(trial)
    return ledger


def make_display(is_terminal: bool = False) -> tuple[SweepDisplay, io.StringIO]:
    text = io.StringIO()
    return SweepDisplay(Console(file=text, force_terminal=is_terminal, width=200)), text


def test_the_same_failure_is_told_once(tmp_path: Path) -> None:
    display, text = make_display()
    display.on_sweep_start(make_ledger(tmp_path), 2)
    for number, reason in ((0, "KeyError: 'no'"), (1, "KeyError: 'no'"), (2, "out of memory")):
        display.on_trial_update(Trial(number, {LR: 0.1}, state="failed", reason=reason), None)
    lines = [line.partition("] ")[2] for line in text.getvalue().splitlines()[2:]]
    assert [line.partition(", best")[0] for line in lines] == [
        "trial 0000 failed: KeyError: 'no'",
        "trial 0001 failed: as trial 0000",
        "trial 0002 failed: out of memory",
    ]


def test_the_display_says_what_it_waits_for(tmp_path: Path) -> None:
    display, text = make_display()
    display.announce("starting Ray on this machine ...")
    display.on_sweep_start(make_ledger(tmp_path), 2)
    lines = text.getvalue().splitlines()
    assert lines[0] == "starting Ray on this machine ..."
    assert lines[1].startswith("sweep sweep: 4 trials of up to 3 epochs, 2 at a time, in ")
    assert lines[2:] == ["starting the processes of the trials ..."]


def test_the_time_left_counts_trials_of_this_process_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("raysweep.terminal.time.monotonic", lambda: now[0])
    ended = [Trial(number, {LR: 0.1}, state="finished", epoch=3) for number in (0, 1)]
    display, _ = make_display()
    display.on_sweep_start(make_ledger(tmp_path, *ended), 2)
    now[0] = 160.0
    assert "left" not in str(display._render_table().caption)
    display.on_trial_update(replace(ended[0], number=2), None)
    # One trial took a minute, one is left.
    assert display._render_table().caption == (
        "3 of 4 trials done in 1:00, about 1:00 left; Ctrl-C stops"
    )


class Recorder:
    """A listener that remembers which events it was sent."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int | None]] = []

    def on_sweep_start(self, ledger: Ledger, concurrency: int) -> None:
        self.events.append(("start", concurrency))

    def on_trial_update(self, trial: Trial, epoch_metrics: object) -> None:
        self.events.append(("trial", trial.number))

    def on_sweep_end(self, ledger: Ledger, error: BaseException | None = None) -> None:
        self.events.append(("end", None))


@pytest.mark.needs_ray
def test_a_sweep_that_has_ended_needs_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from raysweep.errors import InfrastructureError
    from raysweep.sweep.tuner import run_sweep

    trials = [Trial(number, {LR: 0.1}, state="finished", epoch=3) for number in range(4)]
    ledger = make_ledger(tmp_path, *trials)
    recorder = Recorder()
    # Another test may have connected this process.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was started"))
    # Nothing listens at this address.
    assert run_sweep(ledger, [recorder], address="127.0.0.1:9") == "done"
    assert recorder.events == [("start", 0), ("end", None)]
    assert ledger.load_trials() == trials
    ledger.save_trial(replace(trials[3], state="running", epoch=2))
    with pytest.raises(InfrastructureError, match=r"127\.0\.0\.1:9"):
        run_sweep(ledger, [recorder], address="127.0.0.1:9")


def test_metrics_are_whole_on_a_narrow_terminal(tmp_path: Path) -> None:
    """The settings of LRAT's own space have names and values of more than 80 characters."""
    space = load_space("lrat", {})
    ledger = Ledger.create(tmp_path / "lrat", space)
    metrics = {
        "epoch": 7.0,
        "clean": 0.812,
        "pgd": 0.543,
        "cw": 0.521,
        "robust_worst": 0.498,
        "masking_gap": 0.045,
    }
    names = dict.fromkeys(space.space, 0.123456)
    trials = [
        Trial(3, names, state="finished", epoch=9, best=metrics, best_in_burn_in={**metrics}),
        Trial(4, names, state="failed", epoch=1, reason="the loss became nan in epoch 2"),
    ]
    wide, narrow = io.StringIO(), io.StringIO()
    Console(file=wide, width=400).print(TrialTable(ledger, trials))
    Console(file=narrow, width=80).print(TrialTable(ledger, trials))
    lines = narrow.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 < max(map(len, wide.getvalue().splitlines()))
    (row,) = (line.split() for line in lines if "finished" in line)
    assert row[:7] == ["0003", "7", "0.812", "0.543", "0.521", "0.498", "0.045"]
    # Every setting is there, as often as there are trials, and nothing is cut.
    text = narrow.getvalue()
    assert "…" not in text
    for label in param_labels(list(space.space)).values():
        assert text.count(f"{label}=0.123") == 2, label
    assert len(wide.getvalue().splitlines()) == 3, "a wide terminal has one table"
