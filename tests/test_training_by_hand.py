"""Whole training runs against a loop written out by hand: order, starts, attack, weights, loss and
SGD.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference_rng import crop_and_flip, hash_stream_name, shuffle_rows, uniform
from safetensors.torch import load_file
from torch import Tensor, nn

from raysweep.data import DatasetSplits, Split, load_data
from raysweep.models.digits_cnn import digits_cnn
from raysweep.training.config import TrainingConfig, build_training_config
from raysweep.training.trainer import train_model

ROWS, BATCH, SEED, STEPS, STEP_SIZE, LAM = 36, 16, 3, 2, 0.05, -1.0
# Learning rate, weight decay and epsilon of each epoch. Large, so that a term that is left out
# shows.
PLAN = [(0.05, 0.05, 0.1), (0.02, 0.05, 0.2), (0.02, 0.2, 0.2)]
PLAIN = {"compute.channels_last": False, "compute.fold": False}
# Settings that do not matter here are cheap.
QUICK = {
    "validation.attacks": {"pgd": {"kind": "pgd", "steps": 1}},
    "validation.finish": {},
    "validation.scales": [],
}


def piecewise(values: list[float]) -> dict[str, Any]:
    return {"kind": "piecewise", "boundaries": [1, 2], "values": values}


def config(method: str, **changes: Any) -> TrainingConfig:
    lr, weight_decay, eps = (piecewise(list(values)) for values in zip(*PLAN, strict=True))
    settings = {
        "epochs": 3, "batch_size": BATCH, "seed": SEED, "data.val_size": 20,
        "data.train_size": ROWS,
        "optim.lr": lr, "optim.weight_decay": weight_decay, "method.attacks.pgd.steps": STEPS,
        "method.attacks.pgd.eps": eps, "method.attacks.pgd.step_size": STEP_SIZE, **QUICK, **PLAIN,
    }  # fmt: skip
    return build_training_config(
        method, settings, {key.replace("__", "."): value for key, value in changes.items()}
    )


class ByHand:
    """Adversarial training with SGD on the images of a split, step by step."""

    def __init__(
        self,
        split: Split,
        momentum: float = 0.9,
        nesterov: bool = False,
        augment: bool = False,
        burn_in: int = 3,
        l2: bool = False,
    ) -> None:
        torch.manual_seed(hash_stream_name(SEED, "weights") >> 1)
        self.model = nn.Sequential(digits_cnn(1, 10))
        self.buffers: dict[str, Tensor] = {}
        self.losses, self.right = [], []
        for epoch, (lr, weight_decay, eps) in enumerate(PLAN):
            loss_sum, right = 0.0, 0
            order = shuffle_rows(ROWS, SEED, "order", epoch)
            for first in range(0, ROWS, BATCH):
                rows = order[first : first + BATCH]
                x, y = split.x[rows].float() / 16, split.y[rows]
                examples = split.index[rows].tolist()
                if augment:
                    x = torch.stack(
                        [crop_and_flip(x[i], SEED, epoch, n) for i, n in enumerate(examples)]
                    )
                x_adv, kappa = self.attack_by_hand(x, y, examples, epoch, eps, l2)
                weight = torch.ones(len(y))
                if epoch >= burn_in:
                    weight = (1 + torch.tanh(LAM + 5 * (1 - 2 * kappa / STEPS))) / 2
                    weight = weight / weight.mean()
                self.model.train()
                logits = self.model(x_adv)
                loss = (weight * F.cross_entropy(logits, y, reduction="none")).sum() / len(y)
                loss_sum += loss.item() * len(y)
                right += int((logits.argmax(1) == y).sum())
                self.update(loss, lr, weight_decay, momentum, nesterov)
            self.losses.append(loss_sum / ROWS)
            self.right.append(right / ROWS)

    def attack_by_hand(
        self, x: Tensor, y: Tensor, examples: list[int], epoch: int, eps: float, l2: bool
    ) -> tuple[Tensor, Tensor]:
        """PGD's point and the number of its right iterates; it starts at random, in L2 at the image
        itself.
        """
        self.model.eval()
        x_adv, kappa = x, torch.zeros(len(y))
        if not l2:
            key = hash_stream_name(hash_stream_name(SEED, "train", epoch), "attack", "pgd")
            noise = torch.tensor([uniform(key, example, 64) for example in examples]).view_as(x)
            x_adv = (x + eps * (noise * 2 - 1)).clamp(0, 1)
        for _ in range(STEPS):
            leaf = x_adv.clone().requires_grad_()
            logits = self.model(leaf)
            kappa += (logits.argmax(1) == y).float()
            (grad,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), leaf)
            if l2:
                moved = x_adv + STEP_SIZE * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                length = (moved - x).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                x_adv = torch.where(length > eps, x + (moved - x) * eps / length, moved).clamp(0, 1)
            else:
                moved = x_adv + STEP_SIZE * grad.sign()
                x_adv = torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp(0, 1)
        return x_adv, kappa

    def update(
        self, loss: Tensor, lr: float, weight_decay: float, momentum: float, nesterov: bool
    ) -> None:
        """The momentum accumulates g + weight decay x w; Nesterov looks one step ahead."""
        grads = torch.autograd.grad(loss, list(self.model.parameters()))
        with torch.no_grad():
            for (name, parameter), grad in zip(self.model.named_parameters(), grads, strict=True):
                grad = grad.add(parameter, alpha=weight_decay)
                if momentum:
                    before = self.buffers.get(name)
                    self.buffers[name] = grad if before is None else (before * momentum).add(grad)
                    grad = (
                        grad.add(self.buffers[name], alpha=momentum)
                        if nesterov
                        else self.buffers[name]
                    )
                parameter.add_(grad, alpha=-lr)


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(
        (found[name].double() - value.double()).abs().max().item()
        for name, value in expected.items()
    )


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "momentum": ("at", {}, {}),
    "nesterov": ("at", {"optim__nesterov": True}, {"nesterov": True}),
    "no momentum": ("at", {"optim__momentum": 0.0}, {"momentum": 0.0}),
    "augmented": ("at", {"data__augment": True}, {"augment": True}),
    "weights after a burn-in": ("gairat", {"*.burn_in": 1, "*.lam": LAM}, {"burn_in": 1}),
}


@pytest.fixture(scope="module")
def part() -> DatasetSplits:
    return load_data(config("at").data)


@pytest.mark.parametrize("case", CASES)
def test_a_run_equals_the_loop_by_hand(case: str, tmp_path: Path, part: DatasetSplits) -> None:
    method, changes, reference_rng = CASES[case]
    data = replace(part, augment=bool(reference_rng.get("augment")))
    saved = train_model(config(method, **changes), tmp_path, data=data).last_checkpoint
    expected = ByHand(data.train, **reference_rng)
    assert (
        largest_difference(
            load_file(saved.local_folder / "weights.safetensors"), expected.model.state_dict()
        )
        < 1e-6
    )
    if expected.buffers:
        assert (
            largest_difference(
                load_file(saved.local_folder / "state.safetensors"), expected.buffers
            )
            < 1e-5
        )
    rows = saved.history
    assert [row["train/lr"] for row in rows] == [0.05, 0.02, 0.02]
    assert [row["train/loss"] for row in rows] == pytest.approx(expected.losses, rel=1e-5)
    assert [row["train/pgd"] for row in rows] == pytest.approx(expected.right)


def test_attacks_use_the_weights_of_their_own_step_also_on_the_fast_paths(
    tmp_path: Path, part: DatasetSplits
) -> None:
    """Folded batch norms and channels last change only rounding. In L2, where a last bit flips no
    sign.
    """
    changes = {"method__attacks__pgd__norm": "L2", "method__attacks__pgd__start": "natural"}
    fast = {"compute__fold": True, "compute__channels_last": True}
    saved = train_model(config("at", **changes, **fast), tmp_path, data=part).last_checkpoint
    expected = ByHand(part.train, l2=True)
    assert (
        largest_difference(
            load_file(saved.local_folder / "weights.safetensors"), expected.model.state_dict()
        )
        < 1e-4
    )
