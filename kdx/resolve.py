"""A composed config → plain values → the typed config; OmegaConf goes no further."""

import dataclasses
import re
import typing
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kdx import sweep
from kdx.config import Config
from kdx.errors import ConfigError, together
from kdx.validation import contradictions, problems

OPEN_GROUPS = ("data", "loss", "optim")  # their further keys are options of what they name


def as_tree(cfg: DictConfig) -> dict[str, Any]:
    """Plain values of a composed config, resolved; further keys of the open groups moved to their options."""
    tree, unresolved = resolved(cfg)
    if unresolved:
        raise together(list(unresolved.values()))
    return tree


def resolved(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, ConfigError]]:
    """The same, with every key whose interpolation fails."""
    unresolved: dict[str, ConfigError] = {}

    def value(node: Any, name: Any, key: str) -> Any:
        try:
            return "???" if OmegaConf.is_missing(node, name) else plain(node[name], key)
        except OmegaConfBaseException as error:
            variable = re.search(r"Environment variable '(\w+)'", str(error))
            what = f"environment variable {variable[1]} is not set" if variable else one_line(error)
            mend = f"Set it: export {variable[1]}=..." if variable else "Mend the interpolation"
            unresolved[key] = ConfigError(key, what, mend)
            return None

    def plain(node: Any, key: str) -> Any:
        if isinstance(node, DictConfig):
            return {str(name): value(node, name, f"{key}.{name!s}") for name in node}
        if isinstance(node, ListConfig):
            return [value(node, i, f"{key}[{i}]") for i in range(len(node))]
        return node

    tree = {str(name): value(cfg, name, str(name)) for name in cfg if name != "hydra"}
    hints = typing.get_type_hints(Config)
    for group in OPEN_GROUPS:
        node = tree.get(group)
        if isinstance(node, dict):
            own = {part.name for part in dataclasses.fields(hints[group])} - {"options"}
            options = {k: v for k, v in node.items() if k not in own}
            options |= options.pop("options", None) or {}
            tree[group] = {k: v for k, v in node.items() if k in own} | {"options": options}
    return tree, unresolved


def to_config(tree: dict[str, Any]) -> Config:
    """Turn a tree of plain values into typed objects; OmegaConf goes no further. Raises ConfigError."""
    found = [ConfigError(*problem) for problem in problems(tree) or contradictions(tree)]
    if found:
        raise together(found)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), tree))
    assert isinstance(config, Config)
    return config


def _job_name(keys: Any, *, _root_: DictConfig) -> str:
    """Reads all of the job's config but `hydra`."""
    return sweep.job_name(list(keys or []), to_config(as_tree(_root_)))


# What hydra.sweep.subdir asks. Here, since a launcher's processes import this and ask before any function is called.
OmegaConf.register_new_resolver("kdx_job", _job_name, replace=True)


def one_line(error: Exception) -> str:
    text = re.split(r"\nSee https|\n\s+full_key:|\n\s*Config search path", str(error))[0]
    return " ".join(text.split()).rstrip(".")[:300]
