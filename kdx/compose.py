"""From the words typed to checked Configs: Hydra composes, pydantic checks, every fault is reported at once."""

import copy
import functools
import math
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from kdx import sweep
from kdx.checked import checked
from kdx.config import Config, leaves
from kdx.errors import ConfigError, did_you_mean, one_line, together
from kdx.words import CONF, FOREIGN, OPTIONAL, groups_in, renamed

SOURCES = ("optim.lr", "train.max_steps", "train.epochs", "data.max_length")  # the header says where these came from
PAIRS = {"train.max_steps": "train.epochs", "train.epochs": "train.max_steps"}  # setting one frees the other
MODELS = ("teacher", "student")
HYDRA_ERRORS = (HydraException, OmegaConfBaseException)


@dataclass(frozen=True)
class Source:
    """Where YAML is read: kdx's conf/ and what Hydra's flags of these names add."""

    config_dir: str | None = None
    config_path: str | None = None
    config_name: str | None = None

    def roots(self) -> list[Path]:
        """List the folders that hold groups. Raises ConfigError."""
        for flag, folder in (("--config-dir", self.config_dir), ("--config-path", self.config_path)):
            if folder and not Path(folder).is_dir():
                raise ConfigError(flag, f"{folder} is not a folder", "Name the folder that holds teacher/, data/, …")
        return [Path(folder) for folder in (self.config_path or CONF, self.config_dir) if folder]


@dataclass(frozen=True)
class Point:
    """One run: the words typed for it, its config, and where values that depend on the student came from."""

    words: list[str]
    config: Config
    sources: dict[str, str]


@dataclass
class Plan:
    """A command line: its points and, of a sweep, the words for Hydra."""

    points: list[Point]
    source: Source
    run_dir: Path  # of a single run
    words: list[str] = field(default_factory=list)  # for Hydra's sweeper
    swept: list[str] = field(default_factory=list)
    sweep_dir: Path | None = None
    baseline: list[str] = field(default_factory=list)  # words of the baselines' own sweep; none if there is none
    num_baselines: int = 0
    jobs: dict[Path, Config] = field(default_factory=dict)  # by their folders, if kdx names them
    command: list[str] = field(default_factory=list)  # what repeats a run that names another one; else what was typed


def compose(overrides: list[str] | None = None, config_dir: str | None = None) -> Config:
    """Compose a Config from the words of a run, checked as the command line is. Raises ConfigError."""
    (point,) = plan(list(overrides or []), Source(config_dir=config_dir)).points
    point.config._words = point.words
    return point.config


def plan(words: list[str], source: Source, is_multirun: bool = False) -> Plan:
    """Compose and check every run that a command line asks for. Raises one ConfigError with a line per fault."""
    composer = Composer(source)
    typed = composer.parsed(words)
    hydra_part = composer.hydra_part(typed)
    if not is_multirun and getattr(hydra_part.mode, "name", "") != "MULTIRUN":
        for key in sweep.swept_keys(typed):
            raise ConfigError(key, "has several values, which is a sweep", "Add -m: python -m kdx -m ...")
        return Plan([composer.point(words)], source, Path(str(hydra_part.run.dir)))
    if params := plain(hydra_part.sweeper.get("params") or {}):
        # Hydra would sweep over these besides the words: merged, a typed word takes the place of the same key.
        words = [*(f"{key}={value}" for key, value in params.items()), *words, "hydra.sweeper.params=null"]
        typed = composer.parsed(words)
    points, swept = composer.points(typed), sweep.swept_keys(typed)
    configs = [point.config for point in points]
    added = [] if configs[0].sweep.name else [f"++sweep.name={sweep.sweep_name(swept, configs)}"]
    hydra_part = composer.hydra_part([*typed, *composer.parsed(added)])
    is_named = "kdx_job" in str(plain(hydra_part.sweep)["subdir"])
    added += [f"hydra.sweep.subdir='${{kdx_job:\"{','.join(swept)}\"}}'"] if is_named else []
    made = Plan(
        points,
        source,
        Path(),
        [*(str(word.input_line) for word in typed), *added],
        swept,
        Path(str(hydra_part.sweep.dir)),
    )
    knows_points = str(hydra_part.sweeper.get("_target_")).endswith(".BasicSweeper")  # Optuna chooses as it goes
    without: list[Point] = []
    has_baseline = all(c.sweep.baseline and c.teacher.path for c in configs) and any(c.loss.alpha for c in configs)
    if knows_points and has_baseline:
        baseline = sweep.baseline_words(typed)
        without = composer.points(composer.parsed(baseline))
        made.num_baselines = sweep.missing_baselines(configs, [point.config for point in without])
        made.baseline = [*baseline, *added] if made.num_baselines else []
    if knows_points and is_named:
        jobs = [*(without if made.baseline else []), *points]
        folder = Path(str(hydra_part.sweep.dir))
        made.jobs = {folder / sweep.job_name(swept, job.words, job.config): job.config for job in jobs}
    return made


