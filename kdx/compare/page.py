"""compare.html: one page without scripts or network; pictures are SVG within it.

All text but the pictures is escaped by Jinja, and matplotlib escapes the text of pictures.
"""

import io
import itertools
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from kdx.compare import tables
from kdx.compare.ranking import BASELINE_LABEL, MEASURES, RANKED_BY, Comparison, Point, Ranking, said, shown

# Okabe and Ito's colours, which colour-blind people tell apart; shapes tell the same once more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
SHAPES = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"))
BASELINE, OTHER = "#000000", "#b4b9c0"
HIGHER_IS_BETTER = ("agreement", "accuracy")
LONGEST_LABEL = 18  # letters beside a curve or point; longer ones are numbers of the table
MOST_HEAT_MAPS = 4  # settings of all but τ and α that get heat maps of their own
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and copied
    "text.parse_math": False,  # a $ in a name is a $
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
}


@dataclass(frozen=True)
class Look:
    """How a student is drawn in every picture: few are coloured and labelled, the rest are grey."""

    number: int  # its line of the table
    label: str
    colour: str = OTHER
    marker: str = "o"
    glyph: str = "●"
    is_named: bool = False


def page(comparison: Comparison) -> str:
    """The whole page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    sections = [_section(comparison, ranking, i) for i, ranking in enumerate(comparison.rankings, 1)]
    number = {run.name: f"{s['prefix']}{p.number}" for s in sections for p in s["points"] for run in p.runs}
    template = environment.get_template("page.html.j2")
    return template.render(
        c=comparison, sections=sections, number=number, t=tables, ranked_by=RANKED_BY, zip=zip, id=id
    )


def _section(comparison: Comparison, ranking: Ranking, table: int) -> dict[str, Any]:
    """What the template needs of one ranking."""
    looks = looks_of(ranking)
    prefix = f"{table}." if len(comparison.rankings) > 1 else ""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": str(table)}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that matplotlib's font lacks is drawn by the reader's browser
        curves = [curves_picture(ranking, looks, measure) for measure in RANKED_BY]
        return {
            "ranking": ranking,
            "prefix": prefix,
            "points": ranking.points,
            "looks": looks,
            "named": [look for look in looks.values() if look.is_named],
            "num_grey": sum(not look.is_named for look in looks.values()),
            "header": tables.header(comparison, ranking),
            "lines": tables.lines(comparison, ranking),
            "front": front_picture(ranking, looks),
            "curves": [picture for picture in curves if picture],
            "heat_maps": heat_maps(ranking, comparison.columns),
            "samples": samples_of(ranking, looks),
        }


def looks_of(ranking: Ranking) -> dict[int, Look]:
    """Give all of a few students a colour; of many, the best, those of the front and the baseline."""
    points = ranking.points
    ordered = [order[0] for measure in RANKED_BY if (order := ranking.by(measure))] + ranking.front + points
    unique = list({id(point): point for point in ordered if not point.is_baseline}.values())
    chosen = [id(point) for point in unique[: len(COLOURS)]]
    baselines = [id(point) for point in points if point.is_baseline][:1]
    looks = {}
    for point in points:
        look = Look(point.number, point.label)
        if id(point) in chosen:
            i = chosen.index(id(point))
            look = Look(point.number, point.label, COLOURS[i], *SHAPES[i], is_named=True)
        elif id(point) in baselines:
            look = Look(point.number, point.label, BASELINE, "X", "✖", is_named=True)
        looks[id(point)] = look
    return looks


def _beside(look: Look, looks: dict[int, Look]) -> str:
    """The text beside a curve or point: its label if those of all are short, else its number in the table."""
    label = look.label.replace(BASELINE_LABEL, "baseline")
    named = [other.label.replace(BASELINE_LABEL, "baseline") for other in looks.values() if other.is_named]
    return label if max(map(len, named)) <= LONGEST_LABEL else f"#{look.number}"


def curves_picture(ranking: Ranking, looks: dict[int, Look], measure: str) -> Markup | None:
    """A held-out measure over tokens, one line a run; None where it was only taken at the end."""
    key = f"eval/{measure}"
    curves: list[tuple[list[tuple[float, float]], Look]] = []
    for point in ranking.points:
        for run in point.runs:
            told = [(float(line["tokens"]), float(line[key])) for line in run.curve if key in line and "tokens" in line]
            if len(told) > 1:
                curves.append((told, looks[id(point)]))
    if not curves:
        return None
    figure, axes = _figure()
    for told, look in sorted(curves, key=lambda curve: curve[1].is_named):  # grey ones below
        axes.plot(
            [tokens for tokens, _ in told], [value for _, value in told], color=look.colour, markevery=[-1],
            linewidth=1.4 if look.is_named else 0.7, linestyle="--" if look.colour == BASELINE else "-",
            marker=look.marker if look.is_named else "",
        )  # fmt: skip
    furthest = max(told[-1][0] for told, _ in curves)
    late = [value for told, _ in curves for tokens, value in told if tokens >= furthest / 3]
    low, high = min(late), max(late)
    is_cut = low < high < max(value for told, _ in curves for _, value in told)
    if is_cut:  # the steep start would flatten what tells the runs apart
        axes.set_ylim(low - 0.06 * (high - low), high + 0.02 * (high - low))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _thousands(value)))
    axes.set_xlabel("tokens")
    cut = " (the start is above)" if is_cut else ""
    axes.set_title(f"held-out {tables.HEADINGS[measure]} over training{cut}", loc="left", fontsize=9)
    ends = {look.number: (*told[-1], look) for told, look in reversed(curves) if look.is_named}  # of seeds, the first
    _label_ends(axes, list(ends.values()), [_beside(look, looks) for _, _, look in ends.values()])
    return _svg(figure, f"Held-out {tables.HEADINGS[measure]} over tokens, one line for each run")


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, Look]], texts: Sequence[str]) -> None:
    """Write each label right of its curve's end, no two on top of one another."""
    axes.figure.canvas.draw()  # the limits are known from here on
    gap = 0.062  # of the height of the axes: one line of text
    to_axes = axes.transData + axes.transAxes.inverted()
    order = sorted(range(len(ends)), key=lambda i: ends[i][1])
    heights = [float(to_axes.transform((ends[i][0], ends[i][1]))[1]) for i in order]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    over = max(0.0, heights[-1] - 1.0) if heights else 0.0
    heights = [height - over for height in heights]
    for i in range(len(heights) - 2, -1, -1):
        heights[i] = min(heights[i], heights[i + 1] - gap)
    for i, height in zip(order, heights, strict=True):
        x, y, look = ends[i]
        axes.annotate(
            texts[i], xy=(x, y), xytext=(1.03, height), textcoords="axes fraction", color=_ink(look), va="center",
            annotation_clip=False, arrowprops={"arrowstyle": "-", "color": look.colour, "linewidth": 0.5, "shrinkB": 3},
        )  # fmt: skip
    longest = max(map(len, texts), default=0)
    axes.figure.subplots_adjust(right=0.94 - 0.0165 * longest)


