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
BASELINE = "baseline (alpha = 0)"
# Keys, or beginnings of keys, that never change the trained student.
FREE = (
    "run.", "sweep.", "tracking.", "train.log_every", "train.save_every", "train.save_minutes", "train.keep_checkpoints",
    "teacher.store",
)  # fmt: skip
Interval = tuple[float, float]


def unused_keys(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the keys of a flat config, or their beginnings, that have no effect on its student."""
    unused = list(FREE)
    if config.get("loss.alpha") == 0:
        unused.append("loss.")
    if config.get("student.init") != "cut":
        unused.append("student.layers")
    if config.get("train.on_nonfinite") != "skip":
        unused.append("train.max_nonfinite")
    if config.get("train.early_stopping.patience") is None:
        unused.append("train.early_stopping.")
        if config.get("train.keep") == "last":
            unused.append("train.eval_every")
    return tuple(unused)


@dataclass(frozen=True)
class Rows:
    """A student's sums over the counted positions of each held-out row, ordered by row id."""

    ids: tuple[str, ...]
    counted: np.ndarray  # [R]
    sums: dict[str, np.ndarray]  # measure → [R]

    def pairs_with(self, other: "Rows") -> bool:
        """Tell whether both are of the same rows, with the same counts."""
        return self.ids == other.ids and np.array_equal(self.counted, other.counted)


@dataclass(frozen=True)
class Run:
    """One run folder; `reason` says why it is not ranked and is empty if it is."""

    name: str
    path: Path
    state: str
    reason: str
    config: dict[str, Any]  # dotted key → value
    swept: list[str]
    summary: dict[str, Any]
    rows: Rows | None
    curve: list[dict[str, Any]]  # the lines of metrics.jsonl that have held-out measures
    samples: list[dict[str, Any]]

    @property
    def is_baseline(self) -> bool:
        """Whether it was trained without a teacher."""
        return self.config.get("loss.alpha") == 0

    @cached_property
    def unused(self) -> tuple[str, ...]:
        return unused_keys(self.config)

    def uses(self, key: str) -> bool:
        """Tell whether a key has an effect in this run. Alpha itself is what makes a baseline one."""
        return key == "loss.alpha" or not key.startswith(self.unused)

    @property
    def measured_on(self) -> tuple[Any, ...]:
        """The held-out rows, the teacher and its precision: measures compare only where these are equal."""
        environment = self.summary["environment"]
        teacher = environment.get("teacher_digest") or self.config.get("teacher.path")
        return self.summary["data"].get("validation_fingerprint"), teacher, environment.get("teacher_precision")

    @property
    def identity(self) -> str:
        """What decides the student apart from the seed: runs that agree in it are averaged."""
        config = {k: v for k, v in self.config.items() if self.uses(k) and k != SEED_KEY and v is not None}
        return as_text([self.summary["data"].get("fingerprint"), config])


@dataclass(eq=False)
class Point:
    """A line of the table: one student, or the average of several that differ only in train.seed."""

    label: str
    values: dict[str, Any]  # the keys that differ between students
    runs: list[Run]
    measures: dict[str, float | None]  # costs too
    spread: dict[str, Interval]  # lowest and highest over seeds
    number: int = 0  # its line in the table
    rank: dict[str, int] = field(default_factory=dict)
    to_best: dict[str, Interval | None] = field(default_factory=dict)
    to_baseline: dict[str, Interval | None] = field(default_factory=dict)
    on_front: bool = False
    other_budget: bool = False  # trained on more or fewer tokens than most of the table

    @property
    def is_baseline(self) -> bool:
        return self.runs[0].is_baseline

    def is_best(self, measure: str) -> bool:
        """Tell whether it is the best by a measure, or not distinguishable from the best."""
        interval = self.to_best.get(measure)
        return self.rank.get(measure) == 1 or (interval is not None and interval[0] <= 0 <= interval[1])


@dataclass
class Ranking:
    """Students that were measured on the same held-out rows with the same teacher."""

    fingerprint: str | None
    teacher: str
    digest: str | None
    precision: str | None
    num_rows: int | None
    num_counted: int | None
    points: list[Point]  # by KL, or by CE without a teacher
    references: dict[str, dict[str, float | None]]  # the teacher and the untouched students

    def by(self, measure: str) -> list[Point]:
        """Return the points that have a measure, best first."""
        return sorted((p for p in self.points if measure in p.rank), key=lambda p: p.rank[measure])

    @property
    def front(self) -> list[Point]:
        return [point for point in self.points if point.on_front]

    @property
    def verdict(self) -> list[str]:
        """What the table shows, in sentences."""
        if len(self.points) == 1:
            return ["Only one student: there is nothing to compare it with."]
        lines, winners = [], []
        for measure in RANKED_BY:
            if not (order := self.by(measure)):
                continue
            ties = sum(p.rank[measure] == 1 for p in order)
            if ties == len(order) > 1:
                lines.append(f"By {measure.upper()} all students are tied.")
                continue
            winners.append(order[0])
            tied = f"; tied with it: {listed(p.label for p in order[1:ties])}" if ties > 1 else ""
            close = [p.label for p in order[ties:] if p.is_best(measure)]
            tied += f"; not distinguishable from it: {listed(close)}" if close else ""
            lines.append(f"Best by {measure.upper()}: {order[0].label}{tied}.")
        if len(winners) > 1 and winners[0] is not winners[1]:
            lines.append(
                "There is no single best. KL measures how close the student is to the teacher and favors a larger alpha "
                "and forward_kl; CE measures how well it predicts the held-out text and favors a smaller alpha."
            )
        if self.front:
            front = listed(p.label for p in self.front)
            lines.append(f"Pareto front (no other student is better in both KL and CE): {front}.")
        if any(p.other_budget for p in self.points):
            spans = [
                f"{min(v):,.0f} to {max(v):,.0f} {name}" for name in ("steps", "tokens") if (v := self.costs(name))
            ]
            lines.append(
                f"These students were not trained equally long ({', '.join(spans)}): † marks those with another budget "
                "than most, and a difference to them may come from the length of training alone."
            )
        return lines

    def costs(self, name: str) -> list[float]:
        return [value for point in self.points if (value := point.measures[name]) is not None]


@dataclass(frozen=True)
class Comparison:
    """A ranking for each set of comparable runs, and what is in none."""

    rankings: list[Ranking]
    not_ranked: list[Run]
    runs: list[Run]
    differing: list[str]  # all keys that differ
    names: dict[str, str]  # the keys that label students → their short names
    why_apart: list[str]  # why there are several tables
    notes: list[str]  # what was skipped, or has no intervals
    out: Path


def listed(labels: Any, most: int = 10) -> str:
    """Join labels for a sentence; of many, the first few and the number of the others."""
    labels = list(labels)
    return "; ".join(labels[:most]) + (f"; and {len(labels) - most} more" if len(labels) > most else "")


def as_text(value: Any) -> str:
    """Write a config's value as text, to compare it by."""
    return json.dumps(value, sort_keys=True, default=str)


def shown(value: Any) -> str:
    """Write a config's value as people do; cut long ones."""
    text = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else as_text(value)
    return text if len(text) <= 28 else f"…{text[-27:]}"


def mean(values: Sequence[float | None]) -> float | None:
    """Average values, or return None if one is missing or not finite."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite and len(finite) == len(values) else None


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
    for key in dict.fromkeys(key for run in runs for key in run.config):
        values[key] = {as_text(run.config.get(key)) for run in runs if run.config and run.uses(key)}
    first = [*swept(runs), "loss.temperature", "loss.alpha", *(key for key in values if key.startswith("loss."))]
    return [key for key in dict.fromkeys([*first, *values]) if len(values.get(key, ())) > 1]


def swept(runs: Sequence[Run]) -> list[str]:
    """Return the keys that the sweeps of these runs varied."""
    return list(dict.fromkeys(key for run in runs for key in run.swept))


def make_points(runs: Sequence[Run], keys: Sequence[str], names: dict[str, str]) -> list[Point]:
    """Group runs that differ only in the seed. keys: those that differ; names: those in labels → how they are shown."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.identity, []).append(run)
    points = []
    for group in groups.values():
        first = group[0]
        values = {k: first.config[k] for k in keys if k in first.config and k != SEED_KEY and first.uses(k)}
        told = {k: v for k, v in values.items() if k in names and not (first.is_baseline and k == "loss.alpha")}
        parts = [BASELINE] * first.is_baseline + [f"{names[k]} {shown(v)}" for k, v in told.items()]
        per_run = {name: [run.summary["student"].get(name) for run in group] for name in MEASURES}
        per_run |= {name: [run.summary["run"].get(name) for run in group] for name in COSTS}
        measures = {name: mean(found) for name, found in per_run.items()}
        spread = {k: (min(v), max(v)) for k, v in per_run.items() if len(group) > 1 and measures[k] is not None}
        points.append(Point(", ".join(parts) or first.name, values, group, measures, spread))
    labels = [point.label for point in points]
    for point in points:
        if labels.count(point.label) > 1:
            point.label += f" [{point.runs[0].name}]"
    return points


def make_ranking(runs: Sequence[Run], keys: Sequence[str], names: dict[str, str]) -> Ranking:
    """Rank runs that were measured on the same rows with the same teacher."""
    points = make_points(runs, keys, names)
    rank(points)
    points.sort(key=lambda p: (p.rank.get("kl", len(points)), p.rank["ce"], p.label))
    for number, point in enumerate(points, 1):
        point.number = number
    first = runs[0]
    data, environment = first.summary["data"], first.summary["environment"]
    groups = {"teacher": list(runs)}
    for run in runs:
        own = [k for k in keys if k.startswith("student.") and k in run.config and run.uses(k)]
        label = ", ".join(["untouched student", *(f"{names.get(k, k)} {shown(run.config[k])}" for k in own)])
        groups.setdefault(label, []).append(run)
    references = {
        label: {name: mean([run.summary[label.split(" ")[0]].get(name) for run in group]) for name in MEASURES}
        for label, group in groups.items()
    }
    return Ranking(
        fingerprint=data.get("validation_fingerprint"),
        teacher=str(first.config.get("teacher.base_model") or first.config.get("teacher.path") or "none"),
        digest=environment.get("teacher_digest"),
        precision=environment.get("teacher_precision"),
        num_rows=data.get("num_validation_rows"),
        num_counted=data.get("counted_validation_tokens"),
        points=points,
        references={label: measures for label, measures in references.items() if measures["ce"] is not None},
    )


def rank(points: list[Point]) -> None:
    """Set ranks, intervals, the Pareto front and the marks of other budgets."""
    rounded = {m: {p: round(v, DIGITS) for p in points if (v := p.measures[m]) is not None} for m in RANKED_BY}
    for measure, values in rounded.items():
        having = [point for point in points if point in values]
        for point in having:
            point.rank[measure] = 1 + sum(other < values[point] for other in values.values())
            point.to_best[measure] = point.to_baseline[measure] = None
        _set_intervals(measure, having)
    both = [point for point in points if all(point in values for values in rounded.values())]
    pairs = [(rounded["kl"][point], rounded["ce"][point]) for point in both]
    for point, is_on in zip(both, pareto(pairs), strict=True):
        point.on_front = is_on
    budgets = [point.measures["tokens"] or 0 for point in points]
    same = [[math.isclose(a, b, rel_tol=SAME_BUDGET) for b in budgets] for a in budgets]
    usual = max(range(len(points)), key=lambda i: (sum(same[i]), budgets[i]))
    for point, is_usual in zip(points, same[usual], strict=True):
        point.other_budget = not is_usual


def _set_intervals(measure: str, points: list[Point]) -> None:
    """Bootstrap the difference of each point to the best and to its baseline, with rows paired."""
    rows = {p: [run.rows for run in p.runs if run.rows and measure in run.rows.sums] for p in points}
    whole = [p for p in points if len(rows[p]) == len(p.runs)]
    if not whole:
        return
    first = rows[whole[0]][0]
    paired = [p for p in whole if all(found.pairs_with(first) for found in rows[p])]
    # Seeds are averaged row by row: the counted positions are the same, so means average too.
    sums = [np.mean([found.sums[measure] for found in rows[p]], axis=0) for p in paired]
    means = dict(zip(paired, resampled_means(first.counted, np.column_stack(sums)).T, strict=True))
    best = min(points, key=lambda p: (p.rank[measure], p.label))
    for point in paired:
        for differences, other in ((point.to_best, best), (point.to_baseline, _baseline_of(point, points))):
            if other is not None and other is not point and other in means:
                differences[measure] = interval(means[point] - means[other])


def _baseline_of(point: Point, points: list[Point]) -> Point | None:
    """Return the student that was trained without a teacher under the same settings of everything but the loss."""

    def setting(p: Point) -> dict[str, Any]:
        return {key: value for key, value in p.values.items() if not key.startswith("loss.")}

    return next((p for p in points if p.is_baseline and setting(p) == setting(point)), None)
