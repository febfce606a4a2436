"""What a config may not ask for: code that Hydra would run, and folders outside this one. Trees here are plain."""

import itertools
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kdx.errors import ConfigError
from kdx.run.files import read_json
from kdx.run.redact import secrets_in

FOLDERS = ("run.dir", "sweep.dir", "sweep.subdir", "output_subdir", "launcher.submitit_folder", "launcher.temp_folder")
SHELL = ("setup", "additional_parameters")  # keys of a launcher that go into Slurm's script as they are
PLUGIN = re.compile(r"(hydra\._internal\.core_plugins|hydra_plugins)(\.[a-z_][a-z0-9_]*)+\.[A-Z]\w*(Launcher|Sweeper)")
SAMPLER = re.compile(r"optuna\.samplers\.[A-Z]\w*Sampler")  # what the Optuna sweeper's own YAML names
SEARCHED = re.compile(r"pkg://kdx\.conf|file://((?!\$\{).)+")  # where a config of one's own may search
WRITTEN = (  # what a run writes in its folder, and what makes a folder a model's
    "student", "checkpoints", "plugins", "config.json", "config.yaml", "overrides.yaml", "command.txt", "status.json",
    "data.json", "untouched.json", "metrics.jsonl", "eval_rows.jsonl", "samples.json", "samples.md", "summary.json",
    "kdx.log", "wandb_id.txt",
)  # fmt: skip
LOG_HANDLERS = ("logging.StreamHandler", "logging.NullHandler")


def refuse_code(node: Any, path: str = "") -> None:
    """Refuse every name of something to run but Hydra's own plug-ins and installed ones. Raises ConfigError.

    Hydra instantiates callbacks, launcher, sweeper and logging before a task function runs, so this comes before it.
    """
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        here = f"{path}.{key}".lstrip(".")
        if key in ("_target_", "()", "class") and value is not None and not _may_run(here, key, str(value)):
            raise ConfigError(here, f"names code to run ({value})", "kdx runs none that a config names: take it out")
        refuse_code(value, here)


def _may_run(path: str, key: str, value: str) -> bool:
    """Tell Hydra's plug-ins, and log handlers that write no file, from all else."""
    if key == "_target_":
        wanted = SAMPLER if path == "hydra.sweeper.sampler._target_" else PLUGIN
        return path.startswith("hydra.") and wanted.fullmatch(value) is not None
    return key == "class" and path.startswith(("hydra.job_logging.", "hydra.hydra_logging.")) and value in LOG_HANDLERS


def refuse_untyped(hydra_part: Any) -> None:
    """Refuse in YAML what only a person may ask for, by typing it. Raises ConfigError."""
    if hydra_part["job"].get("env_set"):
        raise ConfigError("hydra.job.env_set", "sets environment variables from a file", "Type it, or take it out")
    for key, value in hydra_part["launcher"].items():
        if (key in SHELL and value) or "\n" in str(value):
            what = f"goes into a shell script ({str(value)[:100]!r}) and comes from a file"
            raise ConfigError(f"hydra.launcher.{key}", what, f"Type it: 'hydra.launcher.{key}=...'")
    for key in FOLDERS:
        value = hydra_part
        for part in key.split("."):
            value = value.get(part)
        if Path(str(value)).is_absolute() or ".." in Path(str(value)).parts or str(value).startswith("~"):
            what = f"leads outside this folder ({value}) and comes from a file"
            raise ConfigError(f"hydra.{key}", what, f"Type it: hydra.{key}=...")


def refuse_swept(keys: Iterable[Any]) -> None:
    """Refuse in a file's `hydra.sweeper.params` what only a person may type: they count as words. Raises ConfigError."""
    for key in keys:
        if str(key).lstrip("+~").startswith("hydra") or "trust_remote_code" in str(key):
            what = f"sets {key}, and comes from a file"
            raise ConfigError("hydra.sweeper.params", what, "Type it, or take it out")


