"""One run, from config to saved student: the architecture as code."""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from kdx import nonfinite, plugins
from kdx.causal_lm import DTYPES
from kdx.config import Config
from kdx.errors import DivergedError, MachineError
from kdx.evaluate import MEASURES, HeldOut, Measures, peak_memory
from kdx.measuring import Measurer, size
from kdx.optim import build_optimizer, build_schedule
from kdx.prepare import MAX_NEW_TOKENS, Prepared, bytes_on_disk, check_names, check_room, prepare
from kdx.run import checkpoint, drift, report, typed
from kdx.run import sharding as shards
from kdx.run.devices import keep_memory
from kdx.run.files import digest_of, reserve, usage_of, write_beside
from kdx.run.folder import Record, RunFolder
from kdx.run.identity import identity
from kdx.run.launch import build_accelerator
from kdx.run.signals import Stopped, StopRequest
from kdx.run.tracking import CONSOLE, Tracker, log, logging_to, quiet_libraries
from kdx.state import State
from kdx.student import describe, save_student
from kdx.train import keep_best, train

KEPT_SAMPLES = ("teacher_samples", "untouched_samples")
BESIDE_WEIGHTS = 2**26  # bytes at most of a student's tokenizer, and of a run's measures and samples
FEW_TOKENS = 2000  # below so many counted held-out tokens, measures wander more than most choices move them


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


def distill(config: Config, run_dir: Path, record: Record | None = None) -> Summary:
    """Run one distillation in a folder of its own, or go on with the one that is there.

    accepted: called in the process that writes there, once config, data and models are found to be that run's.

    Raises KdxError for what a user can mend. A folder whose run is done is left as it is, and its summary returned, or
    ConfigError raised if its data, teacher, tokenizer or plug-ins have changed since.
    """
    quiet_libraries()
    accelerator = build_accelerator(config)
    (told,) = broadcast_object_list([str(run_dir)])  # every process works in rank 0's folder
    run_dir = Path(told)
    folder = RunFolder(run_dir)
    done = folder.done(asdict(config))
    if done is not None:
        if accelerator.is_main_process:
            folder.say_done(done)
        return Summary(**done)
    is_main = accelerator.is_main_process
    accelerator.wait_for_everyone()  # all have looked before rank 0 writes
    with StopRequest(run_dir) as stop, folder.open(asdict(config), is_main):
        if is_main:
            plugins.keep(run_dir)
            write_beside(run_dir / "identity.json", json.dumps(identity(config)))
            if record:
                typed.keep(run_dir, record.words, record.command)
        if True:
            with logging_to(run_dir / "kdx.log", is_main), folder.reporting(is_main):
                check_names(config)
                summary = _run(config, folder, accelerator, stop)
            if stop.signal is not None:  # it came while the results were written: no other job begins
                raise stop.stopped()
    return summary


