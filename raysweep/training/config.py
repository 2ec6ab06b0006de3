"""Config of a training run: all settings that decide its result, as one spec."""

import functools
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from raysweep.catalog import METHODS
from raysweep.data import DataSpec, recognize_datasets
from raysweep.method import Method
from raysweep.models import ModelSpec
from raysweep.schedules import Number, PiecewiseSchedule, Schedule, bounded
from raysweep.spec import (
    Spec,
    SpecError,
    apply_overrides,
    covers_path,
    describe_unknown_name,
    list_leaf_paths,
    list_paths,
    match_paths,
    merge_overrides,
)
from raysweep.training.config_cache import get_or_build
from raysweep.training.config_warnings import ConfigWarning, find_config_warnings
from raysweep.training.dataset_defaults import DATASET_DEFAULTS, find_array_defaults
from raysweep.training.default_objective import find_objective_defaults
from raysweep.training.speed_settings import ComputeSpec
from raysweep.training.validation import Validation
from raysweep.user_folders import expand_home

# Parts of a config of which a mapping replaces only the settings that it contains.
_PARTS = frozenset({"data", "model", "optim", "validation", "compute"})

_FOLDERS = ("data.data_dir", "data.unlabeled")


class OptimizerSpec(Spec):
    """Stochastic gradient descent with momentum."""

    later_fields: ClassVar[frozenset[str]] = frozenset({"lr_per_step"})

    lr: Annotated[Schedule, bounded(0)] = Field(
        default_factory=lambda: PiecewiseSchedule(boundaries=(29, 59), values=(0.1, 0.01, 0.001))
    )
    """Learning rate: a number or a schedule over epochs, at least 0."""

    lr_per_step: bool = False
    """Change the learning rate after every step instead of every epoch: step i of n in epoch e has
    the value of `lr` at e + i / n, where the first step is i = 1 (Rice et al. 2020)."""

    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """Momentum, in [0, 1)."""

    weight_decay: Annotated[Schedule, bounded(0)] = 5e-4
    """Weight decay: a number or a schedule over epochs, at least 0."""

    nesterov: bool = False
    """Use Nesterov momentum; needs `momentum` > 0."""


class TrainingConfig(Spec):
    """Everything that decides the result of one training run."""

    method: Method
    """The training method: a name that `raysweep list` prints, or the settings of a method."""

    data: DataSpec = Field(default_factory=DataSpec)
    """The data set and how it is split."""

    model: ModelSpec = Field(default_factory=ModelSpec)
    """The network."""

    optim: OptimizerSpec = Field(default_factory=OptimizerSpec)
    """The optimizer."""

    validation: Validation = Field(default_factory=Validation)
    """How checkpoints are evaluated during training."""

    compute: ComputeSpec = Field(default_factory=ComputeSpec)
    """Faster ways to compute training steps, which change results by rounding or precision only."""

    epochs: Annotated[int, Field(ge=1)] = 100
    """Number of epochs."""

    batch_size: Annotated[int, Field(ge=2)] = 128
    """Training examples in a batch, summed over all workers."""

    collapse_after: Annotated[int, Field(ge=0)] | None = 20
    """The run fails if two validations in a row, both after this epoch, are no better than chance
    on natural images. null: never."""

    seed: int = 0
    """Seed of initial weights, batch order and attacks."""

    @field_validator("method", mode="before")
    @classmethod
    def _resolve_method_name(cls, method: Any) -> Any:
        """Replace the name of a method by the method."""
        if isinstance(method, str):
            return method_by_name(method)
        return method

    @model_validator(mode="after")
    def _check_nesterov(self) -> Self:
        """Reject Nesterov momentum without momentum."""
        if self.optim.nesterov and not self.optim.momentum:
            raise ValueError("optim.nesterov needs optim.momentum > 0")
        return self

    @property
    def burn_in(self) -> int:
        """Number of first epochs in which at least one instance weight is still 1."""
        return max(getattr(term.weight, "burn_in", 0) for term in self.method.terms.values())

    def is_validated(self, epoch: int) -> bool:
        """Return whether an epoch is validated.

        Besides every `validation.every`-th epoch these are the last one, and those before and after
        each drop of a piecewise learning rate: they often decide which epoch is best.

        Args:
            epoch: Epoch, 0-based.
        """
        if (epoch + 1) % self.validation.every == 0 or epoch + 1 == self.epochs:
            return True
        lr = self.optim.lr
        return isinstance(lr, PiecewiseSchedule) and not {epoch, epoch + 1}.isdisjoint(
            lr.boundaries
        )

    def find_warnings(self) -> list[ConfigWarning]:
        """Find valid settings that have no effect, or another effect than users may expect."""
        return find_config_warnings(self)

    def list_warnings(self) -> list[str]:
        """List the warnings of `find_warnings`.

        Returns:
            One line for each; empty if there are none.
        """
        return [warning.line for warning in self.find_warnings()]


