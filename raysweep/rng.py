"""Random numbers that depend on the example, not on the batch.

Every number is a hash of (seed, names of the stream, example id, position). An example therefore
gets the same random start, crop or query for any batch size, shards or number of workers, and after
a resume. There is no generator state to save. The hash is the finaliser of splitmix64 (Steele et
al. 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from raysweep.lazy_modules import np, torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

# Words that a CPU computes at a time: 256 KiB, so that they stay in its cache.
_BLOCK_WORDS = 32_768
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True)
class ExampleRng:
    """A stream of random numbers for each of N examples, on the device of their ids.

    Calling a method twice returns the same numbers. Call `derive_stream` for each purpose.

    Attributes:
        key: Hash of the seed and of the stream's names, 64 bits unsigned.
        example_ids: Ids of the examples (`Split.index`), (N,) int64.
    """

    key: int
    example_ids: Tensor

    @classmethod
    def for_examples(cls, example_ids: Tensor, seed: int, *names: object) -> ExampleRng:
        """Create the stream for a seed and a purpose.

        Args:
            example_ids: Ids of the examples (`Split.index`), (N,) int64.
            seed: Seed of the run.
            *names: Purpose of the stream, for example a word and an epoch.

        Returns:
            The stream.
        """
        return cls(_hash_names(seed, names), example_ids)

    def derive_stream(self, *names: object) -> ExampleRng:
        """Create an independent stream for the same examples.

        Args:
            *names: Purpose of the stream, such as an attack, a restart or a query.

        Returns:
            The stream.
        """
        return replace(self, key=_hash_names(self.key, names))

    def select_rows(self, rows: Tensor) -> ExampleRng:
        """Restrict the stream to some of its examples; their numbers stay the same.

        Args:
            rows: (N,) bool mask, or int64 positions in `example_ids`.

        Returns:
            The stream of the selected examples.
        """
        return replace(self, example_ids=self.example_ids[rows])

    def uniform(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Draw uniform numbers.

        Args:
            shape: Shape of one example's numbers.
            dtype: float32 (24 random bits), also for None, or float64 (53 random bits).

        Returns:
            (N, *shape) numbers in [0, 1).
        """
        dtype = dtype or torch.float32
        count = math.prod(shape)
        is_numpy_dtype = dtype in (torch.float32, torch.float64)
        if self.example_ids.device.type == "cpu" and is_numpy_dtype:
            numbers = self._uniform_by_numpy(count, dtype)
        else:
            numbers = self._uniform_by_torch(count, dtype)
        return numbers.view(len(self.example_ids), *shape)

    def symmetric_uniform(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Draw uniform numbers in [-1, 1).

        Args:
            shape: Shape of one example's numbers.
            dtype: float32, also for None, or float64.

        Returns:
            (N, *shape) numbers: `uniform` times 2, minus 1.
        """
        return self.uniform(shape, dtype).mul_(2).sub_(1)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Draw standard normal numbers by the Box-Muller transform.

        Args:
            shape: Shape of one example's numbers.
            dtype: float32, also for None, or float64.

        Returns:
            (N, *shape) numbers.
        """
        radius = self.derive_stream("radius").uniform(shape, dtype)
        angle = self.derive_stream("angle").uniform(shape, dtype)
        radius.neg_().log1p_().mul_(-2).sqrt_()
        return angle.mul_(2 * math.pi).cos_().mul_(radius)

    def integers(self, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Draw uniform whole numbers.

        Args:
            high: Exclusive upper bound, at least 1.
            shape: Shape of one example's numbers.

        Returns:
            (N, *shape) int64 numbers in [0, high).
        """
        return (self.uniform(shape, torch.float64) * high).long()

    def _uniform_by_torch(self, count: int, dtype: torch.dtype) -> Tensor:
        """Compute the numbers of `uniform`, (N, count), on any device."""
        bits = _count_random_bits(dtype)
        rows = _finalize_splitmix64(self.example_ids * _GOLDEN_GAMMA + _to_signed_int64(self.key))
        device = self.example_ids.device
        columns = torch.arange(1, count + 1, device=device) * _GOLDEN_GAMMA
        words = _finalize_splitmix64(rows[:, None] + columns[None, :])
        return _logical_right_shift(words, 64 - bits).to(dtype) * 2.0**-bits

    def _uniform_by_numpy(self, count: int, dtype: torch.dtype) -> Tensor:
        """Compute the same numbers on a CPU, in blocks that stay in its cache."""
        numbers = torch.empty(len(self.example_ids), count, dtype=dtype, device="cpu")
        bits = _count_random_bits(dtype)
        gamma, shift = np.uint64(_GOLDEN_GAMMA % 2**64), np.uint64(64 - bits)
        rows = self.example_ids.numpy().astype(np.uint64) * gamma + np.uint64(self.key)
        _finalize_splitmix64_(rows, np.empty_like(rows))
        columns = np.arange(1, count + 1, dtype=np.uint64) * gamma
        block_rows = max(1, _BLOCK_WORDS // max(1, count))
        block, buffer = np.empty((2, min(block_rows, len(rows)), count), np.uint64)
        array = numbers.numpy()
        for start in range(0, len(rows), block_rows):
            block_part = array[start : start + block_rows]
            words = block[: len(block_part)]
            np.add(rows[start : start + block_rows, None], columns, out=words)
            _finalize_splitmix64_(words, buffer[: len(words)])
            block_part[...] = np.right_shift(words, shift, out=words)
            block_part *= array.dtype.type(2.0**-bits)
        return numbers


def derive_seed(seed: int, *names: object) -> int:
    """Derive a seed for a generator of torch or numpy (permutations, initial weights).

    Args:
        seed: Seed of the run.
        *names: Purpose of the generator.

    Returns:
        A seed of 63 bits.
    """
    return _hash_names(seed, names) >> 1


def _hash_names(seed: int, names: tuple[object, ...]) -> int:
    """Return the first 64 bits of the sha256 of `seed/name/name...`."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _to_signed_int64(word: int) -> int:
    """Return the signed number with the same 64 bits: torch has no unsigned int64 arithmetic."""
    return word - (1 << 64) if word >= 1 << 63 else word


def _logical_right_shift(words: Tensor, bits: int) -> Tensor:
    """Shift int64 words right and fill with zeros; torch's own shift copies the sign bit."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _count_random_bits(dtype: torch.dtype) -> int:
    """Return the number of random bits of a uniform number."""
    return 24 if dtype == torch.float32 else 53


def _finalize_splitmix64_(words: NDArray[np.uint64], buffer: NDArray[np.uint64]) -> None:
    """Mix the bits of each word in place; `buffer` has the shape of `words` and is overwritten."""
    for bits, multiplier in ((30, _MIX_MULTIPLIER_1), (27, _MIX_MULTIPLIER_2), (31, 1)):
        np.bitwise_xor(words, np.right_shift(words, np.uint64(bits), out=buffer), out=words)
        if multiplier != 1:
            np.multiply(words, np.uint64(multiplier % 2**64), out=words)


def _finalize_splitmix64(words: Tensor) -> Tensor:
    """Mix the bits of each int64 word."""
    words = (words ^ _logical_right_shift(words, 30)) * _MIX_MULTIPLIER_1
    words = (words ^ _logical_right_shift(words, 27)) * _MIX_MULTIPLIER_2
    return words ^ _logical_right_shift(words, 31)
