"""All private names of Ray that raysweep uses.

A new version of Ray may rename or remove them without notice. No other module uses a private name
of Ray, and `check_ray_internals` checks all of them before any work starts.
"""

import importlib
import ipaddress
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray

from raysweep.errors import CompatibilityWarning, InfrastructureError
from raysweep.sweep.ray_environment import set_environment

KNOWN_RAY_VERSIONS = ("2.60",)
"""Versions of Ray that have all names and pass the tests of raysweep."""

RayUse = Literal["start", "connect", "sweep"]
"""What a name is needed for: to start a cluster, to use any cluster, to run a sweep."""

_MODE_VARIABLE = "RAY_AUTH_MODE"

# raysweep reports a lost process in one line. Ray would print tracebacks and logs on stdout.
_LOST_PROCESS_PATTERN = re.compile(
    "worker died or was killed|Raylet is terminated|node with node id|memory pressure"
)


@dataclass(frozen=True)
class RayInternal:
    """A private name of Ray.

    Attributes:
        module: Module that has the name.
        attribute: The name in it; dots lead to attributes of an object.
        use: When raysweep needs it.
        consequence: What happens without it, as a clause.
        value: Value that the name must have; None if any value will do.
        is_required: Whether raysweep refuses to work without it.
    """

    module: str
    attribute: str
    use: RayUse
    consequence: str
    value: str | None = None
    is_required: bool = False

    @property
    def dotted_name(self) -> str:
        """Module and attribute, as in Python."""
        return f"{self.module}.{self.attribute}"

    def resolve(self) -> Any:
        """Return the object that has the name.

        Raises:
            ImportError: If this version of Ray has no such module.
            AttributeError: If the module has no such name.
        """
        found = importlib.import_module(self.module)
        for name in self.attribute.split("."):
            found = getattr(found, name)
        return found

    @contextmanager
    def replaced_by(self, replacement: Any) -> Iterator[None]:
        """Context manager that puts another object in the place of this one.

        Args:
            replacement: The other object.
        """
        parent_name, _, last_name = self.attribute.rpartition(".")
        parent = importlib.import_module(self.module)
        for name in filter(None, parent_name.split(".")):
            parent = getattr(parent, name)
        previous = getattr(parent, last_name)
        setattr(parent, last_name, replacement)
        try:
            yield
        finally:
            setattr(parent, last_name, previous)

    def is_present(self) -> bool:
        """Return whether this version of Ray has the name, with the expected value."""
        try:
            found = self.resolve()
        except (ImportError, AttributeError):
            return False
        return self.value is None or found == self.value


_LOOPBACK_SWITCH = RayInternal(
    "ray._private.ray_constants",
    "ENABLE_RAY_CLUSTER",
    "start",
    "a cluster on this machine would listen on all its network interfaces",
    is_required=True,
)
_LOOPBACK_VARIABLE = RayInternal(
    "ray._private.ray_constants",
    "ENABLE_RAY_CLUSTERS_ENV_VAR",
    "start",
    "the processes of a cluster on this machine would listen on all its network interfaces",
    is_required=True,
)
_ADDRESS_LOOKUP = RayInternal(
    "ray.util",
    "get_node_ip_address",
    "start",
    "raysweep cannot make sure that a cluster on this machine listens on loopback only",
    is_required=True,
)
_WORKER_SCRIPT = RayInternal(
    "ray._private.ray_constants",
    "SETUP_WORKER_FILENAME",
    "start",
    "each worker of a cluster on this machine takes five seconds to start",
    value="setup_worker.py",
)
_AGENT_COMMAND = RayInternal(
    "ray._private.services",
    "_build_python_executable_command_memory_profileable",
    "start",
    "a cluster on this machine takes seconds longer to start, because its agents import Ray",
)
_UNUSED_PROCESSES = tuple(
    RayInternal(
        "ray._private.node",
        f"Node.{name}",
        "start",
        f"a cluster on this machine starts {title}, which nothing uses and which takes a second",
    )
    for name, title in (
        ("start_monitor", "an autoscaler"),
        ("start_api_server", "a dashboard"),
        ("start_log_monitor", "a reader of logs"),
    )
)
_DASHBOARD_CHECK = RayInternal(
    "ray._private.utils",
    "get_dashboard_dependency_error",
    "start",
    "each node on this machine collects metrics for a dashboard that does not run",
)
_AUTHENTICATION_LOGGER = RayInternal(
    "ray._private.authentication.authentication_token_setup",
    "logger",
    "connect",
    "Ray logs that it protects a cluster with a token",
)
_SETTINGS = RayInternal(
    "ray._raylet",
    "Config",
    "start",
    "a program that had a cluster on this machine cannot join one that has no token",
)
_TOKENS = RayInternal(
    "ray._raylet",
    "AuthenticationTokenLoader",
    "start",
    "a program that had a cluster with a token cannot use the workers of one that has none",
)
_STDOUT_FILTER = RayInternal(
    "ray._private.ray_logging",
    "stdout_deduplicator.skip_re",
    "connect",
    "Ray prints messages of its own about lost processes",
)
_STDERR_FILTER = RayInternal(
    "ray._private.ray_logging",
    "stderr_deduplicator.skip_re",
    "connect",
    "Ray prints messages of its own about lost processes",
)
_TOKEN_CHECK = RayInternal(
    "ray._private.authentication.authentication_utils",
    "is_token_auth_enabled",
    "connect",
    "`raysweep doctor` reports that the cluster requires no token",
)
_HEAD_NODE_RESOURCE = RayInternal(
    "ray._common.constants",
    "HEAD_NODE_RESOURCE_NAME",
    "connect",
    "`raysweep doctor` does not know the head node",
)
_FUNCTION_WRAPPER = RayInternal(
    "ray.tune.trainable.function_trainable",
    "wrap_function",
    "sweep",
    "a trial whose machine is taken away loses its unfinished epoch",
)

