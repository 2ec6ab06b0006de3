"""The commands of README and docs that need no finished sweep, executed page by page, with small
settings added. For the page for newcomers with images of their own, all commands are.

`python tests/run_docs_commands.py FOLDER` executes the others too, which takes an hour.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_docs_commands import commands, files, images
from test_docs import PAGES

from raysweep.cli import main

# Pages in the order in which they go on from each other, and what each starts with.
FOLLOWED = {
    "tutorial": ["docs/tutorial.md", "docs/metrics.md"],
    "readme": [
        *("README.md", "docs/reproduce-a-table.md", "docs/methods.md", "docs/pipelines.md"),
        "docs/performance.md",
    ],
    "own": ["docs/your-own-images.md"],
    "extend": ["docs/extend.md"],
}
SMALL = "--set epochs=1 --set data.train_size=64 --set data.val_size=48 --set '*.attacks.*.steps=2'"
SMALL += " --set 'validation.finish.*.steps=1' --set 'validation.finish.*.runs=1'"
ARRAYS = "--set data.name=arrays --set model.name=digits_cnn --set batch_size=32"
# Regular expression -> what is added to a command that matches it; all that match are added.
ADDED = {
    r"^raysweep (train|tune|run)\b(?!.*--resume)": SMALL,
    r"lrat-table1": ARRAYS,
    r"^raysweep tune (?!.*(--plan|--resume))": "--trials 2",
    r"^raysweep eval": "--attack pgd20 --n 4",
}
# Commands of these pages that are not executed here, and why.
LEFT_OUT = {
    r"^python3 -m venv|^pip install": "how the environment of these tests was made",
    r"^mlflow ui": "a server that never ends",
    r"^raysweep (tune|run) (?!.*(--plan|mine))": "run_docs_commands.py runs the sweeps",
    r"^raysweep (show|compare) g1": "run_docs_commands.py has these",
    r"^raysweep eval (?!runs/first|s1|own)": "run_docs_commands.py has these",
}
EXECUTED_ELSEWHERE = {
    "docs/paper-figures.md": "test_pipelines.py, with a smaller pipeline; this one takes hours",
    "docs/logs.md": "test_logs.py, with logs of its own",
    "docs/evaluate-your-own-model.md": "run_docs_commands.py; test_eval.py has such a model",
    "docs/sweeps.md": "run_docs_commands.py, after the sweep g1 of the README",
    "docs/storage.md": "run_docs_commands.py, with a server that speaks S3",
    "docs/scheduling.md": "needs systemd or a cluster",
    "docs/cluster.md": "tests/cluster, with nodes of its own",
    "CONTRIBUTING.md": "the checks themselves",
}


def test_every_page_with_commands_is_followed_or_has_a_reason() -> None:
    with_commands = {page for page, text in PAGES.items() if list(commands(text))}
    followed = {page for pages in FOLLOWED.values() for page in pages}
    assert with_commands == followed | set(EXECUTED_ELSEWHERE)
    known = [c for page in followed for c in commands(PAGES[page])]
    for pattern in [*ADDED, *LEFT_OUT]:
        assert any(re.search(pattern, command) for command in known), f"{pattern}: no command"


def list_commands(pages: list[str], data: Path) -> Iterator[str]:
    """The commands of pages with the settings that make them small."""
    for page in pages:
        for command in commands(PAGES[page]):
            if any(re.search(pattern, command) for pattern in LEFT_OUT):
                continue
            added = [text for pattern, text in ADDED.items() if re.search(pattern, command)]
            yield re.sub(r"\bDIR\b", shlex.quote(str(data)), " ".join([command, *added]))


def follow_pages(pages: list[str], folder: Path) -> None:
    """Execute the commands of pages in a folder."""
    images(folder / "data")
    for page in pages:
        files(PAGES[page], folder)
    executed = []
    for command in list_commands(pages, folder / "data"):
        program, *arguments = shlex.split(command)
        if program == "raysweep":
            code = main(arguments)
        else:
            assert program == "python", command
            code = subprocess.run([sys.executable, *arguments], check=False).returncode
        assert code == 0, command
        executed.append(command)
    assert len(executed) >= 3


@pytest.mark.slow
@pytest.mark.needs_ray
@pytest.mark.mlflow
@pytest.mark.parametrize("name", [name for name in FOLLOWED if name != "own"])
def test_the_commands_of_the_pages_work(
    name: str, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    follow_pages(FOLLOWED[name], workdir)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.mlflow
def test_a_first_day_with_images_of_ones_own(ray_cluster, one_core, workdir: Path) -> None:
    follow_pages(FOLLOWED["own"], workdir)