def point_of(hydra_part: Any) -> Point:
    """Compose a job of a sweep from what Hydra says of it, in whatever process a launcher runs it."""
    searched = {info.provider: info for info in hydra_part.runtime.config_sources}
    main, own = searched["main"], searched.get("command-line")
    path = main.path if main.schema == "file" else None
    source = Source(own and own.path, path, hydra_part.job.config_name)
    return _composer(source).point(list(hydra_part.overrides.task))


def _job_name(swept: str, *, _root_: DictConfig) -> str:
    point = point_of(_root_.hydra)
    return sweep.job_name([key for key in swept.split(",") if key], point.words, point.config)


# hydra.sweep.subdir asks for it, also in a launcher's processes: they import this before anything is called.
OmegaConf.register_new_resolver("kdx_job", _job_name, replace=True)


class Composer:
    """Composes many points from few compositions: Hydra's is slow, so each set of choices is composed once."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.groups = groups_in(source.roots())
        self._parser = OverridesParser.create(config_loader=self)  # type: ignore[arg-type]
        self._composed = functools.cache(self._compose)

    def get_group_options(self, group_name: str, *_: Any, **__: Any) -> list[str]:
        """Answer Hydra's parser, which asks for `loss=glob(*)`."""
        return self.groups.get(group_name, [])

    def parsed(self, words: list[str]) -> list[Override]:
        """Read words as Hydra does; values become ++KEY=VALUE, so that every key reaches the check. Raises ConfigError."""
        faults, overrides = [], []
        for word in (hydras for typed in renamed(words) for hydras in self._spelt(typed)):
            if "=" not in word and not word.startswith("~"):
                hint = "A value with spaces needs quotes: KEY='\"a b\"'"
                faults.append(ConfigError(word, "is not KEY=VALUE", hint))
                continue
            try:
                overrides += self._parser.parse_overrides([word])
            except HydraException as error:
                what = _reason(error).removeprefix(f"Error parsing override '{word}' ").partition(" expecting ")[0]
                key, _, value = word.removeprefix("++").partition("=")
                quoted = shlex.quote(f'{key}="{value}"')
                faults.append(ConfigError(key or word, f"cannot be read ({what})", f"Quote the value: {quoted}"))
        if faults:
            raise together(faults)
        return overrides

    def _spelt(self, word: str) -> list[str]:
        """Spell a typed word as Hydra needs it."""
        key, is_assigned, value = word.lstrip("+").partition("=")
        if word.startswith("~") or not is_assigned or key.startswith(("hydra.", "hydra/")) or "@" in key:
            return [word]
        if key in OPTIONAL and value == "null":
            return [f"~{key}"]
        if key in MODELS and "/" in value and not {*value.split(",")} & {*self.groups[key]}:
            return [f"{key}=hf", f"++{key}.path={value}"]
        return [word] if key in self.groups else [f"++{key}={value}"]

    def hydra_part(self, words: list[Override]) -> DictConfig:
        """Compose Hydra's own part of the config, and what it reads of `sweep`. Raises ConfigError."""
        cfg = copy.deepcopy(self._composed(self._choices(words)[0])[0])
        own = [w for w in words if w.key_or_group.startswith(("hydra.", "sweep.")) and not w.is_sweep_override()]
        if faults := apply(own, cfg):
            raise together(faults)
        return cfg.hydra

    def points(self, words: list[Override]) -> list[Point]:
        """Compose every point of a sweep. Raises ConfigError with the faults of all."""
        points, faults = [], []
        for point in sweep.points(words):
            try:
                points.append(self.point(point))
            except ConfigError as error:
                faults.append(error)
        if not points and not faults:
            raise ConfigError("sweep", "has no points", "Choose a pattern that some option matches")
        if faults:
            raise together(faults)
        return points

    def point(self, words: list[str]) -> Point:
        """Compose and check one run. Raises ConfigError with all that is wrong."""
        typed = self.parsed(words)
        choices, faults = self._choices(typed)
        composed, sources = self._composed(choices)
        cfg = copy.deepcopy(composed)
        values = [word for word in typed if not self._is_choice(word) and not word.key_or_group.startswith("hydra.")]
        faults += apply(values, cfg)
        keys = {word.key_or_group for word in typed}
        rank = {key: (math.inf, "typed") if key in keys else sources[key] for key in SOURCES}
        _free(cfg, {key: at for key, (at, _) in rank.items()})
        tree = _resolved(cfg, faults)
        is_given = "data.path" in keys and "path" in tree["data"] and "data" not in keys
        if is_given and tree["data"].get("name") == "chitchat":
            hint = "Choose the format: data=pairs or data=messages"
            faults.append(ConfigError("data.path", "is given, but data=chitchat has its own data", hint))
        in_yaml = [key for key in leaves(plain(composed)) if not key.startswith("hydra.")]
        config = checked(tree, faults, keys, in_yaml)
        said = [word.removeprefix("++") for word in words if not word.startswith("hydra.")]
        return Point(said, config, {key: place for key, (_, place) in rank.items()})

    def _is_choice(self, word: Override) -> bool:
        return word.key_or_group in self.groups or word.key_or_group.startswith("hydra/")

    def _choices(self, words: list[Override]) -> tuple[tuple[str, ...], list[ConfigError]]:
        """Split off the words that choose from groups, of several values the first, and what is wrong with them."""
        kept, faults = [], []
        for word in filter(self._is_choice, words):
            key, options = word.key_or_group, self.groups.get(word.key_or_group)
            if options is None or word.is_delete() or word.package:
                line = str(word.input_line)
                if line in FOREIGN:
                    faults.append(ConfigError(line, "is not an option", FOREIGN[line]))
                else:
                    kept.append(line)
                continue
            values = [str(v) for v in word.sweep_string_iterator()] if word.is_sweep_override() else [str(word.value())]
            values = ["null" if value == "None" else value for value in values] or [""]  # a glob without a match
            wrong = [value for value in values if value not in options]
            for value in wrong:
                hints = [FOREIGN.get(f"{key}={value}") or did_you_mean(value, options) + "."]
                hints += [f"Any other model: {key}=hf {key}.path=org/name or a folder."] if key in MODELS else []
                hint = " ".join([*hints, "Your own options: --config-dir FOLDER"])
                faults.append(ConfigError(f"{key}={value}", f"{key} has no option {value or repr(value)}", hint))
            kept += [] if wrong else [f"{key}={values[0]}"]
        return tuple(kept), faults

    def _compose(self, choices: tuple[str, ...]) -> tuple[DictConfig, dict[str, tuple[float, str]]]:
        """Compose what YAML says under some choices, leaving Hydra's global state as it was → it, and _layers of it.

        Raises ConfigError.
        """
        state, name = GlobalHydra.instance(), self.source.config_name or "config"
        before, path = state.hydra, self.source.config_path
        state.clear()
        try:
            start = initialize_config_dir(str(Path(path).resolve()), "kdx", "1.3") if path else None
            with start or initialize_config_module("kdx.conf", "kdx", "1.3"):
                loader: Any = state.config_loader()
                if self.source.config_dir:  # as Hydra's own command line adds it
                    folder = f"file://{Path(self.source.config_dir).resolve()}"
                    loader.get_search_path().prepend("command-line", folder, SearchPathQuery("schema", None))
                    loader.repository.initialize_sources(loader.get_search_path())
                cfg = hydra_compose(name, list(choices), return_hydra_config=True)
                return cfg, self._layers(loader, name, list(choices))
        except yaml.MarkedYAMLError as error:
            place = f"{error.problem_mark.name}:{error.problem_mark.line + 1}" if error.problem_mark else "YAML"
            raise ConfigError(place, f"does not parse: {error.problem}", "Fix the YAML") from None
        except (*HYDRA_ERRORS, UnicodeDecodeError) as error:
            if found := re.search(r"'hydra/(launcher|sweeper)/(submitit|optuna|ax|nevergrad)\w*'", str(error)):
                package = f"hydra-{found[2]}-{found[1]}"
                raise ConfigError(f"hydra/{found[1]}", f"needs {package}", f"pip install {package}") from None
            hint = "`python -m kdx --info defaults` lists what is composed"
            raise ConfigError("config", _reason(error), hint) from None
        finally:
            GlobalHydra.instance().hydra = before

    def _layers(self, loader: Any, name: str, choices: list[str]) -> dict[str, tuple[float, str]]:
        """Find which layer of those that Hydra merges set each key of SOURCES last, and its file. Raises ConfigError."""
        found: dict[str, tuple[float, str]] = {}
        for at, layer in enumerate(loader.compute_defaults_list(name, choices, RunMode.RUN).defaults):
            if layer.config_path.startswith("hydra"):
                continue
            loaded = loader.repository.load_config(layer.config_path)
            file, own = f"{layer.config_path}.yaml", self.source.config_dir
            if own and loaded.path == "pkg://kdx.conf" and (Path(own) / file).is_file():
                raise ConfigError(f"{own}/{file}", f"is not read: kdx's conf/{file} has the same name", "Rename it")
            is_own = loaded.path != "pkg://kdx.conf"
            place = os.path.relpath(loaded.path.removeprefix("file://")) if is_own else "conf"
            if not OmegaConf.is_dict(loaded.config):
                raise ConfigError(f"{place}/{file}", "is a list", "Write keys and values: KEY: VALUE")
            keys = leaves(plain(loaded.config), f"{layer.package}." if layer.package else "")
            found |= {key: (at, f"{place}/{file}") for key in SOURCES if key in keys}
        return found


