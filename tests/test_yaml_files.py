"""YAML 1.2 of users: scalars, limits, lines in errors, and values that had another meaning."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from raysweep.errors import ChangedValueWarning, SpecError
from raysweep.pipeline.pipeline import load_pipeline
from raysweep.sweep.search_space import load_space
from raysweep.training.presets import resolve_training_config
from raysweep.yaml_files import dump_yaml, format_scalar, parse_yaml, read_yaml

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
DATA = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | TEXTS,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(TEXTS, part, max_size=3),
    max_leaves=8,
)


class TestScalars:
    # The tables of https://yaml.org/spec/1.2.2/#103-core-schema, and words of YAML 1.1.
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("[null, Null, NULL, ~, '']", [None, None, None, None, ""]),
            ("[0, -0, +12, 007, 0o7, 0x3A]", [0, 0, 12, 7, 7, 58]),
            ("[0., -0.0, .5, +12e03, -2E+05, 1e-3]", [0.0, -0.0, 0.5, 12000.0, -200000.0, 0.001]),
            ("[.inf, -.Inf, +.INF]", [math.inf, -math.inf, math.inf]),
            ("[on, off, yes, No, y]", ["on", "off", "yes", "No", "y"]),
            (
                "[2001-01-01, 2001-99-99, 08:30, '010']",
                ["2001-01-01", "2001-99-99", "08:30", "010"],
            ),
            ("{a: s3://b/c, b: [x:y]}", {"a": "s3://b/c", "b": ["x:y"]}),
            ("!!str 010", "010"),
            ("!!float 1", 1.0),
        ],
    )
    @pytest.mark.filterwarnings("ignore::raysweep.errors.ChangedValueWarning")
    def test_the_core_schema(self, text: str, value: Any) -> None:
        assert repr(parse_yaml(text)) == repr(value)

    @given(DATA)
    @example({"00000" + 10 * "\x1f" + 2 * "\U00010000": "\u0100\u01000 0"})
    @pytest.mark.filterwarnings("ignore::raysweep.errors.ChangedValueWarning")
    def test_what_is_written_is_read_again(self, data: Any) -> None:
        assert repr(parse_yaml(dump_yaml(data))) == repr(data)

    @given(TEXTS | st.booleans() | st.integers(0, 9) | st.floats(0, 1))
    @pytest.mark.filterwarnings("ignore::raysweep.errors.ChangedValueWarning")
    def test_scalars_in_one_line(self, value: Any) -> None:
        text = format_scalar(value)
        assert "\n" not in text and repr(parse_yaml(text)) == repr(value)

    @given(st.text(max_size=40))
    def test_any_text_is_data_or_an_error_of_one_line(self, text: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ChangedValueWarning)
            try:
                parse_yaml(text, "x.yaml")
            except SpecError as error:
                assert str(error).startswith("x.yaml:") and "\n" not in str(error)


class TestChangedValues:
    @pytest.mark.parametrize("text", ["010", "1:30", "0b11", "-017", "0x1_F", "+0x1f"])
    def test_each_is_named_in_a_line(self, text: str, tmp_path: Path) -> None:
        former = yaml.safe_load(text)
        (tmp_path / "old.yaml").write_text(f"base:\n  epochs: {text}\n")
        with pytest.warns(ChangedValueWarning) as caught:
            found = read_yaml(tmp_path / "old.yaml")["base"]["epochs"]
        assert repr(found) != repr(former)
        (line,) = [str(warning.message) for warning in caught]
        assert line.startswith(f"{tmp_path}/old.yaml:2: base.epochs = {text}: is {found!r} now")
        assert f"it was {former!r}" in line

    @pytest.mark.parametrize("text", ["10", "0", "1e3", "'010'", "0x1F", "-5", "v1:30", "1_000"])
    def test_others_are_not(self, text: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            parse_yaml(text)

    @pytest.mark.parametrize(("word", "value"), [("on", True), ("No", False), ("yes", True)])
    def test_the_old_words_are_booleans_where_one_is_expected(self, word: str, value: bool) -> None:
        overrides = {"optim.nesterov": parse_yaml(word), "compute.fold": parse_yaml(word)}
        config = resolve_training_config("at", overrides)
        assert config.optim.nesterov is value and config.compute.fold is value


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{former}'] * 10)}]\n"
    for former, name in zip("abcdefgh", "bcdefghi", strict=True)
)


class TestLimits:
    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            (BOMB, ":6: .f.0.: more than 200000 values, with those of aliases"),
            ("[" * 3000 + "]" * 3000, ":1: .*nested too deeply: more than 30 levels"),
            ("{a: " * 3000, ":1: .*nested too deeply"),
            ("a: &a [[*a]]", ":1: a.0.0: &a contains itself"),
            ("a:\n  b: " + "9" * 100_000, ":2: a.b: a number of 100000 characters; at most 300"),
            (
                "k" * 800 + ": 1",
                ":1: 'k+'... .800 characters.: a name of 800 characters; at most 500",
            ),
            ("x: y\n" * 900_000, ": larger than 4000000 bytes"),
            ("a: 1\nb: 2\na: 3\n", ":3: 'a' is there twice; keep one"),
            ('a: "\\0"', r":1: a: '\\x00': has the character"),
            ("a: !!python/name:os.system x", ":1: a: the tag .* is not known: leave it out"),
            ("a: *b", ":1: a: there is no anchor &b before"),
            ("a: 1\n---\na: 2\n", ":2: .*a second document"),
        ],
    )
    def test_beyond_them_is_one_line(self, text: str, reason: str, tmp_path: Path) -> None:
        file = tmp_path / "x.yaml"
        file.write_text(text)
        with pytest.raises(SpecError, match=f"^{file}{reason}") as error:
            read_yaml(file)
        assert "\n" not in str(error.value) and len(str(error.value)) < 1000

    def test_nested_anchors_count_with_their_depth(self) -> None:
        anchors = [f"a{n}: &a{n} {'[' * 8}*a{n - 1}{']' * 8}" for n in range(1, 6)]
        with pytest.raises(SpecError, match="nested too deeply"):
            parse_yaml("\n".join(["a0: &a0 x", *anchors]))

    def test_aliases_and_merge_keys_are_read(self) -> None:
        text = "b: &b {x: 1, y: 1}\nc: {<<: *b, y: 2}\nd: {x: 3, <<: [{x: 4, z: 5}, *b]}\n"
        assert parse_yaml(text) == yaml.safe_load(text)

    def test_a_device_is_one_line(self) -> None:
        with pytest.raises(SpecError, match=r"^/dev/zero: "):
            read_yaml(Path("/dev/zero"))


class TestLines:
    """Every problem of a file begins with its name and line, those of `--set` do not."""

    def test_of_a_space(self, tmp_path: Path) -> None:
        file = tmp_path / "s.yaml"
        file.write_text(
            "method: at\nbase:\n  epochs: 3\n  optim.lr: x\nspace:\n  seed: {int: [1, 3]}\n"
        )
        with pytest.raises(SpecError, match=rf"^{file}:4: optim.lr = 'x': must be"):
            load_space("", {}, file)
        file.write_text("method: at\nspace:\n  seed:\n    int: [1, b]\n")
        with pytest.raises(SpecError, match=rf"^{file}:4: space.seed.int.1 = 'b': must be"):
            load_space("", {}, file)

    def test_of_a_preset(self, tmp_path: Path) -> None:
        file = tmp_path / "p.yaml"
        file.write_text("method: at\nepochs: 3\n\noptim.lr: x\n")
        with pytest.raises(SpecError, match=rf"^{file}:4: optim.lr = 'x'"):
            resolve_training_config(str(file), {})
        with pytest.raises(SpecError, match=r"^optim.lr = 'y'"):
            resolve_training_config(str(file), {"optim.lr": "y"})

    def test_of_a_pipeline(self, tmp_path: Path) -> None:
        file = tmp_path / "p.yaml"
        file.write_text(
            "stages:\n- kind: train\n  runs: {a: {method: at}}\n  set:\n    optim.lr: x\n"
        )
        line = rf"^{file}:5: stages.0 \(train\): runs.a: optim.lr = 'x'"
        with pytest.raises(SpecError, match=line):
            load_pipeline(str(file), {})


def test_long_values_are_cut_in_errors() -> None:
    with pytest.raises(SpecError) as error:
        resolve_training_config("at", {"data.name": "x" * 100_000, "seed": ["y" * 100_000]})
    assert all(len(line) < 600 for line in error.value.problems)
