"""A run whose data, teacher, tokenizer or plug-ins have changed since.

A job of a sweep runs again, in a folder beside: the one that is stale stays as it is; NAME-2, NAME-3, … follow it, and
the last one is the job's. A single run is refused.
"""

import re
from pathlib import Path
from typing import Any

from kdx import plugins
from kdx.config import Config
from kdx.errors import MachineError
from kdx.run.devices import one_device
from kdx.run.files import read_json
from kdx.run.identity import Drift, differences

_known: dict[str, dict[str, Any]] = {}  # what configs of this process name: the jobs of a sweep share most of it


def newest(folder: Path) -> Path:
    """The last folder of a job, by any of them: its own, or the one that took its place."""
    name = re.fullmatch(r"((?:.*_)?[0-9a-f]{6})(-\d+)?", folder.name)
    if not name:  # not the folder of a sweep's job: somebody's own name
        return folder
    folder = folder.with_name(name[1])
    later = [f for f in folder.parent.glob(f"{folder.name}-*") if re.fullmatch(r"-\d+", f.name[len(folder.name) :])]
    return max(later, key=lambda f: int(f.name.rsplit("-", 1)[1]), default=folder)


def place(config: Config, folder: Path, is_parallel: bool) -> Path:
    """Where a job goes on or starts: its newest folder, or a new one if that is stale.

    What cannot be read now is said when the job starts; if it is done, nothing is lost.
    """
    there = newest(folder)
    try:
        plugins.load()
        with one_device(is_parallel):
            changed = [key for key, _, _ in changes(config, there)]
    except (Exception, SystemExit):  # a source of one's own may do anything
        return there
    if not changed:
        return there
    number = 1 if there == folder else int(there.name.rsplit("-", 1)[1])
    new = folder.with_name(f"{folder.name}-{number + 1}")
    print(f"kdx: {there} is stale ({', '.join(changed)} changed since it ran): {new.name} takes its place", flush=True)
    return new


def changes(config: Config, folder: Path, device: Any = None) -> Drift:
    """What decides which student comes out, and is another now than the run in a folder kept. Raises KdxError."""
    was = read_json(folder / "data.json")
    if not was:
        raise MachineError(str(folder), "its data.json is missing or damaged", "Start anew in another folder")
    now = dict(_now(config, device))
    now.pop("teacher_precision")  # chosen for the device: what is done is not done again on another
    return differences({key: was.get(key) for key in now}, now)


def _now(config: Config, device: Any) -> dict[str, Any]:
    """What a run would keep in data.json, as far as it decides which student comes out."""
    from kdx.prepare import identity_of, origin, read_text, what_is_read
    from kdx.run.launch import build_accelerator
    from kdx.run.tracking import logging_to

    key = what_is_read(config)
    if key not in _known or not config.sweep.name:  # from one single run to the next, files may change
        with logging_to(None, is_main=False):  # what there is to say is said when the job starts
            text, device = read_text(config), device or build_accelerator(config).device
        _known[key] = origin(text, identity_of(config.teacher, text.tokenizer, device), config.student)
    return _known[key]
