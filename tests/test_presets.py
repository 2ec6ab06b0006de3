"""Every preset is a valid run, and says what the papers say."""

import math

import pytest

from raysweep.spec import SpecError, flatten_spec
from raysweep.training.config import build_training_config
from raysweep.training.presets import (
    list_presets,
    load_preset,
    load_preset_notes,
    resolve_training_config,
)

# What the papers' tables and figures hold, row by row.
EXPECTED = {
    *(f"gairat-table1{row}" for row in ("", "-at", "-fat", "-gair-fat", "-official")),
    *(f"gairat-table2{row}" for row in ("", "-trades")),
    *(f"gairat-table3{row}" for row in ("", "-rst", "-official", "-rst-official")),
    *(f"gairat-fig4{row}" for row in ("", "-piecewise", "-at")),
    *(
        f"gairat-fig11-{lr}{row}"
        for lr in ("piecewise", "linear", "cosine", "cyclic", "decays")
        for row in ("", "-at")
    ),
    *(f"gairat-fig{number}" for number in (10, 13, 14, 17, 19, 20)),
    *(f"gairat-fig{number}{row}" for number in (2, 6) for row in ("", "-standard")),
    *(
        f"lrat-table1{net}{row}"
        for net in ("", "-wrn")
        for row in ("", "-at", "-gairat", "-appendix")
    ),
    *(
        f"lrat-table2{net}{row}"
        for net in ("", "-wrn")
        for row in ("", "-trades", "-gair-trades", "-literal")
    ),
    *(f"lrat-table4-{row}" for row in ("p", "c", "pc", "npc", "npc-appendix", "ppc")),
    *(f"lrat-table5{row}" for row in ("", "-at", "-gairat", "-appendix")),
}


def config(name):
    return build_training_config(*load_preset(name))


@pytest.mark.parametrize("name", list_presets())
def test_valid_and_meaningful(name):
    """All settings are known and in range, nothing is set in vain, and eps is the same in training
    and validation.
    """
    run = config(name)
    assert run.list_warnings() == []
    assert run.data.name in ("cifar10", "svhn")
    validation = {*run.validation.attacks.values(), *run.validation.finish.values()}
    trained, validated = (
        {attack.eps for attack in attacks if hasattr(attack, "eps")}
        for attacks in (run.method.attacks.values(), validation)
    )
    assert len(validated) == 1 and validated in ({0.031}, {8 / 255})
    # MMA has no radius, and Carmon et al. train with 0.031 what the leaderboard attacks with 8/255.
    if trained:  # standard training has no attack
        assert trained == validated or name == "gairat-table3-rst-official"
    else:
        assert name == "gairat-fig19-mma" or run.method.name == "standard"
    for epoch in (0, run.epochs - 1):
        run.resolve_at(epoch)


def test_every_row_has_one():
    assert set(list_presets()) >= EXPECTED


def test_the_two_papers_differ():
    """0.031 is not 8/255; L's step is a tenth of eps, G's 0.007."""
    ours, theirs = config("gairat-table1"), config("lrat-table1-wrn-gairat")
    assert (ours.method.attacks["pgd"].eps, ours.method.attacks["pgd"].step_size) == (0.031, 0.007)
    assert (theirs.method.attacks["pgd"].eps, theirs.method.attacks["pgd"].step_size) == (
        8 / 255,
        8 / 2550,
    )
    assert ours.model.name == theirs.model.name == "wrn_32_10"
    assert (ours.optim.weight_decay, theirs.optim.weight_decay) == (2e-4, 3.5e-3)


def test_official_variants_differ_from_the_paper():
    for name in ("gairat-table1", "gairat-table3", "gairat-fig13"):
        assert config(name) != config(f"{name}-official")
    paper, code = (
        config(n).method.terms["pgd"].weight for n in ("gairat-table1", "gairat-table1-official")
    )
    assert (paper.lam, paper.burn_in, paper.official) == (0.0, 60, False)
    assert (code.lam, code.burn_in, code.official) == (-1.0, 59, True)
    for name in ("gairat-table3", "gairat-table3-rst"):
        assert config(name).method.attacks["pgd"].loss == "ce"
        assert config(f"{name}-official").method.attacks["pgd"].loss == "kl"


