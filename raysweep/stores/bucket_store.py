"""A store in a bucket of S3, Google Cloud Storage or a server with the protocol of one of them.

Credentials are read from the environment, by obstore.
"""

import copy
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl
from urllib.request import Request, urlopen
from uuid import uuid4

from raysweep.stores import local_copies
from raysweep.stores.errors import StoreAccessRefused, StoredFileNotFound, StoreUnavailable
from raysweep.stores.folder_store import delete_unfinished_folders, link_files
from raysweep.stores.protocol import (
    META_FILE,
    StoredCheckpoint,
    StoredFile,
    VersionedContent,
    check_key,
)
from raysweep.stores.request_log import log_slow_request

if TYPE_CHECKING:
    from obstore import ObjectMeta, PutResult
    from obstore.store import GCSCredential, GCSStore, S3Store

logger = logging.getLogger(__name__)

# Attribute of an object that names the request which wrote it.
_WRITER_ATTRIBUTE = "raysweep-writer"
# Parts of obstore's messages if there is no bucket, or no right to use it.
_REFUSAL_PATTERN = re.compile(
    r"NoSuchBucket|InvalidAccessKeyId|SignatureDoesNotMatch|status code: 40[13]|token request"
    r"|[Cc]redential|service account"
)
# Names of files, folders and buckets in obstore's messages. They may contain any word.
_NAMES_PATTERN = re.compile(
    # The address of the credentials of a machine in a cloud stays.
    r"https?://(?!169\.254\.)\S+"
    r"|(?:location|path) .*?(?=: Error performing)"
    r"|<(Key|BucketName|Resource|Message)>.*?</\1>"
)
_N_PARALLEL_REQUESTS = 16
# Bytes of one request of a download.
_PART_BYTES = 16 * 2**20
# Downloads of a checkpoint that is replaced during each of them.
_N_DOWNLOAD_ATTEMPTS = 5


@dataclass(frozen=True)
class BucketLocation:
    """Parts of the URI of a folder in a bucket.

    Attributes:
        scheme: `s3` or `gs`.
        login_and_bucket: Name of the bucket; `anonymous@NAME` for Google without credentials.
        prefix: Key of the folder; "" for the whole bucket.
        query: The URI's options, such as `endpoint_override=HOST:PORT&scheme=http`.
    """

    scheme: str
    login_and_bucket: str
    prefix: str
    query: str

    @property
    def bucket(self) -> str:
        """Name of the bucket."""
        return self.login_and_bucket.rpartition("@")[2]

    @property
    def options(self) -> dict[str, str]:
        """The URI's options by name."""
        return dict(parse_qsl(self.query))

    def uri_of(self, key: str) -> str:
        """Return the URI of a key below the folder; "" is the folder itself."""
        path = "/".join(filter(None, (self.login_and_bucket, self.prefix, key)))
        return f"{self.scheme}://{path}" + (f"?{self.query}" if self.query else "")


@dataclass(frozen=True)
class RetrySettings:
    """How long a bucket may be unavailable.

    Attributes:
        total_seconds: Time after the first attempt in which further ones are made.
        request_seconds: Longest time without a byte from the server during one attempt.
        longest_pause: Longest pause between two attempts in seconds.
    """

    total_seconds: float = 120.0
    request_seconds: float = 20.0
    longest_pause: float = 15.0


