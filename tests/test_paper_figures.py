"""The papers' figures: what they show is what runs recorded, and the docs name all of them."""

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import tiny
from matplotlib.axes import Axes

from raysweep.attacks import PGD
from raysweep.comparison_plots import (
    PlottedRun,
    compute_weight_function,
    describe_metric,
    plot_metric_grid,
    plot_training_statistics,
)
from raysweep.data import Split
from raysweep.instance_plots import (
    find_most_vulnerable,
    plot_class_pairs,
    plot_vulnerability_overlap,
    plot_vulnerable_views,
)
from raysweep.pipeline.builtin_pipelines import list_builtin_pipelines
from raysweep.pipeline.pipeline import Pipeline, load_pipeline
from raysweep.pipeline.report.document import CaptionedFigure, Paragraph
from raysweep.pipeline.report.paper_figures import (
    CurvesFigure,
    FigureSource,
    VulnerabilityFigure,
    WeightsFigure,
    build_paper_figure_sections,
    draw_paper_figures,
)
from raysweep.pipeline.report.stage import ReportStage
from raysweep.spec import SpecError
from raysweep.training.config import TrainingConfig
from raysweep.training.instance_metrics import (
    InstanceMetrics,
    compute_instance_metrics,
    select_first_of_each_class,
)
from raysweep.training.metric_names import list_metric_names
from raysweep.training.model_loading import load_checkpoint_target
from raysweep.training.presets import list_presets, resolve_training_config
from raysweep.training.trainer import train_model

ROOT = Path(__file__).parent.parent


