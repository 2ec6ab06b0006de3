"""Standard output and error that never end the work: closed, full, missing, or of few signs."""

import codecs
import io
import logging
import os
import select
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

logger = logging.getLogger(__name__)

# What an encoding without it can show in place of a sign that raysweep prints.
_PLAIN_SIGNS = str.maketrans(
    {
        **{"·": "*", "×": "x", "±": "+-", "–": "-", "—": "-", "…": "...", "→": "->", "≤": "<="},
        **{"≥": ">=", "≠": "!=", "ε": "eps", "κ": "kappa", "λ": "lambda", "τ": "tau", "β": "beta"},
        **{"α": "alpha", "γ": "gamma", "∞": "inf", "°": " deg", "µ": "u", "μ": "mu", "━": "-"},
        **{"╸": "-", "╺": "-", "│": "|", "─": "-", "•": "*", "’": "'", "“": '"', "”": '"'},
    }
)


# Text of a pipe or terminal is written in parts that fit its buffer as soon as it has space.
_PART_LENGTH = 1000
# A reader that takes nothing for this long misses what is printed meanwhile.
_PATIENCE_SECONDS = 5.0


class OutputClosed(BrokenPipeError):
    """Nobody reads the standard output any more, for example behind `| head`."""


class ForgivingStream(io.TextIOBase):
    """Text stream around another one; what that one cannot take is dropped.

    Attributes:
        is_lost: Whether nobody reads the output any more.
    """

    def __init__(self, stream: TextIO | None, is_all: bool) -> None:
        """Wrap a stream.

        Args:
            stream: The stream; None for none, as in a process without a terminal.
            is_all: Whether the output is all that a command does. Errors are raised then:
                OutputClosed if the reader has gone.
        """
        self._stream = stream
        self._is_all = is_all
        self._patience = _PATIENCE_SECONDS
        self.is_lost = stream is None

    def write(self, text: str) -> int:
        """Write text; signs that the encoding lacks become others."""
        if self._stream is None or self.is_lost:
            return len(text)
        with self._losses_noticed():
            if not _is_encodable(text, self.encoding):
                text = self._encodable(text)
            if self._is_all or not self._can_block():
                self._stream.write(text)
            else:
                self._write_parts(text)
        return len(text)

    def _write_parts(self, text: str) -> None:
        """Write to a pipe or terminal whose reader may pause; it then misses some text."""
        assert self._stream is not None
        for start in range(0, len(text), _PART_LENGTH):
            poll = select.poll()
            poll.register(self._stream.fileno(), select.POLLOUT)
            if not poll.poll(self._patience * 1000):
                self._patience = 0.0
                return
            self._patience = _PATIENCE_SECONDS
            self._stream.write(text[start : start + _PART_LENGTH])
            self._stream.flush()

    def _can_block(self) -> bool:
        """Return whether the stream is a pipe, socket or terminal."""
        assert self._stream is not None
        try:
            mode = os.fstat(self._stream.fileno()).st_mode
        except (OSError, ValueError, AttributeError):
            return False
        return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)

    def flush(self) -> None:
        """Write what is buffered."""
        if self._stream is not None and not self.is_lost:
            with self._losses_noticed():
                self._stream.flush()

    @contextmanager
    def _losses_noticed(self) -> Iterator[None]:
        """Drop the output from the first error on."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.is_lost = True
            if self._is_all and isinstance(error, BrokenPipeError):
                raise OutputClosed(*error.args) from error
            if self._is_all:
                raise
            logger.info("the output cannot be written any more, the work continues: %s", error)

    def _encodable(self, text: str) -> str:
        """Return the text with signs of the stream's encoding only."""
        encoding = self.encoding
        plain = "".join(
            sign if _is_encodable(sign, encoding) else sign.translate(_PLAIN_SIGNS) for sign in text
        )
        return plain.encode(encoding, "backslashreplace").decode(encoding)

    def isatty(self) -> bool:
        """Return whether somebody looks at a terminal."""
        if self._stream is None or self.is_lost:
            return False
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """Return the descriptor of the stream. UnsupportedOperation if it has none."""
        if self._stream is None:
            raise io.UnsupportedOperation("there is no such stream")
        return self._stream.fileno()

    def writable(self) -> bool:
        """Return True: what cannot be shown is dropped."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the stream."""
        name = getattr(self._stream, "encoding", None) or "utf-8"
        return codecs.lookup(name).name

    def __getattr__(self, name: str) -> Any:
        """Return anything else, such as `buffer`, from the stream."""
        if name.startswith("__") or self.__dict__.get("_stream") is None:
            raise AttributeError(name)
        return getattr(self._stream, name)


@contextmanager
def forgiving_output(is_all: bool) -> Iterator[None]:
    """Context manager in which stdout and stderr do not end the work.

    Args:
        is_all: Whether the output is all that the command does; see `ForgivingStream`. Errors
            about stderr are dropped in any case.
    """
    originals = sys.stdout, sys.stderr
    streams = ForgivingStream(originals[0], is_all), ForgivingStream(originals[1], False)
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        for stream in streams:
            with suppress(OSError):
                stream.flush()
        sys.stdout, sys.stderr = originals
        for stream, original in zip(streams, originals, strict=True):
            if stream.is_lost and original is not None:
                _discard_buffer(original)


def _discard_buffer(stream: TextIO) -> None:
    """Let a stream write nowhere: Python would print an error when it flushes it at exit."""
    with suppress(OSError, ValueError, AttributeError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
        stream.flush()


def _is_encodable(text: str, encoding: str) -> bool:
    """Return whether an encoding has all signs of a text."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
