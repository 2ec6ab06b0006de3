"""What is logged where: the terminal, a folder's log.jsonl, a trial's log.txt; never a secret."""

import json
import logging
import logging.handlers
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import forked_processes
import psutil
import pytest

from raysweep import logs
from raysweep.cli import main
from raysweep.errors import InfrastructureError
from raysweep.logs import folder_log
from raysweep.redaction import redact_secrets
from raysweep.stores import request_log
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import load_space
from raysweep.sweep.trial import Trial
from raysweep.training.prefix_cache import PrefixCache

LOGGER = logging.getLogger("raysweep.some.module")
SECRETS = {
    "postgresql://me:hush-hush@db/optuna": "hush-hush",
    "https://ghp_hushhush@example.org/x": "ghp_hushhush",
    "the key AKIAIOSFODNN7EXAMPLE was refused": "AKIAIOSFODNN7EXAMPLE",
    "s3://b/x?region=eu&secret_key=hu/sh+h&scheme=http": "hu/sh+h",
    "GET /b?X-Amz-Signature=0a1b2c3d&X-Amz-Date=1": "0a1b2c3d",
    "{'password': 'hush hush', 'user': 'me'}": "hush hush",
    "Authorization: Bearer abc.def": "abc.def",
    "https://b.example.org/x?sv=2026&sig=hushhush%3D&se=1": "hushhush",
    "password: hush hush": "hush",
    "db_password = 'it is hush'": "hush",
    "mysql://hushtoken@db/x": "hushtoken",
    "cannot open mysql://me:hu/sh@hush sh@db/x": "sh sh",
    "gs://b/x?access_token=hushhush": "hushhush",
    "s3://b/x?endpoint_override=me:hu/sh@h:1": "hu/sh",
    "-----BEGIN PRIVATE KEY-----\nhushhush\n-----END PRIVATE KEY-----": "hushhush",
}


