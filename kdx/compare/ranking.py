"""Rank students: which is best, by which measure, and how sure that is. Plain numbers, no files.

R held-out rows or prompts, N runs, B resamples.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from kdx.config import Tree
from kdx.run.files import Lines
from kdx.run.identity import canonical, used
from kdx.run.labels import short


class Column(NamedTuple):
    """A measure or cost of a student."""

    heading: str
    best: Literal["min", "max"] | None = None  # students are ranked by it
    per: str | None = None  # what it is a mean over: the key of a line's count; None: the lines themselves
    places: int | None = None  # decimals; None: as many as tell the students apart


COLUMNS = {  # by name in summary.json; what matters most comes first. Lines of eval_rows.jsonl have sums of the ranked ones
    "kl": Column("KL", "min", "counted"), "ce": Column("CE", "min", "counted"),
    "agreement": Column("agreement", "max", "counted"),
    "steps": Column("steps", places=0), "tokens": Column("tokens", places=0), "reverse_kl": Column("reverse KL"),
    "effective_alpha_start": Column("eff. α, first", places=2), "effective_alpha_end": Column("eff. α, last", places=2),
    "accuracy": Column("accuracy"), "perplexity": Column("perplexity"),
    "tokens_per_second": Column("tokens/s", places=0), "seconds": Column("seconds", places=0),
}  # fmt: skip
ANSWERS = {  # the same of what the students say themselves, in a table of its own, from eval_answers.jsonl
    "on_policy_kl": Column("on-policy KL", "min", "answer_length"), "rouge_l": Column("ROUGE-L", "max"),
    "answer_length": Column("length", places=1), "finished": Column("finished", places=2),
    "distinct_2": Column("distinct bigrams"),
}  # fmt: skip
EVERY = COLUMNS | ANSWERS
RANKED = {name: column for name, column in EVERY.items() if column.best}
# Keys of data.json that count as keys of the config. Plug-ins are part of the loss: a baseline uses none of it.
DIGESTS = {"student.weights": "student", "loss.plugins": "plugins"}
NUM_RESAMPLES = 4000
DIGITS = 6  # values that agree to so many decimals are tied
SAME_BUDGET = 0.05  # relative difference in trained tokens; the order of rows alone changes a few percent
EFFECTIVE_ALPHAS = ("effective_alpha_end", "effective_alpha_start")
SAME_MIXTURE = 0.03  # of effective alpha, at start and end
SEED_KEY = "train.seed"
MOST_KEYS = 5  # keys in a label; all that differ are in a table of their own
CAVEAT = (
    "★ best; * not distinguishable from the best: the 95 % interval of the difference includes 0 (paired bootstrap over "
    f"held-out rows or prompts, {NUM_RESAMPLES:,} resamples; seeds and the choice of the best of many are not accounted for). "
    "● on the Pareto front: no other student is better in both KL and CE. † trained longer or shorter than most: "
    "differences to the others may come from that alone."
)


@dataclass(eq=False)
class Run:
    """One run folder."""

    name: str
    path: Path
    reason: str = ""  # why it is not ranked; empty if it is
    state: str = "unknown"
    config: Tree = field(default_factory=dict)  # dotted key → value
    swept: Sequence[str] = ()
    summary: Tree = field(default_factory=dict)
    rows: Lines = field(default_factory=list)  # of eval_rows.jsonl, ordered by row id
    answers: Lines = field(default_factory=list)  # of eval_answers.jsonl, in the order of the prompts
    curve: Lines = field(default_factory=list)  # the lines of metrics.jsonl with held-out measures
    samples: Lines = field(default_factory=list)

    @cached_property
    def used(self) -> Tree:
        """The keys of its config that decide the student; that it has no adapter or rollout tells it apart, too."""
        return {key: self.config.get(key, "none") for key in ("adapter.name", "rollout.name")} | used(self.config)

    @property
    def measured_on(self) -> Tree:
        """Measures compare only where all of this is equal."""
        data, environment = self.summary["data"], self.summary["environment"]
        return {
            "held-out rows": data["validation_fingerprint"],
            "teacher": environment["teacher_digest"],
            "precision of the teacher": environment["teacher_precision"],
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
    values: Tree  # the keys that differ between students
    runs: list[Run]
    measures: Tree  # EVERY, and scores in tasks with their standard errors; None if a run lacks it
    number: int = 0  # its line in the table
    rank: dict[str, int] = field(default_factory=dict)
    # (measure, "minus_best" or "minus_baseline") → of the difference
    intervals: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    pareto_front: bool = False
    other_budget: bool = False  # trained on more or fewer tokens than most of the table

    def __str__(self) -> str:
        return f"#{self.number} {self.label}"

    def besides(self, *groups: str) -> str:
        """Write down its values but for the keys of some groups, to be compared with those of other students."""
        return canonical({key: value for key, value in self.values.items() if not key.startswith(groups)})

    def is_best(self, measure: str) -> bool:
        """Whether it is the best by a measure, or not distinguishable from the best."""
        low, high = self.intervals.get((measure, "minus_best"), (1, 1))
        return self.rank.get(measure) == 1 or low <= 0 <= high


@dataclass(frozen=True)
class Ranking:
    """Students that were measured on the same held-out rows with the same teacher."""

    points: list[Point]  # by KL, or by CE without a teacher
    references: dict[str, Tree]  # measures of the teacher and the untouched students
    title: str

    @property
    def sections(self) -> dict[str, dict[str, Column]]:
        """The columns of its table, by title, and of that of the students' own answers, if those were measured."""
        found = {self.title: COLUMNS}
        if any(point.measures[name] is not None for point in self.points for name in ANSWERS):
            first = self.points[0]
            title = "Greedy answers to held-out prompts, not ranked: some students answered other prompts"
            if by := [column.heading for name, column in ANSWERS.items() if name in first.rank]:
                title = f"Greedy answers to {len(first.runs[0].answers)} held-out prompts, ranked by {' and '.join(by)}"
            found[title] = ANSWERS
        return found

    @property
    def same_mixtures(self) -> str:
        """Which students' terms pulled equally hard, whatever alpha, temperature and divergence were typed; or nothing."""
        groups: list[list[Point]] = []
        pulls = {p: [p.measures[name] for name in EFFECTIVE_ALPHAS] for p in self.points if not p.baseline}

        def is_like(one: Point, other: Point) -> bool:
            apart = max(abs(a - b) for a, b in zip(pulls[one], pulls[other], strict=True))
            return apart < SAME_MIXTURE and one.besides("loss.") == other.besides("loss.")

        mixed = [p for p, both in pulls.items() if None not in both and {*both} - {0, 1}]  # not a term alone
        for point in sorted(mixed, key=lambda p: pulls[p]):
            group = next((group for group in groups if is_like(group[0], point)), [])
            if not group:
                groups.append(group)
            group.append(point)
        alike = "; ".join(", ".join(f"#{p.number}" for p in group) for group in groups if len(group) > 1)
        what = f"Really the same mixture of distillation and CE, effective alpha within {SAME_MIXTURE} at the first and last logged step"
        return f"{what}: {alike}." if alike else ""


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


