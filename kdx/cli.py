"""The command line: words → run, sweep, check, store, compare; exit codes. Torch is imported when a run starts."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdx import plugins
from kdx.errors import MACHINE, ConfigError, KdxError, MachineError, one_line, out_of_memory, printable
from kdx.run.redact import redact
from kdx.version import __version__
from kdx.words import CONF, groups_in, key_of

if TYPE_CHECKING:
    from kdx.compose import Plan, Source
    from kdx.config import Config

__all__ = ["compose", "main"]

HELP = """kdx distils a large causal language model into a small one.

python -m kdx                                    the default run: SmolLM2-135M to 10 of its layers
python -m kdx teacher=NAME student=NAME          choose from the groups below; org/name is any model of the hub
python -m kdx -m loss.temperature=1,2,4          a sweep: one run for each combination of the values
python -m kdx --cfg job                          print the composed configuration
python -m kdx check KEY=VALUE ...                what such a run would be: data, memory, time
python -m kdx store fill KEY=VALUE ...           fill the teacher's cache for all runs; store stat | verify | prune
python -m kdx compare PATH ...                   rank runs and sweeps: a table and a page
python -m kdx run.resume=FOLDER                  resume a run; run.like=FOLDER starts a new one from its words

== Groups (group=option) ==
{groups}

== Keys (key=value) ==
conf/ has a comment on every key; `--cfg job` prints them with this run's values.

Flags of Hydra: --hydra-help. Exit codes: 0 ok, 1 a bug, 2 config or data, 3 machine, 4 diverged,
5 jobs of a sweep failed, 129, 130 or 143 stopped by a signal (the run can be resumed)."""
CHECK_HELP = """python -m kdx check [-m] KEY=VALUE ...

Read config, data and models as the run would, and print what it would train, its memory, disk and time.
With -m: for every point of the sweep."""

STORE_HELP = """python -m kdx store fill KEY=VALUE ...
python -m kdx store stat | verify | prune [--unused-days N] [teacher.store_dir=FOLDER]

fill KEY=VALUE ...   run the teacher over all rows of a run or sweep (words as for the run), so that its jobs need not
stat                 list the teachers, their rows and sizes, and when each was last used
verify               compare the checksum of every row; exit code 3 if one is damaged
prune                remove damaged files; with --unused-days N, remove teachers unused for N days

The folder is $KDX_STORE, else outputs/teacher-store."""


def compose(overrides: list[str] | None = None, config_dir: str | None = None) -> "Config":
    """Compose a Config from the words of a run, checked as the command line is. Raises ConfigError."""
    from kdx.compose import compose

    return compose(overrides, config_dir)


def main() -> None:
    """Run `python -m kdx …`. Exits with the codes of errors.py."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and kdx prints one line
    code = guarded(lambda: _main(sys.argv[1:]))
    if code and os.environ.get("WORLD_SIZE", "1") not in ("0", "1"):
        print(f"kdx: exit code {code}, whatever the launcher reports", file=sys.stderr, flush=True)
    sys.exit(code)


def _main(argv: list[str]) -> int:
    name = argv[0] if argv else ""
    if name in ("version", "--version"):
        print(f"kdx {__version__}")
        return 0
    if argv in (["help"], ["--help"], ["-h"]):
        return _help([CONF])
    if name in ("check", "store", "compare"):
        return _command(name, argv[1:])
    if name and "=" not in name and name[0] not in "+~-":
        raise ConfigError(name, "is not a command, and not KEY=VALUE either", "See python -m kdx --help")
    return _run(argv)


def _help(roots: list[Path]) -> int:
    groups = [f"{group}: {', '.join(options)}" for group, options in groups_in(roots).items()]
    print(HELP.format(groups="\n".join(groups)))
    return 0


