"""The parts of a report that are drawn from ledgers, settings and checkpoints: they say what is in
the data.
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny

from raysweep.attacks import PGD
from raysweep.formatting import format_clock, format_duration
from raysweep.pipeline.artifact import Artifact, Candidate, EvaluationResult
from raysweep.pipeline.autoattack import AutoAttackStage
from raysweep.pipeline.facts import ReportChanges
from raysweep.pipeline.report.ablations import build_ablation_sections
from raysweep.pipeline.report.document import CaptionedFigure, Paragraph, ReportDocument, Section
from raysweep.pipeline.report.search_results import build_search_sections
from raysweep.pipeline.report.training_dynamics import (
    build_training_dynamics_section,
    draw_training_figures,
)
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.optuna_study import MIN_IMPORTANCE_TRIALS, build_study, param_importances
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial
from raysweep.training.instance_metrics import InstanceMetrics, compute_instance_metrics
from raysweep.training.model_loading import load_checkpoint_target
from raysweep.training.trainer import train_model

LR, MOMENTUM, SHAPE = "optim.lr", "optim.momentum", "method.terms.pgd.weight.shape"
LAM = "method.terms.pgd.weight.lam"


def ledger(folder: Path, count: int, **more) -> Ledger:
    """A sweep that went as told: the learning rate decides, momentum does nothing, clean falls as
    robustness grows.
    """
    space = SearchSpace.from_data(
        {
            "method": "gairat",
            "space": {
                LR: {"float": [0.001, 1.0], "log": True},
                MOMENTUM: {"float": [0.0, 0.9]},
                SHAPE: {"categorical": ["tanh", "linear"]},
                LAM: {"float": [-3.0, 3.0], "when": {SHAPE: "tanh"}},
            },
            **more,
        }
    )
    made = Ledger.create(folder / "runs" / "s", space)
    for number in range(count):
        share = number / max(count - 1, 1)
        settings = {
            LR: 10 ** (3 * share - 3),
            MOMENTUM: 0.9 * ((number * 7) % 5) / 4,
            SHAPE: ("tanh", "linear")[number % 2],
        }
        if number % 2 == 0:
            settings[LAM] = -1.0
        best = {"epoch": 2.0, "robust_worst": share, "clean": 1 - share**2, "masking_gap": 0.0}
        made.save_trial(Trial(number, settings, "finished", epoch=2, latest=best, best=best))
    made.save_trial(Trial(count, {LR: 0.5, MOMENTUM: 0.5, SHAPE: "linear"}, "failed", reason="nan"))
    made.save_trial(Trial(count + 1, {LR: 0.5, MOMENTUM: 0.5, SHAPE: "linear"}, "running"))
    return made


def write_tune_artifact(folder: Path, made: Ledger) -> Artifact:
    sweep = {"path": str(Path(str(made.path)).relative_to(folder)), "method": "gairat"}
    return Artifact(
        kind="tune", key="k", stage={"label": None}, inputs=(), facts={"sweeps": [sweep]}
    )


def captions(section: Section) -> list[str]:
    return [part.caption for part in section.parts if isinstance(part, CaptionedFigure)]


def section_text(section: Section) -> str:
    return " ".join(part.text for part in section.parts if isinstance(part, Paragraph))


def test_the_setting_that_decides_is_the_most_important(tmp_path: Path) -> None:
    shares = param_importances(ledger(tmp_path, 24))
    assert shares is not None and next(iter(shares)) == LR and shares[LR] > 0.6
    assert sum(shares.values()) == pytest.approx(1)
    assert LAM not in shares, "not every trial has it"


def test_importances_need_trials_that_differ(tmp_path: Path) -> None:
    few = ledger(tmp_path / "few", MIN_IMPORTANCE_TRIALS - 1)
    assert param_importances(few) is None
    (section,) = build_search_sections(
        [write_tune_artifact(tmp_path / "few", few)], (tmp_path / "few").joinpath
    )
    assert (
        f"this needs at least {MIN_IMPORTANCE_TRIALS} complete trials, "
        f"not {MIN_IMPORTANCE_TRIALS - 1}" in section_text(section)
    )
    same = ledger(tmp_path / "same", MIN_IMPORTANCE_TRIALS)
    for trial in same.load_trials()[:MIN_IMPORTANCE_TRIALS]:
        trial.best["robust_worst"] = 0.5
        same.save_trial(trial)
    assert param_importances(same) is None
    stopped = ledger(tmp_path / "stopped", MIN_IMPORTANCE_TRIALS)
    stopped.save_trial(replace(stopped.load_trials()[0], state="stopped"))
    assert param_importances(stopped) is None, "its result is of another epoch"


def test_what_was_searched_is_drawn(tmp_path: Path) -> None:
    made = ledger(tmp_path, 12)
    (section,) = build_search_sections([write_tune_artifact(tmp_path, made)], tmp_path.joinpath)
    assert section.title == "What was searched: gairat"
    assert captions(section) == [
        "Objective against each searched setting (darker: later)",
        "Importance of the settings (fANOVA)",
        "Pareto front: clean and robust worst",
    ]
    assert "Not every trial has lam" in section_text(section)
    slices = next(
        part.figure
        for part in section.parts
        if isinstance(part, CaptionedFigure) and part.is_full_width
    )
    by_name = {axes.get_xlabel(): axes for axes in slices.axes if axes.axison}
    assert list(by_name) == ["lr", "momentum", "shape", "lam"]
    assert by_name["lr"].get_xscale() == "log" and by_name["lr"].get_xlim() == (0.001, 1.0)
    assert [len(axes.collections[0].get_offsets()) for axes in by_name.values()] == [12, 12, 12, 6]
    html = ReportDocument("t", "u", [section]).render_html()
    assert html.count("data:image/svg+xml;base64,") == 3 and "http" not in html.replace(
        "http-equiv", ""
    )


def test_the_front_is_optunas_and_feasible(tmp_path: Path) -> None:
    made = ledger(
        tmp_path,
        6,
        max_masking_gap=0.1,
        metric=["robust_worst", "clean"],
        scheduler={"kind": "none"},
    )
    assert {t.number for t in made.unmasked_pareto_front()} == {0, 1, 2, 3, 4, 5}, (
        "each gives up one for the other"
    )
    beaten = made.load_trials()[2]
    beaten.best["clean"] = 0.1
    masked = made.load_trials()[5]
    masked.best["masking_gap"] = 0.2
    made.save_trial(beaten)
    made.save_trial(masked)
    assert (
        {t.number for t in made.unmasked_pareto_front()}
        == {0, 1, 3, 4}
        == {t.number for t in build_study(made).best_trials}
    )


def test_several_objectives_are_drawn_against_each_other(tmp_path: Path) -> None:
    made = ledger(tmp_path, 3, metric=["robust_worst", "clean"], scheduler={"kind": "none"})
    (section,) = build_search_sections([write_tune_artifact(tmp_path, made)], tmp_path.joinpath)
    assert captions(section)[-1] == "Pareto front: clean and robust worst"


def build_result(
    label: str, attack: str, robust: float, method: str = "gairat", **more
) -> EvaluationResult:
    candidate = Candidate(
        label=label, method=method, checkpoint=label, epoch=1, epochs=1, metrics={}, **more
    )
    return EvaluationResult(
        candidate=candidate,
        attack=attack,
        robust=robust,
        clean=0.9,
        is_autoattack=False,
        **{
            "examples": 10,
            "test_examples": 10,
            "eps": 0.1,
            "norm": "Linf",
            "seconds": 0,
            "queries": 0,
        },
        **{"intervals": {}, "after": {}, "per_class": {}, "protocol": {}},
        **{"masking_gap": None, "warnings": (), "run": "", "folder": ""},
    )


def test_accuracy_against_the_one_setting_that_differs() -> None:
    lams = {"a": -1.0, "b": 0.0, "c": 2.0}
    configs = {
        name: tiny("gairat", method__terms__pgd__weight__lam=lam) for name, lam in lams.items()
    }
    configs |= {
        "at": tiny("at"),
        "other": tiny("gairat", method__terms__pgd__weight__lam=1.0, batch_size=16),
    }
    judged = [build_result(name, "AA", 0.1 * place) for place, name in enumerate(configs)]
    (section,) = build_ablation_sections(judged, configs, ())
    assert captions(section) == [f"Test accuracy against {LAM} (medians over seeds)"]
    (picture,) = section.parts
    lines = {line.get_label(): line.get_xydata().tolist() for line in picture.figure.axes[0].lines}
    assert lines["AA, best"] == [[-1.0, 0.0], [0.0, 0.1], [2.0, 0.2]], (
        "neither AT nor the run with other batches"
    )
    assert lines["clean, best"] == [[-1.0, 0.9], [0.0, 0.9], [2.0, 0.9]]
    del configs["c"]
    assert build_ablation_sections(judged[:2], configs, ()) == [], "two points are no curve"


def test_accuracy_against_the_steps_of_pgd() -> None:
    attacks = {f"PGD-{n}": PGD(eps=0.1, step_size=0.01, steps=n) for n in (10, 20, 40)}
    stage = AutoAttackStage(
        attacks={**attacks, "other": PGD(eps=0.1, step_size=0.02, steps=80), "AA": "autoattack"}
    )
    artifact = Artifact(kind="autoattack", key="k", stage=stage.to_json_dict(), inputs=())
    judged = [
        build_result("a", name, 0.5 - 0.1 * place) for place, name in enumerate(stage.attacks)
    ]
    (section,) = build_ablation_sections(judged, {"a": tiny("at")}, [artifact])
    (line,) = section.parts[0].figure.axes[0].lines
    assert line.get_xydata().tolist() == [[10, 0.5], [20, 0.4], [40, pytest.approx(0.3)]]


def test_every_method_is_compared_with_the_night_before() -> None:
    from raysweep.pipeline.report.contents import _build_changes_parts
    from raysweep.pipeline.report.stage import _compute_median_accuracies

    def night_evaluations(shares: dict[str, tuple[float, ...]]) -> tuple[EvaluationResult, ...]:
        return tuple(
            build_result(m, "AA", share, m, seed=n)
            for m in shares
            for n, share in enumerate(shares[m])
        )

    nights = [
        night_evaluations({"a": (0.5, 0.1, 0.3), "b": (0.2,)}),
        night_evaluations({"a": (0.6, 0.2, 0.4), "b": (0.1,)}),
    ]
    then, now = (_compute_median_accuracies(judged) for judged in nights)
    assert then == {"a under AA": 0.3, "b under AA": 0.2}
    medians = {name: (then[name], now[name]) for name in now}
    changes = ReportChanges(
        previous_time="w", best=("a", "a"), robust=(0.5, 0.6), clean=(1, 1), medians=medians
    )
    (table,) = _build_changes_parts(changes)
    assert ["a under AA (median)", "30.00%", "40.00%"] in table.rows
    assert ["b under AA (median)", "20.00%", "10.00%"] in table.rows


def test_examples_as_a_model_sees_them(net, digits) -> None:
    attacks = {
        "pgd": PGD(eps=0.1, steps=3, step_size=0.05),
        "cw": PGD(eps=0.1, steps=3, step_size=0.05, loss="cw"),
    }
    seen = compute_instance_metrics(net, digits.train, attacks, 40)
    assert seen.logits.shape == (40, 10) and (seen.y == digits.train.y[:40]).all()
    assert all(0 <= k <= 3 for k in seen.kappa["pgd"].tolist())
    assert (seen.v["pgd"] >= 0).all() and seen.v["cw"].min() < 0, "a probability and a margin"
    again = compute_instance_metrics(net, digits.train, attacks, 40)
    assert (again.v["cw"] == seen.v["cw"]).all()


def test_the_most_confused_classes() -> None:
    import torch

    logits = torch.zeros(6, 4)
    y = torch.tensor([0, 1, 2, 2, 3, 3])
    for row, (own, rival) in enumerate([(0, 1), (1, 0), (2, 3), (2, 3), (3, 2), (3, 0)]):
        logits[row, own], logits[row, rival] = 3.0, 2.0
    assert InstanceMetrics(logits, y, {}, {}).find_most_confused_classes() == (2, 3)


def test_a_run_from_inside(tmp_path: Path) -> None:
    """The papers' figures of a real checkpoint, with the two maps."""
    fitted = train_model(tiny("lrat", epochs=1), tmp_path / "run")
    figures = draw_training_figures(load_checkpoint_target(fitted.best_checkpoint.local_folder, {}))
    assert {
        "errors",
        "kappa_pgd",
        "weight_cw_histogram",
        "V_pgd_histogram",
        "logits_map",
        "vulnerable_map",
    } <= set(figures)
    section = build_training_dynamics_section("lrat", figures)
    assert len(captions(section)) == len(figures) and "Vulnerability (LRAT fig. 4): cw" in captions(
        section
    )
    (x, y) = figures["logits_map"].axes[0].collections[0].get_offsets().T.tolist()
    assert x and all(math.isfinite(v) for v in (*x, *y))


def test_seconds_as_people_read_them() -> None:
    assert [format_clock(s) for s in (5, 125.9, 3725)] == ["0:05", "2:05", "1:02:05"]
    assert [format_duration(s) for s in (4.2, 750, 6120)] == ["4.2 s", "12.5 min", "1.7 h"]
