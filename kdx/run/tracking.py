"""What a run tells while it goes on: metrics.jsonl first, then the console and W&B."""

import json
import logging
import netrc
import os
import secrets
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol, cast
from urllib.parse import urlparse

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kdx.config import Config, TrackingConfig, as_dict
from kdx.errors import printable
from kdx.run.files import fsync, of_disk, write_beside
from kdx.run.redact import redact

log = logging.getLogger("kdx")


class _Stdout:
    """Standard output; once nobody reads it (Ctrl-C ends `| tee` first, a terminal is closed), nowhere."""

    def write(self, text: str) -> int:
        with self._while_read():
            sys.stdout.write(text)
        return len(text)

    def flush(self) -> None:
        with self._while_read():
            sys.stdout.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)

    @contextmanager
    def _while_read(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(
                nowhere, sys.stdout.fileno()
            )  # what is left in its buffer must go somewhere, or Python ends with 120
            os.close(nowhere)


CONSOLE = Console(file=cast(IO[str], _Stdout()), soft_wrap=True, highlight=False)
HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")  # under which `wandb login` keeps its key, now and formerly
PATIENCE = 5  # seconds for the table of samples to be taken by W&B
SETTINGS = {  # of the W&B client; a variable such as WANDB_FINISH_TIMEOUT wins over its line here
    "save_code": False,  # neither code nor diffs
    "console": "off",
    "quiet": True,
    "silent": True,
    "init_timeout": 30,
    "finish_timeout": 60,  # without it a run would wait for a lost server for ever
    "finish_timeout_raises": True,
    "x_transaction_log_flush_interval": 1,  # a killed run keeps its rows
    "program": "kdx",
}


class Progressed(Protocol):
    """Where a run stands: what the loop's state has."""

    step: int
    tokens: int
    counted_tokens: int


class _ConsoleHandler(logging.Handler):
    """Log lines through the one console, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        text = record.getMessage()
        CONSOLE.print(f"warning: {text}" if record.levelno >= logging.WARNING else text, style=style, markup=False)


class _FileHandler(logging.FileHandler):
    """Log lines in a file; a full disk costs them alone, and is told by what cannot do without it."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def _clean(record: logging.LogRecord) -> bool:
    """Without secrets, and without what a terminal would obey: lines quote paths and rows."""
    record.msg, record.args = printable(redact(record.getMessage())), ()
    return True


@contextmanager
def logging_to(file: Path | None, is_main: bool) -> Iterator[None]:
    """Log kdx's lines to the console and, with times, to a file if there is one; the main process alone does."""
    handlers: list[logging.Handler] = [logging.NullHandler()]  # a process without any would print warnings by itself
    if is_main:
        handlers = [_ConsoleHandler()]
    if is_main and file is not None:
        to_file = _FileHandler(file, encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(to_file)
    for handler in handlers:
        handler.addFilter(_clean)
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


@contextmanager
def working(what: str, total: int, is_main: bool = True) -> Iterator[Any]:
    """Show progress of something long → a function to call after each part."""
    if not (is_main and CONSOLE.is_terminal):
        if is_main and total > 1:
            log.info("%s: %d batches", what, total)
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=CONSOLE, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


class Tracker:
    """Metrics of one run. Trouble with W&B is said once and never touches training."""

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        *,
        is_main: bool,
        max_steps: int,
        first_step: int = 0,
        lines: int = 0,
    ) -> None:
        self.file = run_dir / "metrics.jsonl"
        self.config, self.is_main, self.max_steps, self.first_step = config, is_main, max_steps, first_step
        self.wandb: Any = None
        self.wandb_line, self.sync = "W&B: disabled", ""
        self.told_trouble = self.told_disk = False
        self.waiting = ""  # lines of metrics that a full disk refused
        self.progress: Progress | None = None
        if is_main:
            self._cut_back(lines)

    def _cut_back(self, num_bytes: int) -> None:
        """Keep the lines that the checkpoint counts on, so that a resumed run has each step once."""
        if not self.file.exists():
            if num_bytes:
                log.warning("%s is gone, with the lines up to step %d", self.file, self.first_step)
            return
        kept = self.file.read_bytes()[:num_bytes]
        if len(kept) < num_bytes:
            log.warning("%s lacks lines up to step %d: it was changed since", self.file, self.first_step)
            kept = kept[: kept.rfind(b"\n") + 1]
        write_beside(self.file, kept)

    def start_wandb(self, run_dir: Path, wandb_dir: Path, name: str, config: Config) -> None:
        """Open the W&B run, under its old id if the run goes on; where the server cannot be reached, offline."""
        mode = wandb_mode(self.config.mode)
        if not self.is_main or mode == "disabled":
            return
        try:
            self.wandb = run = self._open(mode, run_dir, wandb_dir, name, config)
        except Exception as error:  # W&B's trouble is not the run's
            log.warning("W&B is off for this run: %s", _short(error))
            return
        which = [] if run.offline else ["--include-online"]  # without it `wandb sync` passes over such a run
        self.sync = shlex.join(["wandb", "sync", *which, str(Path(run.dir).parent)])
        self.wandb_line = f"W&B: offline; to upload: {self.sync}" if run.offline else f"W&B: {run.url}"
        self._tell(lambda run: run.define_metric("tokens", hidden=True))
        self._tell(lambda run: run.define_metric("*", step_metric="tokens"))
        columns = {"alpha": config.loss.alpha, "temperature": config.loss.temperature}
        self._tell(lambda run: run.summary.update(columns))

    def _open(self, mode: Any, run_dir: Path, wandb_dir: Path, name: str, config: Config) -> Any:
        import wandb

        wandb_dir.mkdir(parents=True, exist_ok=True)
        kept = run_dir / "wandb_id.txt"
        environment = os.environ
        told = redact(
            {
                "project": self.config.project or environment.get("WANDB_PROJECT") or "kdx",
                "entity": self.config.entity or environment.get("WANDB_ENTITY"),
                "name": self.config.name or environment.get("WANDB_NAME") or name,
                "group": config.sweep.name or environment.get("WANDB_RUN_GROUP"),
                "job_type": "baseline" if config.loss.alpha == 0 else "student",
                "notes": self.config.notes or environment.get("WANDB_NOTES"),
                "tags": [*self.config.tags, *filter(None, environment.get("WANDB_TAGS", "").split(","))] or None,
                "config": as_dict(config),
            }
        )
        told["dir"] = str(wandb_dir.parent)
        told["id"] = (kept.read_text().strip() if kept.is_file() else "") or secrets.token_hex(4)
        chosen = {key: value for key, value in SETTINGS.items() if f"WANDB_{key.upper()}" not in environment}
        told["settings"] = wandb.Settings(**chosen)
        environment["WANDB_SILENT"] = "true"
        with _redacted_argv():
            try:
                run = wandb.init(mode=mode, resume="allow" if mode == "online" else None, **told)
            except Exception as error:
                if mode == "offline" or isinstance(error, ValueError):  # such as a tag that is too long
                    raise
                log.warning("W&B cannot be reached (%s); this run is kept offline", _short(error))
                with suppress(SystemExit):  # how it ends when its service failed; a signal is kept for the loop
                    wandb.teardown()  # else the client holds the id
                for empty in wandb_dir.glob(f"run-*-{told['id']}"):  # it would make `wandb sync` of many runs fail
                    shutil.rmtree(empty, ignore_errors=True)
                run = wandb.init(mode="offline", **told)
        kept.write_text(run.id + "\n")  # an agent of a W&B sweep chooses the id itself
        return run

    def log(self, state: Progressed, metrics: dict[str, Any]) -> None:
        """Write one line of metrics, and show it."""
        if not self.is_main:
            return
        line = {"step": state.step, "tokens": state.tokens, "counted_tokens": state.counted_tokens, **metrics}
        self.waiting += json.dumps(line) + "\n"
        try:
            self._write()
        except OSError as error:
            if not self.told_disk:
                log.warning("%s cannot be written (%s): its lines wait in memory", self.file, error.strerror)
            self.told_disk = True
        told = {k: v for k, v in line.items() if v is not None and k != "step"}
        self._tell(lambda run: run.log(told, step=state.step))
        if "eval/ce" in metrics:
            shown = {k.removeprefix("eval/"): f"{v:.4f}" for k, v in metrics.items() if v is not None}
            log.info("step %d held-out: %s", state.step, ", ".join(f"{k} {v}" for k, v in shown.items()))
        elif self.progress is None and metrics["train/loss"] is not None:  # else each step was skipped, and is told
            loss, speed = metrics["train/loss"], metrics["speed/tokens_per_second"]
            left = (self.max_steps - state.step) * state.tokens / max(state.step, 1) / max(speed, 1e-9)
            minutes = f"{int(left) // 60}:{int(left) % 60:02d} left"
            log.info("step %d/%d  loss %.4f  %.0f tokens/s  %s", state.step, self.max_steps, loss, speed, minutes)

    def keep_lines(self) -> int:
        """Have the disk keep the lines so far → their bytes, which a checkpoint counts on. Raises MachineError."""
        if not self.is_main or not (self.waiting or self.file.exists()):
            return 0
        try:
            self._write()
            fsync(self.file)
            return self.file.stat().st_size
        except OSError as error:
            raise of_disk(error, self.file) from error

    def _write(self) -> None:
        """Append the lines that wait, all or none. Raises OSError."""
        size = self.file.stat().st_size if self.file.exists() else 0
        try:
            with self.file.open("ab") as file:
                file.write(self.waiting.encode())
        except OSError:
            with suppress(OSError):
                os.truncate(self.file, size)
            raise
        self.waiting = ""

    @contextmanager
    def training(self) -> Iterator[None]:
        """Show a progress bar on a terminal while training; elsewhere log() prints plain lines."""
        if not (self.is_main and CONSOLE.is_terminal) or self.max_steps == 0:
            yield
            return
        columns = (
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:.0f} tokens/s"), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=CONSOLE, speed_estimate_period=300) as progress:
            self.task = progress.add_task(
                "", total=self.max_steps, completed=self.first_step, loss=float("nan"), speed=0.0
            )
            self.progress = progress
            yield
        self.progress = None

    def advance(self, step: int, loss: float, speed: float) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=step, loss=loss, speed=speed)

    def samples(self, samples: list[dict[str, Any]]) -> None:
        """Log the sample answers as a W&B table."""
        columns = ["prompt", "reference", "teacher", "untouched", "student"]
        data = [[s["prompt"][-1]["content"], *(s[c] or "" for c in columns[1:])] for s in samples]

        def told(run: Any) -> None:
            import wandb

            run.log({"samples": wandb.Table(columns=columns, data=data)})

        if samples and self.wandb is not None:  # the client asks the server first, and a lost one keeps it waiting
            thread = threading.Thread(target=self._tell, args=(told,), daemon=True)
            thread.start()
            thread.join(PATIENCE)

    def summary(self, summary: dict[str, Any]) -> None:
        """Set plain final scalars: what dashboards compare and a W&B sweep optimises."""
        parts = (("eval", "student"), ("untouched", "untouched"), ("teacher", "teacher"), ("run", "run"))
        scalars = {f"{name}/{k}": v for name, part in parts for k, v in summary[part].items() if _is_number(v)}
        self._tell(lambda run: run.summary.update(scalars))

    def finish(self, exit_code: int) -> None:
        """Close the W&B run, as failed unless exit_code is 0."""
        self._tell(lambda run: run.finish(exit_code=exit_code))
        self.wandb = None

    def _tell(self, what: Callable[[Any], object]) -> None:
        """Do something with the W&B run, if there is one; its trouble is not the run's, and is said once."""
        if self.wandb is None:
            return
        try:
            what(self.wandb)
        except Exception as error:
            if not self.told_trouble:
                log.warning("W&B: %s; metrics.jsonl has everything; to upload the rest: %s", _short(error), self.sync)
            self.told_trouble = True


@contextmanager
def _redacted_argv() -> Iterator[None]:
    """Hide secrets in sys.argv, which W&B keeps as it finds it when a run opens."""
    typed = sys.argv
    sys.argv = redact(typed)
    try:
        yield
    finally:
        sys.argv = typed


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:160]


def wandb_mode(asked: str) -> Any:
    """online, offline or disabled: as asked, else as WANDB_MODE says, else online where there is a login."""
    if asked != "auto":
        return asked
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("online", "offline", "disabled"):
        return mode
    return "online" if mode != "dryrun" and has_login() else "offline"


def has_login() -> bool:
    """Whether there is a key for W&B's server, in the environment or where `wandb login` keeps it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    own = os.environ.get("WANDB_BASE_URL")
    try:
        kept = netrc.netrc(os.environ.get("NETRC"))
        return any(kept.authenticators(host) for host in ([urlparse(own).netloc] if own else HOSTS))
    except (OSError, netrc.NetrcParseError):
        return False


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and advice out of kdx's output."""
    import datasets
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()  # it tells each attempt to reach a hub
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it tells of each product of matrices
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