_composer: Callable[[Source], Composer] = functools.cache(Composer)


def plain(node: Any) -> dict[str, Any]:
    """A node of a composed config as plain values, unresolved."""
    return {str(k): v for k, v in OmegaConf.to_container(OmegaConf.create(node)).items()}  # type: ignore[union-attr]


def apply(words: list[Override], cfg: DictConfig) -> list[ConfigError]:
    """Set typed values as Hydra does → what is wrong with them."""
    faults = []
    for word in words:
        try:
            ConfigLoaderImpl._apply_overrides_to_config([word], cfg)
        except HYDRA_ERRORS as error:
            hint = "See all keys with: python -m kdx --cfg all"
            faults.append(ConfigError(word.key_or_group or str(word.input_line), _reason(error), hint))
    return faults


def laid_over(tree: dict[str, Any], words: list[Override]) -> tuple[dict[str, Any], list[ConfigError]]:
    """Set typed values in a config that was composed before → the new one, and what is wrong with the words."""
    cfg, keys = OmegaConf.create(tree), {word.key_or_group for word in words}
    faults = apply(words, cfg)
    _free(cfg, {key: key in keys for key in PAIRS})
    return plain(cfg), faults


def _free(cfg: DictConfig, rank: dict[str, float]) -> None:
    """Let the later of max_steps and epochs win: the other is null, unless both were set in one place."""
    for key, other in PAIRS.items():
        if OmegaConf.select(cfg, key) is not None and rank[key] > rank[other]:
            OmegaConf.update(cfg, other, None)


def _resolved(cfg: DictConfig, faults: list[ConfigError]) -> dict[str, Any]:
    """Return a composed config as plain values. What is missing or cannot be resolved is left out and reported."""

    def values_of(node: Any, key: str) -> Any:
        if isinstance(node, ListConfig):
            return [values_of(item, f"{key}[{i}]") for i, item in enumerate(node)]
        if not isinstance(node, DictConfig):
            return node
        values = {}
        for name in node:
            here = f"{key}.{name!s}".lstrip(".")
            try:
                if here != "hydra":
                    values[str(name)] = values_of(node[name], here)
            except MissingMandatoryValue:
                faults.append(ConfigError(here, "is missing", f"Set it: {here}=..."))
            except OmegaConfBaseException as error:  # of an interpolation
                faults.append(ConfigError(here, _reason(error), "Set what it names, or give a value"))
        return values

    return dict(values_of(cfg, ""))


def _reason(error: Exception) -> str:
    """What Hydra or OmegaConf says, without its appendix and, for a resolver's error, without its frame."""
    text = one_line(re.split(r"\nSee https|\n\s+full_key:|\n\s*Config search path", str(error))[0])
    return re.sub(r"^\w+ raised while resolving interpolation: (.)(.*)\1$", r"\2", text)
