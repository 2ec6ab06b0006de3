import torch

from raysweep.rng import ExampleRng


def test_an_examples_numbers_do_not_depend_on_its_batch() -> None:
    everyone = ExampleRng.for_examples(torch.arange(100), 7, "start")
    few = ExampleRng.for_examples(torch.tensor([42, 3]), 7, "start")
    for draw in (
        lambda r: r.uniform((3, 4)),
        lambda r: r.normal((5,)),
        lambda r: r.integers(9, (2,)),
    ):
        assert torch.equal(draw(everyone)[[42, 3]], draw(few))


def test_streams_seeds_and_examples_are_independent() -> None:
    index = torch.arange(2000)
    a = ExampleRng.for_examples(index, 0, "a").uniform((10,))
    for other in (
        ExampleRng.for_examples(index, 1, "a"),
        ExampleRng.for_examples(index, 0, "b"),
        ExampleRng.for_examples(index + 1, 0, "a"),
    ):
        correlation = torch.corrcoef(torch.stack([a.flatten(), other.uniform((10,)).flatten()]))[
            0, 1
        ]
        assert abs(correlation) < 0.03


def test_distributions() -> None:
    rng = ExampleRng.for_examples(torch.arange(5000), 3)
    u, n, i = rng.uniform((20,)), rng.normal((20,)), rng.integers(7, (20,))
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.001
    assert abs(n.mean()) < 0.02 and abs(n.var() - 1) < 0.02
    assert torch.equal(
        torch.bincount(i.flatten(), minlength=7) > 13000, torch.ones(7, dtype=torch.bool)
    )
    assert torch.isfinite(n).all()
