"""From the words typed, or an earlier run, to checked Configs: Hydra composes, pydantic checks, all faults at once."""

import copy
import functools
import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from kdx import sweep
from kdx.checked import checked
from kdx.config import Config, Tree, leaves
from kdx.data.sources import check_source
from kdx.errors import ConfigError, did_you_mean, one_line, together
from kdx.run.claim import holder
from kdx.run.files import read_json
from kdx.run.folder import is_resumable
from kdx.run.redact import HIDDEN
from kdx.words import CONF, FOREIGN, OPTIONAL, RENAMED, groups_in, key_of, new_name

SOURCES = ("optim.lr", "train.max_steps", "train.epochs", "data.max_length")  # the header says where these came from
PAIRS = {"train.max_steps": "train.epochs", "train.epochs": "train.max_steps"}  # typing one frees the other
MODELS = ("teacher", "student")
OTHERS = {
    **dict.fromkeys(MODELS, "Any other model: {0}=hf {0}.path=org/name or a folder"),
    "loss": "A function of your own: KDX_PLUGINS=module loss.name=NAME",
    "data": "Your own rows: data=pairs data.path=FILE, or data=messages, data=text, …",
}
TEXTS = ("data.template", "data.chat_template", "data.system_prompt")  # here a typed \n is a line break
HYDRA_ERRORS = (HydraException, OmegaConfBaseException)
version.setbase("1.3")
setup_globals()  # Hydra's resolvers: ${now:...}


@dataclass(frozen=True)
class Point:
    """One run: the words typed for it, its config, and where values that depend on the student came from."""

    words: list[str]
    config: Config
    sources: dict[str, str]


@dataclass
class Plan:
    """What a command line asks for: one run, or a sweep."""

    points: list[Point]
    folder: Path  # of the run or the sweep
    config_dir: str | None = None
    swept: list[str] = field(default_factory=list)  # the keys with several values
    jobs: dict[Path, Point] = field(default_factory=dict)  # baselines and points; none if a sweeper chooses as it goes
    hydra: list[str] = field(default_factory=list)  # Hydra's command line, if a launcher or sweeper of it is chosen
    command: list[str] = field(default_factory=list)  # what repeats a run that names another one; else what was typed

    @property
    def flags(self) -> list[str]:
        """Hydra's flag for the user's own options, wherever the words are typed."""
        return [f"--config-dir={Path(self.config_dir).resolve()}"] if self.config_dir else []


def plan(words: list[str], config_dir: str | None = None, is_multirun: bool = False) -> Plan:
    """Compose and check every run that a command line asks for. Raises one ConfigError with a line per fault."""
    composer = composer_for(config_dir)
    typed, faults = composer.parsed(words)
    every, swept = sweep.points(typed)
    if not every:
        raise ConfigError("sweep", "has no points", "No option matches its pattern: see python -m kdx --help")
    hydra = composer.hydra(every[0])
    for key, folder in (("hydra.run.dir", hydra.run.dir), ("hydra.sweep.dir", hydra.sweep.dir)):
        if not str(folder):
            raise ConfigError(key, "is empty", "Name a folder, or leave it out")
    if not is_multirun and getattr(hydra.mode, "name", "") != "MULTIRUN":
        if swept:
            hint = f"Add -m to try each; a list is typed with brackets: {swept[0]}=[...]"
            raise ConfigError(swept[0], "has several values, which is a sweep", hint)
        return Plan(composer.points(every, faults), Path(str(hydra.run.dir)), config_dir)
    if params := plain(hydra.sweeper.get("params") or {}):
        # Hydra would sweep over these besides the words: merged, a typed word takes the place of the same key.
        merged = [*(f"{key}={value}" for key, value in params.items()), *words, "hydra.sweeper.params=null"]
        return plan(merged, config_dir, is_multirun=True)
    points = composer.points(every, faults)
    configs = [point.config for point in points]
    if not configs[0].sweep.name:
        name = sweep.sweep_name(swept, {word.key_or_group for word in typed}, configs)
        return plan([*words, f"sweep.name={name}"], config_dir, is_multirun=True)
    made = Plan(points, Path(str(hydra.sweep.dir)), config_dir, swept=swept)
    if not str(hydra.sweeper.get("_target_")).endswith(".BasicSweeper"):  # Optuna chooses as it goes
        made.hydra = ["--multirun", *made.flags, *(str(word.input_line) for word in typed)]
        return made
    baselines: list[Point] = []
    if all(c.sweep.baseline and c.teacher.path for c in configs) and any(c.loss.alpha for c in configs):
        # The same points without all that is typed of the loss, and without answers that only a teacher judges.
        off = ["loss.alpha=0", "loss.alpha_end=null"]
        off += ["rollout=none"] if any(c.rollout.name == "student" for c in configs) else []
        groups = {key_of(word).split(".")[0] for word in off}
        kept = [tuple(word for word in point.words if key_of(word).split(".")[0] not in groups) for point in points]
        baselines = [composer.point([*words, *off]) for words in dict.fromkeys(kept)]
    named = [(sweep.job_name(swept, job.words, job.config), job) for job in (*baselines, *points)]
    made.jobs = {made.folder / name: job for name, job in named}
    if not str(hydra.launcher.get("_target_")).endswith(".BasicLauncher"):
        deciding = [word for word in points[0].words if "." not in key_of(word) or word.startswith("sweep.")]
        deciding += [str(word.input_line) for word in typed if word.key_or_group.startswith("hydra.")]
        made.hydra = ["--multirun", *made.flags, *deciding, f"+kdx_job=range({len(made.jobs)})"]
    return made


