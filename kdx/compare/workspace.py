"""Save a W&B dashboard for the runs of a comparison: `kdx compare --wandb` (the extra `workspace`)."""

import os
import shlex
from importlib.util import find_spec
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


def check() -> None:
    """Raise ConfigError if no dashboard could be saved, before anything is read."""
    if find_spec("wandb_workspaces") is None:
        what = "needs the package wandb-workspaces, which is not installed"
        raise ConfigError("--wandb", what, "pip install wandb-workspaces")


def save(comparison: Comparison) -> str:
    """Save a dashboard of the runs in their W&B project and return its address.

    Raises ConfigError if a run is not in that project, MachineError if the server does not answer.
    """
    files = {run.path / "wandb_id.txt": run for run in comparison.runs}
    ids = {file.read_text().strip(): run for file, run in files.items() if file.exists()}
    if not ids:
        raise ConfigError("--wandb", "none of these runs was tracked with W&B", "Run them with tracking.mode=offline")
    os.environ["WANDB_SILENT"] = "true"
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    first = next(iter(ids.values()))
    try:
        api = wandb.Api(timeout=PATIENCE)
        entity = first.config.get("tracking.entity") or os.environ.get("WANDB_ENTITY") or api.default_entity
        name = first.config.get("tracking.project") or os.environ.get("WANDB_PROJECT") or "kdx"
        project = f"{entity}/{name}"
        uploaded = _uploaded(api, project, list(ids))
        if missing := [run for name, run in ids.items() if name not in uploaded]:
            what = f"{project} has {len(uploaded)} of these {len(ids)} runs"
            near = [parent / "wandb" for run in missing for parent in run.path.parents]
            folders = dict.fromkeys(str(folder) for folder in near if any(folder.glob("*run-*")))
            raise ConfigError("--wandb", what, f"Upload the missing ones with: wandb sync {shlex.join(folders)}")
        return str(_workspace(comparison, project, list(ids)).save().url)
    except (wandb.Error, WandbApiFailedError) as error:
        what = " ".join(str(error).split())[:200].rstrip(".")
        hint = "The comparison is written; run the same command again to save the dashboard"
        raise MachineError("--wandb", what, hint) from None


def _uploaded(api: Any, project: str, ids: list[str]) -> set[str]:
    try:
        return {run.id for run in api.runs(project, filters={"name": {"$in": ids}}, per_page=200)}
    except ValueError as error:
        if "Could not find project" not in str(error):
            raise
        return set()


def _workspace(comparison: Comparison, project: str, ids: list[str]) -> Any:
    """Curves over tokens, parallel coordinates from the swept keys to the held-out measures, CE against KL."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    own = [key for key in comparison.differing[:MOST_KEYS] if key not in POINT]
    held_out = {name: wr.SummaryMetric(name) for name in HELD_OUT}
    axes = [*map(wr.SummaryMetric, POINT.values()), *map(wr.Config, own), *held_out.values()]
    columns = [wr.ParallelCoordinatesPlotColumn(axis) for axis in axes]
    scatter = wr.ScatterPlot(
        title="CE against KL, lower is better in both", x=held_out["eval/kl"], y=held_out["eval/ce"]
    )
    parallel = wr.ParallelCoordinatesPlot(title="From settings to measures", columns=columns)
    sections = [ws.Section("Which is better", panels=[scatter, parallel], is_open=True)]
    for title, names in CURVES.items():
        plots = [wr.LinePlot(title=name, x="tokens", y=[name], max_runs_to_show=len(ids)) for name in names]
        sections.append(ws.Section(title, panels=plots, is_open=True))
    entity, _, name = project.partition("/")
    sweeps = sorted({str(run.config.get("sweep.name") or run.name) for run in comparison.runs})
    return ws.Workspace(
        entity=entity, project=name, name=f"kdx: {', '.join(sweeps[:3])}", sections=sections,
        settings=ws.WorkspaceSettings(x_axis="tokens", max_runs=len(ids)),
        runset_settings=ws.RunsetSettings(filters=[expr.Metric("ID").isin(ids)]),
    )  # fmt: skip
