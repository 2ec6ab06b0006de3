"""The log of a sweep whose machines share nothing but a bucket."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from test_storage import bucket_on

from raysweep import logs
from raysweep.logs import folder_log, log_upload
from raysweep.stores import BucketStore, StorePath, StoreUnavailable, open_path

LOGGER = logging.getLogger("raysweep.some.module")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Host and port of an S3 server."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def uri(s3: str, tmp_path: Path) -> str:
    return bucket_on(s3, "s3", tmp_path)


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was uploaded."""
    counts: Counter[str] = Counter()
    write_bytes = BucketStore.write_bytes

    def count(store: BucketStore, key: str, data: bytes) -> None:
        counts[key.rpartition("/")[2]] += 1
        write_bytes(store, key, data)

    monkeypatch.setattr(BucketStore, "write_bytes", count)
    return counts


class Machine:
    """A machine with a working copy of its own."""

    def __init__(self, name: str, tmp_path: Path, uri: str, patch: pytest.MonkeyPatch) -> None:
        self.name, self._copy, self._uri, self._patch = name, tmp_path / name, uri, patch

    @property
    def sweep(self) -> StorePath:
        self._patch.setenv("RAYSWEEP_CACHE", str(self._copy))
        return open_path(self._uri) / "sweep"

    def drive(self, *messages: str) -> None:
        with logs.log_to_folder(self.sweep):
            for message in messages:
                LOGGER.info("%s: %s", self.name, message)

    def read(self) -> list[str]:
        entries = logs.read_log(self.sweep)
        names = [entry.get("event") or entry["message"] for entry in entries]
        return [name for name in names if name != "end"]


@pytest.fixture
def machines(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Machine]:
    return [Machine(name, tmp_path, uri, monkeypatch) for name in "abc"]


def test_drivers_on_several_machines_add_to_one_log(
    machines: list[Machine], uploads: Counter[str]
) -> None:
    a, b, c = machines
    a.drive(*map(str, range(200)))
    b.drive("resumed")
    with logs.log_trial(c.sweep / "trials" / "0003"):
        LOGGER.info("c: trained")
    a.drive("again")
    expected = ["start", *(f"a: {number}" for number in range(200)), "start", "b: resumed"]
    expected += ["start", "c: trained", "start", "a: again"]
    for machine in machines:
        assert machine.read() == expected
    assert uploads == {"log.jsonl": 4, "log.txt": 1}, "once for each process, not for each line"


def test_what_a_killed_driver_had_not_uploaded_comes_with_the_next_one(
    machines: list[Machine],
) -> None:
    a, b, _ = machines
    a.drive("uploaded")
    log_file = (a.sweep / "log.jsonl").working_path
    line = json.loads(log_file.read_text().splitlines()[-2])
    with log_file.open("a") as file:
        file.write(json.dumps({**line, "message": "a: last words"}) + "\n")
    b.drive("resumed")
    assert "a: last words" not in b.read()
    expected = ["start", "a: uploaded", "a: last words", "start", "b: resumed"]
    assert a.read() == expected, "on its own machine they can be read at once"
    a.drive("back")
    assert b.read() == [*expected, "start", "a: back"]


def test_full_files_of_another_machine_stay_until_they_are_too_many(
    machines: list[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_log, "_MAX_BYTES", 3000)
    monkeypatch.setattr(folder_log, "_N_FULL_FILES", 3)
    a, b, c = machines
    a.drive(*map(str, range(20)))
    b.drive(*map(str, range(20)))
    messages = [message for message in c.read() if message != "start"]
    assert messages == [f"{name}: {number}" for name in "ab" for number in range(20)]
    b.drive(*map(str, range(20, 80)))
    assert not c.sweep.working_path.exists() and len(c.sweep.list_files()) == 4
    last = [message for message in c.read() if message.startswith("b: ")]
    numbers = [int(message.removeprefix("b: ")) for message in last]
    # Once, on a busy machine, a file of the first drive outlived one of the second.
    assert numbers == sorted(set(numbers)) and numbers[-40:] == list(range(40, 80))
    assert len(numbers) < 75


def test_an_outage_delays_nothing_and_loses_nothing(
    machines: list[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, _ = machines

    def refuse(store: BucketStore, key: str, data: bytes) -> None:
        raise StoreUnavailable("no answer")

    with monkeypatch.context() as outage:
        outage.setattr(BucketStore, "write_bytes", refuse)
        a.drive("in the dark")
    assert b.read() == []
    a.drive("in the light")
    assert b.read() == ["start", "a: in the dark", "start", "a: in the light"]


def test_records_are_uploaded_while_the_work_runs(
    machines: list[Machine], monkeypatch: pytest.MonkeyPatch, uploads: Counter[str]
) -> None:
    monkeypatch.setattr(log_upload, "_UPLOAD_INTERVAL", 0.05)
    a = machines[0]
    with logs.log_to_folder(a.sweep):
        LOGGER.info("at work")
        while not any(b"at work" in data for data in a.sweep.read_matching("log.jsonl").values()):
            pass
        before = uploads["log.jsonl"]
    assert uploads["log.jsonl"] == before + 1, "its end; in between nothing had changed"
