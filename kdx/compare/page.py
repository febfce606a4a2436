"""Write compare.html: one page without scripts or network, with its pictures inside.

Jinja escapes all text; pictures are SVG images that hold no text of the runs.
"""

import base64
import io
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from kdx.compare import tables
from kdx.compare.ranking import RANKED_BY, Comparison, Point, Ranking, as_text, listed, shown

# Okabe and Ito's colors, which color-blind people can tell apart, and shapes: one look each for a few students.
LOOKS = [
    ("#0072B2", "o", "●"), ("#D55E00", "s", "■"), ("#009E73", "^", "▲"),
    ("#CC79A7", "D", "◆"), ("#56B4E9", "v", "▼"), ("#E69F00", "P", "✚"),
]  # fmt: skip
BASELINE, OTHER = ("#000000", "X", "✖"), ("#b4b9c0", ".", "·")
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
        sections = [_section(ranking, comparison.names) for ranking in comparison.rankings]
    template = environment.get_template("page.html.j2")
    return template.render(c=comparison, sections=sections, t=tables, OTHER=OTHER, zip_longest=zip_longest)


def _section(ranking: Ranking, names: dict[str, str]) -> dict[str, Any]:
    """Collect what the template needs of one ranking."""
    looks = looks_of(ranking)
    pictures = [front_picture(ranking, looks), *(curves_picture(ranking, looks, measure) for measure in RANKED_BY)]
    return {
        "ranking": ranking, "looks": looks, "pictures": [picture for picture in pictures if picture],
        "heat_maps": heat_maps(ranking, names), "prompts": prompts_of(ranking),
    }  # fmt: skip


def looks_of(ranking: Ranking) -> Looks:
    """Give colors and shapes to a few students: the best, those on the front, and the first baseline; the rest are gray."""
    ordered = [order[0] for measure in RANKED_BY if (order := ranking.by(measure))] + ranking.front + ranking.points
    students = dict.fromkeys(point for point in ordered if not point.is_baseline)
    looks = dict(zip(students, LOOKS, strict=False))
    baseline = next((point for point in ranking.points if point.is_baseline), None)
    return looks | ({baseline: BASELINE} if baseline else {})


def front_picture(ranking: Ranking, looks: Looks) -> dict[str, str] | None:
    """Draw CE against KL with the Pareto front; None for fewer than two students."""
    pairs = {p: (p.measures["kl"], p.measures["ce"]) for p in ranking.points if {"kl", "ce"} <= p.rank.keys()}
    if len(pairs) < 2:
        return None
    figure, axes = _figure("CE against KL; the line is the Pareto front", "KL to the teacher", "CE of the labels")
    front = sorted(pairs[point] for point in ranking.front)
    axes.step(*zip(*front, strict=True), where="post", color="#888888", linewidth=1, zorder=1)
    for point, (kl, ce) in reversed(pairs.items()):
        color, marker, _ = looks.get(point, OTHER)
        axes.scatter(kl, ce, s=50 if point in looks else 30, color=color, marker=marker, zorder=2 + (point in looks))
    return _image(figure, f"CE against KL. On the Pareto front: {listed(p.label for p in ranking.front)}")