def test_ablations_are_l_table_3():
    ablation = {row: config(f"lrat-table4-{row}").method for row in ("p", "c", "pc", "npc", "ppc")}
    assert [list(ablation[row].attacks) for row in ("p", "c", "pc")] == [
        ["pgd"],
        ["cw"],
        ["pgd", "cw"],
    ]
    assert ablation["pc"].terms["bound"].weight.total == 0
    assert ablation["npc"].terms["bound"].on == "natural"
    assert ablation["ppc"].terms["bound"].on == "pgd"
    assert all(method.normalise for method in ablation.values())
    assert ablation["c"].attacks["cw"].loss == "cw"


# What the papers say of epochs, written by hand: preset -> setting -> {epoch: value}. Epochs are
# those of the papers, counted from 1: "divided by 10 at epoch 60" means that epoch 60 has the lower
# rate, for the loops of GAIRAT, TRADES, MART and RST count so. "A burn-in of 30 epochs" means that
# the weights act from epoch 31 (G section 4.1). Rice et al. (figure 11) and MAIL count from 0:
# their epoch 100 is the 101st here.
C3 = {29: 0.1, 30: 0.01, 59: 0.01, 60: 0.001, 100: 0.001}
SVHN = {29: 0.01, 30: 0.001, 59: 0.001, 60: 0.0001, 100: 0.0001}
C8 = {59: 0.1, 60: 0.01, 89: 0.01, 90: 0.001, 109: 0.001, 110: 0.0005, 120: 0.0005}
C9 = {74: 0.1, 75: 0.01, 89: 0.01, 90: 0.001, 100: 0.001}
C7 = {74: 0.01, 75: 0.001, 89: 0.001, 90: 0.0001, 99: 0.0001, 100: 1e-5, 120: 1e-5}
L52 = {59: 0.01, 60: 0.001, 89: 0.001, 90: 0.0001, 100: 0.0001}
MAIL = {75: 0.01, 76: 0.001, 90: 0.001, 91: 0.0001, 100: 0.0001, 101: 1e-5, 120: 1e-5}
RICE = {100: 0.1, 101: 0.01, 150: 0.01, 151: 0.001, 200: 0.001}
COSINE = {1: 0.1, 101: 0.05, 200: 0.1 * (1 + math.cos(math.pi * 199 / 200)) / 2}
TAU = {40: 0, 41: 3, 70: 3, 71: 6, 100: 6}
AT_EPOCHS = {
    "gairat-fig4-at": {"lr": C3},
    "gairat-fig4": {"lr": C3, "lam": {30: None, 31: -1.0, 100: -1.0}},
    "gairat-fig4-piecewise": {"lr": C3, "weight": {30: "uniform", 31: "geometry"}},
    "gairat-fig10-at": {"lr": SVHN},
    "gairat-fig10": {"lr": SVHN, "lam": {30: None, 31: -1.0}},
    "gairat-fig10-piecewise": {"lr": SVHN, "weight": {30: "uniform", 31: "geometry"}},
    "gairat-fig2": {"lr": C3},
    "gairat-fig2-standard": {"lr": C3},
    "gairat-fig6": {"lr": SVHN},
    "gairat-fig6-standard": {"lr": SVHN},
    "gairat-fig11-piecewise-at": {"lr": RICE},
    "gairat-fig11-piecewise": {"lr": RICE, "lam": {100: None, 101: -1.0}},
    "gairat-fig11-cosine": {"lr": COSINE, "lam": {100: None, 101: -1.0}},
    "gairat-fig11-decays": {"lr": {20: 0.1, 21: 0.09, 181: 0.01}, "lam": {100: None, 101: -1.0}},
    "gairat-fig12-at": {"lr": C3},
    "gairat-fig12-tanh": {"lr": C3, "lam": {30: None, 31: 0.0}},
    "gairat-fig12-sigmoid": {"lr": C3, "lam": {30: None, 31: 0.0}},
    "gairat-fig12-linear": {"lr": C3, "weight": {30: "uniform", 31: "geometry"}},
    "gairat-fig13": {"lr": C3, "lam": {30: None, 31: -1.0}},
    "gairat-fig13-official": {"lr": C3, "lam": {59: None, 60: -1.0}},
    "gairat-fig14-at": {"lr": SVHN},
    "gairat-fig14": {"lr": SVHN, "lam": {30: None, 31: -1.0}},
    "gairat-fig15-burn-in-10": {"lr": C3, "lam": {10: None, 11: -1.0}},
    "gairat-fig15-burn-in-60": {"lr": C3, "lam": {60: None, 61: -1.0}},
    "gairat-fig16-small-cnn": {"lr": C3, "lam": {30: None, 31: -1.0}},
    "gairat-fig16-vgg13": {"lr": C3, "lam": {30: None, 31: -1.0}},
    "gairat-fig17": {"lr": C3, "tau": TAU, "lam": {70: None, 71: -1.0}},
    "gairat-fig18-tau-036-fat": {"lr": C3, "tau": TAU},
    "gairat-fig18-tau-024": {"tau": {40: 0, 41: 2, 71: 4}, "lam": {70: None, 71: -1.0}},
    "gairat-fig18-tau-012-fat": {"tau": {40: 0, 41: 1, 70: 1, 71: 2}},
    "gairat-fig19-mart": {"lr": C7},
    "gairat-fig19": {"lr": C7, "lam": {74: None, 75: -1.0}},
    "gairat-fig20": {"lr": C7, "lam": {74: None, 75: -1.0}},
    # Iterations 20000, 30000 and 40000, of which an epoch has 391.
    "gairat-fig19-mma": {"lr": {51: 0.3, 52: 0.09, 77: 0.09, 78: 0.03, 102: 0.03, 103: 0.009}},
    "gairat-table1-at": {"lr": C8},
    "gairat-table1-fat": {"lr": C8, "tau": TAU},
    "gairat-table1": {"lr": C8, "lam": {60: None, 61: 0.0}},
    "gairat-table1-gair-fat": {"lr": C8, "tau": TAU, "lam": {60: None, 61: 0.0}},
    "gairat-table1-official": {"lr": C8, "lam": {59: None, 60: -1.0}},
    "gairat-table2-trades": {"lr": C9},
    "gairat-table2": {"lr": C9, "lam": {75: None, 76: -1.0}},
    "gairat-table3-rst": {"lr": COSINE},
    "gairat-table3": {"lr": COSINE, "lam": {99: None, 100: 3.0}},
    "lrat-table1-at": {"lr": L52},
    "lrat-table1-gairat": {"lr": L52, "lam": {30: None, 31: -1.0}},
    "lrat-table1-wrn-gairat": {"lr": L52, "lam": {30: None, 31: -1.0}},
    "lrat-table1": {"lr": L52},
    "lrat-table2-trades": {"lr": L52},
    "lrat-table2-gair-trades": {"lr": L52, "lam": {30: None, 31: -1.0}},
    "lrat-table2": {"lr": L52},
    "lrat-table4-p": {"lr": L52},
    "lrat-table5-gairat": {"lr": L52, "lam": {30: None, 31: -1.0}},
    "lrat-fig5": {"lr": L52, "lam": {30: None, 31: -1.0}},
    "mail-at-official": {"lr": MAIL, "weight": {76: "uniform", 77: "margin"}},
    "mail-mart-official": {"lr": MAIL, "weight": {76: "uniform", 77: "margin"}},
    "mail-trades-official": {"lr": MAIL, "weight": {76: "uniform", 77: "margin"}},
}


