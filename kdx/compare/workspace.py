"""Save a W&B dashboard for the runs of a comparison: `kdx compare --wandb` (the extra `workspace`)."""

import os
import shlex
from importlib.util import find_spec
from typing import Any

from kdx.compare.ranking import MOST_KEYS, Comparison, Run
from kdx.errors import ConfigError, MachineError
from kdx.run.tracking import CONSOLE, has_login

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
    if not has_login():
        raise ConfigError("--wandb", "saves a dashboard at W&B, and there is no login", "Run: wandb login")


def save(comparison: Comparison) -> str:
    """Save a dashboard of the runs in their W&B project and return its address.

    Raises ConfigError if the project has none of the runs, MachineError if the server does not answer.
    """
    files = {run: run.path / "wandb_id.txt" for run in comparison.runs}
    ids = {file.read_text().strip(): run for run, file in files.items() if file.exists()}
    if not ids:
        raise ConfigError("--wandb", "none of these runs was tracked with W&B", "Run them with tracking.mode=offline")
    os.environ["WANDB_SILENT"] = "true"
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    def setting(run: Run, key: str, default: Any) -> Any:  # as kdx.run.tracking decides it
        return run.config.get(f"tracking.{key}") or os.environ.get(f"WANDB_{key.upper()}") or default

    try:
        api = wandb.Api(timeout=PATIENCE)
        defaults = {"entity": api.default_entity, "project": "kdx"}
        projects = {"/".join(setting(run, key, default) for key, default in defaults.items()) for run in ids.values()}
        if len(projects) > 1:
            what = f"these runs are in several projects: {', '.join(sorted(projects))}"
            raise ConfigError("--wandb", what, "A dashboard belongs to one project; compare the runs of one")
        (project,) = projects
        missing = _not_uploaded(api, project, ids)
        if missing:
            what = f"{project} has {len(ids) - len(missing)} of these {len(ids)} runs"
            hint = f"Upload the missing ones with: wandb sync {_sync_folders(missing)}"
            if len(missing) == len(ids):
                raise ConfigError("--wandb", what, hint)
            CONSOLE.print(f"warning: {what}. {hint}", style="yellow", markup=False)
        return str(_workspace(comparison, project, list(ids)).save().url)
    except (wandb.Error, WandbApiFailedError) as error:
        what = " ".join(str(error).split())[:200].rstrip(".")
        hint = "The comparison is written; run the same command again to save the dashboard"
        raise MachineError("--wandb", what, hint) from None


def _not_uploaded(api: Any, project: str, ids: dict[str, Run]) -> dict[str, Run]:
    try:
        uploaded = {run.id for run in api.runs(project, filters={"name": {"$in": list(ids)}}, per_page=200)}
    except ValueError as error:
        if "Could not find project" not in str(error):
            raise
        uploaded = set()
    return {name: run for name, run in ids.items() if name not in uploaded}


def _sync_folders(runs: dict[str, Run]) -> str:
    """The wandb/ folders that hold these runs, for `wandb sync`."""
    near = [(parent / "wandb", name) for name, run in runs.items() for parent in run.path.parents]
    return shlex.join(dict.fromkeys(str(folder) for folder, name in near if any(folder.glob(f"*run-*-{name}"))))


def _workspace(comparison: Comparison, project: str, ids: list[str]) -> Any:
    """Curves over tokens, parallel coordinates from the swept keys to the held-out measures, CE against KL."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    axes = {key: wr.SummaryMetric(name) for key, name in POINT.items()}
    axes |= {key: wr.Config(key) for key in comparison.differing[:MOST_KEYS] if key not in POINT}
    axes |= {name: wr.SummaryMetric(name) for name in HELD_OUT}
    columns = [wr.ParallelCoordinatesPlotColumn(metric, display_name=name) for name, metric in axes.items()]
    scatter = wr.ScatterPlot(title="CE against KL, lower is better in both", x=axes["eval/kl"], y=axes["eval/ce"])
    parallel = wr.ParallelCoordinatesPlot(title="From settings to measures", columns=columns)
    sections = [ws.Section("Which is better", panels=[scatter, parallel], is_open=True)]
    for title, names in CURVES.items():
        plots = [wr.LinePlot(title=name, x="tokens", y=[name], max_runs_to_show=len(ids)) for name in names]
        sections.append(ws.Section(title, panels=plots, is_open=True))
    entity, _, name = project.partition("/")
    sweeps = sorted({str(run.config.get("sweep.name") or run.name) for run in comparison.runs})
    pinned = [f"summary:{metric}" for metric in (*POINT.values(), "eval/kl", "eval/ce")]
    return ws.Workspace(
        entity=entity, project=name, name=f"kdx: {', '.join(sweeps[:3])}", sections=sections,
        settings=ws.WorkspaceSettings(x_axis="tokens", max_runs=len(ids)),
        runset_settings=ws.RunsetSettings(filters=[expr.Metric("ID").isin(ids)], pinned_columns=pinned),
    )  # fmt: skip
