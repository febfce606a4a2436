"""Rank students: which is best, by which measure, and how sure that is. Plain numbers, no files.

R held-out rows or prompts, N runs, B resamples.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdx.config import GENERATED
from kdx.run.identity import canonical, used
from kdx.run.labels import short


class Column(NamedTuple):
    """A measure or cost of a student."""

    heading: str
    best: Callable[..., Any] | None = None  # min or max: measures with a heat map
    places: int | None = None  # decimals; None: as many as tell the students apart


COLUMNS = {  # by name in summary.json; what matters most comes first
    "kl": Column("KL", min), "ce": Column("CE", min), "agreement": Column("agreement", max),
    "steps": Column("steps", places=0), "tokens": Column("tokens", places=0), "reverse_kl": Column("reverse KL"),
    "effective_alpha_start": Column("effective α", places=2), "effective_alpha_end": Column("at the end", places=2),
    "accuracy": Column("accuracy"), "perplexity": Column("perplexity"),
    "tokens_per_second": Column("tokens/s", places=0), "seconds": Column("seconds", places=0),
}  # fmt: skip
ANSWERS = {  # the same of what the students say themselves, in a table of its own
    "on_policy_kl": Column("on-policy KL", min), "rouge_l": Column("ROUGE-L", max),
    "answer_length": Column("length", places=1), "finished": Column("finished", places=2),
    "distinct_2": Column("distinct bigrams"),
}  # fmt: skip
EVERY = COLUMNS | ANSWERS
RANKED_BY = ("kl", "ce", "agreement", *GENERATED)  # eval_rows.jsonl or eval_answers.jsonl has their sums
NUM_RESAMPLES = 4000
DIGITS = 6  # values that agree to so many decimals are tied
SAME_BUDGET = 0.05  # relative difference in trained tokens; the order of rows alone changes a few percent
SAME_MIXTURE = 0.03  # of effective alpha, at start and end
SEED_KEY = "train.seed"
MOST_KEYS = 5  # keys in a label; all that differ are in a table of their own
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
    answers: Sequence[dict[str, Any]] = ()  # of eval_answers.jsonl, in the order of the prompts
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
            "teacher": environment["teacher_digest"],
            "precision of the teacher": environment["teacher_precision"],
        }

    @property
    def measures(self) -> dict[str, Any]:
        """All that its summary says of the student, its scores in tasks among them."""
        return self.summary["run"] | self.summary["student"] | self.summary.get("tasks", {})

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
    measures: dict[str, float | None]  # EVERY, and scores in tasks with their standard errors
    number: int = 0  # its line in the table
    rank: dict[str, int] = field(default_factory=dict)
    # (measure, "minus_best" or "minus_baseline") → of the difference; (measure, "seeds") → seeds around their mean
    intervals: dict[tuple[str, str], Interval] = field(default_factory=dict)
    pareto_front: bool = False
    other_budget: bool = False  # trained on more or fewer tokens than most of the table

    def __str__(self) -> str:
        return f"#{self.number} {self.label}"

    def is_best(self, measure: str) -> bool:
        """Whether it is the best by a measure, or not distinguishable from the best."""
        low, high = self.intervals.get((measure, "minus_best"), (1, 1))
        return self.rank.get(measure) == 1 or low <= 0 <= high


@dataclass(frozen=True)
class Ranking:
    """Students that were measured on the same held-out rows with the same teacher."""

    points: list[Point]  # by KL, or by CE without a teacher
    references: dict[str, dict[str, Any]]  # measures of the teacher and the untouched students
    title: str
    measured_on: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A ranking for each set of comparable runs, and what is in none."""

    rankings: list[Ranking]
    runs: list[Run]
    differing: list[str]  # all keys that differ

    @property
    def not_ranked(self) -> list[Run]:
        return [run for run in self.runs if run.reason]


# Statistics


def resampled_means(counted: np.ndarray, sums: np.ndarray, num: int = NUM_RESAMPLES, seed: int = 0) -> np.ndarray:
    """Draw R of R rows with replacement, `num` times, and return each run's mean per counted position, [B, N].

    counted: [R, N], or [R] for all; sums: [R, N]. A mean is a ratio of sums, and a draw takes the same rows for all runs:
    rows that are hard for all of them cancel in the differences. The same runs give the same intervals.
    """
    generator, size, num_runs = np.random.default_rng(seed), len(counted), sums.shape[1]
    both = np.column_stack([sums, counted]).astype(float)
    draws = (np.bincount(generator.integers(size, size=size), minlength=size) for _ in range(num))
    totals = np.array([times @ both for times in draws])
    return totals[:, :num_runs] / totals[:, num_runs:]


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
    return Comparison([make_ranking(group) for group in groups.values()], runs, differing(runs))


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the keys with an effect in which the configs differ, those of a sweep first."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for key, value in run.used.items():
            values.setdefault(key, set()).add(canonical(value))
    swept = [key for run in runs for key in run.swept]
    return [key for key in dict.fromkeys([*swept, *values]) if len(values.get(key, ())) > 1]


