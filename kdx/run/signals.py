"""SIGTERM, Ctrl-C, a closed terminal and a cluster's warnings: finish the step, save, and end. Imports no torch."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

# A closed terminal sends SIGHUP; `sbatch --signal=USR1@120` warns before the time limit.
STOPS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
SAME = 0.5  # seconds within which a second signal is the first one, sent to the process and to its group


class Stopped(SystemExit):
    """A run stopped because of a signal. All that it should save is saved."""


class StopRequest:
    """While this is open, a signal only asks the run to stop; a second one ends the process at once.

    Until the run first looks whether it is asked to stop, there is nothing to save: the first signal stops it there.

    A job of submitit is requeued at its time limit by a handler that submitit has set. Here its signal stops the run as
    any other does, and its handler is called at the end. Open this around the claim of a folder, so that the folder is
    free when the job starts again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.signal: int | None = None  # that this process got
        self.is_agreed = False  # whether any process of the run got one, as the last step's reduction says
        self._is_checked = False
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._requeue = getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"), signal.SIGTERM)

    @property
    def is_asked(self) -> bool:
        """Whether the run should stop here. All processes answer alike, if all look after the same step."""
        self._is_checked = True
        return self.is_agreed if num_processes() > 1 else self.signal is not None

    def stopped(self) -> Stopped:
        """Return what ends the run: 143, 130 or 129 becomes the exit code."""
        return Stopped(128 + (self.signal or signal.SIGTERM))

    def check(self) -> None:
        """Raise Stopped if the run should stop; never where other processes would wait for this one."""
        if num_processes() == 1 and self.is_asked:
            raise self.stopped()

    def __enter__(self) -> "StopRequest":
        numbers = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        if callable(signal.getsignal(self._requeue)):
            # Slurm sends SIGTERM a moment before; submitit lets it pass.
            numbers = list({self._requeue, *numbers} - {signal.SIGTERM})
        with suppress(ValueError):  # not the main thread: whoever owns that handles signals
            for number in numbers:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Stopped):
            from kdx.run.folder import is_resumable

            how = "python -m kdx" if num_processes() == 1 else "the same command and"
            resume = f"Resume with: {how} run.resume={self.path}"
            start = f"Nothing was saved yet. Start again with: {how} run.like={self.path}"
            _say(f"kdx: stopped. {resume if is_resumable(self.path) else start}")
            if self.signal == self._requeue and callable(requeue := self._before[self._requeue]):
                requeue(self._requeue, None)
        elif not error and self.signal not in (None, self._requeue):
            raise self.stopped()  # the run was done before it could stop: no other job begins, and none is requeued

    def _handle(self, number: int, _: Any) -> None:
        if self.signal is None:
            self.signal = signal.SIGTERM if number == signal.SIGUSR1 != self._requeue else number
            self._since = time.monotonic()
            if not self._is_checked:
                raise self.stopped()
            _say("\nkdx: stopping after this step and saving. Press Ctrl-C again to quit now")
        elif time.monotonic() - self._since > SAME:
            _say("kdx: quit; steps since the last checkpoint are lost")
            os._exit(128 + number)


def num_processes() -> int:
    """Return the number of processes of this run under torchrun, else 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the only process of this run under torchrun, or the first."""
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    """Write a line to stderr from a signal handler, not through buffers in use; of several processes in the first."""
    if is_main():
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"{text}\n".encode())
