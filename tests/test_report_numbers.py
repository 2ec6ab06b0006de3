"""What the report says of given judgements, sweeps and versions: every number by hand, rounded as
printed.
"""

import re
from dataclasses import replace
from typing import Any

import pytest
from matplotlib.figure import Figure
from pipeline_builders import build_candidate, build_evaluation_result

from raysweep.pipeline.artifact import Artifact, EvaluationResult
from raysweep.pipeline.facts import ReportChanges
from raysweep.pipeline.published_results import compare_with_paper, load_paper_table
from raysweep.pipeline.report.ablations import build_ablation_sections
from raysweep.pipeline.report.contents import (
    _build_changes_parts,
    _build_verdict_banner,
    _format_subtitle,
)
from raysweep.pipeline.report.document import (
    Banner,
    CaptionedFigure,
    Paragraph,
    ReportDocument,
    Section,
    Table,
)
from raysweep.pipeline.report.sections import (
    build_cost_sections,
    build_curve_sections,
    build_evaluation_sections,
    build_objective_sections,
    build_paper_comparison_sections,
    build_provenance_section,
    build_registry_sections,
    build_row_note_sections,
)
from raysweep.pipeline.report.stage import ReportStage, _compute_median_accuracies
from raysweep.pipeline.stage import UpstreamResults, find_best_candidate_evaluation
from raysweep.pipeline.statistics import McNemarResult


def tables(section: Section) -> list[Table]:
    return [part for part in section.parts if isinstance(part, Table)]


def texts(section: Section) -> list[str]:
    return [part.text for part in section.parts if isinstance(part, Paragraph)]


def captions(section: Section) -> list[str]:
    return [part.caption for part in section.parts if isinstance(part, CaptionedFigure)]


def rows_by(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table.headers, row, strict=True)) for row in table.rows]


def build_result(label: str, robust: float, clean: float = 0.9, **more: Any) -> EvaluationResult:
    own = {
        name: more.pop(name) for name in ("seed", "which", "epoch", "gap", "method") if name in more
    }
    score = more.pop("score", 0.5)
    return build_evaluation_result(
        build_candidate(label, score, **own), robust, clean=clean, **more
    )


def test_a_row_for_each_checkpoint_and_attack_with_medians_over_seeds() -> None:
    """Of three seeds 0.50, 0.20, 0.44: the median is 0.44, the mean 0.38, the deviation 0.15875."""
    shares = {0: (0.50, 0.90, 0.01, 12), 1: (0.20, 0.70, 0.021, 9), 2: (0.44, 0.75, None, 30)}
    have = [
        build_result("LRAT", robust, clean, seed=seed, gap=gap, epoch=epoch, score=robust + 0.01)
        for seed, (robust, clean, gap, epoch) in shares.items()
    ]
    have += [
        build_result("LRAT", 0.6, seed=0, attack="PGD", standard=False, gap=0.02),
        build_result("LRAT", 0.3, which="last"),
    ]
    (section,) = build_evaluation_sections(have, have[0])
    rows = rows_by(tables(section)[0])
    assert [(row["checkpoint"], row["epoch"], row["attack"], row["seeds"]) for row in rows] == [
        ("LRAT (chosen)", "best (9 to 30)", "AA", "3"),
        ("LRAT (chosen)", "best (90)", "PGD", "1"),
        ("LRAT", "last (90)", "AA", "1"),
    ]
    first, second, third = rows
    assert (first["validation"], first["clean"], first["robust"]) == (
        "45.00",
        "75.00 ± 10.41",
        "44.00 ± 15.87",
    )
    # t(2) 4.303 x 15.875 / sqrt 3 = 39.44 points, with the 0.97 of 10,000 examples.
    assert first["95%"] == "4.55 to 83.45"
    assert (first["masking gap"], first["masking"]) == ("2.10", "stands out"), (
        "the largest gap of all seeds"
    )
    assert (second["robust"], second["95%"]) == ("60.00", "59.04 to 60.96")
    assert (second["masking gap"], second["masking"]) == ("2.00", "none"), (
        "over two points stands out, two do not"
    )
    assert (third["masking gap"], third["masking"]) == ("", "")


