"""Which of many students is best, by what, and how sure that is: plain numbers, no files.

R held-out rows, N students, B resamples.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdx.run.drift import FREE

RANKED_BY = ("kl", "ce")  # both are better when lower
MEASURES = ("kl", "reverse_kl", "agreement", "ce", "perplexity", "accuracy")
COSTS = ("tokens_per_second", "seconds")
NUM_RESAMPLES = 4000
LONGEST_TAG = 32
BLOCK = 2**22  # drawn rows held in memory at once
SEED = 0  # the same runs give the same intervals
SEED_KEY = "train.seed"
BASELINE_LABEL = "baseline (alpha = 0)"
Interval = tuple[float, float]


@dataclass(frozen=True)
class Rows:
    """A student's sums over the counted positions of each held-out row; rows in the order of their ids."""

    ids: tuple[str, ...]
    counted: np.ndarray  # [R]
    sums: dict[str, np.ndarray]  # measure → [R]

    def pairs_with(self, other: "Rows") -> bool:
        """Whether both are of the same rows, counted alike."""
        return self.ids == other.ids and bool(np.array_equal(self.counted, other.counted))


@dataclass(frozen=True)
class Run:
    """One run folder as it was found; `reason` says why it is not ranked, and is empty if it is."""

    name: str
    path: Path
    state: str
    reason: str = ""
    faults: tuple[str, ...] = ()  # what is missing of a run that is ranked all the same
    config: dict[str, Any] = field(default_factory=dict)  # dotted key → value
    summary: dict[str, Any] = field(default_factory=dict)
    rows: Rows | None = None
    curve: tuple[dict[str, Any], ...] = ()  # the lines of metrics.jsonl that have held-out measures
    samples: tuple[dict[str, Any], ...] = ()

    @property
    def is_baseline(self) -> bool:
        """Whether it learnt without a teacher."""
        return self.config.get("loss.alpha") == 0

    @property
    def comparable_with(self) -> tuple[Any, ...]:
        """What must be equal for two runs' measures to be comparable: the held-out rows and the teacher."""
        environment = self.summary["environment"]
        digest, precision = environment.get("teacher_digest"), environment.get("teacher_precision")
        # A run that did not write its teacher's digest is known by what its config names.
        named = () if digest else tuple(said(self.config.get(f"teacher.{key}")) for key in ("path", "gguf_file"))
        return said(self.summary["data"].get("validation_fingerprint")), said(digest), said(precision), *named

    @property
    def point(self) -> str:
        """What makes a student, but for the seed: runs with the same point are averaged."""
        config = {key: said(value) for key, value in self.config.items() if not key.startswith((*FREE, SEED_KEY))}
        config = {key: value for key, value in config.items() if value != "null"}  # as if it were not there
        if self.is_baseline:
            config = {key: value for key, value in config.items() if not key.startswith("loss.")}
        rows = self.summary.get("data", {}).get("fingerprint")
        return json.dumps([self.is_baseline, rows, config], sort_keys=True)


@dataclass
class Point:
    """A line of the table: one student, or several that differ in train.seed alone."""

    label: str
    values: dict[str, Any]  # the keys that differ between points
    runs: list[Run]
    measures: dict[str, float | None]
    spread: dict[str, Interval]  # lowest and highest of several seeds
    rank: dict[str, int] = field(default_factory=dict)
    to_best: dict[str, Interval | None] = field(default_factory=dict)
    to_baseline: dict[str, Interval | None] = field(default_factory=dict)
    on_front: bool = False
    number: int = 0  # its line of the table

    @property
    def tag(self) -> str:
        """What it is called in a list: its label, or of a long one the line of the table."""
        return self.label if len(self.label) <= LONGEST_TAG else f"#{self.number}"

    @property
    def is_baseline(self) -> bool:
        return self.runs[0].is_baseline

    @property
    def kl_and_ce(self) -> tuple[float, float] | None:
        kl, ce = self.measures["kl"], self.measures["ce"]
        return None if kl is None or ce is None else (kl, ce)

    def is_best(self, measure: str) -> bool:
        """Whether it is the best, or not distinguishable from it."""
        interval = self.to_best.get(measure)
        return self.rank.get(measure) == 1 or (interval is not None and interval[0] <= 0 <= interval[1])


