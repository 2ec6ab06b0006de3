"""Default settings of each data set: threat model, network and number of epochs.

A search space or `--set` overrides them. `*` in a path matches any characters. A path is skipped if
the method has no such setting. The methods' own defaults are the papers' settings for CIFAR-10, so
`cifar10` and `svhn` need few settings here.
"""

from typing import Any

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
    "cifar10": {"model.name": "resnet18", "data.val_size": 1000, "validation.every": 2},
    # GAIRAT paper, appendices A and C.3: as CIFAR-10, with a tenth of the learning rate, which
    # drops at epochs 30 and 60.
    "svhn": {
        "model.name": "resnet18",
        "data.val_size": 1000,
        "optim.lr": {"kind": "piecewise", "boundaries": [30, 60], "values": [0.01, 0.001, 0.0001]},
    },
    "arrays": {"model.name": "resnet18", "data.val_size": 1000},
}
