"""Several worker processes train what one does: gradients, batch norm, weights, checkpoints. No Ray
here.
"""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked_processes
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import tiny
from free_ports import choose_free_port
from safetensors.torch import load_file
from test_preemption import same_run
from torch import nn

from raysweep.catalog import METHODS
from raysweep.data import DataSpec, load_data
from raysweep.method import Method
from raysweep.models import ModelSpec
from raysweep.rng import ExampleRng
from raysweep.spec import SpecError, apply_overrides
from raysweep.training import checkpoint
from raysweep.training.callbacks import FunctionCallback
from raysweep.training.checkpoint import RunDirectory
from raysweep.training.config import TrainingConfig
from raysweep.training.distributed import DistributedWorkerGroup, WorkerLost, average_gradients
from raysweep.training.mid_epoch_checkpoint import TrainingInterrupted
from raysweep.training.sync_batchnorm import _compute_global_statistics, convert_sync_batchnorm
from raysweep.training.trainer import TrainingResult, train_model
from raysweep.worker_group import SINGLE_WORKER, WorkerGroup

CHANGES: dict[str, dict[str, Any]] = {
    "at": {},
    "gairat": {"terms.pgd.weight.burn_in": 0},
    "lrat": {"terms.bound.weight.total": 4.5},
    "at, attacked in train mode": {"attacks.pgd.mode": "train"},
}
# Shares of 15 + 15 or 10 + 10 + 10 rows, of 12 + 11 or 8 + 8 + 7, and a last batch of one row: some
# have none at all.
ROWS, BATCH = 54, (30, 23, 1)


def method(name: str) -> Method:
    return apply_overrides(METHODS[name.split(",")[0]](), {**CHANGES[name], "attacks.*.steps": 2})


