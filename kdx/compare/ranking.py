"""Rank students: which is best, by which measure, and how sure that is. Plain numbers, no files.

R held-out rows, N students, B resamples.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kdx.run.identity import canonical, used

RANKED_BY = ("kl", "ce")  # lower is better
HEADINGS = {
    "kl": "KL", "ce": "CE", "agreement": "agreement", "steps": "steps", "tokens": "tokens", "reverse_kl": "reverse KL",
    "accuracy": "accuracy", "perplexity": "perplexity", "tokens_per_second": "tokens/s", "seconds": "seconds",
}  # fmt: skip
COSTS = ("steps", "tokens", "tokens_per_second", "seconds")
NUM_RESAMPLES = 4000
SEED = 0  # the same runs give the same intervals
DIGITS = 6  # values that agree to so many decimals are tied
SAME_BUDGET = 0.05  # relative difference in trained tokens; the order of rows alone changes a few percent
SEED_KEY = "train.seed"
MOST_KEYS = 5  # keys in a label; all that differ are in a table of their own
GREEK = {"loss.temperature": "τ", "loss.alpha": "α"}
BASELINE = "baseline (alpha = 0)"
Interval = tuple[float, float]


@dataclass(eq=False)
class Run:
    """One run folder."""

    name: str
    path: Path
    reason: str = ""  # why it is not ranked; empty if it is
    state: str = "unknown"
    config: dict[str, Any] = field(default_factory=dict)  # dotted key → value
    swept: Sequence[str] = ()
    summary: dict[str, Any] = field(default_factory=dict)
    rows: Sequence[dict[str, Any]] = ()  # of eval_rows.jsonl, ordered by row id
    curve: Sequence[dict[str, Any]] = ()  # the lines of metrics.jsonl with held-out measures
    samples: Sequence[dict[str, Any]] = ()

    @cached_property
    def used(self) -> dict[str, Any]:
        """The keys of its config that decide the student."""
        return used(self.config)

    @property
    def measured_on(self) -> dict[str, Any]:
        """Measures compare only where all of this is equal."""
        data, environment = self.summary["data"], self.summary["environment"]
        return {
            "held-out rows": data["validation_fingerprint"],
            "teacher": environment.get("teacher_digest") or self.config.get("teacher.path"),
            "precision of the teacher": environment.get("teacher_precision"),
        }

    @property
    def student(self) -> str:
        """What decides the student apart from the seed: runs that agree in it are averaged."""
        config = {k: v for k, v in self.used.items() if k != SEED_KEY and v is not None}
        return canonical([self.summary["data"]["fingerprint"], config])


@dataclass(eq=False)
class Point:
    """A line of the table: one student, or the average of several that differ only in train.seed."""

    label: str
    baseline: bool  # trained without a teacher
    values: dict[str, Any]  # the keys that differ between students
    runs: list[Run]
    measures: dict[str, float | None]  # costs too
    number: int = 0  # its line in the table
    rank: dict[str, int] = field(default_factory=dict)
    # (measure, "minus_best" or "minus_baseline") → of the difference; (measure, "seeds") → seeds around their mean
    intervals: dict[tuple[str, str], Interval] = field(default_factory=dict)
    pareto_front: bool = False
    other_budget: bool = False  # trained on more or fewer tokens than most of the table

    def is_best(self, measure: str) -> bool:
        """Whether it is the best by a measure, or not distinguishable from the best."""
        low, high = self.intervals.get((measure, "minus_best"), (1, 1))
        return self.rank.get(measure) == 1 or low <= 0 <= high

    @property
    def setting(self) -> str:
        """What it has in common with its baseline: everything but the loss."""
        return canonical({key: value for key, value in self.values.items() if not key.startswith("loss.")})


@dataclass(frozen=True)
class Ranking:
    """Students that were measured on the same held-out rows with the same teacher."""

    points: list[Point]  # by KL, or by CE without a teacher
    references: dict[str, dict[str, Any]]  # measures of the teacher and the untouched students

    def by(self, measure: str) -> list[Point]:
        """Return the points that have a measure, best first."""
        return sorted((p for p in self.points if measure in p.rank), key=lambda p: p.rank[measure])

    @property
    def first(self) -> Run:
        """A run, for what all have in common."""
        return self.points[0].runs[0]


@dataclass(frozen=True)
class Comparison:
    """A ranking for each set of comparable runs, and what is in none."""

    rankings: list[Ranking]
    runs: list[Run]
    differing: list[str]  # all keys that differ
    why_apart: str  # why there are several tables; empty if there are not

    @property
    def not_ranked(self) -> list[Run]:
        return [run for run in self.runs if run.reason]


def shown(value: Any) -> str:
    """Write a config's value as people do; cut long ones."""
    text = value if isinstance(value, str) else canonical(value)
    return text if len(text) <= 28 else f"…{text[-27:]}"


# Statistics


