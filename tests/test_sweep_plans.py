"""What a trial holds, how many trials fit a cluster, and the plan of a sweep: shares, epochs and
hours by hand.
"""

import json
import math
import signal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY

from raysweep.commands._sweep_plan_output import print_sweep_plan
from raysweep.data import DatasetSplits
from raysweep.errors import InfrastructureError
from raysweep.spec import SpecError
from raysweep.stores import open_path
from raysweep.sweep.epoch_timing import _time_few_rows_then_all, estimate_epoch_seconds
from raysweep.sweep.plan import (
    expected_sweep_epochs,
    expected_trial_epochs,
    list_completed_epochs,
    plan_sweep,
)
from raysweep.sweep.resources import Resources
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial

pytestmark = pytest.mark.needs_ray

LR = "optim.lr"
SMALL = {**TINY, "validation.scales": []}


def space(**changes: Any) -> SearchSpace:
    data = {
        "method": "at",
        "trials": 16,
        "base": SMALL,
        "scheduler": {"grace_period": 2, "reduction_factor": 2},
    }
    return SearchSpace.from_data({**data, "space": {LR: {"float": [0.01, 0.5]}}, **changes})


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "share", "threads"),
    [
        (2, None, 2, {"CPU": 0.99, "GPU": 0.0}, 1),
        (1, 1, 3, {"CPU": 0.3233, "GPU": 0.3333}, 1),
        (2, 1, 3, {"CPU": 0.6566, "GPU": 0.3333}, 1),
        (7, 2, 2, {"CPU": 3.49, "GPU": 1.0}, 3),
        (8, 4, 2, {"CPU": 3.99, "GPU": 2.0}, 4),
        (5, 0, 2, {"CPU": 2.49, "GPU": 0.0}, 2),
        (3, 2, 3, {"CPU": 0.99, "GPU": 0.6666}, 1),
        (16, 8, 8, {"CPU": 1.99, "GPU": 1.0}, 2),
    ],
)
def test_workers_have_equal_shares_rounded_down_and_the_waiting_process_0_01(
    cpus: float, gpus: float | None, workers: int, share: dict[str, float], threads: int
) -> None:
    resources = Resources(cpus, gpus, workers)
    assert resources.worker_resources == pytest.approx(share, abs=1e-9)
    assert resources.threads_per_worker == threads
    assert resources.trial_resources == {"CPU": 0.01}, (
        "the share of the process that waits for the workers"
    )


def test_the_shares_fit_into_the_resources_of_a_trial_and_waste_almost_nothing() -> None:
    """Exactly, in the ten thousandths in which Ray counts."""
    for cpus in (1, 1.5, 2, 3, 4, 5.25, 7, 10, 31, 64):
        for gpus in (0, 0.5, 1, 2):
            for workers in (2, 3, 4, 6, 7, 9):
                if gpus > workers and gpus % workers:
                    continue
                resources = Resources(cpus, gpus, workers)
                share = {
                    kind: Fraction(str(value)) for kind, value in resources.worker_resources.items()
                }
                held = {
                    "CPU": share["CPU"] * workers + Fraction("0.01"),
                    "GPU": share["GPU"] * workers,
                }
                assert all(
                    f"{float(value):.4f}".rstrip("0").rstrip(".") for value in share.values()
                )
                for kind, given in (("CPU", cpus), ("GPU", gpus)):
                    assert (share[kind] * 10_000).denominator == 1
                    slack = Fraction(str(given)) - held[kind]
                    most = Fraction(workers * 2, 10_000) + (
                        Fraction("0.01") * (workers - 1) if kind == "CPU" else 0
                    )
                    assert 0 <= slack <= most, (cpus, gpus, workers, kind)


@pytest.mark.parametrize(
    ("cpus", "threads"), [(0.5, 1), (1, 1), (1.9, 1), (2, 2), (3.99, 3), (8, 8)]
)
def test_one_worker_is_the_trials_own_process(cpus: float, threads: int) -> None:
    resources = Resources(cpus=cpus, gpus=0.25)
    assert (
        resources.trial_resources == {"CPU": cpus, "GPU": 0.25}
        and resources.threads_per_worker == threads
    )
    assert Resources().trial_resources == {"CPU": 1, "GPU": 0.0} and Resources().n_gpus == 0.0


