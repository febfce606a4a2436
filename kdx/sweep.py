"""A sweep: its points and their names, and how processes that typed the same command share its jobs.

A job's lock is the queue. Every process goes through the points once and does those that are neither done nor held.
"""

import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override

from kdx import plugins
from kdx.config import Config, leaves, short_key
from kdx.errors import ConfigError, InUseError, KdxError, did_you_mean, one_line, printable
from kdx.run.claim import claim, holder
from kdx.run.devices import num_cores, take_gpu
from kdx.run.folder import Record, RunFolder
from kdx.run.identity import FREE, config_identity, digest, used
from kdx.run.signals import STOPS, is_main, num_processes
from kdx.words import groups_in

if TYPE_CHECKING:
    from kdx.compose import Plan

MAX_LETTERS = 60  # of a value in a folder's name; the hash tells long ones apart
STARTED = "KDX_SWEEP_STARTED"  # in the environment of a worker: when its command started


def points(words: list[Override]) -> tuple[list[list[str]], list[str]]:
    """Return every combination of the swept values as the words of a single run, and the keys with several values.

    Of a key typed twice the last word counts, of an interval its two ends.
    """
    values: dict[str, list[str]] = {}
    for word in words:
        key = word.get_key_element()
        if isinstance(interval := word.value(), IntervalSweep):
            values[key] = [f"{key}={interval.start}", f"{key}={interval.end}"]
        elif word.is_sweep_override():
            values[key] = [f"{key}={value}" for value in word.sweep_string_iterator()]
        else:
            values[key] = [str(word.input_line)]
    swept = [key.lstrip("+~") for key, some in values.items() if len(some) > 1]
    return [list(point) for point in itertools.product(*values.values())], swept


def sweep_name(keys: list[str], typed: Collection[str], configs: list[Config]) -> str:
    """Name a sweep by its keys and a hash of what its points have in common, the same on any day.

    Of a swept group only what was typed counts: its options differ in the rest.
    """
    flats = [config_identity(config) for config in configs]
    known = [key for flat in flats for key in flat]
    common = {k: v for flat in flats for k, v in flat.items() if all(other.get(k, v) == v for other in flats)}
    common = {k: v for k, v in common.items() if k not in keys and (k in typed or k.split(".")[0] not in keys)}
    return "-".join([*(_safe(short_key(key, known)) for key in keys), digest(common)])


def job_name(keys: list[str], words: list[str], config: Config) -> str:
    """Name a job by its point and a hash of its config: temperature-2_alpha-0.7_1a2b3c."""
    typed = dict(word.lstrip("+").split("=", 1) for word in words if "=" in word)
    flat, is_baseline = leaves(config.model_dump()), config.loss.alpha == 0
    decides = used(flat)
    known = [*decides, *keys]  # a key that decides nothing here makes no other key's name longer
    parts = ["baseline"] if is_baseline and "loss.alpha" not in keys else []
    for key in keys:
        is_group = key not in flat and not (is_baseline and key.startswith("loss"))
        if is_group or key in decides or key.startswith(FREE):  # no key of a group that is off
            value = flat.get(key, typed.get(key))
            value = int(value) if isinstance(value, float) and value.is_integer() else value
            parts.append(f"{short_key(key, known)}-{_safe(str(value))}")
    return "_".join([*parts, digest(config_identity(config))])


