"""The host does not wait for the device: shown without a device, by whose reads a GPU would be made
to catch up.

On torch's `meta` device tensors have shapes but no numbers, so that reading one raises; numbers
that come from the host are seen by what brings them. On a GPU either makes the host wait for all
that it has asked for.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from robust_digits import digits as robust_images
from robust_digits import robust_digits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raysweep.attacks import APGD, FAB, AnyAttack, Square
from raysweep.data import DatasetSplits
from raysweep.models.layers import Logits
from raysweep.rng import ExampleRng
from raysweep.training.config import build_training_config
from raysweep.training.diagnostics import EpochDiagnostics
from raysweep.training.trainer import build_model_variants, compute_step_gradients
from raysweep.worker_group import SINGLE_WORKER, WorkerGroup

META = torch.device("meta")


class Brought(TorchDispatchMode):
    """Functions that bring numbers from the host to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.by: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        if len(devices) > 1 or (devices == {"meta"} and func is torch.ops.aten.lift_fresh.default):
            self.by.append(str(func))
        return out


class Read(TorchDispatchMode):
    """How often a number of a tensor decides what the host does next."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        masks = func in (aten.index.Tensor, aten.index_put_.default) and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        self.count += masks or func in (aten._local_scalar_dense.default, aten.nonzero.default)
        return func(*args, **(kwargs or {}))


class TwoWorkers:
    """As one of two sees it."""

    size, rank = 2, 0

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        return value.detach().clone()

    def start_sum(self, value: Tensor) -> Callable[[], Tensor]:
        return lambda: value


@pytest.mark.parametrize("workers", [SINGLE_WORKER, TwoWorkers()], ids=["one", "two"])
@pytest.mark.parametrize("method", ["gairat", "lrat", "trades", "mart", "mail-at", "piecewise"])
def test_a_training_step_waits_for_nothing(
    method, workers: WorkerGroup, digits: DatasetSplits, monkeypatch
) -> None:
    # There is no autocast for meta to leave.
    monkeypatch.setattr(Logits, "forward", nn.Linear.forward)
    changes = {"data.augment": True, "batch_size": 32, "*.attacks.*.steps": 3}
    if method == "piecewise":
        method, weight = "gairat", "method.terms.pgd.weight"
        changes |= {
            f"{weight}.shape": "piecewise",
            f"{weight}.table": [2.0, 1.0],
            f"{weight}.burn_in": 0,
        }
    config = build_training_config(method, changes)
    settings, data = config.resolve_at(config.epochs - 1), digits.to(META)
    with monkeypatch.context() as start:
        # The checks of the model, once at the start, compare numbers.
        start.setattr(torch, "equal", lambda first, second: True)
        start.setattr("raysweep.training.trainer.can_use_channels_last", lambda *_: True)
        start.setattr("raysweep.training.model_variants.follows_model", lambda *_: True)
        faces = build_model_variants(config, digits, META, workers)
    optimizer = torch.optim.SGD(faces.model.parameters(), lr=0.1, momentum=0.9)
    seen, brought = EpochDiagnostics(settings.method, workers), []
    batches = data.iter_train_batches(32, 0, 0, workers.rank, workers.size)
    faces.model.train()
    for _ in range(2):
        with Brought() as counted:
            batch = next(batches)
            step = compute_step_gradients(
                settings.method, faces, batch, ExampleRng.for_examples(batch.index, 0), workers
            )
            optimizer.step()
            seen.add_batch(step, batch.y)
        brought.append(counted.by)
    first, second = brought
    assert first, "the order of the epoch, and what histograms and tables need"
    assert second == []


@pytest.mark.parametrize(
    "attack",
    [
        APGD(eps=0.1, steps=60),
        APGD(eps=0.1, steps=60, loss="dlr-targeted", targets=1),
        FAB(eps=0.1, steps=60, targets=1),
        Square(eps=0.1, queries=60),
        Square(eps=0.3, queries=60, norm="L2"),
    ],
    ids=repr,
)
def test_an_evaluations_attack_looks_now_and_then(attack: AnyAttack, monkeypatch) -> None:
    model, (x, y) = robust_digits(), robust_images(8)
    rng = ExampleRng.for_examples(torch.arange(8), 0)
    counts = []
    for cheap in (True, False):
        for module in ("base", "apgd", "fab", "square"):
            monkeypatch.setattr(
                f"raysweep.attacks.{module}.is_on_cpu", lambda x, cheap=cheap: cheap
            )
        with Read() as read:
            attack(model, x, y, rng)
        counts.append(read.count)
    often, seldom = counts
    assert often > 60 and seldom < 20
