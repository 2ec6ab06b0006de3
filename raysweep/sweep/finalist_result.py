"""What AutoAttack says of one of a sweep's best trials, on the validation images."""

from dataclasses import asdict, dataclass, fields

from raysweep.spec import JsonDict


@dataclass(frozen=True)
class FinalistResult:
    """Result of full AutoAttack on the best epoch of a trial.

    Attributes:
        epoch: Epoch of the attacked checkpoint, from 1. If the trial's best epoch becomes another
            one, this result no longer counts.
        robust: Share of the validation images that AutoAttack leaves correctly classified, in
            [0, 1]; None if it could not run.
        n_examples: Number of validation images; the same as those of the objective.
        eps: Radius of the perturbations, in pixel values of [0, 1].
        norm: "Linf" or "L2".
        seconds: Wall seconds of the attack.
        error: Why AutoAttack could not run; "" if it did.
    """

    epoch: int
    robust: float | None
    n_examples: int
    eps: float
    norm: str
    seconds: float = 0.0
    error: str = ""

    def to_stored_dict(self) -> JsonDict:
        """Return what trial.json holds."""
        return asdict(self)

    @classmethod
    def from_stored_dict(cls, data: JsonDict) -> "FinalistResult":
        """Read what `to_stored_dict` returned; keys of later versions are ignored.

        Raises:
            TypeError: A key is missing.
        """
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in names})
