"""The analysis plan on made-up studies whose truth is known: how often it errs, and where.

Each rate is a share of 1,000 studies, so three standard errors around 5% are 2.1%.
"""

from itertools import permutations, product

import numpy as np
import pandas as pd
import pytest

from seqgan.evaluation.statistics import LEVEL, page_test, sign_flip, t_quantile, t_test
from seqgan.study.claims import CLAIMS, GENERATION, LAYERS, RECONSTRUCTION, margin
from seqgan.study.simulation import (
    as_measurements,
    judge_simulated,
    null_world,
    paper_world,
    simulate,
)
from seqgan.study.verdicts import HOLDS, REFUTED, UNDECIDED, UNTESTED, evidence, judge

STUDIES = 1000
BY_ID = {claim.id: claim for claim in CLAIMS}


def at_most(rate, nominal):
    "Whether a share of 1,000 studies can have come from a probability of `nominal` at most."
    return rate <= nominal + 3 * (nominal * (1 - nominal) / STUDIES) ** 0.5


def combined(claim, values):
    "The p-values of a claim before Holm's correction."
    return np.max([evidence(comparison, values).p for comparison in BY_ID[claim].comparisons], 0)


@pytest.mark.parametrize("seeds", [3, 4, 8])
@pytest.mark.parametrize("correlation", [0.0, 0.9])
@pytest.mark.parametrize("tails", [0, 3], ids=["normal", "heavy"])
def test_nothing_is_found_where_there_is_nothing(seeds, correlation, tails):
    values = simulate(null_world(), seeds, STUDIES, 0.05, correlation, tails, seed=100 + seeds)
    for claim in BY_ID:
        assert at_most((combined(claim, values) <= LEVEL).mean(), LEVEL), claim
    decided = np.stack(list(judge_simulated(values).values()))
    assert at_most((decided == HOLDS).any(0).mean(), LEVEL)


HALF_RECONSTRUCTION = {(RECONSTRUCTION, row, ""): 0.5 for row in LAYERS}
HALF_GENERATION = {(GENERATION, row, c): 0.5 for row in LAYERS[1:] for c in ("AR", "NAR")}
# One comparison of the claim is false and the others are true: the worst case of a test of "and".
ONE_FALSE = {
    "C3": {(RECONSTRUCTION, "alpha 0.4", ""): 0.5, (RECONSTRUCTION, "alpha 1", ""): 0.5},
    "C6": HALF_RECONSTRUCTION | HALF_GENERATION,
    "C7": {(RECONSTRUCTION, "D", ""): 0.5},
    "C8": {("usage", "entropy", ""): 1.0, (RECONSTRUCTION, "no regularisation", ""): 2.0},
    "C9": {
        (RECONSTRUCTION, "factorised and normalised", ""): 0.5,
        (GENERATION, "no regularisation", "AR"): 0.5,
        (GENERATION, "k-means", "AR"): 0.5,
    },
}


@pytest.mark.parametrize("claim", ONE_FALSE)
def test_the_worst_case_of_and(claim):
    "At the nominal rate, neither above nor far below: it is the worst case."
    values = simulate(null_world() | ONE_FALSE[claim], 4, STUDIES, seed=7)
    rate = (combined(claim, values) <= LEVEL).mean()
    assert at_most(rate, LEVEL) and rate > LEVEL / 2


def test_true_claims_do_not_help_false_ones():
    "Holm's correction holds in the strong sense: C2, C5 and C11 are true, the others are not."
    true = {"C2", "C5", "C11"}
    lower = {
        (GENERATION, row, column): 1 - 0.06 * step
        for step, row in enumerate(LAYERS)
        for column in ("AR", "NAR")
    }
    lower[GENERATION, "phase 2", "NAR"] = 0.5
    lower[GENERATION, "phase 2", "AR"] = 0.9  # C10's mean over both is that of phase one, 0.7
    values = simulate(null_world() | lower, 8, STUDIES, 0.05, seed=8)
    decided = judge_simulated(values)
    for claim in true:
        assert (decided[claim] == HOLDS).mean() > 0.95, claim
    false = [decided[claim] == HOLDS for claim in BY_ID if claim not in true]
    assert at_most(np.any(false, 0).mean(), LEVEL)


@pytest.mark.parametrize("seeds", [3, 8])
def test_a_true_claim_is_seldom_refuted(seeds):
    "An effect of exactly the margin, the smallest that matters, is refuted in 2.5% of studies."
    smallest = margin(BY_ID["C2"].comparisons[0])
    means = {(GENERATION, "alpha 1", column): 1 - smallest for column in ("AR", "NAR")}
    decided = judge_simulated(simulate(null_world() | means, seeds, STUDIES, 0.05, seed=9))["C2"]
    rate = (decided == REFUTED).mean()
    assert at_most(rate, 0.025) and rate > 0.01


