"""The jobs of a sweep, in whatever process they run: in which order, how many at once, and what became of them."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import active_children
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from kdx.composition import Plan
from kdx.devices import num_at_once, share_cores
from kdx.durable import write_beside
from kdx.errors import KdxError, MachineError, printable
from kdx.redact import redact
from kdx.stale import newest

STOPPING = ".stopping"  # a file in a sweep's folder: jobs that have not begun shall not


def run(
    plan: Plan,
    parts: list[list[str]],
    launch: Callable[[list[str], Collection[str]], None],
    compare: Callable[[Path], None],
) -> int:
    """Run the baselines and the points of a sweep, and compare them → the exit code. Raises KdxError.

    launch: has Hydra run the sweep of one part's words but for the jobs of these names.
    """
    assert plan.sweep_dir
    share_cores(num_at_once(plan.launcher, max(plan.num_points, plan.num_baselines)))
    before = states(plan.sweep_dir, plan.jobs) if plan.jobs else {}
    again = {folder.name for folder, status in before.items() if status["state"] in ("failed", "diverged")}
    is_basic = not is_parallel(plan.launcher)  # others start all, or many, at once
    trouble = None
    try:
        with _forwarding(plan.sweep_dir, plan.launcher):
            # What failed comes last.
            for passed_over in [again, set(plan.jobs) - again] if again and is_basic else [()]:
                for words in parts:
                    launch(words, passed_over)
                    if is_stopping(plan.sweep_dir):
                        print("kdx: stopped; the same command goes on", file=sys.stderr, flush=True)
                        return 128 + signal.SIGTERM
    except (KdxError, HydraException, OmegaConfBaseException):
        raise
    except Exception as error:  # no job raises: a process of the launcher died, or it could start none
        if is_basic:
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")
        mend = "Jobs that it started may still be running; the same command goes on with what is left"
        trouble = MachineError("hydra/launcher", what, mend)
    if os.environ.get("RANK", "0") != "0":
        return 0
    if plan.sweep_dir.is_dir():
        compare(plan.sweep_dir)
    left = {f: s for f, s in states(plan.sweep_dir, plan.jobs).items() if s["state"] != "done"}
    if left:
        told = [
            printable(": ".join(filter(None, (str(newest(f)), s["state"], s.get("reason"))))) for f, s in left.items()
        ]
        print(f"kdx: {len(left)} job(s) of the sweep failed:", *told, sep="\n  ", file=sys.stderr)
    if trouble:
        raise trouble
    return 5 if left else 0


def is_parallel(launcher: Any) -> bool:
    """Whether the jobs of a Hydra launcher run in processes of their own."""
    return not str(launcher.get("_target_")).endswith(".BasicLauncher")


@contextmanager
def _forwarding(sweep_dir: Path, launcher: Any) -> Iterator[None]:
    """Under joblib, hand SIGTERM on to the jobs that run, which finish their step and save; twice: stop at once.

    Nobody else would tell them, and joblib kills all its processes when one of them ends of itself.
    """
    mark, over, told = sweep_dir / STOPPING, threading.Event(), set()
    mark.unlink(missing_ok=True)
    if not str(launcher.get("_target_")).endswith(".JoblibLauncher"):
        yield
        return

    def tell() -> None:
        while not over.wait(0.1):  # again and again: a job may be about to begin
            own = {process.pid for process in active_children()}
            for status in states(sweep_dir, []).values():
                pid = (status.get("owner") or {}).get("pid")
                if status["state"] == "running" and pid is not None and pid in own and pid not in told:
                    told.add(pid)
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sweep_dir.mkdir(parents=True, exist_ok=True)
        mark.touch()
        threading.Thread(target=tell, daemon=True).start()
        print("\nkdx: stopping all jobs at a safe point; once more to stop at once", file=sys.stderr, flush=True)

    found = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        over.set()
        signal.signal(signal.SIGTERM, found)
        mark.unlink(missing_ok=True)


def is_stopping(sweep_dir: Path) -> bool:
    """Whether the command that started a sweep's jobs in other processes was told to stop."""
    return (sweep_dir / STOPPING).exists()


def states(sweep_dir: Path, names: list[str]) -> dict[Path, dict[str, Any]]:
    """What the jobs of a sweep say of themselves; without names, all that are there."""
    folders = [sweep_dir / name for name in names] or sorted(file.parent for file in sweep_dir.rglob("status.json"))
    return {folder: _status(newest(folder)) for folder in folders}


def _status(folder: Path) -> dict[str, Any]:
    try:
        return {"state": "unknown"} | json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return {"state": "not begun"}


def note_failure(folder: Path, reason: str) -> None:
    """Write down why a job failed that did not get as far as keeping its own status."""
    if _status(folder)["state"] in ("not begun", "failed"):
        status = {
            "state": "failed",
            "reason": redact(reason),
            "step": 0,
            "updated": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_beside(folder / "status.json", json.dumps(status, indent=2) + "\n")
