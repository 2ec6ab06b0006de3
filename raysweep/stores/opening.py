"""Open a store by its location: a folder, s3://BUCKET/PATH or gs://BUCKET/PATH."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from raysweep.spec import SpecError, describe_unknown_name
from raysweep.stores.bucket_store import BucketLocation, BucketStore
from raysweep.stores.folder_store import FolderStore
from raysweep.stores.protocol import Store
from raysweep.stores.store_path import StorePath
from raysweep.user_folders import expand_home

Location = StorePath | Path | str
"""A folder or file in a store, as functions accept it: path, local path or URI."""

_TRUNCATED_URIS = ("s3:/", "gs:/")
_BUCKET_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SERVER_PATTERN = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")
_REGION_PATTERN = re.compile(r"[^\s/@]+")
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
        return FolderStore(_resolve_folder(location))
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
        path = _resolve_folder(str(location))
        return StorePath(FolderStore(Path(path.anchor)), "/".join(path.parts[1:]))
    folder = parse_bucket_uri(str(location))
    return StorePath(BucketStore(replace(folder, prefix="")), folder.prefix)


def _resolve_folder(location: str) -> Path:
    """Return the absolute path of a folder; SpecError for a URI that lacks a slash."""
    if location.startswith(_TRUNCATED_URIS):
        raise SpecError(f"{location}: expected a folder, s3://BUCKET/PATH or gs://BUCKET/PATH")
    return expand_home(location).resolve()


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
    scheme, _, rest = uri.partition("://")
    scheme = scheme.lower()
    # A path may contain `#`; an access key may contain `/`.
    place, _, query = rest.partition("?")
    host, _, path = place.partition("/")
    login, _, bucket = host.rpartition("@")
    if (login and (scheme, login) != ("gs", "anonymous")) or (":" in host and "@" in place):
        bucket = place.rpartition("@")[2].partition("/")[0]
        raise SpecError(
            f"{scheme}://...@{bucket}: credentials belong in the environment, not in a URI"
        )
    folders = [part for part in path.split("/") if part]
    is_known = scheme in _KNOWN_OPTIONS and _BUCKET_PATTERN.fullmatch(bucket)
    if not is_known or {".", ".."} & set(folders) or not path.isprintable():
        # Options of other schemes may be secrets.
        raise SpecError(
            f"{scheme}://{place}: expected a folder, s3://BUCKET/PATH or gs://BUCKET/PATH"
        )
    known_options = _KNOWN_OPTIONS[scheme]
    options = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := options.keys() - set(known_options):
        raise SpecError(
            describe_unknown_name(f"option of {scheme}:// URIs", min(unknown), known_options)
        )
    _check_options(scheme, options)
    queries = [query]
    if scheme == "s3":
        queries.append(_read_endpoint_from_environment(query))
    query = "&".join(filter(None, queries))
    return BucketLocation(scheme, host, "/".join(folders), query)


def _check_options(scheme: str, options: dict[str, str]) -> None:
    """Check the values of a URI's options; SpecError for the first wrong one."""
    expected_values: dict[str, tuple[Callable[[str], object], str]] = {
        "endpoint_override": (_SERVER_PATTERN.fullmatch, "HOST or HOST:PORT"),
        "region": (_REGION_PATTERN.fullmatch, "a name such as eu-west-1"),
        "scheme": (("http", "https").__contains__, "http or https"),
        "retry_limit_seconds": (_is_number_of_seconds, "a number of seconds"),
    }
    for name, value in options.items():
        is_valid, expected = expected_values[name]
        if not is_valid(value):
            # A server may be given with a password.
            shown = repr(value.rpartition("@")[2])
            raise SpecError(f"{scheme}://...?{name}={shown}: expected {expected}")


def _is_number_of_seconds(text: str) -> bool:
    """Return whether a text is a number of seconds, of a day at most."""
    try:
        return 0 <= float(text) <= 86400
    except ValueError:
        return False


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
