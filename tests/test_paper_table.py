"""Our numbers beside a paper's: which are compared, the sign of the difference, and when they are
not comparable.
"""

from typing import Any

import pytest
from pipeline_builders import build_candidate, build_evaluation_result

from raysweep.pipeline.artifact import EvaluationResult
from raysweep.pipeline.published_results import (
    PaperComparison,
    PaperTable,
    compare_with_paper,
    load_paper_table,
)
from raysweep.pipeline.report.sections import build_paper_comparison_sections as paper_section
from raysweep.spec import SpecError

TABLE = PaperTable.from_data(
    {
        "source": "A paper, table 7",
        "tolerance": 1.5,
        "protocol": {"data": "cifar10", "epochs": 100, "eps": "8/255", "examples": 10000},
        "models": {"AT": "resnet18", "LRAT": "wrn_32_10"},
        "epochs": {"LRAT": 60},
        "rows": {
            "AT": {
                "best": {"Natural": {"value": 82.5}, "AA": {"value": 48.5, "sd": 0.1}},
                "last": {"AA": {"value": 45.0, "tolerance": 3}},
            },
            "LRAT": {"best": {"AA": {"value": 48.6}}},
        },
        "notes": ["A note."],
    }
)


def build_result(label: str, robust: float, **more: Any) -> EvaluationResult:
    own = {name: more.pop(name) for name in ("seed", "which") if name in more}
    return build_evaluation_result(build_candidate(label, 0.5, **own), robust, **more)


def only_line(lines: list[PaperComparison]) -> PaperComparison:
    (line,) = lines
    return line


def test_every_number_of_the_table_that_we_have_gets_a_line() -> None:
    have = [
        build_result("LRAT", 0.4, model="wrn_32_10", epochs=60),
        build_result("AT", 0.47, which="last"),
        build_result("AT", 0.48, clean=0.83),
        build_result("AT", 0.50, clean=0.83, attack="PGD"),
        build_result("GAIRAT", 0.3),
    ]
    lines = compare_with_paper(TABLE, have)
    assert [(c.row, c.checkpoint_kind, c.metric) for c in lines] == [
        ("AT", "best", "Natural"),
        ("AT", "best", "AA"),
        ("AT", "last", "AA"),
        ("LRAT", "best", "AA"),
    ]
    assert [round(c.difference, 9) for c in lines] == [0.5, -0.5, 2.0, -8.6], (
        "ours less the paper's, in points"
    )
    assert [c.tolerance for c in lines] == [1.5, 1.5, 3, 1.5], (
        "the tolerance of the number or else of the table"
    )
    assert [c.verdict for c in lines] == [
        "reproduced",
        "reproduced",
        "reproduced",
        "not reproduced",
    ]
    assert [(c.paper, c.paper_sd) for c in lines] == [
        (82.5, None),
        (48.5, 0.1),
        (45.0, None),
        (48.6, None),
    ]
    assert compare_with_paper(TABLE, have[-1:]) == [] == compare_with_paper(TABLE, [])


def test_seeds_count_once_each_and_the_median_is_compared() -> None:
    """Skewed: the mean would be 44.0. Any attack gives the natural accuracy, once a seed."""
    shares = {0: 0.48, 1: 0.36, 2: 0.48}
    have = [
        build_result("AT", share, seed=seed, clean=0.8 + seed / 100, attack=attack)
        for attack in ("PGD", "AA")
        for seed, share in shares.items()
    ]
    natural, aa = compare_with_paper(TABLE, have)
    assert (natural.ours.n_seeds, aa.ours.n_seeds) == (3, 3)
    assert natural.ours.median == 0.81 and natural.difference == pytest.approx(-1.5)
    assert natural.ours.sd == pytest.approx(0.01)
    assert aa.ours.median == 0.48 and aa.difference == pytest.approx(-0.5)
    assert aa.ours.sd == pytest.approx(0.06928203230275509)
    assert aa.verdict == "cannot tell", "the seeds are too far apart"


