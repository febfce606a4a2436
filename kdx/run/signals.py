"""SIGTERM, SIGINT and SIGHUP: who heeds them, and when, so that nothing is lost. The door imports this: torch comes late.

They reach one process or, from Ctrl-C, Slurm or a container, all of a command at once. A run heeds them at a safe
point (`StopRequest`). Of joblib's processes none may end of itself, since joblib then kills the others: they are born
with both signals held back (`held_back`), and note them from their first job on (`note`) where no run heeds them.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import active_children, resource_tracker
from pathlib import Path
from typing import Any

from kdx.errors import MachineError

log = logging.getLogger("kdx")
STOPS = (signal.SIGTERM, signal.SIGINT)
HANGUPS = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()  # the terminal was closed; Windows says no such thing
SAME = 0.25  # seconds

_noted: list[int] = []
_mask = threading.local()  # what was held back before a thread forked


@contextmanager
def held_back(heed: Callable[[int], None]) -> Iterator[None]:
    """Have processes that are started meanwhile be born with the signals held back; `heed` is for this process."""
    resource_tracker.ensure_running()  # when it starts it lets the signals through again
    found = {number: signal.signal(number, lambda number, _: heed(number)) for number in STOPS}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    over = threading.Event()
    # One thread takes them in; Python's handler runs in the main thread all the same.
    receiver = threading.Thread(target=lambda: (signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS), over.wait()))
    receiver.start()
    try:
        yield
    finally:
        over.set()
        receiver.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in found.items():
            signal.signal(number, handler)


def note() -> None:
    """Where the signals are held back, let them through and note them: what is started here must be able to end by them."""
    if not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {*STOPS}:
        return
    for number in STOPS:
        signal.signal(number, _note)
    # An executed program forgets handlers by itself; one that is forked must, before a signal finds it.
    os.register_at_fork(before=_hold_back, after_in_parent=_as_before, after_in_child=_forget)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def _note(number: int, _: Any) -> None:
    _noted.append(number)


def _hold_back() -> None:
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)


def _as_before() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _forget() -> None:
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)
    _as_before()


def is_same(since: float) -> bool:
    """Whether a signal is still the first, of that time: `timeout` tells a command, and then all its group."""
    return time.monotonic() - since < SAME


def tell(text: str) -> None:
    """Say a line on stderr from a handler: past buffers that may be in use, and if there is nobody left to hear it."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


def end_if_noted() -> None:
    """End what is being done if a signal was noted. Raises Stopped."""
    if _noted:
        raise Stopped(128 + _noted[0])


def hand_on(number: int) -> None:
    """Send a signal to all children that multiprocessing knows of."""
    for process in active_children():
        if process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)


class Stopped(SystemExit):
    """A signal ends the process; any other SystemExit is somebody's own."""


class CutShort(Exception):
    """What was being done, and can be done again, was left for a stop."""


class StopRequest:
    """While training, finish the step and save; before and after, stop at once; twice, too.

    In a process of joblib but once: who told all processes, and the command, which hands on what it was told, mean the
    same; told twice, the command ends all.

    Where submitit runs the job, it has set a handler that queues it again at its time limit and ends it: that signal
    does the same here, and its handler is called when all is saved and closed. submitit lets SIGTERM pass, which Slurm
    sends a moment before; so does kdx then.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.signal: int | None = None
        self.is_deferred = False
        self.kept = ""  # what there is to go on from
        self.found: dict[int, Any] = {}
        self.since = 0.0
        self.is_joblibs = signal.getsignal(signal.SIGTERM) is _note
        self.requeue = getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"), signal.SIGTERM)

    @property
    def exit_code(self) -> int:
        return 128 + (self.signal or signal.SIGTERM)

    def __enter__(self) -> "StopRequest":
        is_queued = callable(signal.getsignal(self.requeue))
        hangups = [number for number in HANGUPS if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores it
        for number in (self.requeue if is_queued else signal.SIGTERM, signal.SIGINT, *hangups):
            try:
                self.found[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: whoever owns it handles signals
                break
        if _noted:
            self.__exit__(None, None, None)
        end_if_noted()
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        for number, handler in self.found.items():
            signal.signal(number, handler)
        if isinstance(error, Stopped) and self.signal == self.requeue and callable(self.found[self.requeue]):
            try:
                self.found[self.requeue](self.signal, None)
            except Exception as refusal:  # such as: timed out too many times
                what = " ".join(str(refusal).split()).rstrip(".")
                mend = "The same command goes on; hydra.launcher.max_num_timeout=... says how often by itself"
                raise MachineError("time limit", what, mend) from None

    def _handle(self, number: int, _: Any) -> None:
        again = self.signal is not None
        if again and (self.is_joblibs or number in HANGUPS or is_same(self.since)):  # shell and kernel both say it
            return
        self.signal, self.since = number, time.monotonic()
        if again or not self.is_deferred:
            self._tell_cost()
            raise Stopped(self.exit_code)
        tell("\nstopping at the next safe point; once more to stop at once")

    def agreed(self, accelerator: Any) -> bool:
        """Whether any process was asked to stop: all must stop at the same step."""
        if accelerator.num_processes == 1:
            return self.signal is not None
        import torch

        asked = torch.tensor([int(self.signal or 0)], device=accelerator.device)
        self.signal = int(accelerator.gather(asked).max().item()) or self.signal
        return self.signal is not None

    def check(self) -> None:
        """Leave, if asked to stop, what can be done again. Raises CutShort; not where other processes would wait."""
        if self.signal is not None and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise CutShort

    def _tell_cost(self) -> None:
        """Say what a stop at once costs, where one process speaks for all."""
        lost = "what was done since the newest checkpoint is lost" if self.is_deferred else "nothing is lost"
        if os.environ.get("RANK", "0") == "0":
            tell(f"\nkdx: {self.kept or f'stopped at once: {lost}; to go on: {self._how()}'}")

    def _how(self) -> str:
        if (self.run_dir / "overrides.yaml").exists():  # it was typed
            return f"python -m kdx run.resume={self.run_dir}"
        return f"the same call of distill, in {self.run_dir}"

    def saved(self, step: int, accelerator: Any) -> None:
        """From here on stop at once, as all is saved, and say how to go on. Raises Stopped if asked to already."""
        self.kept, self.is_deferred = f"stopped after step {step}; to go on: {self._how()}", False
        if self.agreed(accelerator):
            log.warning(self.kept)
            raise Stopped(self.exit_code)
