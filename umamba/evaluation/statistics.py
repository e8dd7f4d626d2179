"""Paired statistics of two evaluations on the same cases, and the spread over seeds.

The unit of every test is the case: voxels and classes of one case are not independent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from umamba.evaluation.tables import mean_per_case, values_per_case

N_BOOTSTRAP = 10_000


@dataclass(frozen=True)
class PairedComparison:
    """Difference b - a over the cases that both define; p is two-sided."""

    name: str
    n: int
    n_left_out: int
    mean_a: float
    mean_b: float
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

    n_seeds: int
    mean: float
    std: float
    minimum: float
    maximum: float
    interval: tuple[float, float]


def compare_summaries(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    metric: str = "Dice",
    *,
    higher_is_better: bool | None = None,
    n_bootstrap: int = N_BOOTSTRAP,
    seed: int = 0,
) -> list[PairedComparison]:
    """Compares two summaries label by label, p adjusted by Holm over the labels.

    The first row, "mean", compares the mean over the labels per case; it is one test of its own and
    no part of the adjustment. Labels that only one summary knows are left out. Raises ValueError
    when the summaries share no case.
    """
    if higher_is_better is None:
        higher_is_better = metric not in ("HD95", "ASSD")
    options = {"n_bootstrap": n_bootstrap, "seed": seed}
    overall = compare_paired(
        mean_per_case(a, metric), mean_per_case(b, metric), "mean", higher_is_better, **options
    )
    rows = []
    for label in a["mean"]:
        left, right = values_per_case(a, label, metric), values_per_case(b, label, metric)
        if label != "0" and set(left) & set(right):
            rows.append(compare_paired(left, right, label, higher_is_better, **options))
    adjusted = holm([row.p_wilcoxon for row in rows])
    return [
        overall,
        *(
            PairedComparison(**{**vars(row), "p_holm": p})
            for row, p in zip(rows, adjusted, strict=True)
        ),
    ]


def compare_paired(
    a: Mapping[str, float],
    b: Mapping[str, float],
    name: str = "",
    higher_is_better: bool = True,
    *,
    n_bootstrap: int = N_BOOTSTRAP,
    seed: int = 0,
) -> PairedComparison:
    """Compares the values of the cases that a and b share; a win is a case where b is better.

    interval: percentile bootstrap over cases, 95 %. p: Wilcoxon's signed-rank test. detectable: the
    difference that this many cases show in 80 % of experiments, 2.8 x SD / sqrt(n).
    """
    cases = sorted(set(a) & set(b))
    if not cases:
        raise ValueError(f"{name or 'the two evaluations'}: no case in common; compare equal cases")
    left, right = (np.array([values[case] for case in cases]) for values in (a, b))
    difference = right - left
    better = difference if higher_is_better else -difference
    p = wilcoxon_p(difference)
    n = len(cases)
    return PairedComparison(
        name=name,
        n=n,
        n_left_out=len(set(a) | set(b)) - n,
        mean_a=float(left.mean()),
        mean_b=float(right.mean()),
        difference=float(difference.mean()),
        interval=bootstrap_interval(difference, n_bootstrap=n_bootstrap, seed=seed),
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
    differences = np.asarray(differences, dtype=float)
    if not differences.any():
        return 1.0
    ranks = stats.rankdata(np.abs(differences))[differences != 0]
    signs = np.sign(differences[differences != 0])
    if len(ranks) <= 12:
        every = 1 - 2 * (np.arange(2 ** len(ranks))[:, None] >> np.arange(len(ranks)) & 1)
        statistic = np.abs(every @ ranks)
        return float((statistic >= abs(signs @ ranks) - 1e-9).mean())
    return float(stats.wilcoxon(differences, zero_method="pratt", method="approx").pvalue)


def bootstrap_interval(
    values: np.ndarray,
    *,
    confidence: float = 0.95,
    n_bootstrap: int = N_BOOTSTRAP,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the percentile interval of the mean, cases drawn with replacement."""
    values = np.asarray(values, dtype=float)
    generator = np.random.default_rng(seed)
    means = np.empty(n_bootstrap)
    # in blocks, because all draws of a large set at once would take gigabytes
    block = max(1, 4_000_000 // len(values))
    for start in range(0, n_bootstrap, block):
        size = min(block, n_bootstrap - start)
        drawn = generator.integers(0, len(values), (size, len(values)))
        means[start : start + size] = values[drawn].mean(axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns Holm's step-down adjustment of the p values, in their order."""
    order = np.argsort(p_values, kind="stable")
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * float(p_values[index])))
        adjusted[int(index)] = running
    return adjusted


def seed_spread(means: Sequence[float]) -> SeedSpread:
    """Returns the spread of one figure (a mean Dice) over trainings that differ in seed only.

    Raises ValueError for fewer than two seeds: one training says nothing of the spread.
    """
    if len(means) < 2:
        raise ValueError(f"{len(means)} seed given; the spread needs at least two trainings")
    values = np.asarray(means, dtype=float)
    std = float(values.std(ddof=1))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * std / len(values) ** 0.5
    mean = float(values.mean())
    return SeedSpread(
        len(values), mean, std, float(values.min()), float(values.max()), (mean - half, mean + half)
    )
