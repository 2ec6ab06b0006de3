"""A trial trains with as many threads as it has CPUs, whatever the process was started with."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked_processes
import pytest
import ray.train
import torch
from conftest import tiny
from test_workers import in_processes

from raysweep.data import load_data
from raysweep.data.dataset_cache import CachedDataset
from raysweep.stores import open_path
from raysweep.sweep import multi_worker_trial, tuner
from raysweep.training.config import TrainingConfig

pytestmark = pytest.mark.needs_ray


def source_of(config: TrainingConfig) -> CachedDataset:
    return CachedDataset(config.data, load_data(config.data).fingerprint)


def train_with_cpus(amounts: list[float], sweep: Path) -> None:
    """Run trials as Tune does, one for each amount; the threads at each report go to the file
    `threads.json`.
    """
    config, threads = tiny("at", epochs=1), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner.tune, "report", lambda metrics: threads.append(torch.get_num_threads()))
        for number, cpus in enumerate(amounts):
            tuner._train_trial(
                config, open_path(sweep / "trials" / f"{number:04d}"), cpus, None, source_of(config)
            )
    (sweep / "threads.json").write_text(json.dumps(threads))


def test_a_trial_has_a_thread_for_each_whole_cpu(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    trials = forked_processes.start_function(
        train_with_cpus, [3, 0.5, 2, 1], tmp_path, imports=forked_processes.COMMANDS
    )
    assert trials.wait() == 0, trials.err
    assert json.loads((tmp_path / "threads.json").read_text()) == [3, 1, 2, 1]


def share_with_threads(threads: int, path: Path) -> None:
    """Run the part of the only worker as Ray Train does; the threads at each report go to the file
    `threads.json`.
    """
    config, found = tiny("at", epochs=1), []
    loop = {"threads": threads, "source": source_of(config), "prefixes": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray.train, "report", lambda metrics: found.append(torch.get_num_threads()))
        patch.setattr(ray.train, "get_preemption_info", lambda: None)
        patch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
        patch.setattr(
            multi_worker_trial, "get_current_placement_group", lambda: SimpleNamespace(id=b"group")
        )
        multi_worker_trial._train_worker(config, open_path(path), loop)
    (path / "threads.json").write_text(json.dumps(found))


def test_a_worker_has_the_threads_that_its_trial_gives_it(tmp_path: Path) -> None:
    in_processes(1, share_with_threads, 3, tmp_path)
    assert json.loads((tmp_path / "threads.json").read_text()) == [3]


@pytest.mark.parametrize(("cpus", "threads"), [(0.49, 1), (0.99, 1), (1.0, 1), (2.99, 3)])
def test_a_trial_gives_each_worker_a_thread_for_each_whole_cpu(
    cpus: float, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial's own process holds a hundredth of a CPU, which is taken from the workers'."""
    given: dict[str, Any] = {}
    # Ray's own works within a trial only.
    monkeypatch.setattr(multi_worker_trial, "TuneReportCallback", ray.train.UserCallback)
    monkeypatch.setattr(
        ray.train.torch, "TorchTrainer", lambda work, **options: given.update(options)
    )
    multi_worker_trial._build_torch_trainer(
        tiny("at"), open_path(tmp_path / "trials" / "0000"), 2, {"CPU": cpus, "GPU": 0}, None, None
    )
    assert given["train_loop_config"]["threads"] == threads
