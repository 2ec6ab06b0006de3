"""Open a store by its location: a folder, s3://BUCKET/PATH or gs://BUCKET/PATH."""

import os
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from raysweep.spec import SpecError, describe_unknown_name
from raysweep.stores.bucket_store import BucketLocation, BucketStore
from raysweep.stores.folder_store import FolderStore
from raysweep.stores.protocol import Store
from raysweep.stores.store_path import StorePath

Location = StorePath | Path | str
"""A folder or file in a store, as functions accept it: path, local path or URI."""

_KNOWN_OPTIONS = {
    "s3": ["endpoint_override", "region", "scheme"],
    "gs": ["endpoint_override", "retry_limit_seconds", "scheme"],
}


def is_uri(location: str) -> bool:
    """Return whether a location is a URI, not a local path.

    Args:
        location: Path or URI.

    Returns:
        Whether it contains `://`.
    """
    return "://" in location


def open_store(location: str) -> Store:
    """Open a store, without using the network.

    Args:
        location: Local path (`~` is expanded), `s3://BUCKET/PATH` or `gs://BUCKET/PATH`. A URI may
            end with options, such as `?region=eu-west-1` or `?endpoint_override=HOST:PORT`.

    Returns:
        The store; its keys are relative to the location.

    Raises:
        SpecError: The URI contains credentials, `..`, an unknown option or another scheme.
    """
    if not is_uri(location):
        return FolderStore(Path(location).expanduser().resolve())
    return BucketStore(parse_bucket_uri(location))


def open_path(location: Location) -> StorePath:
    """Open a folder or file in a store, without using the network.

    Args:
        location: Local path or URI, as `open_store` takes it. A `StorePath` is returned as it is.

    Returns:
        The path. Its store is the file system of this machine, or the whole bucket.

    Raises:
        SpecError: See `open_store`.
    """
    if isinstance(location, StorePath):
        return location
    if not is_uri(str(location)):
        path = Path(location).expanduser().resolve()
        return StorePath(FolderStore(Path(path.anchor)), path.relative_to(path.anchor).as_posix())
    folder = parse_bucket_uri(str(location))
    return StorePath(BucketStore(replace(folder, prefix="")), folder.prefix)


def parse_bucket_uri(uri: str) -> BucketLocation:
    """Validate the URI of a folder in a bucket.

    Args:
        uri: The URI. The server in Amazon's environment variables is added to its options, because
            these variables may not be set on other machines.

    Returns:
        Its parts.

    Raises:
        SpecError: The URI contains credentials, `..`, an unknown option or another scheme.
    """
    parts = urlsplit(uri)
    login, _, bucket = parts.netloc.rpartition("@")
    if login and (parts.scheme, login) != ("gs", "anonymous"):
        raise SpecError(
            f"{parts.scheme}://...@{bucket}: credentials belong in the environment, not in a URI"
        )
    folders = [part for part in parts.path.split("/") if part]
    if parts.scheme not in _KNOWN_OPTIONS or not bucket or {".", ".."} & {*folders, bucket}:
        raise SpecError(f"{uri}: expected a folder, s3://BUCKET/PATH or gs://BUCKET/PATH")
    known_options = _KNOWN_OPTIONS[parts.scheme]
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := options.keys() - set(known_options):
        raise SpecError(
            describe_unknown_name(
                f"option of an {parts.scheme}:// URI", min(unknown), known_options
            )
        )
    queries = [parts.query]
    if parts.scheme == "s3":
        queries.append(_read_endpoint_from_environment(parts.query))
    query = "&".join(filter(None, queries))
    return BucketLocation(parts.scheme, parts.netloc, "/".join(folders), query)


def _read_endpoint_from_environment(query: str) -> str:
    """Return the S3 server in Amazon's environment variables as options of a URI."""
    variables = [
        name for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if os.environ.get(name)
    ]
    if not variables or "endpoint_override" in query:
        return ""
    server = urlsplit(os.environ[variables[0]])
    if (
        server.scheme not in ("http", "https")
        or not server.hostname
        or "@" in server.netloc
        or server.path.strip("/")
    ):
        raise SpecError(f"{variables[0]}: expected http://HOST:PORT or https://HOST")
    return urlencode({"endpoint_override": server.netloc, "scheme": server.scheme}, safe=":")