class Composer:
    """Composes runs. Hydra's own composition is slow, so the points of a sweep that choose the same options share one."""

    def __init__(self, folder: str | None = None) -> None:
        config_dir = Path(folder).resolve() if folder else None
        if config_dir and not config_dir.is_dir():
            hint = "Name the folder that holds teacher/, data/, …"
            raise ConfigError("--config-dir", f"{config_dir} is not a folder", hint)
        search = create_config_search_path("pkg://kdx.conf")
        if config_dir:
            search.prepend("command-line", f"file://{config_dir}", SearchPathQuery("schema", None))
            for file in config_dir.rglob("*.yaml"):
                if (CONF / (name := file.relative_to(config_dir))).exists():
                    raise ConfigError(str(file), f"has the same name as kdx's own conf/{name}", "Rename it")
        self.groups = groups_in(folder)
        self._loader: Any = ConfigLoaderImpl(search)
        self._parser = OverridesParser.create(config_loader=self._loader)
        self._composed = functools.cache(self._compose)

    def parsed(self, words: list[str]) -> tuple[list[Override], list[ConfigError]]:
        """Read words as Hydra does, and what is wrong; values become ++KEY=VALUE, so that every key reaches the check."""
        keys, overrides = {key_of(word) for word in words}, []
        what, hint = "is the old name of {}, and both are given", "Leave out one of them"
        faults = [ConfigError(old, what.format(new), hint) for old, new in RENAMED.items() if {old, new} <= keys]
        for word in words:
            try:
                overrides += self._parser.parse_overrides(self.spelt(word))
            except HydraException:
                faults.append(_unreadable(word))
        return overrides, faults

    def spelt(self, word: str) -> list[str]:
        """Spell a typed word as Hydra needs it."""
        key, is_assigned, value = word.lstrip("+").partition("=")
        if word.startswith(("~", "-")) or not is_assigned or key.startswith(("hydra.", "hydra/")):
            return [word]
        key = new_name(key)
        if key.startswith(TEXTS):  # it is hard to type a line break; two backslashes and n stay
            value = re.sub(r"(?<!\\)\\([nt])", lambda found: {"n": "\n", "t": "\t"}[found[1]], value)
        if key in OPTIONAL and value == "null":
            return [f"~{key}"]
        if key in MODELS and "/" in value and not {*value.split(",")} & {*self.groups[key]}:
            return [f"{key}=hf", f"++{key}.path={value}"]
        return [f"{key}={value}"] if key in self.groups else [f"++{key}={value}"]

    def points(self, every: list[list[str]], faults: list[ConfigError]) -> list[Point]:
        """Compose every point of a sweep. Raises ConfigError with these faults and those of all points."""
        points, faults = [], [*faults]
        for words in every:
            try:
                points.append(self.point(words))
            except ConfigError as error:
                faults.append(error)
        if faults:
            raise together(faults)
        return points

    def point(self, words: list[str]) -> Point:
        """Compose and check one run. Raises ConfigError with all that is wrong."""
        typed, faults = self.parsed(words)
        choices, values = self._split(typed, faults)
        base, sources = self._composed(choices)
        keys = {word.key_or_group for word in typed}
        config = _checked_over(base, values, keys, faults)
        said = [word.removeprefix("++") for word in words if not word.startswith("hydra.")]
        return Point(said, config, sources | {key: "typed" for key in SOURCES if key in keys})

    def hydra(self, words: list[str]) -> Any:
        """Return Hydra's own part of the config of one run."""
        choices, values = self._split(self.parsed(words)[0], [])
        return _laid_over(self._composed(choices)[0], values, []).hydra

    def _split(self, typed: list[Override], faults: list[ConfigError]) -> tuple[tuple[str, ...], list[Override]]:
        """Split words into choices from groups and values; a choice that there is not is a fault."""
        choices, values = [], []
        for word in typed:
            line, key = str(word.input_line), word.key_or_group
            options, value = self.groups.get(key), line.partition("=")[2].strip("'\"")
            if options is None and not key.startswith("hydra/"):
                values.append(word)
            elif word.is_delete() or (line not in FOREIGN if options is None else value in options):
                choices.append(line)
            else:
                own = OTHERS.get(key, "Your own options: --config-dir FOLDER").format(key)
                hint = FOREIGN.get(line) or f"{did_you_mean(value, options or [])}. {own}"
                faults.append(ConfigError(line, f"{key} has no option {value!r}", hint))
        return tuple(choices), values

    def _compose(self, choices: tuple[str, ...]) -> tuple[DictConfig, dict[str, str]]:
        """Compose what YAML says under some choices → it, and which file set each of SOURCES. Raises ConfigError."""
        try:
            cfg = self._loader.load_configuration("config", list(choices), RunMode.RUN)
            return cfg, self._sources(list(choices))
        except (yaml.YAMLError, *HYDRA_ERRORS) as error:
            hint = "See python -m kdx --info defaults. Other sweepers and launchers must be installed separately"
            raise ConfigError("config", _reason(error), hint) from None

    def _sources(self, choices: list[str]) -> dict[str, str]:
        """Find the file that set each key of SOURCES last, of those that Hydra merges."""
        found: dict[str, str] = {}
        for layer in self._loader.compute_defaults_list("config", choices, RunMode.RUN).defaults:
            if not layer.config_path.startswith("hydra"):
                loaded = self._loader.repository.load_config(layer.config_path)
                is_own = loaded.path != "pkg://kdx.conf"
                place = os.path.relpath(loaded.path.removeprefix("file://")) if is_own else "conf"
                keys = leaves(plain(loaded.config), f"{layer.package}." if layer.package else "")
                found |= {key: f"{place}/{layer.config_path}.yaml" for key in SOURCES if key in keys}
        return found


