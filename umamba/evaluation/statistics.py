"""Paired statistics of two evaluations on the same cases, and the spread over seeds.

The unit of every test is the case: voxels and classes of one case are not independent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from umamba.evaluation.tables import mean_per_case, values_per_case

_N_BOOTSTRAP = 10_000


@dataclass(frozen=True)
class PairedComparison:
    """Difference b - a over the cases that both define; a win is a case where b is better.

    interval: percentile bootstrap over cases, 95 %. p_wilcoxon: two-sided, p_holm: adjusted over
    the labels. detectable: the difference that n cases show in 80 % of experiments, 2.8 x SD /
    sqrt(n).
    """

    name: str
    n: int
    n_left_out: int
    difference: float
    interval: tuple[float, float]
    p_wilcoxon: float
    p_holm: float
    wins: int
    ties: int
    losses: int
    detectable: float


@dataclass(frozen=True)
class SeedSpread:
    """Spread of a mean over repeated trainings; interval is Student's t at 95 %."""

    mean: float
    std: float
    interval: tuple[float, float]


def compare_summaries(
    a: Mapping[str, Any], b: Mapping[str, Any], metric: str = "Dice"
) -> list[PairedComparison]:
    """Compares two summaries label by label, p adjusted by Holm over the labels.

    The first row, "mean", compares the mean over the labels per case; it is one test of its own and
    no part of the adjustment. Labels that only one summary knows are left out. Raises ValueError
    when the summaries share no case.
    """
    higher_is_better = metric not in ("HD95", "ASSD")
    means = mean_per_case(a, metric), mean_per_case(b, metric)
    overall = compare_paired(*means, "mean", higher_is_better)
    rows = []
    for label in a["mean"]:
        left, right = values_per_case(a, label, metric), values_per_case(b, label, metric)
        if label != "0" and left.keys() & right.keys():
            rows.append(compare_paired(left, right, label, higher_is_better))
    adjusted = holm([row.p_wilcoxon for row in rows])
    return [overall, *(replace(row, p_holm=p) for row, p in zip(rows, adjusted, strict=True))]


def compare_paired(
    a: Mapping[str, float], b: Mapping[str, float], name: str, higher_is_better: bool = True
) -> PairedComparison:
    """Compares the values of the cases that a and b share; ValueError when there is none."""
    cases = sorted(a.keys() & b.keys())
    if not cases:
        raise ValueError(f"{name}: no case in common; compare equal cases")
    n = len(cases)
    difference = np.array([b[case] - a[case] for case in cases])
    better = difference if higher_is_better else -difference
    p = wilcoxon_p(difference)
    return PairedComparison(
        name=name,
        n=n,
        n_left_out=len(a.keys() | b.keys()) - n,
        difference=float(difference.mean()),
        interval=bootstrap_interval(difference),
        p_wilcoxon=p,
        p_holm=p,
        wins=int((better > 0).sum()),
        ties=int((better == 0).sum()),
        losses=int((better < 0).sum()),
        detectable=2.8 * float(difference.std(ddof=1)) / n**0.5 if n > 1 else float("nan"),
    )


def wilcoxon_p(differences: np.ndarray) -> float:
    """Returns the two-sided p of the signed-rank test, cases without a difference by Pratt's rule.

    Pratt ranks the zeros with the others and then drops them, so that many equal cases weaken the
    evidence; dropping them first would not. All zero -> 1. Up to 12 cases every assignment of
    signs is counted, which is exact with ties and zeros; beyond, the normal approximation serves.
    """
    unequal = differences != 0
    if not unequal.any():
        return 1.0
    ranks = stats.rankdata(np.abs(differences))[unequal]
    if len(ranks) > 12:
        return float(stats.wilcoxon(differences, zero_method="pratt", method="approx").pvalue)
    every = 1 - 2 * (np.arange(2 ** len(ranks))[:, None] >> np.arange(len(ranks)) & 1)
    observed = abs(np.sign(differences[unequal]) @ ranks)
    return float((np.abs(every @ ranks) >= observed - 1e-9).mean())


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Returns the percentile interval of the mean at 95 %, cases drawn with replacement."""
    generator = np.random.default_rng(seed)
    # in blocks, because all draws of a large set at once would take gigabytes
    block = max(1, 4_000_000 // len(values))
    sizes = [min(block, _N_BOOTSTRAP - start) for start in range(0, _N_BOOTSTRAP, block)]
    draws = (generator.integers(0, len(values), (size, len(values))) for size in sizes)
    means = np.concatenate([values[drawn].mean(axis=1) for drawn in draws])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns Holm's step-down adjustment of the p values, in their order."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.sort(p_values) * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(p) for p in adjusted]


def seed_spread(means: Sequence[float]) -> SeedSpread:
    """Returns the spread of one figure (a mean Dice) over trainings that differ in seed only.

    Raises ValueError for fewer than two seeds: one training says nothing of the spread.
    """
    n = len(means)
    if n < 2:
        raise ValueError(f"{n} seed given; the spread needs at least two trainings")
    mean, std = float(np.mean(means)), float(np.std(means, ddof=1))
    half = float(stats.t.ppf(0.975, n - 1)) * std / n**0.5
    return SeedSpread(mean, std, (mean - half, mean + half))
