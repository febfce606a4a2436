"""Rank students: which is best, by which measure, and how sure that is. Plain numbers, no files.

R held-out rows, N students, B resamples.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

RANKED_BY = ("kl", "ce")  # lower is better
MEASURES = ("kl", "reverse_kl", "agreement", "ce", "perplexity", "accuracy")
COSTS = ("steps", "tokens", "tokens_per_second", "seconds")
NUM_RESAMPLES = 4000
BLOCK = 2**22  # resampled rows held in memory at once
SEED = 0  # the same runs give the same intervals
DIGITS = 6  # values that agree to so many decimals are tied
SAME_BUDGET = 0.05  # relative difference in trained tokens; the order of rows alone changes a few percent
SEED_KEY = "train.seed"
MOST_KEYS = 5  # keys in a label; all that differ are in a table of their own
GREEK = {"loss.temperature": "τ", "loss.alpha": "α"}
BASELINE = "baseline (alpha = 0)"
Interval = tuple[float, float]
# Keys, or beginnings of keys, that never change the trained student.
FREE = (
    "run.", "sweep.", "tracking.", "train.log_every", "train.save_", "train.keep_checkpoints", "teacher.store",
    "teacher.license", "teacher.base_model", "student.license", "student.base_model",
)  # fmt: skip


def used(config: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a flat config that decide which student comes out."""
    unused = [*FREE]
    if config.get("loss.alpha") == 0:  # alpha itself is what makes a baseline
        unused.append("loss.")
    if config.get("student.init") != "cut":
        unused.append("student.layers")
    if config.get("train.keep") == "last" and config.get("train.early_stopping.patience") is None:
        unused += ["train.eval_every", "train.early_stopping."]
    if config.get("train.on_nonfinite") == "stop":
        unused.append("train.max_nonfinite")
    return {k: v for k, v in config.items() if k == "loss.alpha" or not k.startswith(tuple(unused))}


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder; `reason` says why it is not ranked and is empty if it is."""

    name: str
    path: Path
    reason: str = ""
    state: str = "unknown"
    config: dict[str, Any] = field(default_factory=dict)  # dotted key → value
    swept: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)  # of eval_rows.jsonl, ordered by row id
    curve: list[dict[str, Any]] = field(default_factory=list)  # the lines of metrics.jsonl with held-out measures
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_baseline(self) -> bool:
        """Whether it was trained without a teacher."""
        return self.config.get("loss.alpha") == 0

    @cached_property
    def used(self) -> dict[str, Any]:
        return used(self.config)

    @property
    def measured_on(self) -> tuple[Any, ...]:
        """The held-out rows, the teacher and its precision: measures compare only where these are equal."""
        environment = self.summary["environment"]
        teacher = environment.get("teacher_digest") or self.config.get("teacher.path")
        rows = tuple((row["row"], row["counted"]) for row in self.rows)
        return rows, self.summary["data"].get("validation_fingerprint"), teacher, environment.get("teacher_precision")

    @property
    def identity(self) -> str:
        """What decides the student apart from the seed: runs that agree in it are averaged."""
        config = {k: v for k, v in self.used.items() if k != SEED_KEY and v is not None}
        return as_text([self.summary["data"].get("fingerprint"), config])


@dataclass(eq=False)
class Point:
    """A line of the table: one student, or the average of several that differ only in train.seed."""

    label: str
    baseline: bool
    values: dict[str, Any]  # the keys that differ between students
    runs: list[Run]
    measures: dict[str, float | None]  # costs too
    spread: dict[str, Interval]  # lowest and highest over seeds
    number: int = 0  # its line in the table
    rank: dict[str, int] = field(default_factory=dict)
    minus_best: dict[str, Interval] = field(default_factory=dict)
    minus_baseline: dict[str, Interval] = field(default_factory=dict)
    pareto_front: bool = False
    other_budget: bool = False  # trained on more or fewer tokens than most of the table

    def is_best(self, measure: str) -> bool:
        """Tell whether it is the best by a measure, or not distinguishable from the best."""
        interval = self.minus_best.get(measure)
        return self.rank.get(measure) == 1 or (interval is not None and interval[0] <= 0 <= interval[1])


@dataclass(frozen=True)
class Ranking:
    """Students that were measured on the same held-out rows with the same teacher."""

    data: dict[str, Any]  # of a run's summary
    teacher: dict[str, Any]  # name, digest, precision
    names: dict[str, str]  # the keys that label students → their short names
    points: list[Point]  # by KL, or by CE without a teacher
    references: dict[str, dict[str, Any]]  # measures of the teacher and the untouched students

    def by(self, measure: str) -> list[Point]:
        """Return the points that have a measure, best first."""
        return sorted((p for p in self.points if measure in p.rank), key=lambda p: p.rank[measure])

    @property
    def front(self) -> list[Point]:
        return [point for point in self.points if point.pareto_front]

    @property
    def has_seeds(self) -> bool:
        return any(len(point.runs) > 1 for point in self.points)


@dataclass(frozen=True)
class Comparison:
    """A ranking for each set of comparable runs, and what is in none."""

    rankings: list[Ranking]
    not_ranked: list[Run]
    runs: list[Run]
    differing: list[str]  # all keys that differ
    why_apart: list[str]  # why there are several tables
    out: Path


def as_text(value: Any) -> str:
    """Write a config's value as text, to compare it by."""
    return json.dumps(value, sort_keys=True, default=str)


