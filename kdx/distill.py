"""One run, from config to saved student: the architecture as code."""

import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from kdx import plugins
from kdx.causal_lm import head_of
from kdx.config import Config, as_dict
from kdx.data.encode import Data, load_data
from kdx.errors import DivergedError
from kdx.evaluate import MAX_NEW_TOKENS, MEASURES, NUM_SAMPLES, Judge
from kdx.objective import Objective, mix_of
from kdx.run import checkpoint, report
from kdx.run.devices import keep_memory
from kdx.run.folder import Record, RunFolder
from kdx.run.launch import build_accelerator
from kdx.run.signals import StopRequest
from kdx.run.tracking import CONSOLE, Tracker, log, logging_to, quiet_libraries, run_name
from kdx.student import cast, load_student, save_student, saved_dtype
from kdx.teacher import load_teacher
from kdx.tokenizer import count_ids, load_tokenizer
from kdx.train import HINT, Training, build_batches, check_names, train


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
    folder, record, is_main = RunFolder(path), record or Record(), machine.is_main_process
    if folder.is_done(config):
        log.info("%s is done already", path)
        return Summary(**folder.summary())
    machine.wait_for_everyone()  # all have looked before rank 0 writes
    with folder.claim(config, record, is_main), StopRequest(path) as stop, logging_to(path / "kdx.log", is_main):
        began = time.time()
        check_names(config)
        tokenizer, max_length = load_tokenizer(config)
        data = load_data(config.data, tokenizer, max_length, NUM_SAMPLES, MAX_NEW_TOKENS)
        batches = build_batches(config, data, tokenizer, machine)
        teacher = load_teacher(config, data, batches, tokenizer, machine.device, max_length, record, path)
        student = load_student(config, machine.device, max_length)
        heads = {"student": head_of(student)} | ({"teacher": teacher.head} if teacher else {})
        objective = Objective(student, count_ids(tokenizer, heads), mix_of(config.loss))
        training = Training(config, objective, teacher, batches, tokenizer, machine)
        judge = Judge(data, training, stop)
        folder.begin(facts(data, teacher, training))
        if not training.restore(folder):
            check_room(training, path)
            folder.keep("untouched.json", judge.before_training(), is_main)
        warn_about(folder.kept("untouched.json"), data)
        with Tracker(folder, config, record, training, is_main=is_main) as tracker:
            tracker.header(report.header(config, record, data, training))
            if not training.is_finished:
                judge.ask_teacher()
                train(training, judge, tracker, folder, stop)
                save(training, folder)
            summary = finish(training, judge, data, folder, tracker, began)
    return summary
