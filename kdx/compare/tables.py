"""A comparison as tables: for the terminal, and as CSV, JSON and Markdown."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from kdx.compare.ranking import (
    BASELINE_LABEL,
    COSTS,
    MEASURES,
    NUM_RESAMPLES,
    RANKED_BY,
    SEED_KEY,
    Comparison,
    Interval,
    Point,
    Ranking,
    Run,
    idle,
    shown,
)

HEADINGS = {
    "kl": "KL", "reverse_kl": "reverse KL", "agreement": "agreement", "ce": "CE", "perplexity": "perplexity",
    "accuracy": "accuracy", "tokens_per_second": "tokens/s", "seconds": "seconds",
}  # fmt: skip
FORMS = {"perplexity": ",.5g", "tokens_per_second": ",.0f", "seconds": ",.0f"}
CAVEAT = (
    f"* best, or not distinguishable from it: the 95 % interval of the difference to the best holds 0 (paired bootstrap "
    f"over held-out rows, {NUM_RESAMPLES:,} resamples). Intervals are over rows for these trained students, not over "
    "training seeds, and not corrected for picking the best of n."
)


def number(name: str, value: float | None) -> str:
    """A measure as it is shown; empty where it was not taken."""
    return "" if value is None else format(value, FORMS.get(name, ".4f"))


def place(point: Point, measure: str) -> str:
    """A rank, starred if the point is the best or not distinguishable from it."""
    return f"{point.rank[measure]}{' *' * point.is_best(measure)}" if measure in point.rank else ""


def spread(point: Point, name: str) -> str:
    """The lowest and highest of several seeds."""
    return "" if name not in point.spread else "–".join(number(name, value) for value in point.spread[name])


def difference(found: Interval | None) -> str:
    """An interval of a difference, signed."""
    return "" if found is None else f"{found[0]:+.4f} to {found[1]:+.4f}"


def to_best(point: Point, measure: str) -> str:
    """The difference to the best, or why there is none."""
    if measure not in point.rank:
        return ""
    return "best" if point.rank[measure] == 1 else difference(point.to_best[measure]) or "no interval"


def config_value(run: Run, key: str) -> str:
    """A value of a run's config; a dash where the key says nothing."""
    return "—" if key not in run.config or idle(run, key) else shown(run.config[key])


def kind(point: Point) -> str:
    return BASELINE_LABEL if point.is_baseline else "student"


def title(ranking: Ranking) -> str:
    counted = "" if ranking.num_counted is None else f", {ranking.num_counted:,} counted tokens"
    precision = f" ({ranking.precision})" if ranking.precision else ""
    return f"{ranking.num_rows} held-out rows{counted}, τ = 1; teacher: {ranking.teacher}{precision}"


def has_seeds(ranking: Ranking) -> bool:
    return any(len(point.runs) > 1 for point in ranking.points)


def header(comparison: Comparison, ranking: Ranking) -> list[str]:
    """The headings of a table for people."""
    seeds = ["runs"] if has_seeds(ranking) else []
    ranks = [f"by {HEADINGS[m]}" for m in RANKED_BY]
    return [
        "",
        *comparison.columns.values(),
        *seeds,
        *ranks,
        "front",
        *(HEADINGS[name] for name in (*MEASURES, *COSTS)),
    ]


def lines(comparison: Comparison, ranking: Ranking) -> list[list[str]]:
    """The cells under `header`: students, then teacher and untouched student."""
    seeded = has_seeds(ranking)
    found = []
    for p in ranking.points:
        point = [config_value(p.runs[0], key) for key in comparison.columns]
        seeds = [str(len(p.runs))] if seeded else []
        ranks = [place(p, measure) for measure in RANKED_BY]
        measures = [
            number(name, p.measures[name]) + (f" ({spread(p, name)})" if name in RANKED_BY and name in p.spread else "")
            for name in (*MEASURES, *COSTS)
        ]
        found.append(
            [
                f"{p.number} {kind(p) if comparison.columns else p.label}",
                *point,
                *seeds,
                *ranks,
                "●" * p.on_front,
                *measures,
            ]
        )
    blank = [""] * (len(comparison.columns) + seeded + len(RANKED_BY) + 1)
    for label, measured in ranking.references:
        found.append([label, *blank, *(number(name, measured.get(name)) for name in (*MEASURES, *COSTS))])
    return found


