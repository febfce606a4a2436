"""What a run leaves: first the student, then its measures, samples, summary and model card."""

import math
import time
from pathlib import Path
from typing import Any

import xxhash

from kdx.adapter import is_adapted, trained
from kdx.causal_lm import DTYPES
from kdx.config import GENERATED
from kdx.data.encode import Data
from kdx.errors import DivergedError, MachineError
from kdx.evaluate import Judge, Means, peak_memory
from kdx.optim import state_bytes
from kdx.run import checkpoint, report
from kdx.run.files import in_bytes, read_lines, remove, usage_of, write_beside, write_json, write_lines
from kdx.run.folder import RunFolder
from kdx.run.signals import is_main
from kdx.run.tracking import CONSOLE, Tracker, log
from kdx.student import save_student
from kdx.train import HINT, Training

FEW_TOKENS = 2000  # below so many counted held-out tokens, measures vary more than most choices move them


def facts(training: Training) -> dict[str, Any]:
    """Return what a started run knows of itself beside its identity; a resumed run must have the same."""
    data, teacher, machine = training.data, training.teacher, training.machine
    is_answered = training.config.rollout.name == "teacher"  # if nothing is stored, perhaps otherwise next time
    return {
        "fingerprint": data.fingerprint,
        "validation_fingerprint": data.held_out_fingerprint,
        "teacher_precision": teacher.identity.precision if teacher else None,
        "processes": machine.num_processes,
        "shards": "FSDP" if machine.is_fsdp2 else None,
        "answers": xxhash.xxh3_64_hexdigest("".join(data.train.digests).encode()) if is_answered else None,
    }


def bytes_on_disk(training: Training) -> tuple[int, int, int]:
    """Estimate the bytes of the student, of the best weights so far, and of a checkpoint; 0 for what is not saved."""
    student, config = training.student, training.config
    weights = student.num_parameters() * DTYPES[training.save_dtype].itemsize
    tensors = list((trained(student) if is_adapted(student) else dict(student.named_parameters())).values())
    num, one = sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
    best = one if config.train.keep == "best" else 0
    is_saved = config.train.save_every or config.train.save_minutes
    moments = round(num * state_bytes(config.optim, tensors[0])) if is_saved else 0
    student_bytes = one if is_adapted(student) and config.adapter.save == "adapter" else weights
    return student_bytes, best, one + best + moments if is_saved else 0


def check_room(training: Training, path: Path) -> None:
    """Refuse a run whose student and checkpoints do not fit on its disk. Raises MachineError.

    Checkpoints by time are only warned about: the run may be done before the first.
    """
    config = training.config.train
    student, best, one = bytes_on_disk(training)
    is_saved = 0 < config.save_every < training.max_steps
    checkpoints, free = (checkpoint.KEPT + 1) * one, usage_of(path).free
    needed = student + best + checkpoints * is_saved
    if needed <= free < student + best + checkpoints:
        log.warning("checkpoints may need %s, but only %s are free", in_bytes(checkpoints), in_bytes(free))
    if needed > free:
        what = f"the student and its checkpoints need {in_bytes(needed)}, but only {in_bytes(free)} are free"
        hint = "Free some space, or choose another disk with hydra.run.dir=..."
        raise MachineError(str(path), what, hint + "; train.save_every=0 writes fewer checkpoints" * is_saved)


def warn_about(folder: RunFolder, data: Data) -> None:
    """Warn about what makes the measures, or the distillation, doubtful."""
    if not is_main():
        return
    untouched = folder.kept("untouched.json")
    counted = int(data.held_out.num_counted.sum())
    if not counted:
        log.warning("nothing is held out: this run cannot be compared with others")
    elif counted < FEW_TOKENS:
        log.warning("only %d counted held-out tokens: measures are uncertain; raise data.validation", counted)
    teacher, student = untouched["teacher"]["ce"], untouched["untouched"]["ce"]
    if (teacher or 0.0) > (student or math.inf):
        log.warning(
            "the teacher's held-out CE (%.3f) is above the untouched student's (%.3f): distillation will pull towards "
            "a worse model on these rows; a wrong chat template is the usual cause", teacher, student,
        )  # fmt: skip


