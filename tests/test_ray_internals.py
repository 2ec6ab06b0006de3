"""Private names of Ray: one module uses them, and says in one line when a version of Ray lacks one.
Environment variables: importing raysweep sets none, a cluster has them.
"""

import ast
import functools
import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked_processes
import psutil
import pytest

from raysweep.cli import main
from raysweep.errors import CompatibilityWarning, ExitCode, InfrastructureError
from raysweep.sweep import ray_internals
from raysweep.sweep.cluster import connect_to_cluster
from raysweep.sweep.ray_environment import RAY_ENVIRONMENT, ray_environment
from raysweep.sweep.ray_internals import (
    RAY_INTERNALS,
    RayInternal,
    check_ray_internals,
    listen_on_loopback,
)

pytestmark = pytest.mark.needs_ray
ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "raysweep").rglob("*.py"))
REQUIRED = [name for name in RAY_INTERNALS if name.is_required]
OPTIONAL = [name for name in RAY_INTERNALS if not name.is_required]
ENDING = "; raysweep is known to work with Ray 2.60: pip install 'ray[default,tune,train]==2.60.*'"


def dotted(name: RayInternal) -> str:
    return name.dotted_name


def is_private(name: str) -> bool:
    """Whether a dotted name, or a part of it, is Ray's own business."""
    return any(part.startswith("_") or part == "ray_constants" for part in name.split("."))


def ray_imports(tree: ast.AST) -> dict[str, str]:
    """What a module imports of Ray: {full name: the name that it is bound to}."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.name] = (alias.asname or alias.name).split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[f"{node.module}.{alias.name}"] = alias.asname or alias.name
    return {name: bound for name, bound in found.items() if name.split(".")[0] == "ray"}


def find_private_names(text: str) -> list[str]:
    """Private names of Ray in a source: imported, followed from an imported name, or quoted."""
    tree = ast.parse(text)
    of_ray = ray_imports(tree)
    found = [name for name in of_ray if is_private(name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            belongs_to_ray = re.split(r"\W", name)[0] in of_ray.values()
            if node.attr == "__mixins__" or (belongs_to_ray and is_private(node.attr)):
                found.append(name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value
            if name == "__mixins__" or (name.startswith("ray.") and is_private(name)):
                found.append(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_one_module_uses_private_names_of_ray(path: Path) -> None:
    found = find_private_names(path.read_text())
    assert bool(found) == (path.name == "ray_internals.py"), found


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("from ray._private import ray_constants", "ray._private.ray_constants"),
        ("import ray._raylet as r", "ray._raylet"),
        ("from ray import _raylet", "ray._raylet"),
        ("import ray\nray._private.worker", "ray._private"),
        ("import ray as r\nr.nodes()\nr.init(1)._token", "r.init(1)._token"),
        ("def f():\n from ray import tune\n tune.x._y.z", "tune.x._y"),
        ("f.__mixins__ = ()", "f.__mixins__"),
        ("setattr(f, '__mixins__', ())", "__mixins__"),
        ("logging.getLogger('ray._private.worker')", "ray._private.worker"),
    ],
)
def test_private_names_are_found(text: str, name: str) -> None:
    assert name in find_private_names(text)


def test_public_names_and_those_of_others_are_not_private() -> None:
    text = "import ray\nfrom ray import tune\nself._x = ray.nodes()\nself._x._y\n'raysweep._z'"
    assert find_private_names(text) == []


def remove(name: RayInternal, patch: pytest.MonkeyPatch) -> None:
    """Delete the name from the installed Ray."""
    owner: Any = importlib.import_module(name.module)
    *owners, last = name.attribute.split(".")
    for part in owners:
        owner = getattr(owner, part)
    patch.delattr(owner, last)


def caught_lines(function: Callable[[], object]) -> list[str]:
    """The texts of the warnings of a function."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CompatibilityWarning)
        function()
    return [str(one.message) for one in caught if one.category is CompatibilityWarning]


def test_the_installed_ray_has_all_names() -> None:
    assert caught_lines(lambda: check_ray_internals("start", "connect", "sweep")) == []
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line[0] != "#"
    )
    assert pins["ray"].startswith(ray_internals.KNOWN_RAY_VERSIONS)


@pytest.mark.parametrize("name", OPTIONAL, ids=dotted)
def test_a_missing_name_is_one_line(name: RayInternal, monkeypatch: pytest.MonkeyPatch) -> None:
    remove(name, monkeypatch)
    (line,) = caught_lines(lambda: check_ray_internals("start", "connect", "sweep"))
    assert name.dotted_name in line and name.consequence in line
    assert line.startswith("Ray 2.") and line.endswith(ENDING) and "\n" not in line


