"""The folders of YAML, kdx's own and the user's: their groups and options, and which file a value came from."""

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdx.errors import ConfigError

CONF = Path(importlib.import_module("kdx.conf").__path__[0])
ORIGINS = ("optim.lr", "train.max_steps", "train.epochs", "data.max_length")  # what the header says the origin of
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's where it is there: ten times faster


@dataclass(frozen=True)
class Source:
    """Where YAML is read: kdx's own conf/ and what Hydra's flags of these names say."""

    config_dir: str | None = None
    config_path: str | None = None
    config_name: str | None = None

    def roots(self) -> list[Path]:
        """The folders that hold groups, the user's first. Raises ConfigError."""
        roots = []
        for flag, folder in (("--config-dir", self.config_dir), ("--config-path", self.config_path)):
            if folder and not Path(folder).is_dir():
                raise ConfigError(flag, f"{folder} is not a folder", "Give the folder that holds teacher/, data/, …")
            roots += [Path(folder).resolve()] if folder else []
        return [*roots, CONF]


def groups_in(roots: list[Path]) -> dict[str, list[str]]:
    """The config groups and their options, in kdx's own conf/ and the user's folder."""
    groups: dict[str, set[str]] = {}
    for root in roots:
        for file in root.glob("*/**/*.yaml"):
            group, *option = file.relative_to(root).with_suffix("").parts
            groups.setdefault(group, set()).add("/".join(option))
    return {name: sorted(options) for name, options in groups.items() if name != "hydra"}


def origins(words: Iterable[str], choices: Any, roots: list[Path]) -> dict[str, str]:
    """Where the values came from that suit a student or do not (lr, steps, max_length): typed, or which file."""
    typed = {word.lstrip("+").split("=", 1)[0] for word in words}
    found = {}
    for key in ORIGINS:
        group, name = key.split(".", 1)
        layers = [(f"{layer}/{choices[layer]}", key) for layer in ("experiment", "recipe") if choices.get(layer)]
        layers += [(f"{group}/{choices[group]}", name)] if choices.get(group) else []
        files = [file for option, inside in layers if (file := _setter(option, inside, roots))]
        found[key] = "typed" if key in typed else _said(files[0] if files else CONF / "config.yaml")
    return found


def _setter(option: str, key: str, roots: list[Path]) -> Path | None:
    """The file of an option that sets a key: its own, or one of those it builds on."""
    file = next((path for root in roots if (path := root / f"{option}.yaml").is_file()), None)
    if file is None:
        return None
    tree = yaml.load(file.read_text(encoding="utf-8"), SafeLoader) or {}
    node: Any = tree
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    if node is not None:
        return file
    bases = [base for base in reversed(tree.get("defaults") or []) if isinstance(base, str) and base != "_self_"]
    return next((at for base in bases if (at := _setter(f"{option.split('/')[0]}/{base}", key, roots))), None)


def _said(file: Path) -> str:
    """A YAML file as a person would type it."""
    if file.is_relative_to(CONF):
        return f"conf/{file.relative_to(CONF)}"
    return str(file.relative_to(Path.cwd())) if file.is_relative_to(Path.cwd()) else str(file)
