"""Write compare.html: one page without scripts or network, with its pictures inside.

Jinja escapes all text; pictures are SVG images that hold no text of the runs.
"""

import base64
import io
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from kdx.compare import tables
from kdx.compare.ranking import RANKED_BY, Comparison, Point, Ranking, shown

# Okabe and Ito's colors, which color-blind people can tell apart, and shapes: one look each for a few students.
LOOKS = [
    ("#0072B2", "o", "●"), ("#D55E00", "s", "■"), ("#009E73", "^", "▲"),
    ("#CC79A7", "D", "◆"), ("#56B4E9", "v", "▼"), ("#E69F00", "P", "✚"),
]  # fmt: skip
BASELINE, OTHER = ("#000000", "X", "✖"), ("#b4b9c0", ".", "●")
HEAT_MAPS = {"kl": "lower", "ce": "lower", "agreement": "higher"}  # measure → which is better
MOST_HEAT_MAPS = 4  # settings of everything but τ and α that get heat maps of their own
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "#666666", "axes.grid": True, "grid.color": "#e8e8e8",
    "axes.axisbelow": True, "svg.hashsalt": "kdx",  # the same comparison gives the same bytes
}  # fmt: skip
Looks = dict[Point, tuple[str, str, str]]  # color, marker, glyph


def page(comparison: Comparison) -> str:
    """Render the whole page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    with matplotlib.rc_context(STYLE):
        sections = [_section(ranking) for ranking in comparison.rankings]
    template = environment.get_template("page.html.j2")
    return template.render(c=comparison, sections=sections, t=tables, OTHER=OTHER, zip_longest=zip_longest)


def _section(ranking: Ranking) -> dict[str, Any]:
    """Collect what the template needs of one ranking."""
    looks = looks_of(ranking)
    pictures = [front_picture(ranking, looks), *(curves_picture(ranking, looks, measure) for measure in RANKED_BY)]
    return {
        "ranking": ranking, "looks": looks, "pictures": [picture for picture in pictures if picture],
        "heat_maps": heat_maps(ranking), "prompts": prompts_of(looks),
    }  # fmt: skip


def looks_of(ranking: Ranking) -> Looks:
    """Give colors and shapes to a few students: the best, those on the front, and the first baseline; the rest are gray."""
    ordered = [order[0] for measure in RANKED_BY if (order := ranking.by(measure))] + ranking.front + ranking.points
    students = dict.fromkeys(point for point in ordered if not point.baseline)
    looks = dict(zip(students, LOOKS, strict=False))
    baseline = next((point for point in ranking.points if point.baseline), None)
    return looks | ({baseline: BASELINE} if baseline else {})


def front_picture(ranking: Ranking, looks: Looks) -> dict[str, str] | None:
    """Draw CE against KL with the Pareto front; None for fewer than two students."""
    pairs: dict[Point, Any] = {p: (p.measures["kl"], p.measures["ce"]) for p in ranking.by("kl")}
    if len(pairs) < 2:
        return None
    figure, axes = _figure("CE against KL; the line is the Pareto front", "KL to the teacher", "CE of the labels")
    front = sorted(pairs[point] for point in ranking.front)
    axes.step(*zip(*front, strict=True), where="post", color="#888888", linewidth=1, zorder=1)
    for point, (kl, ce) in reversed(pairs.items()):
        color, marker, _ = looks.get(point, OTHER)
        axes.scatter(kl, ce, s=50 if point in looks else 30, color=color, marker=marker, zorder=2 + (point in looks))
    return _image(figure, f"CE against KL. On the Pareto front: {'; '.join(p.label for p in ranking.front)}")


def curves_picture(ranking: Ranking, looks: Looks, measure: str) -> dict[str, str] | None:
    """Draw a held-out measure over tokens, one line a run; None if no run was measured during training."""
    name, key = tables.HEADINGS[measure], f"eval/{measure}"
    figure, axes = _figure(f"Held-out {name} over training", "tokens", "")
    late = []
    for point in ranking.points:
        color, marker, _ = looks.get(point, OTHER)
        style = {"marker": marker, "linewidth": 1.5, "zorder": 3} if point in looks else {"linewidth": 0.7}
        for run in point.runs:
            curve = [(line["tokens"], line[key]) for line in run.curve if line.get(key) is not None]
            if len(curve) > 1:
                dashes = "--" if point.baseline else "-"
                axes.plot(*zip(*curve, strict=True), color=color, linestyle=dashes, markevery=[-1], **style)
                late += [value for _, value in curve[len(curve) // 3 :]]
    if not late:
        return None
    if margin := 0.06 * (max(late) - min(late)):  # the steep start would flatten what tells the runs apart
        axes.set_ylim(min(late) - margin, max(late) + margin)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return _image(figure, f"Held-out {name} over tokens, one line for each run")


def _figure(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.2, 3.0), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x, ylabel=y)
    return figure, axes


def _image(figure: Figure, alt: str) -> dict[str, str]:
    """Encode a figure as the source of an <img>."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return {"src": f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}", "alt": alt}


def heat_maps(ranking: Ranking) -> list[dict[str, Any]]:
    """Lay out measures over τ and α, for each setting of the other keys under which both vary."""
    axes = ("loss.temperature", "loss.alpha")
    settings: dict[str, dict[Any, Point]] = {}
    for point in ranking.points:
        if not point.baseline:
            rest = [f"{ranking.names.get(k, k)} {shown(v)}" for k, v in point.values.items() if k not in axes]
            settings.setdefault(", ".join(rest), {})[tuple(point.runs[0].config.get(axis) for axis in axes)] = point
    maps: list[dict[str, Any]] = []
    for setting, points in settings.items():
        temperatures, alphas = (sorted({at[i] for at in points}) for i in (0, 1))
        if min(len(temperatures), len(alphas)) > 1 and len(maps) < MOST_HEAT_MAPS:
            parts = [_heat_map(points, measure) for measure in HEAT_MAPS]
            maps.append({"setting": setting, "temperatures": temperatures[::-1], "alphas": alphas, "parts": parts})
    return maps


def _heat_map(points: dict[Any, Point], measure: str) -> dict[str, Any]:
    """Return the cells of a heat map: (τ, α) → text and how good it is, from 0, the worst, to 1, the best."""
    better = HEAT_MAPS[measure]
    values = {at: value for at, point in points.items() if (value := point.measures[measure]) is not None}
    ordered = sorted(values.values(), reverse=better == "lower") or [0.0]
    span, places = ordered[-1] - ordered[0] or 1.0, tables.decimals(ordered, most=4)
    cells = {at: (f"{value:.{places}f}", (value - ordered[0]) / span) for at, value in values.items()}
    return {"title": f"{tables.HEADINGS[measure]} ({better} is better)", "cells": cells}


def prompts_of(looks: Looks) -> dict[Any, list[tuple[Point, dict[str, Any]]]]:
    """Collect for each prompt the samples of the students with a look; of several seeds, the first's."""
    prompts: dict[Any, list[tuple[Point, dict[str, Any]]]] = {}
    for point in sorted(looks, key=lambda point: point.number):
        for sample in point.runs[0].samples:
            prompts.setdefault(sample["prompt"], []).append((point, sample))
    return prompts
