"""The command line: from the words typed to runs, their records and exit codes. Torch is imported when a run starts."""

import argparse
import atexit
import errno
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from kdx import plugins, surroundings, sweep
from kdx.compose import Plan, compose, compose_points, preflight
from kdx.config import Config
from kdx.errors import MACHINE, ConfigError, KdxError, out_of_memory, printable
from kdx.folders import Source, groups_in, origins, roots_of, spelt
from kdx.hostile import refuse_foreign, refuse_links, refuse_typed_secrets
from kdx.resolve import as_tree, to_config
from kdx.run import typed
from kdx.run.files import of_disk
from kdx.run.folder import Record
from kdx.run.redact import redact
from kdx.version import __version__

__all__ = ["compose", "main"]

HELP = """kdx distils a large causal language model into a small one.

python -m kdx                                    the default run: SmolLM2-135M to 10 of its layers
python -m kdx teacher=NAME student=NAME          choose from the groups below
python -m kdx -m loss.temperature=1,2,4          a sweep: commas make a run each
python -m kdx --cfg job                          show the composed configuration and train nothing
python -m kdx check KEY=VALUE ...                what such a run would be: data, memory, time; trains nothing
python -m kdx store fill KEY=VALUE ...           ask the teacher once, for all runs; store stat | verify | prune
python -m kdx compare PATH ...                   rank runs and sweeps: a table and a page
python -m kdx run.resume=FOLDER                  go on with a run; run.like=FOLDER starts one from its words

== Groups (group=option) ==
{groups}

== Keys (key=value) ==
conf/ has a comment on every key; `--cfg job` prints them with this run's values.

Flags of Hydra: --hydra-help. Exit codes: 0 ok, 1 a bug, 2 config or data, 3 machine, 4 diverged,
5 jobs of a sweep failed, 129, 130 or 143 stopped by a signal (the run can go on)."""
PAIRS = {"train.max_steps": "train.epochs", "train.epochs": "train.max_steps"}  # typing one replaces the other


def main() -> None:
    """Run `python -m kdx …`. Exits with the codes of errors.py."""
    os.environ.setdefault("KDX_DEBUG", os.environ.get("HYDRA_FULL_ERROR", "0"))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and kdx says it in its one line
    surroundings.open_streams()
    try:
        code = guarded(lambda: _main(sys.argv[1:]))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    if code and os.environ.get("WORLD_SIZE", "1") not in ("0", "1"):
        print(f"kdx: exit code {code}, whatever the launcher's own is", file=sys.stderr, flush=True)
    sys.exit(code)


def _main(argv: list[str]) -> int:
    surroundings.check(argv)
    if argv == ["help"] or ((argv[:1] == ["check"] or argv[:2] == ["store", "fill"]) and {"--help", "-h"} & {*argv}):
        argv = ["--help"]
    if argv == ["--version"]:
        print(f"kdx {__version__}")
        return 0
    if argv and "=" not in argv[0] and argv[0][:1] not in ("+", "~", "-"):
        return _command(argv[0], argv[1:])
    args = _parsed(argv)
    words = list(args.overrides)
    if words and "=" not in words[0] and words[0][:1] not in ("+", "~") and not args.shell_completion:
        raise _no_command(words[0])
    words = spelt(_recalled(words, args))
    source = Source(args.config_dir, args.config_path, args.config_name)
    only_shows = args.help or args.hydra_help or args.info or args.cfg
    plan = Plan([])
    if not args.shell_completion and (words or source != Source() or not only_shows):
        plan = preflight(words, source, args.multirun)
        words += [word for word in plan.added if word not in words]
    if plan.sweep_dir:
        parsed = OverridesParser.create().parse_overrides(words)
        refuse_typed_secrets((word.get_key_element(), word.value()) for word in parsed)
    if args.help:
        groups = sorted(groups_in(source.roots()).items())
        print(HELP.format(groups="\n".join(f"{group}: {', '.join(options)}" for group, options in groups)))
        return 0
    if os.environ.get("RANK", "0") != "0" and not only_shows:
        words.append(f"hydra.run.dir={_scratch()}")  # rank 0's folder is the run's; distill tells the others
    is_main = os.environ.get("RANK", "0") == "0" and not only_shows
    if plan.baseline and is_main:
        baselines = f"{plan.num_baselines} baseline{'s' if plan.num_baselines > 1 else ''} (alpha=0)"
        print(f"kdx: {plan.num_points} points + {baselines}; sweep.baseline=false leaves it out", flush=True)
    if only_shows or args.shell_completion:
        try:
            _hydra([*_flags(args), *words], argv=argv)
        except ValueError as error:  # flags that Hydra finds do not go together
            raise ConfigError("command line", str(error).rstrip("."), "See python -m kdx --hydra-help") from None
        except SystemExit as error:  # it has said why on stderr
            return 2 if error.code else 0
        return 0
    if not plan.sweep_dir:
        _hydra([*_flags(args), *words], argv=argv)
        return 0
    parts = [[*_flags(args), *part] for part in (plan.baseline, words) if part]
    since = sweep.started()
    launch = partial(_hydra, argv=argv, since=since, is_shared=bool(plan.jobs))
    return sweep.run(plan.sweep_dir, plan.jobs, parts, launch, since=since, workers=plan.workers, argv=argv)