def resampled_means(counted: np.ndarray, sums: np.ndarray, num: int = NUM_RESAMPLES) -> np.ndarray:
    """Draw R of R rows with replacement, `num` times, and return each run's mean per counted position, [B, N].

    counted, sums: [R, N]. A mean is a ratio of sums, and a draw takes the same rows for all runs: rows that are hard for all
    of them cancel in the differences. The same runs give the same intervals.
    """
    generator, size = np.random.default_rng(0), len(counted)
    both = np.hstack([sums, counted]).astype(float)
    draws = (np.bincount(generator.integers(size, size=size), minlength=size) for _ in range(num))
    totals, of_counted = np.split(np.array([times @ both for times in draws]), 2, axis=1)
    return np.asarray(totals / of_counted)


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Return the middle 95 % of resampled differences."""
    low, high = np.percentile(differences, (2.5, 97.5)).round(10)  # further digits vary with the number of threads
    return float(low), float(high)


def pareto(pairs: Sequence[tuple[float, float]]) -> list[bool]:
    """Tell for each pair whether no other is as low in both and lower in one."""
    return [not any(x <= a and y <= b and (x, y) != (a, b) for x, y in pairs) for a, b in pairs]


# Ranking


def compared(runs: list[Run]) -> Comparison:
    """Rank those runs that can be, in as many tables as it takes."""
    ranked = [run for run in runs if not run.reason]
    groups = _grouped((canonical([run.measured_on, [line["row"] for line in run.rows]]), run) for run in ranked)
    return Comparison([make_ranking(group) for group in groups], runs, differing(runs))


def _grouped(runs: Iterable[tuple[str, Run]]) -> list[list[Run]]:
    """Put runs that have the same key together."""
    groups: dict[str, list[Run]] = {}
    for key, run in runs:
        groups.setdefault(key, []).append(run)
    return [*groups.values()]


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the keys with an effect in which the configs differ, those of a sweep first."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for key, value in run.used.items():
            values.setdefault(key, set()).add(canonical(value))
    weights = {(run.used.get("student.path"), run.used.get("student.weights")) for run in runs}
    if len(weights) == len(values.get("student.path", ())):  # the paths tell them apart
        values.pop("student.weights", None)
    swept = [key for run in runs for key in run.swept]
    return [key for key in dict.fromkeys([*swept, *values]) if len(values.get(key, ())) > 1]


def make_ranking(runs: Sequence[Run]) -> Ranking:
    """Rank runs that were measured on the same rows with the same teacher."""
    first, points = runs[0], make_points(runs)
    rank(points)
    points.sort(key=lambda p: (p.rank.get("kl", 0), p.rank["ce"], p.label))
    references = {"teacher": first.summary["teacher"]}
    for number, point in enumerate(points, 1):
        point.number = number
        own = [f" {short(key)} {shown(value)}" for key, value in point.values.items() if key.startswith("student.")]
        references.setdefault(f"untouched student{','.join(own)}", point.runs[0].summary["untouched"])
    references = {label: found for label, found in references.items() if found.get("ce") is not None}
    tokens = first.summary["data"]["counted_validation_tokens"]
    teacher = first.config.get("teacher.base_model") or first.config.get("teacher.path") or "none"
    precision = first.measured_on["precision of the teacher"]
    title = f"{len(first.rows)} held-out rows, {tokens:,} counted tokens, τ = 1; teacher: {teacher}"
    return Ranking(points, references, f"{title} ({precision})" if precision else title)


def make_points(runs: Sequence[Run]) -> list[Point]:
    """Average runs that differ only in the seed."""
    keys = [key for key in differing(runs) if key != SEED_KEY]
    names = dict.fromkeys([*EVERY, *(name for run in runs for name in run.summary.get("tasks", ()))])
    points = []
    for group in _grouped((run.student, run) for run in runs):
        first, baseline = group[0], group[0].used["loss.alpha"] == 0
        values = {key: first.used[key] for key in keys if key in first.used}
        label = ["baseline (alpha = 0)"] * baseline
        named = {key: value for key, value in values.items() if value is not None} or values
        named = {key: value for key, value in named.items() if not (baseline and key == "loss.alpha")}
        label += [f"{short(key)} {shown(value)}" for key, value in named.items()]
        point = Point(", ".join(label[:MOST_KEYS]) or first.name, baseline, values, group, {})
        measures = [run.summary["run"] | run.summary["student"] | run.summary.get("tasks", {}) for run in group]
        for name in names:
            found = [of_run.get(name) for of_run in measures]
            point.measures[name] = None if None in found else math.fsum(found) / len(group)
        points.append(point)
    return points


def shown(value: Any) -> str:
    """Write a config's value as people do; cut long ones."""
    text = value if isinstance(value, str) else canonical(value)
    return text if len(text) <= 28 else f"…{text[-27:]}"


