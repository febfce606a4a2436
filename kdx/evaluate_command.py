"""What `kdx evaluate …` does: measure the students of runs that are done, by on-policy KL and in tasks of lm_eval."""

import argparse
import logging
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from kdx.causal_lm import attention_for, load_causal_lm
from kdx.causal_lm import load_tokenizer as load_own_tokenizer
from kdx.compare.ranking import Run
from kdx.compare.read import find, read_run, show
from kdx.compose import resumed
from kdx.config import Config, replaced
from kdx.data.encode import load_data
from kdx.errors import ConfigError, KdxError, MachineError, Parser, of_hub, one_line, together, user_error
from kdx.evaluate import Said, answered, num_prompts
from kdx.run.files import read_json, write_json, write_lines
from kdx.run.launch import build_accelerator
from kdx.run.tracking import log, logging_to, open_run, wandb_mode
from kdx.student import teach_to_stop
from kdx.teacher import Teacher, load_teacher
from kdx.tokenizer import SharedTokenizer, load_tokenizer

ANSWERS = "eval_answers.jsonl"  # a line for each measured answer of a run's student


def main(words: list[str]) -> int:
    """Run `kdx evaluate PATH… --on-policy | --tasks NAMES` → the exit code. Raises KdxError."""
    args = _parsed(words)
    typed = [word for word in args.paths if "=" in word and not Path(word).exists()]
    paths = [Path(word) for word in args.paths if word not in typed]
    with logging_to():
        asked = [(resumed(str(run.path), typed).points[0].config, run) for run in _done(paths)]
        teachers, faults = dict[str, Teacher](), []
        for config, run in sorted(asked, key=lambda pair: repr(pair[0].teacher)):  # those of one teacher together
            try:
                _evaluate(config, run, args, teachers)
            except KdxError as error:
                faults.append(error)
        show(paths, paths[0] if len(paths) == 1 else Path("comparison"))
        if faults:
            raise together(faults)
    return 0


def _parsed(words: list[str]) -> argparse.Namespace:
    parser = Parser("kdx evaluate", description="Measure the students of runs that are done.")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a run or a sweep; KEY=VALUE changes their configs")
    parser.add_argument("--on-policy", action="store_true", help="KL to the teacher on the students' own answers")
    tasks = parser.add_argument_group("lm-evaluation-harness, with its own flags")
    tasks.add_argument("--tasks", metavar="A,B", help="names of tasks or groups")
    tasks.add_argument("--limit", type=float, metavar="N", help="examples of each task; below 1, a share of them")
    tasks.add_argument("--num_fewshot", type=int, metavar="N")
    tasks.add_argument("--batch_size", default="1", metavar="N")
    tasks.add_argument("--include_path", metavar="FOLDER", help="with task files of your own")
    tasks.add_argument("--apply_chat_template", action="store_true")
    args = parser.parse_intermixed_args(words)
    if not (args.on_policy or args.tasks):
        parser.error("nothing to do: give --on-policy or --tasks A,B")
    if args.tasks and not find_spec("lm_eval"):
        raise MachineError("--tasks", "needs the package lm_eval, which is not installed", "pip install lm_eval")
    return args


def _done(paths: Sequence[Path]) -> list[Run]:
    """Find the runs that have a student to measure. Raises ConfigError if there is none."""
    runs = [read_run(name, folder) for name, folder in find(paths).items()]
    left = [run for run in runs if not (run.summary and (run.path / "student").is_dir())]
    why = [f"{run.name} is not done or has no student ({run.state}; {run.reason})" for run in left]
    if len(left) == len(runs):
        raise ConfigError("kdx evaluate", why[0], "Resume it: python -m kdx run.resume=FOLDER")
    for line in why:
        log.info("skipped: %s", line)
    return [run for run in runs if run not in left]


def _evaluate(config: Config, run: Run, args: argparse.Namespace, teachers: dict[str, Teacher]) -> None:
    """Measure the student of one run, and write what comes of it into its folder and its W&B run."""
    can = bool(config.teacher.path and config.eval.num_prompts)
    has = bool(run.answers) and all(line["on_policy_kl"] is not None for line in run.answers)
    takes_kl = args.on_policy and can and not has
    if args.on_policy and not takes_kl:
        log.info("%s: on-policy KL %s", run.name, "is known" if can else "needs a teacher, and eval.num_prompts")
    if not (takes_kl or args.tasks):
        return
    folder, machine = str(run.path / "student"), build_accelerator(config)
    saved = replaced(config.student, path=folder, tokenizer=folder, revision=None, gguf_file=None)
    shared = load_tokenizer(config) if takes_kl else None
    attention = attention_for(saved, machine.device, shared.max_length if shared else 10**9)
    how: dict[str, Any] = {"attn_implementation": attention, "device_map": machine.device}
    student: Any = load_causal_lm(saved, "student", dtype="auto", **how)  # as it was saved
    found: dict[str, dict[str, Any]] = {}
    if shared:
        said = _on_policy(config, run, student, shared, machine, teachers)
        found["student"] = said.means()
        _keep(run, "student", found["student"])
        write_lines(run.path / ANSWERS, said.rows)
        log.info("%s: on-policy KL %.4f over %d answers", run.name, found["student"]["on_policy_kl"], len(said.rows))
    if args.tasks:
        found["tasks"] = _scores(student, load_own_tokenizer(saved, "student"), args)
        _keep(run, "tasks", found["tasks"])
    _tell_wandb(config, run, found)


