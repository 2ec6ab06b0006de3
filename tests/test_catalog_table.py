"""The catalog as the papers print it, every setting written out; and which methods are refused."""

from typing import Any

import pytest

from raysweep.catalog import METHODS
from raysweep.method import Method
from raysweep.spec import SpecError
from raysweep.training.config import TrainingConfig, build_training_config
from raysweep.training.presets import load_preset, resolve_training_config


def pgd(eps: float, step: float, **more: Any) -> dict[str, Any]:
    """PGD-10 from a uniform start, on the cross-entropy, with batch norms in eval mode."""
    return {
        "kind": "pgd", "eps": eps, "step_size": step, "steps": 10, "loss": "ce", "norm": "Linf",
        "start": "uniform", "tau": None, "confidence": 50.0, "mode": "eval",
    } | more  # fmt: skip


def term(
    on: str, loss: str = "ce", coef: float = 1.0, weight: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"loss": loss, "on": on, "coef": coef, "weight": weight or {"kind": "uniform"}}


def geometry(lam: float, burn_in: int, **more: Any) -> dict[str, Any]:
    return {
        "by": None, "normalise": True, "burn_in": burn_in, "kind": "geometry", "shape": "tanh",
        "lam": lam, "table": [], "official": False,
    } | more  # fmt: skip


def margin(slope: float, bias: float, burn_in: int) -> dict[str, Any]:
    return {
        "by": None, "normalise": True, "burn_in": burn_in, "kind": "margin", "slope": slope,
        "bias": bias, "scale": 1.0
    }  # fmt: skip


def remainder(total: float, *of: str) -> dict[str, Any]:
    return {"kind": "remainder", "total": total, "of": list(of)}


VULNERABILITY = {"by": None, "normalise": False, "kind": "vulnerability", "alpha": 2.0, "beta": 0.5}
TAU = {"kind": "piecewise", "boundaries": [40, 70], "values": [0.0, 3.0, 6.0]}
# PGD as in Madry et al., G and L (whose step is a tenth of the radius), and with the Gaussian start
# of TRADES, which MART, MAIL and RST use too.
MADRY = pgd(8 / 255, 2 / 255)
G = pgd(0.031, 0.007)
L, L_CW = pgd(8 / 255, 8 / 2550), pgd(8 / 255, 8 / 2550, loss="cw")
NEAR, NEAR_KL, NEAR_CW = (
    pgd(0.031, 0.007, start="gaussian", loss=loss) for loss in ("ce", "kl", "cw")
)
MINIMAL = {
    "kind": "minimal", "d_max": 12 / 255, "search_factor": 1.0, "steps": 10,
    "step_scale": 2.5, "bisections": 10,
    "loss": "ce", "norm": "Linf", "start": "uniform",
}  # fmt: skip

