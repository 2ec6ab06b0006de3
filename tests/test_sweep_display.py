"""What a sweep prints while it runs, and what it does when nothing is left to run."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from raysweep.evaluation.paired_statistics import PairedDifference
from raysweep.stores import open_path
from raysweep.sweep.finalist_result import FinalistResult
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace, load_space, param_labels
from raysweep.sweep.spread_summary import SpreadSummary
from raysweep.sweep.time_left import SweepTimer
from raysweep.sweep.trial import Trial
from raysweep.terminal import SweepDisplay, TrialTable
from raysweep.training.epoch_progress import EpochProgressWriter

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


def test_the_time_left_counts_epochs_of_this_process_and_early_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("raysweep.terminal.time.monotonic", lambda: now[0])
    ended = [Trial(n, {LR: 0.1}, state="finished", epoch=3, seconds=900.0) for n in (0, 1)]
    display, _ = make_display()
    display.on_sweep_start(make_ledger(tmp_path, *ended), 1)
    now[0] = 160.0
    assert "left" not in str(display._render_table().caption)
    display.on_trial_update(replace(ended[0], number=2, seconds=60.0), None)
    # Three epochs took a minute. Half of the trials pass the rung at epoch 2: 2 + 1/2 are left.
    caption = str(display._render_table().caption).splitlines()
    assert caption[0] == "3 of 4 trials done in 1:00, about 0:50 left; Ctrl-C stops"
    assert caption[1] == "epochs: 9 completed, 0 trained, 9 reused from other trials"


def test_the_time_left_by_hand() -> None:
    """Rungs at 2 and 4 of 8 epochs, half of the trials pass each: 2 + 2/2 + 4/4 = 4 epochs."""
    data = {
        "method": "at",
        "trials": 6,
        "base_runs": 1,
        "base": {"epochs": 8},
        "scheduler": {"kind": "asha", "grace_period": 2, "reduction_factor": 2},
        "space": {LR: {"float": [0.01, 0.5]}},
    }
    space = SearchSpace.from_data(data)
    before = Trial(0, {LR: 0.1}, epoch=4, seconds=1000.0)
    timer = SweepTimer(space, 8, 2, [before])
    assert timer.estimate_seconds_left([before], []) is None
    resumed = replace(before, state="finished", epoch=8, seconds=1008.0)
    running = Trial(1, {LR: 0.1}, epoch=4, seconds=8.0)
    # 8 epochs in 16 s. Left: 4/1 of the running one at its last rung, 4 trials of 4 epochs, and the
    # base run of 8; two at a time.
    left = timer.estimate_seconds_left([resumed, running], [])
    assert left == pytest.approx(2 * (4 + 4 * 4 + 8) / 2)
    base = Trial(0, {"seed": 0}, epoch=8, state="finished", kind="base run", seconds=16.0)
    left = timer.estimate_seconds_left([resumed, replace(running, state="stopped")], [base])
    assert left == pytest.approx(2 * 4 * 4 / 2)
    # Eight have ended, after 5 epochs on average; one trial is left, and runs alone.
    wide = space.replace(trials=9)
    ended = [Trial(n, {LR: 0.1}, state="stopped", epoch=5, seconds=10.0) for n in range(8)]
    timer = SweepTimer(wide, 8, 2, [])
    assert timer.estimate_seconds_left(ended, [base]) == pytest.approx(2 * 5)
    assert timer.estimate_seconds_left([*ended, replace(ended[0], number=8)], [base]) == 0.0


def test_the_time_left_of_autoattack_by_hand() -> None:
    """Of 5 trials 2 are attacked, and 3 base runs; the best 2 and then the best one get one more
    seed.
    """
    objective = {"default": {"kind": "pgd", "eps": 0.1, "step_size": 0.02, "steps": 20}}
    base = {"epochs": 8, "validation.attacks": objective, "validation.finish": {}}
    data = {"method": "gairat", "trials": 5, "finalists": 2, "base_runs": 3, "repeat": 3}
    data |= {"base": base, "space": {LR: {"float": [0.01, 0.5]}}}
    space = SearchSpace.from_data(data)
    assert space.leaders_by_round == [4, 2]
    timer = SweepTimer(space, 8, 3, [])
    assert timer.estimate_autoattack_seconds_left([Trial(0, {}, epoch=1)], []) is None
    best = {"epoch": 1.0, "clean": 0.8, "robust_worst": 0.5, "validation_seconds": 2.5}
    trials = [Trial(n, {}, state="finished", epoch=8, best=best) for n in range(5)]
    # A validation passes each image once, 80% of them through 20 steps and, on the share of 0.25,
    # twice again. AutoAttack: 100 steps of APGD, 9 targets of 100 steps each of APGD and FAB, and
    # 5,000 queries of Square, each a third of a step, on the 50% that survive.
    seconds = 2.5 * (0.8 + 0.5 * (100 + 900 + 900 + 5000 / 3)) / (1 + 0.8 * 20 * (1 + 2 * 0.25))
    left = timer.estimate_autoattack_seconds_left(trials, [])
    assert left == pytest.approx(seconds * (2 + 2 + 2 + 3) / 3), "three at a time"
    result = FinalistResult(1, 0.4, 50, 0.1, "Linf", seconds=60.0)
    trials[1] = replace(trials[1], finalist=result)
    assert timer.estimate_autoattack_seconds_left(trials, []) == 8 * 60.0
    trials[1] = replace(trials[1], finalist=replace(result, epoch=2))
    assert timer.estimate_autoattack_seconds_left(trials, []) == left, "of another epoch"
    without = SweepTimer(space.replace(finalists=0), 8, 3, [])
    assert without.estimate_autoattack_seconds_left(trials, []) == 0.0


def test_progress_within_an_epoch_is_written_and_shown(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path)
    trial = Trial(0, {LR: 0.1}, epoch=1)
    now = [0.0]
    writer = EpochProgressWriter(ledger.run_path(trial), 40, clock=lambda: now[0])
    file = tmp_path / "sweep" / "trials" / "0000" / "progress.json"

    def state() -> str:
        display, _ = make_display()
        display.on_sweep_start(ledger, 1)
        display.on_trial_update(trial, None)
        text = io.StringIO()
        Console(file=text, width=200).print(display._render_table())
        return text.getvalue().splitlines()[1].split("  ")[-1].strip()

    writer.record_step(2, 1)
    now[0] = 1.9
    writer.record_step(2, 5)
    assert not file.exists() and state() == "running", "short epochs write nothing"
    now[0] = 2.5
    writer.record_step(2, 10)
    assert state() == "epoch 2: 25%"
    now[0] = 3.0
    writer.record_step(2, 20)
    assert state() == "epoch 2: 25%", "two seconds between two writes"
    now[0] = 5.0
    writer.record_step(2, 30)
    assert state() == "epoch 2: 75%"
    writer.delete()
    assert not file.exists() and state() == "running"
    now[0] = 9.0
    writer.record_step(3, 1)
    assert not file.exists(), "the next epoch has its own two seconds"
    for content in (
        '{"epoch": 1, "step": 3, "steps": 40}',
        '{"epoch": 2, "step": 0, "steps": 0}',
    ):
        file.write_text(content)
        assert state() == "running"


def test_progress_that_cannot_be_written_ends_no_training(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    now = [0.0]
    writer = EpochProgressWriter(open_path(tmp_path / "run"), 40, clock=lambda: now[0])
    for now[0] in (0.0, 3.0, 6.0):
        writer.record_step(1, 1)
    writer.delete()


def test_the_live_display_is_no_wall_of_numbers_at_80_columns(tmp_path: Path) -> None:
    space = load_space("lrat", {})
    ledger = Ledger.create(tmp_path / "lrat", space)
    values = dict.fromkeys(space.space, 0.123456)
    metrics = {"epoch": 7.0, "clean": 0.8, "pgd": 0.5, "cw": 0.5, "masking_gap": 0.1}
    text = io.StringIO()
    display = SweepDisplay(Console(file=text, force_terminal=True, width=80, height=24))
    display.on_sweep_start(ledger, 2)
    for number in range(30):
        best = {**metrics, "robust_worst": number / 100}
        trial = Trial(number, values, state="finished", epoch=60, best=best, seconds=9.0)
        display.on_trial_update(replace(trial, best_in_burn_in=best), None)
    base = Trial(0, {"seed": 0}, state="finished", epoch=60, best=best, kind="base run")
    display.on_base_run_update(base, None)
    shown = io.StringIO()
    Console(file=shown, width=80).print(display._render_table())
    display.on_sweep_end(ledger)
    lines = shown.getvalue().splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert "…" not in shown.getvalue()
    rows = [line for line in lines if "finished" in line]
    assert rows[0].split()[:7] == ["0029", "best@7", "of", "60", "0.800", "0.290", "0.100"]
    assert rows[-1].startswith("at (base) seed 0  best@7 of 60")
    assert "best so far: trial 0029, score 0.290 over 3 epochs" in lines
    (settings,) = (line for line in lines if "alpha=" in line)
    assert all(f"{label}=0.123" in settings for label in param_labels(list(space.space)).values())


@pytest.mark.parametrize("n_repeats", [0, 1])
@pytest.mark.parametrize(("name", "margin_factor"), [("lrat", 0), ("gair-trades", 1)])
def test_tables_of_finalists_show_the_corrected_score_at_80_columns(
    tmp_path: Path, name: str, margin_factor: float, n_repeats: int
) -> None:
    """Of all columns, those that rank remain; nothing is cut."""
    space = load_space(name, {"margin_factor": margin_factor})
    ledger = Ledger.create(tmp_path / "sweep", space)
    best = {"epoch": 17.0, "clean": 0.8, "pgd": 0.5, "robust_worst": 0.5, "masking_gap": 0.1}
    trial = Trial(
        0,
        dict.fromkeys(space.space, 0.123456),
        state="stopped",
        epoch=60,
        best=best,
        best_in_burn_in=best,
        averages={"robust_worst": 1.123 if margin_factor else 0.481},
        finalist=FinalistResult(17, 0.47, 300, 0.1, "Linf"),
    )
    repeats = (replace(trial, kind="repeat", params={"seed": 1}),) * n_repeats
    first, second = (replace(trial, number=number, repeats=repeats) for number in (0, 1))
    base_run = replace(trial, kind="base run", params={"seed": 0})
    spread = SpreadSummary(first, 300, {1: PairedDifference(0.0, -0.1, 0.1)}, None)
    text = io.StringIO()
    table = TrialTable(ledger, [first, second, base_run], spread=spread, is_live=True)
    Console(file=text, width=80).print(table)
    assert max(map(len, text.getvalue().splitlines())) <= 80
    *titles, best_row, other_row, base_row = (x.split() for x in text.getvalue().splitlines())
    assert titles[-1][0] == "trial" and titles[-1][-4:] == ["AA", "corrected", "best", "state"]
    score, corrected = ("1.123", "1.093") if margin_factor else ("0.481", "0.451")
    assert best_row[-4:] == ["0.470", corrected, "best", "stopped"]
    assert other_row[-4:] == ["0.470", corrected, "yes", "stopped"]
    assert base_row[:4] == [space.base_method_name, "(base)", "seed", "0"]
    assert base_row[-2:] == ["0.470", "stopped"], "base runs are no finalists"
    assert best_row.count(score) == 1 and best_row.count("(2)") == n_repeats
    # A sweep without scores ranks by AutoAttack itself.
    without = [replace(run, averages={}, repeats=()) for run in (first, second)]
    wide = io.StringIO()
    Console(file=wide, width=400).print(TrialTable(ledger, without))
    assert " AA " in wide.getvalue() and "corrected" not in wide.getvalue()


def test_a_score_with_a_margin_is_called_so(tmp_path: Path) -> None:
    space = load_space("trades", {"score_epochs": 1})
    ledger = Ledger.create(tmp_path / "sweep", space)
    display, _ = make_display()
    display.on_sweep_start(ledger, 1)
    best = {"epoch": 7.0, "robust_worst": 0.5}
    trial = Trial(3, {}, state="finished", epoch=8, best=best, averages={"robust_worst": 1.203})
    display.on_trial_update(trial, None)
    table = display._render_table()
    assert "best so far: trial 0003, score with margin 1.203 in epoch 7" in str(table.caption)
    text = io.StringIO()
    Console(file=text, width=200).print(table)
    titles, *_ = text.getvalue().splitlines()
    assert "score with margin  " in titles


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
    assert row[:7] == ["0003", "best@7", "of", "9", "0.812", "0.498", "0.045"]
    # Every setting has a column of the second table, and nothing is cut.
    assert "…" not in narrow.getvalue()
    labels = list(param_labels(list(space.space)).values())
    second = [line.split() for line in lines[lines.index("") + 1 :] if line]
    assert second == [
        ["trial", *labels],
        *([n, *["0.123"] * len(labels)] for n in ("0003", "0004")),
    ]
    assert len(wide.getvalue().splitlines()) == 3, "a wide terminal has one table"
    # Where even these columns are too wide, the settings of a trial wrap.
    narrowest = io.StringIO()
    Console(file=narrowest, width=50).print(TrialTable(ledger, trials))
    for label in labels:
        assert narrowest.getvalue().count(f"{label}=0.123") == 2, label
    assert max(map(len, narrowest.getvalue().splitlines())) <= 50
