"""Everything that decides a training run, in one value: the only thing that crosses a process
boundary.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from raysweep.catalog import METHODS
from raysweep.data import DataSpec
from raysweep.formatting import format_count
from raysweep.method import Method
from raysweep.models import ModelSpec
from raysweep.schedules import Number, PiecewiseSchedule, Schedule, bounded, resolved_value
from raysweep.spec import Spec, SpecError, apply_overrides, describe_unknown_name
from raysweep.training.compute import ComputeSpec
from raysweep.training.dataset_defaults import DATASET_DEFAULTS
from raysweep.training.validation import Validation


class OptimizerSpec(Spec):
    """SGD. lr and weight_decay may change with the epoch."""

    lr: Annotated[Schedule, bounded(0)] = Field(
        default_factory=lambda: PiecewiseSchedule(boundaries=(60, 90), values=(0.1, 0.01, 0.001))
    )
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[Schedule, bounded(0)] = 5e-4
    nesterov: bool = False


class TrainingConfig(Spec):
    """One training run. `method` may be given by its name in the catalog or written out.

    collapse_after: a run that is no better than chance at natural validation images, twice in a row
    and after so many epochs, has failed (null: goes on all the same).
    """

    method: Method
    data: DataSpec = Field(default_factory=DataSpec)
    model: ModelSpec = Field(default_factory=ModelSpec)
    optim: OptimizerSpec = Field(default_factory=OptimizerSpec)
    validation: Validation = Field(default_factory=Validation)
    compute: ComputeSpec = Field(default_factory=ComputeSpec)
    epochs: Annotated[int, Field(ge=1)] = 100
    batch_size: Annotated[int, Field(ge=2)] = 128
    collapse_after: Annotated[int, Field(ge=0)] | None = 20
    seed: int = 0

    @field_validator("method", mode="before")
    @classmethod
    def _resolve_method_name(cls, method: Any) -> Any:
        if isinstance(method, str):
            return method_by_name(method)
        return method

    @model_validator(mode="after")
    def _check_nesterov(self) -> Self:
        if self.optim.nesterov and not self.optim.momentum:
            raise ValueError("optim.nesterov needs optim.momentum > 0")
        return self

    @property
    def burn_in(self) -> int:
        """Epochs before all the weights act."""
        return max(getattr(term.weight, "burn_in", 0) for term in self.method.terms.values())

    def list_warnings(self) -> list[str]:
        """Settings that are legal and yet do nothing, or not what they say."""
        lines = []
        for name, term in self.method.terms.items():
            burn_in = getattr(term.weight, "burn_in", 0)
            if burn_in >= self.epochs:
                path = f"method.terms.{name}.weight.burn_in"
                lines.append(
                    f"{path} = {burn_in}: the weights never act in {format_count(self.epochs, 'epoch')}"
                )
        for name, attack in self.method.attacks.items():
            if self.compute.attack == "bf16" and getattr(attack, "start", None) == "gaussian":
                path = f"method.attacks.{name}"
                lines.append(
                    f"compute.attack = bf16: {path} starts 0.001 from the image, which bf16 rounds away"
                )
            if self.compute.compile and (attack.kind != "pgd" or attack.tau is not None):
                path = f"method.attacks.{name}"
                lines.append(
                    f"compute.compile = true: {path} lets rows go early, and each size of batch costs minutes"
                )
        if self.data.name == DataSpec().name and self.data.data_dir and not self.data.unlabeled:
            lines.append(
                f"data.data_dir = {self.data.data_dir}: not read: {self.data.name} come with scikit-learn"
            )
        if self.method.name.endswith("rst") and self.data.unlabeled is None:
            lines.append(
                f"data.unlabeled is not set: {self.method.name} trains on labelled data alone"
            )
        return lines


def method_by_name(name: str) -> Method:
    """A method of the catalog. Raises SpecError with the nearest names."""
    if name not in METHODS:
        raise SpecError(describe_unknown_name("method", name, list(METHODS)))
    return METHODS[name]()


def build_training_config(
    method: str | Mapping[str, Any], *override_layers: Mapping[str, Any]
) -> TrainingConfig:
    """A config from layers of {dotted path: value}, later ones winning over what the data set's
    profile brings.

    Raises SpecError for all problems at once.
    """
    changes: dict[str, Any] = {}
    for layer in override_layers:
        changes.update(layer)
    data_name = changes.get("data.name", DataSpec().name)
    if data_name not in DATASET_DEFAULTS:
        DataSpec.from_data({"name": data_name}, "data")
    base = TrainingConfig.from_data(
        {"method": dict(method) if isinstance(method, Mapping) else method}
    )
    config = apply_overrides(
        apply_overrides(base, DATASET_DEFAULTS[data_name], on_missing="ignore"), changes
    )
    return (
        config
        if any("eps" in path.split(".") for path in changes if path[0] in "*v")
        else _match_validation_eps(config)
    )


def _match_validation_eps(config: TrainingConfig) -> TrainingConfig:
    """Validation at the epsilon that the method ends with, where nobody said otherwise: 0.031 is
    not 8/255.
    """
    last = config.resolve_at(config.epochs - 1).method.attacks.values()
    radii = [resolved_value(attack.eps) for attack in last if hasattr(attack, "eps")]
    return apply_overrides(config, {"validation.*.eps": radii[0]}) if radii else config