def _run(config: Config, folder: RunFolder, accelerator: Accelerator, stop: StopRequest) -> Summary:
    began = time.time()
    is_main = accelerator.is_main_process
    run = prepare(config, accelerator, owner=hashlib.sha256(str(folder.path.resolve()).encode()).hexdigest()[:8])
    check_room(run, folder.path)
    optimizer = build_optimizer(config.optim, run.student)
    schedule = build_schedule(config.optim, optimizer, run.max_steps)
    module, optimizer, run.student = shards.prepare(accelerator, run.objective, optimizer)
    torch.manual_seed(config.train.seed + accelerator.process_index)  # dropout; fresh weights are drawn by now
    origin = run.origin | {"processes": accelerator.num_processes}
    origin |= {"shards": "FSDP"} if accelerator.is_fsdp2 else {}
    prints = {name: origin[name] for name in ("fingerprint", "validation_fingerprint")}
    store = run.teacher.store if run.teacher else None
    versions = drift.versions(**{"teacher.store": "on" if store else "off", "precision": run.precision()})
    of = drift.digest(asdict(config), origin)
    resumed = folder.resume(run.student, optimizer, schedule, origin, versions, accelerator, of)
    if resumed:
        shards.spread(run.student, run.objective)
    state = resumed or State(of=of, versions=versions)
    if store and not store.rows.go_back(state.store):
        why = f"the teacher's store lacks rows that this run kept in it up to step {state.step}"
        drift.mark(state.other_versions, [why])
    before = folder.kept("untouched.json", origin) if resumed else None
    accelerator.wait_for_everyone()  # all have looked before rank 0 writes
    folder.max_steps = run.max_steps

    place = {"max_steps": run.max_steps, "first_step": state.step, "lines": state.lines}
    tracker = Tracker(folder.path, config.tracking, is_main=is_main, **place)
    room = reserve_results(run, folder.path)
    exit_code = 1
    try:
        name = folder.name(config)
        tracker.start_wandb(folder.path, folder.wandb_dir(config), name, config)
        for line in [*report.header(run), f"  writes to       {folder.path}", f"  {tracker.wandb_line}"]:
            log.info(line)
        measure = Measurer(run, HeldOut.build(run.held_out_rows, run.batches, accelerator.device, run.num_ids))
        if before is None and resumed:  # the student has learnt since
            what = "is missing or damaged: what the untouched student measured is not known"
            raise MachineError(str(folder.path / "untouched.json"), what, "Start anew in another folder")
        if before is None:
            with shards.whole(run.objective, run.student):
                before = measure.before_training(run)
            if is_main:
                folder.keep("untouched.json", before | origin)
        warn_about(run, before)
        if run.teacher is not None and config.loss.alpha == 0:
            measure.ask()  # a run that goes on has not asked yet
            run.teacher.free()

        def stop_asked() -> bool:
            folder.at(state.step, is_main)
            stop.is_agreed = bool(
                accelerator.gather(torch.tensor([int(stop.signal or 0)], device=accelerator.device)).max()
            )
            return stop.is_asked

        def measured_on_the_way() -> dict[str, float | None] | None:
            try:
                return measure(accelerator.autocast(), stop.check)[0].means()
            except Stopped:
                return None

        keep_memory(accelerator.device.type)
        with tracker.training():
            state = train(
                config.train,
                accelerator=accelerator,
                objective=run.objective,
                module=module,
                optimizer=optimizer,
                student=run.student,
                schedule=schedule,
                batches=run.batches,
                teacher=run.teacher,
                max_steps=run.max_steps,
                state=state,
                tracker=tracker,
                measure=measured_on_the_way,
                stop_asked=stop_asked,
                run_dir=folder.path,
                describe=lambda beside: describe(run.student, run.tokenizer, beside),
            )
        (is_kept,) = broadcast_object_list([checkpoint.is_at(folder.path, state.step)])  # others may see it late
        if (is_kept or state.stopped_by == "signal") and stop.is_asked:
            log.warning("stopped after step %d", state.step)
            raise stop.stopped()

        shards.gather(run.objective, run.student)
        kept_step = choose_weights(run, state, folder, lambda: measure(accelerator.autocast())[0].means())
        # Measured as it is saved: without autocast, in the dtype on disk, so that anyone can measure the same.
        run.student.to(DTYPES[config.student.save_dtype])
        final, _ = measure(nullcontext())
        measures = final.means()
        check_final(state, measures)
        tracker.log(state, {f"eval/{name}": measures[name] for name in MEASURES})
        samples = joined(measure.prompts, before, measure.answers(run.student))
        summary = Summary(
            student=measures | size(run.student),
            untouched=before["untouched"],
            teacher=before["teacher"],
            run={
                "name": name,
                "formula": run.objective.objective.formula(),
                "steps": state.step,
                "kept_step": kept_step,
                "stopped_by": state.stopped_by,
                "num_nonfinite": state.num_nonfinite,
                "other_versions": state.other_versions,
                "tokens": state.tokens,
                "counted_tokens": state.counted_tokens,
                "seconds": time.time() - began,
                "seconds_per_step": statistics.median(state.step_seconds) if state.step_seconds else None,
                "tokens_per_second": state.tokens / state.seconds if state.seconds else None,
                "peak_memory_bytes": peak_memory(accelerator.device),
                "store": asdict(store.counts) | {"bad": store.rows.num_bad} if store else None,
            },
            data=run.counts() | prints,
            environment=report.environment(run, folder.path),
        )
        if is_main:
            room.close()  # for what now takes it
            tracker.keep_lines()
            summary = leave(run, folder, summary, final, samples)
            folder.write_status("done", "", is_main)
            if not config.train.keep_checkpoints:
                checkpoint.remove(folder.path)
            tracker.samples(samples)
            tracker.summary(asdict(summary))
            CONSOLE.print(report.closing_table(asdict(summary)))
            if store:
                log.info(report.store_line(store))
            has = {"has_student": run.max_steps > 0, "has_samples": bool(samples)}
            for line in report.next_commands(folder.path, typed.told(folder.path), **has):
                log.info(line)
        try:
            accelerator.wait_for_everyone()
        except RuntimeError as error:
            if not is_main:
                raise
            log.warning("another process of this run ended before: %s", str(error).splitlines()[0])
        exit_code = 0
        return summary
    except Stopped:
        exit_code = 143
        raise
    finally:
        room.close()
        if store:
            store.close()
        tracker.finish(exit_code)