def _command(name: str, words: list[str]) -> int:
    """Run `kdx check`, `kdx store` or `kdx compare`. Raises KdxError."""
    is_help = bool({"--help", "-h"} & {*words})
    if name == "compare":
        from kdx.compare.read import main as compare

        return compare(words)
    if is_help:
        print(CHECK_HELP if name == "check" else STORE_HELP)
        return 0
    if name == "store" and words[:1] != ["fill"]:
        from kdx.store_commands import manage

        return manage(words)
    plan = _planned(_parsed(words[name == "store" :]))
    if name == "store":
        plugins.load()
        from kdx.store_commands import fill

        fill([point.config for point in plan.points])
        return 0
    from kdx.check import check
    from kdx.config import replaced
    from kdx.run.folder import Record

    seen: list[Config] = []
    for point in plan.points:  # alpha and temperature change neither data nor memory nor time
        loss = replaced(point.config.loss, alpha=point.config.loss.alpha > 0, temperature=1.0)
        title = " ".join(word for word in point.words if key_of(word) in plan.swept)
        is_new = (same := replaced(point.config, loss=loss)) not in seen
        print(f"\n{title}" + ("" if is_new else ": as a point above") if title else "", flush=True)
        if is_new:
            seen.append(same)
            check(point.config, plan.sweep_dir or plan.run_dir, Record(point.words, plan.swept, point.sources))
    return 0


def _run(argv: list[str]) -> int:
    """Show the config, or do one run or a sweep. Raises KdxError."""
    args = _parsed(argv)
    if args.help:
        return _help(_source(args).roots())
    if args.hydra_help or args.info or args.shell_completion or (args.cfg and (args.cfg != "job" or args.package)):
        _hydra(argv)
        return 0
    plan = _planned(args)
    if args.cfg:
        import yaml

        from kdx.config import as_dict

        print(yaml.safe_dump(redact(as_dict(plan.points[0].config)), sort_keys=False, allow_unicode=True), end="")
        return 0
    argv = plan.command or argv
    if plan.sweep_dir:
        return _sweep(plan, argv)
    from kdx import sweep
    from kdx.run.folder import Record

    (point,) = plan.points
    record = Record(point.words, [], point.sources, argv)

    def work() -> int:
        sweep.start_run(point.config, record, plan.run_dir)
        return 0

    return guarded(work, plan.run_dir)


def _sweep(plan: "Plan", argv: list[str]) -> int:
    """Have Hydra go through the points of a sweep; a job that another process does is passed over."""
    from kdx import sweep

    assert plan.sweep_dir
    if plan.baseline and os.environ.get("RANK", "0") == "0" and not sweep.is_worker():
        baselines = f"{plan.num_baselines} baseline{'s' if plan.num_baselines > 1 else ''} (alpha=0)"
        print(f"kdx: {len(plan.points)} points + {baselines}; sweep.baseline=false leaves them out", flush=True)
    flags = ["--multirun", *_flags(plan.source)]
    since = sweep.started()
    job = partial(run_job, swept=plan.swept, argv=argv, since=since, is_shared=bool(plan.jobs))
    parts = [[*flags, *part] for part in (plan.baseline, plan.words) if part]
    workers = plan.points[0].config.sweep.workers
    launch = partial(_hydra, job=job)
    return sweep.run(plan.sweep_dir, plan.jobs, parts, launch, since=since, workers=workers, argv=argv)


def run_job(cfg: Any, *, swept: list[str], argv: list[str], since: float, is_shared: bool) -> float:
    """Do one job of a sweep, in whatever process Hydra's launcher runs it → the measure that the sweep compares."""
    from hydra.core.hydra_config import HydraConfig

    from kdx import sweep
    from kdx.compose import point_of
    from kdx.run.folder import Record

    hydra_part = HydraConfig.get()
    point, folder = point_of(hydra_part), Path(hydra_part.runtime.output_dir)
    record = Record(point.words, swept, point.sources, argv)
    is_own_gpu = not str(hydra_part.launcher.get("_target_")).endswith(".BasicLauncher")
    return sweep.do_job(point.config, record, folder, guarded, since=since, is_shared=is_shared, is_own_gpu=is_own_gpu)