def resampled_means(counted: np.ndarray, sums: np.ndarray, num: int = NUM_RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Draw R of R rows with replacement, `num` times, and return each student's mean per counted position, [B, N].

    counted: [R]; sums: [R, N]. A mean is a ratio of sums, and a draw takes the same rows for all students: rows that are
    hard for all of them cancel in the differences.
    """
    generator, size = np.random.default_rng(seed), len(counted)
    both = np.column_stack([sums, counted]).astype(float)
    draws = (np.bincount(generator.integers(size, size=size), minlength=size) for _ in range(num))
    totals = np.array([times @ both for times in draws])
    return totals[:, :-1] / totals[:, -1:]


def interval(differences: np.ndarray) -> Interval:
    """Return the middle 95 % of resampled differences."""
    low, high = np.percentile(differences, (2.5, 97.5)).round(10)  # further digits vary with the number of threads
    return float(low), float(high)


def pareto(pairs: Sequence[tuple[float, float]]) -> list[bool]:
    """Tell for each pair whether no other is as low in both and lower in one."""
    return [not any(x <= a and y <= b and (x, y) != (a, b) for x, y in pairs) for a, b in pairs]


# Ranking


def compared(runs: list[Run]) -> Comparison:
    """Rank those runs that can be, in as many tables as it takes."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if not run.reason:
            groups.setdefault(canonical(run.measured_on), []).append(run)
    rankings, why = [make_ranking(group) for group in groups.values()], ""
    if len(rankings) > 1:
        first, *others = (ranking.first.measured_on for ranking in rankings)
        apart = [name for name, value in first.items() if any(other[name] != value for other in others)]
        why = "Measures compare only on the same held-out rows and with the same teacher. "
        why += f"These {len(rankings)} tables differ in: {' and '.join(apart)}."
    return Comparison(rankings, runs, differing(runs), why)


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the keys with an effect in which the configs differ, those of a sweep first."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for key, value in run.used.items():
            values.setdefault(key, set()).add(canonical(value))
    swept = [key for run in runs for key in run.swept]
    return [key for key in dict.fromkeys([*swept, *values]) if len(values.get(key, ())) > 1]


def short(key: str) -> str:
    """Name a key for people: τ, α, else its last part, or its group if that tells more."""
    group, _, last = key.rpartition(".")
    return GREEK.get(key) or (group if last in ("name", "path", "init") else last)


def make_ranking(runs: Sequence[Run]) -> Ranking:
    """Rank runs that were measured on the same rows with the same teacher."""
    keys = [key for key in differing(runs) if key != SEED_KEY]
    points = make_points(runs, keys)
    rank(points)
    points.sort(key=lambda p: (p.rank.get("kl", len(points)), p.rank["ce"], p.label))
    references = {"teacher": runs[0].summary["teacher"]}
    for number, point in enumerate(points, 1):
        point.number = number
        own = [f" {short(key)} {shown(value)}" for key, value in point.values.items() if key.startswith("student.")]
        references.setdefault(f"untouched student{','.join(own)}", point.runs[0].summary["untouched"])
    return Ranking(points, {label: found for label, found in references.items() if found.get("ce") is not None})


def make_points(runs: Sequence[Run], keys: Sequence[str]) -> list[Point]:
    """Average runs that differ only in the seed. keys: those that differ between students."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.student, []).append(run)
    points = []
    for group in groups.values():
        used = group[0].used
        values = {key: used[key] for key in keys if key in used}
        label = [BASELINE] * (used["loss.alpha"] == 0)
        label += [f"{short(k)} {shown(v)}" for k, v in values.items() if (k, v) != ("loss.alpha", 0)][:MOST_KEYS]
        summaries = [run.summary["student"] | run.summary["run"] for run in group]
        found = {name: [summary.get(name) for summary in summaries] for name in HEADINGS}
        means = {name: None if None in taken else math.fsum(taken) / len(group) for name, taken in found.items()}
        point = Point(", ".join(label) or group[0].name, used["loss.alpha"] == 0, values, group, means)
        for name in RANKED_BY:
            if len(group) > 1 and (mean := means[name]) is not None:
                point.intervals[name, "seeds"] = min(found[name]) - mean, max(found[name]) - mean
        points.append(point)
    labels = [point.label for point in points]
    for point in points:
        if labels.count(point.label) > 1:
            point.label += f" [{point.runs[0].name}]"
    return points


def rank(points: list[Point]) -> None:
    """Set ranks, intervals, the Pareto front and the marks of other budgets."""
    rounded = {m: {p: round(v, DIGITS) for p in points if (v := p.measures[m]) is not None} for m in RANKED_BY}
    for measure, values in rounded.items():
        for point, value in values.items():
            point.rank[measure] = 1 + sum(other < value for other in values.values())
        if values:
            _set_intervals(measure, [*values])
    both = [point for point in points if len(point.rank) == len(RANKED_BY)]
    for point, is_on in zip(both, pareto([(rounded["kl"][p], rounded["ce"][p]) for p in both]), strict=True):
        point.pareto_front = is_on
    budgets = [point.measures["tokens"] or 0 for point in points]
    for point, budget in zip(points, budgets, strict=True):
        point.other_budget = not math.isclose(budget, statistics.median_high(budgets), rel_tol=SAME_BUDGET)


def _set_intervals(measure: str, points: list[Point]) -> None:
    """Bootstrap the difference of each point to the best and to its baseline, with rows paired."""
    # Seeds are averaged row by row: the counted positions are the same, so means average too.
    sums = [np.mean([[row[measure] for row in run.rows] for run in point.runs], axis=0) for point in points]
    counted = np.array([row["counted"] for row in points[0].runs[0].rows])
    means = dict(zip(points, resampled_means(counted, np.column_stack(sums)).T, strict=True))
    baselines = {point.setting: point for point in points if point.baseline}
    best = min(points, key=lambda p: (p.rank[measure], p.label))
    for point in points:
        for name, other in (("minus_best", best), ("minus_baseline", baselines.get(point.setting, point))):
            if other is not point:
                point.intervals[measure, name] = interval(means[point] - means[other])