class BucketStore:
    """Store in a bucket. The version of a file is its ETag on S3, its generation on Google.

    Attributes:
        location: The bucket, and the folder in it to which keys are relative.
        retry: How long the bucket may be unavailable.
    """

    def __init__(self, location: BucketLocation, retry: RetrySettings | None = None) -> None:
        self.location = location
        self.retry = retry or RetrySettings()
        self._check_before_write: Callable[[], None] | None = None

    def with_write_check(self, check: Callable[[], None]) -> "BucketStore":
        """Return the same store with a check before each write and deletion.

        Args:
            check: It raises an error if this process must not write. Other processes to which the
                store is sent do not have it.
        """
        store = copy.copy(self)
        store._check_before_write = check
        return store

    def require_writable(self) -> None:
        if self._check_before_write is not None:
            self._check_before_write()

    def __reduce__(self) -> Any:
        return BucketStore, (self.location, self.retry)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketStore) and other.location == self.location

    def __hash__(self) -> int:
        return hash(self.location)

    @property
    def uri(self) -> str:
        return self.uri_of("")

    def uri_of(self, key: str) -> str:
        return self.location.uri_of(key)

    def local_path(self, key: str) -> Path | None:
        return None

    def working_path(self, key: str) -> Path:
        location = self.location
        check_key(key)
        server = "?".join(filter(None, (location.scheme, location.query)))
        folder = local_copies.bucket_copies_folder(server, location.login_and_bucket)
        return folder / location.prefix / key

    def has_file(self, key: str) -> bool:
        try:
            with self._translate_errors(key):
                self._client.head(key)
        except StoredFileNotFound:
            return False
        return True

    def read_bytes(self, key: str) -> bytes:
        return self._read(key).data

    def read_versioned(self, key: str) -> VersionedContent | None:
        try:
            return self._read(key)
        except StoredFileNotFound:
            return None

    def read_matching(self, prefix: str, pattern: str) -> dict[str, bytes]:
        keys = [file.key for file in self.list_files(prefix, pattern)]
        with ThreadPoolExecutor(_N_PARALLEL_REQUESTS) as pool:
            contents = pool.map(self.read_versioned, keys)
            return {
                key: content.data
                for key, content in zip(keys, contents, strict=True)
                if content is not None
            }

    def write_bytes(self, key: str, data: bytes) -> None:
        self.require_writable()
        with self._translate_errors(key):
            self._client.put(key, data)

    def create(self, key: str, data: bytes) -> str | None:
        return self._put_conditionally(key, data, "create")

    def replace(self, key: str, data: bytes, version: str) -> str | None:
        return self._put_conditionally(key, data, {"e_tag" if self._is_s3 else "version": version})

    def delete(self, key: str) -> None:
        self.require_writable()
        with suppress(StoredFileNotFound), self._translate_errors(key):
            self._client.delete(key)

    def list_files(self, prefix: str = "", pattern: str = "**/*") -> list[StoredFile]:
        files = []
        with self._translate_errors(prefix):
            for chunk in self._client.list(prefix or None, chunk_size=1000):
                for entry in chunk:
                    relative = entry["path"].removeprefix(f"{prefix}/" if prefix else "")
                    if _matches_glob(relative, pattern):
                        modified = entry["last_modified"].timestamp()
                        files.append(StoredFile(entry["path"], entry["size"], modified))
        # Earlier versions left empty objects `FOLDER/`, which obstore lists as files `FOLDER`.
        files = [file for file in files if file.size or self.has_file(file.key)]
        return sorted(files, key=lambda file: file.key)

    def list_subfolders(self, prefix: str) -> list[str]:
        with self._translate_errors(prefix):
            result = self._client.list_with_delimiter(prefix or None)
        return sorted(name.rpartition("/")[2] for name in result["common_prefixes"])

    def delete_folder(self, prefix: str) -> None:
        keys = [file.key for file in self.list_files(prefix)]
        meta_keys = [key for key in keys if key.endswith(f"/{META_FILE}")]
        self._delete_all(meta_keys)
        self._delete_all([key for key in keys if key not in set(meta_keys)])
        local_copies.delete_copy(self.working_path(prefix))

    @contextmanager
    def write_checkpoint(
        self, key: str, copy_from: str | None = None, overwrite: bool = True
    ) -> Iterator[Path]:
        folder = self.working_path(key)
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        source = self.fetch_checkpoint(copy_from) if copy_from is not None else None
        try:
            if copy_from is not None and source is None:
                raise StoredFileNotFound(f"{self.uri_of(copy_from)}: there is no checkpoint")
            if source is not None:
                link_files(source, partial)
            copied_names = {file.name for file in partial.iterdir()}
            yield partial
            if not overwrite and self.has_file(f"{key}/{META_FILE}"):
                return
            self._delete_other_files(key, partial)
            for file in sorted(partial.iterdir(), key=lambda file: file.name == META_FILE):
                if file.name not in copied_names or not self._copy(
                    f"{copy_from}/{file.name}", f"{key}/{file.name}"
                ):
                    self._upload(file, f"{key}/{file.name}")
            local_copies.place_copy(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def fetch_checkpoint(self, key: str) -> Path | None:
        folder = self.working_path(key)
        for _ in range(_N_DOWNLOAD_ATTEMPTS):
            meta = self.read_versioned(f"{key}/{META_FILE}")
            if meta is None:
                local_copies.delete_copy(folder)
                return None
            if local_copies.touch_copy_if_current(folder, meta.data):
                return folder
            if self._download_checkpoint(key, folder, meta):
                return folder
        raise StoreUnavailable(f"{self.uri_of(key)}: it is replaced again and again")

    def mark_used(self, key: str) -> None:
        pass

    def list_checkpoints(self, prefix: str) -> list[StoredCheckpoint]:
        files: dict[str, list[StoredFile]] = {}
        for file in self.list_files(prefix, "[!.]*/*"):
            files.setdefault(file.key.rpartition("/")[0], []).append(file)
        checkpoints = []
        for key, members in files.items():
            if f"{key}/{META_FILE}" in {file.key for file in members}:
                size = sum(file.size for file in members)
                last_used = max(file.modified for file in members)
                checkpoints.append(StoredCheckpoint(key, size, last_used))
        return checkpoints

    def delete_unfinished(self, prefix: str, min_age: float = 0.0) -> None:
        delete_unfinished_folders(self.working_path(prefix), min_age)

    @property
    def _is_s3(self) -> bool:
        """Whether the server has S3's protocol, not Google's."""
        return self.location.scheme == "s3"

    def _version_of(self, result: "ObjectMeta | PutResult") -> str:
        """Return the version in an answer of the server."""
        return str(result["e_tag"] if self._is_s3 else result["version"])

    def _read(self, key: str) -> VersionedContent:
        """Read a file. Raises StoredFileNotFound if there is none."""
        with self._translate_errors(key):
            result = self._client.get(key)
            return VersionedContent(bytes(result.bytes()), self._version_of(result.meta))

    def _upload(self, file: Path, key: str) -> None:
        """Upload a file of this machine."""
        self.require_writable()
        with self._translate_errors(key):
            self._client.put(key, file)

    def _copy(self, source_key: str, key: str) -> bool:
        """Copy a file inside the bucket; return False if the bucket does not have it."""
        self.require_writable()
        try:
            with self._translate_errors(key):
                self._client.copy(source_key, key)
        except StoredFileNotFound:
            return False
        return True

    def _delete_all(self, keys: list[str]) -> None:
        """Delete files, several at a time."""
        with ThreadPoolExecutor(_N_PARALLEL_REQUESTS) as pool:
            list(pool.map(self.delete, keys))

    def _delete_other_files(self, key: str, new_folder: Path) -> None:
        """Delete the meta file of a checkpoint, then the files that the new one does not have."""
        self.delete(f"{key}/{META_FILE}")
        new_names = {file.name for file in new_folder.iterdir()}
        old_keys = [file.key for file in self.list_files(key, "*")]
        self._delete_all([old for old in old_keys if old.rpartition("/")[2] not in new_names])

    def _download_checkpoint(self, key: str, folder: Path, meta: VersionedContent) -> bool:
        """Download a checkpoint and place it; return False if it was replaced meanwhile."""
        partial = folder.with_name(f".{folder.name}.{os.getpid()}-{threading.get_native_id()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            try:
                self._download_files(key, partial)
            except (StoredFileNotFound, StoreUnavailable):
                # The earlier files may be gone, or shorter than they were.
                if self.read_versioned(f"{key}/{META_FILE}") == meta:
                    raise
                return False
            if self.read_versioned(f"{key}/{META_FILE}") != meta:
                return False
            (partial / META_FILE).write_bytes(meta.data)
            local_copies.place_copy(partial, folder)
            return True
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _download_files(self, key: str, folder: Path) -> None:
        """Download the files of a checkpoint."""
        for file in self.list_files(key, "*"):
            with (folder / PurePosixPath(file.key).name).open("wb") as stream:
                # Each part is a request of its own, and only that is repeated if it fails.
                for start in range(0, file.size, _PART_BYTES):
                    end = min(start + _PART_BYTES, file.size)
                    with self._translate_errors(file.key):
                        stream.write(self._client.get_range(file.key, start=start, end=end))

    def _put_conditionally(self, key: str, data: bytes, mode: Any) -> str | None:
        """Upload under a condition; return the new version, or None if the condition is not met.

        The answer to a successful upload may be lost. The repeated upload then fails the condition,
        so an attribute of the object tells which request wrote it.
        """
        from obstore.exceptions import AlreadyExistsError, GenericError, PreconditionError

        self.require_writable()
        writer = uuid4().hex
        deadline = time.monotonic() + self.retry.total_seconds
        while True:
            with self._translate_errors(key):
                try:
                    result = self._client.put(
                        key, data, mode=mode, attributes={_WRITER_ATTRIBUTE: writer}
                    )
                    return self._version_of(result)
                except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                    return self._find_version_written_by(writer, key)
                except GenericError as error:
                    # obstore does not repeat such a request after a timeout.
                    is_answer = re.search(r"status code: 4\d\d", str(error))
                    if time.monotonic() >= deadline or is_answer:
                        raise
                    logger.warning(
                        "%s: the request is sent again: %s",
                        self.uri_of(key),
                        _describe_outage(error),
                    )
            time.sleep(min(1.0, self.retry.longest_pause))

    def _find_version_written_by(self, writer: str, key: str) -> str | None:
        """Return a file's version if a request wrote it; otherwise None."""
        try:
            with self._translate_errors(key):
                result = self._client.get(key)
                if result.attributes.get(_WRITER_ATTRIBUTE) == writer:
                    return self._version_of(result.meta)
        except StoredFileNotFound:
            pass
        return None

    @contextmanager
    def _translate_errors(self, key: str) -> Iterator[None]:
        """Raise this package's errors instead of obstore's."""
        from obstore.exceptions import BaseError

        check_key(key)
        try:
            with log_slow_request(self.uri_of(key)):
                yield
        except (BaseError, FileNotFoundError) as error:
            uri = self.uri_of(key)
            if _is_refusal(error):
                raise StoreAccessRefused(f"{uri}: {_describe_refusal(error, self)}") from error
            if isinstance(error, FileNotFoundError):
                raise StoredFileNotFound(f"{uri}: there is no such file") from error
            raise StoreUnavailable(f"{uri}: {_describe_outage(error)}") from error

    @cached_property
    def _client(self) -> "S3Store | GCSStore":
        """The connection. obstore is imported at first use."""
        from obstore.store import GCSStore, S3Store

        location, options = self.location, self.location.options
        total_seconds = float(options.get("retry_limit_seconds", self.retry.total_seconds))
        arguments: dict[str, Any] = {
            "prefix": location.prefix or None,
            "client_options": {
                "allow_http": options.get("scheme") == "http",
                "connect_timeout": timedelta(seconds=self.retry.request_seconds),
                "read_timeout": timedelta(seconds=self.retry.request_seconds),
                "timeout": timedelta(hours=1),
            },
            "retry_config": {
                "max_retries": 1000,
                "retry_timeout": timedelta(seconds=total_seconds),
                "backoff": {"max_backoff": timedelta(seconds=self.retry.longest_pause)},
            },
        }
        host = options.get("endpoint_override")
        server = f"{options.get('scheme', 'https')}://{host}" if host else None
        if not self._is_s3:
            config: Any = {"base_url": server} if server else {}
            if location.login_and_bucket.startswith("anonymous@"):
                # obstore signs some requests in spite of this. Without a provider it would use the
                # credentials of the machine.
                config["skip_signature"] = True
                arguments["credential_provider"] = _provide_anonymous_token
            return GCSStore(location.bucket, config=config, **arguments)
        # Not every server can delete several objects in one request.
        config = {"virtual_hosted_style_request": server is None, "disable_bulk_delete": True}
        if server:
            config |= {"endpoint": server, "region": options.get("region", "us-east-1")}
        else:
            config["region"] = options.get("region") or _find_region(location.bucket)
        return S3Store(location.bucket, config=config, **arguments)


def _provide_anonymous_token() -> "GCSCredential":
    """Return the token of requests without credentials."""
    return {"token": "anonymous", "expires_at": None}


def _matches_glob(relative_key: str, pattern: str) -> bool:
    """Return whether a key relative to a folder matches a glob as pathlib understands it."""
    names, patterns = relative_key.split("/"), pattern.split("/")
    if patterns[0] == "**":
        names, patterns = names[1 - len(patterns) :], patterns[1:]
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))


