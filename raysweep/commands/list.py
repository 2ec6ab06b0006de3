"""raysweep list"""

import inspect
import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from raysweep.catalog import METHODS
from raysweep.data.sources import DATASETS
from raysweep.models import MODELS
from raysweep.pipeline.shipped import pipelines
from raysweep.sweep.space import spaces


def run(args: Namespace) -> int:
    tables = {"methods": _about(METHODS), "models": _about(MODELS), "data": _about(DATASETS)}
    if args.json:
        print(json.dumps({**tables, "spaces": spaces(), "pipelines": pipelines()}, indent=1))
        return 0
    for title, rows in tables.items():
        print(title)
        for name, about in rows.items():
            print(f"  {name:<14} {about}".rstrip())
    print("search spaces\n  " + " ".join(spaces()))
    print("pipelines")
    for name, about in pipelines().items():
        print(f"  {name:<14} {about}")
    print("\nraysweep show NAME prints every setting of a method or pipeline; raysweep tune NAME sweeps a method;")
    print("raysweep run NAME runs a pipeline.")
    return 0


def _about(table: Mapping[str, Callable[..., Any]]) -> dict[str, str]:
    """First line of each docstring; a class's own only (no inherited prose)."""
    return {name: (inspect.getdoc(entry) or "").split("\n")[0] for name, entry in table.items()}
