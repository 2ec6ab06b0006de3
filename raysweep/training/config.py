"""Config of a training run: all settings that decide its result, as one spec."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from raysweep.catalog import METHODS
from raysweep.data import DataSpec
from raysweep.formatting import format_count
from raysweep.method import Method
from raysweep.models import ModelSpec
from raysweep.schedules import Number, PiecewiseSchedule, Schedule, bounded, resolved_value
from raysweep.spec import Spec, SpecError, apply_overrides, describe_unknown_name
from raysweep.training.dataset_defaults import DATASET_DEFAULTS
from raysweep.training.speed_settings import ComputeSpec
from raysweep.training.validation import Validation


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

    def list_warnings(self) -> list[str]:
        """List valid settings that have no effect, or another effect than users may expect.

        Returns:
            One line for each; empty if there are none.
        """
        return [
            *self._warn_about_long_burn_ins(),
            *self._warn_about_attacks(),
            *self._warn_about_data(),
            *self._warn_about_selection(),
        ]

    def _warn_about_long_burn_ins(self) -> Iterator[str]:
        """Warn about instance weights whose burn-in is as long as the run."""
        epochs = format_count(self.epochs, "epoch")
        for name, term in self.method.terms.items():
            burn_in = getattr(term.weight, "burn_in", 0)
            if burn_in >= self.epochs:
                path = f"method.terms.{name}.weight.burn_in"
                yield f"{path} = {burn_in}: the weights never act in {epochs}"

    def _warn_about_selection(self) -> Iterator[str]:
        """Warn about a best epoch that is chosen on test images, or a window without epochs."""
        if self.validation.split == "test":
            yield (
                "validation.split = test: the best epoch is chosen on the test images, "
                "so its accuracies there are too high"
            )
        window = self.validation.window
        if window is not None and window[0] > self.epochs:
            yield f"validation.window = {list(window)}: the run ends after epoch {self.epochs}"

    def _warn_about_attacks(self) -> Iterator[str]:
        """Warn about attacks that bf16 makes useless or torch.compile makes slow."""
        for name, attack in self.method.attacks.items():
            path = f"method.attacks.{name}"
            if self.compute.attack == "bf16" and getattr(attack, "start", None) == "gaussian":
                yield (
                    f"compute.attack = bf16: {path} starts 0.001 from the image, "
                    "which bf16 rounds away"
                )
            if self.compute.compile and (attack.kind != "pgd" or attack.tau is not None):
                yield (
                    f"compute.compile = true: {path} shrinks its batch during the attack, "
                    "and compiling each batch size takes minutes"
                )

    def _warn_about_data(self) -> Iterator[str]:
        """Warn about a data folder that is not read, and about missing unlabeled data."""
        data = self.data
        if data.name == DataSpec().name and data.data_dir and not data.unlabeled:
            yield f"data.data_dir = {data.data_dir}: not read: {data.name} come with scikit-learn"
        if self.method.name.endswith("rst") and data.unlabeled is None:
            yield f"data.unlabeled is not set: {self.method.name} trains on labelled data alone"


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
    method: str | Mapping[str, Any], *override_layers: Mapping[str, Any]
) -> TrainingConfig:
    """Build a config from a method and layers of settings.

    Precedence: defaults of the data set (`DATASET_DEFAULTS`) < first layer < ... < last layer.
    Validation attacks get the eps that the method has in the last epoch, unless a layer sets an eps
    with a path that starts with `*` or `validation`.

    Args:
        method: A key of `METHODS`, or the settings of a method as a mapping.
        override_layers: Mappings from dotted path to value, such as {"optim.lr": 0.1}.

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
    method_data = dict(method) if isinstance(method, Mapping) else method
    config = TrainingConfig.from_data({"method": method_data})
    config = apply_overrides(config, DATASET_DEFAULTS[data_name], on_missing="ignore")
    config = apply_overrides(config, changes)
    if any(_sets_validation_eps(path, value) for path, value in changes.items()):
        return config
    return _match_validation_eps(config)


def _sets_validation_eps(path: str, value: Any) -> bool:
    """Return whether a setting, `*.eps` or a whole attack, sets an eps of validation attacks."""
    if path[0] not in "*v":
        return False
    return "eps" in path.split(".") or _has_key(value, "eps")


def _has_key(value: Any, key: str) -> bool:
    """Return whether nested mappings have a key at any depth."""
    if not isinstance(value, Mapping):
        return False
    return key in value or any(_has_key(part, key) for part in value.values())


def _match_validation_eps(config: TrainingConfig) -> TrainingConfig:
    """Set the eps of validation attacks to the method's eps in the last epoch.

    Their default is 8/255, but GAIRAT's methods use 0.031.
    """
    attacks = config.resolve_at(config.epochs - 1).method.attacks.values()
    radii = [resolved_value(attack.eps) for attack in attacks if hasattr(attack, "eps")]
    return apply_overrides(config, {"validation.*.eps": radii[0]}) if radii else config
