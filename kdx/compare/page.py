"""Write compare.html: one page without scripts or network, with its pictures inside.

Jinja escapes all text; pictures are SVG images that hold no text of the runs.
"""

import base64
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from kdx.compare import tables
from kdx.compare.ranking import RANKED, Comparison, Point, Ranking, short

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito's, which all can tell apart
BASELINE, OTHER = "#000000", "#b4b9c0"
MOST_TICKS = 12  # of a heat map's axis
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "#666666", "axes.grid": True, "grid.color": "#e8e8e8",
    "axes.axisbelow": True, "svg.hashsalt": "kdx",  # the same comparison gives the same bytes
}  # fmt: skip


def page(comparison: Comparison) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    functions = {"colors_of": colors_of, "images": lambda r: map(_image, drawings(r)), "prompts": prompts}
    with matplotlib.rc_context(STYLE):
        return environment.get_template("page.html.j2").render(c=comparison, tables=tables, **functions)


def colors_of(ranking: Ranking) -> dict[Point, str]:
    """Give a color to the baselines and to a few students, those on the Pareto front first."""
    students = sorted((p for p in ranking.points if not p.baseline), key=lambda p: not p.pareto_front)
    return dict(zip(students, COLORS, strict=False)) | {p: BASELINE for p in ranking.points if p.baseline}


def drawings(ranking: Ranking) -> list[Any]:
    """Draw all pictures of a ranking → their axes."""
    return [*ce_against_kl(ranking), *curves(ranking), *heat_maps(ranking)]


def ce_against_kl(ranking: Ranking) -> Iterator[Any]:
    """Draw the students, colored by their effective alpha at the end, the baselines in black, and the Pareto front."""
    pairs = {p: (p.measures["kl"], p.measures["ce"]) for p in ranking.points if "kl" in p.rank}
    if not pairs:
        return
    axes = _axes("CE against KL; the line is the Pareto front", xlabel="KL", ylabel="CE")
    front = sorted(pair for point, pair in pairs.items() if point.pareto_front)
    axes.step(*zip(*front, strict=True), where="post", color="#888888", linewidth=1)
    alphas = np.array([None if p.baseline else p.measures["effective_alpha_end"] for p in pairs], dtype=float)
    shades = matplotlib.colormaps["viridis"].with_extremes(bad=BASELINE)
    dots = axes.scatter(*zip(*pairs.values(), strict=True), c=alphas, cmap=shades, vmin=0, vmax=1, plotnonfinite=True)
    axes.figure.colorbar(dots, label="effective α at the end", aspect=30, pad=0.02)
    for point in colors_of(ranking):  # a number on each of many would hide them
        axes.annotate(f"#{point.number}", pairs[point], xytext=(4, 3), textcoords="offset points", fontsize=8)
    yield axes


def curves(ranking: Ranking) -> Iterator[Any]:
    """Draw held-out measures over tokens, a line for each run."""
    colors = colors_of(ranking)
    for measure, column in RANKED.items():
        axes, name = _axes(f"Held-out {column.heading} over tokens"), f"eval/{measure}"
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        for point in ranking.points:
            for run in point.runs:
                curve = [(line["tokens"], line[name]) for line in run.curve if line.get(name) is not None]
                curve = curve[len(curve) // 2 :]  # the steep start would flatten what tells runs apart
                label = f"#{point.number}" if point in colors and run is point.runs[0] else ""  # once for all its seeds
                if len(curve) > 1:
                    axes.plot(*zip(*curve, strict=True), ".-", color=colors.get(point, OTHER), label=label)
        if axes.lines:
            axes.legend(fontsize=8, frameon=False)
            yield axes


def heat_maps(ranking: Ranking) -> Iterator[Any]:
    """Draw measures over the first two numbers that vary, such as τ and α; where more keys vary, the best of them."""
    students = [p for p in ranking.points if not p.baseline]
    settings = pd.DataFrame([p.values for p in students])
    numbers = [key for key, values in settings.items() if values.dtype.kind in "if" and values.notna().all()]
    keys = [key for key in numbers if 1 < settings[key].nunique() <= MOST_TICKS]
    if len(keys) < 2:
        return
    for name, column in RANKED.items():
        measured = settings.assign(measure=[p.measures[name] for p in students])
        if measured["measure"].isna().any():
            continue
        values = measured.pivot_table("measure", *keys[:2], aggfunc=column.best)
        title = f"{column.heading}, {'lower' if column.best == 'min' else 'higher'} is better"
        colors = "Blues_r" if column.best == "min" else "Blues"
        names = {"index": short(keys[0]), "columns": short(keys[1])}
        yield heat_map(values.rename_axis(**names), title, cmap=colors, origin="lower")


def heat_map(values: pd.DataFrame, title: str, places: int = 3, **look: Any) -> Any:
    """Draw numbers over two settings, the names of the table's axes → its axes."""
    axes = _axes(title, xlabel=values.columns.name, ylabel=values.index.name)
    axes.set_xticks(range(len(values.columns)), values.columns)
    axes.set_yticks(range(len(values.index)), values.index)
    axes.grid(False)
    for (row, place), value in np.ndenumerate(values):
        text = "" if math.isnan(value) else f"{value:.{places}f}"
        axes.text(place, row, text, ha="center", va="center", fontsize=8)
    axes.imshow(values, alpha=0.5, aspect="auto", **look)
    return axes


def _axes(title: str, **words: Any) -> Any:
    return Figure(figsize=(4.2, 3.0), layout="constrained").add_subplot(title=title, **words)


def _image(axes: Any) -> dict[str, str]:
    """Encode a picture as the source of an <img>."""
    stream = io.BytesIO()
    axes.figure.savefig(stream, format="svg", metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return {"src": source, "alt": axes.get_title(loc="left")}


def prompts(ranking: Ranking) -> list[dict[Point, dict[str, Any]]]:
    """Collect for each prompt the samples of the students in color; of several seeds, the first's."""
    samples = {p: p.runs[0].samples for p in colors_of(ranking) if p.runs[0].samples}
    return [dict(zip(samples, answers, strict=True)) for answers in zip(*samples.values(), strict=False)]