def test_what_is_there_is_found():
    "More often the more seeds there are; with little noise always; a null effect is refuted."
    found = [
        (judge_simulated(simulate(paper_world(), n, STUDIES, 0.05, seed=n))["C2"] == HOLDS).mean()
        for n in (3, 4, 8)
    ]
    assert found == sorted(found) and found[-1] > 0.95
    decided = judge_simulated(simulate(paper_world(), 8, STUDIES, 0.005))
    assert all((verdict == HOLDS).mean() > 0.99 for verdict in decided.values())
    decided = judge_simulated(simulate(null_world(), 8, STUDIES, 0.005))
    assert all((verdict == REFUTED).mean() > 0.99 for verdict in decided.values())


def test_premises_and_noise_leave_claims_open():
    without = judge_simulated(simulate({}, 4, STUDIES, seed=10))
    for claim in CLAIMS:
        share = (without[claim.id] == UNTESTED).mean()
        assert share > 0.9 if claim.premise else share == 0, claim.id
    noisy = judge_simulated(simulate(null_world(), 3, STUDIES, noise=0.1, seed=11))
    assert (noisy["C2"] == UNDECIDED).mean() > 0.8


def test_the_table_agrees_with_the_arrays():
    "A study read from a shuffled table has the verdicts that it has among many."
    values = simulate(paper_world(), 4, 20, 0.06, seed=12)
    many = judge_simulated(values)
    for study in range(20):
        tidy = as_measurements(values, study).sample(frac=1, random_state=study)
        single = judge(tidy).set_index("claim").verdict
        assert single.to_dict() == {name: verdict[study] for name, verdict in many.items()}


def test_scale_and_sign():
    "Other units change nothing; a claim that holds is refuted where its ends are exchanged."
    tidy = as_measurements(simulate(paper_world(), 8, 1, 0.01, seed=13))
    verdict = judge(tidy).set_index("claim").verdict
    larger = tidy.assign(value=tidy.value * np.where(tidy.metric == "usage", 1, 1000))
    assert judge(larger).set_index("claim").verdict.to_dict() == verdict.to_dict()
    exchanged = tidy.replace({"row": {"alpha 0": "alpha 1", "alpha 1": "alpha 0"}})
    premise = tidy.metric == "L_sem"
    exchanged = pd.concat([exchanged[~premise], tidy[premise]])
    other = judge(exchanged).set_index("claim").verdict
    assert (verdict["C2"], other["C2"], other["C4"]) == (HOLDS, REFUTED, REFUTED)


def twice_the_ranks(row):
    "Of one seed, the largest value first; ties in the middle."
    return [2 * (row > value).sum() + (row == value).sum() for value in row]


@pytest.mark.parametrize("n, k", [(1, 4), (2, 4), (3, 3), (5, 2)])
def test_page_against_every_arrangement(n, k):
    "The share of all (k!)^n arrangements whose statistic is at least as large, ties included."
    rng = np.random.default_rng(n)
    for values in (rng.normal(size=(n, k)), rng.integers(0, 3, (n, k)).astype(float)):
        ranks = [twice_the_ranks(row) for row in values]
        each = [[np.dot(p, range(k)) for p in permutations(row)] for row in ranks]
        totals = np.array([sum(choice) for choice in product(*each)])
        observed = sum(np.dot(row, range(k)) for row in ranks)
        assert page_test(values) == pytest.approx((totals >= observed - 1e-9).mean())


def test_sign_flips_against_every_choice():
    effects = np.random.default_rng(0).normal(0.3, 1, size=7)
    sums = [np.dot(signs, effects) for signs in product((1, -1), repeat=7)]
    assert sign_flip(effects) == pytest.approx(np.mean(np.array(sums) >= effects.sum() - 1e-12))
    assert sign_flip(np.ones(20)) == pytest.approx(1 / 4096)  # random choices, the first all plus


def test_student_t_against_drawn_values():
    "Quantiles of the ratio that defines t, and of the test on normal values."
    rng = np.random.default_rng(1)
    for df in (2, 3, 7):
        ratio = rng.normal(size=400_000) / np.sqrt(rng.chisquare(df, 400_000) / df)
        assert (ratio > t_quantile(0.95, df)).mean() == pytest.approx(0.05, abs=0.002)
        p = t_test(rng.normal(size=(100_000, df + 1)))
        assert (p <= 0.1).mean() == pytest.approx(0.1, abs=0.004)
