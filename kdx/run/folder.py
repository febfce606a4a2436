"""A run's folder: what was asked, who holds it, what state it is in, and what the run leaves there. No torch."""

import logging
import os
import platform
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kdx import plugins
from kdx.config import Config, Tree
from kdx.errors import ConfigError, DivergedError, user_error
from kdx.run.claim import claim
from kdx.run.files import read_json, remove, write_beside, write_json
from kdx.run.identity import differences, identity, may_differ, table
from kdx.run.redact import redact
from kdx.run.signals import Stopped, is_main

log = logging.getLogger("kdx")
TIME = "%Y-%m-%dT%H:%M:%S%z"
STATUS_SECONDS = 5  # between two writes of the step to status.json


@dataclass(frozen=True)
class Record:
    """What a run was started with, besides its config."""

    words: list[str] = field(default_factory=list)  # what was typed for this run
    swept: list[str] = field(default_factory=list)  # the keys that its sweep varies
    sources: dict[str, str] = field(default_factory=dict)  # where lr, steps, epochs and max_length came from
    command: list[str] = field(default_factory=list)  # the command line, for command.txt


def is_resumable(path: Path) -> bool:
    """Return whether a folder has something to resume from, or a run that is done."""
    has_some = any((path / "checkpoints").glob("step-*")) or (path / "trained.json").is_file()
    return has_some or (path / "summary.json").is_file()


class RunFolder:
    """One run's folder; docs/resume.md has the list of its files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = 0
        self.max_steps: int | None = None
        self._since = time.strftime(TIME)
        self._written = 0.0

    def is_done(self, config: Config) -> bool:
        """Return whether this run is done. Raises ConfigError, with a diff, if the folder has another run."""
        if self.kept("status.json").get("state") != "done" or not self.kept("summary.json"):
            return False
        self._refuse_another(identity(config))
        return True

    def _remove_leftovers(self) -> None:
        """Remove what a killed process was writing or removing."""
        for folder in (self.path, self.path / "checkpoints", self.path / "student"):
            for path in folder.glob(".tmp-*"):
                remove(path)

    def _refuse_another(self, now: Tree) -> None:
        """Raise ConfigError, with a diff, if the folder has a run of another identity that saved something."""
        was = self.kept("data.json")
        if not was or not is_resumable(self.path):
            return
        found = differences({key: was.get(key) for key in now}, now)
        if wrong := [(key, before, after) for key, before, after in found if not may_differ(key, after)]:
            keys = ", ".join(key for key, _, _ in wrong)
            hint = "Use another folder (hydra.run.dir=..., in a sweep sweep.name=...), or start a new run with run.like=..."
            error = ConfigError(str(self.path), f"holds a run with a different {keys}", hint)
            error.lines += table(wrong)
            raise error

    @contextmanager
    def claim(self, config: Config, record: Record) -> Iterator[None]:
        """Hold the folder for the life of a run, write its record, and keep status.json up to date whatever happens.

        Raises InUseError if another process runs here, ConfigError if the folder has another run.
        """
        with claim(self.path) if is_main() else nullcontext():
            if is_main():
                self._refuse_another(identity(config))
                self._remove_leftovers()
                self._write_record(config, record)
                self.step = self.kept("status.json").get("step", 0)  # how far it was, until it is resumed
                self.write_status("running")
            try:
                yield
            except BaseException as error:
                # Of several processes the one that fails says why. What fails after a run is done loses nothing.
                if self.kept("status.json").get("state") == "running":
                    with suppress(OSError):  # a full disk: the error itself is printed
                        self.write_status(*self._ending(error))
                raise
            if is_main():
                self.write_status("done")

    def _ending(self, error: BaseException) -> tuple[str, str, Any]:
        """Return the state, the reason and the exit code that an error leads to."""
        if isinstance(error, Stopped):
            return "interrupted", f"stopped by a signal at step {self.step}", error.code
        if (known := user_error(error, self.path)) is None:
            return "failed", f"{type(error).__name__}: {error}".splitlines()[0], 1
        return "diverged" if isinstance(known, DivergedError) else "failed", str(known), known.exit_code

    def _write_record(self, config: Config, record: Record) -> None:
        """Write down the config, the words and the command, without secrets, and the user's own code."""
        asked = yaml.safe_dump(redact(config.model_dump()), sort_keys=False, allow_unicode=True)
        write_beside(self.path / "config.yaml", asked)
        write_beside(self.path / "overrides.yaml", yaml.safe_dump(redact(record.words), allow_unicode=True))
        write_json(self.path / "record.json", {"swept": record.swept, "sources": record.sources})
        write_beside(self.path / "command.txt", shlex.join(["python", "-m", "kdx", *redact(record.command)]) + "\n")
        plugins.keep(self.path)

    def begin(self, config: Config, facts: Tree) -> None:
        """Keep what decides which student comes out, or compare it with what was kept. Raises ConfigError.

        facts: what is known only once data and models are loaded (fingerprints of the rows, number of processes).
        """
        if is_main():
            now = identity(config) | facts  # models and data have been downloaded: the hub's commits are known
            self._refuse_another(now)
            if not is_resumable(self.path) and differences(self.kept("data.json"), now):
                (self.path / "wandb_id.txt").unlink(missing_ok=True)  # what was logged then is of another run
            write_json(self.path / "data.json", now)

    def begin_again(self) -> None:
        """Warn if a run that was stopped has nothing to resume from."""
        if self.step:
            log.warning("%s stopped at step %s without a checkpoint: starting again at step 0", self.path, self.step)
        self.step = 0

    def at(self, step: int) -> None:
        """Note the step, on disk every few seconds."""
        self.step = step
        if is_main() and time.monotonic() - self._written > STATUS_SECONDS:
            with suppress(OSError):
                self.write_status("running")

    def write_status(self, state: str, reason: str = "", code: int | None = None) -> None:
        self._written = time.monotonic()
        status = {"state": state, "reason": redact(reason), "step": self.step, "max_steps": self.max_steps}
        status |= {"updated": time.strftime(TIME), "since": self._since}
        status |= {"owner": {"pid": os.getpid(), "host": platform.node()}}
        write_json(self.path / "status.json", status if code is None else status | {"exit_code": code})

    def kept(self, name: str) -> Tree:
        """Read a JSON file of the run; empty if there is none."""
        return read_json(self.path / name)