def lines(axes: Axes) -> dict[str, list[list[float]]]:
    """The points of each labelled curve."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def run(method: str, clean: list[float], pgd: list[float], **settings: object) -> PlottedRun:
    """A run with these accuracies; its training is 0.1 better."""
    history = [
        {"epoch": epoch, "clean": c, "pgd": p, "train/natural": c + 0.1, "train/robust": p + 0.1}
        | {"train/kappa_pgd": 4.0, "train/kappa_median_pgd": 5.0, "train/lr": 0.1 / epoch}
        | {"flatness_friendly": 0.2, "flatness_adversarial": 0.3}
        for epoch, (c, p) in enumerate(zip(clean, pgd, strict=True), 1)
    ]
    return PlottedRun(tiny(method, **settings), history)


RUNS = {"AT": run("at", [0.5, 0.6], [0.3, 0.4]), "GAIRAT": run("gairat", [0.4, 0.5], [0.2, 0.5])}


def test_weights_are_those_of_the_papers_equations() -> None:
    """G eq. 6 to 8 with K = 10, whatever the burn-in; one for AT; none for other weights."""
    at_kappa = [1 - 2 * kappa / 10 for kappa in range(11)]
    expected = {
        "tanh": [(1 + math.tanh(-1 + 5 * a)) / 2 for a in at_kappa],
        "sigmoid": [1 / (1 + math.exp(1 - 5 * a)) for a in at_kappa],
        "linear": [1 - kappa / 11 for kappa in range(11)],
    }
    for shape, weights in expected.items():
        changes = {
            "method.terms.pgd.weight.shape": shape,
            "method.terms.pgd.weight.lam": -1.0,
            "epochs": 5,
        }
        config = resolve_training_config("gairat-fig12-tanh", changes)
        assert compute_weight_function(config) == pytest.approx(weights), shape
    assert compute_weight_function(resolve_training_config("gairat-fig12-at", {})) == [1.0] * 11
    assert compute_weight_function(resolve_training_config("lrat-table1", {})) is None
    assert compute_weight_function(resolve_training_config("gairat-fig2-standard", {})) is None


def test_curves_have_a_panel_for_each_metric_and_group() -> None:
    figure = plot_metric_grid(RUNS, ["clean", "pgd"], {"all": ["AT", "GAIRAT"]})
    natural, robust = figure.axes
    assert lines(natural) == {"AT": [[1, 0.5], [2, 0.6]], "GAIRAT": [[1, 0.4], [2, 0.5]]}
    assert lines(robust)["GAIRAT"] == [[1, 0.2], [2, 0.5]]
    steps = RUNS["AT"].config.validation.attacks["pgd"].steps
    assert robust.get_ylabel() == f"accuracy under PGD-{steps}"


def test_groups_stand_beside_each_other_where_they_are_more_than_metrics() -> None:
    """G fig. 11: above the learning rate, below it the errors; a column for each schedule."""
    groups = {str(number): ["AT", "GAIRAT"][: 1 + number % 2] for number in range(5)}
    figure = plot_metric_grid(RUNS, ["train/lr", "pgd", "clean"], groups, as_errors=True)
    rows, columns = figure.axes[0].get_gridspec().get_geometry()
    assert (rows, columns) == (3, 5)
    assert [axes.get_title() for axes in figure.axes[:5]] == list(groups)
    assert lines(figure.axes[0])["AT"] == [[1, 0.1], [2, 0.05]], "no error of a learning rate"
    assert lines(figure.axes[5])["AT"] == [[1, pytest.approx(0.7)], [2, pytest.approx(0.6)]]
    assert figure.axes[10].get_ylabel() == "natural error"


def test_metrics_share_a_panel_and_weights_have_their_own() -> None:
    figure = plot_metric_grid(
        RUNS, ["train/natural", "train/robust"], {"": ["AT"]}, is_overlaid=True
    )
    (axes,) = figure.axes
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["AT"]
    figure = plot_metric_grid(RUNS, ["clean"], {"": list(RUNS)}, has_weight_functions=True)
    weights, natural = figure.axes
    assert lines(weights)["AT"][0] == [0, 1.0]
    assert weights.get_legend() is None, "it may lack a run whose weights are others"
    assert [text.get_text() for text in natural.get_legend().get_texts()] == list(RUNS)


def test_metrics_have_names_for_people() -> None:
    config = tiny("at", validation__train_steps=7)
    assert describe_metric("train/robust", config, True) == "training error under PGD-7"
    assert describe_metric("cw", tiny("at", **{"validation__attacks__cw__steps": 9})) == (
        "accuracy under CW-9"
    )
    assert describe_metric("train/loss", config) == "train/loss"


def test_statistics_are_those_of_figure_4() -> None:
    figure = plot_training_statistics(RUNS, "AT")
    weights, natural, robust, kappa, friendly, adversarial = figure.axes
    assert set(lines(weights)) == {"AT", "GAIRAT"}
    solid, dashed = natural.lines[:2]
    assert solid.get_ydata()[0] == pytest.approx(0.4) and solid.get_linestyle() == "-"
    assert dashed.get_ydata()[0] == pytest.approx(0.5) and dashed.get_linestyle() == "--"
    assert robust.lines[1].get_ydata().tolist() == pytest.approx([0.7, 0.6])
    assert lines(kappa) == {"mean": [[1, 4], [2, 4]], "median": [[1, 5], [2, 5]]}
    assert lines(friendly)["GAIRAT"][0] == [1, 0.2] and lines(adversarial)["AT"][1] == [2, 0.3]


V_PGD = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
V_CW = torch.tensor([-0.9, 0.2, 0.3, 0.4, -0.5, -0.6, -0.7, 0.8])


def instances(n_classes: int = 3) -> InstanceMetrics:
    """Eight examples. Half of them are most vulnerable: to PGD and by kappa the first four, to CW
    rows 0, 4, 5 and 6.
    """
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    kappa = torch.tensor([0, 0, 1, 1, 1, 1, 2, 3])
    return InstanceMetrics(
        logits, torch.arange(8) % n_classes, {"pgd": kappa}, {"pgd": V_PGD, "cw": V_CW}
    )


def test_of_equal_values_the_first_examples_are_the_most_vulnerable() -> None:
    values = torch.tensor([2, 0, 1, 1, 1, 1, 1, 5])
    assert (
        find_most_vulnerable(values, 0.5).tolist() == [False, True, True, True, True] + [False] * 3
    )
    assert find_most_vulnerable(values, 0.1).sum() == 4, "at least four"


def test_vulnerability_of_all_and_of_the_top() -> None:
    """L fig. 4: rows of V under PGD and under CW; bars by hand."""
    figure = plot_vulnerability_overlap(instances(), 0.5)
    heights = [
        [sum(patch.get_height() for patch in bars) for bars in axes.containers]
        for axes in figure.axes
    ]
    assert heights == [[8], [8, 4], [8, 4]] * 2
    by_other = figure.axes[2].containers[1]
    centres = [p.get_x() + p.get_width() / 2 for p in by_other if p.get_height()]
    assert centres == pytest.approx([0.1, 0.5, 0.6, 0.7], abs=0.026), "V of PGD of CW's top"
    assert figure.axes[2].get_title() == "dark: top 50% vulnerable to CW"
    assert figure.axes[3].get_xlim()[0] < -0.9, "a margin of probabilities"


def test_views_agree_on_some_examples() -> None:
    """L fig. 2: of four, one is in both views of PGD and CW; two models have eight panels."""
    figure = plot_vulnerable_views({"AT": instances(), "GAIRAT": instances()}, 0.5)
    assert len(figure.axes) == 8
    legends = [[t.get_text() for t in axes.get_legend().get_texts()] for axes in figure.axes]
    assert legends == [["3", "1"]] * 8, "inconsistent, consistent"
    assert figure.axes[0].get_title() == "AT: GD, red: CW too"
    red = figure.axes[2].collections[1].get_offsets()
    again = figure.axes[3].collections[1].get_offsets()
    assert red.tolist() == again.tolist(), "the example that is in both"


def test_each_pair_of_classes_has_a_panel() -> None:
    figure = plot_class_pairs(instances(4))
    titles = [axes.get_title() for axes in figure.axes if axes.axison]
    assert titles[0] == "0 (blue), 1 (red)" and len(titles) == 6
    assert all(len(dots.get_offsets()) == 2 for dots in figure.axes[0].collections)


def test_the_first_of_each_class(digits) -> None:
    chosen = select_first_of_each_class(digits.train, 2)
    assert chosen.y.bincount().tolist() == [2] * 10
    rows = (digits.train.y == 3).nonzero()[:2, 0]
    assert chosen.index[chosen.y == 3].tolist() == digits.train.index[rows].tolist()
    one = Split(chosen.x[:1], chosen.y[:1], chosen.index[:1], chosen.pixel_max)
    assert len(select_first_of_each_class(one, 5)) == 1


def test_instances_do_not_depend_on_batches(net, digits) -> None:
    attacks = {"pgd": PGD(eps=0.1, steps=3, step_size=0.05)}
    whole = compute_instance_metrics(net, digits.train, attacks, 23)
    parts = compute_instance_metrics(net, digits.train, attacks, 23, batch_size=5)
    assert whole.kappa["pgd"].tolist() == parts.kappa["pgd"].tolist()
    assert torch.allclose(whole.v["pgd"], parts.v["pgd"], atol=1e-5) and len(parts.y) == 23


def test_a_report_draws_what_its_rows_have(tmp_path: Path) -> None:
    """From a real checkpoint, measured once for two figures; a figure without data is a line."""
    fitted = train_model(tiny("gairat", epochs=1), tmp_path / "run")
    loaded = []

    def load_target(label: str):
        loaded.append(label)
        return load_checkpoint_target(fitted.last_checkpoint.local_folder, {})

    history = fitted.last_checkpoint.history
    source = FigureSource(
        {"GAIRAT": PlottedRun(fitted.last_checkpoint.config, history)},
        {"GAIRAT": {}},
        load_target,
        {},
    )
    figures = {
        "fig4": VulnerabilityFigure(caption="L figure 4", row="GAIRAT", examples=40),
        "again": VulnerabilityFigure(caption="again", row="GAIRAT", examples=40),
        "curves": CurvesFigure(caption="curves", metrics=("clean",)),
        "fig1a": WeightsFigure(caption="weights", row="GAIRAT", term="pgd"),
        "failed": CurvesFigure(caption="other", metrics=("clean",), panels={"": ("AT",)}),
    }
    drawn = draw_paper_figures(figures, source)
    assert loaded == ["GAIRAT"]
    assert [name for name, figure in drawn.items() if figure is None] == ["fig1a", "failed"]
    assert lines(drawn["curves"].axes[0]) == {"GAIRAT": [[1, history[0]["clean"]]]}
    (section,) = build_paper_figure_sections(figures, drawn)
    captions = [part.caption for part in section.parts if isinstance(part, CaptionedFigure)]
    assert captions == ["fig4: L figure 4", "again: again", "curves: curves"]
    texts = [part.text for part in section.parts if isinstance(part, Paragraph)]
    assert "figures/fig4.png" in texts[0] and "figures/fig1a.png" not in texts[0]
    assert texts[1] == "fig1a is not drawn: its rows have no data for it."
    assert build_paper_figure_sections({}, {}) == []


def test_a_misspelled_metric_is_refused_and_one_without_values_has_no_panel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """
stages:
  - {kind: train, runs: {AT: {method: gairat}}}
  - {kind: autoattack, attacks: {PGD: pgd20}}
  - kind: report
    figures:
      one: {kind: curves, caption: c, metrics: [clean, pgdd]}
      two: {kind: curves, caption: c, metrics: [train/natural, train/kappa_pgd, flatness_friendly]}
