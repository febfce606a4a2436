"""A run's folder: its record, its status, and going on with one that is there."""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kdx.config import Config
from kdx.errors import ConfigError, DivergedError, InUseError, KdxError, MachineError, exit_code, out_of_memory
from kdx.hostile import refuse_foreign, refuse_links
from kdx.run import checkpoint, drift, typed
from kdx.run.claim import claim, holder
from kdx.run.files import fsync, local_time, read_json, read_yaml, write_beside, write_over
from kdx.run.identity import differences, identity, table
from kdx.run.redact import redact
from kdx.run.signals import Stopped
from kdx.state import State

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """What a run was started with, beside its config."""

    words: list[str] = field(default_factory=list)
    swept: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)


class RunFolder:
    """The folder design: config.yaml, status.json, metrics.jsonl, summary.json, checkpoints/, student/ and the rest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = 0
        self.max_steps: int | None = None
        self.written = -math.inf
        self.since = local_time()
        self.before: dict[str, Any] = {}  # what the status told when this process began
        self.accept: Callable[[], None] = lambda: None
        self.is_accepted = False

    def is_done(self, config: Config) -> bool:
        """Return whether this run is done. Raises ConfigError, with a diff, if the folder has another run."""
        if self.status().get("state") != "done":
            return False
        if found := differences(read_json(self.path / "identity.json"), identity(config)):
            keys = ", ".join(key for key, _, _ in found)
            hint = "Use another folder (hydra.run.dir=..., in a sweep sweep.name=...)"
            error = ConfigError(str(self.path), f"holds a run with another {keys}", hint)
            error.lines += table(found)
            raise error
        return True

    def holder(self) -> str | None:
        """Name the process that is running in this folder, if there is one."""
        return holder(self.path)

    def done(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """The summary of a run that is done with this config, else None. Raises ConfigError if it was another."""
        refuse_links(self.path)
        state, summary = self.status().get("state"), read_json(self.path / "summary.json")
        if state != "done" and (state or not self._is_summary_of_all(summary)):
            return None
        if self._refuse_drift(config) and checkpoint.found(self.path):
            return None
        self._tidy()
        if not summary:
            what = "says that it is done, and its summary.json is missing or damaged"
            raise ConfigError(str(self.path), what, "Start anew in another folder")
        return summary

    def _is_summary_of_all(self, summary: dict[str, Any]) -> bool:
        """Whether a run is done by its summary, which is written last: only its status is lost then."""
        steps = summary["run"].get("steps") if isinstance(summary.get("run"), dict) else None
        later = [folder.name for folder in checkpoint.found(self.path) if folder.name > checkpoint.name_of(steps or 0)]
        return isinstance(steps, int) and not later

    def say_done(self, summary: dict[str, Any]) -> None:
        """Write the status of a done run anew where it is lost."""
        if self.status().get("state") != "done":
            self.step = self.max_steps = summary["run"]["steps"]
            with self._writing():
                self.write_status("done", "", is_main=True)

    def status(self) -> dict[str, Any]:
        """What status.json says; empty if there is none."""
        return read_json(self.path / "status.json")

    @contextmanager
    def open(
        self, config: dict[str, Any], is_main: bool, accepted: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Hold the folder while the run lasts, its config written there, or refuse: another process, or config, has it.

        accepted: called once its data and models are found to be those of the run that is there, if there is one.
        """
        if not is_main:  # rank 0 decides, and ends all if it refuses
            yield
            return
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            for above in self.path.absolute().parents[:3]:  # outputs/DATE/TIME may all be new
                with suppress(PermissionError):
                    fsync(above)
        with claim(self.path):
            status = self.status()
            if self.done(config) is not None:
                what = "another process has done this run just now"
                raise InUseError(str(self.path), what, "Nothing is left to do; the same command tells so")
            self.before = status
            is_longer = self._refuse_drift(config)
            refuse_foreign(self.path)
            self._tidy()
            if not status:
                with self._writing():
                    self.write_status("running", "", is_main)  # before all else: by it the folder is a run's

            def keep_config() -> None:
                text = yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)
                with self._writing():
                    write_beside(self.path / "config.yaml", text)

            def accept() -> None:
                if is_longer:
                    keep_config()
                    (self.path / "summary.json").unlink(missing_ok=True)  # of the shorter run
                with self._writing():
                    accepted()
                self.is_accepted = True

            self.accept = accept
            if not self._has_begun():
                keep_config()
            try:
                yield
            except (Stopped, KeyboardInterrupt) as error:
                if self.status().get("state") == "running":  # it came before the run reported anything
                    self._interrupted(error, is_main)
                raise

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"cannot write there: {error.strerror}"
            raise MachineError(str(self.path), what, "Choose another folder with hydra.run.dir=...") from None

    def _refuse_drift(self, config: dict[str, Any]) -> bool:
        """Refuse to go on under another config than the run began with, but for what cannot change the student.

        Whether the run is to be longer than it was, which is all that may differ.
        """
        file = self.path / "config.yaml"
        if not self._has_begun():
            return False
        if not file.exists():
            what = "is missing: what the run was begun with is not known"
            raise ConfigError(str(file), what, "Start anew in another folder")
        was, now = read_yaml(file), _plain(config)
        if not isinstance(was, dict):
            raise ConfigError(str(file), "is not the config of a run", "Do not use this folder")
        found = drift.drift(was, now)
        is_longer = drift.only_longer(found, now)
        is_over = self.status().get("state") == "done" and not checkpoint.found(self.path)
        if found and (is_over or not is_longer):
            raise self.drifted(found)
        return is_longer

    def drifted(self, found: drift.Drift) -> ConfigError:
        """What to say to a run that would be another than the one that is there."""
        keys = ", ".join(key for key, _, _ in found)
        mend = "Use the same, or another folder: hydra.run.dir=... (run.like= starts a new run from this one's words)"
        error = ConfigError(str(self.path), f"was begun with another {keys}", mend)
        error.lines += drift.table(found)
        return error

    def _tidy(self) -> None:
        """Remove what a killed process had begun to write, or to remove."""
        for begun in [*self.path.glob(".tmp-*"), *checkpoint.folder_of(self.path).glob(".tmp-*")]:
            shutil.rmtree(begun, ignore_errors=True) if begun.is_dir() else begun.unlink(missing_ok=True)

    def _has_begun(self) -> bool:
        """Whether the run got as far as its data; one that failed before may be mended in the same folder."""
        return (self.path / "data.json").exists() or bool(checkpoint.found(self.path))

    def at(self, step: int, is_main: bool) -> None:
        """Note where the run stands, on disk every few seconds."""
        self.step = step
        if time.monotonic() - self.written > 5:
            with suppress(OSError):  # on a full disk the run goes on
                self.write_status("running", "", is_main)

    @contextmanager
    def reporting(self, is_main: bool) -> Iterator[None]:
        """Keep status.json true, whatever happens inside."""
        self.write_status("running", "", is_main)
        try:
            yield
        except (Stopped, KeyboardInterrupt) as error:
            if self.status().get("state") not in ("done", "failed", "diverged"):  # saved, or another process failed
                self._interrupted(error, is_main)
            raise
        except BaseException as error:
            if isinstance(error, SystemExit):
                own = f"code of your own ended the process (sys.exit({error.code!r}))"
                error = ConfigError("KDX_PLUGINS", own, "Raise an error there, or return")
            if _is_anothers(error):
                raise self._ended_elsewhere() from None
            state = "diverged" if isinstance(error, DivergedError) else "failed"
            said = out_of_memory(error) or error
            reason = str(said) if isinstance(said, KdxError) else f"{type(said).__name__}: {said}"
            lines = reason if state == "diverged" else reason.splitlines()[0]
            if is_main and self.before.get("state") == "done" and not self.is_accepted:  # it was not to be longer
                with suppress(OSError):
                    self.keep("status.json", self.before)
                raise error
            # Whichever process fails: the others cannot know why.
            self.write_status(state, lines, is_main or self.status().get("state") == "running", exit_code(error))
            raise error
        self.write_status("done", "", is_main)

    def _interrupted(self, error: BaseException, is_main: bool) -> None:
        code = error.code if isinstance(error, Stopped) and isinstance(error.code, int) else None
        self.write_status("interrupted", f"{type(error).__name__} {error}", is_main, code)

    def _ended_elsewhere(self) -> BaseException:
        """What to say where another process of the run has ended: its own reason, which it wrote before."""
        status = self.status()
        if status.get("state") == "interrupted":
            return Stopped(status.get("exit_code"))
        if status.get("state") not in ("failed", "diverged"):
            self.write_status("failed", "another process of this run was killed", True, MachineError.exit_code)
            status = self.status()
        what = f"failed: {str(status.get('reason')).rstrip('.')}"
        error = KdxError("another process of this run", what, "What it printed itself may say more")
        error.exit_code = int(status.get("exit_code") or MachineError.exit_code)
        return error

    def write_status(self, state: str, reason: str, is_main: bool, code: int | None = None) -> None:
        if not is_main:
            return
        self.written = time.monotonic()
        status = {
            "state": state,
            "reason": redact(reason),
            "step": self.step,
            "max_steps": self.max_steps,
            "updated": local_time(),
            "since": self.since,
        }
        if code is not None:
            status["exit_code"] = code
        file, text = self.path / "status.json", json.dumps(status, indent=2) + "\n"
        try:
            write_beside(file, text)
        except OSError as error:
            if state not in ("failed", "diverged", "interrupted"):
                raise
            try:  # a full disk has room for it only where the old one stands
                write_over(file, text)
            except OSError:
                log.warning("%s cannot say that the run is %s: %s", file, state, error.strerror)

    def resume(
        self,
        model: Any,
        optimizer: Any,
        schedule: Any,
        origin: dict[str, Any],
        versions: dict[str, str],
        accelerator: Any,
        of: str,
    ) -> State | None:
        """Go on from the newest whole checkpoint, if there is one; name each that is damaged.

        origin: what besides the config decides which student comes out. Raises ConfigError if it is another now.
        versions: what decides its last bits; others are told. of: drift.digest, which the checkpoint must have too.
        """
        is_main = accelerator.is_main_process
        newest, skipped = checkpoint.newest(self.path)
        for fault in skipped:
            log.warning("skipped a damaged checkpoint, %s", fault)
        if newest is None:
            if step := self.before.get("step"):
                log.warning("%s was at step %s and has no checkpoint: it begins anew", self.path, step)
            if is_main:
                self.keep("data.json", origin)
                self.accept()
            return None
        was = self.kept("data.json")
        if not was:
            what = "has checkpoints, and its data.json is missing or damaged: which data they are of is not known"
            raise MachineError(str(self.path), what, "Start anew in another folder")
        found = drift.differences(was, origin)
        if found:
            raise self.drifted(found)
        rank, scaler = accelerator.process_index, accelerator.scaler
        state = State.read(checkpoint.load(newest, model, optimizer, schedule, rank=rank, scaler=scaler))
        if state is None:
            what, mend = "was written by another version of kdx", "Go on with that version, or start anew elsewhere"
            raise MachineError(str(newest / "state.json"), what, mend)
        if state.of != of:
            raise ConfigError(str(newest), "is a checkpoint of another run", "Remove it, or start anew elsewhere")
        if is_main:
            self.accept()
        others = drift.differences(state.versions, versions)
        told = [f"{name} {was} up to step {state.step}, then {now}" for name, was, now in others]
        drift.mark(state.other_versions, told)
        state.versions = versions
        best = newest / "best.safetensors"
        if best.is_file() and is_main:
            write_beside(checkpoint.folder_of(self.path) / "best.safetensors", best.read_bytes())
        state.stopped_by = "max_steps"
        self.step = state.step
        log.info("going on from %s", newest)
        return state

    def kept(self, name: str, of: dict[str, str] | None = None) -> dict[str, Any] | None:
        """What an earlier start of this run kept under a name, unless it was kept of other data."""
        file = self.path / name
        if not file.is_file():
            return None
        kept = read_json(file)
        return kept if of is None or of.items() <= kept.items() else None

    def keep(self, name: str, value: dict[str, Any]) -> None:
        write_beside(self.path / name, json.dumps(value, indent=2) + "\n")

    def write_results(self, summary: dict[str, Any], rows: list[dict[str, Any]], samples: Any, page: str) -> None:
        """Write what a done run leaves, the summary last."""
        write_beside(self.path / "eval_rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_beside(self.path / "samples.json", json.dumps(samples, indent=2, ensure_ascii=False) + "\n")
        write_beside(self.path / "samples.md", page)
        write_beside(self.path / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")

    def name(self, config: Config) -> str:
        """A readable name: a sweep's point, else what was typed, else the folder's."""
        if config.sweep.name:
            return self.path.name
        said = [
            w
            for w in typed.told(self.path)
            if not w.lstrip("+~").startswith(("tracking.", "hydra.", "run.", "train.log"))
        ]
        return redact(" ".join(said))[:100] or "default"

    def wandb_dir(self, config: Config) -> Path:
        """Where W&B's files lie: a sweep's in its own folder, those of single runs together."""
        if config.sweep.name:
            return self.path.parent / "wandb"
        outputs = next((p for p in self.path.parents if p.name == "outputs"), self.path.parent)
        return outputs / "wandb"


def _plain(config: dict[str, Any]) -> Any:
    """A config as YAML gives it back, without secrets."""
    return json.loads(json.dumps(redact(config)))


def _is_anothers(error: BaseException) -> bool:
    """Whether an error only says that another process of the run is gone."""
    words = ("gloo", "NCCL", "TCPStore")
    is_many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return is_many and isinstance(error, RuntimeError) and any(word in str(error) for word in words)
