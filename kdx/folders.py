"""The folders of YAML, kdx's own and the user's: their groups and options, and which file a value came from."""

import importlib
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdx.errors import ConfigError

CONF = Path(importlib.import_module("kdx.conf").__path__[0])
ORIGINS = ("optim.lr", "train.max_steps", "train.epochs", "data.max_length")  # what the header says the origin of
MOST_NODES, MOST_DEPTH = 100_000, 100  # of a YAML file
OPTIONAL = ("experiment", "recipe", "pair")  # groups of which nothing may be chosen
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


def contents(file: Path | None) -> dict[str, Any]:
    """What a YAML file of kdx's or the user's says. Raises ConfigError."""
    tree = yaml.load(file.read_text(encoding="utf-8"), SafeLoader) or {} if file else {}
    if file and not isinstance(tree, dict):
        raise no_keys(file)
    return dict(tree)


def refuse_strange(roots: list[Path]) -> list[Path]:
    """Refuse the user's YAML that would grow without bound, or that takes Hydra's own part away. Raises ConfigError."""
    own = [root for root in roots if root != CONF]
    for file in (file for root in own for file in sorted(root.rglob("*.yaml")) if file.is_file()):  # any may be named
        try:
            text = file.read_text(encoding="utf-8")
            if _depth(text) > MOST_DEPTH:  # libyaml would end the process
                raise ConfigError(str(file), "is nested too deep", "Write it flat")
            tree = yaml.load(text, SafeLoader)
            is_endless = _grows(tree)
        except (OSError, ValueError, RecursionError, yaml.YAMLError):  # it is told where it is chosen
            continue
        if is_endless:
            raise ConfigError(str(file), "names parts of itself over and over (YAML's &a and *a)", "Write them out")
        if isinstance(tree, dict) and not isinstance(tree.get("hydra", {}), dict | str):
            raise ConfigError(f"{file}: hydra", "is no group of keys", "Set keys of it, or take it out")
    return roots


def _depth(text: str) -> int:
    """How deep a YAML text is nested, at most one more than is allowed."""
    depth = deepest = 0
    with suppress(yaml.YAMLError):  # what follows is not read either
        for event in yaml.parse(text, SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            deepest = max(deepest, depth)
            if deepest > MOST_DEPTH:
                break
    return deepest


def _grows(tree: Any) -> bool:
    """Whether a tree becomes far greater once the parts that it names (YAML's aliases) are written out."""
    sizes: dict[int, float] = {}  # of containers, by their id
    written = 0

    def size(node: Any) -> float:
        nonlocal written
        if not isinstance(node, dict | list):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # should it hold itself
            written += 1 + len(node)
            sizes[id(node)] = 1 + sum(map(size, node.values() if isinstance(node, dict) else node))
        return sizes[id(node)]

    return size(tree) > max(MOST_NODES, 10 * written)


def no_keys(file: Path) -> ConfigError:
    return ConfigError(str(file), "holds no keys", "Write one a line: KEY: VALUE")


def circular(roots: list[Path]) -> ConfigError | None:
    """The first option that its own defaults list names, be it through other options."""
    for root in roots:
        for file in sorted(root.glob("*/**/*.yaml")):
            own = str(file.relative_to(root).with_suffix(""))
            todo, seen = [own], set[str]()
            while todo:
                bases = _bases(todo.pop(), roots)
                todo += bases - seen
                seen |= bases
            if own in seen:
                return ConfigError(str(file), "names itself in its defaults, maybe through others", "Take that out")
    return None


def _bases(option: str, roots: list[Path]) -> set[str]:
    """The options that one names in its defaults list."""
    found = set()
    bases = contents(_file(option, roots)).get("defaults")
    for base in bases if isinstance(bases, list) else []:
        words = (
            [f"{str(key).split()[-1]}/{name}" for key, name in base.items()] if isinstance(base, dict) else [str(base)]
        )
        for word in (word.split("@")[0] for word in words):
            found.add(word[1:] if word.startswith("/") else f"{option.rpartition('/')[0]}/{word}")
    return found


def _file(option: str, roots: list[Path]) -> Path | None:
    return next((path for root in roots if (path := root / f"{option}.yaml").is_file()), None)


def spelt(words: list[str]) -> list[str]:
    """The words with GROUP=null, of a group that may be left out, as Hydra takes it: ~GROUP."""
    nothing = {f"{group}=null": f"~{group}" for group in OPTIONAL}
    return [nothing.get(word, word) for word in words]


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
    file = _file(option, roots)
    if file is None:
        return None
    tree = contents(file)
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
