"""Nothing listens to the world, no name leaves its folder, nothing is unpickled."""

import ast
import contextlib
import json
import re
import tempfile
import tomllib
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from conftest import TINY, tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from process_tree import find_descendants
from rich.console import Console

from raysweep.cli import main
from raysweep.commands import doctor
from raysweep.commands.common import check_plain_name, format_ui_command
from raysweep.errors import InfrastructureError
from raysweep.pipeline.stage import StageContext, TrainingOverrides
from raysweep.spec import SpecError, apply_overrides
from raysweep.stores import local_copies, open_path
from raysweep.tracking import get_mlflow_version

ROOT = Path(__file__).parent.parent
# Names that try to get out, and everything else.
NAMES = st.one_of(
    st.text(max_size=12),
    st.text(alphabet="./\\~ab\0\n:%", max_size=12),
    st.lists(
        st.sampled_from(["..", ".", "/", "a", "~", "\\", "%2e%2e", "…", "\0"]), max_size=6
    ).map("".join),
)


NEVER = {
    *("eval", "exec", "os.system", "torch.load", "joblib.load", "yaml.unsafe_load"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads"),
}


# What a process wrote into a folder that nobody else can write, for the processes that it starts;
# and the file that the user's own call names.
OWN = {"process_pool.py": {"pickle.loads"}, "code_files.py": {"exec"}}


def is_inside(path: Path, folder: Path) -> bool:
    """Whether the path is right in the folder, whatever the file system makes of it."""
    return path.resolve().parent == folder.resolve() and "\0" not in str(path)


@pytest.mark.ray
def test_a_local_sweep_listens_on_loopback_alone(ray_cluster) -> None:
    listening = {}
    for process in [psutil.Process(), *find_descendants("")]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in process.net_connections(kind="tcp"):
                if one.status == psutil.CONN_LISTEN:
                    listening[f"{process.name()} {one.laddr.ip}:{one.laddr.port}"] = one.laddr.ip
    assert any(name.startswith("gcs_server") for name in listening), "this is Ray's cluster"
    open_to_all = [
        name for name, ip in listening.items() if not re.match(r"(::ffff:)?127\.|::1$", ip)
    ]
    assert not open_to_all


@pytest.mark.ray
def test_no_key_of_the_driver_is_in_rays_logs(
    ray_cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's logs can be read by other users, and its environment of trials goes to all nodes."""
    import ray
    from ray.tune.execution import class_cache

    from raysweep.sweep.ledger import Ledger
    from raysweep.sweep.search_space import SearchSpace
    from raysweep.sweep.tuner import run_sweep

    planted = "planted-31f0e9c4a7"
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    for name in names:
        monkeypatch.setenv(name, planted)
    space = SearchSpace.model_validate(
        {
            "method": "at",
            "trials": 1,
            "base": {**TINY, "epochs": 1},
            "space": {"optim.lr": {"float": [0.01, 0.1]}},
        }
    )
    run_sweep(Ledger.create(tmp_path / "sweep", space), [])
    assert set(names) <= class_cache.ENV_VARS_TO_PROPAGATE, "other users of Tune keep them"
    session = Path(tempfile.gettempdir()) / "ray" / ray.get_runtime_context().get_session_name()
    folders = (session, tmp_path)
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert any(file.name == "runtime_env_agent.log" for file in files)
    assert [file for file in files if planted.encode() in file.read_bytes()] == []


@given(NAMES)
@example("..")
@example("../../etc/passwd")
@example("/etc/passwd")
@example("a\0b")
@example("x" * 300)
def test_names_of_sweeps_and_runs_stay_in_their_folder(name: str) -> None:
    folder = Path("/runs")
    try:
        plain = check_plain_name(name, "--name")
    except SpecError:
        return
    assert plain == name and len(name) <= 100 and is_inside(folder / name, folder)


@given(NAMES)
@example("../../up")
def test_a_methods_name_stays_in_its_folder(name: str) -> None:
    """`raysweep train FILE` calls the run's folder by the name that the file gives its method."""
    folder = Path("/runs")
    try:
        config = apply_overrides(tiny("at"), {"method.name": name})
    except SpecError:
        return
    assert is_inside(folder / f"{config.method.name}-{config.digest()[:8]}", folder)


@given(NAMES)
@example("../../up")
def test_labels_of_a_pipeline_stay_in_its_folder(label: str) -> None:
    sweeps = Path("/runs/pipelines/p/sweeps")
    work = StageContext(
        "p",
        Path("/"),
        Path("/p"),
        sweeps,
        TrainingOverrides({}, {}),
        Console(),
        None,
        ExitStack(),
        1,
        "0123456789",
    )
    assert is_inside(work.choose_sweep_folder(label), sweeps)


@given(NAMES)
@example("../../..")
@settings(deadline=None)
def test_a_bucket_stays_in_its_working_copy(name: str) -> None:
    try:
        path = open_path(f"s3://bucket/{name}")
    except (SpecError, ValueError):
        return
    copy = path.working_path
    assert copy.is_relative_to(local_copies.copies_root()) and ".." not in copy.parts
    if "?" not in name:  # what follows it says how the store is reached, and has a copy of its own
        assert copy.is_relative_to(open_path("s3://bucket").working_path)


@pytest.mark.parametrize("what", ["../outside", "x/../../outside"])
def test_show_looks_at_runs_and_nowhere_else(what: str, workdir: Path, capsys) -> None:
    """What begins with `/`, `./` or `runs/` is a path of the user, which may lead anywhere."""
    for folder in ("outside", "runs/x"):
        (workdir / folder).mkdir(parents=True)
    space = {"method": "at", "space": {"optim.lr": {"float": [0.1, 0.2]}}}
    (workdir / "outside" / "sweep.json").write_text(json.dumps({"key": "0", "space": space}))
    assert main(["show", what]) == 2
    assert "no method, preset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("uri", "command"),
    [
        (
            "postgresql://lab:se/cret@db/mlflow",
            'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"',
        ),
        ("https://lab:secret@mlflow.lab/x", 'open "$MLFLOW_TRACKING_URI"'),
        ("https://lab:se/cr@et@mlflow.lab/x", 'open "$MLFLOW_TRACKING_URI"'),
        ("http://token@mlflow.lab:5000", 'open "$MLFLOW_TRACKING_URI"'),
        ("http://mlflow.lab:5000/a", "open http://mlflow.lab:5000/a"),
        ("http://mlflow.lab:5000/a@b", 'open "$MLFLOW_TRACKING_URI"'),
        (
            "sqlite:////home/a@b/mlflow.db",
            "mlflow ui --backend-store-uri sqlite:////home/a@b/mlflow.db",
        ),
    ],
)
def test_what_to_type_next_holds_no_password(uri: str, command: str) -> None:
    assert format_ui_command(uri) == command


@pytest.mark.parametrize(
    "uri", ["http://lab:hush@127.0.0.1:1", "nosuch://lab:hu/sh@127.0.0.1/db?password=hush"]
)
@pytest.mark.mlflow
def test_a_store_that_does_not_answer_gives_no_password_away(uri: str) -> None:
    with pytest.raises(InfrastructureError) as refused:
        get_mlflow_version(uri)
    assert "://***@127.0.0.1" in str(refused.value) and not re.search(
        "hush|hu/sh", str(refused.value)
    )


def calls(tree: ast.AST) -> set[str]:
    """Dotted names of everything that is called."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "raysweep").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not calls(tree) & NEVER - OWN.get(path.name, set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load"):
            assert any(
                k.arg == "allow_pickle" and ast.unparse(k.value) == "False" for k in node.keywords
            )
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("subprocess."):
            assert not any(k.arg == "shell" for k in node.keywords)


def test_yaml_is_read_by_a_loader_that_makes_plain_data() -> None:
    for path in sorted((ROOT / "raysweep").rglob("*.py")):
        tree = ast.parse(path.read_text())
        safe = {
            c.name
            for c in ast.walk(tree)
            if isinstance(c, ast.ClassDef)
            for b in c.bases
            if "Safe" in ast.unparse(b)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "yaml.load":
                assert ast.unparse(node.args[1]) in safe


def test_versions_with_known_holes_cannot_be_installed() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        wanted = tomllib.load(file)["project"]["dependencies"]
    for package, safe in doctor._MIN_SAFE_VERSIONS.items():
        (line,) = [line for line in wanted if re.match(rf"{package}[\[>]", line)]
        least = tuple(int(part) for part in re.findall(r">=([\d.]+)", line)[0].split("."))
        assert least >= safe, f"{line} allows versions with known holes"