def make_ranking(runs: Sequence[Run]) -> Ranking:
    """Rank runs that were measured on the same rows with the same teacher."""
    first, points = runs[0], make_points(runs)
    rank(points)
    points.sort(key=lambda p: (p.rank.get("kl", len(points)), p.rank["ce"], p.label))
    references = {"teacher": first.summary["teacher"]}
    for number, point in enumerate(points, 1):
        point.number = number
        own = [f" {setting(key, value)}" for key, value in point.values.items() if key.startswith("student.")]
        references.setdefault(f"untouched student{','.join(own)}", point.runs[0].summary["untouched"])
    references = {label: found for label, found in references.items() if found.get("ce") is not None}
    data, precision = first.summary["data"], first.measured_on["precision of the teacher"]
    title = f"{len(first.rows)} held-out rows, {data['counted_validation_tokens']:,} counted tokens, τ = 1; teacher: "
    title += first.config.get("teacher.base_model") or first.config.get("teacher.path") or "none"
    return Ranking(points, references, f"{title} ({precision})" if precision else title, first.measured_on)


def make_points(runs: Sequence[Run]) -> list[Point]:
    """Average runs that differ only in the seed."""
    keys = [key for key in differing(runs) if key != SEED_KEY]
    names = dict.fromkeys([*EVERY, *(name for run in runs for name in run.summary.get("tasks", ()))])
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.student, []).append(run)
    points = []
    for group in groups.values():
        first, baseline = group[0], group[0].used["loss.alpha"] == 0
        values = {key: first.used[key] for key in keys if key in first.used}
        label = [BASELINE] * baseline + [setting(k, v) for k, v in values.items() if (k, v) != ("loss.alpha", 0)]
        point = Point(", ".join(label[:MOST_KEYS]) or first.name, baseline, values, group, {})
        for name in names:
            known = [run.measures.get(name) for run in group]
            taken = [value for value in known if value is not None]
            mean = point.measures[name] = math.fsum(taken) / len(group) if len(taken) == len(group) else None
            if name in RANKED_BY and mean is not None and len(group) > 1:
                point.intervals[name, "seeds"] = min(taken) - mean, max(taken) - mean
        points.append(point)
    return points


def same_mixtures(ranking: Ranking) -> list[list[Point]]:
    """Group students whose terms really pulled alike, whatever alpha, temperature and divergence were typed."""
    groups: list[list[Point]] = []
    ends = {p: [p.measures[f"effective_alpha_{end}"] for end in ("start", "end")] for p in ranking.points}
    known = {p: tuple(e for e in pair if e is not None) for p, pair in ends.items() if not p.baseline}
    for point in sorted((p for p in known if len(known[p]) == 2), key=lambda p: known[p][::-1]):
        first = known[groups[-1][0]] if groups else (math.inf, math.inf)
        if max(abs(a - b) for a, b in zip(first, known[point], strict=True)) < SAME_MIXTURE:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [group for group in groups if len(group) > 1]


def setting(key: str, value: Any) -> str:
    """Write a key of a config and its value for people."""
    return f"{short(key)} {shown(value)}"


def shown(value: Any) -> str:
    """Write a config's value as people do; cut long ones."""
    text = value if isinstance(value, str) else canonical(value)
    return text if len(text) <= 28 else f"…{text[-27:]}"


def rank(points: list[Point]) -> None:
    """Set ranks, intervals, the Pareto front and the marks of other budgets."""
    for measure in RANKED_BY:
        if measure in ANSWERS and not answered_alike(points, measure):
            continue
        sign = -1 if EVERY[measure].best is max else 1
        rounded = {p: sign * round(v, DIGITS) for p in points if (v := p.measures[measure]) is not None}
        for point, value in rounded.items():
            point.rank[measure] = 1 + sum(other < value for other in rounded.values())
        if len(rounded) > 1:
            _set_intervals(measure, [*rounded])
    both = [point for point in points if {"kl", "ce"} <= point.rank.keys()]
    for point, is_on in zip(both, pareto([(p.rank["kl"], p.rank["ce"]) for p in both]), strict=True):
        point.pareto_front = is_on
    budgets = [point.measures["tokens"] or 0 for point in points]
    for point, budget in zip(points, budgets, strict=True):
        point.other_budget = not math.isclose(budget, statistics.median_high(budgets), rel_tol=SAME_BUDGET)


def answered_alike(points: Sequence[Point], measure: str) -> bool:
    """Whether all runs answered the same prompts, and this was measured of every answer."""
    runs = [run for point in points for run in point.runs]
    prompts = [[line["row"] for line in run.answers] for run in runs]
    is_taken = all(line[measure] is not None for run in runs for line in run.answers)
    return bool(prompts[0]) and is_taken and all(some == prompts[0] for some in prompts)


def _set_intervals(measure: str, points: list[Point]) -> None:
    """Bootstrap the difference of each point to the best and to its baseline, with rows or prompts paired."""
    runs = [run for point in points for run in point.runs]
    weight = {"on_policy_kl": "answer_length", "rouge_l": None}.get(measure, "counted")
    lines = [run.answers if measure in ANSWERS else run.rows for run in runs]
    sums = np.column_stack([[line[measure] for line in some] for some in lines])
    counted = np.column_stack([[line[weight] if weight else 1 for line in some] for some in lines])
    drawn = dict(zip(runs, resampled_means(counted, sums).T, strict=True))
    means = {point: np.mean([drawn[run] for run in point.runs], axis=0) for point in points}
    settings = {p: canonical({k: v for k, v in p.values.items() if not k.startswith("loss.")}) for p in points}
    baselines = {settings[point]: point for point in points if point.baseline}
    best = min(points, key=lambda p: (p.rank[measure], p.label))
    for point in points:
        for name, other in (("minus_best", best), ("minus_baseline", baselines.get(settings[point], point))):
            if other is not point:
                point.intervals[measure, name] = interval(means[point] - means[other])
