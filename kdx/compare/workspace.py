"""Save a W&B dashboard for the runs of a comparison: `kdx compare --wandb` (the extra `workspace`)."""

import os
from contextlib import suppress
from typing import Any

from kdx.compare.ranking import COLUMNS, MOST_KEYS, Comparison
from kdx.compare.wandb_run import name_of, tracked
from kdx.errors import ConfigError, MachineError, one_line
from kdx.run.identity import digest

TRAINING = ("train/loss", "train/kd", "train/ce")
COLORS = (("#440154", 0), ("#21918c", 50), ("#fde725", 100))  # viridis, by percent
PATIENCE = 20  # seconds for the server to answer


def save(comparison: Comparison) -> str:
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
            entity=entity or wandb.Api(timeout=PATIENCE).default_entity,
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
        raise MachineError("--wandb", one_line(error).rstrip("."), hint) from None


def _sections(comparison: Comparison) -> list[Any]:
    """Students as points, parallel coordinates from the keys that differ to the measures, curves over tokens."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    held_out = [f"eval/{name}" for name, column in COLUMNS.items() if column.best]
    axes = [*map(wr.Config, comparison.differing[:MOST_KEYS]), *map(wr.SummaryMetric, held_out)]
    columns = [wr.ParallelCoordinatesPlotColumn(axis) for axis in axes]
    kl, ce = map(wr.SummaryMetric, ("eval/kl", "eval/ce"))
    alpha, temperature = map(wr.Config, ("loss.alpha", "loss.temperature"))
    colors = [wr.GradientPoint(color=color, offset=offset) for color, offset in COLORS]
    which = [
        wr.ScatterPlot(title="CE against KL, coloured by α", x=kl, y=ce, z=alpha, gradient=colors),
        wr.ScatterPlot(title="KL over τ and α", x=temperature, y=alpha, z=kl, gradient=colors),
        wr.ParallelCoordinatesPlot(title="From settings to measures", columns=columns),
    ]
    most = {"x": "tokens", "max_runs_to_show": len(comparison.runs)}
    # `point` is what a run is but for its seed.
    band = {"groupby": wr.Config("point"), "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    curves = [wr.LinePlot(title=y, y=[y], **most, **band) for y in held_out]
    training = [wr.LinePlot(title=y, y=[y], **most) for y in TRAINING]
    return [
        ws.Section("Which is better", panels=which, is_open=True),
        ws.Section("Held out, at temperature 1", panels=curves, is_open=True),
        ws.Section("Training (not comparable across temperature and alpha)", panels=training, is_open=False),
    ]
