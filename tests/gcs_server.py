"""A server of Google Cloud Storage's XML protocol in memory, as far as obstore uses it.

Conditions are tested and met under one lock, so that they are as exclusive as Google's.
"""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_PAGE_SIZE = 1000


@dataclass(frozen=True)
class StoredObject:
    """An object, with its generation and the metadata of the request that wrote it."""

    data: bytes
    generation: int
    metadata: dict[str, str]
    modified: float = field(default_factory=time.time)

    @property
    def etag(self) -> str:
        return f'"{md5(self.data).hexdigest()}"'


class GcsServer(ThreadingHTTPServer):
    """The server.

    Attributes:
        buckets: Name of a bucket -> key -> object.
        refuses: Whether every request is answered with 403.
        ignores_conditions: Whether objects are written whatever the request's conditions are.
        n_answers_to_lose: How many of the next uploads are not answered, although they are done.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.buckets: dict[str, dict[str, StoredObject]] = {}
        self.refuses = False
        self.ignores_conditions = False
        self.n_answers_to_lose = 0
        self.lock = threading.Lock()
        self.last_generation = 1700000000000000
        # Id of an upload -> number of a part -> its content.
        self.uploads: dict[str, dict[int, bytes]] = {}

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def create_bucket(self, name: str) -> None:
        self.buckets[name] = {}


@contextmanager
def serve_gcs() -> Iterator[GcsServer]:
    """Run a server in a thread."""
    server = GcsServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: GcsServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_PUT(self) -> None:
        self._answer(self._put)

    def do_DELETE(self) -> None:
        self._answer(self._delete)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, method: Any) -> None:
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path.lstrip("/")).partition("/")
        self.query = {
            name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()
        }
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            if self.server.refuses:
                self._send_error(403, "AccessDenied")
            elif self.command == "PUT" and not key:
                self.server.create_bucket(bucket)
                self._send(200, b"", {})
            elif bucket not in self.server.buckets:
                self._send_error(404, "NoSuchBucket")
            else:
                method(self.server.buckets[bucket], key)

    def _get(self, objects: dict[str, StoredObject], key: str) -> None:
        if not key:
            self._list(objects)
        elif key not in objects:
            self._send_error(404, "NoSuchKey")
        else:
            data = objects[key].data
            status = 200
            headers = self._describe(objects[key])
            if byte_range := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(byte_range[1]), int(byte_range[2] or len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
                data, status = data[first : last + 1], 206
            self._send(status, data, headers)

    def _list(self, objects: dict[str, StoredObject]) -> None:
        prefix = self.query.get("prefix", "")
        after = max(self.query.get("continuation-token", ""), self.query.get("start-after", ""))
        keys = sorted(key for key in objects if key.startswith(prefix) and key > after)
        if delimiter := self.query.get("delimiter"):
            ends = [key.find(delimiter, len(prefix)) for key in keys]
            folders = {key[: end + 1] for key, end in zip(keys, ends, strict=True) if end >= 0}
            keys = [key for key, end in zip(keys, ends, strict=True) if end < 0]
        else:
            folders = set()
        page = keys[:_PAGE_SIZE]
        entries = [
            f"<Contents><Key>{escape(key)}</Key><Generation>{objects[key].generation}</Generation>"
            f"<LastModified>{_iso(objects[key].modified)}</LastModified>"
            f"<ETag>{escape(objects[key].etag)}</ETag><Size>{len(objects[key].data)}</Size></Contents>"
            for key in page
        ]
        rest = "<IsTruncated>false</IsTruncated>"
        if len(keys) > len(page):
            token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>"
            rest = f"<IsTruncated>true</IsTruncated>{token}"
        entries += [
            f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
            for folder in sorted(folders)
        ]
        text = f"<ListBucketResult>{rest}{''.join(entries)}</ListBucketResult>"
        self._send(200, text.encode(), {"Content-Type": "application/xml"})

    def _put(self, objects: dict[str, StoredObject], key: str) -> None:
        if "uploadId" in self.query:
            part = self.server.uploads[self.query["uploadId"]]
            part[int(self.query["partNumber"])] = self.body
            self._send(200, b"", {"ETag": f'"{md5(self.body).hexdigest()}"'})
            return
        expected = self.headers.get("x-goog-if-generation-match")
        current = objects[key].generation if key in objects else 0
        is_met = expected is None or int(expected) == current
        if not (is_met or self.server.ignores_conditions):
            self._send_error(412, "PreconditionFailed")
            return
        data = self.body
        metadata = {
            name: value
            for name, value in self.headers.items()
            if name.lower().startswith("x-goog-meta-") or name.lower() == "content-type"
        }
        if source := self.headers.get("x-goog-copy-source"):
            bucket, _, source_key = unquote(source.lstrip("/")).partition("/")
            if source_key not in self.server.buckets.get(bucket, {}):
                self._send_error(404, "NoSuchKey")
                return
            data = self.server.buckets[bucket][source_key].data
        self._store(objects, key, data, metadata)
        self._send(200, b"", self._describe(objects[key]))

    def _store(
        self, objects: dict[str, StoredObject], key: str, data: bytes, metadata: dict[str, str]
    ) -> None:
        self.server.last_generation += 1
        objects[key] = StoredObject(data, self.server.last_generation, metadata)

    def _post(self, objects: dict[str, StoredObject], key: str) -> None:
        """Begin or complete an upload in parts."""
        if "uploads" in self.query:
            upload_id = f"upload-{len(self.server.uploads)}"
            self.server.uploads[upload_id] = {}
            text = (
                "<InitiateMultipartUploadResult>"
                f"<UploadId>{upload_id}</UploadId></InitiateMultipartUploadResult>"
            )
        else:
            parts = self.server.uploads.pop(self.query["uploadId"])
            self._store(objects, key, b"".join(parts[number] for number in sorted(parts)), {})
            text = (
                "<CompleteMultipartUploadResult>"
                f"<ETag>{escape(objects[key].etag)}</ETag></CompleteMultipartUploadResult>"
            )
        self._send(200, text.encode(), {"Content-Type": "application/xml"})

    def _delete(self, objects: dict[str, StoredObject], key: str) -> None:
        if objects.pop(key, None) is None:
            self._send_error(404, "NoSuchKey")
        else:
            self._send(204, b"", {})

    def _describe(self, stored: StoredObject) -> dict[str, str]:
        """Return the headers that describe an object."""
        return {
            "ETag": stored.etag,
            "Last-Modified": formatdate(stored.modified, usegmt=True),
            "x-goog-generation": str(stored.generation),
            **stored.metadata,
        }

    def _send_error(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
        self._send(status, text.encode(), {"Content-Type": "application/xml"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self.command == "PUT" and self.server.n_answers_to_lose:
            self.server.n_answers_to_lose -= 1
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _iso(seconds: float) -> str:
    """Return a time as Google's listings write it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + (
        f".{int(seconds % 1 * 1000):03d}Z"
    )
