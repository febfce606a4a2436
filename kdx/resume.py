"""run.resume and run.like: from the folder of an earlier run to a checked Config."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from kdx.checked import checked
from kdx.compose import PAIRS, SOURCES, Plan, Point, composer_for, laid_over
from kdx.config import leaves
from kdx.errors import ConfigError
from kdx.run.claim import holder
from kdx.run.files import read_json
from kdx.run.folder import is_resumable
from kdx.run.redact import HIDDEN
from kdx.words import key_of


def resumed(name: str, words: list[str], config_dir: str | None = None) -> Plan:
    """Resume a run in its own folder, under its own config with what is typed laid over it. Raises ConfigError."""
    folder = newest() if name == "last" else Path(name)
    where = f"run.resume={name}"
    tree, recorded = _read(folder / "config.yaml", where), _read(folder / "overrides.yaml", where)
    if not is_resumable(folder):
        raise ConfigError(
            where, "has no checkpoint to resume from", f"Start a new run from its words: run.like={folder}"
        )
    new = [word for word in words if word not in recorded and key_of(word) != "run.resume"]
    overrides, faults = composer_for(config_dir).parsed(new)
    typed = [word for word in overrides if not word.key_or_group.startswith("hydra")]
    keys = {word.key_or_group for word in typed}
    tree, unset = laid_over(tree, typed)
    flat, faults = leaves(tree), faults + unset
    hidden = [key for key, value in flat.items() if HIDDEN in str(value)]
    faults += [ConfigError(key, "was recorded without its secret", f"Type it again: {key}=...") for key in hidden]
    config = checked(tree, faults, keys, list(flat))
    sources = read_json(folder / "record.json").get("sources", {}) | {key: "typed" for key in keys if key in SOURCES}
    kept = [word for word in recorded if key_of(word) not in keys]
    return Plan([Point([*kept, *new], config, sources)], folder, config_dir, command=_command(folder))


def alike(name: str, words: list[str]) -> tuple[list[str], str | None]:
    """Return the words of an earlier run with those typed now laid over them, and its --config-dir. Raises ConfigError."""
    where, folder = f"run.like={name}", Path(name)
    typed = {key_of(word) for word in words}
    typed |= {PAIRS[key] for key in typed & PAIRS.keys()}
    kept = []
    for word in _read(folder / "overrides.yaml", where):
        if key_of(word) in typed or word.startswith("sweep."):
            continue
        if HIDDEN in word:
            raise ConfigError(key_of(word), "was recorded without its secret", f"Type it again: {key_of(word)}=...")
        if "trust_remote_code" in word:
            print(f"kdx: {word} is not taken from {folder}: type it if that code may run", file=sys.stderr)
            continue
        kept.append(word)
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--config-dir", "-cd")
    config_dir: str | None = flags.parse_known_args(_command(folder))[0].config_dir
    return [*kept, *(word for word in words if key_of(word) != "run.like")], config_dir


def newest() -> Path:
    """Find the run under outputs/ that stopped last and can be resumed. Raises ConfigError."""
    files = [file for depth in ("*", "*/*", "sweeps/*/*") for file in Path("outputs").glob(f"{depth}/status.json")]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        state = read_json(file).get("state")
        if state in ("interrupted", "failed", "running") and is_resumable(file.parent) and not holder(file.parent):
            return file.parent
    raise ConfigError("run.resume=last", "no run under outputs/ can be resumed", "Name a run folder")


def _read(file: Path, where: str) -> Any:
    if not file.is_file():
        hint = "Name a folder that kdx made, as outputs/2026-11-24/02-45-09-123456"
        raise ConfigError(where, f"{file.parent} is not a run folder: it has no {file.name}", hint)
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _command(folder: Path) -> list[str]:
    file = folder / "command.txt"
    return shlex.split(file.read_text(encoding="utf-8"), comments=True)[3:] if file.is_file() else []