# Name -> attacks, terms; LRAT and LRAT-TRADES alone divide by the mean weight (L eq. 17).
CATALOG: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "standard": ({}, {"natural": term("natural")}),
    "at": ({"pgd": MADRY}, {"pgd": term("pgd")}),
    "fat": ({"pgd": G | {"tau": TAU}}, {"pgd": term("pgd")}),
    "gairat": ({"pgd": G}, {"pgd": term("pgd", weight=geometry(-1.0, 30))}),
    "gair-fat": ({"pgd": G | {"tau": TAU}}, {"pgd": term("pgd", weight=geometry(0.0, 70))}),
    "trades": ({"kl": NEAR_KL}, {"natural": term("natural"), "kl": term("kl", "kl", 6.0)}),
    "gair-trades": (
        {"kl": NEAR_KL},
        {
            "natural": term("natural", weight=geometry(-1.0, 75, by="kl")),
            "kl": term("kl", "kl", 6.0),
        },
    ),
    "mart": (
        {"pgd": NEAR},
        {"pgd": term("pgd", "bce"), "kl": term("pgd", "kl_misclassified", 5.0)},
    ),
    "gair-mart": (
        {"pgd": NEAR},
        {
            "pgd": term("pgd", weight=geometry(-1.0, 74)),
            "margin": term("pgd", "margin"),
            "kl": term("pgd", "kl_misclassified", 5.0),
        },
    ),
    "mart-gair-kl": (
        {"pgd": NEAR},
        {"pgd": term("pgd", "bce"), "kl": term("pgd", "kl", 5.0, geometry(-1.0, 74))},
    ),
    "mma": (
        {"minimal": MINIMAL},
        {
            "natural": term("natural", coef=1 / 3),
            "minimal": term("minimal", coef=2 / 3, weight={"kind": "within_margin", "by": None}),
        },
    ),
    "rst": ({"pgd": NEAR}, {"natural": term("natural"), "kl": term("pgd", "kl", 6.0)}),
    "gair-rst": (
        {"pgd": NEAR, "cw": NEAR_CW},
        {
            "natural": term("natural"),
            "kl": term("pgd", "kl", 6.0, geometry(3.0, 99, normalise=False)),
            "kl_cw": term("cw", "kl", 6.0, remainder(1.0, "kl")),
        },
    ),
    "lrat": (
        {"pgd": L, "cw": L_CW},
        {
            "pgd": term("pgd", weight=VULNERABILITY),
            "cw": term("cw", weight=VULNERABILITY),
            "bound": term("natural", weight=remainder(0.1, "pgd", "cw")),
        },
    ),
    "lrat-trades": (
        {"pgd": L, "cw": L_CW},
        {
            "pgd": term("pgd", "kl", weight=VULNERABILITY),
            "cw": term("cw", "kl", weight=VULNERABILITY),
            "bound": term("natural", weight=remainder(5.0, "pgd", "cw")),
        },
    ),
    "mail-at": ({"pgd": NEAR}, {"pgd": term("pgd", weight=margin(10.0, -0.5, 76))}),
    "mail-trades": (
        {"kl": NEAR_KL},
        {"natural": term("natural"), "kl": term("kl", "kl", 5.0, margin(2.0, 0.0, 76))},
    ),
    "mail-mart": (
        {"pgd": NEAR},
        {
            "pgd": term("pgd", "bce", weight=margin(1.0, -1.5, 76)),
            "kl": term("pgd", "kl_misclassified", 5.0),
        },
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_is_the_papers(name: str) -> None:
    attacks, terms = CATALOG[name]
    found = METHODS[name]().to_json_dict()
    assert found == {
        "name": name,
        "attacks": attacks,
        "terms": terms,
        "normalise": name in ("lrat", "lrat-trades"),
    }
    assert list(found["terms"]) == list(terms), "terms are taken in order"


def test_a_method_of_the_catalog_is_made_anew_each_time() -> None:
    """The parts of a method are frozen, but its mappings are not: no two methods share one."""
    for name, make in METHODS.items():
        assert make() == make() and make().terms is not make().terms, name


def problem_lines(data: dict[str, Any]) -> list[str]:
    with pytest.raises(SpecError) as error:
        Method.from_data(data)
    return error.value.problems


PGD = {"kind": "pgd"}


@pytest.mark.parametrize(
    ("attacks", "terms", "expected"),
    [
        (
            {"pgd": PGD},
            {"a": {"on": "pdg"}},
            ["terms.a.on: no input 'pdg'; nearest: pgd", "attacks.pgd: no term uses it"],
        ),
        (
            {"pgd": PGD},
            {"a": {"on": "pgd + natral"}},
            ["terms.a.on: no input 'natral'; nearest: natural"],
        ),
        ({}, {"a": {"on": "natural+"}}, ["terms.a.on: no input ''; known: natural"]),
        (
            {"natural": PGD},
            {"a": {"on": "natural"}},
            ["'natural' is the name of the natural images, not of an attack"],
        ),
        (
            {"a b": PGD},
            {"a": {"on": "a b"}},
            ["'a b' is not a plain name: use letters, digits and _"],
        ),
        ({}, {"a.b": {"on": "natural"}}, ["'a.b' is not a plain name: use letters, digits and _"]),
        (
            {"pgd": PGD},
            {
                "a": {"on": "natural", "weight": {"kind": "geometry", "by": "cw"}},
                "b": {"on": "pgd"},
            },
            ["terms.a.weight.by: no input 'cw'; known: natural, pgd"],
        ),
        (
            {"pgd": PGD},
            {"a": {"on": "natural+pgd", "weight": {"kind": "geometry"}}},
            ["terms.a.weight: geometry weights need kappa; set `by` to an attack"],
        ),
        (
            {"pgd": PGD},
            {"a": {"on": "pgd", "weight": {"kind": "within_margin", "by": "natural"}}},
            ["terms.a.weight: within_margin weights need kappa; set `by` to an attack"],
        ),
        (
            {"pgd": PGD},
            {
                "a": {"on": "pgd", "weight": {"kind": "remainder", "total": 1, "of": ["a", "b"]}},
                "b": {"on": "pgd"},
            },
            [
                "terms.a.weight.of: 'a' is not a term before it",
                "terms.a.weight.of: 'b' is not a term before it",
            ],
        ),
        (
            {"one": PGD | {"steps": 1}, "fgsm": {"kind": "apgd"}},
            {
                "a": {"on": "fgsm", "weight": {"kind": "geometry", "by": "one", "official": True}},
                "b": {"on": "fgsm", "weight": {"kind": "geometry"}},
            },
            [
                (
                    "terms.a.weight: official weights divide by floor(steps / 2): "
                    "attacks.one.steps must be 2 or more"
                ),
                "terms.b.weight: geometry weights take kappa from pgd; 'fgsm' is apgd",
            ],
        ),
        ({"pgd": PGD, "cw": PGD}, {"a": {"on": "pgd"}}, ["attacks.cw: no term uses it"]),
    ],
)
def test_a_method_that_no_step_could_compute_is_refused(
    attacks: dict, terms: dict, expected: list[str]
) -> None:
    found = problem_lines({"attacks": attacks, "terms": terms})
    assert len(found) == len(expected) and all(
        e in f for e, f in zip(expected, found, strict=True)
    ), found


def test_an_unusual_method_that_can_be_computed_is_accepted() -> None:
    """An attack may serve a weight only; spaces around a `+` do not matter; official weights need
    just two steps.
    """
    method = Method.from_data(
        {
            "attacks": {"pgd": PGD | {"steps": 2}, "near": {"kind": "minimal"}},
            "terms": {
                "a": {
                    "on": " natural +near ",
                    "weight": {"kind": "geometry", "by": "pgd", "official": True},
                },
                "b": {"on": "near", "weight": {"kind": "within_margin"}},
                "c": {
                    "on": "natural",
                    "weight": {"kind": "remainder", "total": 1, "of": ["b", "a"]},
                },
                "d": {"on": "pgd", "weight": {"kind": "within_margin"}},
            },
        }
    )
    assert method.terms["a"].input_names == ("natural", "near") and method.name == "inline"


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a b", "x" * 101])
def test_a_methods_name_must_be_fit_for_a_folder(name: str) -> None:
    (line,) = problem_lines({"name": name, "terms": {"a": {"on": "natural"}}})
    assert "use letters, digits, '-', '_' and '.', not starting with '.'" in line


def test_a_file_overrides_a_preset_and_the_command_line_overrides_both(tmp_path) -> None:
    """Later layers win: data set, preset, file, command line."""
    file = tmp_path / "mine.yml"
    file.write_text("extends: gairat-fig13-official\nepochs: 70\nmethod.terms.pgd.weight.lam: 2\n")
    mine = resolve_training_config(
        str(file), {"method.terms.pgd.weight.lam": 3, "data.name": "svhn"}
    )
    weight = mine.method.terms["pgd"].weight
    assert (mine.epochs, weight.lam, weight.burn_in, weight.official, mine.data.name) == (
        70,
        3.0,
        59,
        True,
        "svhn",
    )
    assert resolve_training_config(str(file), {}).method.terms["pgd"].weight.lam == 2.0
    assert mine.optim.lr.boundaries == (29, 59), "those of the preset, which itself extends another"
    file.write_text("epochs: 7\n")
    assert resolve_training_config(str(file), {}) == build_training_config("at", {"epochs": 7}), (
        "AT, where the file names no method"
    )
    file.write_text("extends: gairat-fig13\nmethod: trades\n")
    with pytest.raises(SpecError, match=r"no setting 'method\.terms\.pgd\.weight\.lam'"):
        resolve_training_config(str(file), {})


def test_a_name_is_that_of_a_method_or_of_a_preset() -> None:
    assert resolve_training_config("lrat", {"epochs": 3}) == build_training_config(
        "lrat", {"epochs": 3}
    )
    method, settings = load_preset("gairat-table1")
    assert method == "gairat" and "method" not in settings and "extends" not in settings
    assert resolve_training_config("gairat-table1", {"seed": 4}) == build_training_config(
        method, settings, {"seed": 4}
    )
    with pytest.raises(SpecError, match="no method or preset 'lrat-tabel5'; nearest: lrat-table5"):
        resolve_training_config("lrat-tabel5", {})


def test_a_preset_is_not_changed_by_configs_made_from_it() -> None:
    before = load_preset("gairat-table1")
    resolve_training_config("gairat-table1", {"optim.lr.values": [1, 2, 3, 4], "epochs": 1})
    assert load_preset("gairat-table1") == before


def test_validation_has_the_radius_of_training_unless_it_is_set() -> None:
    """Each attack of validation has the last radius of the method's attacks, which is that of the
    data set unless a preset or a setting has another.
    """

    def radii(config: TrainingConfig) -> set[float]:
        attacks = (*config.validation.attacks.values(), *config.validation.finish.values())
        return {attack.eps for attack in attacks}

    cifar = {"data.name": "cifar10"}
    for method in ("gairat", "lrat"):
        assert radii(build_training_config(method, cifar)) == {8 / 255}
    preset = build_training_config(*load_preset("gairat-table1"))
    assert radii(preset) == {0.031}
    ramp = {"kind": "linear", "first": 0.0, "last": 0.1, "end": 50}
    assert radii(
        build_training_config("at", cifar | {"method.attacks.pgd.eps": ramp, "epochs": 26})
    ) == {0.05}
    assert radii(
        build_training_config(
            "at", cifar | {"method.attacks.pgd.eps": 0.2, "validation.*.eps": 0.1}
        )
    ) == {0.1}
    assert radii(build_training_config("at", cifar | {"*.eps": 0.2})) == {0.2}
    assert radii(build_training_config("standard", cifar)) == {8 / 255} and radii(
        build_training_config("standard")
    ) == {0.15}
