"""From words to a checked Config: composed by Hydra, with all that is wrong said at once, and no torch."""

import copy
import re
import shlex
from contextlib import suppress
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
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kdx import hostile, sweep
from kdx.config import Config
from kdx.errors import ConfigError, did_you_mean, together
from kdx.folders import (
    ORIGINS,
    Source,
    circular,
    contents,
    groups_in,
    no_keys,
    origins,
    refuse_strange,
    refuse_unread,
    spelt,
)
from kdx.resolve import OPEN_GROUPS, one_line, resolved, to_config
from kdx.validation import ALIASES, contradictions, dotted, has_near_name, nearest_key, problems

LAYERS = ("typed", "experiment/", "recipe/", "")  # what wins comes first


@dataclass
class Point:
    """One run as composed: what is wrong with it, its values, and the words that free max_steps or epochs."""

    faults: list[ConfigError]
    tree: dict[str, Any] = field(default_factory=dict)
    freed: list[str] = field(default_factory=list)

    def config(self) -> Config:
        """The typed config of a point without faults."""
        return to_config(self.tree)


def compose(overrides: list[str] | None = None, config_dir: str | None = None) -> Config:
    """Compose a Config from the words of a run, checked as the command line is. Raises ConfigError."""
    source = Source(config_dir=config_dir)
    _refuse_sweep(Composer(source).parsed(list(overrides or [])))
    return compose_points(list(overrides or []), source)[0][0]


def compose_points(words: list[str], source: Source) -> tuple[list[Config], Path]:
    """Compose every point of a sweep, or the one run of these words, and name its folder. Raises ConfigError."""
    composer = Composer(source)
    typed = composer.parsed(words)
    configs, hydra_part = [point.config() for point in _checked(composer, typed)], composer.hydra_part(typed)
    return configs, Path(str((hydra_part.sweep if configs[1:] else hydra_part.run).dir))


@dataclass
class Plan:
    """What a command line amounts to: the words to add to those typed, and for a sweep what is run."""

    added: list[str]
    num_points: int = 1
    baseline: list[str] = field(default_factory=list)  # all words of the baseline's own sweep; none if there is none
    num_baselines: int = 0
    sweep_dir: Path | None = None
    jobs: dict[Path, Config] = field(default_factory=dict)  # by their folders, as far as their names are known
    workers: int = 1


def preflight(words: list[str], source: Source, is_multirun: bool = False) -> Plan:
    """Check every word and every point of a sweep before anything runs → what is to be run.

    Raises one ConfigError with a line for each thing that is wrong.
    """
    composer = Composer(source)
    typed = composer.parsed(words)
    hydra_part = composer.hydra_part(typed)
    is_sweep = is_multirun or (hydra_part.mode is not None and hydra_part.mode.name == "MULTIRUN")
    params: dict[Any, Any] = {}
    if is_sweep:
        params = dict(OmegaConf.to_container(hydra_part.sweeper.get("params") or OmegaConf.create({})))  # type: ignore[arg-type]
        hostile.refuse_swept(params)
        typed = composer.parsed([*(f"{key}={value}" for key, value in params.items()), *words])
    else:
        _refuse_sweep(typed)
    points = _checked(composer, typed)
    freed = sorted({word for point in points for word in point.freed})
    nulls = [word.removeprefix("train.").removesuffix("=null") for word in freed]
    if any(point.tree["train"][name] is not None for point in points for name in nulls):
        raise ConfigError("train.max_steps and train.epochs", "some points of the sweep set one, some both", "Type one")
    if not is_sweep:
        return Plan(freed)
    for cfg in composer.composed():
        hostile.refuse_secrets(OmegaConf.to_container(cfg), OmegaConf.to_container(hydra_part.launcher))
    keys, configs = sweep.swept_keys(typed), [point.config() for point in points]
    named = any(override.key_or_group == "sweep.name" for override in typed)
    name = [] if named else [f"sweep.name={sweep.sweep_name(keys, configs)}"]
    added = [*freed, *name, f"sweep.keys=[{','.join(keys)}]"]
    place = composer.hydra_part([*typed, *composer.parsed(name)]).sweep
    plan = Plan(added, len(points), sweep_dir=Path(str(place.dir)), workers=configs[0].sweep.workers)
    own = str(hydra_part.sweeper.get("_target_", "")).endswith(".BasicSweeper")
    is_named = own and "kdx_job" in str(OmegaConf.to_container(place)["subdir"])  # type: ignore[index, call-overload]
    without: list[Config] = []
    if own and all(c.sweep.baseline and c.teacher.path for c in configs) and any(c.loss.alpha > 0 for c in configs):
        baseline = sweep.baseline_words(typed)
        without = [point.config() for point in _checked(composer, composer.parsed(baseline))]
        plan.num_baselines = sweep.missing_baselines(configs, without)
        if plan.num_baselines:
            plan.baseline = [*baseline, *(["hydra.sweeper.params=null"] if params else []), *added]
    if is_named:
        jobs = [*(without if plan.baseline else []), *configs]
        plan.jobs = {Path(str(place.dir)) / sweep.job_name(keys, config): config for config in jobs}
    return plan


