"""What AutoAttack says of one of a sweep's best trials, on the validation images."""

from dataclasses import asdict, dataclass, fields, replace

from raysweep.spec import JsonDict
from raysweep.training.example_verdicts import ExampleVerdicts


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
        verdicts: Which of the images it leaves correctly classified; None if it could not run, or
            an earlier version of raysweep ran it.
    """

    epoch: int
    robust: float | None
    n_examples: int
    eps: float
    norm: str
    seconds: float = 0.0
    error: str = ""
    verdicts: ExampleVerdicts | None = None

    def to_stored_dict(self) -> JsonDict:
        """Return what trial.json holds."""
        values = asdict(replace(self, verdicts=None))
        del values["verdicts"]
        return values | ({"verdicts": self.verdicts.to_stored_dict()} if self.verdicts else {})

    @classmethod
    def from_stored_dict(cls, data: JsonDict, source: str) -> "FinalistResult":
        """Read what `to_stored_dict` returned; keys of later versions are ignored.

        Args:
            data: The content.
            source: Location of the file, for errors.

        Raises:
            TypeError: A key is missing.
            DamagedFileError: The verdicts are damaged.
        """
        names = {field.name for field in fields(cls)}
        values = {name: value for name, value in data.items() if name in names}
        source = f"{source} (finalist.verdicts)"
        values["verdicts"] = ExampleVerdicts.from_stored_dict(values.get("verdicts"), source)
        return cls(**values)
