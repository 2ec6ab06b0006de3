"""Names, notes and values that are more than text (point 9)."""

import contextlib
import hashlib
import io
import json
import os
import pty
import random
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import pyarrow as pa
import pyarrow.parquet as pq
from attack_table import attack, refusal_of
from conftest import tiny
from foreign_references import change_meta, write_checkpoint
from markdown_it import MarkdownIt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import equal, zeros

from raysweep import load, load_report, load_sweep
from raysweep.cli import main
from raysweep.data import DataSpec, load_data
from raysweep.data.dataset_loaders import load_mnist
from raysweep.errors import RaysweepError, SpecError
from raysweep.pipeline.report.document import (
    Banner,
    CaptionedFigure,
    Paragraph,
    ReportDocument,
    Section,
    Table,
)
from raysweep.pipeline.report.figures import plot_param_slices
from raysweep.plain_console import PlainConsole
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial
from raysweep.terminal import TrialTable
from raysweep.text_figure import TextFigure
from raysweep.training.callbacks import FunctionCallback
from raysweep.training.checkpoint import RunDirectory, read_checkpoint
from raysweep.training.mid_epoch_checkpoint import TrainingInterrupted
from raysweep.training.trainer import train_model
from raysweep.visible_text import escape_markdown, visible_output

COMMANDS = {
    "colour": "\x1b[31m",
    "link": "\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;cm0gLXJmIH4=\x07",
    "C1": "\x9b2J\x9d0;x\x9c",
    "return": "safe\rowned",
    "backspace": "ab\x08\x08cd",
    "bidi": "\u202egnp.exe\u2066x\u2069",
    "markup": "[red]x[/red][link=http://evil.example]y[/link][/]",
    "emoji": ":skull:",
    "line separator": "a\u2028b\x85c\x0bd",
    "nothing": "a\u200b\u00adb\ufeff\0",
}
EVERYTHING = "".join(COMMANDS.values())
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202e\u2066\u2069\u2028\ufeff\u00ad]")


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    previous = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(previous)


def make_sweep(folder: Path, **changes: object) -> Ledger:
    """A sweep with one trial that failed for a hostile reason."""
    space = {"method": "at", "space": {"optim.lr": {"float": [0.01, 0.5], "log": True}}}
    ledger = Ledger.create(folder / "runs/s", SearchSpace.from_data(space))
    best = {"epoch": 1.0, "robust_worst": 0.5}
    trial = Trial(0, {"optim.lr": 0.1}, "finished", 1, best, best, [[1, 0.5]], burn_in=0)
    ledger.save_trial(trial)
    file = ledger.trial_path(0) / "trial.json"
    file.write_json(file.read_json() | changes)
    return ledger