def _safe(text: str) -> str:
    """Return a text as part of a folder's name: letters, digits, . and -."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text)[:MAX_LETTERS].strip("-.") or "x"


_failed: set[Path] = set()  # folders of jobs that failed in this process


def run(plan: "Plan", argv: list[str]) -> int:
    """Do what is left of a sweep, in `sweep.workers` processes, and compare → the exit code. Raises ConfigError.

    argv: what was typed; the workers run it too, and share the time at which the command started.
    """
    _failed.clear()
    unknown = {point.config.loss.name for point in plan.points} - {*(known := groups_in()["loss"])}
    if unknown and not plugins.modules():  # before the baseline is trained, and without torch
        name, hint = min(unknown), "Your own: KDX_PLUGINS=module"
        raise ConfigError("loss.name", f"no divergence is named {name!r}", f"{did_you_mean(name, known)}. {hint}")
    since, code, is_worker = float(os.environ.get(STARTED) or time.time()), 0, STARTED in os.environ
    workers, num_baselines = plan.points[0].config.sweep.workers, len(plan.jobs) - len(plan.points)
    if num_baselines > 0 and is_main() and not is_worker:
        baselines = f"{num_baselines} baseline{'s' if num_baselines > 1 else ''} (alpha=0)"
        print(f"kdx: {len(plan.points)} points + {baselines}; sweep.baseline=false for none", flush=True)
    if workers > 1 and not is_worker:
        if plan.hydra or num_processes() > 1:
            what = f"is {workers}, which cannot be combined with torchrun, or with another sweeper or launcher"
            raise ConfigError("sweep.workers", what, "Leave it out")
        code = _run_workers(min(workers, len(plan.jobs)), argv, since)
        if code not in (0, 5):
            return code
    elif plan.hydra:
        from kdx.cli import run_hydra

        words, record = [point.words for point in plan.jobs.values()], Record([], plan.swept, {}, argv)
        code = run_hydra(plan.hydra, partial(_hydras_job, words, plan.config_dir, record, since))
    else:
        if is_worker:
            take_gpu(is_own=True)
        for folder, point in plan.jobs.items():
            do_job(point.config, Record(point.words, plan.swept, point.sources, argv), folder, since=since)
    if not is_worker and is_main():  # the parent, or rank 0, reports
        _report(plan, since)
    return 5 if _failed else code


def _hydras_job(jobs: list[list[str]], config_dir: str | None, record: Record, since: float, cfg: Any) -> float:
    """Do one job in whatever process Hydra's launcher runs it → the measure that its sweeper compares.

    jobs: the words of all jobs, of which cfg has the number; empty if the sweeper chooses the words as it goes.
    """
    from hydra.core.hydra_config import HydraConfig

    from kdx.compose import composer_for

    hydra = HydraConfig.get()
    point = composer_for(config_dir).point(jobs[cfg.kdx_job] if jobs else list(hydra.overrides.task))
    folder = Path(hydra.sweep.dir) / job_name(record.swept, point.words, point.config)
    record = replace(record, words=point.words, sources=point.sources)
    if not str(hydra.launcher.get("_target_")).endswith((".BasicLauncher", ".SlurmLauncher")):
        take_gpu(is_own=True)  # other jobs run here at the same time; Slurm gives each job its own GPUs
    return do_job(point.config, record, folder, since=since, is_shared=bool(jobs))


def do_job(config: Config, record: Record, folder: Path, *, since: float, is_shared: bool = True) -> float:
    """Do one job of a sweep → its measure; infinity if it failed or was passed over. Exits after a signal.

    A job is passed over if it is done, held by another process, or failed since the command started. One that fails
    does not stop the others.

    is_shared: whether jobs may be passed over; a sweeper that chooses points by their measures needs every one.
    """
    from kdx.cli import guarded

    measure = math.inf

    def work() -> int:
        nonlocal measure
        with ExitStack() as held:
            reason = _agreed(lambda: _claim(config, folder, since, held)) if is_shared else ""
            if is_main():
                print(f"kdx: {os.path.relpath(folder)}{reason and f': {reason}'}", flush=True)
            if not reason:
                measure = start_run(config, record, folder)
        if not reason and is_main():
            _compare(folder.parent)
        return 0

    code = guarded(work, folder)
    # A signal, submitit's requeue (-1), or an error for which the other ranks would wait.
    if not 0 <= code <= 128 or (code and num_processes() > 1):
        if code > 128 and is_main():
            print("kdx: for the whole sweep, run the same command again", file=sys.stderr, flush=True)
        sys.exit(code)
    if code:
        _failed.add(folder)
    return measure


def start_run(config: Config, record: Record, folder: Path) -> float:
    """Start or resume one run → the measure that a sweep compares. Raises KdxError, Stopped. Imports torch."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of other libraries; read when they are imported
    take_gpu(is_own=False)  # unless this process has taken one
    from kdx.distill import distill

    return distill(config, folder, record).measure