def rank(points: Sequence[Point]) -> None:
    """Set ranks, intervals, the Pareto front and the marks of other budgets."""
    runs = [run for point in points for run in point.runs]
    for measure in RANKED:
        lines = [run.answers if measure in ANSWERS else run.rows for run in runs]
        ids = [[line["row"] for line in of_run] for of_run in lines]
        is_known = all(line[measure] is not None for of_run in lines for line in of_run)
        if ids[0] and is_known and all(some == ids[0] for some in ids):  # the same rows or prompts for all
            _rank_by(measure, points, dict(zip(runs, lines, strict=True)))
    if "kl" in points[0].rank:
        pairs = [(point.rank["kl"], point.rank["ce"]) for point in points]
        for point, is_on_front in zip(points, pareto(pairs), strict=True):
            point.pareto_front = is_on_front
    usual = statistics.median_high(point.measures["tokens"] or 0 for point in points)
    for point in points:
        point.other_budget = not math.isclose(point.measures["tokens"] or 0, usual, rel_tol=SAME_BUDGET)


def _rank_by(measure: str, points: Sequence[Point], lines: dict[Run, Lines]) -> None:
    """Rank by one measure, and bootstrap the difference of each point to the best and to its baseline, lines paired."""
    column = RANKED[measure]
    sign = -1 if column.best == "max" else 1
    values = {point: sign * round(point.measures[measure], DIGITS) for point in points}
    for point, value in values.items():
        point.rank[measure] = 1 + sum(other < value for other in values.values())
    if len(points) == 1:
        return
    sums = np.array([[line[measure] for line in of_run] for of_run in lines.values()]).T
    counted = np.array([[line[column.per] if column.per else 1 for line in of_run] for of_run in lines.values()]).T
    drawn = dict(zip(lines, resampled_means(counted, sums).T, strict=True))
    means = {point: np.mean([drawn[run] for run in point.runs], axis=0) for point in points}
    alone = [p for p in points if p.baseline]
    # The baseline on given answers is that of all students with whose kind of answers there is none.
    baselines = {p.besides("loss.", "rollout."): p for p in alone if p.values.get("rollout.name") != "teacher"}
    baselines |= {p.besides("loss."): p for p in alone}
    best = min(points, key=lambda p: (p.rank[measure], p.label))
    for point in points:
        baseline = baselines.get(point.besides("loss.")) or baselines.get(point.besides("loss.", "rollout."), point)
        for name, other in (("minus_best", best), ("minus_baseline", baseline)):
            if other is not point:
                point.intervals[measure, name] = interval(means[point] - means[other])