def output_of(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Run a command that believes to be on a terminal; return its exit code and its output."""
    main_end, terminal = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # The other end is closed.
            while chunk := os.read(main_end, 65536):
                chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with (
        os.fdopen(terminal, "w", encoding="utf-8") as stream,
        in_folder(folder),
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        code = main(arguments)
    reader.join()
    os.close(main_end)
    return code, b"".join(chunks).decode(errors="surrogateescape")


def without_styles(text: str) -> str:
    """Remove what rich writes for colours and ends of lines, which no name can bring in."""
    return re.sub(r"\x1b\[[0-9;?]*[mlhK]", "", text.replace("\r\n", "\n"))


@attack(9, "commands of terminals and markup in a trial's reason, shown by `show`", "interpreted")
def reason_that_commands_the_terminal(folder: Path) -> str:
    make_sweep(folder, state="failed", reason=EVERYTHING)
    _, text = output_of(["show", "s"], folder)
    assert not FORBIDDEN.search(without_styles(text)), repr(text)
    # The cell has room for the first ones.
    assert "\\x1b[31m\\x1b]8;;" in text
    return "12 kinds of commands are printed as text"


@attack(9, "the same in a value of a searched setting, in `show` and in errors")
def value_that_commands_the_terminal(folder: Path) -> str:
    make_sweep(folder, settings={"optim.lr": EVERYTHING})
    texts = [output_of(arguments, folder)[1] for arguments in (["show", "s"], ["show", "s/0000"])]
    texts.append(output_of(["show", EVERYTHING.replace("\0", "")], folder)[1])
    for text in texts:
        assert not FORBIDDEN.search(without_styles(text)), repr(text)
    return "printed as text"


@attack(9, "the same in what a program prints with print()")
def prints_that_command_the_terminal(folder: Path) -> str:
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), visible_output():
        print(EVERYTHING, "äß漢字\tok", file=sys.stdout)
    assert not FORBIDDEN.search(stream.getvalue()) and "äß漢字\tok\n" in stream.getvalue()
    return "escapes are printed as escapes, other scripts as they are"


@attack(9, "the same and line breaks in an error")
def errors_of_one_line(folder: Path) -> str:
    error = SpecError(f"no sweep {EVERYTHING}\nraysweep: everything is fine")
    assert not FORBIDDEN.search(str(error)) and "\n" not in str(error)
    return "one line"


HOSTILE_MARKDOWN = (
    *("<img src=x onerror=alert(1)>", "[click](javascript:alert(1))", "![x](http://evil/x.png)"),
    *(
        "a|b|c",
        "x\n\n# Heading",
        "x\n| a | b |\n|---|---|\n| c | d |",
        "https://evil.example/login",
    ),
    *("www.evil.example", "mail@evil.example", "<https://evil.example>", "`code`", "**bold** _it_"),
    *("- item", "+ item", "1. item", "> quote", "~~~", "```", "$x$", "&lt;b&gt;", "a\\|b", "\\"),
    *("[a]: http://evil", "[^1]", "@someone", "<!-- hidden -->", "# h", "=====", "---", "a  \nb"),
)
# Elements that a page of plain paragraphs and tables does not have.
PLAIN = {"paragraph_open", "paragraph_close", "inline", "text", "text_special", "entity"}


def find_markup(text: str) -> set[str]:
    """Return the kinds of elements of a page of Markdown, as GitHub's dialect reads it."""
    parser = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    kinds = set()
    for token in parser.parse(text):
        kinds |= {token.type, *(child.type for child in token.children or ())}
    return kinds


@attack(9, "HTML, links, images, tables and headings in names, in Markdown reports", "interpreted")
def markdown_of_strangers(folder: Path) -> str:
    for text in (*HOSTILE_MARKDOWN, *COMMANDS.values()):
        markup = find_markup(escape_markdown(text)) - PLAIN
        assert not markup, (text, escape_markdown(text), markup)
        # What GitHub and others turn into links by itself.
        assert not re.search(r"https?:|www\.|@\w", escape_markdown(text)), text
        document = ReportDocument(
            text,
            text,
            [
                Section(
                    text,
                    [
                        Banner(text),
                        Paragraph(text),
                        Table([text, "b"], [[text, "c"]]),
                        CaptionedFigure(text, TextFigure()),
                    ],
                )
            ],
        )
        plain = ReportDocument("t", "t", [Section("t", [Banner("t"), Paragraph("t"), Table(
            ["t", "b"], [["t", "c"]]), CaptionedFigure("t", TextFigure())])])  # fmt: skip
        assert find_markup(document.render_markdown()) - PLAIN <= find_markup(
            plain.render_markdown()
        ), text
    return f"{len(HOSTILE_MARKDOWN)} texts stay texts, by a Markdown parser"


@attack(9, "the same in the HTML report", "held: no active script, link or handler")
def html_of_strangers(folder: Path) -> str:
    for text in HOSTILE_MARKDOWN:
        page = ReportDocument(text, text, [Section(text, [Paragraph(text)])]).render_html()
        assert not re.search(r"<(img|a|script|!--)[ >]", page.split("<body>")[1])
    return "escaped"


@attack(9, "dollar signs in labels of figures", "`$\\frac{$` ended a night at its report")
def formulas_in_labels(folder: Path) -> str:
    for label in (r"$\frac{$ $$ \$", EVERYTHING):
        figure = TextFigure(layout="constrained")
        axes = figure.subplots()
        axes.plot([1, 2], [1, 2], label=label)
        axes.set_xscale("log")
        axes.set(title=label, xlabel=label, ylabel=label)
        axes.set_yticks([1, 2], [label, label])
        axes.annotate(label, (1, 1))
        axes.legend(title=label)
        figure.suptitle(label)
        FigureCanvasAgg(figure).draw()
        assert axes.get_title() == label or "\\x" in axes.get_title()
    assert "mathdefault" in axes.get_xticklabels()[0].get_text(), "numbers of log scales stay"
    assert mpl.rcParams["text.parse_math"], "the user's own figures are as before"
    return "drawn as they are"


@attack(9, "a sweep whose metric is called $\\frac{$, drawn in a report")
def formula_as_setting(folder: Path) -> str:
    ledger = make_sweep(folder)
    ledger.space.space["$\\frac{$.$\\frac{$"] = ledger.space.space["optim.lr"]
    figure = plot_param_slices(ledger)
    figure.savefig(io.BytesIO(), format="svg")
    return "drawn"


ODD_VALUES = (
    *(None, True, -1, 0.5, "x", "", [], {}, [None], {"a": None}, [[]], {"": {}}, 10**400, 1e999),
    *(float("nan"), float("-inf"), "\ud800", "../..", [1] * 50, {"epoch": "x"}, {"epoch": 1e999}),
)


# Of the changes of a file, as many as a test has time for.
N_CHANGES = 60


def mutations(content: object) -> Iterator[object]:
    """Yield copies of JSON data with one value replaced, left out or added."""
    if isinstance(content, dict):
        for key in content:
            yield {name: value for name, value in content.items() if name != key}
            for changed in mutations(content[key]):
                yield content | {key: changed}
    elif isinstance(content, list) and content:
        for changed in mutations(content[0]):
            yield [changed, *content[1:]]
    yield from ODD_VALUES


def read_everything(folder: Path) -> None:
    """Do what commands do with a sweep, a trial and a checkpoint."""
    ledger = Ledger.open(folder / "runs/s")
    ledger.rank_trials()
    ledger.is_interrupted()
    sweep = load_sweep(folder / "runs/s")
    assert len(sweep.trials) <= 1
    if ledger.find_best_trial() is not None:
        str(ledger.best_checkpoint_path(ledger.load_trials()[0]))
    PlainConsole(file=io.StringIO()).print(TrialTable(ledger, ledger.load_trials()))


def count_answers(folder: Path, file: Path) -> str:
    """Change each value of a JSON file; return how many changes were refused, in one line each."""
    read_everything(folder)
    original = file.read_text()
    n_read, n_refused = 0, 0
    for content in random.Random(0).sample(list(mutations(json.loads(original))), N_CHANGES):
        text = json.dumps(content)
        file.write_text(text)
        try:
            read_everything(folder)
            n_read += 1
        except RaysweepError as error:
            assert all("\n" not in line for line in error.problems), error.problems
            n_refused += 1
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error} for {text[:500]}") from error
    file.write_text(original)
    assert n_refused > n_read / 4
    return f"{n_read + n_refused} changes: {n_refused} refused in one line, no traceback"


