"""The points of a sweep: what they are, and the names of their folders."""

import hashlib
import json
import re
from dataclasses import asdict
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from kdx.config import Config

# What cannot change the student is not part of a job's or a sweep's identity.
NOT_IDENTITY = ("run", "sweep", "tracking")
NOT_IDENTITY_TRAIN = ("log_every", "save_every", "keep_checkpoints")


def swept_keys(words: list[str]) -> list[str]:
    """The keys that have several values, in the order typed."""
    parsed = OverridesParser.create().parse_overrides(words)
    return [override.get_key_element().lstrip("+~") for override in parsed if override.is_sweep_override()]


def points(words: list[str]) -> list[list[str]]:
    """Every combination of the swept values as the words of a single run."""
    parsed: list[Override] = OverridesParser.create().parse_overrides(words)
    (batch,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [list(point) for point in batch]


def sweep_name(keys: list[str], config: Config) -> str:
    """A sweep's name: its keys and a short hash of all that is not swept, the same on any day."""
    tree = identity(config)
    for key in keys:
        node: Any = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.get(parent, {})
        if isinstance(node, dict):
            node.pop(last, None)
    return f"{'-'.join(_safe(_short(key)) for key in keys)}-{_digest(tree)}"


def job_name(keys: list[str], tree: dict[str, Any], config: Config) -> str:
    """A job's name: its point and a short hash of its typed config, as temperature-2_alpha-0.7_1a2b3c."""
    parts = []
    for key in keys:
        value: Any = tree
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, dict):  # a group: named by what sets its options apart
            value = next((value[k] for k in ("name", "path", "init") if value.get(k)), key)
        if isinstance(value, float) and value == int(value):
            value = int(value)  # 1 and 1.0 are one point
        parts.append(f"{_short(key)}-{_safe(str(value))}")
    return "_".join([*parts, _digest(identity(config))])


def identity(config: Config) -> dict[str, Any]:
    """The part of a config that decides which student comes out."""
    tree = {k: v for k, v in asdict(config).items() if k not in NOT_IDENTITY}
    tree["train"] = {k: v for k, v in tree["train"].items() if k not in NOT_IDENTITY_TRAIN}
    if tree["loss"]["alpha"] == 0:  # whatever the rest of `loss` says
        tree["loss"] = "cross_entropy"
    return tree


def resolve_job_name(keys: Any, *, _root_: DictConfig) -> str:
    """The resolver behind hydra.sweep.subdir. It reads all of the job's config but `hydra`."""
    from kdx.cli import as_tree, to_config

    tree = {k: v for k, v in as_tree(_root_).items() if k != "hydra"}
    return job_name(list(keys or []), tree, to_config(tree))


def register_resolver() -> None:
    OmegaConf.register_new_resolver("kdx_job", resolve_job_name, replace=True)


def _short(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-.") or "x"


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:6]