@dataclass
class Ranking:
    """Students measured on the same held-out rows beside the same teacher."""

    fingerprint: str | None
    teacher: str
    digest: str | None
    precision: str | None
    num_rows: int | None
    num_counted: int | None
    points: list[Point]  # by KL, or by CE where there is no teacher
    references: list[tuple[str, dict[str, float | None]]]  # the teacher, the untouched student

    def by(self, measure: str) -> list[Point]:
        """The points that have a rank by a measure, best first."""
        return sorted((p for p in self.points if measure in p.rank), key=lambda p: p.rank[measure])

    @property
    def front(self) -> list[Point]:
        return [point for point in self.points if point.on_front]

    @property
    def verdict(self) -> list[str]:
        """What the table says, in sentences."""
        orders = {measure: self.by(measure) for measure in RANKED_BY}
        if not orders["kl"]:
            orders.pop("kl")
        if len(self.points) == 1:
            return ["One student: there is nothing to compare it with."]
        lines = []
        for measure, order in orders.items():
            close = [p.tag for p in order[1:] if p.is_best(measure)]
            beside = f"; not distinguishable from it: {listed(close)}" if close else ""
            lines.append(f"Best by {measure.upper()}: {order[0].label}{beside}.")
        if len({order[0].label for order in orders.values()}) > 1:
            lines.append(
                "No single best: KL, how near the student is to the teacher, favours a larger alpha and forward_kl; "
                "CE, how well it tells the held-out text, a smaller alpha. Choose by what the student is for."
            )
        if "kl" in orders:
            lines.append(
                f"Pareto front (no other student is better in both KL and CE): {listed([p.tag for p in self.front])}."
            )
        return lines

    @property
    def front_labels(self) -> list[str]:
        return [point.label for point in self.front]


@dataclass(frozen=True)
class Comparison:
    """A ranking for each set of runs that may be compared, and what is in none."""

    rankings: list[Ranking]
    not_ranked: list[Run]
    runs: list[Run]
    differing: list[str]  # all keys that differ
    columns: dict[str, str]  # those that stand in the tables → their short names
    why_apart: list[str]  # why there are several tables
    notes: list[str]  # what was passed over, or is without intervals
    out: Path


def listed(names: Sequence[str], most: int = 10) -> str:
    """Names in a sentence; of many, the first few and how many more there are."""
    shown = "; ".join(names[:most])
    return f"{shown}; and {len(names) - most} more" if len(names) > most else shown


def said(value: Any) -> str:
    """A value of a config as a key to compare by; 1 and 1.0 are one value."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def resampled_means(counted: np.ndarray, sums: np.ndarray, num: int = NUM_RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Draw R of the R rows with replacement, num times → the students' means per counted position [B, N].

    counted: [R]; sums: [R, N]. A mean is a ratio of sums, and a draw is the same rows for all students: what makes a
    row hard for all of them cancels in their differences.
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
    """The middle 95 % of resampled differences."""
    low, high = np.percentile(differences, (2.5, 97.5))
    return round(float(low), 10), round(float(high), 10)  # further digits vary with the number of threads


def pareto(pairs: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other pair is as low in both and lower in one."""
    return [not any(x <= a and y <= b and (x, y) != (a, b) for x, y in pairs) for a, b in pairs]


def differing(runs: Sequence[Run]) -> list[str]:
    """The keys of the configs that differ and can change the student, those of a sweep first.

    Without a distillation term the rest of `loss` says nothing.
    """
    values: dict[str, set[str]] = {}
    with_config = [run for run in runs if run.config]
    keys = dict.fromkeys(key for run in with_config for key in run.config)
    for key in keys:
        if not key.startswith(FREE):
            values[key] = {said(run.config.get(key)) for run in with_config if not idle(run, key)}
    first = [*swept(runs), "loss.temperature", "loss.alpha", *(key for key in values if key.startswith("loss."))]
    order = dict.fromkeys([*(key for key in first if key in values), *values])
    return [key for key in order if len(values[key]) > 1]


def swept(runs: Sequence[Run]) -> list[str]:
    """The keys that a sweep of these runs varied."""
    lists = [run.config.get("sweep.keys") for run in runs]
    return list(dict.fromkeys(str(key) for keys in lists if isinstance(keys, list) for key in keys))


def idle(run: Run, key: str) -> bool:
    """Whether a key says nothing in this run: the loss of a baseline."""
    return run.is_baseline and key.startswith("loss.") and key != "loss.alpha"


