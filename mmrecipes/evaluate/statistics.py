"""Shares with intervals, paired comparisons, and how many questions a comparison needs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmrecipes.errors import UserError


@dataclass(frozen=True)
class Share:
    """A proportion with its 95% Wilson interval. `value`, `low`, `high` in [0, 1]."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}] n={self.n}"


@dataclass(frozen=True)
class Paired:
    """Two variants on the same questions. `points` = 100 x (accuracy of b - accuracy of a), with a 95% bootstrap interval."""

    points: float
    low: float
    high: float
    lost: int  # a right, b wrong
    won: int  # a wrong, b right
    p_value: float  # McNemar, exact
    n: int

    def __str__(self) -> str:
        points = f"{self.points:+.1f} points [{self.low:+.1f}, {self.high:+.1f}]"
        return f"{points}, {self.lost} lost, {self.won} won, p={self.p_value:.2g}"


def wilson(right: int, n: int, z: float = 1.96) -> Share:
    """The proportion `right / n` with its 95% interval (Wilson 1927), which stays inside [0, 1] near the ends.
    >>> print(wilson(95, 100))
    95.0% [88.8, 97.8] n=100
    """
    if n < 1 or not 0 <= right <= n:
        raise UserError(f"wilson: {right} right of {n}; expected 0 <= right <= n and n >= 1")
    p, zz = right / n, z * z
    centre, half = (p + zz / (2 * n)) / (1 + zz / n), z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n)) / (1 + zz / n)
    return Share(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), n)  # p = 0 or 1: no rounding past it


def clustered(hits: Sequence[int], totals: Sequence[int]) -> Share:
    """A proportion over all, with a Wilson interval for as many independent draws as the spread between clusters leaves.
    Korn and Graubard 1998 (effective sample size). Without any spread, each cluster counts as one draw.
    >>> print(clustered([9, 1], [10, 10]))
    50.0% [7.8, 92.2] n=20
    """
    n, groups = sum(totals), len(totals)
    p = sum(hits) / n
    spread = sum((h - p * t) ** 2 for h, t in zip(hits, totals, strict=True)) * groups / max(1, groups - 1) / n**2
    draws = min(n, p * (1 - p) / spread) if spread else groups
    found = wilson(p * draws, draws)
    return Share(p, min(p, found.low), max(p, found.high), n)


def questions_needed(points: float, accuracy: float = 0.95, flips: float | None = None) -> int:
    """How many questions tell a loss of `points` (out of 100) from nothing, at 95% confidence and 80% power.
    Unpaired, `n` questions for each of two variants, at `accuracy` and `points` below it; with `flips` (share of questions that
    one variant answers right and the other wrong), paired. UserError for a loss that these numbers do not allow.
    >>> questions_needed(2), questions_needed(2, flips=0.04)
    (2207, 777)
    """
    d = points / 100
    if not 0 < d <= (accuracy if flips is None else flips):
        raise UserError(f"questions_needed: a loss of {points} points at accuracy={accuracy}, flips={flips} cannot be")
    less = accuracy - d
    # of the difference, one question: unpaired, both variants' variances; paired, that of -1, 0 and 1 (Connor 1987 refines it)
    variance = accuracy * (1 - accuracy) + less * (1 - less) if flips is None else flips - d * d
    return math.ceil((1.96 + 0.84) ** 2 * variance / (d * d))


def paired(a: Sequence[bool], b: Sequence[bool], seed: int = 0) -> Paired:
    """Compare two variants question by question: McNemar's exact test and a bootstrap over questions (10,000 draws).
    >>> paired([True] * 9 + [False], [True] * 8 + [False] * 2).lost
    1
    """
    if len(a) != len(b) or not len(a):
        raise UserError(f"paired: {len(a)} and {len(b)} results; both variants must answer the same questions, at least one")
    gap = np.asarray(b, dtype=int) - np.asarray(a, dtype=int)
    lost, won, n = int((gap < 0).sum()), int((gap > 0).sum()), len(gap)
    # drawing n questions with replacement is drawing how many fall in each of the three outcomes
    draws = np.random.default_rng(seed).multinomial(n, [lost / n, won / n, 1 - (lost + won) / n], size=10_000)
    low, high = np.percentile(100 * (draws[:, 1] - draws[:, 0]) / n, [2.5, 97.5])
    flips = lost + won
    tail = sum(math.comb(flips, k) for k in range(min(lost, won) + 1)) / 2**flips
    return Paired(100 * float(gap.mean()), float(low), float(high), lost, won, min(1.0, 2 * tail), n)


def agreement(predictions: Sequence[str], reference: Sequence[str]) -> Share:
    """Share of questions on which two models give the same answer: the measure when there are no labels.
    >>> agreement(["red", "two"], ["red", "three"]).value
    0.5
    """
    return wilson(sum(p == r for p, r in zip(predictions, reference, strict=True)), len(reference))
