"""The comparison at W&B: a run of its own, `comparison`, in the group of its sweep, and a dashboard of the runs."""

import hashlib
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from kdx.compare.page import STYLE, drawings
from kdx.compare.ranking import COLUMNS, DIGESTS, EFFECTIVE_ALPHAS, MOST_KEYS, RANKED, Comparison, Run
from kdx.compare.tables import as_json, row_of
from kdx.errors import ConfigError, MachineError, one_line
from kdx.run.files import read_json, write_json
from kdx.run.identity import digest
from kdx.run.tracking import open_whole, wandb_mode

SENT = "wandb_comparison.json"  # what was sent last, and what was said then


def publish(comparison: Comparison, folder: Path, mode: str = "") -> str:
    """Make or update the run, whose files lie in folder/wandb → the group's address, or the line that uploads all.

    mode: as tracking.mode; by default that of the runs, and what was sent already is not sent again.
    """
    os.environ["WANDB_SILENT"] = "true"
    content = hashlib.sha256(as_json(comparison).encode()).hexdigest()
    sent = read_json(folder / SENT)
    if not mode and sent.get("digest") == content:
        return str(sent["line"])
    try:
        line = _send(comparison, folder, mode)
    except Exception as error:  # the comparison itself is written
        return f"W&B has no comparison: {one_line(error)}"
    if line:
        write_json(folder / SENT, {"digest": content, "line": line})
    return line


def tracked(comparison: Comparison) -> dict[str, Run]:
    """Return the runs that W&B knows, by id."""
    files = {run.path / "wandb_id.txt": run for run in comparison.runs}
    return {file.read_text().strip(): run for file, run in files.items() if file.exists()}


def name_of(runs: dict[str, Run]) -> str:
    return ", ".join(sorted({str(run.config.get("sweep.name") or run.name) for run in runs.values()}))


def _send(comparison: Comparison, folder: Path, mode: str) -> str:
    runs = tracked(comparison)
    config = next(iter(runs.values())).config if runs else {}
    mode = wandb_mode(mode or config.get("tracking.mode", "disabled"))
    if mode == "disabled" or not comparison.rankings:
        return ""
    name, group = name_of(runs), config.get("tracking.group") or config.get("sweep.name")
    id = hashlib.sha256(name.encode()).hexdigest()[:8]
    about: dict[str, Any] = {"name": "comparison", "job_type": "comparison", "group": group}
    about |= {key: config.get(f"tracking.{key}") for key in ("project", "entity")}
    about["config"] = {"comparison": name, "num_runs": len(comparison.runs)}
    with open_whole(mode, folder, id, **about) as run:
        run.log(dict(_media(comparison, folder)))
    if run.offline:
        return f"W&B: offline; to upload: {shlex.join(['wandb', 'sync', str(folder / 'wandb')])}"
    return f"W&B: {run.url.rpartition('/runs/')[0]}" + (f"/groups/{quote(group)}" if group else "")