def shown(value: Any) -> str:
    """Write a config's value as people do; cut long ones."""
    text = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else as_text(value)
    return text if len(text) <= 28 else f"…{text[-27:]}"


# Statistics


def resampled_means(counted: np.ndarray, sums: np.ndarray, num: int = NUM_RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Draw R of R rows with replacement, `num` times, and return each student's mean per counted position, [B, N].

    counted: [R]; sums: [R, N]. A mean is a ratio of sums, and a draw takes the same rows for all students: rows that are
    hard for all of them cancel in the differences.
    """
    generator = np.random.default_rng(seed)
    num_rows = len(counted)
    both = np.column_stack([sums, counted]).astype(float)
    block = max(1, BLOCK // num_rows)
    parts = []
    for start in range(0, num, block):
        drawn = generator.integers(num_rows, size=(min(block, num - start), num_rows))
        drawn += np.arange(len(drawn))[:, None] * num_rows
        times = np.bincount(drawn.ravel(), minlength=len(drawn) * num_rows).reshape(len(drawn), num_rows)
        parts.append(times @ both)
    totals = np.concatenate(parts)
    return totals[:, :-1] / totals[:, -1:]


def interval(differences: np.ndarray) -> Interval:
    """Return the middle 95 % of resampled differences."""
    low, high = np.percentile(differences, (2.5, 97.5))
    return round(float(low), 10), round(float(high), 10)  # further digits vary with the number of threads


def pareto(pairs: Sequence[tuple[float, float]]) -> list[bool]:
    """Tell for each pair whether no other is as low in both and lower in one."""
    return [not any(x <= a and y <= b and (x, y) != (a, b) for x, y in pairs) for a, b in pairs]


# Ranking


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the keys with an effect in which the configs differ, those of a sweep first."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for key, value in run.used.items():
            values.setdefault(key, set()).add(as_text(value))
    swept = [key for run in runs for key in run.swept]
    first = [*swept, "loss.temperature", "loss.alpha", *(key for key in values if key.startswith("loss."))]
    return [key for key in dict.fromkeys([*first, *values]) if len(values.get(key, ())) > 1]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Name keys for people: τ, α, else the last part, or the whole key if that is not unique."""
    short = {}
    for key in keys:
        group, _, last = key.rpartition(".")
        short[key] = GREEK.get(key) or (group if last in ("name", "path", "init") and group else last)
    return {key: name if list(short.values()).count(name) == 1 else key for key, name in short.items()}


def make_ranking(runs: Sequence[Run]) -> Ranking:
    """Rank runs that were measured on the same rows with the same teacher."""
    keys = [key for key in differing(runs) if key != SEED_KEY]
    names = short_names(keys[:MOST_KEYS])
    points = make_points(runs, keys, names)
    rank(points)
    points.sort(key=lambda p: (p.rank.get("kl", len(points)), p.rank["ce"], p.label))
    for number, point in enumerate(points, 1):
        point.number = number
    config, environment = runs[0].config, runs[0].summary["environment"]
    name = config.get("teacher.base_model") or config.get("teacher.path") or "none"
    teacher = {"name": name} | {key: environment.get(f"teacher_{key}") for key in ("digest", "precision")}
    references = {"teacher": runs[0].summary["teacher"]}
    for run in runs:
        own = [f"{names.get(k, k)} {shown(run.used[k])}" for k in keys if k.startswith("student.") and k in run.used]
        references.setdefault(", ".join(["untouched student", *own]), run.summary["untouched"])
    references = {label: measures for label, measures in references.items() if measures.get("ce") is not None}
    return Ranking(runs[0].summary["data"], teacher, names, points, references)


def make_points(runs: Sequence[Run], keys: Sequence[str], names: dict[str, str]) -> list[Point]:
    """Average runs that differ only in the seed. keys: those that differ; names: those in labels → how they are shown."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.identity, []).append(run)
    points = []
    for group in groups.values():
        first = group[0]
        values = {key: first.used[key] for key in keys if key in first.used}
        label = [BASELINE] * first.is_baseline
        label += [f"{names[k]} {shown(v)}" for k, v in values.items() if k in names and (k, v) != ("loss.alpha", 0)]
        found = {name: [run.summary["student"].get(name) for run in group] for name in MEASURES}
        found |= {name: [run.summary["run"].get(name) for run in group] for name in COSTS}
        measures = {name: None if None in taken else math.fsum(taken) / len(group) for name, taken in found.items()}
        spread = {m: (min(found[m]), max(found[m])) for m in RANKED_BY if len(group) > 1 and measures[m] is not None}
        points.append(Point(", ".join(label) or first.name, first.is_baseline, values, group, measures, spread))
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
    both = [point for point in points if all(point in values for values in rounded.values())]
    for point, is_on in zip(both, pareto([(rounded["kl"][p], rounded["ce"][p]) for p in both]), strict=True):
        point.pareto_front = is_on
    budgets = [point.measures["tokens"] or 0 for point in points]
    same = [[math.isclose(a, b, rel_tol=SAME_BUDGET) for b in budgets] for a in budgets]
    usual = max(range(len(points)), key=lambda i: (sum(same[i]), budgets[i]))
    for point, is_usual in zip(points, same[usual], strict=True):
        point.other_budget = not is_usual


def _set_intervals(measure: str, points: list[Point]) -> None:
    """Bootstrap the difference of each point to the best and to its baseline, with rows paired."""
    # Seeds are averaged row by row: the counted positions are the same, so means average too.
    sums = [np.mean([[row[measure] for row in run.rows] for run in point.runs], axis=0) for point in points]
    counted = np.array([row["counted"] for row in points[0].runs[0].rows])
    means = dict(zip(points, resampled_means(counted, np.column_stack(sums)).T, strict=True))
    baselines = {_setting(point): point for point in points if point.baseline}
    best = min(points, key=lambda p: (p.rank[measure], p.label))
    for point in points:
        for differences, other in ((point.minus_best, best), (point.minus_baseline, baselines.get(_setting(point)))):
            if other and other is not point:
                differences[measure] = interval(means[point] - means[other])


def _setting(point: Point) -> str:
    """What a student and its baseline, trained without a teacher, have in common: everything but the loss."""
    return as_text({key: value for key, value in point.values.items() if not key.startswith("loss.")})
