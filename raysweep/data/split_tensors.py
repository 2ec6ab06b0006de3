"""One split of an image data set, as integer tensors on one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images, labels and ids of N examples.

    Attributes:
        x: Pixels, (N, C, H, W) uint8 in 0..`pixel_max`.
        y: Labels, (N,) int64.
        index: Ids of the examples, (N,) int64. The random numbers of an example depend on its id.
        pixel_max: Pixel value that becomes 1.0: 255 for most data sets, 16 for digits.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    pixel_max: int

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.y)

    def get_float_images(self, rows: Tensor | slice) -> Tensor:
        """Return the images of `rows`.

        Args:
            rows: Row numbers, (M,) int64, or a slice.

        Returns:
            (M, C, H, W) float32 in [0, 1].
        """
        return self.x[rows].float() / self.pixel_max

    def select_rows(self, rows: Tensor) -> Split:
        """Return a split of some examples.

        Args:
            rows: Row numbers, (M,) int64.

        Returns:
            A copy of these rows, in this order.
        """
        return Split(self.x[rows], self.y[rows], self.index[rows], self.pixel_max)

    def to(self, device: torch.device) -> Split:
        """Move the split to a device.

        Args:
            device: The device.

        Returns:
            A copy on `device`.
        """
        return Split(self.x.to(device), self.y.to(device), self.index.to(device), self.pixel_max)
