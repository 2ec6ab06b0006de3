"""Which candidates are promoted, and whose verdict counts: limits, ties, masking, several methods
and metrics.
"""

import pytest
from pipeline_builders import build_candidate, build_evaluation_result

from raysweep.pipeline.artifact import (
    Artifact,
    Candidate,
    rank_candidates,
    select_best_candidate,
    select_ranking_metrics,
)
from raysweep.pipeline.promote import PromoteStage
from raysweep.pipeline.register import RegisterStage
from raysweep.pipeline.stage import (
    StageFailed,
    TrainingOverrides,
    UpstreamResults,
    describe_evaluated_threat_conflict,
    find_best_candidate_evaluation,
)
from raysweep.spec import SpecError
from raysweep.training.config import build_training_config


def promote(pool: list[Candidate], **settings) -> list[str]:
    return [c.label for c in PromoteStage(**settings).select_candidates(tuple(pool))]


def test_the_best_are_promoted_best_first() -> None:
    pool = [
        build_candidate(name, score)
        for name, score in (("a", 0.3), ("b", 0.5), ("c", 0.4), ("d", 0.2))
    ]
    assert promote(pool) == ["b", "c"], "two by default"
    assert promote(pool, top=1) == ["b"] and promote(pool, top=3) == ["b", "c", "a"]
    assert promote(pool, top=9) == ["b", "c", "a", "d"]
    assert promote(pool[::-1], top=3) == ["b", "c", "a"]


def test_candidates_with_equal_scores_keep_the_order_of_the_pool() -> None:
    pool = [
        build_candidate(name, score)
        for name, score in (("a", 0.4), ("b", 0.5), ("c", 0.5), ("d", 0.4))
    ]
    assert promote(pool, top=3) == ["b", "c", "a"]
    assert promote(pool[::-1], top=3) == ["c", "b", "d"]


def test_a_candidate_without_the_metric_comes_last() -> None:
    pool = [build_candidate("none"), build_candidate("low", 0.0), build_candidate("high", 0.1)]
    assert promote(pool, top=3) == ["high", "low", "none"]


def test_the_gap_may_be_as_large_as_the_limit() -> None:
    """0.05 is what `max_masking_gap: 0.05` allows; a candidate whose gap is not known counts as
    within it.
    """
    pool = [
        build_candidate("at", 0.3, gap=0.05),
        build_candidate("over", 0.9, gap=0.0500001),
        build_candidate("below", 0.2, gap=0.049),
        build_candidate("unknown", 0.1),
    ]
    assert promote(pool, top=9, max_masking_gap=0.05) == ["at", "below", "unknown"]
    assert promote(pool, top=9) == ["over", "at", "below", "unknown"]
    assert promote(pool[3:], max_masking_gap=0.0) == ["unknown"]
    none = build_candidate("none", 0.5, gap=0.0)
    assert promote([none, *pool], top=9, max_masking_gap=0.0) == ["none", "unknown"], (
        "0 is a limit too, and a gap of 0 is within it"
    )
    with pytest.raises(
        StageFailed, match=r"each of 1 candidates has a masking gap over 0.05: nothing is promoted"
    ):
        promote(pool[1:2], max_masking_gap=0.05)


def test_a_candidate_that_its_sweep_calls_masked_comes_last() -> None:
    pool = [
        build_candidate("masked", 0.9, masked=True),
        build_candidate("a", 0.2),
        build_candidate("b", 0.3),
    ]
    assert promote(pool, top=3) == ["b", "a", "masked"]
    assert promote(pool, top=2) == ["b", "a"]
    assert promote(pool[:1], top=2) == ["masked"], "it is promoted where there is no other"


def test_the_best_of_each_method_are_promoted() -> None:
    scores = {
        "a": ("at", 0.5),
        "b": ("at", 0.6),
        "c": ("lrat", 0.1),
        "d": ("lrat", 0.2),
        "e": ("at", 0.7),
    }
    pool = [build_candidate(name, score, method=method) for name, (method, score) in scores.items()]
    assert promote(pool, top=1, each=True) == ["e", "d"]
    assert promote(pool, top=2, each=True) == ["e", "b", "d", "c"]
    assert promote(pool, top=3, each=True) == ["e", "b", "a", "d", "c"]
    assert promote(pool, top=2) == ["e", "b"], "without `each` the methods compete"


def build_two_objective_candidate(name: str, pgd: float, clean: float, **more) -> Candidate:
    return build_candidate(
        name, pgd=pgd, clean=clean, objectives=("pgd", "clean"), method="at", **more
    )


