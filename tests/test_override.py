"""Settings by dotted path: what `override` sets and refuses, and how a spec becomes plain data,
text and a digest.
"""

import hashlib
import math
from itertools import permutations
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field, ValidationError

from raysweep.attacks import PGD
from raysweep.catalog import METHODS
from raysweep.instance_weights import (
    GeometryWeight,
    ProbabilisticMarginWeight,
    UniformWeight,
    VulnerabilityWeight,
)
from raysweep.method import Term
from raysweep.schedules import (
    CosineSchedule,
    InterpolatedSchedule,
    LinearSchedule,
    PiecewiseSchedule,
)
from raysweep.spec import (
    Spec,
    SpecError,
    apply_overrides,
    describe_unknown_name,
    describe_unknown_path,
    flatten_spec,
    is_safe_name,
    json_digest,
)
from raysweep.training.config import build_training_config
from raysweep.training.default_objective import FORMER_OBJECTIVE
from raysweep.yaml_files import parse_yaml, read_yaml


def problems(spec: Spec, changes: dict[str, Any], **more: Any) -> list[str]:
    with pytest.raises(SpecError) as error:
        apply_overrides(spec, changes, **more)
    return error.value.problems


DETAILS = {"kind": "geometry", "burn_in": 7, "lam": 1.5, "shape": "sigmoid"}


@pytest.mark.parametrize("order", permutations(DETAILS), ids=" ".join)
def test_a_kind_and_its_details_in_any_order(order: tuple[str, ...]) -> None:
    """LRAT's weight has neither burn_in nor lam; `burn_in` comes before `kind` in the alphabet,
    `lam` after it.
    """
    changes = {f"terms.pgd.weight.{key}": DETAILS[key] for key in order}
    changed = apply_overrides(METHODS["lrat"](), changes)
    assert changed.terms["pgd"].weight == GeometryWeight(shape="sigmoid", lam=1.5, burn_in=7)
    assert changed.terms["cw"] == METHODS["lrat"]().terms["cw"]


def test_a_whole_part_and_its_details_in_any_order() -> None:
    changes = {
        "attacks.pgd.steps": 3,
        "attacks.pgd": {"kind": "pgd", "loss": "cw"},
        "attacks.pgd.eps": 0.1,
    }
    for order in permutations(changes.items()):
        assert apply_overrides(METHODS["at"](), dict(order)).attacks["pgd"] == PGD(
            loss="cw", steps=3, eps=0.1
        )


def test_the_same_kind_keeps_the_other_settings_and_another_kind_resets_them() -> None:
    gairat = METHODS["gairat"]()
    assert apply_overrides(gairat, {"terms.pgd.weight.kind": "geometry"}) == gairat
    weight = apply_overrides(gairat, {"terms.pgd.weight.kind": "margin"}).terms["pgd"].weight
    assert weight == ProbabilisticMarginWeight(slope=10.0, bias=-0.5, scale=1.0, burn_in=0), (
        "not GAIRAT's burn-in of 30"
    )


def test_a_part_set_in_several_places_is_a_copy_in_each() -> None:
    part = {"kind": "vulnerability"}
    changes = {"terms.*.weight": part, "terms.pgd.weight.alpha": 3.0}
    changed = apply_overrides(METHODS["mart"](), changes)
    assert changed.terms["pgd"].weight == VulnerabilityWeight(alpha=3.0)
    assert changed.terms["kl"].weight == VulnerabilityWeight(alpha=2.0)
    assert part == {"kind": "vulnerability"} and changes["terms.*.weight"] is part, (
        "the caller's mapping"
    )