def method_by_name(name: str) -> Method:
    """Build a published method.

    Args:
        name: A key of `METHODS`, as `raysweep list` prints it.

    Returns:
        The method with the settings of its paper.

    Raises:
        SpecError: There is no such method; the message suggests similar names.
    """
    if name not in METHODS:
        raise SpecError(describe_unknown_name("method", name, list(METHODS)))
    return METHODS[name]()


def build_training_config(
    method: str | Mapping[str, Any],
    *override_layers: Mapping[str, Any],
    dataset_defaults: Mapping[str, Any] | None = None,
) -> TrainingConfig:
    """Build a config from a method and layers of settings.

    What is written wins over every default. Precedence, from low to high: settings of a method
    that is given by name, defaults of the data set, settings of a method that is written out, first
    layer, ..., last layer (see `merge_overrides`).
    Validation attacks get the eps and the norm that the method has in the last epoch, unless a
    layer sets those of validation attacks.

    Args:
        method: A key of `METHODS`, or the settings of a method as a mapping.
        override_layers: Mappings from dotted path to value, such as {"optim.lr": 0.1}.
        dataset_defaults: Defaults of the data set by dotted path without `*`; None for those of
            `find_dataset_defaults`.

    Returns:
        The validated config.

    Raises:
        SpecError: A setting is unknown or its value is not allowed, or it is unclear which data set
            is meant; one line for each problem.
    """
    changes = merge_overrides(*map(_split_parts, override_layers))
    if dataset_defaults is None:
        changes = name_dataset(changes)
        dataset_defaults = find_dataset_defaults(method, changes)
    inputs = (_copy_method(method), dict(dataset_defaults))

    def build() -> TrainingConfig:
        start = get_or_build(
            ("start", *inputs), lambda: apply_overrides(_start_config(method), dataset_defaults)
        )
        return _match_validation(("eps", "norm"), changes, apply_overrides(start, changes))

    return _get_or_build(("config", *inputs, changes), build)


def find_dataset_defaults(
    method: str | Mapping[str, Any], changes: Mapping[str, Any], *, former_objective: bool = False
) -> dict[str, Any]:
    """Find the defaults of the data set that apply to a method.

    Args:
        method: A key of `METHODS`, or the settings of a method as a mapping.
        changes: All other settings by dotted path; they name the data set and its folder.
        former_objective: Whether to leave the attacks of validation as they were in 0.1.

    Returns:
        Dotted path without `*` -> value, without what stands in a method that is written out; also
        the attacks of the default objective (see `find_objective_defaults`).

    Raises:
        SpecError: There is no such method or data set, or the method is not valid.
    """
    changes = _split_parts(changes)
    name = str(changes.get("data.name", DataSpec().name))
    if name not in DATASET_DEFAULTS:
        DataSpec.from_data({"name": name}, "data")
    defaults = DATASET_DEFAULTS[name]
    if name == "arrays":
        defaults = defaults | find_array_defaults(changes.get("data.data_dir"))
    objective = {} if former_objective else find_objective_defaults(changes)
    method_data = _copy_method(method)
    inputs = ("dataset defaults", method_data, defaults, objective)
    return dict(get_or_build(inputs, lambda: _choose_defaults(method_data, defaults, objective)))


