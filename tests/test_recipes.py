"""docs/extend.md, done: its changes applied to a copy of the package, its commands run on that."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import forked_processes
import pytest

from raysweep.cli import main

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extend.md").read_text()
FILES = dict(re.findall(r"^```yaml\n# ([\w-]+\.yaml).*?\n(.*?)^```", PAGE, re.M | re.S))
DIFFS = re.findall(r"^```diff\n(.*?)^```", PAGE, re.M | re.S)
SMALL = ["--set", "epochs=1", "--set", "data.train_size=64", "--set", "data.val_size=50"]
METHOD = """
method:
  name: own
  attacks: {noise: {kind: noise, eps: 0.1}}
  terms:
    natural: {on: natural, loss: squared}
    robust: {on: noise, weight: {kind: focal, gamma: 2}}
"""
PIPELINE = """
stages:
  - {kind: train, seeds: [0], runs: {own: {method: at}}}
  - {kind: autoattack}
  - {kind: notify, file: verdict.txt}
"""


@pytest.fixture(scope="module")
def extended_package(tmp_path_factory) -> Path:
    """A folder with the files of the page and the package with all of its changes."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("raysweep", "search_spaces", "pipelines"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for number, change in enumerate(DIFFS):
        (folder / f"{number}.diff").write_text(change)
        subprocess.run(["git", "apply", f"{number}.diff"], cwd=folder, check=True)
    for name, text in {**FILES, "own.yaml": METHOD, "pipeline.yaml": PIPELINE}.items():
        (folder / name).write_text(text)
    return folder


def test_the_page_has_them_all() -> None:
    assert list(FILES) == ["both.yaml", "both-space.yaml"] and len(DIFFS) == 5


def test_a_method_without_python(extended_package, monkeypatch, capsys) -> None:
    monkeypatch.chdir(extended_package)
    assert main(["train", "both.yaml", *SMALL]) == 0
    assert "best epoch 1" in capsys.readouterr().out


def run_commands(folder: Path, commands: list[list[str]]) -> int:
    """Run commands of the package in `folder`, in a process that has imported another."""
    for name in list(sys.modules):
        if name.partition(".")[0] == "raysweep":
            del sys.modules[name]
    sys.path.insert(0, str(folder))
    import raysweep.cli

    assert Path(raysweep.__file__).is_relative_to(folder)
    return max(raysweep.cli.main(command) for command in commands)


@pytest.mark.slow
def test_a_weight_a_loss_an_attack_a_stage_and_a_model(extended_package) -> None:
    commands = [
        ["train", "own.yaml", *SMALL, "--set", "model.name=my_cnn"],
        ["run", "pipeline.yaml", "--plan"],
    ]
    done = forked_processes.start_function(
        run_commands, extended_package, commands, folder=extended_package
    )
    assert done.wait() == 0, done.err
    assert "best epoch 1" in done.out and "robust accuracies into verdict.txt" in done.out