@attack(9, "other types and values in each place of trial.json", "tracebacks")
def hostile_trial_json(folder: Path) -> str:
    make_sweep(folder)
    return count_answers(folder, folder / "runs/s/trials/0000/trial.json")


@attack(9, "other types and values in each place of sweep.json", "tracebacks")
def hostile_sweep_json(folder: Path) -> str:
    make_sweep(folder)
    file = folder / "runs/s/sweep.json"
    content = json.loads(file.read_text())
    # The settings have a reader of their own, which other tests try.
    content["space"] = {key: content["space"][key] for key in ("method", "space")}
    file.write_text(json.dumps(content))
    return count_answers(folder, file)


@attack(9, "other types and values in each place of a checkpoint's meta.json", "tracebacks")
def hostile_meta_json(folder: Path) -> str:
    run = folder / "runs/r"
    path = write_checkpoint(run, {})
    change_meta(path, {"data_fingerprint": load_data(DataSpec()).fingerprint})
    original = json.loads((path / "meta.json").read_text())
    n_refused, n_read = 0, 0
    everything = list(mutations({**original, "config": {}, "environment": {"python": "3"}}))
    for content in random.Random(0).sample(everything, N_CHANGES):
        if isinstance(content, dict) and content.get("config") == {}:
            content = {**content, "config": original["config"]}
        (path / "meta.json").write_text(json.dumps(content))
        for read in (
            lambda: read_checkpoint(path),
            lambda: RunDirectory(run).read_last_meta(),
        ):
            try:
                read()
                n_read += 1
            except RaysweepError as error:
                assert all("\n" not in line for line in error.problems), error.problems
                n_refused += 1
    assert n_refused > N_CHANGES / 4
    return f"{n_refused + n_read} readings: {n_refused} refused in one line, no traceback"


@attack(9, "weights of another network, or none, under right hashes")
def weights_of_another_network(folder: Path) -> str:
    path, fingerprint = write_checkpoint(folder, {}), load_data(DataSpec()).fingerprint
    original = json.loads((path / "meta.json").read_text())
    lines = []
    for content in (save({"x": zeros(3)}), b"", b"\xff" * 100, save({})):
        (path / "weights.safetensors").write_bytes(content)
        sha256 = {
            **original["sha256"],
            "weights.safetensors": hashlib.sha256(content).hexdigest(),
        }
        change_meta(path, {"sha256": sha256, "data_fingerprint": fingerprint})
        lines.append(refusal_of(lambda: load(path)))
    assert len(lines) == 4
    return "one line each"


