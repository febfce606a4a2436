"""Write compare.html: one page without scripts or network, with its pictures inside.

Jinja escapes all text; pictures are SVG images that hold no text of the runs.
"""

import base64
import io
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from kdx.compare import tables
from kdx.compare.ranking import HEADINGS, RANKED_BY, Comparison, Point, Ranking, shown

# Okabe and Ito's colors, which color-blind people can tell apart, and shapes: one look each for a few students.
LOOKS = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#56B4E9", "v"), ("#E69F00", "P")]
BASELINE, OTHER = ("#000000", "X"), ("#b4b9c0", ".")
HEAT_MAPS = {"kl": min, "ce": min, "agreement": max}  # measure → which of its values is best
AXES = ("loss.temperature", "loss.alpha")
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
    environment.globals |= {"tables": tables, "shown": shown, "zip_longest": zip_longest}
    environment.globals |= {"pictures": pictures, "heat_maps": heat_maps, "prompts": prompts, "looks_of": looks_of}
    with matplotlib.rc_context(STYLE):
        return environment.get_template("page.html.j2").render(c=comparison)


def looks_of(ranking: Ranking) -> dict[Point, tuple[str, str]]:
    """Give a color and a marker to the baselines and a few students, those on the Pareto front first."""
    students = sorted((p for p in ranking.points if not p.baseline), key=lambda p: not p.pareto_front)
    baselines = {p: BASELINE for p in ranking.points if p.baseline}
    return dict(zip(students, LOOKS, strict=False)) | baselines


def pictures(ranking: Ranking) -> list[dict[str, str]]:
    """Draw CE against KL with the Pareto front, and held-out measures over tokens, one line a run."""
    looks, pairs = looks_of(ranking), {p: (p.measures["kl"], p.measures["ce"]) for p in ranking.by("kl")}

    def draw(axes: Any, point: Point, curve: list[Any]) -> None:
        color, marker = looks.get(point, OTHER)
        label = f"#{point.number}" if point in looks else ""
        axes.plot(*zip(*curve, strict=True), color=color, marker=marker, markevery=[-1], label=label)

    found = []
    if pairs:
        axes = _axes("CE against KL; the line is the Pareto front", xlabel="KL", ylabel="CE")
        front = sorted(pairs[point] for point in pairs if point.pareto_front)
        axes.step(*zip(*front, strict=True), where="post", color="#888888", linewidth=1)
        for point, pair in pairs.items():
            draw(axes, point, [pair])
        found.append(_image(axes))
    for measure in RANKED_BY:
        axes = _axes(f"Held-out {HEADINGS[measure]} over tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        for point in ranking.by(measure):
            for run in point.runs:
                late = run.curve[len(run.curve) // 2 :]  # the steep start would flatten what tells runs apart
                draw(axes, point, [(line["tokens"], line[f"eval/{measure}"]) for line in late])
        if any(len(line.get_xdata()) > 1 for line in axes.lines):
            found.append(_image(axes))
    return found


def _axes(title: str, **words: Any) -> Any:
    return Figure(figsize=(4.2, 3.0), layout="constrained").add_subplot(title=title, **words)


def _image(axes: Any) -> dict[str, str]:
    """Encode a figure as the source of an <img>."""
    if handles := dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True)):  # seeds of a student once
        axes.legend([*handles.values()], [*handles], fontsize=8, frameon=False)
    stream = io.BytesIO()
    axes.figure.savefig(stream, format="svg", metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return {"src": source, "alt": axes.get_title(loc="left")}


def heat_maps(ranking: Ranking) -> list[dict[str, str]]:
    """Draw measures over τ and α, if both vary; where other keys vary too, the best of them."""
    points = [p for p in ranking.points if not {*AXES} - p.values.keys()]  # a baseline has no temperature
    temperatures, alphas = (sorted({p.values[axis] for p in points}) for axis in AXES)
    if min(len(temperatures), len(alphas)) < 2:
        return []
    found = []
    for measure, best in HEAT_MAPS.items():
        title = f"{HEADINGS[measure]}, {'higher' if best is max else 'lower'} is better"
        axes = _axes(title, xlabel="α", ylabel="τ")
        axes.set_xticks(range(len(alphas)), alphas)
        axes.set_yticks(range(len(temperatures)), temperatures)
        axes.grid(False)
        cells = np.full((len(temperatures), len(alphas)), np.nan)
        for p in sorted(points, key=lambda p: p.measures[measure] or 0.0, reverse=best is min):  # the best comes last
            temperature, alpha = (p.values[axis] for axis in AXES)
            cells[temperatures.index(temperature), alphas.index(alpha)] = p.measures[measure]
        for (y, x), value in np.ndenumerate(cells):
            axes.text(x, y, "" if np.isnan(value) else f"{value:.3f}", ha="center", va="center", fontsize=8)
        axes.imshow(cells, cmap="Blues" if best is max else "Blues_r", alpha=0.5, aspect="auto", origin="lower")
        found.append(_image(axes))
    return found


def prompts(ranking: Ranking) -> list[dict[Point, dict[str, Any]]]:
    """Collect for each prompt the samples of the students in color; of several seeds, the first's."""
    samples = {p: p.runs[0].samples for p in looks_of(ranking) if p.runs[0].samples}
    return [dict(zip(samples, answers, strict=True)) for answers in zip(*samples.values(), strict=False)]
