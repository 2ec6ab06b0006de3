"""Output that is closed, lost, full, missing, stalled or of few signs: the work continues."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raysweep import output_streams
from raysweep.output_streams import ForgivingStream, OutputClosed, forgiving_output

ENVIRONMENT = {
    **os.environ,
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONWARNDEFAULTENCODING": "1",
}
ENVIRONMENT.pop("PYTHONIOENCODING", None)


@pytest.fixture
def pipe() -> Iterator[tuple[int, io.TextIOWrapper]]:
    """The reading end of a pipe, and a text stream that writes to it."""
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w", encoding="utf-8")
    yield reader, stream
    for close in (lambda: os.close(reader), stream.close):
        try:
            close()
        except OSError:
            assert close is not None  # a test has closed it


class TestStreams:
    def test_no_stream_at_all(self) -> None:
        stream = ForgivingStream(None, is_all=False)
        assert stream.write("text") == 4 and not stream.isatty() and stream.encoding == "utf-8"
        stream.flush()
        with pytest.raises(io.UnsupportedOperation):
            stream.fileno()

    def test_a_closed_stream(self) -> None:
        closed = io.StringIO()
        closed.close()
        stream = ForgivingStream(closed, is_all=False)
        assert stream.write("text") == 4 and stream.is_lost and not stream.isatty()

    def test_a_reader_that_has_gone(self, pipe: tuple[int, io.TextIOWrapper]) -> None:
        reader, inner = pipe
        os.close(reader)
        work = ForgivingStream(inner, is_all=False)
        work.write("x" * 100_000)
        assert work.is_lost
        printing = ForgivingStream(inner, is_all=True)
        with pytest.raises(OutputClosed):
            printing.write("x" * 100_000)
            printing.flush()

    def test_a_full_disk(self) -> None:
        with Path("/dev/full").open("w", encoding="utf-8", buffering=1) as full:
            assert ForgivingStream(full, is_all=False).write("line\n") == 5
            with pytest.raises(OSError, match="No space left"):
                ForgivingStream(full, is_all=True).write("line\n")
            # What is in its buffer goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())

    def test_a_reader_that_takes_nothing(
        self, pipe: tuple[int, io.TextIOWrapper], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reader, inner = pipe
        monkeypatch.setattr(output_streams, "_PATIENCE_SECONDS", 0.05)
        stream = ForgivingStream(inner, is_all=False)
        text = "0123456789" * 30_000
        assert stream.write(text) == len(text) and not stream.is_lost
        received = os.read(reader, 1_000_000).decode()
        assert 4096 <= len(received) < len(text) and text.startswith(received)
        stream.write("later")
        assert os.read(reader, 100) == b"later"

    @pytest.mark.parametrize(
        ("encoding", "shown"),
        [
            ("ascii", "kappa +-1 \\xe9 \\u65e5"),
            ("latin-1", "kappa ±1 é \\u65e5"),
            ("utf-8", "κ ±1 é 日"),
        ],
    )
    def test_signs_that_an_encoding_lacks(self, encoding: str, shown: str) -> None:
        raw = io.BytesIO()
        stream = ForgivingStream(io.TextIOWrapper(raw, encoding=encoding), is_all=True)
        stream.write("κ ±1 é 日")
        stream.flush()
        assert raw.getvalue().decode(encoding) == shown

    def test_the_streams_are_put_back(self) -> None:
        before = sys.stdout, sys.stderr
        with pytest.raises(KeyError), forgiving_output(is_all=False):
            raise KeyError
        assert (sys.stdout, sys.stderr) == before


def run(code: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    """Run Python code that has `main`, the command line, where the locale is not UTF-8."""
    program = f"from raysweep.cli import main; import os, sys\n{code}"
    return subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, timeout=300, check=False, **options
    )


@pytest.mark.slow
class TestCommands:
    """Whole commands; `train` stands for those that work."""

    TRAIN = (
        "main(['train', 'at', '--out', sys.argv[1] if len(sys.argv) > 1 else '.', "
        "*[w for s in ('data.val_size=50', 'data.train_size=64', 'batch_size=32', 'epochs=1', "
        "'*.attacks.*.steps=1', 'validation.finish.*.steps=1', 'validation.finish.*.runs=1') "
        "for w in ('--set', s)]])"
    )

    def test_training_goes_on_when_nobody_reads(
        self, tmp_path: Path, empty_store: Callable[[Path], None]
    ) -> None:
        empty_store(tmp_path / "mlflow.db")
        code = (
            "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1); os.dup2(writer, 2)\n"
            "sys.stderr = None\n"
            f"code = {self.TRAIN}\n"
            "open('code', 'w', encoding='utf-8').write(str(int(code)))"
        )
        finished = run(code, cwd=tmp_path)
        assert finished.returncode == 0
        assert (tmp_path / "code").read_text() == "0"
        assert [*tmp_path.glob("runs/*/epoch-0001/meta.json")]

    def test_a_command_that_prints_ends_quietly_behind_head(self) -> None:
        code = "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)\n"
        finished = run(code + "sys.exit(main(['show', 'at']))", stderr=subprocess.PIPE)
        assert finished.returncode == 0 and finished.stderr == b""
        full = "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\nsys.exit(main(['show', 'at']))"
        finished = run(full, stderr=subprocess.PIPE)
        assert finished.returncode == 3
        assert finished.stderr.decode().splitlines() == ["raysweep: error: No space left on device"]
