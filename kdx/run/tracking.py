"""What a run reports while it runs: metrics.jsonl first, then the console and W&B."""

import json
import logging
import os
import secrets
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kdx.config import Config, as_dict
from kdx.errors import printable
from kdx.run.folder import Record, RunFolder
from kdx.run.redact import redact

log = logging.getLogger("kdx")

CONSOLE = Console(soft_wrap=True, highlight=False)
SAMPLES_PATIENCE = 5  # seconds for W&B to take the table of samples
SETTINGS = {  # of the W&B client; an environment variable such as WANDB_FINISH_TIMEOUT wins
    "save_code": False,  # neither code nor diffs
    "console": "off",
    "quiet": True,
    "silent": True,
    "init_timeout": 30,
    "finish_timeout": 60,  # without it a run would wait for a lost server forever
    "finish_timeout_raises": True,
    "x_transaction_log_flush_interval": 1,  # a killed run keeps its rows
    "program": "kdx",
}


class _ConsoleHandler(logging.Handler):
    """Log lines through the one console, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        text = f"warning: {record.getMessage()}" if is_warning else record.getMessage()
        CONSOLE.print(text, style="yellow" if is_warning else None, markup=False)


def _clean(record: logging.LogRecord) -> bool:
    """Remove secrets and control characters: lines quote paths and rows."""
    record.msg, record.args = printable(redact(record.getMessage())), ()
    return True


@contextmanager
def logging_to(file: Path | None, is_main: bool) -> Iterator[None]:
    """Log kdx's lines in the main process: to the console and, with times, to a file if there is one."""
    handlers: list[logging.Handler] = [_ConsoleHandler() if is_main else logging.NullHandler()]
    if is_main and file is not None:
        to_file = logging.FileHandler(file, encoding="utf-8")
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
def working(what: str, total: int, is_main: bool = True, done: int = 0) -> Iterator[Callable[..., None]]:
    """Show the progress of something long on a terminal → a function to call after each part, with words to show."""
    if not (is_main and CONSOLE.is_terminal):
        yield lambda words="": None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"),
        TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=CONSOLE, transient=True, speed_estimate_period=300) as progress:
        task = progress.add_task(what, total=total, completed=done, words="")
        yield lambda words="": progress.update(task, advance=1, words=words)