def read_at_epoch(run, setting, epoch):
    """A setting of an epoch that is counted from 1; lam is None where all weights are 1."""
    resolved = run.resolve_at(epoch - 1)
    if setting == "lr":
        return resolved.optim.lr
    if setting == "tau":
        return resolved.method.attacks["pgd"].tau
    reweighted = [
        name for name, term in run.method.terms.items() if getattr(term.weight, "burn_in", 0)
    ]
    weights = [resolved.method.terms[name].weight for name in reweighted]
    (weight,) = weights
    return getattr(weight, "lam", None) if setting == "lam" else weight.kind


@pytest.mark.parametrize("name", sorted(AT_EPOCHS))
def test_settings_at_the_epochs_that_the_papers_name(name):
    run = config(name)
    for setting, values in AT_EPOCHS[name].items():
        found = {epoch: read_at_epoch(run, setting, epoch) for epoch in values}
        assert found == pytest.approx(values) if setting == "lr" else found == values, setting


def test_rates_of_rice_et_al_change_after_every_step():
    """Their code has no step at the rate 0, with which their cycle begins."""
    for schedule in ("cyclic", "linear", "cosine"):
        for row in ("", "-at"):
            assert config(f"gairat-fig11-{schedule}{row}").optim.lr_per_step
    cyclic = config("gairat-fig11-cyclic").optim.lr
    assert [cyclic.value_at(t) for t in (1 / 391, 80, 140, 200)] == pytest.approx(
        [0.2 / 80 / 391, 0.2, 0.1, 0.0]
    )


def test_mma_has_the_settings_of_its_code():
    mma = config("gairat-fig19-mma")
    search = mma.method.attacks["minimal"]
    assert (search.d_max, search.search_factor, search.loss) == (32 / 255, 1.05, "slm")
    assert mma.optim.weight_decay == 2e-4


