"""Random numbers bit by bit against a slow splitmix64, and statistical tests of their
distributions, fixed seeds.
"""

import hashlib
import math

import numpy as np
import pytest
import torch
from scipy import stats

from raysweep.rng import ExampleRng, derive_seed

WORD = 1 << 64
GOLDEN = 0x9E3779B97F4A7C15
DTYPES = [torch.float32, torch.float64]


def splitmix64(state: int, count: int) -> list[int]:
    """The first numbers of the published generator from this state."""
    words = []
    for _ in range(count):
        state = (state + GOLDEN) % WORD
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
        words.append(z ^ (z >> 31))
    return words


def key_of(*names: object) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, names)).encode()).digest()[:8], "big")


def words_of(key: int, example: int, count: int) -> list[int]:
    """Each example has its own generator; its state is the output of the key's generator at the
    example's position.
    """
    (state,) = splitmix64((key + (example - 1) * GOLDEN) % WORD, 1)
    return splitmix64(state, count)


def test_the_slow_generator_is_splitmix64():
    """Its published numbers from the seeds 0 and 1234567."""
    assert splitmix64(0, 3) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 24), (torch.float64, 53)])
def test_uniform_bit_by_bit(dtype, bits):
    """The top bits of each word, in the order of the shape; ids may be large or negative."""
    ids = [0, 1, 2, 49_999, 2**40 + 7, -3]
    ours = ExampleRng.for_examples(torch.tensor(ids), 7, "start", 3).uniform((2, 3), dtype)
    assert ours.dtype == dtype and ours.shape == (6, 2, 3)
    slow = [
        [(word >> (64 - bits)) / 2**bits for word in words_of(key_of(7, "start", 3), i, 6)]
        for i in ids
    ]
    assert ours.reshape(6, 6).double().tolist() == slow


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 24), (torch.float64, 53)])
def test_uniform_has_all_bits_of_its_type(dtype, bits):
    scaled = rng(4000).uniform((5,), dtype).double() * 2**bits
    assert torch.equal(scaled, scaled.floor())
    for bit in range(bits):
        assert abs(((scaled / 2**bit).floor() % 2).mean() - 0.5) < 0.02


def rng(count: int, seed: int = 3) -> ExampleRng:
    return ExampleRng.for_examples(torch.arange(count), seed)


def test_numbers_never_change():
    """Published results depend on these: they never change."""
    few = ExampleRng.for_examples(torch.tensor([0, 5]), 0, "a")
    assert few.key == key_of("0", "a") == 0xD3216B8DC7C46489
    assert (few.uniform((2,), torch.float64) * 2**53).long().tolist()[1] == [
        1379180272421508274 >> 11,
        3532078002800876099 >> 11,
    ]
    assert few.derive_stream("b", 1).key == key_of(few.key, "b", 1)
    assert derive_seed(0, "a") == key_of(0, "a") >> 1
    assert 0 <= derive_seed(5, "x") < 2**63


def test_normal_and_symmetric_number_by_number():
    """Box and Muller from two streams, sqrt(-2 log(1 - u)) cos(2 pi v), and 2 u - 1."""
    ids, key = [0, 4], key_of(7, "a")
    ours = ExampleRng.for_examples(torch.tensor(ids), 7, "a")
    normal, symmetric = (
        ours.normal((3,), torch.float64),
        ours.symmetric_uniform((3,), torch.float64),
    )
    for row, i in enumerate(ids):
        u, v, w = (
            [(word >> 11) / 2**53 for word in words_of(k, i, 3)]
            for k in (key_of(key, "radius"), key_of(key, "angle"), key)
        )
        slow = [
            math.sqrt(-2 * math.log(1 - a)) * math.cos(2 * math.pi * b)
            for a, b in zip(u, v, strict=True)
        ]
        assert normal[row].tolist() == pytest.approx(slow, rel=1e-12, abs=1e-14)
        assert symmetric[row].tolist() == [2 * a - 1 for a in w]


@pytest.mark.parametrize("dtype", DTYPES)
def test_uniform_and_symmetric(dtype):
    """[0, 1) and [-1, 1), flat by the Kolmogorov-Smirnov test."""
    u, s = (
        draw((20,), dtype).flatten().double().numpy()
        for draw in (rng(5000).uniform, rng(5000).symmetric_uniform)
    )
    assert 0 <= u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1
    assert -1 <= s.min() < -1 + 2e-4 and 1 - 2e-4 < s.max() < 1
    assert abs(s.mean()) < 0.006 and abs(s.var() - 1 / 3) < 0.005
    assert stats.kstest(u, "uniform").pvalue > 0.01
    assert stats.kstest(s, "uniform", (-1, 2)).pvalue > 0.01
    assert rng(2).symmetric_uniform((3,), dtype).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_normal(dtype):
    """Mean, variance, kurtosis, both tails, and the whole distribution by the Kolmogorov-Smirnov
    test.
    """
    draws = rng(5000).normal((40,), dtype)
    assert draws.dtype == dtype and draws.shape == (5000, 40) and draws.isfinite().all()
    n = draws.flatten().double().numpy()
    assert abs(n.mean()) < 0.007 and abs(n.var() - 1) < 0.01
    assert abs(stats.kurtosis(n)) < 0.04 and abs(stats.skew(n)) < 0.02
    for beyond in (1, 2, 3):
        expected = stats.norm.sf(beyond)
        for share in ((n > beyond).mean(), (n < -beyond).mean()):
            assert abs(share - expected) < 4 * math.sqrt(expected / len(n))
    assert n.max() > 4 and n.min() < -4
    assert stats.kstest(n, "norm").pvalue > 0.01
    # Neighbours in a row, and the same place in neighbouring rows.
    assert (
        abs((draws[:, 1:] * draws[:, :-1]).mean()) < 0.01
        and abs((draws[1:] * draws[:-1]).mean()) < 0.01
    )