def _standing(folder: Path, config: Config | None, since: float) -> tuple[str, str]:
    """Return the state of a job (done, failed by this command, or left) and the reason. Raises ConfigError."""
    run = RunFolder(folder)
    status = run.kept("status.json")
    state, reason = status.get("state", "not started"), status.get("reason", "see its error above")
    if state == "done" and (config is None or run.is_done(config)):
        return "done", "already done"
    is_new = state in ("failed", "diverged") and (folder / "status.json").stat().st_mtime >= since
    if is_new or folder in _failed:
        return "failed", f"{state}: {reason}"
    return "left", "was killed" if state == "running" else state


def _claim(config: Config, folder: Path, since: float, held: ExitStack) -> str:
    """Claim a job, or say why it is not to be done now. Raises ConfigError if the folder has another run."""
    what, why = _standing(folder, config, since)
    if what != "left":
        return why
    try:
        held.enter_context(claim(folder))
    except InUseError as error:
        return f"{error.args[1]}, skipped"
    what, why = _standing(folder, config, since)  # again: another process may have done the job a moment ago
    return "" if what == "left" else why


def _agreed(decide: Callable[[], str]) -> str:
    """Decide in rank 0 and return that in every rank."""
    if num_processes() == 1:
        return decide()
    from kdx.run.launch import agreed

    return agreed(decide)


def _run_workers(number: int, argv: Sequence[str], since: float) -> int:
    """Run the same command in several processes and forward signals to them → the worst exit code."""
    environment = {"OMP_NUM_THREADS": str(max(1, num_cores() // number))} | os.environ
    environment |= {STARTED: repr(since), "TTY_COMPATIBLE": "0"}  # lines, not bars: they share a terminal
    command = [sys.executable, "-m", "kdx", *argv]
    workers = [subprocess.Popen(command, env=environment) for _ in range(number)]

    def forward(number: int, _: Any) -> None:
        for worker in workers:
            worker.send_signal(number)

    before = {n: signal.signal(n, forward) for n in STOPS if signal.getsignal(n) != signal.SIG_IGN}
    codes = [worker.wait() for worker in workers]
    for signum, handler in before.items():
        signal.signal(signum, handler)
    return max(128 - code if code < 0 else code for code in codes)


def _report(plan: "Plan", since: float) -> None:
    """Say what failed, what others hold and what is left; if nothing is, compare."""
    found: dict[str, list[str]] = {"failed": [], "held by other processes": [], "left": [], "done": []}
    known = [*plan.jobs] or sorted(file.parent for file in plan.folder.glob("*/status.json"))
    for path in known:
        try:
            what, why = _standing(path, plan.jobs[path].config if plan.jobs else None, since)
        except KdxError as error:
            what, why = "failed", str(error).splitlines()[0].removeprefix(f"{path}: ")
        if what == "left" and (owner := holder(path)):
            what, why = "held by other processes", f"in use by {owner}"
        found[what].append(f"  {os.path.relpath(path)}  {printable(why)}")
        _failed.update([path] if what == "failed" else [])
    if not found["held by other processes"] + found["left"]:
        with suppress(InUseError), claim(plan.folder):  # of several processes that share a sweep one compares
            mark, jobs = plan.folder / ".compared", plan.folder.glob("*/status.json")
            if mark.exists() and mark.stat().st_mtime >= max([since, *(file.stat().st_mtime for file in jobs)]):
                print(f"kdx: no job is left; another process has just compared them all in {plan.folder}", flush=True)
            else:
                started = time.time()
                _compare(plan.folder, is_last=True)
                mark.touch()
                os.utime(mark, (started, started))  # a job that ended meanwhile is compared again
    for what, rows in found.items():
        if rows and what != "done":
            print(f"kdx: {len(rows)} of {len(known)} jobs {what}:", *rows, sep="\n", file=sys.stderr)
    if found["left"]:
        print("kdx: run the same command again to finish the remaining jobs", file=sys.stderr)


def _compare(folder: Path, *, is_last: bool = False) -> None:
    """Write the page of the sweep so far; at its end print it, and put it into W&B."""
    from kdx.compare import read

    try:
        if not is_last:
            read.compare([folder], folder)
            return
        comparison = read.show([folder], folder)
        from kdx.compare.wandb_run import publish

        if line := publish(comparison, folder):
            print(f"kdx: {line}", flush=True)
    except Exception as error:  # it must not end the sweep
        print(f"kdx: no comparison of {folder}: {one_line(error)}", file=sys.stderr)