def reserve_results(run: Prepared, folder: Path) -> IO[bytes]:
    """Hold room for the student and what lies beside its weights, so that whatever fills the disk costs no student."""
    if not run.accelerator.is_main_process:
        return reserve(folder, 0)
    student, _, _ = bytes_on_disk(run)
    return reserve(folder, student + min(BESIDE_WEIGHTS, usage_of(folder).free // 4))


def warn_about(run: Prepared, before: dict[str, Any]) -> None:
    """Say what makes the measures, or the distillation, doubtful."""
    counted = sum(row.num_counted for row in run.held_out_rows)
    if not run.held_out_rows:
        log.warning("nothing is held out (data.validation=null): this run cannot be compared with others")
    elif counted < FEW_TOKENS:
        log.warning("only %d counted held-out tokens: measures are uncertain; raise data.validation", counted)
    teacher, untouched = before["teacher"]["ce"], before["untouched"]["ce"]
    if teacher is not None and untouched is not None and teacher > untouched:
        log.warning(
            "the teacher's held-out CE (%.3f) is above the untouched student's (%.3f): distillation will pull towards "
            "a worse model on these rows; a wrong chat template is the usual cause",
            teacher,
            untouched,
        )


def choose_weights(
    run: Prepared, state: State, folder: RunFolder, measure: Callable[[], dict[str, float | None]]
) -> int:
    """Leave the last or the best weights in the student → the step they are from."""
    if run.config.train.keep == "last" or state.step == 0:
        return state.step
    best_file = checkpoint.folder_of(folder.path) / "best.safetensors"
    if run.max_steps == state.step:  # the last step's measure is still to be taken
        keep_best(run.config.train, state, measure(), run.accelerator, run.student, best_file)
    run.accelerator.wait_for_everyone()
    if state.best_step == 0:
        mend = "Lower optim.lr, or set train.keep=last"
        raise DivergedError(f"step {state.step}", "no held-out measure was finite, so there is no best step", mend)
    if state.best_step != state.step:
        is_main = run.accelerator.is_main_process  # it alone knows the digest of what it wrote
        is_damaged = is_main and bool(state.best_digest) and digest_of(best_file) != state.best_digest
        if broadcast_object_list([is_damaged])[0]:
            what = f"is damaged: the best weights, of step {state.best_step}, are lost there"
            mend = "The same command goes on from the newest checkpoint, which has them too"
            raise MachineError(str(best_file), what, mend)
        checkpoint.load_weights(best_file, run.student)
    return state.best_step


def check_final(state: State, measures: dict[str, float | None]) -> None:
    """Refuse to call a run done whose measures could rank anywhere. Raises DivergedError."""
    if 0 < state.step == state.num_nonfinite:
        raise DivergedError(f"step {state.step}", "every step was skipped: nothing is learnt", nonfinite.MEND)
    wrong = [name for name in MEASURES if measures[name] is not None and not math.isfinite(measures[name] or 0.0)]
    if wrong:
        what = f"of the student's held-out measures {', '.join(wrong)} are not finite; no student is saved"
        raise DivergedError(f"step {state.step}", what, "Lower optim.lr, or set train.keep=best with train.eval_every")


def joined(prompts: list[dict[str, Any]], before: dict[str, Any], student: list[str | None]) -> list[dict[str, Any]]:
    """The sample answers of all, prompt by prompt."""
    nothing = [None] * len(prompts)  # where tracking.samples was another when the run began
    kept = [before[name] if len(before[name]) == len(prompts) else nothing for name in KEPT_SAMPLES]
    told = zip(prompts, *kept, student, strict=True)
    return [
        {"prompt": p["messages"], "reference": p["reference"], "teacher": t, "untouched": u, "student": s}
        for p, t, u, s in told
    ]


def leave(
    run: Prepared, folder: RunFolder, summary: Summary, final: Measures, samples: list[dict[str, Any]]
) -> Summary:
    """Write the student and the results → the summary, with the student's size on disk."""
    if run.max_steps > 0:
        target = folder.path / "student"
        save_student(run.student, run.tokenizer, target)
        num_bytes = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        summary = replace(summary, student=summary.student | {"num_bytes": num_bytes})
        card = report.model_card(asdict(run.config), asdict(summary))
        write_beside(target / "README.md", card)
    page = report.samples_page(samples, MAX_NEW_TOKENS)
    folder.write_results(asdict(summary), final.rows, samples, page)
    return summary