def _checked(composer: "Composer", words: list[Override]) -> list[Point]:
    """Compose every point of a sweep, or the one run that the words describe. Raises ConfigError with all faults."""
    try:
        points = [composer.point(composer.parsed(point)) for point in sweep.points(words)]
    except HydraException as error:
        raise ConfigError("command line", one_line(error), "Quote lists: 'key=[a,b]'") from None
    faults = [fault for point in points for fault in point.faults]
    if faults:
        raise together(faults)
    return points


def _refuse_sweep(words: list[Override]) -> None:
    for key in sweep.swept_keys(words):
        raise ConfigError(key, "has several values, which is a sweep", "Add -m: python -m kdx -m ...")


class Composer:
    """Composes many points from few compositions: Hydra's is slow, so each set of choices is composed once."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.roots = refuse_strange(source.roots())
        self.groups = groups_in(self.roots)
        self._parser = OverridesParser.create(config_loader=self)  # type: ignore[arg-type]
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def get_group_options(self, group_name: str, *_: Any, **__: Any) -> list[str]:
        """What Hydra's parser asks for `loss=glob(*)`."""
        return self.groups.get(group_name, [])

    def parsed(self, words: list[str]) -> list[Override]:
        """Read words as Hydra does. Raises ConfigError."""
        found: list[ConfigError] = []
        overrides: list[Override] = []
        for word in spelt(words):
            key, _, value = word.partition("=")
            try:
                overrides += self._parser.parse_overrides([word])
                if sweep.is_empty(overrides[-1]):
                    found.append(ConfigError(key, f"names no value ({value})", "Give at least one"))
                if overrides[-1].key_or_group in ("", "hydra"):
                    mend = "Type KEY=VALUE, of Hydra's hydra.KEY"
                    found.append(ConfigError(repr(word), "is not a key of kdx", mend))
                if overrides[-1].key_or_group == "hydra.searchpath":  # run.resume would not find it again
                    found.append(ConfigError("hydra.searchpath", "may not be typed", "Use --config-dir FOLDER"))
            except (HydraException, ValueError) as error:  # ValueError: a number of thousands of digits
                mend = self._quoted(key, value)
                what = one_line(error).removeprefix(f"Error parsing override '{word}' ")
                found.append(ConfigError(key or repr(word), f"cannot be read ({what})", mend))
        if found:
            raise together(found)
        return overrides

    def _quoted(self, key: str, value: str) -> str:
        """The mend for a word that Hydra cannot read: how to type its value as text, if that is what it is."""
        word = f'{key}="' + value.replace('"', '\\"') + '"'
        is_text = not value.startswith(("[", "{", "'", '"')) or value.startswith(("{{", "{%"))
        with suppress(HydraException, ValueError):
            if key and is_text and self._parser.parse_overrides([word])[0].value() == value:
                return f"Quote it for the shell and for Hydra: {shlex.quote(word)}"
        return "Quote what the shell or Hydra would take apart, as in 'data.path=[a.jsonl,b.jsonl]'"

    def hydra_part(self, words: list[Override]) -> DictConfig:
        """Hydra's own part of the config, and what it reads of `sweep`, for the first values of a sweep."""
        choices, _ = self._choices(words)
        cfg = copy.deepcopy(self._base(choices))
        for word in words:
            if word.key_or_group.startswith(("hydra.", "sweep.")) and not self._is_choice(word):
                _apply(word, cfg, [])
        for name in ("sweeper", "launcher", "run", "sweep", "job"):
            if not isinstance(cfg.hydra.get(name), DictConfig):
                raise ConfigError(
                    f"hydra.{name}", "is no group of keys", "Set a key of it, or choose hydra/launcher=..."
                )
        for name in ("run", "sweep"):  # else the folder one is in would be the run's
            if not OmegaConf.to_container(cfg.hydra[name]).get("dir"):  # type: ignore[union-attr]
                raise ConfigError(f"hydra.{name}.dir", "is empty", "Name a folder, or leave it out")
        if cfg.hydra.job.chdir:
            what = "would have every path that is typed or printed mean another one"
            raise ConfigError("hydra.job.chdir", what, "Leave it out")
        return cfg.hydra

    def point(self, words: list[Override]) -> Point:
        """Compose and check one run. What is wrong is left out of what is checked next, so that all is said at once."""
        choices, wrong = self._choices(words)
        faults = list(wrong.values())
        try:
            base = self._base(choices)
            cfg = copy.deepcopy(base)
            known = dotted(OmegaConf.to_container(base))
            for word in words:
                doubtful = word.key_or_group.split(".")[0] in wrong and word.key_or_group not in known
                if not self._is_choice(word) and not doubtful:
                    faults += _apply(word, cfg, known)
            hostile.refuse_code(OmegaConf.to_container(cfg))
            typed = [str(word.input_line) for word in words]
            where = origins(typed, base.hydra.runtime.choices, self.roots)
            freed = _free(cfg, where)
            tree, unresolved = resolved(cfg)
            hostile.refuse_models_code(tree, typed)
        except ConfigError as error:
            return Point([*faults, error])
        faults += unresolved.values()
        faults += [ConfigError(*p) for p in problems(tree) if p.key not in unresolved]
        faults += [] if faults else [ConfigError(*problem) for problem in contradictions(tree)]
        if not faults and base.hydra.runtime.choices.get("teacher") == "none" and tree["teacher"]["path"]:
            what = f"is {tree['teacher']['path']}, beside teacher=none"
            faults.append(ConfigError("teacher.path", what, "Choose another teacher, or teacher.path=null"))
        if not faults:
            tree["run"]["origins"] = where
        return Point(faults, tree, freed)

    def _is_choice(self, word: Override) -> bool:
        key = word.key_or_group
        return key in self.groups or key.startswith("hydra/")

    def _choices(self, words: list[Override]) -> tuple[list[str], dict[str, ConfigError]]:
        """The words that choose from groups (of several values the first), and what is wrong with them by group."""
        kept: list[str] = []
        wrong: dict[str, ConfigError] = {}
        for word in filter(self._is_choice, words):
            key = word.key_or_group
            if key not in self.groups or word.is_delete() or word.package:
                kept.append(str(word.input_line))
                continue
            values = list(word.sweep_string_iterator()) if word.is_sweep_override() else [word.value()]
            bad = [v for v in ("null" if v is None else v for v in values) if str(v) not in self.groups[key]]
            for value in bad:
                alias = ALIASES.get(f"{key}={value}")
                mend = f"Did you mean {alias}?" if alias else did_you_mean(str(value), self.groups[key])
                misnamed = [
                    file for root in self.roots for file in root.glob(f"{key}/*.yml") if file.stem == str(value)
                ]
                mend = f"Rename {misnamed[0]} to .yaml" if misnamed else mend
                what = "names no option" if value == "" else f"{key} has no option {value}"
                wrong[key] = ConfigError(f"{key}={value}", what, mend)
            if not bad:
                kept.append(f"{key}={values[0]}" if word.is_sweep_override() else str(word.input_line))
        return kept, wrong

    def composed(self) -> list[DictConfig]:
        """All that the YAML says under the choices asked for so far."""
        return list(self._composed.values())

    def _base(self, choices: list[str]) -> DictConfig:
        """What the YAML says under these choices, before any value is typed. Raises ConfigError."""
        key = tuple(choices)
        if key not in self._composed:
            cfg = _compose(choices, self.source, self.roots)
            chosen = [f"{group}/{option}" for group, option in cfg.hydra.runtime.choices.items()]
            refuse_unread([self.source.main, *chosen], self.roots)
            hostile.refuse_untyped(OmegaConf.to_container(cfg.hydra))
            self._composed[key] = cfg
        return self._composed[key]