@attack(9, "an epoch that was cut off, with other sums, edges, steps or momentum than it had")
def hostile_half_of_an_epoch(folder: Path) -> str:
    """Training goes on from the last whole epoch, to the weights that it would have had."""
    config = tiny("gairat", epochs=1)
    plain = train_model(config, folder / "plain").last_checkpoint
    weights = load_file(plain.local_folder / "weights.safetensors")
    steps: list[int] = []
    cut = FunctionCallback(
        on_step_end=lambda epoch, step: steps.append(step),
        should_interrupt=lambda: len(steps) == 2,
    )
    with contextlib.suppress(TrainingInterrupted):
        train_model(config, folder / "cut", cut)
    assert len(steps) == 2
    honest = folder / "cut/half/seen.safetensors"
    with safe_open(honest, "pt") as file:
        facts, sums = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    contents = {
        "bytes": b"x",
        "no facts": save(sums),
        "steps": save(sums, facts | {"steps": "-1"}),
        "many": save(sums, facts | {"steps": "9" * 30}),
        "words": save(sums, facts | {"seconds": "nan"}),
        "deep": save(sums, facts | {"edges": "[" * 100_000}),
        "edges": save(sums, facts | {"edges": '{"kappa_pgd": "x"}'}),
        "shapes": save({name: zeros(3, 3) for name in sums}, facts),
        "none": save({}, facts),
        "gone": None,
    }
    for name, content in contents.items():
        shutil.copytree(folder / "cut", folder / name)
        trap = folder / name / "half/seen.safetensors"
        trap.unlink()
        if content is not None:
            trap.write_bytes(content)
        resumed = train_model(config, folder / name).last_checkpoint
        found = load_file(resumed.local_folder / "weights.safetensors")
        assert all(equal(found[key], weights[key]) for key in weights), name
    change_momentum(folder / "cut/half")
    line = refusal_of(lambda: train_model(config, folder / "cut", FunctionCallback()))
    assert "has not the momentum of this network" in line
    return f"{len(contents)} kinds: not used, and a warning says so"


def change_momentum(checkpoint: Path) -> None:
    """Give a checkpoint momentum of other shapes, under the right hash."""
    content = save({name: zeros(2) for name in load_file(checkpoint / "state.safetensors")})
    (checkpoint / "state.safetensors").write_bytes(content)
    hashes = json.loads((checkpoint / "meta.json").read_text())["sha256"]
    hashes["state.safetensors"] = hashlib.sha256(content).hexdigest()
    change_meta(checkpoint, {"sha256": hashes})


@attack(9, "examples.parquet whose summary is nested 100,000 deep, or no summary")
def hostile_summary(folder: Path) -> str:
    lines = []
    for summary in (b"[" * 100_000, b"[]", b"1e999", b"\xff"):
        table = pa.table({"label": [1]}).replace_schema_metadata({"raysweep.evaluation": summary})
        pq.write_table(table, folder / "examples.parquet")
        lines.append(refusal_of(lambda: load_report(folder)))
    return lines[0]


@attack(9, "a hostile training.pt among MNIST's files", "a text that advised weights_only=False")
def hostile_training_pt(folder: Path) -> str:
    processed = folder / "MNIST/processed"
    processed.mkdir(parents=True)
    marker = folder / "marker"
    payload = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    for name in ("training.pt", "test.pt"):
        (processed / name).write_bytes(payload)
    line = refusal_of(lambda: load_mnist(folder, False))
    assert not marker.exists() and "weights_only" not in line and "torch.load" not in line
    return line


@attack(9, "damaged files of torchvision's data sets")
def damaged_mnist(folder: Path) -> str:
    raw = folder / "MNIST/raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(b"\xff" * 64)
    return refusal_of(lambda: load_mnist(folder, False))


@attack(9, "a .pt file in place of a checkpoint")
def pt_file_as_checkpoint(folder: Path) -> str:
    (folder / "model.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    line = refusal_of(lambda: load(folder / "model.pt"))
    assert "weights_only" not in line
    return line


@attack(9, "a log.jsonl with commands of terminals and odd values, shown by `show --log`")
def hostile_log(folder: Path) -> str:
    make_sweep(folder)
    lines = [
        json.dumps({"time": value, "level": value, "message": value, "trial": value})
        for value in (EVERYTHING, None, 3, [], {}, "\ud800")
    ]
    lines += ["[" * 100_000, "{}", "\x1b]0;x\x07", json.dumps({"time": "1"})]
    (folder / "runs/s/log.jsonl").write_text("\n".join(lines), errors="surrogatepass")
    code, text = output_of(["show", "s", "--log"], folder)
    assert "Traceback" not in text and not FORBIDDEN.search(without_styles(text)), repr(text)
    assert code == 0
    return f"{len(lines)} lines printed as text"