def test_by_default_each_worker_has_a_gpu_if_the_cluster_has_any() -> None:
    gpus, none = {"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0}
    for workers in (1, 2):
        assert Resources(workers=workers).resolve(gpus).gpus == workers
        assert (
            Resources(workers=workers).resolve(none).gpus
            == Resources(workers=workers).resolve(none | {"GPU": 0}).gpus
            == 0
        )
        assert Resources(cpus=2, gpus=0.5, workers=workers).resolve(gpus) == Resources(
            cpus=2, gpus=0.5, workers=workers
        )
    assert Resources(gpus=0.0).resolve(gpus).gpus == 0.0, "0 GPUs is a choice, not the default"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"cpus": 0}, "--cpus-per-trial 0: must be more than 0"),
        ({"cpus": -1}, "--cpus-per-trial -1: must be more than 0"),
        ({"cpus": 0.02, "workers": 2}, "0.02 CPUs are not enough for 2 workers"),
        ({"cpus": 2, "gpus": 3, "workers": 2}, "3 GPUs for 2 workers is 1.5 each"),
        ({"gpus": 1.5}, "1.5 GPUs for 1 workers is 1.5 each"),
    ],
)
def test_impossible_shares_are_refused(how: dict[str, float], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Resources(**how)  # type: ignore[arg-type]


def test_shares_at_the_limit_are_accepted() -> None:
    assert 0 < Resources(cpus=0.0204, workers=2).worker_resources["CPU"] <= 0.0002
    assert Resources(gpus=1, workers=4, cpus=4).worker_resources["GPU"] == 0.25
    assert [Resources(gpus=gpus).n_gpus for gpus in (0.5, 1, 2)] == [0.5, 1, 2]


@pytest.mark.parametrize(
    ("resources", "cluster", "nodes", "trials"),
    [
        (Resources(), {"CPU": 2.0}, [], 2),
        (Resources(cpus=2), {"CPU": 2.0}, [], 1),
        (Resources(cpus=2), {"CPU": 7.0}, [], 3),
        (Resources(cpus=0.5), {"CPU": 2.0}, [], 4),
        (Resources(cpus=1, gpus=1), {"CPU": 16.0, "GPU": 4.0}, [], 4),
        (Resources(cpus=8, gpus=1), {"CPU": 16.0, "GPU": 4.0}, [], 2),
        (Resources(cpus=1, gpus=0.25), {"CPU": 16.0, "GPU": 3.0}, [], 12),
        (Resources(cpus=1, gpus=0.0), {"CPU": 16.0, "GPU": 1.0}, [], 16),
        # Two workers may be on different nodes; a single worker needs one node.
        (Resources(cpus=2, workers=2), {"CPU": 4.0}, [{"CPU": 1.0}] * 4, 2),
        (Resources(cpus=4, workers=2), {"CPU": 9.0}, [{"CPU": 3.0}] * 3, 1),
        (Resources(cpus=2, gpus=2, workers=2), {"CPU": 8.0, "GPU": 3.0},
         [{"CPU": 4.0, "GPU": 1.5}] * 2, 1),
        (Resources(cpus=2, gpus=2, workers=2), {"CPU": 9.0, "GPU": 4.0},
         [{"CPU": 1.0, "GPU": 4.0}, {"CPU": 8.0}], 0),
        # Twenty workers of 0.49 would fit, but not with the process that waits for each pair.
        (Resources(cpus=1, workers=2), {"CPU": 9.9}, [{"CPU": 9.9}], 9),
        (Resources(cpus=3, gpus=1, workers=3), {"CPU": 6.0, "GPU": 2.0},
         [{"CPU": 6.0, "GPU": 2.0}], 2),
    ],
)  # fmt: skip
def test_how_many_trials_fit(resources: Resources, cluster: dict, nodes: list, trials: int) -> None:
    if trials:
        assert resources.max_concurrent_trials(cluster, nodes) == trials
    else:
        with pytest.raises(
            InfrastructureError,
            match=r"a trial needs 2 workers of 1 CPUs and 1 GPUs each, .* nodes hold 1",
        ):
            resources.max_concurrent_trials(cluster, nodes)


@pytest.mark.parametrize(
    ("resources", "cluster"),
    [
        (Resources(cpus=2.01), {"CPU": 2.0}),
        (Resources(gpus=1), {"CPU": 2.0, "GPU": 0.5}),
        (Resources(gpus=0.25), {"CPU": 2.0}),
        (Resources(), {}),
    ],
)
def test_a_trial_that_does_not_fit_is_refused(resources: Resources, cluster: dict) -> None:
    with pytest.raises(InfrastructureError, match=r"a trial needs .* the cluster has "):
        resources.max_concurrent_trials(cluster)


def test_fractions_of_a_cluster_are_counted_exactly() -> None:
    """In floats 33 / 1.1 is 29.999999999999996, and 7 / 0.07 is 99.99999999999999."""
    for hundredths in (7, 14, 28, 33, 55, 56, 68, 110, 112, 125):
        for whole in (1, 7, 14, 17, 28, 33, 64):
            fit = whole * 100 // hundredths
            cluster = {"CPU": float(whole), "GPU": float(whole)}
            if fit:
                assert Resources(cpus=hundredths / 100).max_concurrent_trials(cluster) == fit
                if hundredths <= 100:
                    assert (
                        Resources(cpus=0.001, gpus=hundredths / 100).max_concurrent_trials(cluster)
                        == fit
                    )
    # 24.999999999999996 times what each of two workers holds.
    half = Resources(cpus=1, gpus=0.56, workers=2)
    assert half.max_concurrent_trials({"CPU": 99.0, "GPU": 7.0}, [{"CPU": 99.0, "GPU": 7.0}]) == 12
    assert (
        half.max_concurrent_trials({"CPU": 99.0, "GPU": 14.0}, [{"CPU": 49.5, "GPU": 7.0}] * 2)
        == 25
    )


@pytest.mark.parametrize(
    ("epochs", "begun", "expected"),
    [
        # Rungs at 2 and 4: half of the trials get past the first, a quarter past the second.
        (8, 0, 2 + 2 / 2 + 4 / 4),
        (8, 1, 1 + 2 / 2 + 4 / 4),
        (8, 2, 2 + 4 / 2),
        (8, 3, 1 + 4 / 2),
        (8, 4, 4),
        (8, 7, 1),
        (8, 8, 0),
        (2, 0, 2),
        (3, 0, 2 + 1 / 2),
        (4, 0, 2 + 2 / 2),
        (5, 0, 2 + 2 / 2 + 1 / 4),
    ],
)
def test_epochs_that_a_trial_can_expect(epochs: int, begun: int, expected: float) -> None:
    assert expected_trial_epochs(space(), epochs, begun) == expected


def test_epochs_of_a_whole_sweep() -> None:
    assert (
        expected_sweep_epochs(space(), 8) == 64 and expected_sweep_epochs(space(trials=3), 8) == 12
    )
    assert expected_sweep_epochs(space(scheduler={"kind": "none"}), 8) == 128
    assert expected_sweep_epochs(
        space(scheduler={"grace_period": 1, "reduction_factor": 3}), 9
    ) == round(16 * (1 + 2 / 3 + 6 / 9))
    grid = space(sampler={"kind": "grid"}, space={LR: {"categorical": [0.1, 0.2, 0.3]}})
    assert expected_sweep_epochs(grid, 8) == 12, "the epochs of the grid's points"


def test_a_plan_counts_the_trials_that_are_left() -> None:
    states = [
        ("running", 1),
        ("finished", 3),
        ("finished", 5),
        ("stopped", 2),
        ("failed", 0),
        ("running", 0),
    ]
    trials = [
        Trial(number, {LR: 0.1}, state, epoch) for number, (state, epoch) in enumerate(states)
    ]  # type: ignore[arg-type]
    assert list_completed_epochs(space(trials=8), 3, trials) == [1, 0, 0, 0]
    assert list_completed_epochs(space(trials=8), 5, trials) == [1, 3, 0, 0, 0], (
        "the trial that had finished 3 epochs gets two more"
    )
    assert list_completed_epochs(space(trials=6), 6, trials) == [1, 3, 5, 0]
    assert list_completed_epochs(space(trials=3), 8, []) == [0, 0, 0]
    own = [Trial(0, {"epochs": 2}, "finished", 2), Trial(1, {"epochs": 9}, "running", 4)]
    assert list_completed_epochs(space(trials=2), 5, own) == [4], (
        "a trial's own number of epochs is not changed"
    )


@pytest.mark.parametrize(
    ("present", "brought"),
    [
        (1, ["gpu", "gpu", "cpu", "cpu"]),
        (2, ["gpu", "cpu", "cpu"]),
        (3, ["cpu", "cpu"]),
        (5, []),
        (9, []),
    ],
)
def test_nodes_that_an_autoscaler_can_still_start(present: int, brought: list[str]) -> None:
    """At most four, those with GPUs first; the head is among the nodes that are present."""
    from raysweep.sweep.cluster import _unlaunched_node_capacities

    kinds: dict[str, dict[str, float]] = {"cpu": {"CPU": 4}, "gpu": {"CPU": 8, "GPU": 1}}
    types: dict[str, Any] = {
        "head": {"resources": {"CPU": 2, "GPU": 8}, "max_workers": 7},
        "cpu": {"resources": kinds["cpu"], "max_workers": 3},
        "auto": {"resources": {}, "max_workers": 2},
        "gpu": {"resources": kinds["gpu"], "max_workers": 2},
        "none": {"resources": {"CPU": 64}},
    }
    config = {"head_node_type": "head", "max_workers": 4, "available_node_types": types}
    assert list(_unlaunched_node_capacities(config, present)) == [kinds[name] for name in brought]


def test_the_size_of_a_cluster_may_be_given_in_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from raysweep.sweep import cluster

    monkeypatch.setenv("RAYSWEEP_CLUSTER_MAX", '{"CPU": 32, "GPU": "8"}')
    assert cluster.node_capacities() == [
        {"CPU": 32.0, "GPU": 8.0}
    ] and cluster.cluster_capacity() == {"CPU": 32.0, "GPU": 8.0}
    for wrong in ("[1]", "32", '{"CPU": "many"}', ""):
        monkeypatch.setenv("RAYSWEEP_CLUSTER_MAX", wrong)
        with pytest.raises(SpecError, match=r"RAYSWEEP_CLUSTER_MAX=.*expected JSON like"):
            cluster.node_capacities()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU to time")
def test_trials_on_gpus_are_not_timed_where_there_is_none(digits: DatasetSplits) -> None:
    assert estimate_epoch_seconds(space().trial_config({}), digits, Resources(gpus=1)) is None


def test_a_sweep_restores_the_signal_handlers_that_tune_replaces() -> None:
    from raysweep.sweep.tuner import _restore_signal_handlers

    numbers = (signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(KeyError), _restore_signal_handlers():
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyError
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock on which each reading takes as many seconds as the first number of the list; the
    second is its time, and the others are the numbers of threads at each reading.
    """
    tick = [1.0, 0.0]

    def read_clock() -> float:
        tick[1] += tick[0]
        tick.append(torch.get_num_threads())
        return tick[1]

    monkeypatch.setattr(
        "raysweep.sweep.epoch_timing.time", SimpleNamespace(perf_counter=read_clock)
    )
    return tick


def test_seconds_of_an_epoch(digits: DatasetSplits, set_clock: list[float]) -> None:
    """A step takes one second of this clock, and so does the validation of a sample of 32 of 50
    images.
    """
    config = space(base={**SMALL, "epochs": 4}).trial_config({})
    assert estimate_epoch_seconds(config, digits, Resources()) == pytest.approx(2 * 1 + 50 / 32)
    every = space(
        base={**SMALL, "validation.every": 2, "batch_size": 24}, scheduler={"kind": "none"}
    ).trial_config({})
    assert estimate_epoch_seconds(every, digits, Resources()) == pytest.approx(
        3 * 1 + 50 / 24 / 2
    ), "64 images are three batches of 24"
    # A sample of 16 from 40 images, of which each of two workers has 20.
    some = space(base={**SMALL, "validation.size": 40, "batch_size": 16}).trial_config({})
    assert estimate_epoch_seconds(some, digits, Resources()) == pytest.approx(4 * 1 + 40 / 16)
    assert estimate_epoch_seconds(some, digits, Resources(cpus=2, workers=2)) == pytest.approx(
        4 * 1 + 20 / 16
    )
    few = space(base={**SMALL, "validation.size": 10, "batch_size": 16}).trial_config({})
    assert estimate_epoch_seconds(few, digits, Resources()) == pytest.approx(4 * 1 + 1), (
        "the sample is all ten images"
    )


class SlowNetwork(torch.nn.Module):
    """A network that needs some seconds of a clock for each image."""

    def __init__(self, seconds: float, clock: list[float]) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.seconds, self.clock = seconds, clock

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock[0] += self.seconds * len(x)
        return self.layer(x.flatten(1))


@pytest.fixture
def network_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only a SlowNetwork advances."""
    clock = [0.0]
    module = SimpleNamespace(perf_counter=lambda: clock[0])
    monkeypatch.setattr("raysweep.sweep.epoch_timing.time", module)
    monkeypatch.setattr("raysweep.sweep.epoch_timing.monotonic", lambda: clock[0])
    monkeypatch.setattr("raysweep.sweep.epoch_timing.LIMIT_SECONDS", 3.0)
    return clock


@pytest.mark.parametrize(
    ("seconds", "expected", "spent"),
    [
        # Ten passes of four rows, then three times ten of 64.
        (0.001, 0.64, 0.04 + 3 * 0.64),
        # 0.4 s for four rows; five passes of 64 rows later 3 s are over.
        (0.01, 6.4, 0.4 + 5 * 0.64),
        # The first pass of four rows is the last one.
        (1.0, None, 4.0),
    ],
)
def test_what_takes_long_is_timed_on_a_few_rows_or_not(
    seconds: float, expected: float | None, spent: float, network_clock: list[float]
) -> None:
    network = SlowNetwork(seconds, network_clock)

    def compute(n_rows: int) -> None:
        for _ in range(10):
            network(torch.zeros(n_rows, 64))

    assert _time_few_rows_then_all(compute, 64, 4, 3, 3.0) == pytest.approx(expected)
    assert network_clock[0] == pytest.approx(spent)
    network(torch.zeros(1, 64)), "no limit outlasts the estimate"


def test_a_plan_answers_in_time_whatever_the_network(
    digits: DatasetSplits, network_clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = space(base={**SMALL, "compute.compile": True}).trial_config({})

    def compile_module(*arguments: object, **options: object) -> None:
        raise AssertionError("compiling takes minutes")

    monkeypatch.setattr("torch.compile", compile_module)
    assert estimate_epoch_seconds(config, digits, Resources()) is not None
    slow = SlowNetwork(60.0, network_clock)
    monkeypatch.setattr("raysweep.models.ModelSpec.build_model", lambda *arguments: slow)
    assert estimate_epoch_seconds(config, digits, Resources()) is None
    assert network_clock[0] == 8 * 60, "a single pass, of the images that check the network"


def test_a_step_is_timed_with_the_threads_that_a_trial_will_have(
    digits: DatasetSplits, set_clock: list[float]
) -> None:
    torch.set_num_threads(2)
    for resources in (Resources(cpus=2, workers=2), Resources(cpus=3)):
        estimate_epoch_seconds(space().trial_config({}), digits, resources, n_steps=0)
    assert set(set_clock[2 : len(set_clock) // 2 + 1]) == {1}
    assert set(set_clock[len(set_clock) // 2 + 1 :]) == {3}
    assert torch.get_num_threads() == 2, "as it was"


def test_the_hours_of_a_plan(
    digits: DatasetSplits,
    set_clock: list[float],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("joblib.cpu_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    set_clock[0] = 16.004  # an epoch: 2 x 16.004 s, and 16.004 s for 32 of 50 images
    past = [
        Trial(0, {LR: 0.1}, "running", 3),
        Trial(1, {LR: 0.2}, "stopped", 2),
        Trial(2, {LR: 0.3}, "failed"),
    ]
    most = [*past, Trial(3, {LR: 0.4}, "stopped", 2), Trial(4, {LR: 0.5}, "stopped", 2)]
    sweep = space(trials=5, base={**SMALL, "epochs": 8})
    facts = []
    for cpus, trials in ((0.25, ()), (0.5, past), (0.75, past), (0.5, most)):
        resources = Resources(cpus=cpus)
        print_sweep_plan(plan_sweep(sweep, digits, resources, None, trials), as_json=True)
        facts.append(json.loads(capsys.readouterr().out))
    whole, rest, half, one = facts
    assert (whole["trials"], whole["trials_left"], whole["epochs_per_trial"]) == (5, 5, 8)
    assert (rest["trials"], rest["trials_left"]) == (5, 3)
    assert whole["epochs_expected"] == 20 and rest["epochs_expected"] == 3 + 4 + 4
    left = plan_sweep(sweep, digits, Resources(), None, past).max_epochs
    assert left == (8 - 3) + 8 + 8, "of the trial that runs, and of two new ones"
    assert (one["trials_left"], one["epochs_expected"]) == (1, 3), (
        "the trial that has 3 of 8 epochs behind it"
    )
    assert [plan["trials_at_once"] for plan in facts] == [5, 3, 2, 1], (
        "at most as many as are left, and as fit"
    )
    seconds = 2 * 16.004 + 16.004 * 50 / 32
    assert all(plan["seconds_per_epoch"] == 57.01 for plan in facts), "57.01425, rounded"
    assert whole["trial_hours"] == round(seconds * 20 / 3600, 3)
    assert whole["wall_hours"] == round(seconds * 20 / 5 / 3600, 3)
    assert rest["wall_hours"] == round(seconds * 11 / 3 / 3600, 3)
    assert half["wall_hours"] == round(seconds * 11 / 2 / 3600, 3)
    assert whole["objective_95_half_width"] == round(0.98 / math.sqrt(50), 4)
    assert (whole["train_examples"], whole["validation_examples"]) == (64, 50)
    assert whole["searched"] == {LR: {"float": [0.01, 0.5]}}
    assert (half["cpus_per_trial"], half["gpus_per_trial"], half["workers_per_trial"]) == (
        0.75,
        0.0,
        1,
    )


def test_a_plan_in_words(
    digits: DatasetSplits, set_clock: list[float], capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("joblib.cpu_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    sweep = space(trials=3, base={**SMALL, "epochs": 4, "validation.size": 26})
    print_sweep_plan(plan_sweep(sweep, digits, Resources(cpus=2, workers=2), None))
    assert capsys.readouterr().out.splitlines() == [
        "3 trials of at on digits, 4 epochs each, digits_cnn",
        "images      digits, 8 x 8 pixels, 1 channel: 64 for training, 50 for validation,",
        "            450 for test",
        "classes     10; of each 6 to 7 for training, 5 for validation",
        "model       digits_cnn, batches of 32",
        "attack      pgd: Linf, eps 0.15, 2 steps of 0.03",
        "validation  each epoch, 26 images; the best epoch is chosen by robust_worst",
        "            pgd: Linf, eps 0.15, 2 steps of 0.03",
        "            cw: Linf, eps 0.15, 2 steps of 0.03",
        "            apgd_t: Linf, eps 0.15, 2 steps",
        "rate        (searched)",
        "searched",
        "  optim.lr: from 0.01 to 0.5",
        "warning: method.attacks.pgd.step_size = 0.03: 2 steps reach 0.06, not eps =",
        "    0.15; set it to eps, or take more steps",
        "warning: validation.attacks.pgd.step_size = 0.03: 2 steps reach 0.06, not eps =",
        "    0.15; set it to eps, or take more steps",
        "warning: validation.attacks.cw.step_size = 0.03: 2 steps reach 0.06, not eps =",
        "    0.15; set it to eps, or take more steps",
        "95% interval of the objective: +-0.192",
        "a trial holds 2 CPU(s) and 0 GPU(s), shared by 2 workers; 2 run at once",
        "one epoch with validation takes about 3.0 s, estimated from a few steps of one",
        "    worker here",
        "about 9 epochs in all (12 without early stopping): 27.0 s of trials, 13.5 s from",
        "    start to end",
        # 12 states, where the three trials keep two each.
        "checkpoints take about 4 MiB, and states that trials share up to 8 MiB",
    ]


@pytest.mark.parametrize(
    ("resources", "threads"),
    [
        (Resources(cpus=2, workers=2), 1),
        (Resources(cpus=4, workers=2), 2),
        (Resources(cpus=5, workers=2), 2),
        (Resources(cpus=3, workers=3), 1),
        (Resources(cpus=6, workers=3), 2),
        (Resources(cpus=2, workers=3), 1),
        (Resources(cpus=5, workers=3), 1),
        (Resources(cpus=34, workers=2), 17),
        (Resources(cpus=24, gpus=3, workers=3), 8),
    ],
)
def test_each_workers_computation_has_the_threads_of_its_share(
    resources: Resources, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.train
    from conftest import tiny

    from raysweep.sweep import multi_worker_trial

    # Tune's own callback must be created inside one of its trials.
    monkeypatch.setattr(multi_worker_trial, "TuneReportCallback", ray.train.UserCallback)
    folder = open_path(tmp_path / "trials" / "0003")
    trainer = multi_worker_trial._build_torch_trainer(
        tiny("at"), folder, resources.workers, resources.worker_resources, None, None
    )
    assert trainer.train_loop_config["threads"] == threads == resources.threads_per_worker
    scaling = trainer.scaling_config
    assert scaling.num_workers == resources.workers and scaling.use_gpu == bool(resources.gpus)
    assert scaling.resources_per_worker == {
        k: v for k, v in resources.worker_resources.items() if v
    }
    assert trainer.backend_config.backend == ("nccl" if resources.gpus else "gloo")
