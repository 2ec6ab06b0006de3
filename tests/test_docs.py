"""README and docs: links lead somewhere, commands parse, code compiles, files in them are valid."""

import re
import shlex
from pathlib import Path

import pytest

from raysweep.cli import build_parser
from raysweep.spec import parse_yaml
from raysweep.sweep.search_space import SearchSpace

ROOT = Path(__file__).parent.parent
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text()
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
}


def blocks(language: str) -> list[tuple[str, str]]:
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.M | re.S)
    return [(name, block) for name, page in PAGES.items() for block in fence.findall(page)]


LINKS = sorted(
    {
        (n, link)
        for n, page in PAGES.items()
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page)
    }
)
COMMANDS = sorted(
    {
        (name, c)
        for name, block in blocks("sh")
        for c in re.findall(r"^(raysweep [^#\n|&>]*?)\s*(?:[#|&>].*)?$", block, re.M)
    }
)


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_links_lead_somewhere(page, target) -> None:
    assert (ROOT / page).parent.joinpath(target).exists()


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_parse(page, command) -> None:
    build_parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_code_compiles(page, code) -> None:
    compile(code, page, "exec")


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_yaml_is_sound(page, text) -> None:
    data = parse_yaml(text)
    if isinstance(data, dict) and "space" in data:
        assert SearchSpace.from_data(data).find_problems() == []


def test_ci_runs_exactly_the_readmes_test_command() -> None:
    assert len(COMMANDS) >= 30
    (command,) = re.findall(r"^python3 -m venv .*pytest -n 2$", PAGES["README.md"], re.M)
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert command in lines and {"ruff check .", "ruff format --check .", "mypy"} <= set(lines)
