"""The comparison at W&B: a run of its own, `comparison`, in the group of its sweep."""

import hashlib
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from kdx.compare.page import STYLE, drawings
from kdx.compare.ranking import RANKED_BY, Comparison, Run
from kdx.compare.tables import as_json, row_of
from kdx.errors import one_line
from kdx.run.files import read_json, write_json
from kdx.run.tracking import open_whole, wandb_mode

SENT = "wandb_comparison.json"  # what was sent last, and what was said then


def publish(comparison: Comparison, folder: Path, mode: str = "") -> str:
    """Make or update the run, whose files lie in folder/wandb → the group's address, or the line that uploads all.

    mode: as tracking.mode; by default that of the runs, and what was sent already is not sent again.
    """
    os.environ["WANDB_SILENT"] = "true"
    digest = hashlib.sha256(as_json(comparison).encode()).hexdigest()
    sent = read_json(folder / SENT)
    if mode or sent.get("digest") != digest:
        try:
            sent = {"digest": digest, "line": _send(comparison, folder, mode)}
        except Exception as error:  # the comparison itself is written
            return f"W&B has no comparison: {one_line(error)}"
        if sent["line"]:
            write_json(folder / SENT, sent)
    return str(sent["line"])


def tracked(comparison: Comparison) -> dict[str, Run]:
    """Return the runs that W&B knows, by id."""
    files = {run.path / "wandb_id.txt": run for run in comparison.runs}
    return {file.read_text().strip(): run for file, run in files.items() if file.exists()}


def name_of(runs: dict[str, Run]) -> str:
    """Name a comparison by its sweeps."""
    return ", ".join(sorted({str(run.config.get("sweep.name") or run.name) for run in runs.values()}))


def _send(comparison: Comparison, folder: Path, mode: str) -> str:
    runs = tracked(comparison)
    config = next(iter(runs.values())).config if runs else {"tracking.mode": "disabled"}
    mode = wandb_mode(mode or config["tracking.mode"])
    if mode == "disabled" or not comparison.rankings:
        return ""
    name = name_of(runs)
    group = config.get("tracking.group") or config.get("sweep.name")
    about: dict[str, Any] = {key: config.get(f"tracking.{key}") for key in ("project", "entity")}
    about |= {"group": group, "config": {"comparison": name, "num_runs": len(comparison.runs)}}
    id = hashlib.sha256(name.encode()).hexdigest()[:8]
    with open_whole(mode, folder, id, name="comparison", job_type="comparison", **about) as run:
        run.log(dict(_media(comparison, folder)))
    if run.offline:
        return f"W&B: offline; to upload: {shlex.join(['wandb', 'sync', str(folder / 'wandb')])}"
    return f"W&B: {run.url.rpartition('/runs/')[0]}" + (f"/groups/{quote(group)}" if group else "")


def _media(comparison: Comparison, folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield the ranking as a table, the page, and its pictures."""
    import wandb

    intervals = [f"{name}_minus_best_{end}" for name in RANKED_BY for end in ("low", "high")]
    names = ["table", "point", *RANKED_BY, *intervals, "pareto", "tied", "runs"]
    rows = []
    for number, ranking in enumerate(comparison.rankings, 1):
        for point in ranking.points:
            tied = ", ".join(name for name in RANKED_BY if point.is_best(name))  # with the best, by these measures
            row = row_of(point, []) | {"table": number, "point": str(point), "tied": tied, "pareto": point.pareto_front}
            rows.append([row.get(name) for name in names])
    yield "ranking", wandb.Table(columns=names, data=rows)
    yield "page", wandb.Html(str(folder / "compare.html"), inject=False)
    with matplotlib.rc_context(STYLE):
        for number, ranking in enumerate(comparison.rankings, 1):
            for axes in drawings(ranking):
                title = axes.get_title(loc="left")
                key = re.split("[,;]", title)[0].replace(" ", "_") + f"_{number}" * (number > 1)
                axes.figure.set_dpi(200)
                canvas = FigureCanvasAgg(axes.figure)
                canvas.draw()
                yield f"pictures/{key}", wandb.Image(np.asarray(canvas.buffer_rgba()), caption=title)
