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
from kdx.errors import ConfigError, KdxError, MachineError, one_line, printable, user_error
from kdx.run.redact import redact
from kdx.run.signals import is_main, num_processes
from kdx.version import __version__
from kdx.words import groups_in, key_of

if TYPE_CHECKING:
    from kdx.compose import Plan
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
prune                join small shards and drop damaged rows; with --unused-days N, remove teachers unused for N days

The folder is $KDX_STORE, else outputs/teacher-store."""


def compose(overrides: list[str] | None = None, config_dir: str | None = None) -> "Config":
    """Compose a Config from the words of a run, checked as the command line is. Raises ConfigError."""
    from kdx.compose import compose

    return compose(overrides, config_dir)


def main() -> None:
    """Run `python -m kdx …`. Exits with the codes of errors.py."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and kdx prints one line
    code = guarded(lambda: _main(sys.argv[1:]))
    if code and num_processes() > 1:
        print(f"kdx: exit code {code}, whatever the launcher reports", file=sys.stderr, flush=True)
    sys.exit(code)


def _main(argv: list[str]) -> int:
    name = argv[0] if argv else ""
    if name in ("version", "--version"):
        print(f"kdx {__version__}")
        return 0
    if name in ("check", "store", "compare"):
        return _command(name, argv[1:])
    if name not in ("", "help") and "=" not in name and name[0] not in "+~-":
        raise ConfigError(name, "is not a command, and not KEY=VALUE either", "See python -m kdx --help")
    return _run(argv)


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
    from kdx.run.folder import Record
    from kdx.run.identity import config_identity

    seen: list[dict[str, Any]] = []
    for point in plan.points:  # alpha and temperature change neither data nor memory nor time
        same = config_identity(point.config) | {"loss.alpha": point.config.loss.alpha > 0, "loss.temperature": None}
        if same not in seen:
            seen.append(same)
            print("", *(word for word in point.words if key_of(word) in plan.swept), flush=True)
            check(point.config, plan.folder, Record(point.words, plan.swept, point.sources))
    return 0


def _run(argv: list[str]) -> int:
    """Show the config, or do one run or a sweep. Raises KdxError."""
    args = _parsed(argv if argv != ["help"] else ["--help"])
    if args.help:
        groups = [f"{group}: {', '.join(options)}" for group, options in groups_in(args.config_dir).items()]
        print(HELP.format(groups="\n".join(groups)))
        return 0
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
    if plan.is_sweep:
        return _sweep(plan, argv)
    from kdx import sweep
    from kdx.run.folder import Record

    (point,) = plan.points
    sweep.start_run(point.config, Record(point.words, [], point.sources, argv), plan.folder)
    return 0


def _sweep(plan: "Plan", argv: list[str]) -> int:
    """Do the jobs of a sweep one after the other, or have Hydra's launcher or sweeper do them."""
    from kdx import sweep
    from kdx.run.folder import Record

    config, num_baselines = plan.points[0].config.sweep, len(plan.jobs) - len(plan.points)
    if num_baselines > 0 and is_main() and not sweep.is_worker():
        baselines = f"{num_baselines} baseline{'s' if num_baselines > 1 else ''} (alpha=0)"
        print(f"kdx: {len(plan.points)} points + {baselines}; sweep.baseline=false leaves them out", flush=True)
    since = sweep.started()

    def do_all() -> None:
        if plan.hydra:
            words = [point.words for point in plan.jobs.values()]
            job = partial(run_job, words, config_dir=plan.config_dir, swept=plan.swept, argv=argv, since=since)
            return _hydra(["--multirun", *_flags(plan.config_dir), *plan.hydra], job)
        for folder, point in plan.jobs.items():
            sweep.do_job(point.config, Record(point.words, plan.swept, point.sources, argv), folder, since=since)
        return None

    jobs = {folder: point.config for folder, point in plan.jobs.items()}
    return sweep.run(plan.folder, jobs, do_all, since=since, workers=config.workers, argv=argv)


def run_job(
    jobs: list[list[str]], cfg: Any, *, config_dir: str | None, swept: list[str], argv: list[str], since: float
) -> float:
    """Do one job of a sweep, in whatever process Hydra runs it → the measure that the sweep compares.

    jobs: the words of all jobs, of which cfg has the number; empty if a sweeper chooses the words as it goes.
    """
    from hydra.core.hydra_config import HydraConfig

    from kdx import sweep
    from kdx.compose import composer_for
    from kdx.run.folder import Record

    hydra_part = HydraConfig.get()
    point = composer_for(config_dir).point(jobs[cfg.kdx_job] if jobs else list(hydra_part.overrides.task))
    folder = Path(hydra_part.sweep.dir) / sweep.job_name(swept, point.words, point.config)
    record = Record(point.words, swept, point.sources, argv)
    is_own_gpu = not str(hydra_part.launcher.get("_target_")).endswith(".BasicLauncher")
    return sweep.do_job(point.config, record, folder, since=since, is_shared=bool(jobs), is_own_gpu=is_own_gpu)


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

    words, config_dir = list(args.overrides), args.config_dir
    asked = {key_of(word): word.partition("=")[2].strip("'\"") for word in words}
    resume, like = (asked.get(key, "null") for key in ("run.resume", "run.like"))
    if resume != "null":
        from kdx.resume import resumed

        if like != "null" or args.multirun:
            beside = "run.like" if like != "null" else "-m"
            raise ConfigError("run.resume", f"resumes one run, and {beside} is given too", f"Leave out {beside}")
        return resumed(resume, words, config_dir)
    if like == "null":
        return plan(words, config_dir, args.multirun)
    from kdx.resume import alike

    words, of_run = alike(like, words)
    config_dir = config_dir or of_run
    made = plan(words, config_dir, args.multirun)
    made.command = [*_flags(config_dir), *(["-m"] if args.multirun else []), *words]
    return made


def _flags(config_dir: str | None) -> list[str]:
    return [f"--config-dir={Path(config_dir).resolve()}"] if config_dir else []


def _parsed(argv: list[str]) -> argparse.Namespace:
    """Read Hydra's flags, anywhere among the words. Raises ConfigError."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()

    def refuse(message: str) -> None:
        hint = "Words are KEY=VALUE, without dashes; flags are listed by python -m kdx --hydra-help"
        raise ConfigError("command line", message, hint)

    parser.error = refuse  # type: ignore[method-assign, assignment]
    args = parser.parse_intermixed_args(argv)
    if args.config_path or args.config_name:
        refuse("kdx has a config.yaml of its own; add options of yours with --config-dir FOLDER")
    return args


def guarded(work: Callable[[], int], folder: Path | str = "disk") -> int:
    """Run something → its exit code; a user's error is one line each, a bug is a traceback."""
    try:
        return work()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(bool(error.code))
    except KeyboardInterrupt:
        print("kdx: interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:  # as in `kdx compare … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as error:
        known = user_error(error, folder)
        return _print(known) if known else _bug()


def _print(error: KdxError) -> int:
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