_GROUP_CLEANER = RayInternal(
    "ray.train.v2.api.data_parallel_trainer",
    "PlacementGroupCleanerCallback",
    "sweep",
    "a trial with several workers ends ten seconds later where no dashboard runs",
)
_GROUP_DATASETS = RayInternal(
    "ray.train.v2.api.data_parallel_trainer",
    "DatasetsCallback",
    "sweep",
    "each group of workers starts an actor of Ray Data, which raysweep does not use",
)
_PROPAGATED_VARIABLES = RayInternal(
    "ray.tune.execution.class_cache",
    "ENV_VARS_TO_PROPAGATE",
    "sweep",
    "Ray copies the AWS keys of this process into its logs and to all nodes",
)

RAY_INTERNALS = (
    _LOOPBACK_SWITCH,
    _LOOPBACK_VARIABLE,
    _ADDRESS_LOOKUP,
    _WORKER_SCRIPT,
    _AGENT_COMMAND,
    *_UNUSED_PROCESSES,
    _DASHBOARD_CHECK,
    _AUTHENTICATION_LOGGER,
    _SETTINGS,
    _TOKENS,
    _STDOUT_FILTER,
    _STDERR_FILTER,
    _TOKEN_CHECK,
    _HEAD_NODE_RESOURCE,
    _FUNCTION_WRAPPER,
    _GROUP_CLEANER,
    _GROUP_DATASETS,
    _PROPAGATED_VARIABLES,
    RayInternal(
        "ray.train.v2._internal.constants",
        "HEALTH_CHECK_INTERVAL_S_ENV_VAR",
        "sweep",
        "each epoch of a trial with several workers takes seconds longer",
        value="RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
    ),
    RayInternal(
        "ray.train.v2._internal.constants",
        "PREEMPTION_POLL_INTERVAL_S_ENV_VAR",
        "sweep",
        "trials with several workers hear of a preemption some seconds later",
        value="RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S",
    ),
    RayInternal(
        "ray.train.v2._internal.constants",
        "METRICS_ENABLED_ENV_VAR",
        "sweep",
        "Ray exports unused metrics of each trial with several workers",
        value="RAY_TRAIN_METRICS_ENABLED",
    ),
)
"""All private names of Ray that raysweep uses."""


def check_ray_internals(*uses: RayUse) -> None:
    """Check that the installed version of Ray has the private names that raysweep needs.

    Issues a `CompatibilityWarning` of one line for each missing name without which raysweep still
    works.

    Args:
        uses: What the caller is going to do.

    Raises:
        InfrastructureError: If a required name is missing: the cluster would not be safe.
    """
    missing = [name for name in RAY_INTERNALS if name.use in uses and not name.is_present()]
    if required := [name for name in missing if name.is_required]:
        raise InfrastructureError([_describe_missing(name) for name in required])
    for name in missing:
        warnings.warn(_describe_missing(name), CompatibilityWarning, stacklevel=2)
    if "sweep" in uses and _FUNCTION_WRAPPER not in missing and not _uses_mixins():
        warnings.warn(
            _describe_incompatibility(
                "ignores the attribute __mixins__ of trainables", _FUNCTION_WRAPPER.consequence
            ),
            CompatibilityWarning,
            stacklevel=2,
        )