def in_processes(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(*arguments)` in `size` processes of one gloo group."""
    port = choose_free_port()
    forked_processes.FORKS.set_forkserver_preload(forked_processes.TRAINING)
    mp.start_processes(
        _joined, (size, port, work, arguments), nprocs=size, start_method="forkserver"
    )


def _joined(
    rank: int, size: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    work(*arguments)
    dist.destroy_process_group()


def steps(workers: WorkerGroup) -> dict[str, torch.Tensor]:
    """Float64 gradients and batch norm statistics after each batch of an epoch, for each method, on
    CNN and digits.
    """
    split = load_data(DataSpec(name="digits", val_size=50, train_size=ROWS)).train
    found = {}
    for name in CHANGES:
        model = ModelSpec(name="digits_cnn").build_model(1, 10, 0).double().train()
        if workers.size > 1:
            model = convert_sync_batchnorm(model, workers)
        for number, rows in enumerate(torch.arange(ROWS).split(BATCH)):
            mine = rows[workers.rank :: workers.size]
            model.zero_grad()
            rng = ExampleRng.for_examples(split.index[mine], 0, "train", number)
            step = method(name)(
                model, split.get_float_images(mine).double(), split.y[mine], rng, workers
            )
            with average_gradients(model, workers):
                step.loss.backward()
            found |= {f"{name} {number} loss": workers.all_reduce_sum(step.loss) / workers.size}
            found |= {f"{name} {number} {k}": p.grad.clone() for k, p in model.named_parameters()}
            found |= {f"{name} {number} {k}": b.clone() for k, b in model.named_buffers()}
    return found


def config(name: str = "gairat", **changes: Any) -> TrainingConfig:
    """Batches of 32, 32 and 1 rows.

    In L2, where attacks take steps that change smoothly: a sign may flip with the last bit of a
    gradient near 0, and then a run drifts away from its own copy of one worker just as far.
    """
    burn_in = {"method__terms__pgd__weight__burn_in": 1} if name == "gairat" else {}
    changes = {
        f"method__attacks__{attack}__norm": "L2" for attack in METHODS[name]().attacks
    } | changes
    return tiny(name, data__train_size=65, **burn_in, **changes)


class Enough(Exception):
    """Raised by a report to end training early."""


def one_epoch(path: Path, workers: WorkerGroup) -> None:
    def stop(metrics: dict[str, float], saved: checkpoint.TrainingCheckpoint) -> None:
        raise Enough

    with pytest.raises(Enough):
        train_model(config(), path, FunctionCallback(stop), workers=workers)


def leave_after(n_steps: int, path: Path, workers: WorkerGroup) -> None:
    """Train some steps more; all workers count the same."""
    steps_left = iter(range(n_steps - 1, -1, -1))
    callback = FunctionCallback(should_interrupt=lambda: next(steps_left) == 0)
    with pytest.raises(TrainingInterrupted):
        train_model(config(), path, callback, workers=workers)


def train_and_resume(path: Path) -> None:
    workers = DistributedWorkerGroup()
    reported: list[dict[str, float]] = []
    train_model(
        config(),
        path / "several",
        FunctionCallback(lambda metrics, saved: reported.append(metrics)),
        workers=workers,
    )
    train_model(config("lrat"), path / "lrat", workers=workers)
    # After the first of the two steps of an epoch, then after the last one of the second epoch.
    for folder, n_steps in (("handed over at a step", 1), ("left", 1), ("left", 3)):
        leave_after(n_steps, path / folder, workers)
    train_model(config(), path / "left", workers=workers)
    one_epoch(path / "handed over", workers)
    train_model(config(), path / "taken over", workers=workers)
    (path / f"{workers.rank}.json").write_text(json.dumps(reported))


def save_steps(path: Path) -> None:
    torch.save(steps(DistributedWorkerGroup()), path / f"{dist.get_rank()}.pt")


def train_and_compare(path: Path) -> None:
    save_steps(path)
    train_and_resume(path)


def difference(one: Path, two_workers: Path) -> float:
    """The greatest between the weights of two checkpoints with the same names of tensors."""
    a, b = load_file(one / "weights.safetensors"), load_file(two_workers / "weights.safetensors")
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two workers wrote."""
    path = tmp_path_factory.mktemp("two")
    one_epoch(path / "taken over", SINGLE_WORKER)
    in_processes(2, train_and_compare, path)
    return path


@pytest.fixture(scope="module")
def three_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("three")
    in_processes(3, save_steps, path)
    return path


@pytest.fixture(scope="module")
def single_worker_steps() -> dict[str, torch.Tensor]:
    return steps(SINGLE_WORKER)


@pytest.fixture(scope="module")
def trained_alone(tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return train_model(config(), tmp_path_factory.mktemp("one"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_worker_processes_give_the_gradient_of_one(size: int, single_worker_steps, request) -> None:
    path = request.getfixturevalue({2: "two_workers", 3: "three_workers"}[size])
    worst = 0.0
    for rank in range(size):
        several = torch.load(path / f"{rank}.pt")
        assert several.keys() == single_worker_steps.keys()
        worst = max(
            worst,
            *(
                (several[key] - value).abs().max().item()
                for key, value in single_worker_steps.items()
            ),
        )
    print(f"{size} workers: greatest difference {worst:.1e}")
    assert worst < 1e-10


def test_two_workers_train_the_weights_of_one(
    two_workers: Path, trained_alone: TrainingResult, tmp_path: Path
) -> None:
    assert (
        difference(
            two_workers / "several" / "epoch-0002", trained_alone.last_checkpoint.local_folder
        )
        < 1e-5
    )
    lrat = train_model(config("lrat"), tmp_path / "lrat").last_checkpoint
    assert difference(two_workers / "lrat" / "epoch-0002", lrat.local_folder) < 2e-5


def test_workers_that_leave_an_epoch_resume_with_the_same_bits(
    two_workers: Path, trained_alone: TrainingResult, tmp_path: Path
) -> None:
    same_run(two_workers / "several", two_workers / "left")
    assert not (two_workers / "left" / "half").exists()
    # One worker continues what two of them left, with the sums of both.
    run = shutil.copytree(two_workers / "handed over at a step", tmp_path / "run")
    assert (run / "half" / "seen-1.safetensors").is_file()
    resumed, alone = train_model(config(), run).last_checkpoint, trained_alone.last_checkpoint
    assert difference(resumed.local_folder, alone.local_folder) < 1e-5
    for row, expected in zip(resumed.history, alone.history, strict=True):
        assert row == pytest.approx(
            {**expected, **{key: row[key] for key in row if "seconds" in key}}, abs=1e-5
        )


def test_every_worker_reports_the_metrics_of_one(
    two_workers: Path, trained_alone: TrainingResult
) -> None:
    first, second = (json.loads((two_workers / f"{rank}.json").read_text()) for rank in range(2))
    assert (
        first
        == second
        == checkpoint.read_checkpoint(two_workers / "several" / "epoch-0002").history
    )
    for several, one in zip(first, trained_alone.last_checkpoint.history, strict=True):
        assert several.keys() == one.keys()
        timed = {key for key in one if "seconds" in key}
        assert {k: v for k, v in several.items() if k not in timed} == pytest.approx(
            {k: v for k, v in one.items() if k not in timed}, abs=1e-5
        )


def test_two_workers_save_the_verdicts_of_one(
    two_workers: Path, trained_alone: TrainingResult
) -> None:
    """Each has every second example; the files have all of them in their order."""
    alone = RunDirectory(trained_alone.best_checkpoint.path.parent)
    epoch = trained_alone.best_checkpoint.epoch
    verdicts = alone.read_verdicts(epoch)
    assert verdicts is not None and 0 < verdicts.mask.mean() < 1
    assert RunDirectory(two_workers / "several").read_verdicts(epoch) == verdicts


def test_a_checkpoint_goes_from_two_workers_to_one_and_back(
    two_workers: Path, trained_alone: TrainingResult, tmp_path: Path
) -> None:
    epochs: list[int] = []
    run = shutil.copytree(two_workers / "handed over", tmp_path / "run")
    handed = train_model(
        config(),
        run,
        FunctionCallback(lambda metrics, saved: epochs.append(saved.epoch)),
        n_reported_epochs=1,
    ).last_checkpoint
    assert epochs == [2]
    assert difference(handed.local_folder, trained_alone.last_checkpoint.local_folder) < 1e-5
    assert (
        difference(
            two_workers / "taken over" / "epoch-0002", trained_alone.last_checkpoint.local_folder
        )
        < 1e-5
    )


def test_the_first_writes_and_the_others_do_not(two_workers: Path) -> None:
    assert not list(two_workers.glob("*/.epoch-*"))
    assert RunDirectory(two_workers / "several").list_saved_epochs()[-1] == 2


class Second:
    """The second of two workers, alone: sums are its own."""

    size, rank = 2, 1

    def all_reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def start_sum(self, value: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: value


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, affine=False)]
)
@pytest.mark.parametrize("training", [True, False])
def test_synchronised_batch_norm_is_batch_norm_by_another_sum(
    norm: nn.BatchNorm2d, training: bool
) -> None:
    x = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    theirs, ours = copy.deepcopy(norm), convert_sync_batchnorm(copy.deepcopy(norm), Second())
    for module in (theirs, ours):
        module.train()
        module(x + 1)
        module.train(training)
    assert torch.allclose(theirs(x), ours(x), atol=1e-5)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.allclose(ours.state_dict()[k], v) for k, v in theirs.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_synchronised_batch_norm_has_the_gradients_of_batch_norm(
    dtype: torch.dtype, affine: bool
) -> None:
    """In channels-last memory too, with a mean far from 0, and against float64."""
    generator = torch.Generator().manual_seed(0)
    plain = nn.BatchNorm2d(3, affine=affine).double()
    if affine:
        nn.init.uniform_(plain.weight, generator=generator)
    ours = convert_sync_batchnorm(copy.deepcopy(plain).float(), Second())
    x = (torch.rand(6, 3, 4, 4, generator=generator) + 3).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    grad = torch.rand(6, 3, 4, 4, generator=generator).to(dtype)
    found = []
    for module, point in ((plain, x.double()), (ours, x.clone())):
        point.requires_grad_()
        out = module(point)
        out.backward(grad.to(out.dtype))
        found.append([out.detach(), point.grad, *(p.grad for p in module.parameters())])
    assert found[1][0].dtype == found[1][1].dtype == dtype
    for expected, value in zip(*found, strict=True):
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        assert (value - expected).abs().max() < tolerance * (1 + expected.abs().max())


def test_a_group_that_ends_under_a_worker_is_a_lost_peer(tmp_path: Path) -> None:
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    workers = DistributedWorkerGroup()
    dist.destroy_process_group()  # as Ray Train does in the others when one has died
    with pytest.raises(WorkerLost):
        workers.all_reduce_sum(torch.zeros(1))
    with pytest.raises(WorkerLost):
        DistributedWorkerGroup()


def test_an_attack_that_would_leave_workers_waiting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"attacks\.pgd: mode train with tau"):
        train_model(
            tiny("at", method__attacks__pgd__mode="train", method__attacks__pgd__tau=1),
            tmp_path,
            workers=Second(),
        )


class Alone:
    """One worker that counts as a group: sums are its own."""

    size, rank = 1, 0

    def all_reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def start_sum(self, value: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_statistics_of_half_precision_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = (
        100
        + torch.rand(64, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).to(dtype)
    found = _compute_global_statistics(x, Alone())
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = x.double().transpose(0, 1).flatten(1)
    expected = torch.cat([torch.tensor([1024.0]), exact.mean(1), exact.var(1, correction=0)])
    assert torch.allclose(found.double(), expected, rtol=1e-12 if dtype == torch.float64 else 1e-4)
