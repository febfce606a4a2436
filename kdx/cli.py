"""The command line: words → run, sweep, check, store, compare, evaluate; exit codes. Torch is imported when a run starts."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdx import plugins
from kdx.errors import ConfigError, MachineError, one_line, printable, user_error
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
python -m kdx check [-m] KEY=VALUE ...           what such a run, or each point of a sweep, would be: data, memory, time
python -m kdx store fill KEY=VALUE ...           run the teacher over all rows, so that the runs need not
python -m kdx store stat | verify | prune        its cache ($KDX_STORE, else outputs/teacher-store): list, compare
                                                 checksums, drop what is damaged; prune --unused-days N, old teachers too
python -m kdx generate KEY=VALUE ... --out FILE  write the teacher's answers to the training prompts, as data=messages
python -m kdx compare PATH ...                   rank runs and sweeps: a table and a page
python -m kdx evaluate PATH ... --on-policy      KL on their own answers, of runs that are done; --tasks A,B: scores by lm_eval
python -m kdx run.resume=FOLDER                  resume a run; run.like=FOLDER starts a new one from its words

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
    if name == "--version":
        print(f"kdx {__version__}")
        return 0
    if name == "compare":
        from kdx.compare.read import main as compare

        return compare(argv[1:])
    if name == "evaluate":
        from kdx.evaluate_command import main as evaluate

        return evaluate(argv[1:])
    is_help = name == "help" or bool({"--help", "-h"} & {*argv})
    if name == "store" and argv[1:2] != ["fill"] and not is_help:
        from kdx.store_commands import manage

        return manage(argv[1:])
    words = argv[{"help": 1, "check": 1, "generate": 1, "store": 2}.get(name, 0) :]
    if words and words[0] == name and "=" not in name and name[:1] not in "+~-":
        raise ConfigError(name, "is not a command", "A run is started by python -m kdx KEY=VALUE ...; see --help")
    if name == "generate" and "rollout=teacher" not in words:
        words.insert(0, "rollout=teacher")
    args = _parsed(words, *["--out"] * (name == "generate"))
    if is_help:
        groups = [f"{group}: {', '.join(options)}" for group, options in groups_in(args.config_dir).items()]
        print(HELP.format(groups="\n".join(groups)))
        return 0
    if args.hydra_help or args.info or args.shell_completion or (args.cfg and (args.cfg != "job" or args.package)):
        run_hydra(argv)
        return 0
    if name == "generate" and not args.out:
        raise ConfigError("--out", "is missing", "Name the file to write: --out answers.jsonl")
    plan = _planned(args)
    if args.cfg:
        import yaml

        from kdx.config import as_dict

        print(yaml.safe_dump(redact(as_dict(plan.points[0].config)), sort_keys=False, allow_unicode=True), end="")
        return 0
    if name == "check":
        return _check(plan)
    if name == "generate":
        from kdx.rollout import write_answers

        write_answers(plan.points[0].config, Path(args.out))
        return 0
    if name == "store":
        from kdx.store_commands import fill

        fill([point.config for point in plan.points])
        return 0
    from kdx import sweep
    from kdx.run.folder import Record

    argv = plan.command or argv
    if plan.is_sweep:
        return sweep.run(plan, argv)
    (point,) = plan.points
    sweep.start_run(point.config, Record(point.words, [], point.sources, argv), plan.folder)
    return 0


def _check(plan: "Plan") -> int:
    from kdx.check import check
    from kdx.run.folder import Record
    from kdx.run.identity import canonical, config_identity

    groups: dict[str, list[Any]] = {}
    for point in plan.points:  # the loss changes neither data nor time, and memory little, but for having a teacher
        same = {k: v for k, v in config_identity(point.config).items() if not k.startswith("loss.")}
        groups.setdefault(canonical([same, point.config.loss.alpha > 0]), []).append(point)
    is_loss_swept, rows = plan.is_sweep and any(key.split(".")[0] == "loss" for key in plan.swept), []
    for points in groups.values():
        first = points[0]
        print("", *(word for word in first.words if key_of(word) in plan.swept), flush=True)
        taught = [(p.config, p.words) for p in points if is_loss_swept and p.config.loss.alpha > 0]
        rows += check(first.config, plan.folder, Record(first.words, plan.swept, first.sources), taught)
    if rows:
        from kdx import weigh

        alphas = sorted({point.config.loss.alpha for point in plan.points} - {0.0})
        weigh.show(rows, alphas, Path("outputs/check") / str(plan.points[0].config.sweep.name))
    return 0


def run_hydra(words: list[str], job: Callable[[Any], Any] = bool) -> None:
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
    from kdx.compose import alike, plan, resumed

    words, config_dir = args.overrides, args.config_dir
    asked = {key_of(word): word.partition("=")[2].strip("'\"") for word in words}
    resume, like = (asked.get(key, "null") for key in ("run.resume", "run.like"))
    if resume != "null":
        if other := "run.like" if like != "null" else "-m" if args.multirun else "":
            raise ConfigError("run.resume", f"resumes one run, and {other} is given too", f"Leave out {other}")
        return resumed(resume, words, config_dir)
    if like == "null":
        return plan(words, config_dir, args.multirun)
    words, of_run = alike(like, words)
    config_dir = config_dir or of_run
    made = plan(words, config_dir, args.multirun)
    flags = [f"--config-dir={Path(config_dir).resolve()}"] if config_dir else []
    made.command = [*flags, *["-m"] * args.multirun, *words]
    return made


def _parsed(argv: list[str], *own: str) -> argparse.Namespace:
    """Read Hydra's flags, and a command's own, anywhere among the words. Raises ConfigError."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    for flag in own:
        parser.add_argument(flag)

    def refuse(message: str) -> None:
        raise ConfigError("command line", message, "Flags are listed by python -m kdx --hydra-help")

    parser.error = refuse  # type: ignore[method-assign, assignment]
    args, unknown = parser.parse_known_intermixed_args(argv)
    args.overrides = [*unknown, *args.overrides]  # refused together with all else that cannot be read
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
        if not known:
            return _bug()
        for line in known.lines:
            print(f"kdx: error: {printable(redact(line))}", file=sys.stderr, flush=True)
        return known.exit_code


def _bug() -> int:
    """Print a traceback, and whether it is the user's own loss or source that raised."""
    traceback.print_exc()
    *_, last = traceback.extract_tb(sys.exc_info()[2])
    where = "this is a bug in kdx; please report it with the lines above"
    if Path(last.filename) in plugins.files():
        where = f"raised in your own code, {last.filename}:{last.lineno}"
    print(f"kdx: {where}", file=sys.stderr)
    return 1
