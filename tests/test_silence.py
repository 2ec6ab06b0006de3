"""What raysweep prints and which exceptions it does not pass on: read from its source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "raysweep"
FILES = sorted(ROOT.rglob("*.py"))
# (file, `function: exceptions`) -> why nobody has to be told.
REASONS = {
    ("sweep/multi_worker_trial.py", "load_placement_group: (OSError, ValueError)"): "there is none",
    ("logs.py", "_find_last_process: OSError"): "the log is new",
    ("evaluation/shards.py", "ShardResult.load_npz: FileNotFoundError"): "there is none yet",
    (
        "sweep/ray_internals.py",
        "RayInternal.is_present: (ImportError, AttributeError)",
    ): "that is the answer",
    (
        "sweep/search_space.py",
        "SearchSpace.find_burn_in: SpecError",
    ): "it fails by itself when it is trained",
    (
        "leases.py",
        "_is_process_gone: ProcessLookupError",
    ): "the process is gone: that is the answer",
    ("leases.py", "_is_process_gone: PermissionError"): "it lives, and is another user's",
    ("leases.py", "_try_lock_descriptor: BlockingIOError"): "it is locked: that is the answer",
    ("leases.py", "_try_lock_descriptor: OSError"): "no other process can lock it either",
    (
        "cli.py",
        "_run_command: BrokenPipeError",
    ): "the reader of the output has gone: nobody is left to tell",
    (
        "commands/options.py",
        "parse_duration: (ValueError, KeyError)",
    ): "becomes an error of argparse",
    (
        "commands/options.py",
        "parse_fraction: (ValueError, ZeroDivisionError)",
    ): "becomes an error of argparse",
    ("commands/options.py", "parse_non_negative: ValueError"): "becomes an error of argparse",
    (
        "data/dataset.py",
        "DataSpec._make_path_absolute: RuntimeError",
    ): "the path stays as it is, and is not found later",
    (
        "leases.py",
        "LeaseHeartbeat._renew_until_stopped: OSError",
    ): "the next renewal is due in seconds",
    (
        "leases.py",
        "FileLease.try_acquire: FileExistsError",
    ): "another process holds it: that is the answer",
    ("leases.py", "FileLease._is_expired: OSError"): "its holder gave it back meanwhile",
    ("log_records.py", "_parse_line: ValueError"): "becomes an entry of its own",
    (
        "log_records.py",
        "_package_versions: importlib.metadata.PackageNotFoundError",
    ): "it is not installed: that is the answer",
    (
        "logs.py",
        "_LogFile.handleError: OSError, ValueError",
    ): "the log itself cannot be written, and says so",
    ("logs.py", "_TerminalHandler.emit: OSError, ValueError"): "the terminal has gone",
    ("logs.py", "_ends_within_line: OSError"): "the file is new",
    (
        "pipeline/artifact.py",
        "Artifact.read_if_finished: FileNotFoundError",
    ): "the stage has not finished: that is the answer",
    (
        "pipeline/pipeline.py",
        "_validate_pipeline: SpecError",
    ): "these problems are in the list already",
    (
        "pipeline/sweep_retention.py",
        "_is_iso_date: ValueError",
    ): "it is no date: that is the answer",
    (
        "schedules.py",
        "_parse_number: (ValueError, ZeroDivisionError)",
    ): "it is no number: pydantic says so",
    ("storage.py", "_copy_remote_file: FileNotFoundError"): "there is none: that is the answer",
    ("storage.py", "_read_remote_file: FileNotFoundError"): "there is none: that is the answer",
    ("storage.py", "_download_checkpoint: OSError"): "another process of this machine was faster",
    (
        "storage.py",
        "_download_checkpoint: FileNotFoundError",
    ): "it was deleted meanwhile, and so is the copy",
    ("storage.py", "_delete_remote_object: FileNotFoundError"): "it is deleted already",
    ("storage.py", "_delete_remote_folder: FileNotFoundError"): "it is deleted already",
    ("storage.py", "_read_local_file: OSError"): "there is none: that is the answer",
    ("storage.py", "_evict_lru: OSError"): "other processes delete files too",
    (
        "stores/bucket_store.py",
        "BucketStore.read_versioned: StoredFileNotFound",
    ): "there is none: that is the answer",
    ("stores/bucket_store.py", "BucketStore.delete: StoredFileNotFound"): "it is deleted already",
    (
        "stores/bucket_store.py",
        "BucketStore._put_conditionally: "
        "(AlreadyExistsError, PreconditionError, FileNotFoundError)",
    ): "the condition is not met: that is the answer",
    (
        "stores/bucket_store.py",
        "BucketStore._find_version_written_by: StoredFileNotFound",
    ): "there is none: that is the answer",
    (
        "stores/folder_store.py",
        "FolderStore.read_versioned: StoredFileNotFound",
    ): "there is none: that is the answer",
    (
        "stores/folder_store.py",
        "FolderStore.read_matching: FileNotFoundError, IsADirectoryError",
    ): "it was deleted meanwhile",
    (
        "stores/folder_store.py",
        "FolderStore.list_files: FileNotFoundError",
    ): "it was deleted meanwhile",
    ("sweep/ledger.py", "Ledger.delete_if_empty: OSError"): "the folder has other files",
    (
        "sweep/node_probe.py",
        "list_exposed_ports: psutil.Error",
    ): "it belongs to another user, or has ended",
    ("sweep/node_probe.py", "_collect_report: GetTimeoutError"): "becomes the problem of the node",
    (
        "sweep/search_space.py",
        "_find_remaining_problems: SpecError",
    ): "these problems are in the list already",
    (
        "sweep/tuner.py",
        "_train_and_report: TrainingInterrupted",
    ): "the process ends, after a log entry",
    (
        "tracking/mlflow_tracker.py",
        "_current_user: (KeyError, OSError)",
    ): "the number stands for the name",
    (
        "training/checkpoint.py",
        "_get_package_version: importlib.metadata.PackageNotFoundError",
    ): "it is not installed: that is the answer",
    (
        "training/checkpoint.py",
        "_get_git_revision: (OSError, subprocess.SubprocessError)",
    ): "it is no checkout: that is the answer",
    (
        "training/prefix_cache.py",
        "PrefixCache._link_checkpoint_as_state: OSError",
    ): "another process stored the same state first",
    (
        "training/prefix_cache.py",
        "PrefixCache._evict_oldest_states: OSError",
    ): "another process evicted it",
    ("training/prefix_cache.py", "_list_folder_states: OSError"): "another process evicted it",
}
# The command line: its output is its purpose.
PRINTING = ("commands", "terminal.py", "cli.py", "shell_completion.py")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def called_names(nodes: list[ast.stmt]) -> set[str]:
    """`f` and `a.f` of all calls, as far as they are written so."""
    calls = [node.func for one in nodes for node in ast.walk(one) if isinstance(node, ast.Call)]
    return {ast.unparse(function) for function in calls}


def used_names(nodes: list[ast.stmt]) -> set[str]:
    return {node.id for one in nodes for node in ast.walk(one) if isinstance(node, ast.Name)}


def is_passed_on(handler: ast.ExceptHandler) -> bool:
    """Whether it raises, logs, or gives the exception itself to somebody."""
    raises = any(isinstance(node, ast.Raise) for one in handler.body for node in ast.walk(one))
    logs = any(name.startswith("logger.") for name in called_names(handler.body))
    return raises or logs or (handler.name or "") in used_names(handler.body)


def swallowed(path: Path) -> Iterator[str]:
    """`function: exceptions` of each exception that ends in this file without a trace."""

    def visit(node: ast.AST, place: str) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            place = f"{place}.{node.name}".lstrip(".")
        if isinstance(node, ast.ExceptHandler) and not is_passed_on(node):
            yield f"{place}: {ast.unparse(node.type) if node.type else 'everything'}"
        if isinstance(node, ast.With):
            for item in node.items:
                call = item.context_expr
                if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("suppress"):
                    yield f"{place}: {', '.join(map(ast.unparse, call.args))}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, place)

    yield from visit(ast.parse(path.read_text()), "")


def test_only_the_command_line_prints() -> None:
    printing = {
        name_of(path)
        for path in FILES
        if path.relative_to(ROOT).parts[0] not in PRINTING
        for name in called_names(ast.parse(path.read_text()).body)
        if name in ("print", "rich.print", "sys.stdout.write")
    }
    assert not printing, "log it: logging.getLogger(__name__)"


def test_every_module_that_logs_has_a_logger_of_its_own_name() -> None:
    for path in FILES:
        text = path.read_text()
        if "logger." in text and "logger = " in text:
            assert "\nlogger = logging.getLogger(__name__)\n" in text, name_of(path)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_exception_is_swallowed_without_a_trace(path: Path) -> None:
    """Raise it, log it, pass it on as a value, or give a reason here."""
    name = name_of(path)
    allowed = {place for file, place in REASONS if file == name}
    found = set(swallowed(path))
    assert not found - allowed, f"{name}: log it, or add it to REASONS with a reason"
    assert not allowed - found, f"{name}: REASONS names what is not there any more"


def test_the_reasons_name_files_that_exist() -> None:
    assert {file for file, _ in REASONS} <= {name_of(path) for path in FILES}
    assert all(reason.strip() for reason in REASONS.values())


def test_what_counts_as_swallowed(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        "def f():\n    try: g()\n    except OSError: return None\n"
        "    try: g()\n    except KeyError: raise ValueError from None\n"
        "    try: g()\n    except ValueError as e: logger.info('no: %s', e)\n"
        "    try: g()\n    except TypeError as e: return e\n"
        "class C:\n    def h(self):\n        with suppress(IndexError): g()\n"
    )
    assert list(swallowed(tmp_path / "m.py")) == ["f: OSError", "C.h: IndexError"]