@contextmanager
def listen_on_loopback() -> Iterator[None]:
    """Make a Ray cluster that is started in this block listen on loopback only.

    That is Ray's default on Windows and macOS.

    Raises:
        InfrastructureError: If this version of Ray would listen on other interfaces too.
    """
    check_ray_internals("start")
    constants = importlib.import_module(_LOOPBACK_SWITCH.module)
    variable = str(_LOOPBACK_VARIABLE.resolve())
    previous_switch = getattr(constants, _LOOPBACK_SWITCH.attribute)
    # The variable is for the processes that Ray starts; this one has read it already.
    setattr(constants, _LOOPBACK_SWITCH.attribute, False)
    try:
        with set_environment({variable: "0"}):
            _require_loopback_address()
            yield
    finally:
        setattr(constants, _LOOPBACK_SWITCH.attribute, previous_switch)


@contextmanager
def use_worker_script(script: Path) -> Iterator[None]:
    """Context manager: nodes that start in this block run this script for each worker and agent.

    Args:
        script: Absolute path of a Python file. For a worker it runs in place of Ray's
            setup_worker.py, with the same arguments. For an agent its arguments are the path of the
            agent's script and that script's arguments.
    """
    with ExitStack() as restored:
        if _WORKER_SCRIPT.is_present():
            # Ray joins the name with the path of its folder, which an absolute path replaces.
            restored.enter_context(_WORKER_SCRIPT.replaced_by(str(script)))
        if _AGENT_COMMAND.is_present():
            build_command = _AGENT_COMMAND.resolve()

            def build_agent_command(*arguments: Any, **options: Any) -> list[str]:
                """Return the start of an agent's command, to which Ray adds the agent's script."""
                return [*build_command(*arguments, **options), str(script)]

            restored.enter_context(_AGENT_COMMAND.replaced_by(build_agent_command))
        yield


@contextmanager
def skip_unused_processes() -> Iterator[None]:
    """Context manager: a cluster that starts in this block has no autoscaler and no dashboard.

    It also has no reader of logs, and its nodes have the agents of an installation without a
    dashboard. Starting all of these takes as long as the rest of the cluster.
    """

    def start_nothing(node: Any, **options: Any) -> None:
        """Replace a method of Ray's node that starts a process."""

    def start_no_dashboard(node: Any, **options: Any) -> None:
        """Leave the address of the dashboard empty, as where Ray is installed without one."""
        node._webui_url = ""

    def find_no_dashboard() -> ImportError:
        """Return the error of an installation without a dashboard."""
        return ImportError("raysweep starts no dashboard")

    replacements: dict[RayInternal, Any] = dict.fromkeys(_UNUSED_PROCESSES, start_nothing)
    replacements[_UNUSED_PROCESSES[1]] = start_no_dashboard
    replacements[_DASHBOARD_CHECK] = find_no_dashboard
    with ExitStack() as restored:
        for name, replacement in replacements.items():
            if name.is_present():
                restored.enter_context(name.replaced_by(replacement))
        yield


@contextmanager
def skip_unused_group_processes() -> Iterator[None]:
    """Context manager: groups of workers that start in this block get no placement group cleaner
    and no dataset manager of Ray Train, which are two processes.

    The cleaner frees the resources of a group that has died, which raysweep does itself (see
    `multi_worker_trial`). It asks the dashboard whether the group is alive, and where no dashboard
    runs it waits ten seconds for the answer, also before it ends. The dataset manager serves shards
    of Ray Data, which raysweep does not use.
    """
    user_callback = importlib.import_module("ray.train").UserCallback

    def build_idle_callback(**options: Any) -> Any:
        """Return a callback that does nothing."""
        return user_callback()

    with ExitStack() as restored:
        for name in (_GROUP_CLEANER, _GROUP_DATASETS):
            if name.is_present():
                restored.enter_context(name.replaced_by(build_idle_callback))
        yield


def describe_exposure(ports: list[str]) -> str:
    """Return the error line for a local cluster that other machines can reach.

    Args:
        ports: The ports, as `NAME ADDRESS:PORT`.
    """
    return _describe_incompatibility(
        f"does not stay on loopback ({', '.join(ports)})", "the cluster was stopped again"
    )