def _media(comparison: Comparison, folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield the page, the ranking as a table, and the pictures."""
    import wandb

    yield "page", wandb.Html(str(folder / "compare.html"), inject=False)
    intervals = [f"{name}_minus_best_{end}" for name in RANKED for end in ("low", "high")]
    names = ["table", "point", *RANKED, *intervals, *EFFECTIVE_ALPHAS, "pareto", "tied", "runs"]
    rows: list[list[Any]] = []
    with matplotlib.rc_context(STYLE):
        for number, ranking in enumerate(comparison.rankings, 1):
            for point in ranking.points:
                tied = ", ".join(filter(point.is_best, RANKED))  # with the best, by these measures
                about = {"table": number, "point": str(point), "tied": tied, "pareto": point.pareto_front}
                row = row_of(point, []) | about
                rows.append([row.get(name) for name in names])
            for axes in drawings(ranking):
                title = axes.get_title(loc="left")
                key = re.split("[,;]", title)[0].replace(" ", "_") + f"_{number}" * (number > 1)
                axes.figure.set_dpi(200)
                canvas = FigureCanvasAgg(axes.figure)
                canvas.draw()
                yield f"pictures/{key}", wandb.Image(np.asarray(canvas.buffer_rgba()), caption=title)
    yield "ranking", wandb.Table(columns=names, data=rows)


def save_dashboard(comparison: Comparison) -> str:
    """Save a dashboard of these runs in their W&B project, or renew it, and return its address.

    Raises ConfigError if there is nothing to show or no way to, MachineError if the server does not answer.
    """
    runs = tracked(comparison)
    if not runs:
        raise ConfigError("--wandb", "none of these runs was tracked with W&B", "Run them with tracking.mode=offline")
    config = next(iter(runs.values())).config
    entity = config.get("tracking.entity") or os.environ.get("WANDB_ENTITY")
    try:
        import wandb
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces import expr
        from wandb_workspaces.workspaces import internal

        workspace = ws.Workspace(
            entity=entity or wandb.Api().default_entity,
            project=config.get("tracking.project") or os.environ.get("WANDB_PROJECT") or "kdx",
            name=f"kdx: {name_of(runs)[:100]}", sections=_sections(comparison),
            settings=ws.WorkspaceSettings(x_axis="tokens", max_runs=len(runs)),
            runset_settings=ws.RunsetSettings(filters=[expr.Metric("ID").isin([*runs])]),
        )  # fmt: skip
        view = digest({"view": workspace.name})  # the same view each time
        workspace._internal_name = f"nw-{view}-v"
        with suppress(ValueError):  # there is none yet
            workspace._internal_id = internal.get_view_dict(workspace.entity, workspace.project, view)["id"]
        return str(workspace.save().url)
    except ModuleNotFoundError:
        what = "needs the package wandb-workspaces, which is not installed"
        raise ConfigError("--wandb", what, "pip install wandb-workspaces") from None
    except Exception as error:  # of the server, or of W&B's libraries
        hint = "The comparison is written; run the same command again to save the dashboard"
        raise MachineError("--wandb", one_line(error), hint) from None


def _sections(comparison: Comparison) -> list[Any]:
    """Students as points, parallel coordinates from the keys that differ to the measures, curves over tokens."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    held_out = [f"eval/{name}" for name, column in COLUMNS.items() if column.best]
    keys = [key for key in comparison.differing if key not in DIGESTS][:MOST_KEYS]
    axes = [*map(wr.Config, keys), *map(wr.SummaryMetric, held_out)]
    kl, ce = map(wr.SummaryMetric, ("eval/kl", "eval/ce"))
    alpha, temperature = map(wr.Config, ("loss.alpha", "loss.temperature"))
    pull = wr.SummaryMetric("run/effective_alpha_end")
    columns = [wr.ParallelCoordinatesPlotColumn(axis) for axis in axes]
    students = [
        wr.ScatterPlot(title="CE against KL, coloured by the last effective α", x=kl, y=ce, z=pull),
        wr.ScatterPlot(title="KL over τ and α", x=temperature, y=alpha, z=kl),
        wr.ParallelCoordinatesPlot(title="From settings to measures", columns=columns),
    ]
    most = {"x": "tokens", "max_runs_to_show": len(comparison.runs)}
    # `point` is what a run is but for its seed.
    band = {"groupby": wr.Config("point"), "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    curves = [wr.LinePlot(title=name, y=[name], **most, **band) for name in held_out]
    names = ("train/loss", "train/kd", "train/ce", "train/effective_alpha")
    training = [wr.LinePlot(title=name, y=[name], **most) for name in names]
    return [
        ws.Section("Which is better", panels=students, is_open=True),
        ws.Section("Held out, at temperature 1", panels=curves, is_open=True),
        ws.Section("Training (not comparable across temperature and alpha)", panels=training, is_open=False),
    ]
