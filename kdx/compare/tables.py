"""Write a comparison as tables: for the terminal, and as CSV, JSON and Markdown."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from kdx.compare.ranking import (
    COSTS,
    DIGITS,
    MEASURES,
    NUM_RESAMPLES,
    RANKED_BY,
    SEED_KEY,
    Comparison,
    Interval,
    Point,
    Ranking,
    Run,
    as_text,
    shown,
)  # fmt: skip

HEADINGS = {
    "kl": "KL", "ce": "CE", "agreement": "agreement", "reverse_kl": "reverse KL", "accuracy": "accuracy",
    "perplexity": "perplexity", "steps": "steps", "tokens": "tokens", "tokens_per_second": "tokens/s", "seconds": "seconds",
}  # fmt: skip
IN_TERMINAL = {"student", "runs", "KL", "CE", "agreement", "front", "steps", "tokens", "seconds"}
DECIMALS = {"perplexity": 2}  # the fewest that are shown; 3 for other measures
CAVEAT = (
    "* best, or not distinguishable from the best: the 95 % interval of the difference includes 0 (paired bootstrap over "
    f"held-out rows, {NUM_RESAMPLES:,} resamples). Intervals do not cover the training seed and are not corrected for "
    "choosing the best of many. ● on the Pareto front."
)


def decimals(values: Iterable[float], least: int = 3) -> int:
    """Return the fewest decimals, from `least` to DIGITS, that show values as different which are."""
    distinct = {round(value, DIGITS) for value in values}
    enough = (d for d in range(least, DIGITS) if len({round(value, d) for value in distinct}) == len(distinct))
    return next(enough, DIGITS)


def difference(interval: Interval | None) -> str:
    """Write the interval of a difference with signs; "tied" if there is none."""
    if interval is None:
        return ""
    places = decimals([0.0, *interval])
    low, high = (round(end, places) + 0.0 for end in interval)  # + 0.0: never -0.000
    return "tied" if low == high == 0 else f"{low:+.{places}f} to {high:+.{places}f}"


def to_best(point: Point, measure: str) -> str:
    """Write the difference to the best, or why there is none."""
    if measure not in point.rank:
        return ""
    is_best = point.rank[measure] == 1 and point.to_best[measure] is None
    return "best" if is_best else difference(point.to_best[measure]) or "no interval"


def config_value(run: Run, key: str) -> str:
    """Write a value of a run's config; a dash if the key has no effect."""
    return shown(run.config[key]) if key in run.config and run.uses(key) else "—"


def title(ranking: Ranking) -> str:
    precision = f" ({ranking.precision})" if ranking.precision else ""
    counted = f", {ranking.num_counted:,} counted tokens" if ranking.num_counted else ""
    return f"{ranking.num_rows} held-out rows{counted}, τ = 1; teacher: {ranking.teacher}{precision}"


def has_seeds(ranking: Ranking) -> bool:
    return any(len(point.runs) > 1 for point in ranking.points)


def grid(ranking: Ranking) -> list[list[str]]:
    """Lay out the table for people: a header, the students, then the teacher and the untouched student."""
    columns = [_column(ranking, name) for name in HEADINGS]
    front = ["front", *("●" * p.on_front for p in ranking.points), *[""] * len(ranking.references)]
    columns.insert(2, front)
    if has_seeds(ranking):
        columns.insert(0, ["runs", *(str(len(p.runs)) for p in ranking.points), *[""] * len(ranking.references)])
    students = [f"{p.number} {p.label}" for p in ranking.points]
    return [list(row) for row in zip(["student", *students, *ranking.references], *columns, strict=True)]


def _column(ranking: Ranking, name: str) -> list[str]:
    """One measure or cost of all students and references, with as many digits as tell them apart."""
    references = [measures.get(name) for measures in ranking.references.values()]
    values = [p.measures[name] for p in ranking.points]
    places = 0 if name in COSTS else decimals([v for v in values if v is not None], DECIMALS.get(name, 3))
    texts = ["" if value is None else f"{value:,.{places}f}" for value in [*values, *references]]
    for i, p in enumerate(ranking.points):
        texts[i] = f"* {texts[i]}" if p.is_best(name) else texts[i]
        if name in p.spread and name in RANKED_BY:
            texts[i] += " ({:.{places}f}–{:.{places}f})".format(*p.spread[name], places=places)
        if name == "tokens" and p.other_budget:
            texts[i] = f"† {texts[i]}"
    return [HEADINGS[name], *texts]


def intervals(ranking: Ranking) -> list[list[str]]:
    """Lay out the differences to the best and to the baseline."""
    header = ["95 % intervals", *(f"{HEADINGS[m]} − {of}" for m in RANKED_BY for of in ("best", "baseline"))]
    rows = []
    for p in ranking.points:
        cells = [text for m in RANKED_BY for text in (to_best(p, m), difference(p.to_baseline.get(m)))]
        rows.append([f"{p.number} {p.label}", *cells])
    return [header, *rows]


