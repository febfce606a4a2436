"""The command line: words → run, sweep, check, store, compare, evaluate; exit codes. Torch is imported when a run starts."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdx.errors import ConfigError, MachineError, Parser, one_line, printable, user_error
from kdx.run.redact import redact
from kdx.run.signals import num_processes
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
python -m kdx check [-m] KEY=VALUE ...           report data, memory and time of a run, or of each point of a sweep, and
                                                 over loss.* what alpha would really weigh there
python -m kdx store fill KEY=VALUE ...           run the teacher over all rows in advance
python -m kdx store stat | verify | prune        the teacher's cache ($KDX_STORE, else outputs/teacher-store): list, verify
                                                 checksums, delete damaged files; prune --unused-days N, old teachers too
python -m kdx generate KEY=VALUE ... --out FILE  write the teacher's answers to the training prompts, as data=messages
python -m kdx compare PATH ...                   rank runs and sweeps: a table and a page
python -m kdx evaluate PATH ... --on-policy      KL on the students' own answers; --tasks A,B: lm_eval scores
python -m kdx run.resume=FOLDER                  resume a run; run.like=FOLDER starts a new one with the same settings

== Groups (group=option) ==
{groups}

== Keys (key=value) ==
conf/ has a comment on every key; `--cfg job` prints them with this run's values.

Flags of Hydra: --hydra-help. Exit codes: 0 ok, 1 a bug, 2 config or data, 3 machine, 4 diverged,
5 jobs of a sweep failed, 129, 130 or 143 stopped by a signal (the run can be resumed)."""


def compose(overrides: list[str] | None = None, config_dir: str | None = None) -> "Config":
    """Compose a Config from the words of a run, checked as the command line is. Raises ConfigError."""
    from kdx.compose import plan

    (point,) = plan(list(overrides or []), config_dir).points
    point.config._words = point.words
    return point.config


def main() -> None:
    """Run `python -m kdx …`. Exits with the codes of errors.py."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and kdx prints one line
    code = guarded(lambda: _main(sys.argv[1:]))
    if code and num_processes() > 1:
        print(f"kdx: exit code {code}, whatever the launcher reports", file=sys.stderr, flush=True)
    elif (torch := sys.modules.get("torch")) and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads must not outlive the interpreter
    sys.exit(code)


def _main(argv: list[str]) -> int:
    """Show something, do one run or a sweep, or what a command says. Raises KdxError."""
    name = argv[0] if argv else ""
    is_help = name == "help" or bool({"--help", "-h"} & {*argv})
    if name == "--version":
        print(f"kdx {__version__}")
        return 0
    if name == "compare":
        from kdx.compare.read import main as compare

        return compare(argv[1:])
    if name == "evaluate":
        from kdx.evaluate_command import main as evaluate

        return evaluate(argv[1:])
    if name == "store" and argv[1:2] != ["fill"] and not is_help:
        from kdx.store_commands import manage

        return manage(argv[1:])
    words = argv[{"help": 1, "check": 1, "generate": 1, "store": 2}.get(name, 0) :]
    if name == "generate" and "rollout=teacher" not in words:
        words.insert(0, "rollout=teacher")
    args = _parsed(words, needs_out=name == "generate" and not is_help)
    if is_help:
        groups = [f"{group}: {', '.join(options)}" for group, options in groups_in(args.config_dir).items()]
        print(HELP.format(groups="\n".join(groups)))
        return 0
    if args.hydra_help or args.info or args.shell_completion or (args.cfg and (args.cfg != "job" or args.package)):
        return run_hydra(argv)
    plan = _planned(args)
    point, argv = plan.points[0], plan.command or argv
    if args.cfg:
        import yaml

        print(yaml.safe_dump(redact(point.config.model_dump()), sort_keys=False, allow_unicode=True), end="")
    elif name == "check":
        from kdx.check import check_points

        check_points(plan)
    elif name == "generate":
        from kdx.rollout import write_answers

        write_answers(point.config, args.out)
    elif name == "store":
        from kdx.store_commands import fill

        fill([point.config for point in plan.points])
    else:
        from kdx import sweep
        from kdx.run.folder import Record

        if plan.jobs or plan.hydra:
            return sweep.run(plan, argv)
        sweep.start_run(point.config, Record(point.words, plan.swept, point.sources, argv), plan.folder)
    return 0


def run_hydra(words: list[str], job: Callable[[Any], Any] = bool) -> int:
    """Run Hydra's own command line on these words → the exit code. Raises ConfigError."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    sys.argv = [sys.argv[0], *words]
    try:
        hydra.main(config_path="pkg://kdx.conf", config_name="config", version_base="1.3")(job)()
    except RuntimeError as error:  # submitit's
        if "Could not detect" in str(error):
            raise MachineError("hydra/launcher", "slurm needs srun", "Run it on a node of a Slurm cluster") from None
        if type(error).__name__ != "UncompletedJobError":
            raise
        killed = " ".join(str(error).splitlines()[:2])  # its log follows
        print(f"kdx: error: hydra/launcher: {killed}", file=sys.stderr)
        return 5
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError("hydra", one_line(error), "See python -m kdx --hydra-help") from None
    return 0


def _planned(args: argparse.Namespace) -> "Plan":
    """Compose everything that a command line asks for. Raises ConfigError."""
    from kdx.compose import alike, command_of, plan, resumed

    words, config_dir = args.overrides, args.config_dir
    asked = {key_of(word): word.partition("=")[2].strip("'\"") for word in words}
    resume, like = (asked.get(key, "null") for key in ("run.resume", "run.like"))
    if resume != "null":
        if other := "run.like" if like != "null" else "-m" if args.multirun else "":
            raise ConfigError("run.resume", f"resumes one run, and {other} is given too", f"Leave out {other}")
        return resumed(resume, words, config_dir)
    if like == "null":
        return plan(words, config_dir, args.multirun)
    words = alike(like, words)
    config_dir = config_dir or _parsed(command_of(Path(like))).config_dir
    made = plan(words, config_dir, args.multirun)
    made.command = [*made.flags, *["-m"] * args.multirun, *words]
    return made


def _parsed(argv: list[str], *, needs_out: bool = False) -> argparse.Namespace:
    """Read Hydra's flags, and --out FILE, anywhere among the words. Raises ConfigError."""
    from hydra._internal.utils import get_args_parser

    parser = Parser("kdx", parents=[get_args_parser()], add_help=False)
    if needs_out:
        parser.add_argument("--out", type=Path, required=True)
    args, unknown = parser.parse_known_intermixed_args(argv)
    args.overrides = [*unknown, *args.overrides]  # refused together with all else that cannot be read
    if args.config_path or args.config_name:
        parser.error("kdx has a config.yaml of its own; add options of yours with --config-dir FOLDER")
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
        if not known:
            traceback.print_exc()
            print("kdx: unless your own code raised this, it is a bug in kdx; please report it", file=sys.stderr)
            return 1
        for line in known.lines:
            print(f"kdx: error: {printable(redact(line))}", file=sys.stderr, flush=True)
        return known.exit_code