class Tracker:
    """The metrics of one run. Trouble with W&B is reported once and never touches training.

    Use it as a context manager: the W&B run is closed, as failed if an exception passes.
    """

    def __init__(self, folder: RunFolder, config: Config, record: Record, training: Any, *, is_main: bool) -> None:
        state = training.state
        self.file = folder.path / "metrics.jsonl"
        self.folder, self.config, self.record, self.is_main = folder, config, record, is_main
        self.first_step, self.max_steps = state.step, training.max_steps
        self.wandb: Any = None
        self.wandb_line, self.sync = "W&B: disabled", ""
        self._show: Callable[..., None] = lambda words: None
        self._has_warned = False
        if is_main and self.file.exists() and self.file.stat().st_size > state.lines:
            os.truncate(self.file, state.lines)  # what comes after the checkpoint: a resumed run has each step once

    def __enter__(self) -> "Tracker":
        mode = wandb_mode(self.config.tracking.mode) if self.is_main else "disabled"
        if mode != "disabled":
            try:
                self.wandb = self._open(mode)
            except Exception as error:  # a run never fails because of W&B
                log.warning("W&B is off for this run: %s", _short(error))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        code = 0 if error is None else error.code if isinstance(error, SystemExit) else 1
        self._try(lambda run: run.finish(exit_code=code))
        self.wandb = None

    def _open(self, mode: Any) -> Any:
        """Open the W&B run, under its old id if the run is resumed; offline where the server cannot be reached."""
        import wandb

        config, tracking = self.config, self.config.tracking
        wandb_dir, id_file = _wandb_dir(self.folder.path, config), self.folder.path / "wandb_id.txt"
        arguments = redact(
            {
                "project": tracking.project or _unless_set("WANDB_PROJECT", "kdx"),
                "entity": tracking.entity,
                "name": tracking.name or _unless_set("WANDB_NAME", run_name(self.folder, config, self.record)),
                "group": config.sweep.name,
                "job_type": "baseline" if config.loss.alpha == 0 else "student",
                "notes": tracking.notes,
                "tags": tracking.tags or None,
                "config": as_dict(config),
            }
        )
        arguments["dir"] = str(wandb_dir.parent)
        arguments["id"] = id_file.read_text().strip() if id_file.is_file() else secrets.token_hex(4)
        chosen = {key: value for key, value in SETTINGS.items() if _unless_set(f"WANDB_{key.upper()}", True)}
        arguments["settings"] = wandb.Settings(**chosen)
        typed, sys.argv = sys.argv, redact(sys.argv)  # W&B reads it when a run opens
        try:
            run = wandb.init(mode=mode, resume=None if mode == "offline" else "allow", **arguments)
        except Exception as error:
            if mode == "offline" or isinstance(error, ValueError):  # such as a tag that is too long
                raise
            log.warning("cannot reach W&B (%s): this run is kept offline", _short(error))
            with suppress(SystemExit):  # raised if its service failed
                wandb.teardown()  # the client still holds the id
            for empty in wandb_dir.glob(f"run-*-{arguments['id']}"):  # it would make `wandb sync` of many runs fail
                shutil.rmtree(empty, ignore_errors=True)
            run = wandb.init(mode="offline", **arguments)
        finally:
            sys.argv = typed
        id_file.write_text(run.id + "\n")  # an agent of a W&B sweep chooses the id itself
        run.define_metric("tokens", hidden=True)
        run.define_metric("*", step_metric="tokens")
        run.summary.update({"alpha": config.loss.alpha, "temperature": config.loss.temperature})
        online = [] if run.offline else ["--include-online"]  # without it `wandb sync` skips such a run
        self.sync = shlex.join(["wandb", "sync", *online, str(Path(run.dir).parent)])
        self.wandb_line = f"W&B: offline; to upload: {self.sync}" if run.offline else f"W&B: {run.url}"
        return run

    def header(self, lines: list[str]) -> None:
        """Log what the run is, where it writes, and its page in W&B."""
        for line in [*lines, f"  writes to       {self.folder.path}", f"  {self.wandb_line}"]:
            log.info(line)

    def log(self, state: Any, metrics: dict[str, Any]) -> None:
        """Append one line of metrics, and show it."""
        if not self.is_main:
            return
        line = {"step": state.step, "tokens": state.tokens, "counted_tokens": state.counted_tokens, **metrics}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        sent = {name: value for name, value in line.items() if value is not None and name != "step"}
        self._try(lambda run: run.log(sent, step=state.step))
        if "eval/ce" in metrics:
            shown = {k.removeprefix("eval/"): f"{v:.4f}" for k, v in metrics.items() if v is not None}
            log.info("step %d held-out: %s", state.step, ", ".join(f"{k} {v}" for k, v in shown.items()))
        elif not CONSOLE.is_terminal and metrics["train/loss"] is not None:
            loss, speed = metrics["train/loss"], metrics["speed/tokens_per_second"]
            left = (self.max_steps - state.step) * state.tokens / max(state.step, 1) / max(speed, 1e-9)
            minutes = f"{int(left) // 60}:{int(left) % 60:02d} left"
            log.info("step %d/%d  loss %.4f  %.0f tokens/s  %s", state.step, self.max_steps, loss, speed, minutes)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Show a progress bar on a terminal while training; elsewhere log() prints plain lines."""
        with working("training", self.max_steps, self.is_main, done=self.first_step) as self._show:
            yield

    def advance(self, step: int, loss: float, speed: float) -> None:
        """Move the progress bar."""
        self._show(f"loss {loss:.3f}  {speed:.0f} tokens/s")

    def samples(self, samples: list[dict[str, Any]]) -> None:
        """Send the sample answers as a W&B table."""
        columns = ["prompt", "reference", "teacher", "untouched", "student"]
        data = [[s["prompt"][-1]["content"], *(s[c] or "" for c in columns[1:])] for s in samples]

        def send(run: Any) -> None:
            import wandb

            run.log({"samples": wandb.Table(columns=columns, data=data)})

        if samples and self.wandb is not None:  # the client asks the server first, and would wait for a lost one
            thread = threading.Thread(target=self._try, args=(send,), daemon=True)
            thread.start()
            thread.join(SAMPLES_PATIENCE)

    def summary(self, summary: dict[str, Any]) -> None:
        """Set plain final scalars: what dashboards compare and a W&B sweep optimises."""
        parts = (("eval", "student"), ("untouched", "untouched"), ("teacher", "teacher"), ("run", "run"))
        scalars = {
            f"{name}/{key}": value
            for name, part in parts
            for key, value in summary[part].items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._try(lambda run: run.summary.update(scalars))

    def _try(self, action: Callable[[Any], object]) -> None:
        """Do something with the W&B run, if there is one; report its first failure."""
        if self.wandb is None:
            return
        try:
            action(self.wandb)
        except Exception as error:  # a run never fails because of W&B
            if not self._has_warned:
                log.warning("W&B: %s; metrics.jsonl has everything; to upload the rest: %s", _short(error), self.sync)
            self._has_warned = True


def run_name(folder: RunFolder, config: Config, record: Record) -> str:
    """Name a run: by its point in a sweep, else by what was typed."""
    if config.sweep.name:
        return folder.path.name
    idle = ("tracking.", "hydra.", "run.", "train.log")
    words = [word for word in record.words if not word.lstrip("+~").startswith(idle)]
    return str(redact(" ".join(words)))[:100] or "default"


def _wandb_dir(path: Path, config: Config) -> Path:
    """Return where W&B's files go: in a sweep's folder, and those of single runs together."""
    if config.sweep.name:
        return path.parent / "wandb"
    outputs = next((p for p in path.parents if p.name == "outputs"), path.parent)
    return outputs / "wandb"


def _unless_set(variable: str, value: Any) -> Any:
    """Return a value that an environment variable of W&B's own has precedence over."""
    return None if variable in os.environ else value


def _short(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:160]


def wandb_mode(asked: str) -> Any:
    """Return the mode that is asked for, else that of WANDB_MODE, else online with a login."""
    if asked != "auto":
        return asked
    return os.environ.get("WANDB_MODE") or ("online" if has_login() else "offline")


def has_login() -> bool:
    """Return whether W&B's client has a key for its server, from the environment or from `wandb login`."""
    import wandb

    return bool(wandb.login(prompt=False, verify=False))


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and advice out of kdx's output."""
    import datasets
    import huggingface_hub
    import transformers

    os.environ["WANDB_SILENT"] = "true"
    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