def _ink(look: Look) -> str:
    """A colour for text: the paler two are darkened to be readable on white."""
    return {"#56B4E9": "#1F78B4", "#E69F00": "#A66F00", "#CC79A7": "#A8487C"}.get(look.colour, look.colour)


def _thousands(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def front_picture(ranking: Ranking, looks: dict[int, Look]) -> Markup | None:
    """CE against KL with the Pareto front; None where there are fewer than two students to draw."""
    drawn = [(*both, looks[id(point)]) for point in ranking.points if (both := point.kl_and_ce)]
    if len(drawn) < 2:
        return None
    figure, axes = _figure()
    front = sorted(both for point in ranking.front if (both := point.kl_and_ce))
    axes.step([kl for kl, _ in front], [ce for _, ce in front], where="post", color="#888888", linewidth=1, zorder=1)
    for kl, ce, look in reversed(drawn):
        size, height = (36, 3) if look.is_named else (14, 2)
        axes.scatter([kl], [ce], s=size, color=look.colour, marker=look.marker, zorder=height, linewidths=0)
    axes.margins(x=0.22, y=0.15)
    axes.set_xlim(right=axes.get_xlim()[1] + 0.1 * (axes.get_xlim()[1] - axes.get_xlim()[0]))  # room for labels
    axes.set_xlabel("KL to the teacher (lower is nearer to it)")
    axes.set_title("CE of the labels against KL; line: Pareto front", loc="left", fontsize=9)
    _label_points(axes, drawn, [_beside(look, looks) for _, _, look in drawn], front)
    return _svg(figure, f"CE against KL. On the Pareto front: {'; '.join(ranking.front_labels)}")


def _label_points(
    axes: Axes, points: Sequence[tuple[float, float, Look]], texts: Sequence[str], front: Sequence[tuple[float, float]]
) -> None:
    """Label the named points, each where it covers the least of points, labels and the front."""
    axes.figure.canvas.draw()
    spots = [tuple(axes.transData.transform((x, y))) for x, y, _ in points]
    taken: list[tuple[float, float, float, float]] = [(x - 3, y - 3, x + 3, y + 3) for x, y in spots]
    corners = [tuple(axes.transData.transform(corner)) for corner in front]
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        taken += [(x0, y0, x1, y0), (x1, y1, x1, y0)]
    frame = axes.get_window_extent()
    for (x, y), (_, _, look), text in zip(spots, points, texts, strict=True):
        if not look.is_named:
            continue
        width, height = 5.5 * len(text), 8.0
        best = None
        for dx, dy in ((6, 0), (-6 - width, 0), (-width / 2, 9), (-width / 2, -9), (5, 8), (5, -8), (-5 - width, 8),
                       (-5 - width, -8), (6, 17), (6, -17), (-6 - width, 17), (-6 - width, -17)):  # fmt: skip
            box = (x + dx, y + dy - height / 2, x + dx + width, y + dy + height / 2)
            covers = sum(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken)
            outside = box[0] < frame.x0 or box[2] > frame.x1 or box[1] < frame.y0 or box[3] > frame.y1
            if best is None or covers + 5 * outside < best[0]:
                best = (covers + 5 * outside, dx, dy, box)
        assert best is not None
        taken.append(best[3])
        at = axes.transData.inverted().transform((x, y))
        axes.annotate(text, xy=tuple(at), xytext=best[1:3], textcoords="offset points", color=_ink(look), va="center")


def heat_maps(ranking: Ranking, names: dict[str, str]) -> list[tuple[str, int, list[Markup]]]:
    """For each setting of all but τ and α under which both were varied: a heat map for each measure."""
    axes = ("loss.temperature", "loss.alpha")
    groups: dict[str, list[Point]] = {}
    for point in ranking.points:
        if not point.is_baseline and all(type(point.runs[0].config.get(axis)) in (int, float) for axis in axes):
            setting = {key: value for key, value in point.values.items() if key not in axes}
            groups.setdefault(said(setting), []).append(point)
    found = []
    for points in groups.values():
        grid = {tuple(float(p.runs[0].config[axis]) for axis in axes): p for p in points}
        temperatures, alphas = (sorted({key[i] for key in grid}) for i in (0, 1))
        if len(temperatures) < 2 or len(alphas) < 2:
            continue
        rest = {key: value for key, value in points[0].values.items() if key not in axes}
        words = ", ".join(f"{names.get(key, key)} {shown(value)}" for key, value in rest.items())
        pictures = [_heat_map(grid, temperatures, alphas, measure, words) for measure in MEASURES]
        found.append((words, len(alphas), [picture for picture in pictures if picture]))
    return found[:MOST_HEAT_MAPS]


def _heat_map(
    grid: dict[tuple[float, ...], Point], temperatures: list[float], alphas: list[float], measure: str, words: str
) -> Markup | None:
    values = {at: value for at, point in grid.items() if (value := point.measures[measure]) is not None}
    if not values:
        return None
    figure, axes = _figure(width=0.56 * max(len(alphas), 5) + 0.6, height=0.36 * max(len(temperatures), 3) + 0.75)
    axes.grid(visible=False)
    low, high = min(values.values()), max(values.values())
    is_higher = measure in HIGHER_IS_BETTER
    best = high if is_higher else low
    colours = matplotlib.colormaps["cividis" if is_higher else "cividis_r"]
    for (temperature, alpha), value in values.items():
        x, y = alphas.index(alpha), temperatures.index(temperature)
        share = (value - low) / (high - low) if high > low else 0.5
        colour = colours(0.12 + 0.88 * share)
        border = {"edgecolor": "#D55E00", "linewidth": 2, "zorder": 3} if value == best else {"edgecolor": "white"}
        axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, **border))
        light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 0.5
        text = tables.number(measure, value)
        axes.text(x, y, text, ha="center", va="center", color="black" if light else "white", zorder=4, fontsize=7.5)
    axes.set_xlim(-0.55, len(alphas) - 0.45)
    axes.set_ylim(-0.55, len(temperatures) - 0.45)
    axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    axes.set_yticks(range(len(temperatures)), [f"{temperature:g}" for temperature in temperatures])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("α")
    axes.set_ylabel("τ", rotation=0, labelpad=6)
    better = "higher" if is_higher else "lower"
    axes.set_title(f"{tables.HEADINGS[measure]} ({better} is better)", loc="left", fontsize=9)
    where = f", {words}" if words else ""
    return _svg(figure, f"Heat map of {tables.HEADINGS[measure]} over temperature and alpha{where}")