@contextmanager
def hide_lost_process_messages() -> Iterator[None]:
    """Keep Ray from printing messages about lost processes in this block.

    Ray reads its variable RAY_DEDUP_LOGS_SKIP_REGEX when it is imported. A pattern that the user
    has set in it stays in effect.
    """
    logging_module = importlib.import_module(_STDOUT_FILTER.module)
    changed_filters = []
    for name in (_STDOUT_FILTER, _STDERR_FILTER):
        if name.is_present() and name.resolve() is None:
            log_filter = getattr(logging_module, name.attribute.partition(".")[0])
            log_filter.skip_re = _LOST_PROCESS_PATTERN
            changed_filters.append(log_filter)
    try:
        yield
    finally:
        for log_filter in changed_filters:
            log_filter.skip_re = None


@contextmanager
def keep_credentials_here() -> Iterator[None]:
    """Keep Tune from copying AWS keys of this process into the environment of trials.

    Ray writes that environment into its logs, and sends it to other nodes. Trials have the
    credentials of their own node.
    """
    if not _PROPAGATED_VARIABLES.is_present():
        yield
        return
    names: set[str] = _PROPAGATED_VARIABLES.resolve()
    secret_names = {name for name in names if name.startswith("AWS_")}
    names -= secret_names
    try:
        yield
    finally:
        names |= secret_names


def silence_authentication_log() -> None:
    """Keep Ray from logging at each start that it protects a local cluster with a token."""
    if _AUTHENTICATION_LOGGER.is_present():
        _AUTHENTICATION_LOGGER.resolve().setLevel(logging.ERROR)


@contextmanager
def keep_authentication_mode() -> Iterator[None]:
    """Restore at the end of this block whether Ray uses tokens in this process.

    `ray.init` turns them on for good when it starts a cluster on this machine.
    """
    former = os.environ.get(_MODE_VARIABLE)
    try:
        yield
    finally:
        if os.environ.get(_MODE_VARIABLE) != former:
            os.environ.pop(_MODE_VARIABLE, None)
            os.environ.update({} if former is None else {_MODE_VARIABLE: former})
            if _SETTINGS.is_present():
                _SETTINGS.resolve().initialize("")
            # The mode alone does not suffice: Ray caches the token that it has read.
            if _TOKENS.is_present():
                _TOKENS.resolve().instance().reset_cache()


def requires_token() -> bool:
    """Return whether the Ray of this node requires a token; False if that cannot be found out."""
    return _TOKEN_CHECK.is_present() and bool(_TOKEN_CHECK.resolve()())


def is_head_node(node: dict[str, Any]) -> bool:
    """Return whether an entry of `ray.nodes()` is the head node; False if that is unknown."""
    return _HEAD_NODE_RESOURCE.is_present() and _HEAD_NODE_RESOURCE.resolve() in node["Resources"]


def add_mixin(trainable: Callable[[dict[str, Any]], None], mixin: type) -> None:
    """Make the class that Tune creates from a function inherit from a mixin.

    Args:
        trainable: The function; it is changed.
        mixin: The mixin.
    """
    trainable.__mixins__ = (mixin,)  # type: ignore[attr-defined]


def _uses_mixins() -> bool:
    """Return whether this version of Tune respects what `add_mixin` sets."""

    class Mixin:
        """A mixin without content."""

    def train(config: dict[str, Any]) -> None:
        """Train nothing."""

    add_mixin(train, Mixin)
    return issubclass(_FUNCTION_WRAPPER.resolve()(train), Mixin)


def _require_loopback_address() -> None:
    """Raise InfrastructureError unless Ray would now give a new node a loopback address."""
    address = _ADDRESS_LOOKUP.resolve()()
    if not ipaddress.ip_address(address).is_loopback:
        raise InfrastructureError(
            _describe_incompatibility(
                f"ignores {_LOOPBACK_SWITCH.dotted_name}",
                f"a cluster on this machine would listen on {address}",
            )
        )


def _describe_missing(name: RayInternal) -> str:
    """Return the line about a name that this version of Ray lacks."""
    value = f" = {name.value!r}" if name.value else ""
    return _describe_incompatibility(f"has no {name.dotted_name}{value}", name.consequence)


def _describe_incompatibility(fault: str, consequence: str) -> str:
    """Return a line: what is wrong with this version of Ray, what follows, and what to do."""
    known, latest = ", ".join(KNOWN_RAY_VERSIONS), KNOWN_RAY_VERSIONS[-1]
    return (
        f"Ray {ray.__version__} {fault}: {consequence}; raysweep is known to work with Ray "
        f"{known}: pip install 'ray[default,tune,train]=={latest}.*'"
    )