def _hydra(words: list[str], *, argv: list[str], since: float = 0.0, is_shared: bool = False) -> None:
    """Have Hydra run one job, or all of a sweep."""

    def job(cfg: DictConfig) -> float:  # launchers carry it, and what it holds, to other processes
        return run_job(cfg, argv, since, is_shared)

    sys.argv = [sys.argv[0], *words]
    try:
        hydra.main(config_path="pkg://kdx.conf", config_name="config", version_base="1.3")(job)()
    except OSError as error:  # Hydra makes the folders of runs and sweeps; what happens in a job is caught there
        if error.filename is None:  # it prints, too
            raise
        own = HydraConfig.get().run.dir if HydraConfig.initialized() else "outputs"
        raise of_disk(error, own) from None


def _command(name: str, words: list[str]) -> int:
    """Run `kdx NAME …` → its exit code. Raises KdxError."""
    if name == "compare":
        from kdx.compare.read import main as compare

        return compare(words)
    if name == "check":
        (config, *_), folder = _composed(words)  # of a sweep its first point
        from kdx.check import check

        check(config, folder)
        return 0
    if name == "store":
        if words[:1] == ["fill"]:
            configs, _ = _composed(words[1:])
            from kdx.store_commands import fill

            fill(configs)
            return 0
        if words[:1] in (["stat"], ["verify"], ["prune"]):
            from kdx.store_commands import tend

            return tend(words)
        raise ConfigError("kdx store", "does one of: fill, stat, verify, prune", "As in: kdx store stat")
    raise _no_command(name)


def _composed(words: list[str]) -> tuple[list[Config], Path]:
    """What the words of a run or sweep amount to, checked as its own would be, and its folder; plug-ins are loaded."""
    args = _parsed(words)
    if args.help or args.cfg or args.info or args.hydra_help:
        raise ConfigError("command line", "asks to show the configuration", "Leave out check or store fill")
    words = _recalled(list(args.overrides), args)
    made = compose_points(words, Source(args.config_dir, args.config_path, args.config_name))
    plugins.load()
    return made


def _no_command(word: str) -> ConfigError:
    mend = "A run is python -m kdx KEY=VALUE ...; see python -m kdx --help"
    return ConfigError(word or "''", "is not a command of kdx, and not KEY=VALUE either", mend)


def run_job(cfg: DictConfig, argv: list[str], since: float, is_shared: bool) -> float:
    """Do one run, of its own or of a sweep → the measure that a sweep compares."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    words = list(hydra_config.overrides.task)
    sources = [f"{source.schema}://{source.path}" for source in hydra_config.runtime.config_sources]
    tree = as_tree(cfg)
    tree["run"]["origins"] = origins(words, hydra_config.runtime.choices, roots_of(sources))
    config = to_config(tree)
    record = Record(words, config.sweep.keys, tree["run"]["origins"], argv)
    if hydra_config.mode is not None and hydra_config.mode.name == "MULTIRUN":
        is_own_gpu = not str(hydra_config.launcher.get("_target_")).endswith(".BasicLauncher")
        return sweep.do_job(config, record, folder, guarded, since=since, is_shared=is_shared, is_own_gpu=is_own_gpu)
    measure = 0.0

    def work() -> int:
        nonlocal measure
        if os.environ.get("RANK", "0") == "0":
            refuse_foreign(folder)
            refuse_links(folder, None)
        measure = sweep.start_run(config, record, folder)
        return 0

    if code := guarded(work, folder):
        sys.exit(code)
    return measure


def guarded(work: Callable[[], int], folder: Path | str = "disk") -> int:
    """Run something → its exit code; a user's error is one line each, a bug is a traceback."""
    try:
        return work()
    except KdxError as error:
        return _say(error)
    except (HydraException, OmegaConfBaseException) as error:  # from a flag of Hydra's own: all else is checked before
        what = " ".join(str(error).split())[:300].rstrip(".")
        return _say(ConfigError("hydra", what, "See python -m kdx --hydra-help"))
    except KeyboardInterrupt:
        print("kdx: interrupted", file=sys.stderr, flush=True)
        return 130
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return _say(ConfigError(f"{error.filename!s:.60} …", "is longer than a name may be", "Check the path"))
        if isinstance(error, BrokenPipeError) and surroundings.is_unread():
            return surroundings.BROKEN_PIPE
        if error.errno not in MACHINE:
            memory = out_of_memory(error)
            return _say(memory) if memory else _bug()
        return _say(of_disk(error, folder))
    except Exception as error:
        memory = out_of_memory(error)
        return _say(memory) if memory else _bug()


