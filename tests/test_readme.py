import re
import shlex
from pathlib import Path

import pytest

from raysweep.cli import build_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHELL = "\n".join(re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S))
COMMANDS = re.findall(r"^(raysweep [^#\n]*?)\s*(?:#.*)?$", SHELL, re.M)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(target) -> None:
    assert (ROOT / target).exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command) -> None:
    build_parser().parse_args(shlex.split(command)[1:])


def test_ci_runs_exactly_the_readmes_test_command() -> None:
    assert len(COMMANDS) >= 7
    (command,) = re.findall(r"^python3 -m venv .*pytest$", README, re.M)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
