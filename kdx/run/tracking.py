"""What a run reports while it runs: metrics.jsonl first, then the console and W&B."""

import json
import logging
import os
import secrets
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn

from kdx.errors import DivergedError, one_line, printable
from kdx.run import labels
from kdx.run.files import Lines, read_lines
from kdx.run.folder import RunFolder
from kdx.run.redact import redact
from kdx.run.signals import is_main

log = logging.getLogger("kdx")

CONSOLE = Console(soft_wrap=True, highlight=False)
SHOWN = ("train/loss", "speed/tokens_per_second")  # what lines on the console have, beside measures
SAMPLES_PATIENCE = 5  # seconds for W&B to take the table of samples
SETTINGS = {  # of the W&B client; an environment variable such as WANDB_FINISH_TIMEOUT wins
    "project": "kdx",
    "program": "kdx",
    "save_code": False,  # neither code nor diffs
    "console": "off",
    "silent": True,
    "init_timeout": 30,
    "finish_timeout_raises": True,  # a lost server would keep a run waiting forever
    "x_transaction_log_flush_interval": 1,  # a killed run keeps its rows
}


class _ConsoleHandler(logging.Handler):
    """Log lines through the one console, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        CONSOLE.print("warning: " * is_warning + self.format(record), style="yellow" * is_warning, markup=False)


class _Clean(logging.Formatter):
    """Remove secrets and control characters: lines quote paths and rows."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(redact(super().format(record)))


@contextmanager
def _to(handler: logging.Handler, line: str = "%(message)s") -> Iterator[None]:
    """Log to one more place."""
    handler.setFormatter(_Clean(line))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


@contextmanager
def logging_to(file: Path | None = None) -> Iterator[None]:
    """Log kdx's lines in the main process: to the console and, with times, to a file if there is one."""
    log.setLevel(logging.INFO)
    log.propagate = False
    with ExitStack() as stack:
        stack.enter_context(_to(_ConsoleHandler() if is_main() else logging.NullHandler()))
        if is_main() and file:
            lines = "%(asctime)s %(levelname)s %(message)s"
            stack.enter_context(_to(logging.FileHandler(file, encoding="utf-8"), lines))
        yield