def test_the_command_line_prints_the_line_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def check() -> list[str]:
        check_ray_internals(OPTIONAL[0].use)
        return []

    remove(OPTIONAL[0], monkeypatch)
    monkeypatch.setattr("raysweep.training.presets.list_presets", check)
    assert main(["list", "--json"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("raysweep: warning: Ray 2.") and line.endswith(ENDING)


@pytest.mark.parametrize("name", OPTIONAL, ids=dotted)
def test_without_a_name_that_is_not_required_everything_else_works(
    name: RayInternal, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove(name, monkeypatch)
    ray_internals.silence_authentication_log()
    with ray_internals.hide_lost_process_messages():
        pass
    assert ray_internals.requires_token() in (True, False)
    head = {"Resources": {"node:__internal_head__": 1.0}}
    assert ray_internals.is_head_node(head) == (name.attribute != "HEAD_NODE_RESOURCE_NAME")
    with listen_on_loopback():
        pass


@pytest.mark.parametrize(
    "name", [name for name in RAY_INTERNALS if name.value is not None], ids=dotted
)
def test_a_name_with_another_value_is_one_line(
    name: RayInternal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{name.module}.{name.attribute}", "RAY_ANOTHER")
    (line,) = caught_lines(lambda: check_ray_internals(name.use))
    assert f"{name.dotted_name} = {name.value!r}" in line


def start_cluster_without(number: int) -> None:
    """Run a command that starts a cluster with a version of Ray that lacks a required name."""
    import ray

    remove(REQUIRED[number], pytest.MonkeyPatch())
    children = psutil.Process().children()
    code = main(["doctor"])
    assert not ray.is_initialized() and psutil.Process().children() == children
    sys.exit(code)


@pytest.mark.parametrize("address", ["", "local"])
@pytest.mark.parametrize("name", REQUIRED, ids=dotted)
def test_no_cluster_starts_that_might_listen_to_the_world(
    name: RayInternal, address: str, tmp_path: Path
) -> None:
    tried = forked_processes.start_function(
        start_cluster_without,
        REQUIRED.index(name),
        folder=tmp_path,
        environment={"RAY_ADDRESS": address},
        imports=forked_processes.COMMANDS,
    )
    assert tried.wait() == ExitCode.INFRASTRUCTURE, tried.err
    (line,) = (line for line in tried.out.splitlines() if name.dotted_name in line)
    assert "Ray 2." in line and name.consequence in line, "doctor names it in one line"


def test_a_ray_that_ignores_the_switch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "192.0.2.7")
    before = dict(os.environ)
    refused = pytest.raises(InfrastructureError, match=r"would listen on 192\.0\.2\.7")
    with refused, listen_on_loopback():
        raise AssertionError("the block runs")
    assert dict(os.environ) == before


@pytest.mark.parametrize("users", [None, "1"])
def test_the_switch_is_put_back(users: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import ray_constants

    variable = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    monkeypatch.delenv(variable, raising=False)
    if users is not None:
        monkeypatch.setenv(variable, users)
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    with listen_on_loopback():
        assert os.environ[variable] == "0" and ray_constants.ENABLE_RAY_CLUSTER is False
    assert os.environ.get(variable) == users and ray_constants.ENABLE_RAY_CLUSTER is True


def test_a_tune_that_ignores_mixins_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.tune.trainable import function_trainable

    wrap = function_trainable.wrap_function
    monkeypatch.setattr(
        function_trainable, "wrap_function", lambda train: wrap(lambda config: train(config))
    )
    (line,) = caught_lines(lambda: check_ray_internals("sweep"))
    assert "__mixins__" in line and "loses its unfinished epoch" in line


def test_messages_about_lost_processes_are_hidden_unless_the_user_set_a_pattern(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray._private.ray_logging import stderr_deduplicator, stdout_deduplicator

    def printed(log_filter: Any, line: str) -> list[str]:
        batches = log_filter.deduplicate({"lines": [line], "pid": "raylet", "is_err": False})
        return [text for batch in batches for text in batch["lines"]]

    lost = "A worker died or was killed while executing a task"
    for one in (stdout_deduplicator, stderr_deduplicator):
        monkeypatch.setattr(one, "skip_re", None)
        # `recent` buffers messages for a while: leave out those of the tests' cluster.
        monkeypatch.setattr(one, "recent", {})
        with ray_internals.hide_lost_process_messages():
            assert printed(one, lost) == [] and printed(one, "another message") != []
        assert printed(one, lost) == [lost], "after the block"
    with monkeypatch.context() as patch:
        users = re.compile("another")
        patch.setattr(stdout_deduplicator, "skip_re", users)
        with ray_internals.hide_lost_process_messages():
            assert stdout_deduplicator.skip_re is users


def test_the_environment_is_set_in_a_block_and_users_values_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in RAY_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "7")
    before = dict(os.environ)
    with ray_environment(), ray_environment():
        assert dict(os.environ) == {**RAY_ENVIRONMENT, **before}
    assert dict(os.environ) == before


def import_everything(ray_may_be_imported: bool) -> None:
    """Import all modules of raysweep anew, and print what that changed in the environment."""
    for name in [name for name in sys.modules if name.split(".")[0] == "raysweep"]:
        del sys.modules[name]
    if not ray_may_be_imported:
        for name in [name for name in sys.modules if name.split(".")[0] == "ray"]:
            del sys.modules[name]
        sys.modules["ray"] = None  # type: ignore[assignment]
    before, n_imported = dict(os.environ), 0
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        try:
            importlib.import_module(".".join(parts).removesuffix(".__init__"))
        except ModuleNotFoundError as error:
            assert str(error.name).startswith("ray") and not ray_may_be_imported, error
            continue
        n_imported += 1
    print(n_imported, set(os.environ.items()) ^ set(before.items()) or "unchanged")


@pytest.mark.parametrize("ray_may_be_imported", [True, False])
def test_importing_raysweep_sets_no_environment_variable(ray_may_be_imported: bool) -> None:
    imported = forked_processes.start_function(
        import_everything, ray_may_be_imported, imports=forked_processes.COMMANDS
    )
    assert imported.wait() == 0, imported.err
    count, _, changes = imported.out.strip().partition(" ")
    assert changes == "unchanged"
    assert int(count) == len(FILES) if ray_may_be_imported else int(count) > 100


def start_own_cluster() -> None:
    """Start a cluster as commands do; print what differs from what it should be."""
    import ray

    from raysweep.sweep.ray_access import create_private_ray_folder

    before, marked = dict(os.environ), {"TUNE_GLOBAL_CHECKPOINT_S": "77"}
    os.environ.update(marked)
    with connect_to_cluster(n_cpus=1):
        workers = ray.get(ray.remote(lambda: dict(os.environ)).remote())
        expected = {**RAY_ENVIRONMENT, **marked}
        print("workers have them:", {name: workers.get(name) for name in expected} == expected)
        folder = create_private_ray_folder()
        print("sockets are in the private folder:", any(folder.glob("session_*/sockets/raylet*")))
    left = set(os.environ.items()) - set(before.items()) - set(marked.items())
    names = sorted(name for name, _ in left if name in RAY_ENVIRONMENT or "AUTH" in name)
    token = ray_internals._TOKENS.resolve().instance().get_token_for_http_header()
    print("left behind:", names, token, ray.is_initialized(), ray_internals.requires_token())


@pytest.mark.ray
@pytest.mark.slow
def test_workers_of_our_cluster_have_the_environment_and_this_process_only_meanwhile() -> None:
    environment = {"RAY_ADDRESS": ""}
    done = forked_processes.start_function(
        run_without_rays_variables,
        "start_own_cluster",
        environment=environment,
        imports=forked_processes.COMMANDS,
    )
    assert done.wait() == 0, done.err
    # On a busy machine Ray prints that a worker needs long to start.
    assert {
        "workers have them: True",
        "sockets are in the private folder: True",
        "left behind: [] {} False False",
    } <= set(done.out.splitlines())


def start_exposed_cluster() -> None:
    """Start a cluster with a Ray that gives its nodes another address than it says."""
    import ray

    ray.init = functools.partial(ray.init, _node_ip_address=own_address())
    with pytest.raises(InfrastructureError) as refused, connect_to_cluster(n_cpus=1):
        pass
    print(refused.value)
    print("left behind:", ray.is_initialized())


def own_address() -> str | None:
    """An address of this machine beyond loopback."""
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            if one.family.name == "AF_INET" and not one.address.startswith("127."):
                return str(one.address)
    return None


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(own_address() is None, reason="this machine has loopback only")
def test_a_cluster_that_listens_beyond_loopback_is_stopped_again() -> None:
    done = forked_processes.start_function(
        run_without_rays_variables,
        "start_exposed_cluster",
        environment={"RAY_ADDRESS": ""},
        imports=forked_processes.COMMANDS,
    )
    assert done.wait() == 0, done.err
    (line,) = [line for line in done.out.splitlines() if "does not stay on loopback" in line]
    assert "gcs_server" in line and "RuntimeEnv" in line and line.endswith(ENDING)
    assert "left behind: False" in done.out


def run_without_rays_variables(function: str) -> None:
    """Call a function of this file in a process that has none of our variables."""
    for name in RAY_ENVIRONMENT:
        os.environ.pop(name, None)
    globals()[function]()