def _choose_defaults(
    method: str | dict[str, Any], defaults: Mapping[str, Any], objective: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the defaults that a method has settings for, by path without `*`."""
    data = apply_overrides(_start_config(method), objective).to_json_dict()
    known_paths = list_paths(data)
    written = list_leaf_paths({"method": method}) if isinstance(method, dict) else []
    applied = dict(objective)
    for pattern, value in defaults.items():
        for path in match_paths(pattern, data, known_paths):
            if path not in objective and not any(covers_path(path, other) for other in written):
                applied[path] = value
    return applied


def name_dataset(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Add the name of the data set to settings that have only its folder.

    Args:
        changes: Settings by dotted path.

    Returns:
        The settings, with `data.name` if they have a `data.data_dir` of images.

    Raises:
        SpecError: The folder holds no data set, or several; or a path with `*` names the folder.
    """
    parts = _split_parts(changes)
    for path in parts:
        if "data.name" not in parts and "*" in path and fnmatchcase("data.data_dir", path):
            raise SpecError(f"{path}: matches data.data_dir; write that, or --data-dir DIR")
    folder = parts.get("data.data_dir")
    # `unlabeled` is a file in `data_dir`, also with a data set that needs no folder.
    if "data.name" in parts or folder is None or parts.get("data.unlabeled") is not None:
        return dict(changes)
    names = recognize_datasets(expand_home(str(folder)))
    if len(names) == 1:
        return {**changes, "data.name": names[0]}
    reason = "it has no train.npz and no train.parquet"
    if not expand_home(str(folder)).is_dir():
        reason = "there is no such folder"
    if names:
        reason = f"it has the files of {' and '.join(names)}"
    known = [name for name in DATASET_DEFAULTS if name != DataSpec().name]
    raise SpecError(
        f"data.data_dir = {str(folder)!r}: {reason}; set data.name to the data set to use: "
        f"{', '.join(known)} (your own images)"
    )


def build_training_config_of_0_1(
    method: str | Mapping[str, Any], *override_layers: Mapping[str, Any]
) -> TrainingConfig:
    """Build a config as raysweep 0.1 did, for sweeps that do not store `dataset_defaults`.

    The defaults of the data set also replace what stands in a method that is written out; a whole
    part such as `optim` replaces all its settings; only eps is passed on to validation attacks.
    This function must not change: the configs of stored trials are built with it.

    Args:
        method: As for `build_training_config`.
        override_layers: As for `build_training_config`.

    Returns:
        The validated config.

    Raises:
        SpecError: A setting is unknown or its value is not allowed; one line for each problem.
    """
    changes: dict[str, Any] = {}
    for layer in override_layers:
        changes.update(layer)
    data_name = changes.get("data.name", DataSpec().name)
    if data_name not in DATASET_DEFAULTS:
        DataSpec.from_data({"name": data_name}, "data")
    inputs = (_copy_method(method), data_name)

    def build() -> TrainingConfig:
        start = get_or_build(
            ("start of 0.1", *inputs),
            lambda: apply_overrides(
                _start_config(method), DATASET_DEFAULTS[data_name], on_missing="ignore"
            ),
        )
        config = apply_overrides(start, changes, stars_reach_parts=False)
        return _match_validation(("eps",), changes, config)

    return _get_or_build(("config of 0.1", *inputs, changes), build)


def _get_or_build(inputs: tuple[Any, ...], build: Callable[[], TrainingConfig]) -> TrainingConfig:
    """Return `get_or_build` of the inputs and of the folders to which their paths of data lead.

    These depend on the current folder, on `~` and on symbolic links.
    """
    places = []
    for changes in inputs:
        for path, value in changes.items() if isinstance(changes, dict) else ():
            if value is None or not _covers_folder(path):
                continue
            if not isinstance(value, str):
                return build()
            try:
                places.append(str(expand_home(value).resolve()))
            except (OSError, RuntimeError, ValueError):
                return build()
    return get_or_build((*inputs, places), build)


@functools.lru_cache(maxsize=4096)
def _covers_folder(path: str) -> bool:
    """Return whether an override may set a path of data."""
    return any(covers_path(path, folder) for folder in _FOLDERS)


def _start_config(method: str | Mapping[str, Any]) -> TrainingConfig:
    """Return the config of a method without any other setting."""
    method_data = _copy_method(method)
    return get_or_build(
        ("method", method_data), lambda: TrainingConfig.from_data({"method": method_data})
    )


def _copy_method(method: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """Return the name of a method, or a copy of its settings."""
    return dict(method) if isinstance(method, Mapping) else method


def _split_parts(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Replace mappings for whole parts, such as `optim: {lr: 0.1}`, by dotted paths."""
    split: dict[str, Any] = {}
    for path, value in changes.items():
        settings = {path: value}
        if path in _PARTS and isinstance(value, Mapping):
            settings = {f"{path}.{name}": item for name, item in value.items()}
        for setting, item in settings.items():
            split.pop(setting, None)
            split[setting] = item
    return split


def _sets_validation(key: str, path: str, value: Any) -> bool:
    """Return whether a setting, `*.eps` or a whole attack, sets `key` of validation attacks."""
    if path[0] not in "*v":
        return False
    return key in path.split(".") or _has_key(value, key)


def _has_key(value: Any, key: str) -> bool:
    """Return whether nested mappings have a key at any depth."""
    if not isinstance(value, Mapping):
        return False
    return key in value or any(_has_key(part, key) for part in value.values())


def _match_validation(
    keys: Sequence[str], changes: Mapping[str, Any], config: TrainingConfig
) -> TrainingConfig:
    """Set eps and norm of validation attacks to those of the method in the last epoch.

    The default eps is 8/255, but GAIRAT's methods use 0.031.

    Args:
        keys: The settings to pass on.
        changes: Settings by dotted path; what they set in validation attacks stays.
        config: Config with these settings.
    """
    attacks = config.method.resolve_at(config.epochs - 1).attacks.values()
    matched: dict[str, Any] = {}
    for key in keys:
        values = [getattr(attack, key) for attack in attacks if hasattr(attack, "eps")]
        if values and not any(_sets_validation(key, path, item) for path, item in changes.items()):
            matched[f"*.{key}"] = values[0]
    if not matched:
        return config
    try:
        validation = apply_overrides(config.validation, matched, on_missing="ignore")
    except SpecError as error:
        raise error.with_prefix("validation.") from error
    return config.replace(validation=validation)


def has_same_settings(saved: TrainingConfig, config: TrainingConfig) -> bool:
    """Return whether a run of one config can resume one of another.

    They may differ in the number of epochs and in the files of the data: data may move, and its
    fingerprint says whether it is the same.

    Args:
        saved: Config of the run that was saved.
        config: Config of the run that resumes it.
    """
    data = saved.data.replace(data_dir=config.data.data_dir, unlabeled=config.data.unlabeled)
    return saved.replace(epochs=config.epochs, data=data) == config
