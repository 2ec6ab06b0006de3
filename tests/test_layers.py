"""Who may import whom: arrows point one way."""

import ast
import tomllib
from pathlib import Path

import pytest
from import_graph import imports

ROOT = Path(__file__).parent.parent / "raysweep"
# Each layer may import itself and those before it.
LAYERS = [
    (
        "redaction",
        "errors",
        "record_queue",
        "unrecorded_folders",
        "uri_passwords",
        "termination_signals",
        "lazy_modules",
        "atomic_files",
        "bounded_files",
        "code_files",
        "visible_text",
        "stored_data",
        "plain_console",
        "file_privacy",
        "yaml_files",
        "output_streams",
        "disk_space",
        "user_folders",
        "spec",
        "argument_types",
        "settings_reference",
        "schedules",
        "rng",
        "stores",
        "process_identity",
        "folder_lock",
        "bucket_lease",
        "leases",
        "formatting",
        "logs",
        "pareto",
    ),
    ("losses", "attacks", "instance_weights"),
    ("worker_group",),
    ("method",),
    ("catalog", "models", "data"),
    ("evaluation",),
    ("training",),
    ("sweep",),
    (
        "tracking",
        "notebook_display",
        "terminal",
        "text_figure",
        "plots",
        "comparison_plots",
        "instance_plots",
        "result_loading",
        "run_lookup",
        "run_comparison",
        "checkpoint_evaluation",
        "robustness_bundle",
    ),
    ("pipeline",),
    ("unrecorded_work",),
    ("commands", "shell_completion"),
    ("cli", "python_api"),
    ("__main__",),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_one_way(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "raysweep" and rest and rest != "__version__":
            assert RANK[rest.split(".")[0]] <= RANK[layer], f"{path} imports {name}"
        if top == "ray":
            assert layer == "sweep", f"{path} imports ray"
        if top == "mlflow":
            assert layer == "tracking", f"{path} imports mlflow"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_scipy_is_imported_where_it_is_used(path: Path) -> None:
    """Its statistics take one to three seconds, and commands that need none do not wait for them.
    Each statement outside a function runs when the module is imported.
    """
    text = path.read_text()
    statements: list[ast.AST] = [ast.parse(text)] if "scipy" in text else []
    while statements:
        node = statements.pop()
        names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
        names.append(getattr(node, "module", None) or "")
        assert not any(name.split(".")[0] == "scipy" for name in names), ast.unparse(node)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            statements += ast.iter_child_nodes(node)


def test_the_wheel_has_every_package() -> None:
    with (ROOT.parent / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(ROOT.parent).parts) for path in ROOT.rglob("*.py")}
    found |= {f"raysweep.{path.parent.name}" for path in ROOT.parent.glob("search_spaces/*.yaml")}
    found |= {"raysweep.pipelines" for _ in ROOT.parent.glob("pipelines/**/*.yaml")}
    assert set(listed) == found