@contextmanager
def working(what: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Show the progress of something long on a terminal → a function to call after each part, with words to show."""
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"))
    how: dict[str, Any] = {"transient": True, "speed_estimate_period": 300}
    with Progress(*columns, console=CONSOLE, disable=not (is_main() and CONSOLE.is_terminal), **how) as progress:
        task = progress.add_task(what, total=total, completed=done, words="")
        yield lambda words="": progress.update(task, advance=1, words=words)


class Tracker:
    """The metrics of one run. Trouble with W&B is reported once and never touches training.

    Use it as a context manager: the W&B run is closed, as failed if an exception passes.
    """

    def __init__(self, folder: RunFolder, training: Any) -> None:
        self.file = folder.path / "metrics.jsonl"
        self.folder, self.config = folder, training.config
        self._run, self.name = training, labels.run_name(training.config, training.record)
        self.wandb: Any = None
        self.wandb_line, self.sync = "W&B: disabled", ""
        self._show: Callable[..., None] = lambda words: None
        self._has_warned = False
        self._log_tab = ExitStack()
        kept = training.state.lines  # what comes after the checkpoint goes: a resumed run has each step once
        if is_main() and self.file.exists() and self.file.stat().st_size > kept:
            os.truncate(self.file, kept)

    def __enter__(self) -> "Tracker":
        try:
            if is_main() and (mode := wandb_mode(self.config.tracking.mode)) != "disabled":
                self._open(mode)
        except Exception as error:  # a run never fails because of W&B
            self._has_warned = True
            log.warning("W&B is off for this run: %s", one_line(error))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        code = error.code if isinstance(error, SystemExit) else int(error is not None)
        if code == 1 and self.config.tracking.alerts:
            what = "diverged" if isinstance(error, DivergedError) else "failed"
            self._try(lambda run: run.alert(f"A run {what}", redact(f"{self.name}: {error}"), "ERROR"))
        self._log_tab.close()
        self._try(lambda run: run.finish(exit_code=code))

    def _open(self, mode: Any) -> None:
        """Open the W&B run, under its old id if the run is resumed; kdx's lines go to its log tab, too."""
        config, tracking, id_file = self.config, self.config.tracking, self.folder.path / "wandb_id.txt"
        typed = tracking.tags or [tag for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag]
        run = self.wandb = open_whole(
            mode,
            self.folder.path.parent,  # the files of runs side by side are together, to be synced at once
            id_file.read_text().strip() if id_file.is_file() else secrets.token_hex(4),
            read_lines(self.file),
            project=tracking.project, entity=tracking.entity, group=tracking.group or config.sweep.name,
            name=tracking.name or os.environ.get("WANDB_NAME") or self.name, notes=tracking.notes,
            job_type="baseline" if config.loss.alpha == 0 else "student",
            tags=[*dict.fromkeys([*labels.tags(config, self._run.record), *typed])],
            config=labels.config_of(self._run, self.folder.path),
            timeout=60 if tracking.log_model == "none" else 3600,  # seconds; a student takes long to upload
        )  # fmt: skip
        id_file.write_text(run.id + "\n")  # an agent of a W&B sweep chooses the id itself
        online = [] if run.offline else ["--include-online"]  # without it `wandb sync` skips such a run
        self.sync = shlex.join(["wandb", "sync", *online, str(Path(run.dir).parent)])
        self.wandb_line = f"W&B: offline; to upload: {self.sync}" if run.offline else f"W&B: {run.url}"
        run.define_metric("tokens", hidden=True)
        run.define_metric("*", step_metric="tokens")
        temperature = {"temperature": config.loss.temperature} if config.loss.alpha > 0 else {}
        run.summary.update({"alpha": config.loss.alpha} | temperature)
        tab = SimpleNamespace(write=lambda text: self._try(lambda run: run.write_logs(text)), flush=bool)
        self._log_tab.enter_context(_to(logging.StreamHandler(tab)))

    def header(self, lines: list[str]) -> None:
        """Log what the run is, where it writes, and its page in W&B."""
        for line in [*lines, f"  writes to       {self.folder.path}", f"  {self.wandb_line}"]:
            log.info(line)

    def log(self, state: Any, metrics: dict[str, Any]) -> None:
        """Append one line of metrics, and show it."""
        if not is_main():
            return
        line = {"step": state.step, "tokens": state.tokens, "counted_tokens": state.counted_tokens, **metrics}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._try(lambda run: _log(run, line))
        if "eval/ce" in metrics or not CONSOLE.is_terminal:  # else the progress bar shows it
            shown = [f"{k} {v:,.6g}" for k, v in metrics.items() if v is not None and (k[:5] == "eval/" or k in SHOWN)]
            log.info("step %d/%d  %s", state.step, self._run.max_steps, "  ".join(shown))

    @contextmanager
    def training(self) -> Iterator[None]:
        """Show a progress bar on a terminal while training; elsewhere log() prints plain lines."""
        with working("training", self._run.max_steps, self._run.state.step) as self._show:
            yield

    def advance(self, loss: float, speed: float) -> None:
        self._show(f"loss {loss:.3f}  {speed:.0f} tokens/s")

    def finish(self, summary: dict[str, Any], samples: Lines) -> None:
        """Send final scalars, which dashboards compare and a W&B sweep optimises, the student, and the sample answers."""
        scalars = {
            f"{'eval' if part == 'student' else part}/{key}": value
            for part in ("student", "untouched", "teacher", "run")
            for key, value in summary[part].items()
            if isinstance(value, int | float)
        }
        self._try(lambda run: run.summary.update(scalars))
        student = self.folder.path / "student"
        if self.config.tracking.log_model == "end" and student.is_dir():
            self._try(lambda run: run.log_artifact(str(student), f"student-{run.id}", "model"))
        columns = ["reference", "teacher", "untouched", "student"]
        rows = [[s["prompt"][-1]["content"], *(s[column] or "" for column in columns)] for s in samples]

        def send(run: Any) -> None:
            import wandb

            run.log({"samples": wandb.Table(columns=["prompt", *columns], data=rows)})

        if samples:  # the client asks the server first, and would wait for a lost one
            thread = threading.Thread(target=self._try, args=(send,), daemon=True)
            thread.start()
            thread.join(SAMPLES_PATIENCE)

    def _try(self, action: Callable[[Any], object]) -> None:
        """Do something with the W&B run, if there is one; report its first failure."""
        try:
            if self.wandb is not None:
                action(self.wandb)
        except Exception as error:  # a run never fails because of W&B
            has_warned, self._has_warned = self._has_warned, True  # before the warning, which goes to W&B too
            if not has_warned:
                log.warning("W&B: %s; metrics.jsonl has everything; to upload the rest: %s", one_line(error), self.sync)


def _log(run: Any, line: dict[str, Any]) -> None:
    run.log({name: value for name, value in line.items() if value is not None and name != "step"}, step=line["step"])


def open_whole(mode: Any, folder: Path, id: str, metrics: Sequence[dict[str, Any]] = (), **about: Any) -> Any:
    """Open a W&B run of which all is sent now, and the metrics so far again if an earlier process kept them offline.

    What that one kept and nobody uploaded goes: W&B would count the steps of a second part on from those of the first,
    even if they are the same steps.
    """
    logs = folder.glob(f"wandb/offline-run-*-{id}/run-{id}.wandb")
    earlier = [log.parent for log in logs if not log.with_suffix(".wandb.synced").exists()]
    run = open_run(mode, folder, id, **about)
    for line in metrics if earlier else ():
        _log(run, line)
    for old in earlier:
        shutil.rmtree(old, ignore_errors=True)
    return run


def open_run(mode: Any, folder: Path, id: str, *, timeout: int = 60, **about: Any) -> Any:
    """Open a W&B run whose files lie in folder/wandb; offline where the server cannot be reached."""
    import wandb

    settings = {"finish_timeout": timeout} | SETTINGS
    settings = {name: value for name, value in settings.items() if f"WANDB_{name.upper()}" not in os.environ}
    arguments = redact(about) | {"settings": wandb.Settings(**settings), "dir": str(folder), "id": id}
    arguments["resume"] = "allow"  # offline W&B takes no notice of it
    typed, sys.argv = sys.argv, redact(sys.argv)  # W&B reads it when a run opens
    try:
        return wandb.init(mode=mode, **arguments)
    except Exception as error:
        if mode == "offline" or isinstance(error, AttributeError | TypeError):  # another client than kdx knows
            raise
        log.warning("cannot reach W&B (%s): this run is kept offline", one_line(error))
        with suppress(SystemExit):  # raised if its service failed
            wandb.teardown()  # the client still holds the id
        return wandb.init(mode="offline", **arguments)
    finally:
        sys.argv = typed


def wandb_mode(asked: str) -> Any:
    """Return the mode that is asked for, else that of WANDB_MODE, else online if its client has a key for its server."""
    if mode := os.environ.get("WANDB_MODE") if asked == "auto" else asked:
        return mode
    import wandb

    return "online" if wandb.login(prompt=False, verify=False) else "offline"


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