def test_a_star_stands_for_any_run_of_characters_dots_included() -> None:
    config = build_training_config("lrat", {"*.steps": 3})
    assert {attack.steps for attack in config.method.attacks.values()} == {3}
    tests = config.validation.attacks | config.validation.finish
    assert [attack.steps for attack in tests.values()] == [3, 3, 3]
    only = apply_overrides(METHODS["lrat"](), {"attacks.c*.steps": 4})
    assert (only.attacks["pgd"].steps, only.attacks["cw"].steps) == (10, 4)
    terms = apply_overrides(METHODS["lrat"](), {"*.alpha": 1.0}).terms
    assert terms["pgd"].weight.alpha == terms["cw"].weight.alpha == 1.0
    assert terms["bound"] == METHODS["lrat"]().terms["bound"]


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"*": 3}, ["name = 3: must be a valid string", "terms = 3: must be a valid dictionary"]),
        ({"*.kind": "pgd"}, ["terms.pgd.weight: no kind 'pgd'"]),
        ({"terms.*": 3}, ["terms.pgd = 3: must be a valid dictionary or instance of Term"]),
    ],
    ids=["everything", "every kind", "every term"],
)
def test_a_star_that_matches_a_part_and_its_settings_ends_in_error_lines(
    changes: dict, lines: list[str]
) -> None:
    found = problems(METHODS["fat"](), changes)
    assert all(any(line in one for one in found) for line in lines), found


def test_missing_settings_are_an_error_or_are_skipped() -> None:
    at = METHODS["at"]()
    changes = {"*.d_max": 0.1, "attacks.cw.steps": 3, "attacks.pgd.steps": 4}
    found = problems(at, changes)
    assert [line.partition(";")[0] for line in found] == [
        "no setting '*.d_max'",
        "no setting 'attacks.cw.steps'",
    ]
    changed = apply_overrides(at, changes, on_missing="ignore")
    assert changed == apply_overrides(at, {"attacks.pgd.steps": 4}), (
        "what matches is set nevertheless"
    )
    assert problems(at, {"*.d_max": 0.1, "attacks.pgd.steps": 0}, on_missing="ignore") == [
        "attacks.pgd.steps = 0: must be greater than or equal to 1"
    ]


def test_the_spec_that_is_changed_stays_as_it_was() -> None:
    base = METHODS["gairat"]()
    before = base.to_json_dict()
    apply_overrides(base, {"attacks.pgd.steps": 3, "terms.pgd.weight.kind": "uniform"})
    assert base.to_json_dict() == before
    with pytest.raises(ValidationError, match="frozen"):
        base.name = "other"


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        # A path with the same last part is preferred to one that is more similar as a whole.
        ("attack.cw.steps", "attacks.cw.steps, attacks.pgd.steps"),
        ("terms.pgd.steps", "attacks.pgd.steps, attacks.cw.steps"),
        ("terms.pgd.weight.alfa", "terms.pgd.weight.alpha, terms.cw.weight.alpha"),
        ("normalize", "normalise, terms.cw.weight.normalise, terms.pgd.weight.normalise"),
    ],
)
def test_unknown_settings_name_the_nearest_that_exist(path: str, nearest: str) -> None:
    assert (
        describe_unknown_path(path, METHODS["lrat"]().to_json_dict())
        == f"no setting {path!r}; nearest: {nearest}"
    )


