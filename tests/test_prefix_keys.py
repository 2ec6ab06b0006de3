"""The keys of shared states: every setting either changes the weights and the keys, or is known not
to.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from raysweep.data import DatasetSplits
from raysweep.spec import apply_overrides, flatten_spec
from raysweep.training import checkpoint
from raysweep.training.callbacks import FunctionCallback
from raysweep.training.checkpoint import RunDirectory
from raysweep.training.config import TrainingConfig, build_training_config
from raysweep.training.prefix_cache import PrefixCache, prefix_keys
from raysweep.training.trainer import train_model

PGD = ("eps", "step_size", "steps", "confidence")
ATTACKS = [f"method.attacks.{name}" for name in ("pgd", "cw")] + [
    f"validation.attacks.{n}" for n in ("pgd", "cw")
]
# Settings that do not change the state after an epoch, with another value for each.
FREE: dict[str, Any] = {
    "method.name": "other",
    "data.name": "arrays",
    "data.data_dir": "/elsewhere",
    "data.download": True,
    "epochs": 5,
    "collapse_after": None,
}
# Another value for each setting that is neither a number nor a switch, or that allows few values.
OTHER: dict[str, Any] = {
    **{
        f"{attack}.{key}": value
        for attack in ATTACKS
        for key, value in (("norm", "L2"), ("tau", 1), ("mode", "train"))
    },
    **{f"{attack}.start": "gaussian" for attack in ATTACKS},
    **{f"{attack}.loss": "kl" for attack in ATTACKS},
    "data.augment": True,
    "data.train_size": 64,
    "data.unlabeled": "/more.npz",
    "data.unlabeled_fraction": 0.25,
    "data.allow_missing_classes": True,
    "model.name": "small_cnn",
    "model.mean": [0.5],
    "model.std": [0.5],
    "optim.lr": 0.03,
    "optim.momentum": 0.5,
    "validation.size": 20,
    "validation.objective": "clean",
    "validation.split": "test",
    "validation.window": [1, 2],
    "validation.scales": [10.0],
    "validation.finish.apgd_t.loss": "ce",
    "validation.finish.multi_targeted.norm": "L2",
    "compute.channels_last": False,
    "compute.fold": False,
    "compute.attack": "bf16",
    "compute.train": "bf16",
    "validation.train_examples": 7,
    "method.terms.pgd.on": "natural+pgd",
    "method.terms.cw.on": "natural+cw",
    "method.terms.bound.on": "pgd",
    "method.terms.bound.weight.of": ["pgd"],
    **{f"method.terms.{term}.loss": "bce" for term in ("pgd", "cw", "bound")},
    **{f"method.terms.{term}.weight.by": "natural" for term in ("pgd", "cw")},
}
# Not changed here: `kind` decides which other settings a part has; TF32 and some others are refused
# on a CPU; code belongs to a network of one's own (test_code_files.py).
ELSEWHERE = (".kind", "optim.lr.", "compute.tf32", "model.code")


def base() -> TrainingConfig:
    return build_training_config(
        "lrat", {"epochs": 3, "optim.lr": 0.05, "optim.weight_decay": 0.001}
    )


def changed_value(path: str, value: Any) -> Any:
    if path in OTHER:
        return OTHER[path]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    assert isinstance(value, float), f"{path} = {value!r} needs an entry in OTHER"
    return value * 0.75 if value else 0.5


def settings() -> list[str]:
    return [
        path
        for path in flatten_spec(base())
        if path not in FREE and not any(part in path for part in ELSEWHERE)
    ]


@pytest.mark.parametrize("path", settings())
def test_a_setting_that_decides_the_weights_changes_the_keys(path: str) -> None:
    config = base()
    changes = {path: changed_value(path, flatten_spec(config)[path])}
    if path in ("model.mean", "model.std"):
        changes = {"model.mean": [0.5], "model.std": [0.5]}
    other = prefix_keys(apply_overrides(config, changes), "data")
    assert not set(other[1:]) & set(prefix_keys(config, "data")[1:])


def test_a_setting_that_decides_no_weight_leaves_the_keys() -> None:
    config = base()
    assert set(FREE) <= set(flatten_spec(config))
    keys = prefix_keys(config, "data")
    for path, value in FREE.items():
        assert prefix_keys(apply_overrides(config, {path: value}), "data")[:4] == keys, path


def test_one_key_for_each_epoch_and_one_before() -> None:
    keys = prefix_keys(base(), "data")
    assert len(keys) == 4 == len(set(keys))
    assert prefix_keys(apply_overrides(base(), {"epochs": 1}), "data") == keys[:2]


def test_data_workers_device_threads_and_versions_change_every_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = apply_overrides(base(), {"compute.channels_last": True, "compute.fold": True})
    found = [
        prefix_keys(config, "data"),
        prefix_keys(config, "other data"),
        prefix_keys(config, "data", n_workers=2),
    ]
    found.append(prefix_keys(config, "data", device=torch.device("meta")))
    assert prefix_keys(config, "data", 1, torch.device("cpu")) == found[0]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 64)
        found.append(prefix_keys(config, "data"))
    known = checkpoint.describe_environment()
    for name in ("raysweep", "torch", "device"):
        with monkeypatch.context() as patch:
            patch.setattr(
                checkpoint, "describe_environment", lambda name=name: known | {name: "another"}
            )
            found.append(prefix_keys(config, "data"))
    assert len({key for keys in found for key in keys}) == 4 * len(found)


def test_the_key_of_a_state_depends_on_the_settings_of_all_epochs_before_it() -> None:
    """Epochs 2 and 3 have the same settings, but start from different weights."""
    lr = [{"kind": "piecewise", "boundaries": [1], "values": [first, 0.01]} for first in (0.1, 0.2)]
    one, two = (prefix_keys(apply_overrides(base(), {"optim.lr": value}), "data") for value in lr)
    assert one[0] == two[0] and not set(one[1:]) & set(two[1:])


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_schedule_changes_the_keys_from_its_own_epoch_on(epoch: int) -> None:
    for path in (
        "optim.lr",
        "optim.weight_decay",
        "method.attacks.pgd.eps",
        "method.terms.cw.weight.beta",
    ):
        steady = apply_overrides(base(), {path: 0.2, "method.attacks.pgd.eps": 0.2})
        late = apply_overrides(
            steady, {path: {"kind": "piecewise", "boundaries": [epoch], "values": [0.2, 0.1]}}
        )
        keys, other = prefix_keys(steady, "data"), prefix_keys(late, "data")
        assert keys[: epoch + 1] == other[: epoch + 1] and not set(keys[epoch + 1 :]) & set(
            other[epoch + 1 :]
        ), path


def test_rates_by_step_are_shared_by_runs_of_the_same_schedule_only() -> None:
    """Two schedules may begin an epoch with the same rate and go on with others."""
    by_step = apply_overrides(base(), {"optim.lr_per_step": True})
    rising, falling = (
        apply_overrides(
            by_step, {"optim.lr": {"kind": "interpolated", "epochs": [0, 3], "values": [0.1, last]}}
        )
        for last in (0.2, 0.05)
    )
    assert rising.resolve_at(0) == falling.resolve_at(0)
    assert not set(prefix_keys(rising, "data")[1:]) & set(prefix_keys(falling, "data")[1:])
    again = apply_overrides(rising, {"epochs": 2})
    assert prefix_keys(again, "data") == prefix_keys(rising, "data")[:3]


QUICK: dict[str, Any] = {
    "epochs": 3, "batch_size": 64, "validation.attacks": {"pgd": {"kind": "pgd", "steps": 1}},
    "validation.finish": {},
    "validation.scales": [], "validation.objective": "clean",
}  # fmt: skip


def store_untrained_states(
    path: Path,
    config: TrainingConfig,
    data: DatasetSplits,
    clean: tuple[float, ...],
    epochs: set[int],
) -> PrefixCache:
    """Store states of an untrained network with the given accuracies."""
    prefixes, keys = PrefixCache(path / "prefixes"), prefix_keys(config, data.fingerprint)
    model = config.model.build_model(1, 10, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = [
        {"epoch": float(epoch), "clean": share, "train/seconds": 9.0}
        for epoch, share in enumerate(clean, 1)
    ]
    for epoch in epochs:
        saved = checkpoint.save_checkpoint(
            path / "first" / str(epoch),
            config,
            checkpoint.TrainingState.copy_from(model, optimizer),
            rows[:epoch],
            data.fingerprint,
        )
        prefixes.store_state(keys[epoch], saved.local_folder)
    return prefixes


def test_the_longest_prefix_comes_with_its_best_epoch(
    tmp_path: Path, digits: DatasetSplits
) -> None:
    config = build_training_config("standard", QUICK)
    prefixes = store_untrained_states(tmp_path, config, digits, (0.3, 0.9, 0.5), {1, 2, 3})
    told: list[tuple[float, float, float]] = []
    fitted = train_model(
        config,
        tmp_path / "run",
        FunctionCallback(
            lambda row, saved: told.append((row["clean"], row["shared"], row["train/seconds"]))
        ),
        data=digits,
        prefix_cache=prefixes,
    )
    assert told == [(0.3, 1.0, 0.0), (0.9, 1.0, 0.0), (0.5, 1.0, 0.0)]
    assert RunDirectory(tmp_path / "run").list_saved_epochs() == [2, 3]
    assert (
        fitted.best_checkpoint.epoch,
        len(fitted.best_checkpoint.history),
        fitted.last_checkpoint.epoch,
    ) == (2, 2, 3)


def test_a_prefix_without_its_best_epoch_is_not_used(tmp_path: Path, digits: DatasetSplits) -> None:
    """Epoch 2 was evicted at the size limit: the run reuses epoch 1, trains epoch 2, and reuses
    epoch 3 afterwards.
    """
    config = build_training_config("standard", QUICK)
    prefixes = store_untrained_states(tmp_path, config, digits, (0.3, 0.9, 0.5), {1, 3})
    fitted = train_model(config, tmp_path / "run", data=digits, prefix_cache=prefixes)
    history = fitted.last_checkpoint.history
    assert [row.get("shared") for row in history] == [1.0, None, 1.0]
    assert history[1]["train/seconds"] > 0 and history[1]["clean"] < 0.5 == history[2]["clean"]
    assert fitted.best_checkpoint.epoch == 3 and fitted.best_checkpoint.history == history


def test_a_run_that_has_begun_reuses_later_states(tmp_path: Path, digits: DatasetSplits) -> None:
    config = build_training_config("standard", QUICK)
    train_model(
        build_training_config("standard", QUICK, {"epochs": 1}), tmp_path / "run", data=digits
    )
    prefixes = store_untrained_states(tmp_path, config, digits, (0.3, 0.9, 0.5), {2, 3})
    history = train_model(
        config, tmp_path / "run", data=digits, prefix_cache=prefixes
    ).last_checkpoint.history
    assert [row.get("shared") for row in history] == [None, 1.0, 1.0]
    assert [row["clean"] for row in history[1:]] == [0.9, 0.5]