def _hydra(words: list[str], job: Callable[[Any], Any] = bool) -> None:
    """Run Hydra's own command line on these words. Raises ConfigError."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    sys.argv = [sys.argv[0], *words]
    try:
        hydra.main(config_path="pkg://kdx.conf", config_name="config", version_base="1.3")(job)()
    except RuntimeError as error:
        if "srun" not in str(error):
            raise
        raise MachineError("hydra/launcher", "slurm needs srun", "Run it on a node of a Slurm cluster") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError("hydra", one_line(error), "See python -m kdx --hydra-help") from None


def _planned(args: argparse.Namespace) -> "Plan":
    """Compose everything that a command line asks for. Raises ConfigError."""
    from kdx.compose import plan

    words, source = list(args.overrides), _source(args)
    asked = {key_of(word): word.partition("=")[2].strip("'\"") for word in words}
    resume, like = (asked.get(key, "null") for key in ("run.resume", "run.like"))
    if resume != "null":
        from kdx.resume import resumed

        if like != "null" or args.multirun:
            beside = "run.like" if like != "null" else "-m"
            raise ConfigError("run.resume", f"resumes one run, and {beside} is given too", f"Leave out {beside}")
        return resumed(resume, words, source)
    if like != "null":
        from kdx.resume import alike

        words, of_run = alike(like, words, _parsed)
        source = of_run if not any(vars(source).values()) else source
    made = plan(words, source, args.multirun)
    if like != "null":
        made.command = [*_flags(source), *(["-m"] if args.multirun else []), *words]
    return made


def _source(args: argparse.Namespace) -> "Source":
    from kdx.compose import Source

    return Source(args.config_dir, args.config_path, args.config_name)


def _flags(source: "Source") -> list[str]:
    """The flags of Hydra that name this source."""
    folders = {"--config-dir": source.config_dir, "--config-path": source.config_path}
    flags = [f"{flag}={Path(folder).resolve()}" for flag, folder in folders.items() if folder]
    return [*flags, *([f"--config-name={source.config_name}"] if source.config_name else [])]


def _parsed(argv: list[str]) -> argparse.Namespace:
    """Read Hydra's flags, anywhere among the words. Raises ConfigError."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()

    def refuse(message: str) -> None:
        hint = "Words are KEY=VALUE, without dashes; flags are listed by python -m kdx --hydra-help"
        raise ConfigError("command line", message, hint)

    parser.error = refuse  # type: ignore[method-assign, assignment]
    return parser.parse_intermixed_args(argv)


def guarded(work: Callable[[], int], folder: Path | str = "disk") -> int:
    """Run something → its exit code; a user's error is one line each, a bug is a traceback."""
    try:
        return work()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(bool(error.code))
    except KdxError as error:
        return _print(error)
    except KeyboardInterrupt:
        print("kdx: interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:  # as in `kdx compare … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as error:
        if memory := out_of_memory(error):
            return _print(memory)
        if isinstance(error, OSError) and error.errno in MACHINE:
            from kdx.run.files import of_disk

            return _print(of_disk(error, folder))
        return _bug()


def _print(error: KdxError) -> int:
    if os.environ.get("KDX_DEBUG") == "1":
        traceback.print_exc()
    for line in error.lines:
        print(f"kdx: error: {printable(redact(line))}", file=sys.stderr, flush=True)
    return error.exit_code


def _bug() -> int:
    """Print a traceback, and whether it is the user's own loss or source that raised."""
    traceback.print_exc()
    *_, last = traceback.extract_tb(sys.exc_info()[2])
    where = "this is a bug in kdx; please report it with the lines above"
    if Path(last.filename) in plugins.files():
        where = f"raised in your own code, {last.filename}:{last.lineno}"
    print(f"kdx: {where}", file=sys.stderr)
    return 1