def curves_picture(ranking: Ranking, looks: Looks, measure: str) -> dict[str, str] | None:
    """Draw a held-out measure over tokens, one line a run; None if no run was measured while training."""
    curves = [
        (point, [(line["tokens"], line[f"eval/{measure}"]) for line in run.curve if line.get(f"eval/{measure}")])
        for point in ranking.points
        for run in point.runs
    ]
    curves = [(point, curve) for point, curve in curves if len(curve) > 1]
    if not curves:
        return None
    name = tables.HEADINGS[measure]
    figure, axes = _figure(f"Held-out {name} over training", "tokens", "")
    for point, curve in curves:
        color, marker, _ = looks.get(point, OTHER)
        is_named = point in looks
        axes.plot(*zip(*curve, strict=True), color=color, marker=marker if is_named else "", markevery=[-1],
                  linestyle="--" if point.is_baseline else "-", linewidth=1.5 if is_named else 0.7,
                  zorder=2 + is_named)  # fmt: skip
    late = [value for _, curve in curves for _, value in curve[len(curve) // 3 :]]
    margin = 0.06 * (max(late) - min(late)) or None
    if margin:  # the steep start would flatten what tells the runs apart
        axes.set_ylim(min(late) - margin, max(late) + margin)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return _image(figure, f"Held-out {name} over tokens, one line for each run")


def _figure(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.8, 3.3), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x, ylabel=y)
    return figure, axes


def _image(figure: Figure, alt: str) -> dict[str, str]:
    """Encode a figure as the source of an <img>."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return {"src": f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}", "alt": alt}


def heat_maps(ranking: Ranking, names: dict[str, str]) -> list[dict[str, Any]]:
    """Lay out measures over τ and α as colored cells, for each setting of the other keys under which both vary."""
    axes = ("loss.temperature", "loss.alpha")
    groups: dict[str, dict[Any, Point]] = {}
    settings: dict[str, str] = {}
    for point in ranking.points:
        at = tuple(point.runs[0].config.get(axis) for axis in axes)
        if not point.is_baseline and None not in at:
            rest = {key: value for key, value in point.values.items() if key not in axes}
            groups.setdefault(as_text(rest), {})[at] = point
            settings[as_text(rest)] = ", ".join(f"{names.get(key, key)} {shown(value)}" for key, value in rest.items())
    maps = []
    for setting, points in groups.items():
        temperatures, alphas = (sorted({at[i] for at in points}) for i in (0, 1))
        if len(temperatures) > 1 and len(alphas) > 1 and len(maps) < MOST_HEAT_MAPS:
            parts = [_heat_map(points, measure, temperatures, alphas) for measure in HEAT_MAPS]
            maps.append({"setting": settings[setting], "alphas": alphas, "parts": [part for part in parts if part]})
    return maps


def _heat_map(
    points: dict[Any, Point], measure: str, temperatures: Sequence[float], alphas: Sequence[float]
) -> dict[str, Any] | None:
    values = {at: value for at, point in points.items() if (value := point.measures[measure]) is not None}
    if not values:
        return None
    low, high = min(values.values()), max(values.values())
    better = HEAT_MAPS[measure]
    colors = matplotlib.colormaps["cividis" if better == "higher" else "cividis_r"]
    places = tables.decimals(values.values())
    rows = []
    for temperature in reversed(temperatures):
        cells = []
        for alpha in alphas:
            value = values.get((temperature, alpha))
            share = 0.5 if value is None or low == high else (value - low) / (high - low)
            is_light = (share if better == "higher" else 1 - share) > 0.5
            cells.append({
                "text": "" if value is None else f"{value:.{places}f}", "color": "#000" if is_light else "#fff",
                "background": "none" if value is None else to_hex(colors(share)),
                "is_best": value == (high if better == "higher" else low),
            })  # fmt: skip
        rows.append((temperature, cells))
    return {"title": f"{tables.HEADINGS[measure]} ({better} is better)", "rows": rows}


def prompts_of(ranking: Ranking) -> list[dict[str, Any]]:
    """Put the answers to each prompt side by side: (point or None, who, text). Of several seeds, the first's."""
    prompts: dict[Any, dict[Any, None]] = {}
    for point in ranking.points:
        for sample in point.runs[0].samples:
            answers = prompts.setdefault(sample["prompt"], {})
            for who in ("reference", "teacher", "untouched"):
                if sample.get(who) is not None:
                    answers[None, who, sample[who]] = None
            if sample.get("student") is not None:
                answers[point, f"{point.number} {point.label}", sample["student"]] = None
    return [{"turns": turns, "answers": list(answers)} for turns, answers in prompts.items()]