def test_unknown_names_get_three_near_ones_or_all_or_a_hint() -> None:
    near = ["pgd10", "pgd20", "pgd30", "pgd40", "fab"]
    assert (
        describe_unknown_name("attack", "pgd", near)
        == "no attack 'pgd'; nearest: pgd40, pgd30, pgd20"
    )
    assert describe_unknown_name("x", "zzzz", ["ab", "cd"]) == "no x 'zzzz'; known: ab, cd"
    names = [f"n{number}" for number in range(31)]
    assert (
        describe_unknown_name("x", "zzzz", names[:30])
        == f"no x 'zzzz'; known: {', '.join(names[:30])}"
    )
    assert describe_unknown_name("x", "zzzz", names) == "no x 'zzzz'; `raysweep list` names all"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"optim.lr": {"boundaries": [3, 5], "values": [1, "x", 2]}},
            "optim.lr.values.1 = 'x': must be a valid num",
        ),
        ({"method.terms.pgd": {"loss": "ce"}}, "method.terms.pgd.on is missing"),
        ({"method.terms": {}}, "method.terms = {}: must have at least 1 item"),
        (
            {"optim.lr.boundries": [3]},
            "no setting 'optim.lr.boundries'; nearest: optim.lr.boundaries",
        ),
        (
            {"optim.lr": {"kind": "spiral"}},
            "optim.lr: no kind 'spiral'; known: number, piecewise, linear, cosine",
        ),
        ({"optim.momentum": 1.0}, "optim.momentum = 1.0: must be less than 1"),
        ({"optim.nesterov": True, "optim.momentum": 0}, "optim.nesterov needs optim.momentum > 0"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_one_line_names_the_place_and_the_value(changes: dict, line: str) -> None:
    (found,) = problems(build_training_config("at"), changes)
    assert line in found


def test_error_lines_begin_with_the_source_of_the_values() -> None:
    with pytest.raises(SpecError) as error:
        PGD.from_data({"steps": 0, "stepz": 1, "eps": -1}, "my.yaml")
    assert sorted(error.value.problems) == [
        "my.yaml: eps = -1: must be at least 0",
        "my.yaml: no setting 'stepz'; nearest: steps, step_size, eps",
        "my.yaml: steps = 0: must be greater than or equal to 1",
    ]
    assert str(error.value) == "\n".join(error.value.problems)


class Inner(Spec):
    knob: PiecewiseSchedule | LinearSchedule | CosineSchedule | InterpolatedSchedule | float


class Outer(Spec):
    inner: Inner
    named: dict[str, Inner]
    plain: Annotated[int, Field(ge=0)] = 3


def test_at_resolves_schedules_at_every_depth_and_leaves_the_rest_alone() -> None:
    named = {
        "a": Inner(knob=InterpolatedSchedule(epochs=(0, 4), values=(0, 8))),
        "b": Inner(knob=5.0),
    }
    outer = Outer(inner=Inner(knob=PiecewiseSchedule(boundaries=(2,), values=(1, 9))), named=named)
    assert [outer.resolve_at(e).inner.knob for e in (0, 1, 2, 3)] == [1, 1, 9, 9]
    assert [outer.resolve_at(e).named["a"].knob for e in (0, 1, 2, 4)] == [0, 2, 4, 8]
    assert outer.resolve_at(1).named["b"] is named["b"] and list(outer.resolve_at(1).named) == [
        "a",
        "b",
    ]
    assert outer.inner.knob == PiecewiseSchedule(boundaries=(2,), values=(1, 9)), (
        "the spec itself keeps its schedule"
    )
    resolved = outer.resolve_at(2)
    assert resolved.resolve_at(0) is resolved and resolved.plain == 3


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_a_digest_is_the_sha256_of_sorted_json_without_spaces() -> None:
    assert (
        json_digest({"b": [1, 2.5, None], "a": "ü"})
        == sha('{"a":"\\u00fc","b":[1,2.5,null]}')
        == "703dceec79c30480"
    )
    assert UniformWeight().digest() == sha('{"kind":"uniform"}')
    assert PiecewiseSchedule(boundaries=(2,), values=(1, math.inf)).digest() == sha(
        '{"boundaries":[2],"kind":"piecewise","values":[1.0,"Infinity"]}'
    )


@pytest.mark.parametrize(
    ("name", "method", "digits", "cifar"),
    [
        ("at", "7ef050d190fed8cd", "b4c75f3043daa349", "1bb4312b4fd85d0b"),
        ("gairat", "598fb8b7e03357c5", "3a6bb64d31f9a6ab", "89390ab4e081bf16"),
        ("lrat", "cd1ac0dd46d1e5d3", "7d813dfff7ae0e7d", "64bc81b6597b8017"),
        ("trades", "31e44525138a5f7f", "bea6190aa11a9128", "b3d1044e0965a630"),
    ],
)
def test_digests_stay_what_they_were(name: str, method: str, digits: str, cifar: str) -> None:
    """They name folders on users' disks: with other digests, everything would be trained again.

    Those of CIFAR-10 changed with version 0.2, which has one radius and optimizer for all methods.
    The default objective changed after it; with that of 0.1 the digests are the same.
    """
    assert METHODS[name]().digest() == method
    assert build_training_config(name, FORMER_OBJECTIVE).digest() == digits
    assert build_training_config(name, FORMER_OBJECTIVE, {"data.name": "cifar10"}).digest() == cifar


def test_infinity_and_nan_are_words_in_json() -> None:
    weight = GeometryWeight(lam=math.inf)
    assert (
        weight.to_json_dict()["lam"] == "Infinity"
        and ProbabilisticMarginWeight(bias=-math.inf).to_json_dict()["bias"] == "-Infinity"
    )
    assert ProbabilisticMarginWeight(bias=math.nan).to_json_dict()["bias"] == "NaN"
    assert math.isnan(
        ProbabilisticMarginWeight.from_data(
            ProbabilisticMarginWeight(bias=math.nan).to_json_dict()
        ).bias
    )
    assert (
        GeometryWeight.from_data(weight.to_json_dict())
        == weight
        == GeometryWeight.from_data({"lam": "inf"})
    )


def test_flatten_names_every_leaf_and_writes_lists_as_json() -> None:
    term = Term(
        on="pgd",
        coef=PiecewiseSchedule(boundaries=(2, 4), values=(1, 2, 3)),
        weight=ProbabilisticMarginWeight(bias=math.inf),
    )
    assert flatten_spec(term) == {
        "loss": "ce",
        "on": "pgd",
        "coef.kind": "piecewise",
        "coef.boundaries": "[2, 4]",
        "coef.values": "[1.0, 2.0, 3.0]",
        "weight.kind": "margin",
        "weight.by": None,
        "weight.normalise": True,
        "weight.burn_in": 0,
        "weight.slope": 10.0,
        "weight.bias": "Infinity",
        "weight.scale": 1.0,
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[on, off, yes, no, y, n, On, NO]", ["on", "off", "yes", "no", "y", "n", "On", "NO"]),
        (
            "[true, True, TRUE, false, False, FALSE, tRUE]",
            [True, True, True, False, False, False, "tRUE"],
        ),
        (
            "[1e5, 1E5, +1e-5, -2.5e+3, .5, -.5, 5., 1.e2]",
            [1e5, 1e5, 1e-5, -2500.0, 0.5, -0.5, 5.0, 100.0],
        ),
        ("[.inf, +.inf, -.inf, .INF]", [math.inf, math.inf, -math.inf, math.inf]),
        (
            "[e5, 1e, 1e5x, inf, ., +, -]".replace("-]", "'-']"),
            ["e5", "1e", "1e5x", "inf", ".", "+", "-"],
        ),
        ("[null, ~, '']", [None, None, ""]),
        ("[1, -1, +1, 0]", [1, -1, 1, 0]),
    ],
)
def test_plain_scalars_are_those_of_yaml_1_2(text: str, value: list) -> None:
    found = parse_yaml(text)
    assert found == value and [type(one) for one in found] == [type(one) for one in value]


