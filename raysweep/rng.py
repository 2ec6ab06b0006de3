"""Randomness that belongs to the example, not to the batch.

Every draw is a hash of (seed, names of the stream, example id, position), so an example gets the
same random start, crop or query whatever the batch size, the shard, the number of workers or the
epoch it was resumed at, and there is no generator state to save. The mixing function is
splitmix64's finaliser (Steele et al. 2014).
"""

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True)
class ExampleRng:
    """A stream of random numbers for the examples in `index` (N,) int64, on its device."""

    key: int
    example_ids: Tensor

    @classmethod
    def for_examples(cls, example_ids: Tensor, seed: int, *names: object) -> "ExampleRng":
        return cls(_hash_names(seed, names), example_ids)

    def derive_stream(self, *names: object) -> "ExampleRng":
        """An independent stream for the same examples: a restart, a query, an attack."""
        return replace(self, key=_hash_names(self.key, names))

    def select_rows(self, rows: Tensor) -> "ExampleRng":
        """The same stream for some of the examples (bool mask or int64 positions)."""
        return replace(self, example_ids=self.example_ids[rows])

    def uniform(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, *shape) numbers in [0, 1)."""
        bits = 24 if dtype == torch.float32 else 53
        words = self._random_words(math.prod(shape))
        numbers = _logical_right_shift(words, 64 - bits).to(dtype) * 2.0**-bits
        return numbers.view(len(self.example_ids), *shape)

    def symmetric_uniform(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """(N, *shape) numbers in [-1, 1)."""
        return self.uniform(shape, dtype) * 2 - 1

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, *shape) standard normal numbers (Box-Muller)."""
        radius = (-2 * torch.log1p(-self.derive_stream("radius").uniform(shape, dtype))).sqrt()
        return radius * (2 * math.pi * self.derive_stream("angle").uniform(shape, dtype)).cos()

    def integers(self, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        """(N, *shape) int64 in [0, high)."""
        return (self.uniform(shape, torch.float64) * high).long()

    def _random_words(self, count: int) -> Tensor:
        device = self.example_ids.device
        rows = _finalize_splitmix64(self.example_ids * _GOLDEN_GAMMA + _to_signed_int64(self.key))
        columns = torch.arange(1, count + 1, device=device) * _GOLDEN_GAMMA
        return _finalize_splitmix64(rows[:, None] + columns[None, :])


def derive_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for a named purpose, for generators that want one (permutations, initial
    weights).
    """
    return _hash_names(seed, names) >> 1


def _hash_names(seed: int, names: tuple[object, ...]) -> int:
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _to_signed_int64(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def _logical_right_shift(words: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's is arithmetic on int64."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _finalize_splitmix64(words: Tensor) -> Tensor:
    words = (words ^ _logical_right_shift(words, 30)) * _MIX_MULTIPLIER_1
    words = (words ^ _logical_right_shift(words, 27)) * _MIX_MULTIPLIER_2
    return words ^ _logical_right_shift(words, 31)