def _figure(width: float = 4.0, height: float = 3.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=72)  # a pixel is a point
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    figure.subplots_adjust(left=0.5 / width, right=1 - 0.1 / width, bottom=0.45 / height, top=1 - 0.3 / height)
    return figure, axes


def _svg(figure: Figure, label: str) -> Markup:
    """A figure as an element of the page, with a name for those who cannot see it."""
    stream = io.StringIO()
    salt = f"{matplotlib.rcParams['svg.hashsalt']} {label}"
    with matplotlib.rc_context({"svg.hashsalt": salt}):  # ids that are the same on any day, and single in a page
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text)  # names of groups are not; text has no bare <
    text = re.sub(r"<style type=\"text/css\">.*?</style>", "", text, count=1)  # it would rule the whole page
    box = re.search(r"viewBox=\"([^\"]*)\"", text)
    assert box is not None
    width = float(box[1].split()[2])
    size = f"min-width:{0.95 * width:.0f}px;max-width:{1.4 * width:.0f}px"  # letters of one size in all pictures
    start = f'<svg class="picture" style="{size}" {box[0]} role="img" aria-label="{escape(label)}">'
    text = start + text[text.index(">") + 1 :]
    return Markup(text)


def samples_of(ranking: Ranking, looks: dict[int, Look]) -> list[dict[str, Any]]:
    """Each prompt with the distinct answers of reference, teacher and untouched student, and each student's own."""
    prompts: dict[Any, dict[str, Any]] = {}
    for point in ranking.points:
        for sample in point.runs[0].samples:
            one = prompts.setdefault(
                sample["prompt"], {"prompt": sample["prompt"], "others": {}, "named": [], "grey": []}
            )
            for who in ("reference", "teacher", "untouched"):
                if who in sample:
                    one["others"][who, sample[who]] = None
            look = looks[id(point)]
            if "student" in sample:
                one["named" if look.is_named else "grey"].append((look, sample["student"]))
    return list(prompts.values())