composer_for = functools.cache(Composer)


def plain(node: Any) -> Tree:
    """Return a node of a composed config as plain values, with its interpolations unresolved."""
    return {str(k): v for k, v in OmegaConf.to_container(OmegaConf.create(node)).items()}  # type: ignore[union-attr]


def _laid_over(base: Any, values: list[Override], faults: list[ConfigError]) -> DictConfig:
    """Set typed values in a composed config. A value that cannot be set is a fault.

    Of max_steps and epochs the one that is typed wins: the other is null, unless it is typed too.
    """
    cfg, typed = copy.deepcopy(OmegaConf.create(base)), {word.key_or_group for word in values}
    for old in RENAMED:  # in YAML
        group, _, name = old.partition(".")
        if name in (cfg.get(group) or ()):
            OmegaConf.set_struct(cfg, False)
            OmegaConf.update(cfg, new_name(old), cfg[group].pop(name))
    for word in values:
        try:
            ConfigLoaderImpl._apply_overrides_to_config([word], cfg)
        except HYDRA_ERRORS as error:
            where = word.key_or_group or str(word.input_line)
            faults.append(ConfigError(where, _reason(error), "See all keys with: python -m kdx --cfg all"))
    for key, other in PAIRS.items():
        if key in typed and other not in typed and OmegaConf.select(cfg, key) is not None:
            OmegaConf.update(cfg, other, None)
    return cfg


def _checked_over(base: Any, values: list[Override], typed: set[str], faults: list[ConfigError]) -> Config:
    """Set typed values in a composed config and check it. Raises ConfigError with these faults and all others."""
    faults = [*faults]
    cfg = _laid_over(base, values, faults)
    tree = _resolved(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]), faults)
    config = checked(tree, {key: node for key, node in plain(base).items() if key != "hydra"}, typed, faults)
    try:
        check_source(config.data)
    except ConfigError as error:
        if not error.args[0].endswith(".name"):  # one's own sources are not imported yet
            raise
    return config


def _resolved(cfg: DictConfig, faults: list[ConfigError]) -> Tree:
    """Return plain values. One that is missing or cannot be resolved is a fault, and null."""
    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        what = "is missing" if isinstance(error, MissingMandatoryValue) else _reason(error)
        faults.append(ConfigError(key, what, f"Set it: {key}=..."))
        OmegaConf.update(cfg, key, None)
        return _resolved(cfg, faults)


