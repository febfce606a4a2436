"""Save a W&B dashboard for the runs of a comparison: `kdx compare --wandb` (the extra `workspace`)."""

import os
from typing import Any

from kdx.compare.ranking import MOST_KEYS, Comparison
from kdx.errors import ConfigError, MachineError

CURVES = {
    "Held out, at temperature 1": ("eval/kl", "eval/ce", "eval/agreement"),
    "Training (not comparable across temperature and alpha)": ("train/loss", "train/kd", "train/ce"),
}
POINT = {"loss.temperature": "temperature", "loss.alpha": "alpha"}  # logged as plain summary values by every run
HELD_OUT = ("eval/kl", "eval/reverse_kl", "eval/agreement", "eval/ce", "eval/accuracy")
PATIENCE = 20  # seconds for the server to answer


def save(comparison: Comparison) -> str:
    """Save a dashboard in the W&B project of these runs and return its address; offline runs show once they are synced.

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
    """Curves over tokens, parallel coordinates from the swept keys to the held-out measures, CE against KL."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    own = [key for key in comparison.differing[:MOST_KEYS] if key not in POINT]
    held_out = {name: wr.SummaryMetric(name) for name in HELD_OUT}
    axes = [*map(wr.SummaryMetric, POINT.values()), *map(wr.Config, own), *held_out.values()]
    columns = [wr.ParallelCoordinatesPlotColumn(axis) for axis in axes]
    title = "CE against KL, lower is better in both"
    panels = [
        wr.ScatterPlot(title=title, x=held_out["eval/kl"], y=held_out["eval/ce"]),
        wr.ParallelCoordinatesPlot(title="From settings to measures", columns=columns),
    ]
    sections = [ws.Section("Which is better", panels=panels, is_open=True)]
    for title, names in CURVES.items():
        plots = [wr.LinePlot(title=name, x="tokens", y=[name], max_runs_to_show=len(comparison.runs)) for name in names]
        sections.append(ws.Section(title, panels=plots, is_open=True))
    return sections
