"""kdx compare --wandb: a dashboard at W&B, made ready for the runs that are compared (the extra `workspace`)."""

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from typing import Any, get_type_hints

from kdx.compare.ranking import Comparison, Run, listed
from kdx.config import Config
from kdx.errors import ConfigError, MachineError
from kdx.run.tracking import CONSOLE, has_login

CURVES = {
    "Held out, at temperature 1": ("eval/kl", "eval/ce", "eval/agreement"),
    "Training (not comparable across temperature and alpha)": ("train/loss", "train/kd", "train/ce"),
}
POINT = {"loss.temperature": "temperature", "loss.alpha": "alpha"}  # plain columns of every run
HELD_OUT = ("eval/kl", "eval/reverse_kl", "eval/agreement", "eval/ce", "eval/accuracy")
PATIENCE = 20  # seconds for the server to answer


def check() -> None:
    """Refuse before anything is read what could not be saved in the end. Raises ConfigError."""
    if find_spec("wandb_workspaces") is None:
        what = "needs the package wandb-workspaces, which is not installed"
        raise ConfigError("--wandb", what, "pip install wandb-workspaces")
    if not has_login():
        raise ConfigError("--wandb", "saves a dashboard at W&B, and there is no login", "Do: wandb login")


def save(comparison: Comparison) -> str:
    """Save a new dashboard of the runs compared, in their W&B project → its address.

    Raises ConfigError where the project has none of them, MachineError where the server does not answer.
    """
    tracked = [run for run in comparison.runs if _id(run)]
    if not tracked:
        raise ConfigError("--wandb", "none of these runs was tracked with W&B", "Run them with tracking.mode=offline")
    os.environ["WANDB_SILENT"] = "true"
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        api = wandb.Api(timeout=PATIENCE)
        places = sorted({f"{_told(r, 'entity', api.default_entity)}/{_told(r, 'project', 'kdx')}" for r in tracked})
        if len(places) > 1:
            what = f"these runs are in several projects: {listed(places)}"
            raise ConfigError("--wandb", what, "A dashboard belongs to one project: compare those of one")
        arrived = _arrived(api, places[0], [_id(run) for run in tracked])
        missing = [run for run in tracked if _id(run) not in arrived]
        if missing:
            what = f"{places[0]} has {len(arrived)} of these {len(tracked)} runs"
            mend = f"What is missing is kept offline; to upload it: wandb sync {_folders(missing)}"
            if not arrived:
                raise ConfigError("--wandb", what, mend)
            CONSOLE.print(f"warning: {what}. {mend}", style="yellow", markup=False)
        return str(_composed(comparison, places[0], [_id(run) for run in tracked]).save().url)
    except (wandb.Error, WandbApiFailedError) as error:
        what = " ".join(str(error).split())[:200].rstrip(".")
        mend = "The comparison itself is written; the same command again saves the dashboard"
        raise MachineError("--wandb", what, mend) from None


def _id(run: Run) -> str:
    """Its id at W&B; empty if it has none. A run folder may be somebody else's."""
    file = run.path / "wandb_id.txt"
    kept = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
    return kept if re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", kept) else ""


def _told(run: Run, what: str, default: Any) -> Any:
    """Where a run went, as kdx.tracking decides it."""
    return run.config.get(f"tracking.{what}") or os.environ.get(f"WANDB_{what.upper()}") or default


def _arrived(api: Any, place: str, ids: list[str]) -> set[str]:
    """Which of these runs the server has; a project that is not there has none."""
    try:
        return {run.id for run in api.runs(place, filters={"name": {"$in": ids}}, per_page=200)}
    except ValueError as error:
        if "Could not find project" not in str(error):
            raise
        return set()


def _folders(runs: Sequence[Run]) -> str:
    """The folders of W&B's files that hold these runs, as `wandb sync` takes them."""
    near = [(parent / "wandb", run) for run in runs for parent in run.path.parents]
    found = dict.fromkeys(str(place) for place, run in near if any(place.glob(f"*run-*-{_id(run)}")))
    return shlex.join(found or ["outputs/wandb"])


def _composed(comparison: Comparison, place: str, ids: list[str]) -> Any:
    """Curves over tokens, parallel coordinates from what was varied to the held-out measures, CE against KL."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    varied = [*POINT, *(key for key in comparison.columns if key not in POINT)]
    point = [wr.SummaryMetric(POINT[key]) if key in POINT else wr.Config(_node(key)) for key in varied]
    axes = [
        wr.ParallelCoordinatesPlotColumn(metric, display_name=key) for key, metric in zip(varied, point, strict=True)
    ]
    axes += [wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(name), display_name=name) for name in HELD_OUT]
    kl, ce = wr.SummaryMetric("eval/kl"), wr.SummaryMetric("eval/ce")
    first = [wr.ScatterPlot(title="CE against KL, both better when lower", x=kl, y=ce)]
    first += [wr.ParallelCoordinatesPlot(title="From the point to the measures", columns=axes)]
    sections = [ws.Section("Which is better", panels=first, is_open=True)]
    for title, names in CURVES.items():
        plots = [wr.LinePlot(title=name, x="tokens", y=[name], max_runs_to_show=len(ids)) for name in names]
        sections.append(ws.Section(title, panels=plots, is_open=True))
    entity, _, project = place.partition("/")
    sweeps = sorted({str(name) for run in comparison.runs if (name := run.config.get("sweep.name"))})
    columns = [f"summary:{name}" for name in (*POINT.values(), "eval/kl", "eval/ce")]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"kdx: {listed(sweeps, 3) or listed([run.name for run in comparison.runs], 3)}",
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="tokens", max_runs=len(ids)),
        runset_settings=ws.RunsetSettings(filters=[expr.Metric("ID").isin(ids)], pinned_columns=columns),
    )


def _node(key: str) -> str:
    """A key as it is typed → its place in a run's config, where what the named function takes is in `options`."""
    group, _, name = key.partition(".")
    node = get_type_hints(Config).get(group)
    is_known = not is_dataclass(node) or name.split(".")[0] in {field.name for field in fields(node)}
    return key if is_known else f"{group}.options.{name}"