def refuse_secrets(tree: Any, launcher: Any) -> None:
    """Refuse a sweep whose YAML holds a secret in clear. Raises ConfigError.

    Hydra keeps it in multirun.yaml, submitit in its pickles, as it is written: what is taken from the environment stays
    outside. But a launcher's own keys are resolved before, and some go into Slurm's script.
    """
    sweeper = tree["hydra"]["sweeper"]
    words = {key: f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()}
    kept = tree | {"hydra": {"sweeper": sweeper}}
    for key in (*secrets_in(kept), *secrets_in(words, "hydra.sweeper.params")):
        what = "holds a secret, which would be kept in the sweep's folder (by Hydra in multirun.yaml, by submitit)"
        raise ConfigError(key, what, "Take it from the environment: ${oc.env:NAME}")
    for key in secrets_in(launcher, "hydra.launcher", is_resolved=True):
        what = "holds a secret, which the launcher would keep in the sweep's folder"
        raise ConfigError(key, what, "Leave it in the environment, which the jobs inherit")


def refuse_typed_secrets(words: Iterable[tuple[str, Any]]) -> None:
    """Refuse a sweep of which any word has a secret in clear, though a later one may win. Raises ConfigError."""
    for key, value in words:
        values = getattr(value, "list", [value])  # of a swept word several
        for secret in (secret for one in values for secret in secrets_in(one, key)):
            what = "has a secret, which Hydra would keep in a sweep's multirun.yaml"
            raise ConfigError(secret, what, "Put it into the environment: KEY='${oc.env:NAME}'")


def refuse_models_code(tree: dict[str, Any], typed: list[str]) -> None:
    """Refuse to run a model's own code unless that was typed: in a file it would be the file's wish. Raises ConfigError."""
    for group in ("teacher", "student"):
        key = f"{group}.trust_remote_code"
        model = tree.get(group)
        is_asked = isinstance(model, dict) and model.get("trust_remote_code") not in (False, None)
        if is_asked and not any(word.lstrip("+").startswith(f"{key}=") for word in typed):
            raise ConfigError(key, "runs a model's own code, and comes from a file", f"Type it: {key}=true")


def refuse_links(run_dir: Path, within: Path | None = None) -> None:
    """Refuse a run's folder with links through which it would write elsewhere, or with pipes. Raises ConfigError.

    within: the sweep's folder, which that of the run must not leave either.
    """
    below = (Path(here) / name for here, folders, files in os.walk(run_dir) for name in (*folders, *files))
    for path in itertools.chain([run_dir] if within else [], below):
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:  # of a run that goes on
            continue
        place = path.resolve()
        if stat.S_ISLNK(mode) and not place.is_relative_to((within or run_dir).resolve()):
            raise ConfigError(str(path), f"is a link that leads elsewhere, to {place}", "Remove the link")
        if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ConfigError(str(path), "is neither a file nor a folder", "Remove it")


def refuse_foreign(run_dir: Path) -> None:
    """Refuse a folder where what a run writes, or removes, has the name of somebody's own. Raises ConfigError."""
    if not any((run_dir / name).exists() for name in ("overrides.yaml", "data.json")) and not _has_status(run_dir):
        for name in WRITTEN:
            if (run_dir / name).exists():
                slash = "/" if (run_dir / name).is_dir() else ""
                what = f"is no run's, and has a {name}{slash}, which a run would replace"
                raise ConfigError(str(run_dir), what, "Choose another folder with hydra.run.dir=...")


def _has_status(run_dir: Path) -> bool:
    """Whether kdx has written a status there, which says at least these two."""
    return read_json(run_dir / "status.json").keys() >= {"state", "step"}


def refuse_packages(file: Path, tree: Any) -> None:
    """Refuse a config of one's own that searches in Python packages: Hydra would import them.

    tree: what is in the file, unresolved. Only plain words pass: an interpolation may become anything.
    Raises ConfigError.
    """
    hydra_part = tree.get("hydra") if isinstance(tree, dict) else None
    bad = [hydra_part] if isinstance(hydra_part, str) else [p for p in _searched(tree) if not SEARCHED.fullmatch(p)]
    if bad:
        what = f"may name a Python package to search, which would be imported ({bad[0][:100]!r})"
        raise ConfigError(str(file), what, "Only pkg://kdx.conf is searched; give other folders as file://FOLDER")


def _searched(node: Any, is_searched: bool = False) -> Iterator[str]:
    """What any `searchpath` in a tree holds, wherever it is."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _searched(value, is_searched or str(key).endswith("searchpath"))
    elif isinstance(node, list):
        for value in node:
            yield from _searched(value, is_searched)
    elif is_searched and node is not None:
        yield str(node)