def _compose(words: list[str], source: Source, roots: list[Path]) -> DictConfig:
    """Compose with Hydra, leaving its global state as it was; its errors become one line. Raises ConfigError."""
    where, own = source.config_path and str(Path(source.config_path).resolve()), source.main_file()
    hydra_state = GlobalHydra.instance()
    before = hydra_state.hydra
    hydra_state.clear()
    try:
        if own:
            hostile.refuse_packages(own, OmegaConf.to_container(OmegaConf.load(own)))
        module = "kdx.conf"
        with initialize_config_dir(where, "kdx", "1.3") if where else initialize_config_module(module, "kdx", "1.3"):
            if source.config_dir:  # as Hydra's own command line does: what is checked must be what is run
                loader: Any = hydra_state.config_loader()
                folder, before_schema = f"file://{Path(source.config_dir).resolve()}", SearchPathQuery("schema", None)
                loader.get_search_path().prepend("command-line", folder, before_schema)
                loader.repository.initialize_sources(loader.get_search_path())
            return hydra_compose(source.config_name or "config", words, return_hydra_config=True)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        files = [Path(mark.name)] if mark and Path(mark.name).is_file() else _chosen_first(words, roots)
        raise _unreadable(files) or ConfigError("YAML", one_line(error), "Mend the YAML") from None
    except RecursionError:
        found = _unreadable(_chosen_first(words, roots)) or circular(roots)
        raise found or ConfigError("config", "its defaults never end", "Mend the YAML") from None
    except (HydraException, OmegaConfBaseException) as error:
        package = re.search(r"'hydra/launcher/(joblib|submitit)\w*'", str(error))
        if package:
            what = f"needs the package hydra-{package[1]}-launcher, which is not installed"
            mend = f"pip install hydra-{package[1]}-launcher"
            raise ConfigError("hydra/launcher", what, mend) from None
        mend = "See the options in conf/ and your own folder; `python -m kdx --info defaults` lists what was chosen"
        raise ConfigError("config", one_line(error), mend) from None
    except (ValueError, OSError, AssertionError) as error:  # a defaults list that is none; a file that holds no keys
        if getattr(error, "errno", None) is not None:
            raise
        found = _unreadable(_chosen_first(words, roots))
        raise found or ConfigError("config", one_line(error), "Mend the YAML") from None
    finally:
        GlobalHydra.instance().hydra = before


