"""Every preset is a valid run, and says what the papers say."""

import pytest

from raysweep.spec import SpecError
from raysweep.training.config import build_training_config
from raysweep.training.presets import list_presets, load_preset, resolve_training_config

# What the papers' tables and figures hold, row by row.
EXPECTED = {
    *(f"gairat-table1{row}" for row in ("", "-at", "-fat", "-gair-fat", "-official")),
    *(f"gairat-table2{row}" for row in ("", "-trades")),
    *(f"gairat-table3{row}" for row in ("", "-rst", "-official")),
    *(f"gairat-fig4{row}" for row in ("", "-piecewise", "-at")),
    *(
        f"gairat-fig11-{lr}{row}"
        for lr in ("piecewise", "linear", "cosine", "cyclic", "decays")
        for row in ("", "-at")
    ),
    *(f"gairat-fig{number}" for number in (10, 13, 14, 17, 19, 20)),
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
    *(f"lrat-table4-{row}" for row in ("p", "c", "pc", "npc", "ppc")),
    *(f"lrat-table5{row}" for row in ("", "-at", "-gairat")),
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
    eps = {
        getattr(a, "eps", None)
        for a in (*run.method.attacks.values(), *run.validation.attacks.values())
    } - {None}
    assert eps in ({0.031}, {8 / 255})
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
    assert [ours.optim.resolve_at(e).lr for e in (59, 60, 90, 110)] == [0.1, 0.01, 0.001, 0.0005]
    assert [theirs.optim.resolve_at(e).lr for e in (59, 60, 90)] == [0.01, 0.001, 0.0001]
    assert (ours.optim.weight_decay, theirs.optim.weight_decay) == (2e-4, 3.5e-3)


def test_official_variants_differ_from_the_paper():
    for name in ("gairat-table1", "gairat-table3", "gairat-fig13"):
        assert config(name) != config(f"{name}-official")
    paper, code = (
        config(n).method.terms["pgd"].weight for n in ("gairat-table1", "gairat-table1-official")
    )
    assert (paper.lam, paper.burn_in, paper.official) == (0.0, 60, False)
    assert (code.lam, code.burn_in, code.official) == (-1.0, 59, True)
    assert config("gairat-table3").method.attacks["pgd"].loss == "ce"
    assert config("gairat-table3-official").method.attacks["pgd"].loss == "kl"


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