"""
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text(text)
    with pytest.raises(SpecError) as caught:
        load_pipeline("p.yaml", {})
    (line,) = caught.value.problems
    assert "figures.one: no metric 'pgdd'; nearest: pgd" in line
    Path("p.yaml").write_text(text.replace("pgdd", "pgd"))
    load_pipeline("p.yaml", {})
    source = FigureSource(RUNS, {}, lambda label: None, {})
    figure = CurvesFigure(caption="c", metrics=("clean", "val/scaling_gap")).draw(source)
    assert figure is not None and len(figure.axes) == 1


def test_the_metrics_of_real_epochs_are_known(tmp_path: Path) -> None:
    settings = {"validation__flatness": True, "validation__train_examples": 20}
    for method in ("gairat", "lrat-trades", "mart", "standard"):
        config = tiny(method, epochs=1, **settings)
        (row,) = train_model(config, tmp_path / method).last_checkpoint.history
        assert row.keys() <= set(list_metric_names(config))


def test_a_row_that_no_stage_has_is_refused(tmp_path: Path) -> None:
    text = """
stages:
  - {kind: train, runs: {AT: {method: at}}, seeds: [0]}
  - {kind: autoattack}
  - {kind: report, figures: {fig: {kind: statistics, caption: c, kappa_of: TA}}}