@pytest.mark.parametrize("high", [1, 2, 7, 1000])
def test_integers(high):
    i = rng(4000).integers(high, (10,))
    assert i.dtype == torch.int64 and i.shape == (4000, 10)
    counts = torch.bincount(i.flatten(), minlength=high)
    assert i.min() == 0 and i.max() == high - 1 and len(counts) == high
    assert high == 1 or stats.chisquare(counts.numpy()).pvalue > 0.01
    assert rng(5).integers(high).shape == (5,)


def test_integers_of_a_wide_range():
    """24 bits would give only every 2^16-th of 2^40 numbers."""
    i = rng(2000).integers(2**40)
    assert i.min() >= 0 and i.max() < 2**40 and len(i.unique()) == 2000
    assert abs((i % 2).double().mean() - 0.5) < 0.05 and abs(i.double().mean() / 2**40 - 0.5) < 0.03


def test_streams_are_independent():
    """Of each other, of their parents, of the order and the grouping of their names, of seed and
    example.
    """
    parent = rng(3000)
    streams = [
        parent, parent.derive_stream("a"), parent.derive_stream("b"),
        parent.derive_stream("a", "b"), parent.derive_stream("b", "a"),
        parent.derive_stream("a").derive_stream("b"), parent.derive_stream("a", 0),
        parent.derive_stream("a", 1), parent.derive_stream("a", 10),
        rng(3000, seed=4), rng(3000, seed=-3), ExampleRng.for_examples(torch.arange(3000), 3, "a"),
        ExampleRng.for_examples(torch.arange(3000) + 1, 3),
        ExampleRng.for_examples(torch.arange(3000), 4, "a"),
    ]  # fmt: skip
    draws = np.array([stream.uniform((4,), torch.float64).flatten().numpy() for stream in streams])
    off_diagonal = np.corrcoef(draws)[~np.eye(len(draws), dtype=bool)]
    assert np.abs(off_diagonal).max() < 0.045
    columns = np.corrcoef(parent.uniform((30,), torch.float64).numpy().T)[~np.eye(30, dtype=bool)]
    assert np.abs(columns).max() < 0.09
    assert torch.equal(
        parent.derive_stream("a", 1).uniform((4,)), parent.derive_stream("a", "1").uniform((4,))
    )
    assert torch.equal(parent.uniform((4,)), parent.uniform((4,)))


def test_rows_are_the_same_examples():
    """By a mask, by positions in any order, twice over; streams of rows are rows of streams."""
    whole = ExampleRng.for_examples(torch.tensor([9, 4, 7, 1]), 0)
    draws = whole.normal((3,))
    assert torch.equal(
        whole.select_rows(torch.tensor([True, False, True, False])).normal((3,)), draws[[0, 2]]
    )
    assert torch.equal(whole.select_rows(torch.tensor([3, 0])).normal((3,)), draws[[3, 0]])
    assert torch.equal(
        whole.select_rows(torch.tensor([3, 0, 1])).select_rows(torch.tensor([2, 0])).normal((3,)),
        draws[[1, 3]],
    )
    assert torch.equal(
        whole.select_rows(torch.tensor([2])).derive_stream("x").uniform((3,)),
        whole.derive_stream("x").uniform((3,))[[2]],
    )
    assert whole.select_rows(torch.zeros(4, dtype=torch.bool)).uniform((3,)).shape == (0, 3)


def test_a_longer_draw_begins_like_a_shorter_one():
    assert torch.equal(rng(5).uniform((9,))[:, :4], rng(5).uniform((4,)))


@pytest.mark.parametrize("count", [0, 1, 300, 12_289])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_draws_the_numbers_of_torch(count, dtype):
    """Bit by bit, for rows shorter and longer than a block, none, and ids that are a view."""
    for ids in (torch.arange(0, 700, 7)[::2], torch.tensor([2**62 + 5, -9]), torch.arange(0)):
        draws = ExampleRng.for_examples(ids, 5, "start")
        fast, plain = draws._uniform_by_numpy(count, dtype), draws._uniform_by_torch(count, dtype)
        assert fast.dtype == dtype and torch.equal(fast, plain)