def _keep(run: Run, part: str, new: dict[str, Any]) -> None:
    """Add measures to a part of a run's summary.json."""
    summary = read_json(run.path / "summary.json")
    write_json(run.path / "summary.json", summary | {part: summary.get(part, {}) | new})


def _on_policy(
    config: Config, run: Run, student: Any, shared: SharedTokenizer, machine: Accelerator, teachers: dict[str, Teacher]
) -> Said:
    """Let a student answer the prompts of its run, and take its KL to the teacher there.

    teachers: the one that was loaded last. Raises KdxError; also if rows or teacher are not those of the run.
    """
    data = load_data(config.data, shared, num_prompts(config))
    prompts = data.prompts[: len(run.answers) or num_prompts(config)]
    if not prompts:
        what = "has no held-out prompts that leave room for an answer"
        raise ConfigError(str(run.path), what, "Raise data.max_length")
    if (key := repr((config.teacher, shared.max_length))) not in teachers:
        teachers.clear()  # before the next is loaded
        teachers[key] = load_teacher(config.teacher, machine.device, shared.max_length)  # type: ignore[assignment]
    teacher, identity = teachers[key], teachers[key].identity
    if [data.held_out_fingerprint, identity.teacher, identity.precision] != [*run.measured_on.values()]:
        was, now = run.measured_on["precision of the teacher"], identity.precision
        what = f"was measured on other rows, or with another teacher or precision (recorded: {was}, here: {now})"
        raise ConfigError(str(run.path), what, "Set what the run used, as in teacher.precision=fp32")
    teach_to_stop(student, shared.tokenizer, data.stops)
    return answered(student, shared, prompts, len(prompts), machine, teacher)


@cache
def _tasks(include_path: str | None) -> Any:
    """Index all tasks that there are: thousands of files, so once for all runs."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=include_path)


def _scores(student: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, float]:
    """Score a model in tasks → `task/metric`, and its standard error as `task/metric_stderr`. Raises KdxError."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    options = {name: getattr(args, name) for name in ("limit", "num_fewshot", "apply_chat_template")}
    options |= {"tasks": args.tasks.split(","), "task_manager": _tasks(args.include_path), "log_samples": False}
    try:
        found = simple_evaluate(HFLM(student, tokenizer=tokenizer, batch_size=args.batch_size), **options)
    except Exception as error:
        hint = "lm-eval ls tasks lists those there are; --include_path FOLDER adds your own"
        raise user_error(error) or of_hub(error, ConfigError, "--tasks", "lm_eval stopped", hint) from error
    how = [f"limit {args.limit:g}"] if args.limit else []
    how += [f"{args.num_fewshot}-shot"] if args.num_fewshot is not None else []
    how += ["chat template"] if args.apply_chat_template else []
    scores: dict[str, float] = {}
    parts = {part for group in found.get("groups", ()) for part in found["group_subtasks"][group]}  # of a group's mean
    for task in [task for task in found["results"] if task not in parts]:
        for name, value in found["results"][task].items():
            metric, _, choice = name.partition(",")  # as in acc,none and acc_stderr,none
            kind = metric.removesuffix("_stderr")
            key = "/".join([task, kind] if choice == "none" else [task, choice, kind])
            key += f" ({', '.join(how)})" if how else ""
            if isinstance(value, float):
                scores[key + metric.removeprefix(kind)] = value
    return scores


def _tell_wandb(config: Config, run: Run, found: dict[str, dict[str, Any]]) -> None:
    """Add measures to the summary of the run's W&B run, if it has one. Trouble with W&B is a warning."""
    file, tracking = run.path / "wandb_id.txt", config.tracking
    try:
        mode = wandb_mode(tracking.mode)
        if mode == "disabled" or not file.is_file():
            return
        id = file.read_text().strip()
        kept = run.path.parent.glob(f"wandb/*run-*-{id}/files/wandb-summary.json")
        values = read_json(max(kept, key=lambda file: file.stat().st_mtime, default=Path()))
        values = {name: value for name, value in values.items() if name[0] != "_"}  # `wandb sync` would else lose them
        for part, new in found.items():
            kind = "eval" if part == "student" else part
            values |= {f"{kind}/{name}": value for name, value in new.items() if value is not None}
        with open_run(mode, run.path.parent, id, project=tracking.project, entity=tracking.entity) as there:
            there.define_metric("tokens", hidden=True)  # again, as in a run that is resumed
            there.define_metric("*", step_metric="tokens")
            there.summary.update(values)
    except Exception as error:
        log.warning("could not send the measures of %s to W&B: %s", run.name, one_line(error))
