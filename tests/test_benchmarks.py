"""`python benchmarks` in its smallest form: that it runs and what it claims of results; nothing
here is timed.
"""

import runpy
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import forked_processes
import pytest
import torch

from raysweep.rng import ExampleRng
from raysweep.training.presets import resolve_training_config

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import before_after  # noqa: E402
import gair_fat_labels  # noqa: E402
import paper_pipelines  # noqa: E402
import training_step  # noqa: E402


@pytest.mark.parametrize("method", ["gairat", "lrat"])
def test_the_plain_step_is_written_from_the_papers_and_ours_computes_the_same(method) -> None:
    subject = training_step.prepare_subject(method, 24, small=True)
    plain, ours = (
        training_step.build_plain_step(subject, method == "gairat")(),
        training_step.build_our_step(subject, {})(),
    )
    fast = training_step.build_our_step(subject, {"channels_last": True, "fold": True})()
    assert len(plain.kappa.unique()) > 2
    for found in (ours, fast):
        assert torch.equal(plain.kappa.long(), found.kappa)
        assert found.loss == pytest.approx(plain.loss, rel=1e-4)
        assert (found.grad - plain.grad).norm() < 1e-2 * plain.grad.norm()


def test_images_in_the_order_in_which_they_stopped_have_other_labels(digits) -> None:
    """The same images as those of PGD, early ones first, and only after the burn-in."""
    config = gair_fat_labels.build_config("gair-fat", seed=0, epochs=8, burn_in=4)
    mispaired = gair_fat_labels.pair_with_batch_labels(config)
    model = config.model.build_model(digits.channels, digits.classes, 0)
    x, y = digits.train.get_float_images(slice(0, 32)), digits.train.y[:32]
    rng = ExampleRng.for_examples(digits.train.index[:32], 0)
    for epoch in (3, 4):
        ours, theirs = (
            run.resolve_at(epoch).method.attacks["pgd"](model, x, y, rng)
            for run in (config, mispaired)
        )
        order = sorted(range(32), key=lambda row: int(ours.queries[row]))
        if epoch == 3:
            order = list(range(32))
        assert torch.equal(theirs.x_adv, ours.x_adv[order])
        assert torch.equal(theirs.kappa, ours.kappa[order])
    assert order != list(range(32)), "some stop later than others"


@pytest.mark.parametrize(
    ("preset", "epochs", "expected"),
    [
        ("gairat-fig15-burn-in-60", 100, {"burn_in": 6, "boundaries": [2, 5]}),
        ("gairat-fig18-tau-036", 100, {"burn_in": 7, "boundaries": [4, 7]}),
        ("gairat-fig11-cyclic", 200, {"burn_in": 5, "epochs": [0, 4, 10], "lr": 0.05}),
        ("gairat-table2", 100, {"burn_in": 7, "boundaries": [7, 8], "window": [8, 10]}),
    ],
)
def test_a_reduced_row_has_a_tenth_of_the_epochs(preset: str, epochs: int, expected: dict) -> None:
    overrides = {"protocol": "paper"} if "window" in expected else {}
    config = resolve_training_config(preset, overrides)
    settings = dict(paper_pipelines.iter_reduced_settings(config, 10, epochs))
    lr = settings["optim.lr"]
    tau = settings.get("method.attacks.pgd.tau", lr)
    found = {
        "burn_in": next(value for path, value in settings.items() if path.endswith("burn_in")),
        "boundaries": tau.get("boundaries"),
        "epochs": lr.get("epochs"),
        "lr": max(lr["values"]),
        "window": settings.get("validation.window"),
    }
    assert settings["epochs"] == 10
    assert {name: found[name] for name in expected} == expected


def ratios(printed: str) -> list[list[str]]:
    """The cells of the table at the end of the output."""
    *_, last = printed.strip().split("\n\n")
    head, _, *rows = last.splitlines()
    assert head == "| what | measured | goal | n |"
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def interpret(arguments: tuple[str, ...]) -> None:
    """`python ARGUMENTS`, which begin with -c, with -m or with a path."""
    if arguments[0] == "-c":
        _, code, *sys.argv[1:] = arguments
        exec(code, {})
    elif arguments[0] == "-m":
        _, module, *sys.argv[1:] = arguments
        runpy.run_module(module, run_name="__main__")
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


def python_in_a_fork(*arguments: str, cwd: Path = ROOT) -> str:
    """What `python` prints (see `footprint.python`), without the start of an interpreter."""
    done = forked_processes.start_function(interpret, arguments, folder=cwd)
    assert done.wait() == 0, done.err
    return done.out


@pytest.mark.slow
def test_one_command_measures_the_step_and_the_objective() -> None:
    printed = python_in_a_fork("benchmarks", "step", "objective")
    assert [goal for _, _, goal, _ in ratios(printed)] == ["2 (float32)", "3.5 (bf16)"] * 2 + [
        "10%"
    ]
    assert "| + folded batch norms (default) |" in printed and "GFLOP/s in float32" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        "autoattack",
        "footprint",
        pytest.param("sweep", marks=pytest.mark.ray),
        pytest.param("scaling", marks=pytest.mark.ray),
    ],
)
def test_each_part_ends_with_a_table_of_ratios(
    part, request, monkeypatch, capsys, tmp_path, empty_store
) -> None:
    """The parts run in this process and on the tests' cluster; the processes that they start are
    forks.
    """
    if request.node.get_closest_marker("ray"):
        request.getfixturevalue("ray_cluster")
    forked_processes.replace_spawn(monkeypatch)
    monkeypatch.setattr("footprint.python", python_in_a_fork)
    empty_store(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["benchmarks", part])
    spec = spec_from_file_location("benchmarks_command", ROOT / "benchmarks" / "__main__.py")
    assert spec is not None and spec.loader is not None
    command = module_from_spec(spec)
    spec.loader.exec_module(command)
    command.main()
    assert len(ratios(capsys.readouterr().out)) >= 2


def test_rows_of_before_and_after_have_equal_decimals() -> None:
    results = {
        "before": [{"autoattack": 0.66, "objective": 0.7, "epochs": 86}] * 2,
        "after": [
            {"autoattack": 0.6578, "objective": 0.7111, "epochs": 100},
            {"autoattack": 0.68, "objective": 0.7, "epochs": 96},
        ],
    }
    first, _, means, differences = before_after.list_rows(results)
    assert first == ["0", "0.6600", "0.6578", "0.7000", "0.7111", "86", "100"]
    assert means[1:3] == ["0.6600 +- 0.0000", "0.6689 +- 0.0111"]
    assert means[5:] == ["86 +- 0", "98 +- 2"]
    assert differences[2] == "+0.0089 (-0.1321 to +0.1499)"
    assert differences[6] == "+12 (-13 to +37)"