def entries_of(folder: Path) -> list[dict[str, Any]]:
    """Read the file as any other program would."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@contextmanager
def running_command(*arguments: str, verbose: bool = False) -> Iterator[None]:
    arguments = arguments or ("tune", "x")
    line = logs.format_command_line(arguments)
    with logs.command_log(arguments[0], line, verbose) as command:
        yield
        command.exit_code = 0


def test_an_entry_has_time_place_fields_and_the_chain_of_causes(tmp_path: Path) -> None:
    with logs.log_trial(tmp_path / "0007"):
        try:
            try:
                {}["missing"]
            except KeyError as error:
                raise InfrastructureError("no bucket") from error
        except InfrastructureError:
            LOGGER.exception("epoch %d failed", 3, extra={"epoch": 3, "attempt": 2})
    start, failure, _ = entries_of(tmp_path / "0007")
    assert start["event"] == "start" and start["machine"]["cores"] >= 1
    assert {"python", "raysweep", "torch"} <= set(start["versions"])
    own_start = psutil.Process().create_time()
    assert datetime.fromisoformat(start["process_started_at"]).timestamp() == pytest.approx(
        own_start, abs=0.01
    )
    assert failure["logger"] == "raysweep.some.module" and failure["level"] == "ERROR"
    assert failure["message"] == "epoch 3 failed" and failure["process"] and failure["host"]
    assert (failure["trial"], failure["epoch"], failure["attempt"]) == (7, 3, 2)
    assert start["time"] <= failure["time"] and failure["time"].endswith("Z")
    assert failure["exception"]["causes"] == [
        {"type": "InfrastructureError", "message": "no bucket"},
        {"type": "KeyError", "message": "'missing'"},
    ]
    text = (tmp_path / "0007" / "log.txt").read_text()
    assert "ERROR   [trial 0007 process" in text
    assert text.index("no bucket") < text.index("because of KeyError: 'missing'")
    assert 'raise InfrastructureError("no bucket") from error' in text


@pytest.mark.parametrize("text", SECRETS)
def test_no_secret_is_logged_or_printed(text: str, tmp_path: Path, capsys) -> None:
    with running_command("tune", "--optuna", text), logs.log_trial(tmp_path / "0000"):
        LOGGER.warning("to %s", text, extra={"place": text, "nested": [{"where": text}]})
        LOGGER.error("failed", exc_info=ValueError(text))
    written = "".join(file.read_text() for file in (tmp_path / "0000").iterdir())
    shown = capsys.readouterr().err
    assert written.count("***") >= 8 and "raysweep: warning: to " in shown
    assert SECRETS[text] not in written + shown


def test_the_values_of_secret_variables_are_not_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/etc/key.json")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of")
    text = "x correct horse of /etc/key.json"
    assert redact_secrets(text) == "x *** of /etc/key.json"
    assert redact_secrets(
        "s3://b/x?endpoint_override=minio:9000&scheme=http; gs://anonymous@b"
    ) == ("s3://b/x?endpoint_override=minio:9000&scheme=http; gs://anonymous@b")


def test_full_files_are_renamed_and_the_oldest_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_log, "_MAX_BYTES", 4000)
    monkeypatch.setattr(folder_log, "_N_FULL_FILES", 2)
    with logs.log_to_folder(tmp_path):
        for number in range(100):
            LOGGER.info("line", extra={"number": number})
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert len(sizes) == 3 and all(name.startswith("log.jsonl") for name in sizes)
    assert max(sizes.values()) <= 4000
    numbers = [entry["number"] for entry in logs.read_log(tmp_path) if "number" in entry]
    assert numbers == list(range(numbers[0], 100)) and 0 < numbers[0] < 90


@pytest.mark.parametrize("obstacle", ["no folder", "full disk"])
def test_a_log_that_cannot_be_written_is_one_warning_and_ends_nothing(
    obstacle: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sweep"
    if obstacle == "no folder":
        folder.touch()
    else:
        folder.mkdir()
        monkeypatch.setattr(os, "O_NOFOLLOW", 0)
        (folder / "log.jsonl").symlink_to("/dev/full")
    with running_command():
        with logs.log_to_folder(folder):
            for _ in range(3):
                LOGGER.info("work " * 3000)
        LOGGER.warning("later")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"raysweep: warning: the log {folder}/log.jsonl cannot be written: ")
    assert first.endswith("; the work continues") and second == "raysweep: warning: later"
    reason = {"no folder": "Not a directory", "full disk": "No space left on device"}[obstacle]
    assert reason in first


def test_a_disk_that_has_space_again_gets_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "O_NOFOLLOW", 0)
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with logs.log_to_folder(tmp_path):
        LOGGER.info("lost")
        (tmp_path / "log.jsonl").unlink()
        (tmp_path / "log.jsonl").write_text('{"time": "2026-01-01T00:00:00.000Z", "mess')
        LOGGER.info("written")
    damaged, written, _ = logs.read_log(tmp_path)
    assert damaged["level"] == "DAMAGED" and damaged["message"].endswith('"mess')
    assert written["message"] == "written", "on a line of its own"


@pytest.mark.parametrize(
    ("variable", "verbose", "shown"),
    [
        ("", False, ["warning", "error"]),
        ("", True, ["info", "warning", "error"]),
        ("debug", False, ["debug", "info", "warning", "error"]),
        ("error", False, ["error"]),
        ("ERROR", True, ["info", "warning", "error"]),
    ],
)
def test_the_terminal_shows_the_levels_that_were_asked_for(
    variable: str,
    verbose: bool,
    shown: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    monkeypatch.setenv(logs.LEVEL_VARIABLE, variable)
    with logs.command_log("tune", "raysweep tune", verbose), logs.log_to_folder(tmp_path):
        capsys.readouterr()
        for level in ("debug", "info", "warning", "error"):
            getattr(LOGGER, level)("at %s", level)
            LOGGER.error("in another way", extra={"is_shown_elsewhere": True})
        out, err = capsys.readouterr()
    assert err.splitlines() == [f"raysweep: {level}: at {level}" for level in shown] and not out
    assert sum(entry["message"].startswith("at ") for entry in entries_of(tmp_path)) == 4


def test_a_wrong_level_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv(logs.LEVEL_VARIABLE, "loud")
    assert main(["tune", "at", "--plan"]) == 2
    assert capsys.readouterr().err == (
        "raysweep: error: RAYSWEEP_LOG_LEVEL='loud': expected debug, info, warning, error\n"
    )


def test_a_command_logs_from_its_first_record_to_its_exit_code(tmp_path: Path) -> None:
    with running_command("run", "night"):
        LOGGER.warning("before any folder is known")
        with logs.log_to_folder(tmp_path / "pipeline"):
            with logs.log_to_folder(tmp_path / "sweep"), logs.log_to_folder(tmp_path / "sweep"):
                LOGGER.info("in both, once")
            logging.getLogger("urllib3").warning("Retrying (Retry(total=6))")
            logging.getLogger("urllib3").info("of no interest")
        LOGGER.info("after the block")
    messages = [entry["message"] for entry in entries_of(tmp_path / "pipeline")]
    assert messages[0].startswith("raysweep run night started at ")
    assert messages[1] == "before any folder is known"
    assert messages[2:5] == ["in both, once", "Retrying (Retry(total=6))", "after the block"]
    assert messages[5].startswith("raysweep run night ended its work after ")
    assert entries_of(tmp_path / "pipeline")[-1]["exit_code"] == 0
    start, once, end = entries_of(tmp_path / "sweep")
    assert start["event"] == "start" and once["message"] == "in both, once"
    assert end["event"] == "end" and "exit_code" not in end
    times = [entry["time"] for entry in entries_of(tmp_path / "pipeline")]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("error", "code", "level"),
    [
        (InfrastructureError("no bucket"), 3, "ERROR"),
        (KeyboardInterrupt(), 130, "WARNING"),
        (ZeroDivisionError("x"), 1, "ERROR"),
    ],
)
def test_the_end_of_a_command_that_fails_has_its_exit_code_and_cause(
    error: BaseException, code: int, level: str, tmp_path: Path, capsys
) -> None:
    with pytest.raises(type(error)), running_command(), logs.log_to_folder(tmp_path):
        raise error
    end = entries_of(tmp_path)[-1]
    assert (end["exit_code"], end["level"], end["event"]) == (code, level, "end")
    assert end["exception"]["causes"][0]["type"] == type(error).__name__
    assert capsys.readouterr().err == "", "the command line prints it"


def test_each_start_of_several_drivers_is_visible_in_one_log(tmp_path: Path) -> None:
    for number in range(3):
        with running_command("tune", "--resume", f"s{number}"), logs.log_to_folder(tmp_path):
            LOGGER.info("driver %d", number)
    events = [entry.get("event", entry["message"]) for entry in logs.read_log(tmp_path)]
    assert events == [part for number in range(3) for part in ("start", f"driver {number}", "end")]


def test_a_process_that_trains_several_trials_names_its_machine_once(tmp_path: Path) -> None:
    process = forked_processes.start_function(_log_two_trials, tmp_path)
    assert process.wait() == 0
    first, second = (entries_of(tmp_path / name)[0] for name in ("0000", "0001"))
    start = first["process_started_at"]
    assert first["message"].startswith(
        f"this process begins trial 0000; it started at {start}: python "
    )
    assert second["message"] == "this process begins trial 0001; it did other work before"
    assert second["versions"] == first["versions"], "each log has them as fields"


def _log_two_trials(folder: Path) -> None:
    for name in ("0000", "0001"):
        with logs.log_trial(folder / name):
            pass


def test_a_process_that_was_killed_is_told_by_the_next_one(tmp_path: Path) -> None:
    process = forked_processes.start_function(_log_and_die, tmp_path)
    assert process.wait() == -signal.SIGKILL
    for _ in range(2):
        with running_command("tune", "--resume", "s"), logs.log_to_folder(tmp_path):
            pass
    entries = logs.read_log(tmp_path)
    events = [entry.get("event") or entry["message"] for entry in entries]
    assert events == ["start", "last words", "killed", "start", "end", "start", "end"]
    assert entries[2]["level"] == "WARNING" and entries[2]["killed_process"] == process.pid


def _log_and_die(folder: Path) -> None:
    with logs.log_to_folder(folder):
        LOGGER.info("last words")
        os.kill(os.getpid(), signal.SIGKILL)


def test_programs_that_use_raysweep_get_what_they_ask_for(tmp_path: Path, capsys) -> None:
    root, seen = logging.getLogger(), logging.handlers.BufferingHandler(100)
    root.addHandler(seen)
    try:
        with logs.log_to_folder(tmp_path):
            LOGGER.info("detail")
            LOGGER.warning("important")
        LOGGER.warning("afterwards")
    finally:
        root.removeHandler(seen)
    assert [record.getMessage() for record in seen.buffer] == ["important", "afterwards"]
    assert capsys.readouterr().err == ""
    assert len(entries_of(tmp_path)) == 4, "with its start and end"


def test_warnings_of_other_libraries_are_still_printed(tmp_path: Path) -> None:
    shown: list[str] = []
    last_resort, root = logging.lastResort, logging.getLogger()
    handlers, root.handlers = root.handlers, []
    logging.lastResort = logging.StreamHandler()
    logging.lastResort.emit = lambda record: shown.append(record.getMessage())  # type: ignore[method-assign]
    try:
        with logs.log_to_folder(tmp_path / "a"), logs.log_to_folder(tmp_path / "b"):
            logging.getLogger("urllib3").warning("no answer")
    finally:
        logging.lastResort, root.handlers = last_resort, handlers
    assert shown == ["no answer"], "as without a log: once"
    assert entries_of(tmp_path / "b")[-2]["message"] == "no answer"


def test_a_sweep_that_was_never_started_leaves_no_log(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "s", load_space("at", {}))
    with running_command(), logs.log_to_folder(ledger.path):
        LOGGER.info("checking")
        ledger.delete_if_empty()
        LOGGER.info("goes nowhere")
    assert not (tmp_path / "s").exists()


def test_show_log_prints_the_drivers_and_the_trials_in_the_order_of_time(
    workdir: Path, capsys
) -> None:
    ledger = Ledger.create(workdir / "runs" / "s", load_space("at", {}))
    ledger.save_trial(Trial(3, {}))
    with running_command("tune", "at", "--name", "s"), logs.log_to_folder(ledger.path):
        LOGGER.info("first")
        with logs.log_trial(ledger.trial_path(3)):
            # As its worker process does.
            trial_logger = logging.getLogger("raysweep.training.trainer")
            trial_logger.error("second", exc_info=ValueError("why\nin two lines"))
        with logs.log_trial(ledger.trial_path(3), rank=1):
            LOGGER.info("third")
    assert main(["show", "s", "--log", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["time"] for entry in found] == sorted(entry["time"] for entry in found)
    writers = {(entry["writer"], entry.get("rank")) for entry in found}
    assert writers == {("tune", None), ("trial", None), ("trial", 1)}
    assert main(["show", "s", "--log"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("]  ")[1] for line in lines if line.endswith(("first", "third"))] == [
        "first", "third", "third"
    ]  # fmt: skip
    assert "    ValueError: why" in lines and "        in two lines" in lines
    # Lines of driver and trial may have the same millisecond, in any order.
    (end,) = (line for line in lines if "ended its work after" in line)
    assert "with exit code 0" in end
    assert main(["show", "s/0003", "--log", "--json"]) == 0
    out = capsys.readouterr().out
    assert {json.loads(line)["writer"] for line in out.splitlines()} == {"trial"}


def test_show_log_of_a_pipeline_and_of_nothing(workdir: Path, capsys) -> None:
    folder = workdir / "runs" / "pipelines" / "digits"
    with logs.log_to_folder(folder):
        LOGGER.info("stage")
    for name in ("digits", "pipeline:digits"):
        assert main(["show", name, "--log"]) == 0
        assert "]  stage\n" in capsys.readouterr().out
    assert main(["show", "nothing", "--log"]) == 2
    assert capsys.readouterr().err == (
        f"raysweep: error: nothing: no log in {workdir}/runs/nothing and "
        f"{workdir}/runs/pipelines/nothing\n"
    )


@pytest.mark.parametrize(
    "line",
    [
        '{"time": null, "level": [1], "message": "kept"}',
        '{"time": "t", "writer": "trial", "trial": "x", "message": "kept"}',
        '{"time": "t", "exception": "x", "message": "kept"}',
        '{"time": "t", "exception": {"causes": ["kept"]}, "message": "kept"}',
        '{"time": "t", "exception": {"causes": 5}, "message": "kept"}',
        "[" * 200_000 + "kept",
        '{"time": "t", "message": "kept \\ud800\\u001b[31m"}',
    ],
)
def test_show_log_prints_a_line_that_nobody_wrote_so(
    line: str, workdir: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = workdir / "runs" / "pipelines" / "digits"
    (folder / "log.jsonl.20260101T000000-a").mkdir(parents=True)
    (folder / "log.jsonl").write_text(f'{line}\n{{"time": "u", "message": "next"}}\n')
    assert main(["show", "digits", "--log"]) == 0
    out = capfdbinary.readouterr().out
    assert b"kept" in out
    assert b"]  next\n" in out and b"\x1b" not in out


def test_a_slow_request_to_a_bucket_is_logged_while_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait_for_entries(count: int) -> None:
        while len(entries_of(tmp_path)) < count:
            time.sleep(0.01)

    with logs.log_to_folder(tmp_path):
        with request_log.log_slow_request("s3://b/fast"):
            pass
        monkeypatch.setattr(request_log, "_SLOW_AFTER", 0.05)
        with request_log.log_slow_request("s3://b/slow"):
            wait_for_entries(2)
        with pytest.raises(InfrastructureError), request_log.log_slow_request("s3://b/down"):
            wait_for_entries(4)
            raise InfrastructureError("no answer")
    told = [(e["uri"], e["event"]) for e in entries_of(tmp_path) if "uri" in e]
    assert told[:2] == [("s3://b/slow", "slow_request"), ("s3://b/slow", "slow_request_end")]
    assert told[2:] == [("s3://b/down", "slow_request"), ("s3://b/down", "slow_request_end")]


def test_docs_list_all_events() -> None:
    root = Path(logs.__file__).parent.parent
    used = {
        event
        for file in root.rglob("*.py")
        for event in re.findall(r'"event": "(\w+)"', file.read_text())
    }
    documented = set(re.findall(r"`(\w+)`", (root.parent / "docs" / "logs.md").read_text()))
    assert used > {"start", "asha_stop", "end"} and used <= documented


def test_the_lease_of_a_process_that_died_is_taken_over_with_a_word(tmp_path: Path) -> None:
    cache = PrefixCache(tmp_path / "prefixes")
    process = forked_processes.start_function(_acquire_and_die, tmp_path / "prefixes")
    assert process.wait() == -signal.SIGKILL
    with logs.log_to_folder(tmp_path), cache.acquire_training_lease("key") as must_train:
        assert must_train
    (told,) = (e for e in entries_of(tmp_path) if e.get("event") == "lease_taken_over")
    assert told["level"] == "WARNING" and "/prefixes/key.claim" in told["message"]
    assert told["message"].endswith(
        f" from process {process.pid} on {socket.gethostname()}, which has ended"
    )


def test_who_is_waited_for_is_named(tmp_path: Path) -> None:
    cache = PrefixCache(tmp_path / "prefixes")
    process = forked_processes.start_function(_hold_until_waited_for, tmp_path)
    # The file is created empty, and names its holder a moment later.
    while not [p for p in (tmp_path / "prefixes").glob("key.claim") if "host=" in p.read_text()]:
        assert process.poll() is None
    with logs.log_to_folder(tmp_path), cache.acquire_training_lease("key", 3) as must_train:
        assert must_train
    assert process.wait() == 0
    place = f"process {process.pid} on {socket.gethostname()}"
    messages = [entry["message"] for entry in entries_of(tmp_path)]
    assert f"waiting: {place} trains epoch 3, state key" in messages


def _hold_until_waited_for(folder: Path) -> None:
    with PrefixCache(folder / "prefixes").acquire_training_lease("key"):
        while (
            not (folder / "log.jsonl").exists()
            or "waiting" not in (folder / "log.jsonl").read_text()
        ):
            time.sleep(0.01)


def _acquire_and_die(folder: Path) -> None:
    with PrefixCache(folder).acquire_training_lease("key"):
        os.kill(os.getpid(), signal.SIGKILL)
