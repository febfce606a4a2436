"""The folders of YAML, kdx's own and the user's: their groups and options, and which file a value came from."""

import importlib
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from kdx.errors import ConfigError

CONF = Path(importlib.import_module("kdx.conf").__path__[0]).resolve()
PKG = "pkg://kdx.conf"  # the same as Hydra names it
ORIGINS = ("optim.lr", "train.max_steps", "train.epochs", "data.max_length")  # what the header says the origin of
MOST_NODES, MOST_DEPTH = 100_000, 100  # of a YAML file
OPTIONAL = ("experiment", "recipe", "pair")  # groups of which nothing may be chosen


class SafeLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """libyaml's where it is there, ten times faster; dates are text, as Hydra reads them."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


@dataclass(frozen=True)
class Source:
    """Where YAML is read: kdx's own conf/ and what Hydra's flags of these names say."""

    config_dir: str | None = None
    config_path: str | None = None
    config_name: str | None = None

    def roots(self) -> list[Path]:
        """The folders that hold groups, in the order that Hydra looks into them. Raises ConfigError."""
        for flag, folder in (("--config-dir", self.config_dir), ("--config-path", self.config_path)):
            if folder and not Path(folder).is_dir():
                raise ConfigError(flag, f"{folder} is not a folder", "Give the folder that holds teacher/, data/, …")
        first = [self.config_path or str(CONF), *([self.config_dir] if self.config_dir else [])]
        return roots_of([*(f"file://{folder}" for folder in first), *self.searchpath()])

    @property
    def main(self) -> str:
        """The name of the config that Hydra begins with."""
        return (self.config_name or "config").removesuffix(".yaml")

    def main_file(self) -> Path | None:
        """The user's own file that Hydra composes from in the place of kdx's, if there is one."""
        file = Path(self.config_path or "") / f"{self.main}.yaml"
        return file if self.config_path and file.is_file() else None

    def searchpath(self) -> list[str]:
        """Where that file has Hydra search besides: `hydra: {searchpath: [file://FOLDER]}`."""
        file = self.main_file()
        with suppress(OSError, ValueError, RecursionError, yaml.YAMLError):  # it is told where it is composed
            text = file.read_text(encoding="utf-8") if file else ""
            tree = yaml.load(text, SafeLoader) if _depth(text) <= MOST_DEPTH else None
            hydra_part = tree.get("hydra") if isinstance(tree, dict) else None
            named = hydra_part.get("searchpath") if isinstance(hydra_part, dict) else None
            return [str(entry) for entry in named] if isinstance(named, list) else []
        return []


def roots_of(searched: Iterable[str]) -> list[Path]:
    """The folders that hold groups, of all that Hydra searches, in its order, as file://FOLDER or pkg://PACKAGE."""
    folders = [
        CONF if entry == PKG else Path(entry.removeprefix("file://")).resolve()
        for entry in searched
        if entry == PKG or entry.startswith("file://")
    ]
    return list(dict.fromkeys([*folders, CONF]))


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


def refuse_unread(options: Iterable[str], roots: list[Path]) -> None:
    """Refuse the user's file of an option that Hydra does not look at, since kdx's own has its name.

    Among the user's own folders the first of a name wins, as a search path means it. Raises ConfigError.
    """
    todo, seen = list(options) if len(roots) > 1 else [], set[str]()
    while todo:
        option = todo.pop()
        files = [file for root in roots if (file := root / f"{option}.yaml").is_file()]
        for file in files[1:] if files and files[0].is_relative_to(CONF) else []:
            if file.read_bytes() != files[0].read_bytes():
                mend = "Give it another name" if "/" in option else f"Choose it with --config-path {file.parent}"
                raise ConfigError(str(file), f"is not read: {_said(files[0])} has its name", mend)
        seen.add(option)
        todo += _bases(option, roots) - seen if "/" in option else []


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