def test_not_a_number_is_a_float() -> None:
    assert (
        math.isnan(parse_yaml(".nan"))
        and math.isnan(parse_yaml(".NaN"))
        and parse_yaml("nan") == "nan"
    )


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"\xff\xfe: 1", "cannot be read: "),
        (b"a: 1\nb: [2\nc: 3\n", ":3: not valid YAML: "),
        (b"a: 1\nb: 2\nb c: : 3\n", ":3: not valid YAML: mapping values are not allowed"),
        (b"- 1\n- 2\n", ": expected a mapping of settings, got list"),
        (b"", ": expected a mapping of settings, got NoneType"),
        (b"a: 1\n2: 3\n", ":2: 2: expected the name of a setting, got int"),
    ],
)
def test_a_file_that_holds_no_settings_is_one_line(
    content: bytes | None, line: str, tmp_path: Path
) -> None:
    file = tmp_path / "x.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SpecError) as error:
        read_yaml(file)
    assert (
        str(error.value).startswith(str(file))
        and line in str(error.value)
        and "\n" not in str(error.value)
    )


def test_a_file_of_settings_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("on: 1e-3\nnested: {off: 8/255}\n")
    assert read_yaml(tmp_path / "x.yaml") == {"on": 0.001, "nested": {"off": "8/255"}}


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("a", True),
        ("gairat-table1_v2.0", True),
        ("-a", True),
        ("_", True),
        ("0", True),
        ("a.", True),
        ("ä", True),
        ("a" * 100, True),
        ("a" * 101, False),
        ("", False),
        (".", False),
        (".a", False),
        ("..", False),
        ("a/b", False),
        ("a\\b", False),
        ("a b", False),
        ("a:b", False),
        ("a\n", False),
        ("a*", False),
    ],
)
def test_plain_names_are_names_of_folders_everywhere(name: str, plain: bool) -> None:
    assert is_safe_name(name) == plain
