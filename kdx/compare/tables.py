"""Write a comparison as tables: for the terminal, and as CSV, JSON and Markdown."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from kdx.compare.ranking import COSTS, DIGITS, NUM_RESAMPLES, RANKED_BY, SEED_KEY, Comparison, Point, Ranking, shown

HEADINGS = {
    "kl": "KL", "ce": "CE", "agreement": "agreement", "reverse_kl": "reverse KL", "accuracy": "accuracy",
    "perplexity": "perplexity", "steps": "steps", "tokens": "tokens", "tokens_per_second": "tokens/s", "seconds": "seconds",
}  # fmt: skip
# The fewest and the most decimals; 3 and 4 for other measures.
DECIMALS = dict.fromkeys(COSTS, (0, 0)) | dict.fromkeys(RANKED_BY, (3, DIGITS)) | {"perplexity": (2, 2)}
IN_TERMINAL = {"student", "runs", "KL", "CE", "agreement", "front", "steps", "tokens", "seconds"}
CAVEAT = (
    "* best, or not distinguishable from the best: the 95 % interval of the difference includes 0 (paired bootstrap over "
    f"held-out rows, {NUM_RESAMPLES:,} resamples; seeds and the choice of the best of many are not accounted for). "
    "● on the Pareto front: no other student is better in both KL and CE."
)


def decimals(values: Iterable[float], least: int = 3, most: int = DIGITS) -> int:
    """Return the fewest decimals that show values as different which are."""
    distinct = {round(value, most) for value in values}
    return next((d for d in range(least, most) if len({round(v, d) for v in distinct}) == len(distinct)), most)


def difference(interval: tuple[float, float] | None) -> str:
    """Write the interval of a difference with signs; "tied" if there is no difference."""
    if interval is None:
        return ""
    places = decimals([0.0, *interval])
    low, high = (round(end, places) + 0.0 for end in interval)  # + 0.0: never -0.000
    return "tied" if low == high == 0 else f"{low:+.{places}f} to {high:+.{places}f}"


def title(ranking: Ranking) -> str:
    num_rows, num_counted = (ranking.data[key] for key in ("num_validation_rows", "counted_validation_tokens"))
    precision = f" ({ranking.teacher['precision']})" if ranking.teacher["precision"] else ""
    return f"{num_rows} held-out rows, {num_counted:,} counted tokens, τ = 1; teacher: {ranking.teacher['name']}{precision}"


def verdict(ranking: Ranking) -> list[str]:
    """Say in sentences what the table shows."""
    if len(ranking.points) == 1:
        return ["Only one student: there is nothing to compare it with."]
    lines, best = [], []
    for measure in RANKED_BY:
        order = ranking.by(measure)
        if order and order[-1].rank[measure] == 1:
            lines.append(f"All students are tied in {HEADINGS[measure]}.")
        elif order:
            best.append(order[0])
            close = [point for point in order[1:] if point.is_best(measure)]
            also = f"; not distinguishable from it: {_numbers(close)}" if close else ""
            lines.append(f"Best by {HEADINGS[measure]}: #{order[0].number} ({order[0].label}){also}.")
    if len(best) > 1 and best[0] is not best[1]:
        lines.append(
            "There is no single best. KL measures how close a student is to the teacher and favors a larger alpha and "
            "forward_kl; CE measures how well it predicts the held-out text and favors a smaller alpha."
        )
    others = [point for point in ranking.points if point.other_budget]
    if others:
        lines.append(
            f"Trained longer or shorter than most (†): {_numbers(others)}. Their differences to the others may come from "
            "that alone."
        )
    return lines


def _numbers(points: Sequence[Point]) -> str:
    return ", ".join(f"#{point.number}" for point in points)


def grid(ranking: Ranking) -> list[list[str]]:
    """Lay out the table for people: a header, the students, then the teacher and the untouched student."""
    columns = [_column(ranking, name) for name in HEADINGS]
    columns.insert(2, ["front", *("●" * p.pareto_front for p in ranking.points)])
    if ranking.has_seeds:
        columns.insert(0, ["runs", *(str(len(p.runs)) for p in ranking.points)])
    names = ["student", *(f"#{p.number} {p.label}" for p in ranking.points), *ranking.references]
    return [[name, *("".join(column[i : i + 1]) for column in columns)] for i, name in enumerate(names)]


def _column(ranking: Ranking, name: str) -> list[str]:
    """Write one measure or cost of all students and references, with as many digits as tell the students apart."""
    values = [p.measures[name] for p in ranking.points]
    places = decimals([value for value in values if value is not None], *DECIMALS.get(name, (3, 4)))
    values += [measures.get(name) for measures in ranking.references.values()]
    texts = ["" if value is None else f"{value:,.{places}f}" for value in values]
    for i, p in enumerate(ranking.points):
        mark = "* " if p.is_best(name) else "† " if p.other_budget and name in ("steps", "tokens") else ""
        seeds = " ({:.{d}f}–{:.{d}f})".format(*p.spread[name], d=places) if name in p.spread else ""
        texts[i] = mark + texts[i] + seeds
    return [HEADINGS[name], *texts]


def intervals(ranking: Ranking) -> list[list[str]]:
    """Lay out the differences to the best and to the baseline."""
    rows = [["95 % intervals", *(f"{HEADINGS[m]} − {of}" for m in RANKED_BY for of in ("best", "baseline"))]]
    for p in ranking.points:
        cells = [f"#{p.number} {p.label}"]
        for m in RANKED_BY:
            is_best = p.rank.get(m) == 1 and m not in p.minus_best
            cells += ["best" if is_best else difference(p.minus_best.get(m)), difference(p.minus_baseline.get(m))]
        rows.append(cells)
    return rows


def terminal_parts(comparison: Comparison) -> Iterator[Table | str]:
    """Yield what `kdx compare` prints: the columns that matter most, and sentences."""
    yield from comparison.why_apart
    for ranking in comparison.rankings:
        yield title(ranking)
        header, *rows = grid(ranking)
        keep = [i for i, heading in enumerate(header) if heading in IN_TERMINAL]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for i in keep:
            table.add_column(header[i], justify="right" if i else "left", no_wrap=bool(i), overflow="fold")
        for row in rows:
            table.add_row(*(Text(row[i].partition(" (")[0] if i else row[i]) for i in keep))
        yield table
        yield from verdict(ranking)
        yield CAVEAT
    yield from (f"not ranked: {run.name}: {run.state}: {run.reason}" for run in comparison.not_ranked)


def as_csv(comparison: Comparison) -> str:
    """Write a line a student, teacher, untouched student and run that is not ranked, at full precision."""
    rows: list[dict[str, Any]] = []
    for table, ranking in enumerate(comparison.rankings, 1):
        rows += [{"table": table, **_csv_row(point, comparison.differing)} for point in ranking.points]
        for label, measures in ranking.references.items():
            rows.append({"table": table, "kind": label.split(" ")[0], "label": label, **measures})
    for run in comparison.not_ranked:
        row = {"kind": "not ranked", "label": run.name, "runs": run.name, "num_runs": 1, "state": run.state}
        rows.append(row | {"reason": run.reason} | {key: run.used.get(key) for key in comparison.differing})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys([*rows[0], "reason"])), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_row(point: Point, keys: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": "baseline" if point.baseline else "student", "label": point.label}
    row |= {"runs": " ".join(run.name for run in point.runs), "num_runs": len(point.runs)}
    row |= {key: point.runs[0].used.get(key) for key in keys} | point.measures
    if SEED_KEY in keys:
        row[SEED_KEY] = " ".join(shown(run.used[SEED_KEY]) for run in point.runs)
    for m in RANKED_BY:
        row |= {f"rank_{m}": point.rank.get(m), f"best_{m}": point.is_best(m)}
        row[f"{m}_min"], row[f"{m}_max"] = point.spread.get(m, (None, None))
        for name, found in (("best", point.minus_best), ("baseline", point.minus_baseline)):
            row[f"{m}_minus_{name}_low"], row[f"{m}_minus_{name}_high"] = found.get(m) or (None, None)
    return row | {"pareto_front": point.pareto_front, "other_budget": point.other_budget, "state": "done"}


def as_json(comparison: Comparison) -> str:
    """Write everything but curves and samples, which are in the run folders."""
    differing = comparison.differing
    tree = {
        "tables": [_ranking_tree(ranking) for ranking in comparison.rankings],
        "why_apart": comparison.why_apart,
        "not_ranked": [{"run": run.name, "state": run.state, "reason": run.reason} for run in comparison.not_ranked],
        "differs": {run.name: {k: run.used[k] for k in differing if k in run.used} for run in comparison.runs},
        "intervals": {"level": 0.95, "method": "paired bootstrap over held-out rows", "resamples": NUM_RESAMPLES},
    }
    return json.dumps(tree, indent=2, ensure_ascii=False, default=str) + "\n"


def _ranking_tree(ranking: Ranking) -> dict[str, Any]:
    names = ("validation_fingerprint", "num_validation_rows", "counted_validation_tokens")
    return {name: ranking.data.get(name) for name in names} | {
        "teacher": ranking.teacher,
        "verdict": verdict(ranking),
        "best": {m: order[0].label for m in RANKED_BY if (order := ranking.by(m))},
        "pareto_front": [point.label for point in ranking.front],
        "students": [
            vars(p)
            | {"runs": [run.name for run in p.runs], "best_or_not_distinguishable": {m: p.is_best(m) for m in p.rank}}
            for p in ranking.points
        ],
        "references": ranking.references,
    }


def as_markdown(comparison: Comparison) -> str:
    """Write the tables for an issue or a pull request."""
    parts = ["# Comparison", *map(_escaped, comparison.why_apart)]
    for i, ranking in enumerate(comparison.rankings, 1):
        parts.append(f"## {f'Table {i}: ' if len(comparison.rankings) > 1 else ''}{_escaped(title(ranking))}")
        parts += [_markdown(grid(ranking)), *map(_escaped, verdict(ranking))]
        parts += [_markdown(intervals(ranking)), _escaped(CAVEAT)]
    if comparison.not_ranked:
        rows = [[run.name, run.state, run.reason] for run in comparison.not_ranked]
        parts += ["## Not ranked", _markdown([["run", "state", "reason"], *rows])]
    return "\n\n".join(parts) + "\n"


def _markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(map(_escaped, cells)) + " |" for cells in rows]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]])


def _escaped(text: str) -> str:
    """Escape what Markdown would read as markup."""
    return re.sub(r"([\\`*_\[\]|<~#])", r"\\\1", " ".join(text.split()))
