"""Save a W&B dashboard for the runs of a comparison: `kdx compare --wandb` (the extra `workspace`)."""

import os
from typing import Any

from kdx.compare.ranking import COLUMNS, MOST_KEYS, Comparison
from kdx.errors import ConfigError, MachineError

TRAINING = ("train/loss", "train/kd", "train/ce")
PATIENCE = 20  # seconds for the server to answer


def save(comparison: Comparison) -> str:
    """Save a dashboard in the W&B project of these runs and return its address. It shows what has been uploaded.

    Raises ConfigError if there is nothing to show or no way to, MachineError if the server does not answer.
    """
    os.environ["WANDB_SILENT"] = "true"
    try:
        import wandb
        import wandb_workspaces.workspaces as ws
        from wandb.sdk.lib.service.service_connection import WandbApiFailedError
        from wandb_workspaces import expr
    except ImportError:
        what = "needs the package wandb-workspaces, which is not installed"
        raise ConfigError("--wandb", what, "pip install wandb-workspaces") from None
    files = {run.path / "wandb_id.txt": run for run in comparison.runs}
    runs = {file.read_text().strip(): run for file, run in files.items() if file.exists()}
    if not runs:
        raise ConfigError("--wandb", "none of these runs was tracked with W&B", "Run them with tracking.mode=offline")
    config = next(iter(runs.values())).config
    names = sorted({str(run.config.get("sweep.name") or run.name) for run in runs.values()})
    entity = config.get("tracking.entity") or os.environ.get("WANDB_ENTITY")
    try:
        workspace = ws.Workspace(
            entity=entity or wandb.Api(timeout=PATIENCE).default_entity,
            project=config.get("tracking.project") or os.environ.get("WANDB_PROJECT") or "kdx",
            name=f"kdx: {', '.join(names[:3])}", sections=_sections(comparison),
            settings=ws.WorkspaceSettings(x_axis="tokens", max_runs=len(runs)),
            runset_settings=ws.RunsetSettings(filters=[expr.Metric("ID").isin([*runs])]),
        )  # fmt: skip
        return str(workspace.save().url)
    except (wandb.Error, WandbApiFailedError) as error:
        what = " ".join(str(error).split())[:200].rstrip(".")
        hint = "The comparison is written; run the same command again to save the dashboard"
        raise MachineError("--wandb", what, hint) from None


def _sections(comparison: Comparison) -> list[Any]:
    """CE against KL, parallel coordinates from the keys that differ to the held-out measures, curves over tokens."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    held_out = [f"eval/{name}" for name, column in COLUMNS.items() if column.best]
    axes = [*map(wr.Config, comparison.differing[:MOST_KEYS]), *map(wr.SummaryMetric, held_out)]
    columns = [wr.ParallelCoordinatesPlotColumn(axis) for axis in axes]
    kl, ce = map(wr.SummaryMetric, ("eval/kl", "eval/ce"))
    which = [
        wr.ScatterPlot(title="CE against KL, lower is better in both", x=kl, y=ce),
        wr.ParallelCoordinatesPlot(title="From settings to measures", columns=columns),
    ]
    most = {"max_runs_to_show": len(comparison.runs)}
    panels = {
        "Which is better": which,
        "Held out, at temperature 1": [wr.LinePlot(title=y, x="tokens", y=[y], **most) for y in held_out],
        "Training (not comparable across temperature and alpha)": [
            wr.LinePlot(title=y, x="tokens", y=[y], **most) for y in TRAINING
        ],
    }
    return [ws.Section(title, panels=plots, is_open=True) for title, plots in panels.items()]