def terminal_parts(comparison: Comparison) -> Iterator[Table | str]:
    """Yield what `kdx compare` prints: the columns that matter most, and sentences."""
    yield from comparison.why_apart
    for ranking in comparison.rankings:
        header, *rows = grid(ranking)
        keep = [i for i, heading in enumerate(header) if heading in IN_TERMINAL]
        table = Table(title=Text(title(ranking)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for i in keep:
            table.add_column(header[i], justify="left" if i == 0 else "right", overflow="fold")
        for number, row in enumerate(rows):
            is_best = number < len(ranking.points) and 1 in ranking.points[number].rank.values()
            table.add_row(*(Text(row[i]) for i in keep), style="bold" if is_best else None)
        yield table
        yield from ranking.verdict
        yield CAVEAT
    yield from (f"not ranked: {run.name}: {run.state}: {run.reason}" for run in comparison.not_ranked)
    yield from comparison.notes


def as_csv(comparison: Comparison) -> str:
    """One line a student, teacher, untouched student or run that is not ranked, with plain numbers at full precision."""
    ends = [f"{m}_minus_{of}_{end}" for m in RANKED_BY for of in ("best", "baseline") for end in ("low", "high")]
    names = ["table", "kind", "label", "runs", "num_runs", *comparison.differing, *MEASURES, *COSTS]
    names += [f"{m}_{end}" for m in RANKED_BY for end in ("min", "max")]
    names += [f"rank_{m}" for m in RANKED_BY] + [f"best_{m}" for m in RANKED_BY]
    names += ["pareto_front", "other_budget", *ends, "state", "reason"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in _csv_rows(comparison):
        writer.writerow({k: as_text(v) if isinstance(v, list) else v for k, v in row.items()})
    return text.getvalue()


def _csv_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for table, ranking in enumerate(comparison.rankings, 1):
        for p in ranking.points:
            row: dict[str, Any] = {"table": table, "kind": "baseline" if p.is_baseline else "student", "label": p.label}
            row |= {"runs": " ".join(run.name for run in p.runs), "num_runs": len(p.runs), "state": "done"}
            row |= {"pareto_front": p.on_front, "other_budget": p.other_budget, **p.measures, **p.values}
            if SEED_KEY in comparison.differing:
                row[SEED_KEY] = " ".join(shown(run.config.get(SEED_KEY)) for run in p.runs)
            for m in RANKED_BY:
                row |= {f"rank_{m}": p.rank.get(m), f"best_{m}": p.is_best(m)}
                row |= zip((f"{m}_min", f"{m}_max"), p.spread.get(m, ()), strict=False)
                for of, found in (("best", p.to_best.get(m)), ("baseline", p.to_baseline.get(m))):
                    row |= zip((f"{m}_minus_{of}_low", f"{m}_minus_{of}_high"), found or (), strict=False)
            yield row
        for label, measures in ranking.references.items():
            yield {"table": table, "kind": label.split(" ")[0], "label": label, **measures}
    for run in comparison.not_ranked:
        values = {key: run.config[key] for key in comparison.differing if key in run.config and run.uses(key)}
        row = {"kind": "not ranked", "label": run.name, "runs": run.name, "num_runs": 1, **values}
        yield row | {"state": run.state, "reason": run.reason}


def as_json(comparison: Comparison) -> str:
    """Everything but curves and samples, which are in the run folders."""
    tree = {
        "tables": [_ranking_tree(ranking) for ranking in comparison.rankings],
        "why_apart": comparison.why_apart,
        "not_ranked": [{"run": r.name, "state": r.state, "reason": r.reason} for r in comparison.not_ranked],
        "differs": {
            run.name: {key: run.config.get(key) for key in comparison.differing if run.uses(key)}
            for run in comparison.runs
        },
        "notes": comparison.notes,
        "intervals": {"level": 0.95, "method": "paired bootstrap over held-out rows", "resamples": NUM_RESAMPLES},
    }
    return json.dumps(tree, indent=2, ensure_ascii=False, default=str) + "\n"


def _ranking_tree(ranking: Ranking) -> dict[str, Any]:
    points = [
        {
            "number": p.number, "label": p.label, "baseline": p.is_baseline, "runs": [run.name for run in p.runs],
            "values": p.values, "measures": p.measures, "spread": p.spread, "rank": p.rank,
            "best_or_not_distinguishable": {m: p.is_best(m) for m in p.rank},
            "minus_best": p.to_best, "minus_baseline": p.to_baseline,
            "pareto_front": p.on_front, "other_budget": p.other_budget,
        }
        for p in ranking.points
    ]  # fmt: skip
    return {
        "validation_fingerprint": ranking.fingerprint,
        "teacher": {"name": ranking.teacher, "digest": ranking.digest, "precision": ranking.precision},
        "num_validation_rows": ranking.num_rows,
        "counted_validation_tokens": ranking.num_counted,
        "verdict": ranking.verdict,
        "best": {m: order[0].label for m in RANKED_BY if (order := ranking.by(m))},
        "pareto_front": [point.label for point in ranking.front],
        "students": points,
        "references": ranking.references,
    }


def as_markdown(comparison: Comparison) -> str:
    """The tables for an issue or a pull request."""
    parts = ["# Comparison", *map(_escaped, comparison.why_apart)]
    for i, ranking in enumerate(comparison.rankings, 1):
        parts.append(f"## {f'Table {i}: ' if len(comparison.rankings) > 1 else ''}{_escaped(title(ranking))}")
        parts += [_markdown(grid(ranking)), *map(_escaped, ranking.verdict)]
        parts += [_markdown(intervals(ranking)), _escaped(CAVEAT)]
    if comparison.not_ranked:
        rows = [[run.name, run.state, run.reason] for run in comparison.not_ranked]
        parts += ["## Not ranked", _markdown([["run", "state", "reason"], *rows])]
    return "\n\n".join([*parts, *map(_escaped, comparison.notes)]) + "\n"


def _markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(map(_escaped, cells)) + " |" for cells in rows]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]])


def _escaped(text: str) -> str:
    """Escape what Markdown would read as markup."""
    return re.sub(r"([\\`*_\[\]|<~#])", r"\\\1", " ".join(text.split()))