def _find_region(bucket: str) -> str:
    """Ask Amazon for the region of a bucket; no credentials are needed."""
    try:
        with urlopen(Request(f"https://{bucket}.s3.amazonaws.com", method="HEAD")) as answer:
            headers = answer.headers
    except OSError as error:
        headers = getattr(error, "headers", None) or {}
    return str(headers.get("x-amz-bucket-region", "us-east-1"))


def _is_refusal(error: Exception) -> bool:
    """Return whether a server refused access, or has no such bucket: repetition does not help."""
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return True
    message, _, details = str(error).partition("\n\nDebug source:")
    if _REFUSAL_PATTERN.search(_NAMES_PATTERN.sub("", message)):
        return True
    return bool(re.search(r"^\s*(source: )?\w*Credential\w* \{$", details, re.MULTILINE))


def _describe_refusal(error: Exception, store: BucketStore) -> str:
    """Return in one line why a server refused access, and what to do."""
    if "NoSuchBucket" in str(error):
        bucket = store.location.bucket
        return f"there is no bucket {bucket!r}, or none that these credentials may see"
    code = re.search(r"<Code>(\w+)</Code>", str(error))
    return (
        f"access denied ({code[1] if code else type(error).__name__}); credentials come from the"
        " environment (for s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role)"
    )


def _describe_outage(error: Exception) -> str:
    """Return in one line why a server could not be used."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    reason = line.rpartition(" - ")[2].partition(": <")[0].strip()
    if re.search(r"status code: 4\d\d", line):
        return f"the bucket does not accept the request ({reason})"
    return f"the bucket does not answer ({reason})"
