"""Trials on several Ray workers: they survive, fail, are stopped, and release their resources."""

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, TrialUpdateListener
from process_tree import find_descendants
from ray.util.placement_group import PlacementGroup
from test_workers import difference

from raysweep.errors import InfrastructureError
from raysweep.logs import read_log
from raysweep.spec import SpecError
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.multi_worker_trial import load_placement_group
from raysweep.sweep.resources import Resources
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial
from raysweep.sweep.tuner import run_sweep
from raysweep.training.checkpoint import RunDirectory
from raysweep.training.selection import find_best_epoch
from raysweep.training.trainer import train_model

LR = "optim.lr"


def sweep(path: Path, lrs: list[float], **more: Any) -> Ledger:
    """A sweep over the learning rates `lrs`, in this order."""
    data = {
        "method": "at",
        "trials": len(lrs),
        "base": TINY,
        "scheduler": {"kind": "none"},
        "sampler": {"kind": "random"},
        "space": {LR: {"categorical": sorted(set(lrs))}},
        "start": [{LR: lr} for lr in lrs],
    }
    return Ledger.create(path, SearchSpace.from_data({**data, **more}))


def groups_held() -> list[str]:
    import ray.util

    return [
        name
        for name, entry in ray.util.placement_group_table().items()
        if entry["state"] != "REMOVED"
    ]


def kill_a_worker() -> None:
    find_descendants("RayTrainWorker")[-1].kill()


def test_workers_share_what_a_trial_holds() -> None:
    assert Resources(cpus=2, gpus=1, workers=2).worker_resources == {"CPU": 0.99, "GPU": 0.5}
    one_each, four = {"CPU": 1.0}, {"CPU": 4.0}
    assert Resources(cpus=2, workers=2).max_concurrent_trials(four, [four]) == 2
    assert (
        Resources(cpus=2, workers=2).max_concurrent_trials({"CPU": 2.0}, [one_each, one_each]) == 1
    )
    assert Resources(cpus=3, workers=2).max_concurrent_trials({"CPU": 6.0}, [{"CPU": 2.0}] * 3) == 1
    with pytest.raises(
        InfrastructureError,
        match=r"2 workers of 1\.5 CPUs and 0 GPUs each, the cluster's nodes hold 0",
    ):
        Resources(cpus=3, workers=2).max_concurrent_trials({"CPU": 3.0}, [one_each] * 3)
    with pytest.raises(SpecError, match=r"3 GPUs for 2 workers is 1\.5 each"):
        Resources(gpus=3, workers=2)


