"""Paired statistics by known answers."""

import itertools

import numpy as np
import pytest
from scipy import stats

from umamba.evaluation.statistics import (
    bootstrap_interval,
    compare_paired,
    compare_summaries,
    holm,
    seed_spread,
    wilcoxon_p,
)


def summary_of(values: dict[str, dict[str, float | None]]) -> dict:
    labels = next(iter(values.values())).keys()
    return {
        "mean": {label: {} for label in labels},
        "metric_per_case": [
            {"case": case, "metrics": {label: {"Dice": dice} for label, dice in row.items()}}
            for case, row in values.items()
        ],
    }


def test_holm_gives_the_textbook_answer() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_five_gains_have_the_exact_p_of_one_sixteenth() -> None:
    assert wilcoxon_p(np.array([0.1, 0.2, 0.3, 0.4, 0.5])) == pytest.approx(2 / 32)


def test_exact_p_equals_the_count_over_all_signs_with_ties_and_zeros() -> None:
    differences = np.array([0.0, 0.1, -0.1, 0.3, 0.3, 0.0, 0.5])
    ranks = stats.rankdata(np.abs(differences))
    observed = abs((np.sign(differences) * ranks).sum())
    sums = [
        abs(sum(s * r for s, r in zip(signs, ranks[differences != 0], strict=True)))
        for signs in itertools.product((-1, 1), repeat=5)
    ]
    expected = np.mean([value >= observed - 1e-9 for value in sums])
    assert wilcoxon_p(differences) == pytest.approx(expected)


def test_many_cases_agree_with_scipy() -> None:
    differences = np.random.default_rng(0).normal(0.2, 1.0, 40)
    expected = stats.wilcoxon(differences, method="approx").pvalue
    assert wilcoxon_p(differences) == pytest.approx(expected)


def test_no_difference_at_all_is_no_evidence() -> None:
    assert wilcoxon_p(np.zeros(9)) == 1.0
    assert wilcoxon_p(np.zeros(90)) == 1.0


def test_bootstrap_interval_matches_the_standard_error_and_is_repeatable() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = bootstrap_interval(values, seed=5)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert bootstrap_interval(values, seed=5) == (low, high)
    assert bootstrap_interval(values, seed=6) != (low, high)


def test_paired_comparison_counts_wins_on_the_common_cases_only() -> None:
    a = {"a": 0.5, "b": 0.6, "c": 0.7, "only_a": 0.9}
    b = {"a": 0.6, "b": 0.6, "c": 0.6, "d": 0.1}
    result = compare_paired(a, b, "1")
    assert (result.n, result.n_left_out) == (3, 2)
    assert (result.wins, result.ties, result.losses) == (1, 1, 1)
    assert result.difference == pytest.approx(0.0)
    assert result.detectable == pytest.approx(2.8 * 0.1 / 3**0.5)
    flipped = compare_paired(a, b, "1", higher_is_better=False)
    assert (flipped.wins, flipped.losses) == (1, 1)


def test_summaries_are_compared_by_label_with_holm_and_without_undefined_cases() -> None:
    generator = np.random.default_rng(2)
    rows_a = {f"case_{i}": {"1": generator.uniform(), "2": generator.uniform()} for i in range(15)}
    rows_b = {case: {"1": r["1"] + 0.1, "2": r["2"]} for case, r in rows_a.items()}
    rows_b["case_3"]["2"] = None
    overall, first, second = compare_summaries(summary_of(rows_a), summary_of(rows_b))
    assert overall.name == "mean"
    assert first.difference == pytest.approx(0.1)
    assert first.wins == 15
    assert first.p_holm == pytest.approx(2 * first.p_wilcoxon)
    assert (second.n, second.n_left_out, second.ties) == (14, 1, 14)
    assert second.p_holm == 1.0


def test_summaries_without_a_common_case_are_refused() -> None:
    with pytest.raises(ValueError, match="no case in common"):
        compare_summaries(summary_of({"a": {"1": 0.5}}), summary_of({"b": {"1": 0.5}}))


def test_seed_spread_of_three_seeds_is_known() -> None:
    spread = seed_spread([0.80, 0.82, 0.84])
    assert spread.mean == pytest.approx(0.82)
    assert spread.std == pytest.approx(0.02)
    assert spread.interval[1] == pytest.approx(0.82 + 4.302653 * 0.02 / 3**0.5)
    with pytest.raises(ValueError, match="at least two"):
        seed_spread([0.8])
