"""raysweep list"""

import inspect
import json
import textwrap
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from raysweep.attacks import ATTACKS
from raysweep.catalog import METHODS
from raysweep.data.sources import DATASETS
from raysweep.evaluation.validation import METRICS
from raysweep.models import MODELS
from raysweep.pipeline.shipped import pipelines
from raysweep.sweep.space import spaces
from raysweep.training.presets import presets


def run(args: Namespace) -> int:
    tables: dict[str, Mapping[str, str]] = {
        "methods": _about(METHODS),
        "models": _about(MODELS),
        "data": _about(DATASETS),
        "attacks": ATTACKS,
        "metrics": METRICS,
    }
    if args.json:
        more: dict[str, object] = {"spaces": spaces(), "presets": presets(), "pipelines": pipelines()}
        print(json.dumps({**tables, **more}, indent=1))
        return 0
    for title, rows in tables.items():
        _table(title, rows)
    for title, names in (("search spaces", spaces()), ("presets: runs of the papers", presets())):
        print(title)
        print(textwrap.fill("  ".join(names), 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))
    _table("pipelines", pipelines())
    print(
        "\nraysweep show NAME prints every setting of a method, preset or pipeline; where one name is several of these,"
    )
    print("preset:NAME and space:NAME say which. raysweep tune METHOD sweeps a method; raysweep train METHOD|PRESET is")
    print("one run; raysweep run PIPELINE runs a pipeline.")
    return 0


def _table(title: str, rows: Mapping[str, str]) -> None:
    width = max(map(len, rows))
    print(title)
    for name, about in rows.items():
        print(f"  {name:<{width}}  {about}")


def _about(table: Mapping[str, Callable[..., Any]]) -> dict[str, str]:
    """First line of each docstring; a class's own only (no inherited prose)."""
    return {name: (inspect.getdoc(entry) or "").split("\n")[0] for name, entry in table.items()}