def hold_a_cpu() -> Any:
    """Hold a CPU of this process's node until the returned actor is killed."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=1)
    class Holder:
        pass

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    holder = Holder.options(scheduling_strategy=here).remote()
    ray.get(holder.__ray_ready__.remote())
    return holder


def wait_until(is_reached: Callable[[], bool], is_over: threading.Event) -> None:
    while not is_reached():
        assert not is_over.wait(0.01), "the sweep ended before"


def find_steps(messages: list[str], beginning: str) -> list[tuple[str, str]]:
    """Epochs and steps in the messages that begin so."""
    found = " ".join(message for message in messages if message.startswith(beginning))
    return re.findall(r"epoch (\d+),? after step (\d+)", found)


@pytest.mark.ray
def test_a_drained_node_and_a_sigterm_cost_a_group_nothing(
    ray_cluster: Any, tmp_path: Path
) -> None:
    """One of its workers is on the node that is drained; later its own process gets SIGTERM."""
    import ray

    holder, nodes, is_over = hold_a_cpu(), [], threading.Event()
    settings = {**TINY, "epochs": 3, "data.train_size": 480, "batch_size": 8}
    ledger = sweep(tmp_path / "sweep", [0.05], base=settings)
    run_path = tmp_path / "sweep" / "trials" / "0000"
    half = run_path / "half"

    def add_node(trial: Trial) -> None:
        # The trial's own process is on the first node. There is no room for its second worker.
        if not nodes:
            nodes.append(ray_cluster.add_node(num_cpus=1))

    def disturb() -> None:
        wait_until((run_path / "epoch-0001").exists, is_over)
        gcs = ray._raylet.GcsClient(address=ray_cluster.address)
        deadline = int(1000 * (time.time() + 600))
        assert gcs.drain_node(nodes[0].node_id, 2, "a test", deadline)[0]
        wait_until(half.exists, is_over)
        ray.kill(holder)
        wait_until((run_path / "epoch-0002").exists, is_over)
        for process in find_descendants("ray::ImplicitFu"):
            process.terminate()
        wait_until(half.exists, is_over)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        run_sweep(ledger, [TrialUpdateListener(add_node)], Resources(cpus=2, workers=2))
    finally:
        is_over.set()
        thread.join()
        for node in nodes:
            ray_cluster.remove_node(node)
    (trial,) = ledger.load_trials()
    assert trial.state == "finished" and [epoch for epoch, _ in trial.curve] == [1, 2, 3]
    entries = read_log(ledger.trial_path(0))
    by_rank = {
        rank: [e["message"] for e in entries if e.get("rank") == rank] for rank in (None, 0, 1)
    }
    for rank in (0, 1):
        saved = find_steps(by_rank[rank], "interrupted in epoch ")
        assert saved == find_steps(by_rank[rank], "resuming within epoch ") and len(saved) == 2
        fallbacks = [message for message in by_rank[rank] if message.startswith("fallback")]
        assert not fallbacks, "a model with synchronised batch norms can be copied"
    assert "a node is taken away: the group starts again elsewhere" in by_rank[None]
    assert trial.retries == 1, "SIGTERM ends its own process, a node of a worker does not"
    last = RunDirectory(ledger.trial_path(0)).read_last_checkpoint()
    assert last is not None and last.last_metrics == trial.latest
    assert not groups_held()


@pytest.mark.ray
def test_a_sweep_on_two_workers_with_all_that_can_happen(ray_cluster: None, tmp_path: Path) -> None:
    """Its first trial loses a worker, the second fails by its settings, the third is stopped; no
    worker stays held.
    """
    groups: list[PlacementGroup | None] = []

    def kill_once(trial: Trial) -> None:
        if trial.epoch == 2 and not groups:
            groups.append(load_placement_group(ledger.trial_path(0)))
            kill_a_worker()

    base = {**TINY, "epochs": 6, "method.attacks.pgd.norm": "L2"}
    asha = {"kind": "asha", "grace": 1, "factor": 2}
    ledger = sweep(tmp_path / "sweep", [0.05, 1e20, 1e-7], base=base, scheduler=asha, trials=2)
    # The third comes once the first has been everywhere: where a group is slow to start, ASHA would
    # meet them in another order.
    for trials in (2, 3):
        grown = ledger.space.model_copy(update={"trials": trials})
        run_sweep(
            ledger,
            [TrialUpdateListener(kill_once)],
            Resources(cpus=2, workers=2),
            extended_space=grown,
        )
    first, second, third = ledger.load_trials()
    assert first.state == "finished", first.reason
    assert first.epoch == 6
    assert second.state == "failed" and "the loss became" in second.reason
    assert third.state == "stopped"
    assert groups and groups[0] != load_placement_group(ledger.trial_path(0)), (
        "the group was started again"
    )
    saved = RunDirectory(ledger.trial_path(0)).read_last_checkpoint()
    assert saved is not None and saved.last_metrics == first.latest
    assert first.best == saved.history[find_best_epoch(saved.config, saved.history) - 1], (
        "no report was lost on the way"
    )
    alone = train_model(ledger.space.trial_config(first.params), tmp_path / "alone").last_checkpoint
    assert difference(saved.local_folder, alone.local_folder) < 1e-3
    entries = read_log(ledger.trial_path(0))
    by_rank = {entry.get("rank"): set() for entry in entries}
    for entry in entries:
        by_rank[entry.get("rank")].add(entry["process"])
    assert by_rank.keys() == {None, 0, 1}, "the trial's own process, and each worker"
    assert all(len(by_rank[rank]) >= 2 for rank in (0, 1)), "of both groups"
    assert not groups_held()