def test_the_smallest_test_set_decides_how_exact_we_are() -> None:
    few = [
        build_result("AT", 0.48, seed=seed, examples=examples)
        for seed, examples in ((0, 10_000), (1, 100))
    ]
    line = next(c for c in compare_with_paper(TABLE, few) if c.metric == "AA")
    assert line.ours.high - line.ours.low > 0.19, (
        "the interval of 100 examples: 9.6 points each way"
    )


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"data": "svhn"}, "other data (svhn, not cifar10)"),
        ({"model": "wrn_32_10"}, "other model (wrn_32_10, not resnet18)"),
        ({"norm": "L2"}, "other norm (L2, not Linf)"),
        ({"epochs": 99}, "fewer epochs (99, not 100)"),
        ({"epochs": 101}, "more epochs (101, not 100)"),
        ({"eps": 0.031}, "other eps (0.031, not 0.03137)"),
        ({"eps": 8 / 255 * 1.0011}, "other eps (0.03141, not 0.03137)"),
        ({"eps": 8 / 255 * 0.9989}, "other eps (0.03134, not 0.03137)"),
        ({"examples": 9_999}, "9999 test examples, not 10000"),
        ({"train_size": 600}, "only 600 training examples"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_what_differs_from_the_papers_protocol_is_not_comparable(more: dict, reason: str) -> None:
    line = only_line(compare_with_paper(TABLE, [build_result("AT", 0.485, which="last", **more)]))
    assert line.verdict == "not comparable" and line.reasons == (reason,)
    assert line.difference == pytest.approx(3.5), "the difference is shown nevertheless"


def test_eps_may_be_rounded_and_a_row_may_have_epochs_of_its_own() -> None:
    for eps in (0.0313725, 0.03140, 8 / 255 * 1.0009, 8 / 255 * 0.9991):
        assert (
            only_line(
                compare_with_paper(TABLE, [build_result("AT", 0.48, which="last", eps=eps)])
            ).reasons
            == ()
        ), eps
    assert (
        only_line(
            compare_with_paper(TABLE, [build_result("LRAT", 0.48, model="wrn_32_10", epochs=60)])
        ).reasons
        == ()
    )
    line = only_line(
        compare_with_paper(TABLE, [build_result("LRAT", 0.48, model="wrn_32_10", epochs=100)])
    )
    assert line.reasons == ("more epochs (100, not 60)",)


def test_all_reasons_are_given() -> None:
    line = only_line(
        compare_with_paper(
            TABLE, [build_result("LRAT", 0.48, data="svhn", epochs=2, examples=20, train_size=64)]
        )
    )
    assert line.reasons == (
        "other data (svhn, not cifar10)",
        "other model (resnet18, not wrn_32_10)",
        "fewer epochs (2, not 60)",
        "20 test examples, not 10000",
        "only 64 training examples",
    )


def test_the_report_shows_them_in_points_with_signs() -> None:
    have = [
        *(
            build_result("AT", share, seed=n, which="last")
            for n, share in enumerate((0.4612, 0.4634, 0.4617))
        ),
        build_result("AT", 0.4811, clean=0.8123, epochs=99),
    ]
    (section,) = paper_section(TABLE, compare_with_paper(TABLE, have))
    assert section.title == "Beside the paper"
    natural, aa, last = section.parts[1].rows
    assert natural[:4] == ["AT", "best", "Natural", "81.23"] and natural[5:] == [
        "82.50",
        "-1.27",
        "1.5",
        "not comparable",
    ]
    assert natural[4] == "80.45 to 81.98", "Wilson's interval of 8123 of 10000"
    assert aa[5:] == ["48.50 ± 0.10", "-0.39", "1.5", "not comparable"]
    assert last[3] == "46.17 ± 0.12" and last[5:] == ["45.00", "+1.17", "3.0", "reproduced"]
    assert [part.text for part in section.parts[2:4]] == [
        "AT is not comparable: fewer epochs (99, not 100).",
        "A note.",
    ], "once for the row, then the table's own notes"
    assert paper_section(None, []) == []


def test_tables_are_known_by_name() -> None:
    table = load_paper_table("lrat-table5")
    assert table.rows["LRAT"]["best"]["AA"].value == 47.65 and table.protocol.examples == 26032
    with pytest.raises(SpecError, match="no paper table 'lrat-tabel5'; nearest: lrat-table5"):
        load_paper_table("lrat-tabel5")
