"""One run, from config to saved student: the architecture as code."""

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from kdx import plugins
from kdx.build import (
    build_batches,
    build_objective,
    build_student,
    build_teacher,
    check_names,
    is_repeated,
    rows_to_ask,
)
from kdx.config import Config
from kdx.data.encode import load_data
from kdx.evaluate import MAX_NEW_TOKENS, NUM_SAMPLES, Judge
from kdx.run import report, results
from kdx.run.folder import Record, RunFolder
from kdx.run.launch import build_accelerator
from kdx.run.signals import StopRequest
from kdx.run.tracking import CONSOLE, Tracker, logging_to, quiet_libraries
from kdx.tokenizer import load_tokenizer
from kdx.train import Training, train


@dataclass(frozen=True)
class Summary:
    """What a run leaves in summary.json."""

    student: dict[str, Any]
    untouched: dict[str, Any]
    teacher: dict[str, Any]
    run: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]

    @property
    def measure(self) -> float:
        """What a sweep compares: held-out KL(teacher ‖ student) at temperature 1, or CE without a teacher."""
        value = self.student["kl"] if self.student["kl"] is not None else self.student["ce"]
        return math.inf if value is None else float(value)


def distill(config: Config, path: Path, record: Record | None = None) -> Summary:
    """Run one distillation in a folder of its own, or resume the one that is there.

    record: what was typed; None for a run that is started from Python. A folder whose run is done is left as it is,
    and its summary returned. Raises KdxError for what a user can correct, Stopped after a signal.
    """
    quiet_libraries()
    plugins.load()
    machine = build_accelerator(config)
    (path,) = map(Path, broadcast_object_list([str(path)]))  # every process works in rank 0's folder
    folder, is_main = RunFolder(path), machine.is_main_process
    record = record or Record(words=config._words, command=config._words)
    if folder.is_done(config):
        CONSOLE.print(f"{path} is done already", markup=False)
        return Summary(**folder.summary())
    machine.wait_for_everyone()  # all have looked before rank 0 writes
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest(path))
        stack.enter_context(folder.claim(config, record, is_main))
        stack.enter_context(logging_to(path / "kdx.log", is_main))
        started = time.time()
        check_names(config)
        tokenizer, max_length = load_tokenizer(config)
        data = load_data(config.data, tokenizer, max_length, NUM_SAMPLES, MAX_NEW_TOKENS)
        batches = build_batches(config, data.train, tokenizer, machine)
        asked, repeats = rows_to_ask(config, data, batches), is_repeated(config, record, batches)
        teacher = build_teacher(config, machine.device, max_length, asked, is_repeated=repeats)
        if teacher is not None:
            stack.callback(teacher.close)
        student = build_student(config, machine.device, max_length)
        objective = build_objective(config, student, teacher, tokenizer)
        training = Training(config, objective, teacher, batches, tokenizer, max_length, machine)
        judge = Judge(data, training, stop)
        folder.max_steps = training.max_steps
        folder.begin(results.facts(data, training))  # refused if it is another run's
        if not training.restore(folder):
            results.check_room(training, path)
            with training.whole():
                folder.keep("untouched.json", judge.before_training(training.student))
        judge.free_teacher()
        with Tracker(folder, config, record, training, is_main=is_main) as tracker:
            tracker.header(report.header(config, record, data, training))
            results.warn_about(folder, data)
            if not training.is_finished:
                with tracker.training():
                    train(training, judge, tracker, folder, stop)
            results.keep_student(training, folder)  # before it is measured: nothing there can cost training
            summary = results.finish(training, judge, data, folder, tracker, started)
            (summary,) = broadcast_object_list([summary])  # the main process made it
    return Summary(**summary)
