"""Write a comparison as tables: CSV, JSON and Markdown, which the terminal shows too."""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from itertools import zip_longest
from typing import Any

import pandas as pd

from kdx.compare.ranking import CAVEAT, DIGITS, EVERY, RANKED, Column, Comparison, Point, Ranking, shown

APART = (
    "Measures can be compared only on the same held-out rows and with the same teacher at the same precision, "
    "so there is one table for each such set."
)
IN_TERMINAL = 5  # columns, as many as fit into 80 letters
Grid = list[tuple[str, ...]]  # a header, then rows of cells; the first cell labels the row


def grid(ranking: Ranking, names: Collection[str]) -> Grid:
    """Lay out those measures and costs that there are: the students, then the teacher and the untouched student."""
    points = ordered(ranking, names)
    tasks = [name for name in points[0].measures if name not in EVERY and not name.endswith("_stderr")]
    names = [*names, *tasks] if "ce" in names else names
    taken = [name for name in names if any(p.measures[name] is not None for p in points)]
    columns = [["student", *map(str, points), *ranking.references]]
    columns += [_column(ranking, points, name) for name in taken]
    if "ce" in names:
        columns.append(["front", *("●" * p.pareto_front for p in points)])
    if any(len(p.runs) > 1 for p in points):
        columns.append(["seeds", *(str(len(p.runs)) for p in points)])
    return list(zip_longest(*columns, fillvalue=""))


def ordered(ranking: Ranking, names: Collection[str]) -> list[Point]:
    """Order the students by the first of these measures that ranks them."""
    by = next((name for name in names if name in ranking.points[0].rank), "")
    return sorted(ranking.points, key=lambda p: (p.rank.get(by, 0), p.number))


def _column(ranking: Ranking, points: Sequence[Point], name: str) -> list[str]:
    """Write one measure or cost of all students and references, with as many digits as tell the students apart."""
    column, values = EVERY.get(name, Column(name)), [p.measures[name] for p in points]
    places = decimals(value for value in values if value is not None) if column.places is None else column.places
    values += [measures.get(name) for measures in ranking.references.values()]
    texts = ["" if value is None else f"{value:,.{places}f}" for value in values]
    for i, p in enumerate(points):
        if (error := p.measures.get(f"{name}_stderr")) is not None:
            texts[i] += f" ± {error:.{places}f}"
        is_marked = p.other_budget and name in ("steps", "tokens")
        mark = "★ " if p.rank.get(name) == 1 else "* " if p.is_best(name) else "† " if is_marked else ""
        texts[i] = mark + texts[i]
    return [column.heading, *texts]


def decimals(values: Iterable[float]) -> int:
    """Return the fewest decimals, of 3 to DIGITS, that show values as different which are."""
    distinct = {round(value, DIGITS) for value in values}
    return next((d for d in range(3, DIGITS) if len({round(v, d) for v in distinct}) == len(distinct)), DIGITS)


def intervals(ranking: Ranking, names: dict[str, Column]) -> Grid:
    """Lay out the differences to the best and to the baseline."""
    pairs = [(name, kind) for name in names for kind in ("minus_best", "minus_baseline")]
    pairs = [pair for pair in pairs if any(pair in point.intervals for point in ranking.points)]
    headings = ("student", *(f"{names[measure].heading} {kind.replace('_', ' ')}" for measure, kind in pairs))
    rows = ((str(p), *(difference(p.intervals.get(pair)) for pair in pairs)) for p in ordered(ranking, names))
    return [headings, *rows] if pairs else []


def difference(interval: tuple[float, float] | None) -> str:
    """Write the interval of a difference with signs; "tied" if there is no difference."""
    if interval is None:
        return ""
    places = decimals([0.0, *interval])
    low, high = (round(end, places) + 0.0 for end in interval)  # + 0.0: never -0.000
    return "tied" if low == high == 0 else f"{low:+.{places}f} to {high:+.{places}f}"


def not_ranked(comparison: Comparison) -> Grid:
    """Lay out the runs that are not ranked, and why."""
    rows = [(run.name, run.state, run.reason) for run in comparison.not_ranked]
    return [("not ranked", "state", "reason"), *rows] if rows else []


def settings(comparison: Comparison) -> Grid:
    """Lay out all keys that differ between the configs."""
    keys = comparison.differing
    rows = ((run.name, *(shown(run.used[key]) if key in run.used else "—" for key in keys)) for run in comparison.runs)
    return [("run", *keys), *rows]


def row_of(point: Point, keys: Sequence[str]) -> dict[str, Any]:
    """Return a student at full precision. keys: those of its config to put in."""
    row = {"label": point.label, "baseline": point.baseline, "runs": " ".join(run.name for run in point.runs)}
    row |= {key: point.runs[0].used.get(key) for key in keys} | point.measures
    for measure in RANKED:
        row |= {f"{measure}_rank": point.rank.get(measure), f"{measure}_is_best": point.is_best(measure)}
    row |= {"pareto_front": point.pareto_front, "other_budget": point.other_budget}
    for (measure, kind), (low, high) in point.intervals.items():
        row |= {f"{measure}_{kind}_low": low, f"{measure}_{kind}_high": high}
    return row


def as_csv(comparison: Comparison) -> str:
    tables = enumerate(comparison.rankings, 1)
    rows = [{"table": i, **row_of(p, comparison.differing)} for i, ranking in tables for p in ranking.points]
    return str(pd.DataFrame(rows, dtype=object).to_csv(index=False))


def as_json(comparison: Comparison) -> str:
    """Write everything but curves and samples, which are in the run folders."""
    tables = [
        {
            "title": ranking.title, "measured_on": ranking.points[0].runs[0].measured_on,
            "students": [row_of(point, comparison.differing) for point in ranking.points], "references": ranking.references,
        }
        for ranking in comparison.rankings
    ]  # fmt: skip
    left_out = [{"run": run.name, "state": run.state, "reason": run.reason} for run in comparison.not_ranked]
    return json.dumps({"tables": tables, "not_ranked": left_out}, indent=2, ensure_ascii=False, default=str) + "\n"


def as_markdown(comparison: Comparison, *, is_brief: bool = False) -> str:
    """Write the tables for an issue, a pull request or, in brief, the terminal: fewer columns, no intervals."""
    parts: list[str | Grid] = [APART] if len(comparison.rankings) > 1 else []
    for ranking in comparison.rankings:
        for title, columns in ranking.sections.items():
            names = [*columns][: IN_TERMINAL if is_brief else None]
            parts += [title, grid(ranking, names), [] if is_brief else intervals(ranking, columns)]
        parts.append(ranking.same_mixtures)
    parts += [CAVEAT if comparison.rankings else "", not_ranked(comparison)]
    return "\n\n".join(_markdown(part) for part in parts if part) + "\n"


def _markdown(part: str | Grid) -> str:
    """Write a paragraph, with Markdown's own letters escaped, or a table."""
    if isinstance(part, str):
        return re.sub(r"([\\`*_\[\]|<~#])", r"\\\1", " ".join(part.split()))
    lines = ["| " + " | ".join(map(_markdown, cells)) + " |" for cells in part]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(part[0]) - 1), *lines[1:]])