def test_trades_of_l_table_2_starts_uniformly():
    for row in ("trades", "gair-trades", "wrn-trades", "wrn-gair-trades"):
        assert config(f"lrat-table2-{row}").method.attacks["kl"].start == "uniform"
    assert config("gairat-table2").method.attacks["kl"].start == "gaussian"


@pytest.mark.parametrize("name", list_presets())
def test_notes_are_about_settings_that_there_are(name):
    paths = flatten_spec(config(name))
    for path in load_preset_notes(name):
        assert any(known == path or known.startswith(f"{path}.") for known in paths), path


def test_numbers_that_a_paper_does_not_give_are_marked():
    """Those that the papers leave open: L's beta, C of LRAT-TRADES, lambda and burn-ins of L,
    figures 4 and 15, MMA's settings."""
    open_settings = {
        "gairat-fig4": ["method.terms.pgd.weight.lam"],
        "gairat-fig4-piecewise": ["method.terms.pgd.weight.table"],
        "gairat-fig11-decays": ["optim.lr"],
        "gairat-fig15-burn-in-10": ["method.terms.pgd.weight.burn_in"],
        "gairat-fig15-burn-in-60": ["method.terms.pgd.weight.burn_in"],
        "gairat-fig19": ["method.terms.pgd.weight.lam", "method.terms.kl.coef"],
        "gairat-fig19-mma": ["method.attacks.minimal.d_max", "optim.weight_decay"],
        "gairat-table3": ["method.terms.kl.weight.lam", "method.terms.kl.weight.burn_in"],
        "lrat-table1-gairat": ["method.terms.pgd.weight.lam", "method.terms.pgd.weight.burn_in"],
        "lrat-table2-trades": ["method.terms.kl.coef"],
        "lrat-table2-wrn-gair-trades": ["method.terms.natural.weight.burn_in"],
        "lrat-table2": ["method.terms.bound.weight.total", "method.normalise"],
    }
    for name, paths in open_settings.items():
        assert set(paths) <= set(load_preset_notes(name)), name
    for name in ("gairat-table1", "gairat-table2-trades", "lrat-table1", "lrat-table2-literal"):
        assert not [path for path in load_preset_notes(name) if path.startswith("method")]


def test_a_file_that_sets_a_path_drops_the_note_on_it(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: lrat-table2\nmethod.terms.bound.weight.total: 3\n")
    assert list(load_preset_notes(str(file))) == ["method.normalise"]
    assert load_preset_notes(str(file), ["method.normalise"]) == {}
    assert list(load_preset_notes("lrat-table2", ["*.total"])) == ["method.normalise"]
    file.write_text("extends: lrat-table2\nnotes: [a]\n")
    with pytest.raises(SpecError, match="must be a mapping from paths to text"):
        resolve_training_config(str(file), {})


def test_a_validation_has_one_epsilon():
    for path in ("validation.attacks.cw.eps", "validation.finish.multi_targeted.eps"):
        with pytest.raises(SpecError) as raised:
            resolve_training_config("lrat-table1", {path: 0.031})
        assert raised.value.problems == [
            f"{path} = 0.031: validation.attacks.pgd has 0.03137; one validation has one eps: "
            "set 'validation.*.eps'"
        ]
    with pytest.raises(SpecError, match="one norm"):
        resolve_training_config("at", {"validation.finish.*.norm": "L2"})
    assert resolve_training_config("lrat-table1", {"validation.*.eps": 0.031})
    assert resolve_training_config("lrat-table1", {"validation.finish.*.eps": 0.03137})


def test_unknown_presets_get_a_suggestion():
    with pytest.raises(SpecError, match="lrat-table1"):
        load_preset("lrat-tabel1")


def test_a_file_extends_a_preset_and_says_what_differs(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: lrat-table5\nepochs: 7\nmethod.terms.pgd.weight.alpha: 4\n")
    mine, theirs = resolve_training_config(str(file), {"seed": 3}), config("lrat-table5")
    assert (mine.epochs, mine.seed, mine.method.terms["pgd"].weight.alpha, mine.data.name) == (
        7,
        3,
        4,
        "svhn",
    )
    assert mine.optim == theirs.optim and mine.validation == theirs.validation
    file.write_text("extends: lrat-tabel5\n")
    with pytest.raises(SpecError, match="no preset 'lrat-tabel5'; nearest: lrat-table5"):
        resolve_training_config(str(file), {})