def test_accuracy_after_each_attack_and_in_each_class() -> None:
    per_class = {"0": {"robust_accuracy": 0.25}, "1": {"robust_accuracy": 0.12345}}
    have = [
        build_result("a", 0.2, attack="PGD", standard=False, after={"pgd": 0.2}),
        build_result("a", 0.1, 0.95, after={"apgd-ce": 0.3, "square": 0.1}, per_class=per_class),
        build_result("b", 0.15, after={"apgd-ce": 0.15}, per_class={"2": {"robust_accuracy": 1.0}}),
    ]
    (section,) = build_evaluation_sections(have, have[0])
    _, left, by_class = tables(section)
    assert left.headers == ["left after", "clean", "apgd-ce", "square"], (
        "the attacks of AutoAttack, where it was run"
    )
    assert left.rows == [
        ["a, best, AA", "95.00", "30.00", "10.00"],
        ["b, best, AA", "90.00", "15.00", ""],
    ]
    assert by_class.headers == ["robust, by class", "0", "1", "2"]
    assert by_class.rows == [
        ["a, best, AA", "25.00", "12.35", ""],
        ["b, best, AA", "", "", "100.00"],
    ]
    many = [build_result(f"m{number}", 0.1) for number in range(9)]
    (section,) = build_evaluation_sections(many, many[0])
    assert len(tables(section)[0].rows) == 9 and len(tables(section)[1].rows) == 6, (
        "the first six in detail"
    )


def test_warnings_of_the_attacks_are_repeated() -> None:
    have = [build_result("a", 0.1, seed=3, warnings=("it is randomised", "zero gradient"))]
    (section,) = build_evaluation_sections(have, have[0])
    assert texts(section)[1:] == [
        "a, seed 3, best epoch: it is randomised",
        "a, seed 3, best epoch: zero gradient",
    ]


def test_the_objective_against_autoattack() -> None:
    """Scores 1 2 3 4 against 1 3 2 4: five of six pairs agree, tau (5 - 1) / 6."""
    pairs = ((0.1, 0.01), (0.2, 0.03), (0.3, 0.02), (0.4, 0.04))
    have = [build_result(f"c{n}", robust, score=score) for n, (score, robust) in enumerate(pairs)]
    have.append(build_result("pgd alone", 0.0, score=0.9, standard=False, attack="PGD"))
    (section,) = build_objective_sections(have)
    tau = "Kendall's tau between the objective and AutoAttack over 4 evaluated checkpoints: +0.67."
    assert texts(section) == [
        tau,
        "These are too few checkpoints: 1 and -1 are both likely by chance.",
    ]
    five = [*have, build_result("c4", 0.05, score=0.5)]
    assert texts(build_objective_sections(five)[0]) == [
        tau.replace("over 4", "over 5").replace("0.67", "0.80")
    ], "9 of 10 agree"
    falling = [
        build_result(f"c{n}", -score, score=score) for n, score in enumerate((0.1, 0.2, 0.3))
    ]
    assert "checkpoints: -1.00." in texts(build_objective_sections(falling)[0])[0]
    assert (
        "unknown, because one of them is constant."
        in texts(build_objective_sections([have[0], have[0]])[0])[0]
    )
    assert build_objective_sections(have[:1]) == [] == build_objective_sections([])


def sweep(path: str, asked: int, trained: int, seconds: float, *states: str) -> dict[str, Any]:
    trials = [{"state": state} for state in states]
    return {"path": path, "asked": asked, "trained": trained, "seconds": seconds, "trials": trials}


def stage(
    kind: str, seconds: float = 1.0, facts: dict | None = None, evaluations: tuple = ()
) -> Artifact:
    return Artifact(
        kind=kind,
        key=f"key of {kind}",
        stage={},
        inputs=(),
        seconds=seconds,
        facts=facts or {},
        evaluations=evaluations,
    )


def test_the_costs() -> None:
    sweeps = [
        sweep("runs/s1", 200, 150, 754.0, "finished", "stopped", "stopped", "failed"),
        sweep("s2", 0, 0, 6120.0),
    ]
    artifacts = [
        stage("tune", 65.0, {"sweeps": sweeps}),
        stage(
            "autoattack",
            4.25,
            evaluations=(
                build_result("a", 0.1, queries=1_234_567),
                build_result("b", 0.1, queries=3),
            ),
        ),
    ]
    (section,) = build_cost_sections(artifacts)
    trials, stages = tables(section)
    assert trials.headers[1:] == [
        "trials", "stopped", "failed", "epochs completed", "trained", "reused", "trial time"
    ]  # fmt: skip
    assert trials.rows == [
        ["s1", "4", "2", "1", "200", "150", "50 (25%)", "12.6 min"],
        ["s2", "0", "0", "0", "0", "0", "0 ()", "1.7 h"],
    ]
    assert stages.rows == [["tune", "1.1 min"], ["autoattack", "4.2 s"]]
    assert texts(section) == ["The attacks on the test set took 1,234,570 forward passes."]


