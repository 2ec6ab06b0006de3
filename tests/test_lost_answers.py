"""Leases in a bucket whose answers get lost: a request was carried out, the client repeats it, and
another process may be quicker.
"""

import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.request import Request, urlopen

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from raysweep.bucket_lease import BucketLease, LeaseTimes
from raysweep.stores import BucketStore, Store
from raysweep.stores.bucket_store import RetrySettings
from raysweep.stores.opening import parse_bucket_uri

KEY = ".claims/alone.lease"


class LosingS3Server:
    """An S3 server that carries out a request but loses the answer; then something happens.

    Attributes:
        uri: A folder in a bucket of the server.
        after_lost_answer: What happens before the client can repeat the next request that writes;
            None to answer all requests.
        lost: Method and content of the requests that were not answered.
    """

    def __init__(self) -> None:
        self._application = DomainDispatcherApplication(create_backend_app)
        # The server's check of a condition and the write after it are not one step.
        self._lock = threading.Lock()
        self.after_lost_answer: Callable[[], object] | None = None
        self.lost: list[tuple[str, bytes]] = []
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        host, bucket = f"127.0.0.1:{self._server.port}", f"lost{self._server.port}"
        urlopen(Request(f"http://{host}/{bucket}", method="PUT")).read()
        self.uri = f"s3://{bucket}/x?endpoint_override={host}&scheme=http"

    def __call__(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        with self._lock:
            answer = list(self._application(environ, start_response))
        method = environ["REQUEST_METHOD"]
        if method in ("PUT", "DELETE") and self.after_lost_answer is not None:
            happens, self.after_lost_answer = self.after_lost_answer, None
            self.lost.append((method, body))
            happens()
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        return answer

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def losing_server() -> Iterator[LosingS3Server]:
    server = LosingS3Server()
    yield server
    server.close()


def make_leases(server: LosingS3Server) -> tuple[Store, BucketLease, BucketLease]:
    store = BucketStore(parse_bucket_uri(server.uri), RetrySettings(20.0, 10.0, 0.1))
    quiet = LeaseTimes(300.0, 0.2)
    return store, BucketLease(store, KEY, times=quiet), BucketLease(store, KEY, times=quiet)


def acquire_soon(lease: BucketLease) -> None:
    """Try again and again to acquire a lease."""
    deadline = time.monotonic() + 600
    while not lease.try_acquire():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_release_leaves_the_lease_of_the_next_holder(losing_server: LosingS3Server) -> None:
    store, first, second = make_leases(losing_server)
    assert first.try_acquire()
    losing_server.after_lost_answer = lambda: acquire_soon(second)
    first.release()
    assert [method for method, _ in losing_server.lost] == ["PUT"]
    assert json.loads(losing_server.lost[0][1])["released"] is True
    values = json.loads(store.read_bytes(KEY))
    assert values["token"] == second._token and "released" not in values
    second.require_held()
    second.renew()
    assert not second.is_lost
    second.release()
    assert first.try_acquire()
    first.release()


def test_a_release_that_nobody_else_saw(losing_server: LosingS3Server) -> None:
    store, first, second = make_leases(losing_server)
    assert first.try_acquire()
    losing_server.after_lost_answer = lambda: None
    first.release()
    assert json.loads(store.read_bytes(KEY))["released"] is True
    assert second.try_acquire()
    second.release()


def test_a_lease_that_is_taken_over_while_it_is_renewed(losing_server: LosingS3Server) -> None:
    store, first, second = make_leases(losing_server)
    assert first.try_acquire()
    losing_server.after_lost_answer = lambda: acquire_soon(second)
    first.renew()
    assert first.is_lost and not second.is_lost
    first.release()
    second.require_held()
    assert json.loads(store.read_bytes(KEY))["token"] == second._token
    second.release()


@pytest.mark.parametrize("exists", [False, True], ids=["new", "released"])
def test_a_lease_is_acquired(exists: bool, losing_server: LosingS3Server) -> None:
    _, first, second = make_leases(losing_server)
    if exists:
        assert second.try_acquire()
        second.release()
    losing_server.after_lost_answer = lambda: None
    assert first.try_acquire() and len(losing_server.lost) == 1
    first.require_held()
    first.release()
