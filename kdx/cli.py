"""The command line: compose conf/, check it all before torch is imported, run."""

import argparse
import importlib
import os
import re
import shlex
import shutil
import sys
import traceback
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import kdx.conf
from kdx import sweep
from kdx.check import ALIASES, problems
from kdx.config import Config
from kdx.errors import ConfigError, KdxError, MachineError, did_you_mean, together

CONF = Path(next(iter(kdx.conf.__path__)))
OPEN_GROUPS = ("data", "loss", "optim")  # their further keys are options of what they name
ORIGINS = ("optim.lr", "train.max_steps", "train.epochs", "data.max_length")
_failures: list[str] = []


def main() -> None:
    """Run `python -m kdx …`. Exits with the codes of errors.py."""
    sys.exit(_guarded(lambda: _main(sys.argv[1:])))


def _main(words: list[str]) -> int:
    args = get_args_parser().parse_args(words)
    asks = args.help or args.hydra_help or args.shell_completion or args.info
    if not asks:
        args.overrides = _recalled(args.overrides)
        extra = preflight(args.overrides, args)
        sys.argv = [sys.argv[0], *_flags(args), *args.overrides, *extra]
    sweep.register_resolver()
    _failures.clear()
    os.environ.setdefault("HYDRA_FULL_ERROR", "0")
    hydra.main(config_path="pkg://kdx.conf", config_name="config", version_base="1.3")(run_job)()
    if _failures:
        print(f"kdx: {len(_failures)} job(s) of the sweep failed:", *_failures, sep="\n  ", file=sys.stderr)
        return 5
    return 0


def run_job(cfg: DictConfig) -> float:
    """Do one run, of its own or of a sweep → the measure a sweep compares.

    In a sweep a failing job is written down and counts as +inf, so that the others go on.
    """
    hydra_config = HydraConfig.get()
    is_sweep = hydra_config.mode is not None and hydra_config.mode.name == "MULTIRUN"
    run_dir = Path(hydra_config.runtime.output_dir)
    measure = float("inf")

    def job() -> int:
        nonlocal measure
        words = list(hydra_config.overrides.task)
        tree = as_tree(cfg)
        tree["run"]["origins"] = origins(words, dict(hydra_config.runtime.choices), _roots(hydra_config))
        config = to_config(tree)
        _keep_words(run_dir, words)
        load_plugins(run_dir)
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars; read when they are imported
        from kdx.distill import distill

        if is_sweep:
            print(f"\nkdx: job {hydra_config.job.num + 1}: {run_dir}", flush=True)
        measure = distill(config, run_dir).measure
        return 0

    code = _guarded(job)
    if code and not is_sweep:
        sys.exit(code)
    if code:
        _failures.append(f"{run_dir} (exit code {code})")
    return measure