def test_the_pareto_set_is_the_candidates_that_no_other_beats() -> None:
    pool = [
        build_two_objective_candidate("clean", 0.1, 0.9),
        build_two_objective_candidate("middle", 0.3, 0.8),
        build_two_objective_candidate("worse in one", 0.3, 0.7),
        build_two_objective_candidate("worse in both", 0.2, 0.6),
        build_two_objective_candidate("robust", 0.5, 0.2),
        build_two_objective_candidate("as robust, less clean", 0.5, 0.1),
    ]
    assert promote(pool, pareto=True) == ["robust", "middle", "clean"], (
        "first objective first, `top` does not count"
    )
    twins = [
        build_two_objective_candidate("one", 0.4, 0.4),
        build_two_objective_candidate("other", 0.4, 0.4),
        build_two_objective_candidate("beaten", 0.4, 0.3),
    ]
    assert promote(twins, pareto=True) == ["one", "other"], (
        "equal candidates do not beat each other"
    )
    masked = [
        build_two_objective_candidate("masked", 0.9, 0.9, masked=True),
        build_two_objective_candidate("fit", 0.1, 0.1),
    ]
    assert promote(masked, pareto=True) == ["fit"]


def test_the_pareto_set_of_each_method() -> None:
    pool = [
        build_two_objective_candidate("a", 0.5, 0.5),
        build_two_objective_candidate("b", 0.1, 0.1),
        build_two_objective_candidate("c", 0.2, 0.2).model_copy(update={"method": "lrat"}),
    ]
    assert promote(pool, pareto=True) == ["a"]
    assert promote(pool, pareto=True, each=True) == ["a", "c"]


def test_one_space_is_ranked_by_its_metric_and_several_by_the_default() -> None:
    by_clean = [build_candidate("a", 0.1, clean=0.9, objectives=("clean",)) for _ in range(2)]
    by_both = build_candidate("b", 0.5, clean=0.1, objectives=("pgd", "clean"))
    assert select_ranking_metrics(by_clean) == ("clean",) and select_ranking_metrics([by_both]) == (
        "pgd",
        "clean",
    )
    assert (
        select_ranking_metrics([*by_clean, by_both])
        == ("robust_worst",)
        == select_ranking_metrics([])
    )


def test_the_candidate_that_validation_prefers() -> None:
    best, last = build_candidate("a", 0.4), build_candidate("a", 0.6, which="last")
    assert select_best_candidate((best, last)) == best, (
        "the best epoch was chosen on validation, the last was not"
    )
    assert select_best_candidate((last,)) == last
    seeds = [build_candidate("a", 0.4, seed=seed) for seed in (2, 0, 1)]
    assert select_best_candidate(tuple(seeds)).seed == 0
    better = build_candidate("b", 0.41, seed=9)
    assert select_best_candidate((*seeds, better)) == better
    masked = build_candidate("c", 0.9, masked=True)
    assert (
        select_best_candidate((masked, *seeds)) == seeds[1]
        and select_best_candidate((masked,)) == masked
    )


def build_artifact(kind: str, *candidates: Candidate, judged=()) -> Artifact:
    return Artifact(
        kind=kind, key="k", stage={}, inputs=(), candidates=candidates, evaluations=tuple(judged)
    )


def test_tune_and_train_add_to_the_pool_and_promote_replaces_it() -> None:
    a, b, c, d = (build_candidate(name, 0.1) for name in "abcd")
    past = UpstreamResults(
        (
            build_artifact("tune", a, b),
            build_artifact("train", c),
            build_artifact("promote", b),
            build_artifact("autoattack"),
            build_artifact("train", d),
        )
    )
    assert [x.label for x in past.candidates] == ["b", "d"]
    assert [x.label for x in UpstreamResults(past.artifacts[:2]).candidates] == ["a", "b", "c"]
    assert UpstreamResults().candidates == () and UpstreamResults().evaluations == ()


def test_only_verdicts_on_promoted_candidates_count() -> None:
    a, b = build_candidate("a", 0.1), build_candidate("b", 0.2)
    judged = [build_evaluation_result(a, 0.5), build_evaluation_result(b, 0.4)]
    past = UpstreamResults(
        (
            build_artifact("tune", a, b),
            build_artifact("autoattack", judged=judged),
            build_artifact("promote", b),
        )
    )
    assert [j.candidate.label for j in past.evaluations] == ["b"]


def test_the_verdict_is_on_the_chosen_candidate_and_autoattack_comes_first() -> None:
    """The chosen candidate is the one with the better validation, though the other is better on the
    test set.
    """
    a, b = build_candidate("a", 0.3), build_candidate("b", 0.2)
    judged = [
        build_evaluation_result(b, 0.9),
        build_evaluation_result(a, 0.5, attack="PGD", standard=False),
        build_evaluation_result(a, 0.4, attack="AA"),
        build_evaluation_result(a, 0.6, attack="CW", standard=False),
    ]
    past = UpstreamResults(
        (build_artifact("tune", a, b), build_artifact("autoattack", judged=judged))
    )
    assert (
        find_best_candidate_evaluation(past).candidate,
        find_best_candidate_evaluation(past).robust,
    ) == (a, 0.4)
    assert find_best_candidate_evaluation(past, "PGD").robust == 0.5
    without = UpstreamResults(
        (build_artifact("tune", a, b), build_artifact("autoattack", judged=[judged[1], judged[3]]))
    )
    assert find_best_candidate_evaluation(without).attack == "CW", (
        "without AutoAttack, the last attack counts"
    )
    with pytest.raises(StageFailed, match="a, seed 0, best epoch was not evaluated"):
        find_best_candidate_evaluation(
            UpstreamResults(
                (build_artifact("tune", a, b), build_artifact("autoattack", judged=judged[:1]))
            )
        )


