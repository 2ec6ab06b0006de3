"""Default settings of each data set: threat model, network and number of epochs.

Whatever a user writes overrides them: a method that is written out, a preset, a search space or
`--set`. `*` in a path matches any characters. A path is skipped if the method has no such setting.
All methods have one threat model and one optimizer on a data set, so that their results can be
compared; the papers' own settings are in the presets.

Sweeps of 0.1 do not store the defaults that they use, so the values in `DATASET_DEFAULTS` must not
change: see `build_training_config_of_0_1`.
"""

from pathlib import Path
from typing import Any

from raysweep.data import ImageShape, read_image_shape
from raysweep.user_folders import expand_home

# Threat model of GAIRAT, section 4.1 (and of Rice et al. 2020), network and optimizer of its
# appendix C.3: the learning rate drops at epochs 30 and 60 of 100, counted from 1.
_COLOR_IMAGES: dict[str, Any] = {
    "*.eps": 8 / 255,
    "*.step_size": 2 / 255,
    "*.d_max": 12 / 255,
    "model.name": "resnet18",
    "data.val_size": 1000,
    "epochs": 100,
    "optim.weight_decay": 5e-4,
}

# Data sets whose defaults are those of raysweep 0.1: digests of pipelines need no mark for them.
UNCHANGED_SINCE_0_1 = frozenset({"digits", "mnist"})

# Name of a data set -> {dotted path: value}.
DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "*.eps": 0.15,
        "*.step_size": 0.03,
        "*.d_max": 0.225,
        "*.burn_in": 3,
        "*.tau.boundaries": [3, 6],
        "data.val_size": 300,
        "model.name": "digits_cnn",
        "epochs": 8,
        "collapse_after": 4,
        "batch_size": 64,
        "optim.lr": {"kind": "piecewise", "boundaries": [5, 7], "values": [0.05, 0.01, 0.002]},
    },
    "mnist": {
        "*.eps": 0.3,
        "*.step_size": 0.04,
        "*.d_max": 0.45,
        "*.burn_in": 10,
        "*.tau.boundaries": [10, 20],
        "data.val_size": 5000,
        "model.name": "digits_cnn",
        "epochs": 30,
        "optim.lr": {"kind": "piecewise", "boundaries": [20, 27], "values": [0.05, 0.005, 0.0005]},
    },
    # Rice et al. 2020 split off 1,000 validation examples. Evaluating them every second epoch takes
    # 6% of AT's training time.
    "cifar10": {
        **_COLOR_IMAGES,
        "validation.every": 2,
        "optim.lr": {"kind": "piecewise", "boundaries": [29, 59], "values": [0.1, 0.01, 0.001]},
    },
    # GAIRAT paper, appendices A and C.3: as CIFAR-10, with a tenth of the learning rate.
    "svhn": {
        **_COLOR_IMAGES,
        "optim.lr": {"kind": "piecewise", "boundaries": [29, 59], "values": [0.01, 0.001, 0.0001]},
    },
    "arrays": {
        **_COLOR_IMAGES,
        "optim.lr": {"kind": "piecewise", "boundaries": [29, 59], "values": [0.1, 0.01, 0.001]},
    },
}

# Your own images: up to this number of training examples they are a small set, up to this number of
# pixels a side they are small pictures.
_MAX_SMALL_SET = 5000
_MAX_SMALL_SIDE = 28

# A small set: as many updates as 30 epochs allow, with smaller batches.
_SMALL_SET: dict[str, Any] = {
    "*.burn_in": 10,
    "*.tau.boundaries": [10, 20],
    "epochs": 30,
    "batch_size": 64,
    "model.name": "small_cnn",
    "optim.lr": {"kind": "piecewise", "boundaries": [20, 27], "values": [0.05, 0.005, 0.0005]},
}


def is_small_array_set(data_dir: str | Path | None) -> bool:
    """Return whether a folder of `data.name` arrays has few training images.

    Args:
        data_dir: The folder; None, or a folder that is not on this machine, counts as large.
    """
    shape = None if data_dir is None else read_image_shape(expand_home(data_dir))
    return shape is not None and shape.n_images <= _MAX_SMALL_SET


def find_array_defaults(data_dir: str | Path | None) -> dict[str, Any]:
    """Find the defaults of your own images that depend on their number and size.

    Args:
        data_dir: Folder of the images.

    Returns:
        Dotted path -> value, beside those of `DATASET_DEFAULTS`; {} if the folder is not on this
        machine or its files cannot be read: loading them says so.
    """
    shape = None if data_dir is None else read_image_shape(expand_home(data_dir))
    if shape is None:
        return {}
    is_small = shape.n_images <= _MAX_SMALL_SET
    defaults = dict(_SMALL_SET) if is_small else {}
    if max(shape.height, shape.width) <= _MAX_SMALL_SIDE:
        defaults["model.name"] = "digits_cnn"
    if is_small:
        defaults["data.val_size"] = _choose_validation_size(shape)
    return defaults


def _choose_validation_size(shape: ImageShape) -> int:
    """Return a fifth of the training images, at least one."""
    return max(shape.n_images // 5, 1)