def keep_student(training: Training, folder: RunFolder) -> None:
    """Save the student in the dtype it is measured in, and note that its training is finished.

    With student/ and trained.json the same command goes straight to measuring, whatever happens there.
    """
    if not training.is_finished:
        training.choose_weights(folder)
    state = training.state
    if state.step < training.max_steps:
        log.info("stopped early, after step %d: no better measure since step %d", state.step, state.best_step)
    if training.kept_step < state.step:
        log.info("the student has the weights of step %d, the best measured (train.keep=best)", training.kept_step)
    training.as_saved()
    if not training.is_finished and training.max_steps > 0:
        if training.machine.is_main_process:
            save_student(training.student, training.tokenizer, folder.path / "student")
            trained = {"max_steps": training.max_steps, "state": training.saved_state(folder)}
            write_json(folder.path / "trained.json", trained)
        training.machine.wait_for_everyone()
    training.student.to(training.machine.device)  # merged with a base that was quantised, it is in main memory


def finish(training: Training, judge: Judge, folder: RunFolder, tracker: Tracker) -> dict[str, Any]:
    """Measure the student as it was saved, and write what the run leaves → the summary. Raises DivergedError."""
    config, state, student, path = training.config, training.state, training.student, folder.path
    training.free()
    final = judge(student, as_saved=True)
    measures = final.means()
    _check_finite(training, measures)
    said = judge.answered(student, is_final=True)
    logged = measures | said.means() if config.eval.metric in GENERATED else measures
    tracker.log(state, {f"eval/{name}": value for name, value in logged.items()})
    if not training.machine.is_main_process:
        return {}
    before = folder.kept("untouched.json")
    columns = (judge.prompts, before["teacher_samples"], before["untouched_samples"], judge.samples(said))
    samples = [
        {"prompt": prompt["messages"], "reference": prompt["reference"], "teacher": t, "untouched": u, "student": s}
        for prompt, t, u, s in zip(*columns, strict=False)
    ]  # none if tracking.samples was off when the run began
    store = training.teacher.store if training.teacher else None
    pulls = [value for line in read_lines(tracker.file) if (value := line.get("train/effective_alpha")) is not None]
    size = {"num_parameters": student.num_parameters()}  # of both: before training it counted adapters, too
    summary = {
        "student": measures | said.means() | size,
        "untouched": before["untouched"] | size,
        "teacher": before["teacher"],
        "run": {
            "name": tracker.name,
            "formula": training.objective.mix.formula(),
            "steps": state.step,
            "kept_step": training.kept_step,
            "stopped_by": "early_stopping" if state.step < training.max_steps else "max_steps",
            "num_nonfinite": state.num_nonfinite,
            "other_versions": state.other_versions,
            "effective_alpha_start": pulls[0] if pulls else None,
            "effective_alpha_end": pulls[-1] if pulls else None,
            "tokens": state.tokens,
            "counted_tokens": state.counted_tokens,
            "seconds": time.time() - training.started,
            "seconds_per_step": state.seconds / state.step if state.step else None,
            "tokens_per_second": state.tokens / state.seconds if state.seconds else None,
            "peak_memory_bytes": peak_memory(training.machine.device),
            "store": store.counts if store else None,
        },
        "data": report.counts(training.data),
        "environment": report.environment(training, path),
    }
    if (path / "student").is_dir():
        write_beside(path / "student" / "README.md", report.model_card(config, summary))
    write_lines(path / "eval_rows.jsonl", final.rows)
    if said.rows:
        write_lines(path / "eval_answers.jsonl", said.rows)
    write_json(path / "samples.json", samples)
    own = read_lines(path / "rollouts.jsonl")
    write_beside(path / "samples.md", report.samples_page(samples, own))
    write_json(path / "summary.json", summary)
    if not config.train.keep_checkpoints:
        remove(path / checkpoint.FOLDER)
    folder.write_status("done")
    tracker.finish(summary, samples)
    CONSOLE.print(report.closing_table(summary))
    if {*pulls} - {0, 1}:
        words = "effective alpha (the teacher's share of the gradient): %.2f when first logged, %.2f at the end"
        log.info(words, pulls[0], pulls[-1])
    if store:
        log.info(report.store_line(store))
    for line in report.next_commands(path, config, training.record, has_samples=bool(samples)):
        log.info(line)
    return summary


def _check_finite(training: Training, measures: Means) -> None:
    """Refuse to call a run done whose measures could rank anywhere. Raises DivergedError."""
    if training.state.step and not training.state.num_updates:
        what = "every step was skipped: the student learnt nothing"
        raise DivergedError(f"step {training.state.step}", what, HINT)
    wrong = [name for name, value in measures.items() if not math.isfinite(value or 0.0)]
    if wrong:
        what = f"the student's held-out {', '.join(wrong)} are not finite; it is never ranked"
        raise DivergedError(f"step {training.state.step}", what, "Lower optim.lr, or set train.keep=best")
