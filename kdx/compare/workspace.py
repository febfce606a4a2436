"""Save a W&B dashboard for the runs of a comparison: `kdx compare --wandb` (the extra `workspace`)."""

import os
import shlex
from importlib.util import find_spec
from typing import Any

from kdx.compare.ranking import Comparison, Run
from kdx.errors import ConfigError, MachineError
from kdx.run.tracking import CONSOLE, has_login

CURVES = {
    "Held out, at temperature 1": ("eval/kl", "eval/ce", "eval/agreement"),
    "Training (not comparable across temperature and alpha)": ("train/loss", "train/kd", "train/ce"),
}
POINT = {"loss.temperature": "temperature", "loss.alpha": "alpha"}  # logged as plain summary values by every run
HELD_OUT = ("eval/kl", "eval/reverse_kl", "eval/agreement", "eval/ce", "eval/accuracy")
MOST_KEYS = 5  # axes of the parallel coordinates besides temperature and alpha
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
    ids = {
        run: id_file.read_text().strip() for run in comparison.runs if (id_file := run.path / "wandb_id.txt").exists()
    }
    if not ids:
        raise ConfigError("--wandb", "none of these runs was tracked with W&B", "Run them with tracking.mode=offline")
    os.environ["WANDB_SILENT"] = "true"
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        api = wandb.Api(timeout=PATIENCE)
        places = {f"{_place(run, 'entity', api.default_entity)}/{_place(run, 'project', 'kdx')}" for run in ids}
        if len(places) > 1:
            what = f"these runs are in several projects: {', '.join(sorted(places))}"
            raise ConfigError("--wandb", what, "A dashboard belongs to one project; compare the runs of one")
        (place,) = places
        uploaded = _uploaded(api, place, list(ids.values()))
        missing = [run for run in ids if ids[run] not in uploaded]
        if missing:
            what = f"{place} has {len(uploaded)} of these {len(ids)} runs"
            hint = f"Upload the others with: wandb sync {_sync_folders(missing, ids)}"
            if not uploaded:
                raise ConfigError("--wandb", what, hint)
            CONSOLE.print(f"warning: {what}. {hint}", style="yellow", markup=False)
        return str(_workspace(comparison, place, list(ids.values())).save().url)
    except (wandb.Error, WandbApiFailedError) as error:
        what = " ".join(str(error).split())[:200].rstrip(".")
        hint = "The comparison is written; run the same command again to save the dashboard"
        raise MachineError("--wandb", what, hint) from None


def _place(run: Run, what: str, default: Any) -> Any:
    """Where a run was logged, as kdx.run.tracking decides it."""
    return run.config.get(f"tracking.{what}") or os.environ.get(f"WANDB_{what.upper()}") or default


def _uploaded(api: Any, place: str, ids: list[str]) -> set[str]:
    """Which of these runs the server has; none if the project does not exist yet."""
    try:
        return {run.id for run in api.runs(place, filters={"name": {"$in": ids}}, per_page=200)}
    except ValueError as error:
        if "Could not find project" not in str(error):
            raise
        return set()


def _sync_folders(runs: list[Run], ids: dict[Run, str]) -> str:
    """The wandb/ folders that hold these runs, for `wandb sync`."""
    near = [(parent / "wandb", run) for run in runs for parent in run.path.parents]
    return shlex.join(dict.fromkeys(str(place) for place, run in near if any(place.glob(f"*run-*-{ids[run]}"))))


def _workspace(comparison: Comparison, place: str, ids: list[str]) -> Any:
    """Curves over tokens, parallel coordinates from the swept keys to the held-out measures, CE against KL."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    axes = {key: wr.SummaryMetric(name) for key, name in POINT.items()}
    axes |= {key: wr.Config(key) for key in comparison.differing[:MOST_KEYS] if key not in POINT}
    axes |= {name: wr.SummaryMetric(name) for name in HELD_OUT}
    columns = [wr.ParallelCoordinatesPlotColumn(metric, display_name=name) for name, metric in axes.items()]
    kl, ce = axes["eval/kl"], axes["eval/ce"]
    scatter = wr.ScatterPlot(title="CE against KL, lower is better in both", x=kl, y=ce)
    parallel = wr.ParallelCoordinatesPlot(title="From settings to measures", columns=columns)
    sections = [ws.Section("Which is better", panels=[scatter, parallel], is_open=True)]
    for title, names in CURVES.items():
        plots = [wr.LinePlot(title=name, x="tokens", y=[name], max_runs_to_show=len(ids)) for name in names]
        sections.append(ws.Section(title, panels=plots, is_open=True))
    entity, _, project = place.partition("/")
    sweeps = sorted({str(run.config.get("sweep.name") or run.name) for run in comparison.runs})
    pinned = [f"summary:{name}" for name in (*POINT.values(), "eval/kl", "eval/ce")]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"kdx: {', '.join(sweeps[:3])}",
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="tokens", max_runs=len(ids)),
        runset_settings=ws.RunsetSettings(filters=[expr.Metric("ID").isin(ids)], pinned_columns=pinned),
    )