"""
    file = tmp_path / "figures.yaml"
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_pipeline(str(file), {})
    assert caught.value.problems == [
        f"{file}:5: stages.2 (report): figures.fig: no row 'TA'; the rows are AT"
    ]
    file.write_text(text.replace("fig:", "../fig:"))
    with pytest.raises(SpecError, match="figures"):
        load_pipeline(str(file), {})


def resolve_rows(pipeline: str) -> dict[str, TrainingConfig]:
    """The config of each row of a pipeline, as it would train."""
    _, loaded, overrides = load_pipeline(pipeline, {})
    train = loaded.stages[0]
    return dict(zip(train.runs, train.list_training_configs(overrides), strict=True))


@pytest.mark.parametrize(("name", "data"), [("gairat-fig2", "cifar10"), ("gairat-fig6", "svhn")])
def test_rows_of_figures_2_5_and_6(name: str, data: str) -> None:
    """G appendix A: PGD-10 with steps of a quarter of the radius; sizes at 8/255, radii from 1/255
    to 16/255 on ResNet-18; training errors under PGD-10.
    """
    rows = resolve_rows(name)
    attacks = {row: config.method.attacks.get("pgd") for row, config in rows.items()}
    assert [row for row, attack in attacks.items() if attack is None] == ["ST ResNet-18"]
    for row, config in rows.items():
        assert config.data.name == data and config.epochs == 100 and config.validation.every == 1
        validation = config.validation
        assert (validation.train_examples, validation.train_steps) == (1000, 10)
        attack = attacks[row]
        if attack is not None:
            assert attack.steps == 10 and attack.step_size == pytest.approx(attack.eps / 4)
            assert validation.attacks["pgd"].eps == attack.eps
            assert validation.attacks["pgd"].step_size == attack.step_size
    radii = {row: round(255 * a.eps, 9) for row, a in attacks.items() if a and "eps" in row}
    assert radii == {f"AT eps {n}/255": n for n in (1, 2, 4, 12, 16)}
    assert {config.model.name for row, config in rows.items() if "eps" in row} == {"resnet18"}
    sizes = [config.model.name for row, config in rows.items() if "eps" not in row]
    assert sizes == ["resnet18", "small_cnn", "resnet18", "resnet34", "resnet50"]


def test_settings_of_the_other_figures() -> None:
    """What the captions and appendices of G say, at the epochs that they name."""
    (at,) = resolve_rows("gairat-fig7").values()
    assert at.epochs == 30 and at.resolve_at(29).optim.lr == 0.01, "the checkpoint of epoch 30"
    (figure,) = load_pipeline("gairat-fig7", {})[1].stages[-1].figures.values()
    pgd = figure.attack
    assert (pgd.steps, pgd.eps, pgd.step_size, pgd.loss) == (10, 0.031, 0.031 / 4, "ce")
    for name in ("gairat-fig4", "gairat-fig10"):
        for config in resolve_rows(name).values():
            validation = config.validation
            assert validation.flatness and validation.train_steps == 20 and validation.every == 1
    networks = {row: config.model.name for row, config in resolve_rows("gairat-fig16").items()}
    assert {networks[f"{m} ResNet-18"] for m in ("AT", "GAIRAT")} == {"resnet18"}
    weights = resolve_rows("gairat-fig16")["GAIRAT ResNet-18"].method.terms["pgd"].weight
    assert (weights.shape, weights.burn_in) == ("tanh", 30)
    shapes = [
        config.resolve_at(74).method.terms["pgd"].weight.shape
        for row, config in resolve_rows("gairat-fig19").items()
        if row.startswith("GAIR-MART")
    ]
    assert shapes == ["tanh", "sigmoid", "linear"], "from epoch 75 onward"
    attacks = load_pipeline("gairat-fig21", {})[1].stages[1].attacks
    assert [a.steps for a in attacks.values()] == [10, 20, 40, 60, 80, 100]
    assert {(a.eps, a.step_size) for a in attacks.values()} == {(0.031, 2.5 * 0.031 / 100)}
    assert resolve_rows("lrat-fig5")["GAIRAT (CW)"].method.attacks["pgd"].loss == "cw"


@pytest.mark.parametrize(
    ("name", "row", "window"),
    [
        ("gairat-table1", "GAIRAT", (59, 100)),
        ("gairat-table2", "GAIR-TRADES", (75, 100)),
        ("lrat-table1", "LRAT", None),
    ],
)
def test_a_row_of_a_table_has_both_protocols(name: str, row: str, window: object) -> None:
    """The same training; the best epoch by ours on validation, by the paper's on test images."""
    rows = resolve_rows(name)
    ours, theirs = rows[row].validation, rows[f"{row} (paper's protocol)"].validation
    assert (ours.split, ours.objective, ours.window) == ("val", "robust_worst", None)
    assert (theirs.split, theirs.objective, theirs.window) == ("test", "pgd", window)
    same = rows[f"{row} (paper's protocol)"].replace(validation=ours)
    assert same == rows[row]