def terminal_tables(comparison: Comparison) -> Iterator[Table | str]:
    """What `kdx compare` prints."""
    yield from comparison.why_apart
    for ranking in comparison.rankings:
        table = Table(title=Text(title(ranking)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for i, heading in enumerate(header(comparison, ranking)):
            table.add_column(Text(heading), justify="left" if i == 0 else "right", no_wrap=True)
        for cells in lines(comparison, ranking):
            table.add_row(*map(Text, cells), style="bold" if any("1 *" in cell[:3] for cell in cells) else None)
        yield table
        yield from ranking.verdict
        yield CAVEAT
    for run in comparison.not_ranked:
        yield f"not ranked: {run.name}: {run.state}: {run.reason}"
    yield from comparison.notes


def as_csv(comparison: Comparison) -> str:
    """One line a student, teacher, untouched student or run that is not ranked; plain numbers at full precision."""
    intervals = [f"{m}_minus_{of}_{end}" for m in RANKED_BY for of in ("best", "baseline") for end in ("low", "high")]
    names = ["table", "kind", "label", "runs", "num_runs", *comparison.differing, *MEASURES, *COSTS]
    names += [f"{m}_{end}" for m in RANKED_BY for end in ("min", "max")]
    names += [f"rank_{m}" for m in RANKED_BY] + [f"best_{m}" for m in RANKED_BY] + ["pareto_front", *intervals]
    names += ["state", "reason"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    for row in ({name: name for name in names}, *_csv_rows(comparison)):
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return text.getvalue()


def _csv_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for table, ranking in enumerate(comparison.rankings, 1):
        for p in ranking.points:
            row: dict[str, Any] = {"table": table, "kind": "baseline" if p.is_baseline else "student", "label": p.label}
            row |= {"runs": " ".join(run.name for run in p.runs), "num_runs": len(p.runs), "pareto_front": p.on_front}
            row |= {"state": "done", **p.measures, **p.values}
            if SEED_KEY in comparison.differing:
                row[SEED_KEY] = " ".join(shown(run.config.get(SEED_KEY)) for run in p.runs)
            for m in RANKED_BY:
                row |= {f"rank_{m}": p.rank.get(m), f"best_{m}": p.is_best(m)}
                row |= _ends(m, ("min", "max"), p.spread.get(m))
                row |= _ends(f"{m}_minus_best", ("low", "high"), p.to_best.get(m))
                row |= _ends(f"{m}_minus_baseline", ("low", "high"), p.to_baseline.get(m))
            yield row
        for label, measured in ranking.references:
            who = "teacher" if label == "teacher" else "untouched"
            yield {"table": table, "kind": who, "label": label, **measured}
    for run in comparison.not_ranked:
        values = {key: run.config[key] for key in comparison.differing if key in run.config and not idle(run, key)}
        row = {"kind": "not ranked", "label": run.name, "runs": run.name, "num_runs": 1, **values}
        yield row | {"state": run.state, "reason": run.reason}


def _ends(name: str, ends: tuple[str, str], found: Interval | None) -> dict[str, float]:
    return {} if found is None else {f"{name}_{end}": value for end, value in zip(ends, found, strict=True)}


def _cell(value: Any) -> Any:
    """A value for a spreadsheet, which would obey text that begins like a formula."""
    if isinstance(value, list | dict):
        value = json.dumps(value)
    if isinstance(value, str):
        value = " ".join(value.split())
        return f"'{value}" if value.startswith(("=", "+", "-", "@")) else value
    return "" if value is None else value


def as_json(comparison: Comparison) -> str:
    """All of the comparison but curves and samples, which are in the run folders."""
    tree = {
        "tables": [_ranking_tree(ranking) for ranking in comparison.rankings],
        "why_apart": comparison.why_apart,
        "not_ranked": [{"run": r.name, "state": r.state, "reason": r.reason} for r in comparison.not_ranked],
        "differs": {
            run.name: {key: run.config.get(key) for key in comparison.differing if not idle(run, key)}
            for run in comparison.runs
        },
        "notes": comparison.notes,
        "intervals": {"level": 0.95, "method": "paired bootstrap over held-out rows", "resamples": NUM_RESAMPLES},
    }
    return json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _ranking_tree(ranking: Ranking) -> dict[str, Any]:
    points = [
        {
            "number": p.number,
            "label": p.label,
            "baseline": p.is_baseline,
            "runs": [run.name for run in p.runs],
            "values": p.values,
            "measures": p.measures,
            "spread": p.spread,
            "rank": p.rank,
            "best_or_not_distinguishable": {m: p.is_best(m) for m in p.rank},
            "minus_best": p.to_best,
            "minus_baseline": p.to_baseline,
            "pareto_front": p.on_front,
        }
        for p in ranking.points
    ]
    return {
        "validation_fingerprint": ranking.fingerprint,
        "teacher": {"name": ranking.teacher, "digest": ranking.digest, "precision": ranking.precision},
        "num_validation_rows": ranking.num_rows,
        "counted_validation_tokens": ranking.num_counted,
        "verdict": ranking.verdict,
        "best": {m: order[0].label for m in RANKED_BY if (order := ranking.by(m))},
        "pareto_front": ranking.front_labels,
        "students": points,
        "references": dict(ranking.references),
    }


def as_markdown(comparison: Comparison) -> str:
    """The tables for an issue or a pull request."""
    parts = ["# Comparison", *map(_escaped, comparison.why_apart)]
    for i, ranking in enumerate(comparison.rankings, 1):
        parts.append(f"## {f'Table {i}: ' if len(comparison.rankings) > 1 else ''}{_escaped(title(ranking))}")
        parts.append(_grid(header(comparison, ranking), lines(comparison, ranking)))
        parts += [_escaped(line) for line in ranking.verdict]
        ends = [f"{HEADINGS[m]} − {of}" for m in RANKED_BY for of in ("best", "baseline")]
        rows = [
            [
                f"{p.number} {p.label}",
                *(text for m in RANKED_BY for text in (to_best(p, m), difference(p.to_baseline.get(m)))),
            ]
            for p in ranking.points
        ]
        parts += [_grid(["95 % intervals", *ends], rows), _escaped(CAVEAT)]
    if comparison.not_ranked:
        rows = [[run.name, run.state, run.reason] for run in comparison.not_ranked]
        parts += ["## Not ranked", _grid(["run", "state", "reason"], rows)]
    parts += [_escaped(note) for note in comparison.notes]
    return "\n\n".join(parts) + "\n"


def _grid(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(
        "| " + " | ".join(cells if i == 1 else map(_escaped, cells)) + " |" for i, cells in enumerate(lines)
    )


def _escaped(text: str) -> str:
    """Text that no Markdown is made of."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\`*_[]|#~" else c for c in text)