def _unreadable(word: str) -> ConfigError:
    """Say why a word cannot be read."""
    what, hint = "cannot be read", "See python -m kdx --help"
    if word.startswith("-"):
        what, hint = "is not a flag", "Flags are listed by python -m kdx --hydra-help"
    elif "=" in word:
        hint = "A value with spaces, brackets or signs needs quotes: 'KEY=\"a b\"'"
    hint = FOREIGN.get(key_of(word.lstrip("-")), hint)
    return ConfigError(word or "''", what, f"Write arguments as KEY=VALUE, without dashes or spaces. {hint}")


def _reason(error: Exception) -> str:
    """Return what helps the user of a library's message."""
    return one_line(re.split(r"\n\s*(full_key:|Config search path|To append)", str(error))[0])


def resumed(name: str, words: list[str], config_dir: str | None = None) -> Plan:
    """Resume a run in its own folder, under its own config with what is typed laid over it. Raises ConfigError."""
    folder, where = newest() if name == "last" else Path(name), f"run.resume={name}"
    tree, recorded = _read(folder / "config.yaml", where), _read(folder / "overrides.yaml", where)
    if not is_resumable(folder):
        hint = f"Start a new run with its settings: run.like={folder}"
        raise ConfigError(where, "has no checkpoint to resume from", hint)
    composer, record = composer_for(config_dir), read_json(folder / "record.json")
    spelt = [part.removeprefix("++") for word in words for part in composer.spelt(word)]  # as they are recorded
    new = [word for word in spelt if word not in recorded and key_of(word) != "run.resume"]
    overrides, faults = composer.parsed(new)
    values = [word for word in overrides if not word.key_or_group.startswith("hydra")]
    keys = {word.key_or_group for word in values}
    if group := next((word.input_line for word in values if "." not in word.key_or_group), None):
        hint = f"Start a new run: run.like={folder} {group}"
        raise ConfigError(where, f"cannot resume with another option: {group}", hint)
    hidden = [key for key, value in leaves(tree).items() if HIDDEN in str(value) and key not in keys]
    faults += [ConfigError(key, "was redacted in the record", f"Give it again: {key}=...") for key in hidden]
    config = _checked_over(tree, values, {key_of(word) for word in words}, faults)
    sources = record.get("sources", {}) | {key: "typed" for key in keys if key in SOURCES}
    point = Point([*(word for word in recorded if key_of(word) not in keys), *new], config, sources)
    return Plan([point], folder, config_dir, swept=record.get("swept", []), command=command_of(folder))


def alike(name: str, words: list[str]) -> list[str]:
    """Return the words of an earlier run, replaced by those typed now. Raises ConfigError."""
    where, folder = f"run.like={name}", Path(name)
    typed = {new_name(key_of(word)) for word in words}
    typed |= {PAIRS[key] for key in typed & PAIRS.keys()}
    kept = []
    for word in _read(folder / "overrides.yaml", where):
        key = new_name(key_of(word))
        group = key.split(".")[0]
        if key in typed or group == "sweep" or (group in MODELS and group in typed):  # another model has its own keys
            continue
        if "trust_remote_code" in word:
            print(f"kdx: {word} is not copied from {folder}: repeat it here if that code may run", file=sys.stderr)
            continue
        if HIDDEN in word:
            raise ConfigError(key_of(word), "was redacted in the record", f"Give it again: {key_of(word)}=...")
        kept.append(word)
    return [*kept, *(word for word in words if key_of(word) != "run.like")]


def newest() -> Path:
    """Find the run under outputs/ that stopped last, of those that can be resumed. Raises ConfigError."""
    files = [file for depth in ("*", "*/*", "sweeps/*/*") for file in Path("outputs").glob(f"{depth}/status.json")]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        state = read_json(file).get("state")
        if state in ("interrupted", "failed", "running") and is_resumable(file.parent) and not holder(file.parent):
            return file.parent
    raise ConfigError("run.resume=last", "no run under outputs/ can be resumed", "Name a run folder")


def _read(file: Path, where: str) -> Any:
    if not file.is_file():
        hint = "Name a folder that kdx made, such as outputs/2026-11-24/02-45-09-123456"
        raise ConfigError(where, f"{file.parent} is not a run folder: it has no {file.name}", hint)
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def command_of(folder: Path) -> list[str]:
    """Return what was typed for an earlier run."""
    file = folder / "command.txt"
    return shlex.split(file.read_text(encoding="utf-8"), comments=True)[3:] if file.is_file() else []
