"""Write compare.html: one page without scripts or network, with its pictures inside.

Jinja escapes all text; pictures are SVG images that hold no text of the runs.
"""

import base64
import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from kdx.compare import tables
from kdx.compare.ranking import EVERY, RANKED_BY, Comparison, Point, Ranking, Run, short

# Okabe and Ito's colors, which color-blind people can tell apart, and shapes: one look each for a few students.
LOOKS = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#56B4E9", "v"), ("#E69F00", "P")]
BASELINE, OTHER = ("#000000", "X"), ("#b4b9c0", ".")
MOST_TICKS = 12  # of a heat map's axis
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "#666666", "axes.grid": True, "grid.color": "#e8e8e8",
    "axes.axisbelow": True, "svg.hashsalt": "kdx",  # the same comparison gives the same bytes
}  # fmt: skip


def page(comparison: Comparison) -> str:
    """Render the whole page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    functions = {"looks_of": looks_of, "images": lambda r: [*map(_image, drawings(r))], "prompts": prompts}
    with matplotlib.rc_context(STYLE):
        return environment.get_template("page.html.j2").render(c=comparison, tables=tables, **functions)


def looks_of(ranking: Ranking) -> dict[Point, tuple[str, str]]:
    """Give a color and a marker to the baselines and a few students, those on the Pareto front first."""
    students = sorted((p for p in ranking.points if not p.baseline), key=lambda p: not p.pareto_front)
    baselines = {p: BASELINE for p in ranking.points if p.baseline}
    return dict(zip(students, LOOKS, strict=False)) | baselines


def drawings(ranking: Ranking) -> list[Any]:
    """Draw all pictures of a ranking → their axes."""
    found = pictures(ranking) + heat_maps(ranking)
    for axes in found:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
    return found


def pictures(ranking: Ranking) -> list[Any]:
    """Draw CE against KL with the Pareto front, and held-out measures over tokens, one line a run."""
    looks = looks_of(ranking)
    pairs = {p: (p.measures["kl"], p.measures["ce"]) for p in ranking.points if "kl" in p.rank}

    def draw(axes: Any, point: Point, run: Run, curve: list[Any]) -> None:
        color, marker = looks.get(point, OTHER)
        label = f"#{point.number}" if point in looks and run is point.runs[0] else ""  # seeds of a student once
        axes.plot(*zip(*curve, strict=True), color=color, marker=marker, markevery=[-1], label=label)

    found = []
    if pairs:
        axes = _axes("CE against KL; the line is the Pareto front", xlabel="KL", ylabel="CE")
        front = sorted(pairs[point] for point in pairs if point.pareto_front)
        axes.step(*zip(*front, strict=True), where="post", color="#888888", linewidth=1)
        for point, pair in pairs.items():
            draw(axes, point, point.runs[0], [pair])
        found.append(axes)
        shades = {p: value for p in pairs if (value := p.measures["effective_alpha_end"]) is not None}
        if len(shades) > 1:
            axes = _axes("The same by effective alpha at the end", xlabel="KL", ylabel="CE")
            dots = axes.scatter(*zip(*(pairs[p] for p in shades), strict=True), c=[*shades.values()], vmin=0, vmax=1)
            for point in shades:
                axes.annotate(f"#{point.number}", pairs[point], xytext=(4, 3), textcoords="offset points", fontsize=8)
            axes.figure.colorbar(dots)
            found.append(axes)
    for measure in RANKED_BY:
        axes = _axes(f"Held-out {EVERY[measure].heading} over tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        for run, point in ((run, p) for p in ranking.points for run in p.runs):
            curve = [
                (line["tokens"], value) for line in run.curve if (value := line.get(f"eval/{measure}")) is not None
            ]
            if len(curve) > 1:
                draw(axes, point, run, curve[len(curve) // 2 :])  # the steep start would flatten what tells runs apart
        if axes.lines:
            found.append(axes)
    return found


def heat_maps(ranking: Ranking) -> list[Any]:
    """Draw measures over the first two numbers that vary, such as τ and α; where more keys vary, the best of them."""
    points = [p for p in ranking.points if not p.baseline]
    found: dict[str, set[Any]] = {key: {p.values.get(key) for p in points} for p in points for key in p.values}
    numbers = {
        key: sorted(v) for key, v in found.items() if {*map(type, v)} <= {int, float} and 1 < len(v) <= MOST_TICKS
    }
    if len(numbers) < 2:
        return []
    (y, rows), (x, columns), *_ = numbers.items()
    cells: dict[tuple[int, int], list[Point]] = {}
    for p in points:
        cells.setdefault((rows.index(p.values[y]), columns.index(p.values[x])), []).append(p)
    drawn = []
    for name, (heading, best, _) in EVERY.items():
        if best is None or any(p.measures[name] is None for p in points):
            continue
        axes = _axes(f"{heading}, {'lower' if best is min else 'higher'} is better", xlabel=short(x), ylabel=short(y))
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.grid(False)
        values = np.full((len(rows), len(columns)), np.nan)
        for (row, place), group in cells.items():
            values[row, place] = best(p.measures[name] for p in group)
            axes.text(place, row, f"{values[row, place]:.3f}", ha="center", va="center", fontsize=8)
        axes.imshow(values, cmap="Blues_r" if best is min else "Blues", alpha=0.5, aspect="auto", origin="lower")
        drawn.append(axes)
    return drawn


def _axes(title: str, **words: Any) -> Any:
    return Figure(figsize=(4.2, 3.0), layout="constrained").add_subplot(title=title, **words)


def _image(axes: Any) -> dict[str, str]:
    """Encode a figure as the source of an <img>."""
    stream = io.BytesIO()
    axes.figure.savefig(stream, format="svg", metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return {"src": source, "alt": axes.get_title(loc="left")}


def prompts(ranking: Ranking) -> list[dict[Point, dict[str, Any]]]:
    """Collect for each prompt the samples of the students in color; of several seeds, the first's."""
    samples = {p: p.runs[0].samples for p in looks_of(ranking) if p.runs[0].samples}
    return [dict(zip(samples, answers, strict=True)) for answers in zip(*samples.values(), strict=False)]