def test_what_was_registered_and_who_is_champion() -> None:
    facts = {
        "name": "m",
        "version": "3",
        "candidate": "a",
        "verdict": "tie",
        "reason": "why",
        "champion": "2",
    }
    without = {key: value for key, value in facts.items() if key != "champion"}
    (section,) = build_registry_sections(
        [stage("tune"), stage("register", facts=facts), stage("register", facts=without)]
    )
    assert tables(section)[0].rows == [
        ["m version 3", "a", "tie", "why", "version 2"],
        ["m version 3", "a", "tie", "why", "none"],
    ]
    assert build_registry_sections([stage("tune")]) == []


def test_what_is_needed_to_reproduce_a_run() -> None:
    section = build_provenance_section(
        [stage("tune"), stage("report")], {"torch": "2.15", "git": None, "python": "3.11"}
    )
    stages, versions = tables(section)
    assert [row[:2] for row in stages.rows] == [
        ["tune", "key of tune"],
        ["report", "key of report"],
    ]
    assert versions.rows == [["torch", "2.15"], ["python", "3.11"]], "unknown versions are left out"


def test_curves_of_what_changes_from_epoch_to_epoch() -> None:
    histories = {
        "a": [
            {
                "epoch": 1,
                "robust_worst": 0.1,
                "clean": 0.5,
                "masking_gap": 0.0,
                "train/ess_pgd": 1.0,
                "train/loss": 2,
            },
            {
                "epoch": 2,
                "robust_worst": 0.1,
                "clean": 0.5,
                "masking_gap": 0.0,
                "train/ess_pgd": 1.0,
                "train/loss": 1,
            },
        ],
        "b": [
            {
                "epoch": 1,
                "robust_worst": 0.1,
                "clean": 0.5,
                "train/ess_pgd": 1.00004,
                "train/kappa_pgd": 3.0,
            }
        ],
    }
    (section,) = build_curve_sections(histories, {"a": ["one thing", "another"]})
    assert captions(section) == [
        "Worst case on validation over epochs",
        "Clean accuracy on validation over epochs",
        "Training loss over epochs",
    ], "accuracies always, other metrics if they vary in the first four digits"
    assert texts(section) == ["a: one thing.", "a: another."]
    histories["b"][0] |= {"train/ess_pgd": 0.9, "masking_gap": 0.1, "train/kappa_median_pgd": 5.0}
    histories["a"][0] |= {"train/kappa_pgd": 4.0}
    (section,) = build_curve_sections(histories, {})
    assert captions(section)[2:] == [
        "Masking gap on validation over epochs",
        "Training loss over epochs",
        "Mean κ under pgd over epochs",
        "Effective share of the sample, pgd over epochs",
    ]
    assert build_curve_sections({}, {}) == []


TEST = McNemarResult(10, 30, 100, 0.00222, -0.2, (-0.32, -0.08), "worse")


def build_changes(**more: Any) -> ReportChanges:
    values = {
        "previous_time": "then",
        "best": ("a", "b"),
        "robust": (0.5, 0.4321),
        "clean": (0.9, 0.89),
        "medians": {"at under AA": (0.5, 0.4)},
    }
    return ReportChanges(**values | more)


def test_a_regression_is_a_verdict_of_worse_or_a_number_below_the_floor() -> None:
    """A number equal to the floor is not below it."""
    best = build_result("b", 0.4321)
    worse = build_changes(test=TEST)
    assert ReportStage()._find_regressions(best, worse) == [
        (
            "AA of the chosen checkpoint fell from 50.00% to 43.21% (30 examples lost, 10 gained, "
            "p = 0.0022)"
        )
    ]
    for verdict in ("better", "tie", "cannot tell"):
        other = build_changes(test=replace(TEST, verdict=verdict))
        assert ReportStage()._find_regressions(best, other) == []
    assert (
        ReportStage()._find_regressions(best, None)
        == []
        == ReportStage()._find_regressions(best, build_changes())
    )
    assert ReportStage(floor=0.4321)._find_regressions(best, None) == []
    below = "AA of the chosen checkpoint is 43.21%, below the floor 43.22%"
    assert ReportStage(floor=0.4322)._find_regressions(best, None) == [below]
    assert ReportStage(floor=0.4322)._find_regressions(best, worse)[1] == below
    assert ReportStage(floor=0.0)._find_regressions(build_result("b", 0.0), None) == []


