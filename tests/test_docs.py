"""README and docs: links lead somewhere, commands parse, code compiles, files in them are valid."""

import re
import shlex
import tomllib
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from raysweep.cli import build_parser
from raysweep.sweep.search_space import SearchSpace
from raysweep.yaml_files import parse_yaml

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


def heading_anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_to_headings_lead_somewhere() -> None:
    links = [
        (page, target, anchor)
        for page, text in PAGES.items()
        for target, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", text)
    ]
    assert len(links) > 10
    for page, target, anchor in links:
        file = (ROOT / page).parent / target if target else ROOT / page
        assert anchor in heading_anchors(file.read_text()), f"{page}: {target}#{anchor}"


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


@pytest.mark.needs_ray
def test_the_steps_of_the_architecture_are_functions_and_classes_of_the_code() -> None:
    steps = re.findall(r"^\| \d \| (.*?) \|", PAGES["docs/architecture.md"], re.M)
    names = [name for step in steps for name in re.findall(r"`([\w.]+)`", step)]
    assert len(steps) == 7 and len(names) == 8
    for name in names:
        module = re.match(r"\w+\.\w+(\.stage(?=\.))?", name)[0]
        attributes = name.removeprefix(f"{module}.").split(".")
        assert callable(reduce(getattr, attributes, import_module(f"raysweep.{module}")))


FORMER_MODULES = re.findall(
    r"^\| `raysweep\.([\w.]+)` \|",
    PAGES["docs/names-0.1-to-0.2.md"].partition("## raysweep\n")[0],
    re.M,
)


def test_pages_name_no_former_module() -> None:
    former = {
        name
        for name in FORMER_MODULES
        if "." in name and not (ROOT / f"raysweep/{name.replace('.', '/')}.py").exists()
    }
    assert len(former) > 20
    for page, text in PAGES.items():
        if page not in ("docs/names-0.1-to-0.2.md", "CHANGELOG.md"):
            written = set(re.findall(r"\b[a-z_]+[./][a-z_]+(?=\.py\b|`)", text))
            assert not {path.replace("/", ".") for path in written} & former, page


def test_the_workflow_covers_the_supported_pythons_and_runs_the_checks() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    pythons = jobs["tests"]["strategy"]["matrix"]["python"]
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    assert project["requires-python"] == f">={pythons[0]}"
    assert pythons == [f"3.{minor}" for minor in range(11, 11 + len(pythons))]
    local = (ROOT / ".ci" / "run").read_text().splitlines()
    steps = [step["run"] for step in jobs["static"]["steps"] if "run" in step]
    assert {"ruff check .", "ruff format --check .", "mypy"} <= set(steps) & set(local)


def test_commit_hooks_run_the_tools_of_the_environment() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    entries = {hook["id"]: hook["entry"].split()[0] for hook in repository["hooks"]}
    assert {"ruff", "mypy"} <= set(entries.values())
    assert all(hook["language"] == "system" for hook in repository["hooks"])


def test_ci_runs_exactly_the_readmes_test_command() -> None:
    assert len(COMMANDS) >= 30
    (command,) = re.findall(r"^python3 -m venv .*pytest -n 2$", PAGES["README.md"], re.M)
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert command in lines and {"ruff check .", "ruff format --check .", "mypy"} <= set(lines)
