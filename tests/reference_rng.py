"""Reference code for random numbers, batch order and augmentation of one example at a time, written
from the documentation of `raysweep.rng`.
"""

import hashlib

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def hash_stream_name(seed: int, *names: object) -> int:
    """The 64-bit number of a named stream: the first eight bytes of a sha256."""
    text = "/".join(str(part) for part in (seed, *names))
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)


def splitmix(word: int) -> int:
    """splitmix64's finaliser (Steele et al. 2014) in Python integers."""
    word &= _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def uniform(key: int, example: int, count: int, bits: int = 24) -> list[float]:
    """`count` numbers in [0, 1) of one example."""
    row = splitmix(example * _GOLDEN + key)
    return [
        (splitmix(row + place * _GOLDEN) >> (64 - bits)) / 2**bits for place in range(1, count + 1)
    ]


def shuffle_rows(count: int, *names: object) -> list[int]:
    """The numbers 0 to count - 1, shuffled by the stream of these names (the first is the seed)."""
    generator = torch.Generator().manual_seed(hash_stream_name(*names) >> 1)
    return torch.randperm(count, generator=generator).tolist()


def crop_and_flip(image: Tensor, seed: int, epoch: int, example: int) -> Tensor:
    """Pad an image (C, H, W) with four black pixels on each side, crop it to its own size, and
    perhaps mirror it.
    """
    key = hash_stream_name(seed, "augment", epoch)
    top, left = (
        int(number * 9) for number in uniform(hash_stream_name(key, "crop"), example, 2, bits=53)
    )
    flipped = uniform(hash_stream_name(key, "flip"), example, 1)[0] < 0.5
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            place = width - 1 - column if flipped else column
            source_row, source_column = top + row - 4, left + place - 4
            if 0 <= source_row < height and 0 <= source_column < width:
                out[:, row, column] = image[:, source_row, source_column]
    return out