def _say(error: KdxError) -> int:
    if os.environ.get("KDX_DEBUG") == "1":
        traceback.print_exc()
    for line in error.lines:
        with suppress(OSError):  # nobody may be there to read it
            print(f"kdx: error: {printable(redact(line))}", file=sys.stderr, flush=True)
    return error.exit_code


def _bug() -> int:
    """Print a traceback, and whose it is: kdx's, or that of the user's own loss or source."""
    traceback.print_exc()
    *_, last = traceback.extract_tb(sys.exc_info()[2])
    own = [getattr(sys.modules.get(name), "__file__", None) for name in plugins.named()]
    is_users = last.filename in own
    whose = f"raised in {last.filename}:{last.lineno}, your own code" if is_users else "this is a bug in kdx"
    mend = "mend it there" if is_users else "please report it with the lines above"
    print(f"kdx: {whose}; {mend}", file=sys.stderr, flush=True)
    return 1


def _parsed(argv: list[str]) -> argparse.Namespace:
    """Read Hydra's flags, anywhere among the words. Raises ConfigError."""
    parser = get_args_parser()

    def refuse(message: str) -> None:
        raise ConfigError("command line", message, "Flags are listed by python -m kdx --hydra-help")

    parser.error = refuse  # type: ignore[method-assign, assignment]
    args = parser.parse_intermixed_args(argv)
    if sum(map(bool, (args.run, args.multirun, args.cfg, args.info, args.shell_completion))) > 1:
        raise ConfigError("command line", "asks for several things at once", "Give one of --multirun, --cfg, --info")
    if args.resolve and not (args.cfg or args.help):
        raise ConfigError("--resolve", "belongs to --cfg", "As in: python -m kdx --cfg job --resolve")
    for name in ("config_path", "config_dir", "config_name"):
        if getattr(args, name) == "":
            raise ConfigError(f"--{name.replace('_', '-')}", "is empty", "Give it a value, or leave it out")
    if args.experimental_rerun is not None:
        raise ConfigError("--experimental-rerun", "reads a pickle, which could run code", "Use run.like=FOLDER")
    return args


def _flags(args: argparse.Namespace) -> list[str]:
    """The flags that were typed, to hand on to Hydra before the words."""
    flags = []
    for name, value in vars(args).items():
        if name in ("overrides", "experimental_rerun") or value is None or value is False:
            continue
        flag = f"--{name.replace('_', '-')}"
        value = str(Path(value).resolve()) if name in ("config_path", "config_dir") else value
        flags.append(flag if value is True else f"{flag}={value}")
    return flags


def _recalled(words: list[str], args: argparse.Namespace) -> list[str]:
    """Put the words of the run that run.resume or run.like names before those typed now. Raises ConfigError."""
    asked = {
        key: value for key, _, value in (word.partition("=") for word in words) if key in ("run.resume", "run.like")
    }
    asked = {key: value.strip("'\"") for key, value in asked.items() if value != "null"}
    if not asked:
        return words
    if len(asked) > 1:
        raise ConfigError("run.resume and run.like", "are both given", "Choose one: go on in a folder, or start anew")
    ((key, name),) = asked.items()
    if key == "run.resume" and args.multirun:
        raise ConfigError(key, "goes on with one run, and -m is a sweep", "For a sweep, type the same command again")
    folder = typed.last_run() if name == "last" else Path(name)
    was = typed.recalled(folder, f"{key}={name}")
    recalled = [word for word in was if key == "run.resume" or "sweep." not in word[:7]]
    flags = _parsed(typed.flags(folder))
    for flag in ("config_dir", "config_path", "config_name"):  # those of the run, where none is typed now
        setattr(args, flag, getattr(args, flag) or getattr(flags, flag))
    said = [word for word in words if word.split("=", 1)[0] not in ("run.resume", "run.like")]
    replaced = {word.lstrip("+~").split("=", 1)[0] for word in said}
    replaced |= {PAIRS[one] for one in replaced & PAIRS.keys()}
    kept = [word for word in recalled if word.lstrip("+~").split("=", 1)[0] not in replaced]
    secret = next((word for word in kept if "[redacted]" in word), None)
    if secret:
        raise ConfigError(secret.split("=", 1)[0], "was kept without its secret", "Type it again beside run.resume")
    here = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    in_place = [f"hydra.run.dir='{here}'", "hydra.mode=RUN"]  # one run, though its experiment may be a sweep
    return [*kept, *said, *(in_place if key == "run.resume" else [])]


def _scratch() -> str:
    """A folder for what Hydra makes on ranks that have no run folder of their own; removed at the end."""
    folder = tempfile.mkdtemp(prefix="kdx-rank-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