def _guarded(work: Any) -> int:
    """Run something → its exit code; a user's error is one line each, a bug is a traceback."""
    debug = os.environ.get("KDX_DEBUG") == "1" or os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        return int(work())
    except KdxError as error:
        if debug:
            traceback.print_exc()
        for line in error.lines:
            print(f"kdx: error: {line}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception as error:
        out_of_memory = "out of memory" in str(error).lower() or isinstance(error, MemoryError)
        if out_of_memory:
            print(f"kdx: error: out of memory: {str(error).splitlines()[0][:160]}. {MEMORY}", file=sys.stderr)
            return 3
        traceback.print_exc()
        print("kdx: this is a bug in kdx; please report it with the lines above", file=sys.stderr, flush=True)
        return 1


MEMORY = (
    "In this order: lower train.micro_batch_size, train.gradient_checkpointing=true, train.precision=bf16, "
    "optim=adamw_8bit, teacher.quantization=8bit"
)


def compose(overrides: list[str] | None = None, config_dir: str | None = None) -> Config:
    """Compose a Config from the words of a run, checked as the command line is. Raises ConfigError."""
    words = list(overrides or [])
    args = argparse.Namespace(config_dir=config_dir, config_path=None, config_name=None, multirun=False)
    extra = preflight(words, args)
    cfg = _compose([*words, *extra], args)
    tree = as_tree(cfg)
    tree["run"]["origins"] = origins(words, dict(cfg.hydra.runtime.choices), _search_roots(args))
    return to_config(tree)


def preflight(words: list[str], args: argparse.Namespace) -> list[str]:
    """Check every word and every point of a sweep before anything runs → the words to add to those typed.

    Raises one ConfigError with a line for each thing that is wrong.
    """
    extra = _freed(words)
    found: list[ConfigError] = []
    roots = _search_roots(args)
    base = _compose(_choices(words, roots)[0], args)
    params = OmegaConf.to_container(base.hydra.sweeper.get("params") or OmegaConf.create({}))
    assert isinstance(params, dict)
    is_sweep = args.multirun or (base.hydra.mode is not None and base.hydra.mode.name == "MULTIRUN")
    swept_in_file = [f"{key}={value}" for key, value in params.items()] if is_sweep else []
    typed_keys = {word.split("=", 1)[0] for word in words}
    all_words = [*(w for w in swept_in_file if w.split("=", 1)[0] not in typed_keys), *words, *extra]
    try:
        all_points = sweep.points(all_words) if is_sweep else [all_words]
        keys = sweep.swept_keys(all_words) if is_sweep else []
        if not is_sweep and (several := sweep.swept_keys(all_words)):
            raise ConfigError(several[0], "has several values, which is a sweep", "Add -m: python -m kdx -m ...")
    except HydraException as error:
        raise ConfigError("command line", _one_line(error), "Quote lists: 'key=[a,b]'") from None
    first: Config | None = None
    for point in all_points:
        faults, config = _check_point(point, args)
        found += faults
        first = first or config
    if found:
        raise together(found)
    if is_sweep and first is not None:
        named = any(word.startswith("sweep.name=") for word in words)
        extra += [] if named else [f"sweep.name={sweep.sweep_name(keys, first)}"]
        extra += [f"sweep.keys=[{','.join(keys)}]"]
    return extra


def _check_point(point: list[str], args: argparse.Namespace) -> tuple[list[ConfigError], Config | None]:
    """Compose and check the words of one run → what is wrong, and the config if nothing is.

    What is wrong already is left out of what is checked next, so that all of it is said at once.
    """
    roots = _search_roots(args)
    try:
        choices, wrong_choices = _choices(point, roots)
        base = _compose(choices, args)
        wrong_keys = _unknown_keys(point, base, roots)
        good = [word for word in point if word not in wrong_choices and word not in wrong_keys]
        groups = {word.split("=", 1)[0] for word in wrong_choices}
        good = [word for word in good if word.lstrip("+~").split(".")[0] not in groups]
        cfg = _compose(good, args)
        _refuse_hostile(cfg, point)
        tree = as_tree(cfg)
    except ConfigError as error:
        return [error], None
    found = [*wrong_choices.values(), *wrong_keys.values()]
    found += [ConfigError(*problem) for problem in problems(tree) if problem.key.split(".")[0] not in groups]
    return found, None if found else to_config(tree)


def _freed(words: list[str]) -> list[str]:
    """Typing one of max_steps and epochs frees the other."""
    typed = {key: value for key, _, value in (word.partition("=") for word in words)}
    for one, other in (("train.max_steps", "train.epochs"), ("train.epochs", "train.max_steps")):
        if one in typed and other not in typed and typed[one] != "null":
            return [f"{other}=null"]
    return []


def _choices(words: list[str], roots: list[Path]) -> tuple[list[str], dict[str, ConfigError]]:
    """Find the words that choose from groups → those that can be, with Hydra's own; and what is wrong by word."""
    groups = _groups(roots)
    kept: list[str] = []
    wrong: dict[str, ConfigError] = {}
    for word, override in _parsed(words):
        key = override.key_or_group
        if key.startswith("hydra"):
            kept.append(word)
        elif key in groups and not override.is_delete():
            values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
            for value in values:
                if value is not None and str(value) not in groups[key]:
                    alias = ALIASES.get(f"{key}={value}")
                    mend = f"Did you mean {alias}?" if alias else did_you_mean(str(value), groups[key])
                    wrong[word] = ConfigError(f"{key}={value}", f"{key} has no option {value}", mend)
            if word not in wrong:
                kept.append(f"{key}={values[0]}" if override.is_sweep_override() else word)
    return kept, wrong


def _parsed(words: list[str]) -> list[tuple[str, Any]]:
    """Words with Hydra's reading of them. Raises ConfigError."""
    try:
        return list(zip(words, OverridesParser.create().parse_overrides(words), strict=True))
    except HydraException as error:
        mend = "Quote what the shell or Hydra would take apart, as in 'data.path=[a.jsonl,b.jsonl]'"
        raise ConfigError("command line", _one_line(error), mend) from None


def _unknown_keys(words: list[str], base: DictConfig, roots: list[Path]) -> dict[str, ConfigError]:
    """Find every word whose key the composed config does not have → the nearest that it has, by word."""
    groups = _groups(roots)
    tree = {str(k): v for k, v in OmegaConf.to_container(base).items() if k != "hydra"}  # type: ignore[union-attr]
    known = _dotted(tree)
    wrong = {}
    for word, override in _parsed(words):
        key = override.key_or_group
        if key in groups or key.startswith("hydra"):
            continue
        if override.is_add() or override.is_force_add():
            if key.split(".")[0] not in tree or "." not in key:
                wrong[word] = ConfigError(f"+{key}", "is not a key of kdx", _key_mend(key, known))
        elif key in tree and isinstance(tree[key], dict):
            wrong[word] = ConfigError(key, "is a part of the config, not a value", f"Set keys in it: {key}.NAME=...")
        elif key not in known:
            mend = _key_mend(key, known)
            group = key.split(".")[0]
            if "Did you mean" not in mend and group in OPEN_GROUPS and "." in key:
                mend = f"For an option of what {group}.name names: +{key}=... {mend}"
            wrong[word] = ConfigError(key, "is not a key of kdx", mend)
    return wrong


def _key_mend(key: str, known: list[str]) -> str:
    last = key.rsplit(".", 1)[-1]
    if last in ALIASES and key not in known:
        return f"Did you mean {ALIASES[last]}?"
    same = [k for k in known if k.rsplit(".", 1)[-1] == last]
    if same:
        return f"Did you mean {' or '.join(same)}?"
    mend = did_you_mean(key, known)
    if "Did you mean" not in mend:  # a short name: compare with the last parts
        import difflib

        near = difflib.get_close_matches(last, [k.rsplit(".", 1)[-1] for k in known], n=1, cutoff=0.7)
        same = [k for k in known if near and k.rsplit(".", 1)[-1] == near[0]]
        mend = f"Did you mean {' or '.join(same)}?" if same else mend
    return mend.strip()


def _dotted(tree: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _dotted(value, f"{prefix}{key}.")
    return keys


def _groups(roots: list[Path]) -> dict[str, list[str]]:
    """The config groups and their options, in kdx's own conf/ and the user's folder."""
    groups: dict[str, list[str]] = {}
    for root in roots:
        for file in sorted(root.glob("*/*.yaml")):
            groups.setdefault(file.parent.name, []).append(file.stem)
    return {name: sorted(set(options)) for name, options in groups.items() if name != "hydra"}


def _search_roots(args: argparse.Namespace) -> list[Path]:
    roots = [Path(p) for p in (args.config_dir, args.config_path) if p]
    for root in roots:
        if not root.is_dir():
            raise ConfigError(
                "--config-dir", f"{root} is not a folder", "Give the folder that holds teacher/, data/, …"
            )
    return [*roots, CONF]


def _roots(hydra_config: Any) -> list[Path]:
    """The same, from a running job's search path."""
    paths = [source.path for source in hydra_config.runtime.config_sources if source.schema == "file"]
    return [*(Path(path) for path in paths if path), CONF]


def _compose(words: list[str], args: argparse.Namespace) -> DictConfig:
    """Compose with Hydra; its errors become one line. Raises ConfigError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    sweep.register_resolver()
    if args.config_dir:
        path = Path(args.config_dir).resolve()
        words = [*words, f"hydra.searchpath=['file://{path}']"]
    where = args.config_path and str(Path(args.config_path).resolve())
    name = args.config_name or "config"
    try:
        context = (
            initialize_config_dir(where, version_base="1.3")
            if where
            else initialize_config_module("kdx.conf", version_base="1.3")
        )
        with context:
            return hydra_compose(name, words, return_hydra_config=True)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{mark.name}:{mark.line + 1}" if mark else "YAML"
        raise ConfigError(place, f"does not parse: {getattr(error, 'problem', error)}", "Mend the YAML") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError("config", _one_line(error), "See `python -m kdx --cfg job` and conf/") from None


def as_tree(cfg: DictConfig) -> dict[str, Any]:
    """Plain values of a composed config, resolved; further keys of the open groups moved to their options."""
    tree: dict[str, Any] = {}
    for name in cfg:
        if name == "hydra":
            continue
        try:
            node = cfg[name]
            tree[str(name)] = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or name
            variable = re.search(r"Environment variable '(\w+)'", str(error))
            mend = f"Set it: export {variable[1]}=..." if variable else "Mend the interpolation"
            raise ConfigError(str(key), _one_line(error), mend) from None
    import dataclasses
    import typing

    hints = typing.get_type_hints(Config)
    for group in OPEN_GROUPS:
        node = tree.get(group)
        if isinstance(node, dict):
            own = {field.name for field in dataclasses.fields(hints[group])} - {"options"}
            options = {k: v for k, v in node.items() if k not in own}
            options |= options.pop("options", None) or {}
            tree[group] = {k: v for k, v in node.items() if k in own} | {"options": options}
    return tree


def to_config(tree: dict[str, Any]) -> Config:
    """Turn a checked tree into plain typed objects; OmegaConf goes no further. Raises ConfigError."""
    found = [ConfigError(*problem) for problem in problems(tree)]
    if found:
        raise together(found)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Config), tree)
        config = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        raise ConfigError(str(getattr(error, "full_key", "") or "config"), _one_line(error), "Mend the value") from None
    assert isinstance(config, Config)
    return config


def _refuse_hostile(cfg: DictConfig, words: list[str]) -> None:
    """Refuse what would make Hydra run code named in a YAML file. Raises ConfigError."""
    tree = OmegaConf.to_container(cfg, resolve=False)

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                here = f"{path}.{key}" if path else str(key)
                if key in ("_target_", "()", "class") and isinstance(value, str) and not _may_run(here, key, value):
                    raise ConfigError(
                        here, f"names code to run ({value})", "kdx runs none that YAML names: take it out"
                    )
                walk(value, here)
        elif isinstance(node, list):
            for i, value in enumerate(node):
                walk(value, f"{path}[{i}]")

    walk(tree, "")
    env_set = OmegaConf.select(cfg, "hydra.job.env_set")
    if env_set and not any(word.lstrip("+").startswith("hydra.job.env_set") for word in words):
        raise ConfigError("hydra.job.env_set", "sets environment variables from a file", "Type it, or take it out")


def _may_run(path: str, key: str, value: str) -> bool:
    if not path.startswith("hydra."):
        return key == "class"  # an ordinary word outside Hydra's own logging
    if key == "_target_":
        return value.startswith(("hydra._internal.core_plugins.", "hydra_plugins."))
    return key == "class" and value.startswith("logging.") and "Config" not in value


def origins(words: list[str], choices: dict[str, Any], roots: list[Path]) -> dict[str, str]:
    """Where the values came from that suit a student or do not: lr, steps, max_length."""
    typed = {word.lstrip("+").split("=", 1)[0] for word in words}
    files = [f"experiment/{choices.get('experiment')}.yaml", f"recipe/{choices.get('student')}.yaml"]
    found = {}
    for key in ORIGINS:
        group = key.split(".")[0]
        own = f"{group}/{choices[group]}.yaml" if group in choices else "config.yaml"
        where = next((f for f in files if _sets(f, key, roots)), f"conf/{own}")
        found[key] = "typed" if key in typed else where if where.startswith("conf/") else f"conf/{where}"
    return found


def _sets(file: str, key: str, roots: list[Path]) -> bool:
    path = next((root / file for root in roots if (root / file).is_file()), None)
    if path is None:
        return False
    node = yaml.safe_load(path.read_text(encoding="utf-8"))
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node is not None


def _recalled(words: list[str]) -> list[str]:
    """Put the words of the run that run.resume or run.like names before those typed now. Raises ConfigError."""
    for key in ("run.resume", "run.like"):
        asked = next((word.split("=", 1)[1] for word in words if word.startswith(f"{key}=")), None)
        if asked in (None, "null"):
            continue
        folder = _last_run() if asked == "last" else Path(str(asked))
        file = folder / "overrides.yaml"
        if not file.is_file():
            raise ConfigError(
                f"{key}={asked}", f"{folder} is not a run folder (no overrides.yaml)", "Name a run folder"
            )
        recalled = yaml.safe_load(file.read_text(encoding="utf-8")) or []
        if not all(isinstance(word, str) and not word.lstrip("+~").startswith("hydra") for word in recalled):
            raise ConfigError(str(file), "holds words that are not a run's", "Do not use this folder")
        typed = [word for word in words if not word.startswith(f"{key}=")]
        keys = {word.split("=", 1)[0] for word in typed}
        recalled = [word for word in recalled if word.split("=", 1)[0] not in keys]
        return [*recalled, *typed] + ([f"hydra.run.dir={folder}"] if key == "run.resume" else [])
    return words


def _last_run() -> Path:
    folders = [p.parent for p in Path("outputs").glob("*/*/status.json")]
    if not folders:
        raise ConfigError("run.resume=last", "there is no run under outputs/", "Name a run folder")
    return max(folders, key=lambda p: (p / "status.json").stat().st_mtime)


def _keep_words(run_dir: Path, words: list[str]) -> None:
    """Write what was typed into the run folder, never over an earlier record."""
    from kdx.redact import redact

    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("overrides.yaml", yaml.safe_dump([redact(word) for word in words], allow_unicode=True)),
            ("command.txt", redact(shlex.join(["python", "-m", "kdx", *sys.argv[1:]])) + "\n"),
        ):
            if not (run_dir / name).exists():
                (run_dir / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise MachineError(str(run_dir), f"cannot write there: {error.strerror}", "Choose another folder") from None


def load_plugins(run_dir: Path) -> None:
    """Import the user's losses and sources (KDX_PLUGINS, entry points kdx.plugins), and keep their source in the run."""
    names = [name.strip() for name in os.environ.get("KDX_PLUGINS", "").split(",") if name.strip()]
    if names and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names:
        try:
            module = importlib.import_module(name)
        except KdxError:
            raise
        except Exception as error:
            what = f"cannot import {name}: {type(error).__name__}: {error}"
            raise ConfigError("KDX_PLUGINS", what, "Give module names, with their folder on PYTHONPATH") from error
        file = getattr(module, "__file__", None)
        if file:
            (run_dir / "plugins").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, run_dir / "plugins" / Path(file).name)
    for entry in entry_points(group="kdx.plugins"):
        entry.load()


def _flags(args: argparse.Namespace) -> list[str]:
    """The flags that were typed, to hand on to Hydra with the words put in order."""
    flags = []
    if args.cfg:
        flags += ["--cfg", args.cfg]
    if args.resolve:
        flags.append("--resolve")
    if args.package:
        flags += ["--package", args.package]
    if args.run:
        flags.append("--run")
    if args.multirun:
        flags.append("--multirun")
    for name in ("config_path", "config_name", "config_dir"):
        if getattr(args, name):
            value = getattr(args, name)
            value = str(Path(value).resolve()) if name != "config_name" else value
            flags += [f"--{name.replace('_', '-')}", value]
    return flags


def _one_line(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error).split("\nSee https")[0]).strip().rstrip(".")
    return text[:300]
