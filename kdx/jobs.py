"""The jobs of a sweep, in whatever process they run: in which order, how many at once, and what became of them."""

import json
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from kdx.compose import Plan
from kdx.errors import InUseError, KdxError, MachineError, printable
from kdx.run import signals
from kdx.run.devices import num_at_once, share_cores
from kdx.run.files import local_time, read_json, write_beside
from kdx.run.redact import redact
from kdx.stale import newest


class Notes:
    """What the command of a sweep and its jobs, in whatever processes, tell one another: files of this command's own.

    They lie in the sweep's folder, from the first note to the end of the command.
    """

    def __init__(self, sweep_dir: Path) -> None:
        self.folder = sweep_dir.absolute() / f".notes-{secrets.token_hex(4)}"
        self.signal: int | None = None

    def stop(self, number: int) -> None:
        """Have no further job begin, because of a signal."""
        self.signal = number  # should the disk be full
        with suppress(OSError):
            write_beside(self.folder / "stop.json", json.dumps({"signal": number}))

    @property
    def stopped_by(self) -> int | None:
        """The signal after which no further job begins, if there was one."""
        return self.signal or read_json(self.folder / "stop.json").get("signal")

    def keeping(self, folder: Path, job: Callable[[], int]) -> int:
        """Do a job; if it fails, say why here: its own folder may be done, or another's, and is not touched then."""
        name = os.path.relpath(folder, self.folder.parent)
        try:
            return job()
        except Exception as error:
            reason = str(error) if isinstance(error, KdxError) else f"{type(error).__name__}: {error}"
            is_anothers = isinstance(error, InUseError)  # who may yet do it
            note = {"job": name, "reason": redact(" ".join(reason.split())), "is_anothers": is_anothers}
            with suppress(OSError):
                write_beside(self.folder / f"failed-{secrets.token_hex(4)}.json", json.dumps(note))
            raise

    def failures(self) -> dict[str, dict[str, Any]]:
        """Why jobs failed, by their names."""
        notes = map(read_json, self.folder.glob("failed-*"))
        return {note["job"]: note for note in notes if note}

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


Launch = Callable[[list[str], Collection[str], Notes], None]


def run(plan: Plan, parts: list[list[str]], launch: Launch, compare: Callable[[Path], None]) -> int:
    """Run the baselines and the points of a sweep, and compare them → the exit code. Raises KdxError.

    launch: has Hydra run the sweep of one part's words but for the jobs of these names.
    """
    assert plan.sweep_dir
    share_cores(num_at_once(plan.launcher, max(plan.num_points, plan.num_baselines)))
    with _heeding(plan.sweep_dir, plan.launcher) as notes:
        trouble = _launch_all(plan, parts, launch, notes)
        if os.environ.get("RANK", "0") != "0":
            return 0
        if plan.sweep_dir.is_dir() and not notes.stopped_by:
            compare(plan.sweep_dir)
        if notes.stopped_by:
            signals.tell("kdx: stopped; the same command goes on")
            return 128 + notes.stopped_by
        found = states(plan.sweep_dir, plan.jobs)
        for name, note in notes.failures().items():
            known = ("failed", "diverged", "done") if note["is_anothers"] else ("failed", "diverged")
            if _status(newest(plan.sweep_dir / name))["state"] not in known:
                found[plan.sweep_dir / name] = {"state": "failed", "reason": note["reason"]}
    left = {f: s for f, s in found.items() if s["state"] != "done"}
    if left:
        told = [
            printable(": ".join(filter(None, (str(newest(f)), s["state"], s.get("reason"))))) for f, s in left.items()
        ]
        print(f"kdx: {len(left)} job(s) of the sweep failed:", *told, sep="\n  ", file=sys.stderr)
    if trouble:
        raise trouble
    return 5 if left else 0


def _launch_all(plan: Plan, parts: list[list[str]], launch: Launch, notes: Notes) -> MachineError | None:
    """Have Hydra run all jobs, unless a signal stops them → what the launcher failed at. Raises KdxError."""
    assert plan.sweep_dir
    before = states(plan.sweep_dir, plan.jobs) if plan.jobs else {}
    # What was never tried comes first; then what was cut off, since it may be what ended the whole process, as the
    # kernel does where memory is short; what failed comes last.
    failed, cut_off = (
        {folder.name for folder, status in before.items() if status["state"] in kinds}
        for kinds in (("failed", "diverged"), ("running",))
    )
    turns = [turn for turn in ({*plan.jobs} - failed - cut_off, cut_off, failed) if turn]
    is_basic = not is_parallel(plan.launcher)  # others start all, or many, at once
    try:
        for passed_over in [{*plan.jobs} - turn for turn in turns] if turns and is_basic else [()]:
            for words in parts:
                if not notes.stopped_by:
                    launch(words, passed_over, notes)
    except (KdxError, HydraException, OmegaConfBaseException):
        raise
    except Exception as error:  # no job raises: a process of the launcher died, or it could start none
        if is_basic:
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")
        mend = "Jobs that it started may still be running; the same command goes on with what is left"
        return MachineError("hydra/launcher", what, mend)
    return None


def is_parallel(launcher: Any) -> bool:
    """Whether the jobs of a Hydra launcher run in processes of their own."""
    return not str(launcher.get("_target_")).endswith(".BasicLauncher")


def is_joblib(launcher: Any) -> bool:
    """Whether a Hydra launcher is joblib's, which kills all its processes when one of them ends of itself."""
    return str(launcher.get("_target_")).endswith(".JoblibLauncher")


@contextmanager
def _heeding(sweep_dir: Path, launcher: Any) -> Iterator[Notes]:
    """Under joblib, have a signal end all jobs at a safe point, whoever got it; twice: at once → notes, removed after.

    One job at a time is done in this process, and heeds signals as any run does.
    """
    notes = Notes(sweep_dir)
    told: list[float] = []  # when

    def heed(number: int) -> None:
        if told and signals.is_same(told[0]):
            return
        if told:
            signals.hand_on(signal.SIGKILL)
            notes.remove()
            os._exit(128 + number)
        told.append(time.monotonic())
        notes.stop(number)
        signals.hand_on(number)
        signals.tell("\nkdx: stopping all jobs at a safe point; once more to stop at once")

    try:
        with signals.held_back(heed) if is_joblib(launcher) and num_at_once(launcher, 2) > 1 else nullcontext():
            yield notes
    finally:
        notes.remove()


def states(sweep_dir: Path, names: list[str]) -> dict[Path, dict[str, Any]]:
    """What the jobs of a sweep say of themselves; without names, all that are there."""
    folders = [sweep_dir / name for name in names] or sorted(file.parent for file in sweep_dir.rglob("status.json"))
    return {folder: _status(newest(folder)) for folder in folders}


def is_done(folder: Path) -> bool:
    """Whether a job is done already."""
    return bool(_status(folder)["state"] == "done")


def _status(folder: Path) -> dict[str, Any]:
    status = read_json(folder / "status.json")
    return {"state": "unknown"} | status if status else {"state": "not begun"}


def note_failure(folder: Path, reason: str) -> None:
    """Write down why a job failed that did not get as far as keeping its own status."""
    if _status(folder)["state"] in ("not begun", "failed"):
        status = {
            "state": "failed",
            "reason": redact(reason),
            "step": 0,
            "updated": local_time(),
        }
        write_beside(folder / "status.json", json.dumps(status, indent=2) + "\n")