def _chosen_first(words: list[str], roots: list[Path]) -> list[Path]:
    """Where to look for what is broken: the files that were chosen, then all beside them."""
    files = [root / f"{word.replace('=', '/')}.yaml" for word in words for root in roots]
    return [*(file for file in files if file.is_file()), *roots]


def _unreadable(paths: list[Path]) -> ConfigError | None:
    """The first YAML file, in these or below them, that does not parse, with its line."""
    for file in (file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*.yaml")))):
        try:
            OmegaConf.load(file)
            _ = contents(file)
        except ConfigError as error:
            return error
        except OSError as error:  # OmegaConf's, for a number or text, has no errno
            if error.errno is not None:
                raise
            return no_keys(file)
        except UnicodeDecodeError as error:
            return ConfigError(str(file), f"is not UTF-8 (byte {error.start})", "Save it as UTF-8")
        except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: thousands of digits
            mark = getattr(error, "problem_mark", None)
            place = f"{file}:{mark.line + 1}" if mark else str(file)
            return ConfigError(place, f"does not parse: {getattr(error, 'problem', None) or error}", "Mend the YAML")
    return None


def _apply(word: Override, cfg: DictConfig, known: list[str]) -> list[ConfigError]:
    """Set one typed value as Hydra will → what is wrong with it, if anything."""
    key = word.key_or_group
    is_added = word.is_add() or word.is_force_add()
    if is_added and (key.split(".")[0] not in cfg or "." not in key):
        return [ConfigError(f"+{key}", "is not a key of kdx", nearest_key(key, known))]
    try:
        ConfigLoaderImpl._apply_overrides_to_config([word], cfg)
    except (HydraException, OmegaConfBaseException) as error:
        if is_added and key in known:
            return [ConfigError(f"+{key}", "is there already", f"Type it without the +: {key}=...")]
        if key in known or key.startswith("hydra."):
            return [ConfigError(key, one_line(error), "See `python -m kdx --cfg all`")]
        group, mend = key.split(".")[0], nearest_key(key, known)
        if group in OPEN_GROUPS and "." in key and not has_near_name(key, known):
            mend = f"For an option of what {group}.name names: +{key}=..."
        return [ConfigError(key, "is not a key of kdx", mend)]
    return []


def _free(cfg: DictConfig, where: dict[str, str]) -> list[str]:
    """Setting one of max_steps and epochs frees the other, where it comes from a layer below → the word for that."""
    values = [OmegaConf.select(cfg, key, throw_on_missing=False) for key in ("train.max_steps", "train.epochs")]
    if None in values:
        return []
    rank = {key: next(i for i, layer in enumerate(LAYERS) if layer in where[key]) for key in ORIGINS}
    steps, epochs = rank["train.max_steps"], rank["train.epochs"]
    if steps == epochs:
        return []
    loser = "epochs" if steps < epochs else "max_steps"
    cfg.train[loser] = None
    return [f"train.{loser}=null"]
