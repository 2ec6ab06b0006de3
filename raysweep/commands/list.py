"""raysweep list"""

import inspect
import json
import textwrap
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from raysweep.attacks import ATTACK_DESCRIPTIONS
from raysweep.catalog import METHODS
from raysweep.data.datasets import DATASET_LOADERS
from raysweep.models import MODELS
from raysweep.pipeline.builtin_pipelines import list_builtin_pipelines
from raysweep.sweep.search_space import list_builtin_spaces
from raysweep.training.presets import list_presets
from raysweep.training.validation import OBJECTIVE_DESCRIPTIONS


def run_command(args: Namespace) -> int:
    tables: dict[str, Mapping[str, str]] = {
        "methods": _summarize_docstrings(METHODS),
        "models": _summarize_docstrings(MODELS),
        "data": _summarize_docstrings(DATASET_LOADERS),
        "attacks": ATTACK_DESCRIPTIONS,
        "metrics": OBJECTIVE_DESCRIPTIONS,
    }
    if args.json:
        more: dict[str, object] = {
            "spaces": list_builtin_spaces(),
            "presets": list_presets(),
            "pipelines": list_builtin_pipelines(),
        }
        print(json.dumps({**tables, **more}, indent=1))
        return 0
    for title, rows in tables.items():
        _print_table(title, rows)
    for title, names in (
        ("search spaces", list_builtin_spaces()),
        ("presets: runs of the papers", list_presets()),
    ):
        print(title)
        print(
            textwrap.fill(
                "  ".join(names),
                118,
                initial_indent="  ",
                subsequent_indent="  ",
                break_on_hyphens=False,
            )
        )
    _print_table("pipelines", list_builtin_pipelines())
    print(
        "\nraysweep show NAME prints every setting of a method, preset or pipeline; where one name is several of these,"
    )
    print(
        "preset:NAME and space:NAME say which. raysweep tune METHOD sweeps a method; raysweep train METHOD|PRESET is"
    )
    print("one run; raysweep run PIPELINE runs a pipeline.")
    return 0


def _print_table(title: str, rows: Mapping[str, str]) -> None:
    width = max(map(len, rows))
    print(title)
    for name, about in rows.items():
        print(f"  {name:<{width}}  {about}")


def _summarize_docstrings(entries: Mapping[str, Callable[..., Any]]) -> dict[str, str]:
    """First line of each docstring; a class's own only (no inherited prose)."""
    return {name: (inspect.getdoc(entry) or "").split("\n")[0] for name, entry in entries.items()}
