"""The card of a bundle: its claims, their types, and their comparison with what was derived."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from raysweep.checkpoint_evaluation import CARD_FILE
from raysweep.evaluation.report import format_card_numbers
from raysweep.robustness_bundle.files import quote_text, quote_value, read_strict_json, shorten_list
from raysweep.spec import JsonDict, Spec, SpecError
from raysweep.training.checkpoint import TrainingCheckpoint
from raysweep.training.config import TrainingConfig

_Accuracy = Annotated[float, Field(ge=0, le=1)]
# What a verifier cannot derive from the files of a bundle, as all fields that are not declared.
_UNCHECKED_FIELDS = ("name", "attacks", "unreliable")
_AUTOATTACK_NAMES = ["apgd-ce", "apgd-t", "fab-t", "square"]


class BundleCard(Spec):
    """Claims of a bundle, with the types that they must have. Other fields are kept unchecked."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    norm: Literal["Linf", "L2"]
    """Norm of the radius."""
    eps_value: Annotated[float, Field(gt=0)]
    """Radius of the attack, in pixels of [0, 1]."""
    examples: Annotated[int, Field(ge=1)]
    """Number of examples."""
    clean_accuracy: _Accuracy
    """Fraction of the examples whose clean image is classified correctly."""
    robust_accuracy: _Accuracy
    """Fraction of the examples that the attacks did not break."""
    attacks: list[str]
    """Names of the attacks, in their order."""
    seed: int
    """Seed of the training."""
    data: JsonDict
    """Settings of the data set."""
    config: JsonDict
    """Training configuration of the model."""
    environment: JsonDict
    """Versions and device of the training."""
    name: str | None
    """Name of the model."""
    dataset: str | None
    """Name of the data set."""
    architecture: str | None
    """Name of the network."""
    eps: str | None
    """The radius as RobustBench writes it."""
    threat_model: str | None
    """The norm as RobustBench writes it."""
    clean_acc: str | None
    """`clean_accuracy` in percent."""
    reported: str | None
    """`robust_accuracy` in percent."""
    autoattack_acc: str | None
    """The same, if the attacks were AutoAttack's standard version."""
    unreliable: bool
    """Whether the evaluation had warnings."""
    subset: str | None = None
    """How the examples were chosen; null for all examples."""

    @property
    def dataset_name(self) -> str:
        """Name of the data set in the settings."""
        return str(self.data.get("name"))

    @property
    def claims_autoattack(self) -> bool:
        """Whether the attacks are said to be those of AutoAttack's standard version."""
        return self.attacks == _AUTOATTACK_NAMES

    def list_unchecked_fields(self) -> list[str]:
        """List the fields with a value that nothing in the bundle shows."""
        values = {**dict(self), **(self.model_extra or {})}
        names = [*_UNCHECKED_FIELDS, *(self.model_extra or {})]
        unchecked = [quote_text(name) for name in names if values.get(name) is not None]
        return shorten_list(unchecked)


def read_card(folder: Path) -> BundleCard:
    """Read the card of a bundle.

    Args:
        folder: The bundle.

    Raises:
        DamagedFileError: It is not a card; one line for each problem.
    """
    path = folder / CARD_FILE
    return BundleCard.from_data(read_strict_json(path), str(path), stored=True)


def find_text_problems(
    card: BundleCard, checkpoint: TrainingCheckpoint, subset: str | None
) -> list[str]:
    """Compare the fields that repeat other fields, the checkpoint or the choice of the rows.

    Args:
        card: The card.
        checkpoint: Checkpoint of the bundle.
        subset: How the rows were chosen, from `find_subset`.

    Returns:
        One line for each difference.
    """
    config = checkpoint.config
    derived: dict[str, Any] = {
        **format_card_numbers(card.norm, card.eps_value, card.clean_accuracy, card.robust_accuracy),
        "dataset": card.dataset_name,
        "architecture": config.model.name,
        "seed": config.seed,
    }
    # Cards of raysweep 0.1 do not say how the rows were chosen.
    if card.subset is not None:
        derived["subset"] = subset
    problems = [
        f"{name} is {value!r}, the card says {quote_value(getattr(card, name))}"
        for name, value in derived.items()
        if getattr(card, name) != value
    ]
    if card.autoattack_acc is not None:
        if card.autoattack_acc != derived["reported"]:
            problems.append(
                f"autoattack_acc is {derived['reported']!r}, the card says "
                f"{quote_value(card.autoattack_acc)}"
            )
        if not card.claims_autoattack:
            attacks = quote_value(card.attacks)
            problems.append(f"autoattack_acc has a value, but the card's attacks are {attacks}")
    return [*problems, *_find_training_problems(card, checkpoint)]


def _find_training_problems(card: BundleCard, checkpoint: TrainingCheckpoint) -> list[str]:
    """Return a line for each part of the card that differs from the checkpoint's own words."""
    config = checkpoint.config.to_stored_dict()
    try:
        claimed: Any = TrainingConfig.from_data(card.config, CARD_FILE).to_stored_dict()
    except SpecError:
        claimed = card.config
    parts = {
        "config": (claimed, config),
        "environment": (card.environment, checkpoint.meta.get("environment", {})),
        "data": (_without_location(card.data), _without_location(config["data"])),
    }
    return [
        f"{name} of the card is not that of the checkpoint: {_describe_difference(*contents)}"
        for name, contents in parts.items()
        if contents[0] != contents[1]
    ]


def _without_location(data: Mapping[str, Any]) -> JsonDict:
    """Return settings of a data set without where its files are."""
    return {key: value for key, value in data.items() if key not in ("data_dir", "download")}


def _describe_difference(claimed: Mapping[str, Any], derived: Mapping[str, Any]) -> str:
    """Name the first key whose values differ."""
    keys = [key for key in claimed.keys() | derived.keys() if claimed.get(key) != derived.get(key)]
    return quote_text(min(keys)) if keys else "other keys"