def test_the_line_to_read() -> None:
    best = build_result("b", 0.4321, 0.8765, seed=2)
    assert _build_verdict_banner(best, [], [best]) == Banner(
        "No regression. b, seed 2, best epoch, chosen on validation: 43.21% under AA (95% 42.21% "
        "to 44.21%), "
        "87.65% clean.",
        is_good=True,
    )
    assert _build_verdict_banner(best, ["x", "y"], [best]) == Banner(
        "Regression: x; y.", is_good=False
    )
    assert _format_subtitle(best).endswith(
        "; cifar10, resnet18, Linf eps 0.03137; 10000 of 10000 test examples"
    )


def test_different_threats_are_not_ranked() -> None:
    """No checkpoint is chosen, each threat has a table, and no correlation mixes them."""
    results = [
        build_result("AT", 0.50),
        build_result("GAIRAT", 0.52, eps=0.031),
        build_result("LRAT", 0.49),
    ]
    banner = _build_verdict_banner(results[0], [], results)
    assert banner.is_good is None and banner.text == (
        "Not ranked: the rows have different threat models, Linf eps 0.03137 (AT, LRAT); Linf eps "
        "0.031 (GAIRAT). Accuracies at one of them say nothing about another."
    )
    (section,) = build_evaluation_sections(results, results[0])
    titles = [getattr(part, "text", "") for part in section.parts]
    tables = [section.parts[titles.index(f"Linf eps {eps}:") + 1] for eps in (0.03137, 0.031)]
    assert [[row[0] for row in table.rows] for table in tables] == [["AT", "LRAT"], ["GAIRAT"]]
    (objective,) = build_objective_sections(results)
    assert objective.parts == [
        Paragraph("Not computed: the checkpoints were attacked under different threat models.")
    ]
    one_threat = [results[0], results[2]]
    (section,) = build_evaluation_sections(one_threat, results[0])
    assert [row[0] for row in section.parts[1].rows] == ["AT (chosen)", "LRAT"]


def test_the_best_is_among_those_of_the_first_threat() -> None:
    results = [build_result("AT", 0.50, score=0.4), build_result("RST", 0.6, score=0.9, eps=0.031)]
    artifact = Artifact(
        kind="autoattack",
        key="k",
        stage={},
        inputs=(),
        candidates=tuple(result.candidate for result in results),
        evaluations=tuple(results),
    )
    best = find_best_candidate_evaluation(UpstreamResults((artifact,)))
    assert best.candidate.label == "AT"


def test_notes_stand_in_the_first_line_of_their_row() -> None:
    table = load_paper_table("gairat-table3")
    results = [build_result("RST", 0.59, which="last"), build_result("GAIR-RST", 0.6, which="last")]
    comparisons = compare_with_paper(table, results)
    (section,) = build_paper_comparison_sections(table, comparisons, {"RST": ["one", "two"]})
    lines = section.parts[1].rows
    assert section.parts[1].headers[-1] == "note"
    assert [(line[0], line[2], line[-1]) for line in lines[:4]] == [
        ("RST", "Natural", "one; two"),
        ("RST", "AA", ""),
        ("GAIR-RST", "Natural", ""),
        ("GAIR-RST", "AA", ""),
    ]
    assert (
        lines[4:6]
        == [
            ["Gowal et al. (2020)", "", "Natural", "", "", "89.48", "", "", "reference only", ""],
            ["Gowal et al. (2020)", "", "AA", "", "", "62.60", "", "", "reference only", ""],
        ]
        and len(lines) == 4 + 2 * 5
    )
    reasons = {c.row: c.reasons for c in comparisons}
    assert "other eps (0.03137, not 0.031)" in reasons["GAIR-RST"]
    assert not any("eps" in reason for reason in reasons["RST"]), "its number is at 8/255"


def test_notes_of_pipelines_without_a_paper_have_a_section() -> None:
    (section,) = build_row_note_sections({"a": ("x", "y"), "b": ("z",)})
    assert section.parts[0].rows == [["a", "x"], ["a", "y"], ["b", "z"]]
    assert build_row_note_sections({}) == []


def test_what_changed_since_the_last_report() -> None:
    (table,) = _build_changes_parts(build_changes())
    assert table.headers == ["since then", "before", "now"]
    assert table.rows == [
        ["chosen checkpoint", "a", "b"],
        ["robust accuracy", "50.00%", "43.21%"],
        ["clean accuracy", "90.00%", "89.00%"],
    ], "with one method its median is the same number"
    _, line = _build_changes_parts(
        build_changes(protocol_differences=("eps 1 then, 2 now", "norm a then, b now"))
    )
    assert (
        line.text
        == "Not comparable with the previous report: eps 1 then, 2 now; norm a then, b now."
    )
    test = McNemarResult(3, 13, 200, 0.021270751953125, -0.05, (-0.1, 0.0), "worse")
    _, line = _build_changes_parts(build_changes(test=test))
    assert (
        line.text == "McNemar's test on 200 shared examples: 3 gained, 13 lost, p = 0.0213: worse."
    )
    (first,) = _build_changes_parts(None)
    assert first == Paragraph("This is the first report of this pipeline.", is_muted=True)