NOTHING = TrainingOverrides({}, {})


def test_the_trainings_of_a_promotion_are_known_beforehand() -> None:
    """2 seeds of the best 2, 30 epochs each: the epochs in total are shared among the methods that
    may be promoted.
    """
    before = [
        build_training_config("at"),
        build_training_config("lrat"),
        build_training_config("at", {"seed": 3}),
    ]
    trainings = PromoteStage(top=2, seeds=(0, 1), set={"epochs": 30}).plan_trainings(
        NOTHING, before
    )
    assert [t.config.method.name for t in trainings] == ["at", "lrat"], (
        "runs that differ only in the seed count as one"
    )
    assert [(t.concurrency, t.total_epochs) for t in trainings] == [(2, 30 * 4 / 2)] * 2
    each = PromoteStage(top=1, per_method=True, set={"epochs": 30}).plan_trainings(NOTHING, before)
    assert [(t.concurrency, t.total_epochs) for t in each] == [(1, 30.0)] * len(each)
    assert [
        t.total_epochs
        for t in PromoteStage(pareto=True, seeds=(1,)).plan_trainings(NOTHING, before)
    ] == [None, None]
    assert PromoteStage().plan_trainings(NOTHING, before) == [], (
        "without seeds or settings nothing is trained again"
    )
    with pytest.raises(SpecError) as error:
        PromoteStage(set={"epochz": 3}).plan_trainings(NOTHING, before)
    assert error.value.problems == ["set: no setting 'epochz'; nearest: epochs"], (
        "the line appears once, not for each run"
    )


def test_what_promotion_says_of_itself() -> None:
    assert PromoteStage().describe_stage(NOTHING) == "the best 2 on validation"
    assert (
        PromoteStage(top=1, per_method=True).describe_stage(NOTHING)
        == "the best 1 of each method on validation"
    )
    assert PromoteStage(pareto=True, seeds=(0, 1)).describe_stage(NOTHING) == (
        "the Pareto set on validation, trained again with the same settings and seeds [0, 1]"
    )
    again = PromoteStage(set={"epochs": 30, "optim.lr": 0.1})
    assert again.describe_stage(TrainingOverrides({}, {"epochs": 5})) == (
        "the best 2 on validation, trained again with {'epochs': 5, 'optim.lr': 0.1}"
    )


def test_candidates_of_different_threats_are_not_promoted() -> None:
    """Known only when the trials have run; with `per_method` those of one method are compared."""
    at = build_candidate("at", 0.4, threat="Linf eps 0.15")
    gairat = build_candidate("gairat", 0.9, threat="Linf eps 0.1")
    message = (
        "candidates of different threat models cannot be ranked: Linf eps 0.15 (at); "
        "Linf eps 0.1 (gairat); nothing is promoted"
    )
    with pytest.raises(StageFailed) as caught:
        PromoteStage(top=1).select_candidates((at, gairat))
    assert caught.value.problems == [message] and caught.value.exit_code == 1
    assert len(PromoteStage(top=1, per_method=True).select_candidates((at, gairat))) == 2
    of_0_1 = build_candidate("lrat", 0.5)
    assert PromoteStage(top=1).select_candidates((at, of_0_1)) == [of_0_1], "an unknown threat"


def test_candidates_attacked_under_different_threats_are_not_registered() -> None:
    """One candidate under two radii is one candidate."""
    a, b = build_candidate("a", 0.3), build_candidate("b", 0.2)
    mixed = [build_evaluation_result(a, 0.5), build_evaluation_result(b, 0.6, eps=0.031)]
    assert describe_evaluated_threat_conflict(mixed) == "Linf eps 0.03137 (a); Linf eps 0.031 (b)"
    past = UpstreamResults(
        (build_artifact("tune", a, b), build_artifact("autoattack", judged=mixed))
    )
    with pytest.raises(StageFailed) as caught:
        RegisterStage(name="n").run_stage(None, past)
    assert caught.value.problems == [
        "candidates of different threat models cannot be ranked: Linf eps 0.03137 (a); "
        "Linf eps 0.031 (b); nothing is registered"
    ]
    both = [
        build_evaluation_result(one, 0.5, eps=eps, attack=f"at {eps}")
        for one in (a, b)
        for eps in (0.031, 0.02)
    ]
    assert describe_evaluated_threat_conflict(both) == ""


def test_candidates_chosen_on_test_images_come_last() -> None:
    """Their scores are those of the test images, which decide nothing."""
    ours = build_candidate("GAIRAT", 0.4)
    theirs = build_candidate("GAIRAT (protocol: paper)", 0.9, selection_split="test")
    assert rank_candidates((theirs, ours)) == [ours, theirs]
    assert select_best_candidate((theirs, ours)) == ours
    assert select_best_candidate((theirs,)) == theirs
