"""Which validation examples an epoch gets right, one bit for each, to compare runs by example."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from raysweep.lazy_modules import np
from raysweep.spec import JsonDict
from raysweep.stored_data import Count, make_damaged_file_error, require_stored_types

if TYPE_CHECKING:
    import numpy.typing as npt

_FORMAT_VERSION = 1
_STORED_TYPES: dict[str, Any] = {
    **{"metric": str, "epoch": Count, "n_examples": Count, "examples": str, "correct": str}
}


@dataclass(frozen=True)
class ExampleVerdicts:
    """Verdicts of one metric on the validation examples of one epoch.

    Attributes:
        metric: Name of the metric, an accuracy, such as `robust_worst`.
        epoch: The epoch, from 1.
        n_examples: Number of examples, N.
        examples: Digest of the examples' numbers in the data set. Verdicts with equal digests
            belong to the same examples in the same order.
        correct: N bits in base64: 1 for an example that counts as correct.
    """

    metric: str
    epoch: int
    n_examples: int
    examples: str
    correct: str

    @classmethod
    def from_mask(
        cls, metric: str, epoch: int, mask: npt.NDArray[np.bool_], index: npt.NDArray[np.int64]
    ) -> ExampleVerdicts:
        """Pack verdicts.

        Args:
            metric: Name of the metric.
            epoch: The epoch, from 1.
            mask: Whether each example counts as correct, (N,).
            index: Numbers of the examples in the data set, (N,).

        Returns:
            The verdicts.
        """
        digest = hashlib.sha256(np.ascontiguousarray(index, dtype="<i8").tobytes()).hexdigest()[:16]
        packed = base64.b64encode(np.packbits(mask).tobytes()).decode()
        return cls(metric, epoch, len(mask), digest, packed)

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Whether each example counts as correct, (N,)."""
        packed = np.frombuffer(base64.b64decode(self.correct), dtype=np.uint8)
        return np.unpackbits(packed, count=self.n_examples).astype(bool)

    def is_comparable(self, other: ExampleVerdicts) -> bool:
        """Return whether these are verdicts of the same metric on the same examples."""
        return (self.metric, self.examples, self.n_examples) == (
            other.metric,
            other.examples,
            other.n_examples,
        )

    def to_stored_dict(self) -> JsonDict:
        """Return what files hold."""
        return {"format": _FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_stored_dict(
        cls, data: Mapping[str, Any] | None, source: str
    ) -> ExampleVerdicts | None:
        """Read what `to_stored_dict` returned.

        Args:
            data: The content; None if there is none.
            source: Location of the file, for errors.

        Returns:
            The verdicts; None if there are none, or a later version of raysweep wrote them.

        Raises:
            DamagedFileError: The content is damaged.
        """
        if data is None or data.get("format") != _FORMAT_VERSION:
            return None
        require_stored_types(data, _STORED_TYPES, source)
        try:
            n_bytes = len(base64.b64decode(data["correct"], validate=True))
        except ValueError as error:
            raise make_damaged_file_error(source, "correct is not base64") from error
        if n_bytes != (data["n_examples"] + 7) // 8:
            raise make_damaged_file_error(
                source, f"correct has {n_bytes} bytes for {data['n_examples']} examples"
            )
        return cls(**{name: data[name] for name in _STORED_TYPES})