def test_methods_are_compared_by_their_medians() -> None:
    have = [
        build_result("x", share, method="at", seed=n)
        for n, share in enumerate((0.1, 0.6, 0.2, 0.3))
    ]
    have += [build_result("y", 0.4, method="lrat", attack="PGD")]
    assert _compute_median_accuracies(tuple(have)) == {
        "at under AA": 0.25,
        "lrat under PGD": 0.4,
    }, "of an even count the middle of two"


def test_a_single_varied_setting_is_plotted_in_medians_over_seeds() -> None:
    """Skewed: the means would be 0.4, and for the second value 0.3."""
    from conftest import tiny

    path = "method.terms.pgd.weight.alpha"
    shares = {1.0: (0.1, 0.2, 0.9), 2.0: (0.3, 0.1, 0.5), 4.0: (0.25,)}
    have, configs = [], {}
    for value, several in shares.items():
        config = tiny("lrat", method__terms__pgd__weight__alpha=value)
        for seed, share in enumerate(several):
            have.append(build_result(f"alpha {value}", share, seed=seed))
            configs[have[-1].candidate.checkpoint] = config.model_copy(update={"seed": seed})
    (section,) = build_ablation_sections(have, configs, ())
    assert captions(section) == [f"Test accuracy against {path} (medians over seeds)"]
    lines = {
        line.get_label(): line.get_xydata().tolist()
        for line in section.parts[0].figure.axes[0].lines
    }
    assert lines["AA, best"] == [[1.0, 0.2], [2.0, 0.3], [4.0, 0.25]]


def document(*parts: Any) -> ReportDocument:
    return ReportDocument("A <title>", "under & over", [Section("S", parts)])


def test_html_escapes_its_texts_and_colours_verdicts() -> None:
    table = Table(
        ["row", "verdict"],
        [["<b>", "worse"], ["a|b", "better"], ["c", "tie"], ["d", "other"]],
        ("verdict",),
    )
    text = document(
        Banner("all & well", True),
        Banner("bad", False),
        Banner("?"),
        Paragraph("x < y", is_muted=True),
        table,
    ).render_html()
    assert "<h1>A &lt;title&gt;</h1>" in text and "under &amp; over" in text and "<b>" not in text
    assert (
        '<p class="banner good">all &amp; well</p>' in text
        and '<p class="banner bad">bad</p>' in text
    )
    assert '<p class="banner">?</p>' in text and "<p class=quiet>x &lt; y</p>" in text
    cells = re.findall(r"<td[^>]*>.*?</td>", text)
    assert cells[:2] == ["<td>&lt;b&gt;</td>", '<td class=text><span class="bad">worse</span></td>']
    assert [re.findall(r'span class="(\w+)"', cell) for cell in cells[1::2]] == [
        ["bad"],
        ["good"],
        ["open"],
        [],
    ]


def test_markdown_has_the_same_text_and_names_the_figures() -> None:
    table = Table(["row", "n", "verdict"], [["a|b", "1", "tie"]], ("verdict",))
    picture = CaptionedFigure("A curve", Figure())
    text = document(
        Banner("well", True),
        picture,
        Paragraph("x < y"),
        table,
        CaptionedFigure("Another", Figure()),
    ).render_markdown()
    assert text.splitlines() == [
        "# A &lt;title&gt;", "", "under &amp; over", "", "## S", "", "**well**", "", "x &lt; y", "",
        "| row | n | verdict |", "| --- | ---: | --- |", "| a\\|b | 1 | tie |", "",
        "*Figures, in the HTML: A curve; Another.*",
    ]  # fmt: skip


def test_the_same_picture_is_the_same_bytes() -> None:
    def render_figure() -> str:
        figure = Figure(figsize=(2, 2))
        figure.subplots().plot([1, 2], [3, 4])
        return document(CaptionedFigure("c", figure, is_full_width=True)).render_html()

    first = render_figure()
    assert (
        first == render_figure()
        and '<figure class=wide><img alt="c" src="data:image/svg+xml;base64,' in first
    )


@pytest.mark.parametrize("floor", [-0.1, 1.1])
def test_a_floor_is_a_share(floor: float) -> None:
    from raysweep.spec import SpecError

    with pytest.raises(SpecError, match="floor"):
        ReportStage.from_data({"floor": floor})