def read_table() -> list[dict[str, str]]:
    """The rows of "What there is" in the docs, by the titles of the columns."""
    page = (ROOT / "docs" / "reproduce-a-table.md").read_text()
    section = page.partition("## What there is\n")[2].partition("\n## ")[0]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    assert head == ["item", "presets", "pipeline", "figures", "status"]
    return [dict(zip(head, row, strict=True)) for row in rows]


def find_presets(cell: str) -> set[str]:
    """The presets that a cell names: `-at` continues the name before it, `...` is any text."""
    found: set[str] = set()
    base = ""
    for name in re.findall(r"`([^`]+)`", cell):
        base = base if name.startswith("-") else name
        full = f"{base}{name}" if name.startswith("-") else name
        pattern = re.compile(re.escape(full).replace(re.escape("..."), ".+"))
        matches = {preset for preset in list_presets() if pattern.fullmatch(preset)}
        assert matches, f"no preset {full}"
        found |= matches
    return found


@functools.cache
def load_shipped_pipeline(name: str) -> Pipeline:
    """Specs are frozen: the tests of the docs share them."""
    return load_pipeline(name, {})[1]


def figures_of_pipelines() -> Mapping[str, set[str]]:
    return {
        name: {
            figure
            for stage in load_shipped_pipeline(name).stages
            if isinstance(stage, ReportStage)
            for figure in stage.figures
        }
        for name in list_builtin_pipelines()
        if name not in ("digits", "nightly")
    }


def test_the_docs_name_every_pipeline_preset_and_figure() -> None:
    """Each exists, each is in the table, and figures stand beside the pipeline that draws them."""
    rows, pipelines = read_table(), figures_of_pipelines()
    named: dict[str, set[str]] = {}
    for row in rows:
        for pipeline in re.findall(r"`([^`]+)`", row["pipeline"]):
            named.setdefault(pipeline, set()).update(re.findall(r"`([^`]+)`", row["figures"]))
        assert row["status"], row["item"]
    assert named == pipelines
    presets = set().union(*(find_presets(row["presets"]) for row in rows))
    assert presets == set(list_presets())


def test_a_pipelines_rows_are_of_the_presets_beside_it_in_the_docs() -> None:
    for row in read_table():
        presets = find_presets(row["presets"])
        for name in re.findall(r"`([^`]+)`", row["pipeline"]):
            runs = load_shipped_pipeline(name).stages[0].runs
            used = {run.preset for run in runs.values()}
            assert used <= presets, f"{row['item']}: {used - presets}"


def test_the_docs_show_every_figure() -> None:
    """Small pictures; those on SVHN are others on another data set."""
    page = (ROOT / "docs" / "paper-figures.md").read_text()
    shown = set(re.findall(r"\]\(figures/([\w-]+)\.png\)", page))
    on_svhn = {"gairat-fig6", "gairat-fig10", "gairat-fig14"}
    assert shown == set().union(*figures_of_pipelines().values()) - on_svhn
    files = {path.stem: path.stat().st_size for path in (ROOT / "docs" / "figures").iterdir()}
    assert files.keys() == shown and max(files.values()) < 60_000