def make_points(runs: Sequence[Run], keys: Sequence[str], names: dict[str, str]) -> list[Point]:
    """Group runs that differ in the seed alone; keys: those that differ, names: as they are shown."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.point, []).append(run)
    points = []
    for group in groups.values():
        first = group[0]
        values = {k: first.config[k] for k in keys if k in first.config and k != SEED_KEY and not idle(first, k)}
        told = [BASELINE_LABEL] if first.is_baseline else []
        said_by_name = [k for k in values if k in names and not (first.is_baseline and k == "loss.alpha")]
        told += [f"{names[k]} {shown(values[k])}" for k in said_by_name]
        per_run = {name: [run.summary["student"].get(name) for run in group] for name in MEASURES}
        per_run |= {name: [run.summary["run"].get(name) for run in group] for name in COSTS}
        points.append(
            Point(
                label=", ".join(told) or first.name,
                values=values,
                runs=group,
                measures={name: mean(found) for name, found in per_run.items()},
                spread={k: (min(v), max(v)) for k, v in per_run.items() if len(group) > 1 and mean(v) is not None},
            )
        )
    for point in points:
        if sum(other.label == point.label for other in points) > 1:
            point.label = f"{point.label} [{point.runs[0].name}]"
    return points


def make_ranking(runs: Sequence[Run], keys: Sequence[str], names: dict[str, str]) -> Ranking:
    """Rank runs that were measured on the same rows beside the same teacher."""
    points = make_points(runs, keys, names)
    rank(points, keys)
    points.sort(key=lambda p: (p.rank.get("kl", len(points)), p.rank["ce"], p.label))
    for number, point in enumerate(points, 1):
        point.number = number
    first = runs[0]
    config, data, environment = first.config, first.summary["data"], first.summary["environment"]
    name = str(config.get("teacher.base_model") or config.get("teacher.path") or "none")
    references = [("teacher", _measures(runs, "teacher"))]
    by_student: dict[tuple[str, ...], list[Run]] = {}
    own = [key for key in keys if key.startswith("student.")]
    for run in runs:
        told = [f"{names.get(key, key)} {shown(run.config[key])}" for key in own if key in run.config]
        by_student.setdefault(tuple(told), []).append(run)
    for setting, group in by_student.items():
        references.append((", ".join(["untouched student", *setting]), _measures(group, "untouched")))
    return Ranking(
        fingerprint=_text(data.get("validation_fingerprint")),
        teacher=name if not name.startswith(("/", ".", "~")) else name.rstrip("/").rsplit("/", 1)[-1],
        digest=_text(environment.get("teacher_digest")),
        precision=_text(environment.get("teacher_precision")),
        num_rows=_count(data.get("num_validation_rows")),
        num_counted=_count(data.get("counted_validation_tokens")),
        points=points,
        references=[(label, found) for label, found in references if found["ce"] is not None],
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _count(value: Any) -> int | None:
    return value if type(value) is int else None


def _measures(runs: Sequence[Run], who: str) -> dict[str, float | None]:
    return {name: mean([run.summary[who].get(name) for run in runs]) for name in MEASURES}


def mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None where any is missing or not finite."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite and len(finite) == len(values) else None


def shown(value: Any) -> str:
    """A config's value as people write it, long ones cut."""
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 28 else f"…{text[-27:]}"


def rank(points: list[Point], keys: Sequence[str]) -> None:
    """Fill in ranks, intervals and the front."""
    for measure in RANKED_BY:
        having = [(value, point) for point in points if (value := point.measures[measure]) is not None]
        for value, point in having:
            point.rank[measure] = 1 + sum(other < value for other, _ in having)
        if having:
            _intervals(measure, [point for _, point in having], keys)
    both = [(pair, point) for point in points if (pair := point.kl_and_ce)]
    for (_, point), is_on in zip(both, pareto([pair for pair, _ in both]), strict=True):
        point.on_front = is_on


def _intervals(measure: str, points: list[Point], keys: Sequence[str]) -> None:
    """Bootstrap each point's difference to the best and to its baseline, rows paired."""
    best = min(points, key=lambda p: (p.rank[measure], p.label))
    for point in points:
        point.to_best[measure] = point.to_baseline[measure] = None
    whole = (p.runs[0].rows for p in points if all(run.rows is not None for run in p.runs))
    like = next(whole, None)
    if like is None:
        return
    with_rows = [p for p in points if all(run.rows is not None and run.rows.pairs_with(like) for run in p.runs)]
    # Seeds are averaged row by row: the counted positions are the same, so means average too.
    sums = [np.mean([run.rows.sums[measure] for run in p.runs if run.rows is not None], axis=0) for p in with_rows]
    means = resampled_means(like.counted, np.column_stack(sums))
    column = {id(point): means[:, i] for i, point in enumerate(with_rows)}
    for point in with_rows:
        if id(best) in column and point is not best:
            point.to_best[measure] = interval(column[id(point)] - column[id(best)])
        baseline = _baseline_of(point, points, keys)
        if baseline is not None and baseline is not point and id(baseline) in column:
            point.to_baseline[measure] = interval(column[id(point)] - column[id(baseline)])


def _baseline_of(point: Point, points: list[Point], keys: Sequence[str]) -> Point | None:
    """The student that learnt without a teacher under the same setting of all but the loss."""
    rest = [key for key in keys if not key.startswith("loss.") and key != SEED_KEY]
    setting = [said(point.values.get(key)) for key in rest]
    found = [p for p in points if p.is_baseline and [said(p.values.get(key)) for key in rest] == setting]
    return found[0] if found else None
