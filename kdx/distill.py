"""One run, from config to saved student: the architecture as code."""

import dataclasses
import json
import logging
import math
import platform
import subprocess
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from kdx import __version__, checkpoint, loss, report
from kdx.batches import Encoder, Row, StepBatches, fingerprint, pad_id_of, prepare_tokenizer
from kdx.causal_lm import (
    DTYPES,
    attention_for,
    common_ids,
    device_dtype,
    head_of,
    load_config,
    load_tokenizer,
    num_positions,
)
from kdx.config import Config
from kdx.data import Conversation, Dataset, check_source, load_data
from kdx.errors import ConfigError, MachineError, ModelError
from kdx.evaluate import MEASURES, HeldOut, Measures, answer
from kdx.objective import Objective, StudentObjective
from kdx.optim import build_optimizer, build_schedule, optimizer_class
from kdx.redact import redact
from kdx.run_folder import RunFolder, StopRequest
from kdx.student import answer_greedily, load_student, save_student
from kdx.teacher import Teacher, load_teacher
from kdx.tracking import CONSOLE, Tracker, logging_to, quiet_libraries, working
from kdx.train import State, keep_best, peak_memory, train

log = logging.getLogger(__name__)

NUM_SAMPLES = 3
MAX_NEW_TOKENS = 48
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


def check_names(config: Config) -> None:
    """Check the names and options that only registries know, before any data or model is read."""
    if config.loss.name != "cross_entropy":
        try:
            loss.check_options(config.loss.name, config.loss.options)
        except ValueError as error:
            raise ConfigError("loss", str(error), "See conf/loss/; one's own: KDX_PLUGINS=module") from None
    elif config.loss.options:
        known = "alpha, temperature, scale_by_temperature"
        raise ConfigError(f"loss.{next(iter(config.loss.options))}", "is not an option here", f"It takes: {known}")
    optimizer_class(config.optim)
    check_source(config.data)


def distill(config: Config, run_dir: Path) -> Summary:
    """Run one distillation in a folder of its own, or go on with the one that is there.

    Raises KdxError for what a user can mend. A folder whose run is done is left as it is, and its summary returned.
    """
    check_names(config)
    folder = RunFolder(run_dir)
    done = folder.done()
    if done is not None:
        log.info("%s is done already; nothing to do", run_dir)
        return Summary(**done)
    quiet_libraries()
    accelerator = build_accelerator(config)
    is_main = accelerator.is_main_process
    folder.open(asdict(config), is_main)
    with logging_to(run_dir / "kdx.log", is_main), folder.reporting(is_main), StopRequest() as stop:
        return _run(config, folder, accelerator, stop)


def _run(config: Config, folder: RunFolder, accelerator: Accelerator, stop: StopRequest) -> Summary:
    began = time.time()
    device, is_main = accelerator.device, accelerator.is_main_process
    train_config = config.train
    dtype = torch.float64 if train_config.precision == "fp64" else torch.float32
    has_teacher = config.teacher.path is not None

    # Text first: all faults in the data are found before any weights are read.
    tokenizer, max_length = load_tokenizers(config)
    template = prepare_tokenizer(tokenizer, config.data)
    data = load_data(config.data)
    encoder = Encoder(tokenizer, max_length, config.data.on_long, config.data.assistant_only)
    rows, held_out_rows = encoder.encode(data.train), encoder.encode(data.validation)
    if not rows:
        what = f"no training row is left ({report.rules(dict(data.dropped + encoder.dropped))})"
        raise ConfigError("data.max_length", what, "Raise it, or give other data")

    # Then the models.
    teacher = load_teacher(config.teacher, device, max_length) if has_teacher else None
    attention = attention_for(config.student, device, max_length)
    student = load_student(
        config.student, config.teacher, dtype=dtype, attn_implementation=attention, seed=train_config.seed
    )
    student.to(device)
    answer_greedily(student, MAX_NEW_TOKENS)
    num_ids = count_ids(tokenizer, student, teacher)
    student.config.use_cache = False
    if train_config.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if train_config.compile:
        student.base_model.compile()

    # What one step is.
    batches = StepBatches(
        rows,
        batch_size=train_config.batch_size,
        micro_batch_size=micro_batch_size(config, accelerator.num_processes),
        seed=train_config.seed,
        shuffle=config.data.shuffle,
        pad_id=pad_id_of(tokenizer),
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    max_steps = train_config.max_steps
    if max_steps is None:
        assert train_config.epochs is not None
        max_steps = math.ceil(train_config.epochs * batches.steps_per_epoch)
    formula = Objective(
        name=config.loss.name,
        alpha=config.loss.alpha,
        temperature=config.loss.temperature,
        scale_by_temperature=config.loss.scale_by_temperature,
        options=config.loss.options,
    )
    objective = StudentObjective(student, num_ids, formula)
    optimizer = build_optimizer(config.optim, student)
    schedule = build_schedule(config.optim, optimizer, max_steps)
    torch.manual_seed(train_config.seed)  # dropout; a fresh student has drawn its weights by now
    prints = {"fingerprint": fingerprint(rows), "validation_fingerprint": fingerprint(held_out_rows)}
    state = folder.resume(student, optimizer, schedule, prints)

    tracker = Tracker(
        folder.path, config.tracking, is_main=is_main, max_steps=max_steps, first_step=state.step if state else 0
    )
    state = state or State()
    exit_code = 1
    try:
        tracker.start_wandb(
            folder.path, folder.wandb_dir(config), folder.name(config), config.sweep.name, asdict(config)
        )
        for line in header(
            config,
            accelerator,
            student,
            teacher,
            data,
            encoder,
            rows,
            held_out_rows,
            batches,
            max_steps,
            formula,
            template,
        ):
            log.info(line)
        log.info("  writes to       %s  ·  %s", folder.path, tracker.wandb_line)

        # Measure teacher and untouched student once, at temperature 1.
        held_out = HeldOut.build(
            held_out_rows,
            batch_size=max(batches.micro_batch_size, 8),
            pad_id=batches.pad_id,
            device=device,
            num_ids=num_ids,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        prompts = sample_prompts(config, data)
        if teacher is not None and held_out_rows:
            with working("the teacher reads the held-out rows", len(held_out.batches), is_main) as advance:
                held_out.ask(teacher, advance)

        def measure_with(precision: Any, what: str) -> tuple[Measures, Measures]:
            if not held_out_rows:
                return Measures([]), Measures([])
            with working(what, len(held_out.batches), is_main) as advance:
                return held_out.measure(student, precision, advance)

        kept = folder.untouched()
        if kept is None:
            ours, theirs = measure_with(accelerator.autocast(), "measuring the untouched student")
            kept = {
                "untouched": ours.means(),
                "teacher": theirs.means(),
                "teacher_samples": answers(teacher.model if teacher else None, tokenizer, prompts),
                "untouched_samples": answers(student, tokenizer, prompts),
            }
            folder.keep_untouched(kept, is_main)
        untouched, teacher_measures = kept["untouched"], kept["teacher"]
        warn_about(untouched, teacher_measures, held_out_rows)
        if teacher is not None and formula.alpha == 0:
            teacher.free()

        # Train.
        with tracker.training(), stop.deferred():
            train(
                train_config,
                accelerator=accelerator,
                objective=objective,
                optimizer=optimizer,
                schedule=schedule,
                batches=batches,
                teacher=teacher,
                max_steps=max_steps,
                state=state,
                tracker=tracker,
                measure=lambda: measure_with(accelerator.autocast(), "measuring")[0].means(),
                stop_asked=lambda: stop.agreed(accelerator),
                run_dir=folder.path,
            )
        if state.stopped_by == "signal":
            exit_code = stop.exit_code
            raise stop.interrupted(folder.path, state.step)

        # Choose the weights, and measure them as they will be saved: without autocast, in the dtype on disk.
        kept_step = state.step
        if train_config.keep == "best" and state.step > 0:
            last = measure_with(accelerator.autocast(), "measuring")[0].means()
            best_file = checkpoint.folder_of(folder.path) / "best.safetensors"
            keep_best(train_config, state, last, accelerator, objective, best_file)
            accelerator.wait_for_everyone()
            kept_step = state.best_step
            if kept_step != state.step:
                checkpoint.load_weights(best_file, student)
        if max_steps > 0:
            student.to(DTYPES[config.student.save_dtype])
        student.config.use_cache = True
        final, _ = measure_with(nullcontext(), "measuring the student")
        measures = final.means()
        tracker.log(state, {f"eval/{name}": measures[name] for name in MEASURES})
        student_samples = answers(student, tokenizer, prompts)

        samples = [
            {"prompt": p["messages"], "reference": p["reference"], "teacher": t, "untouched": u, "student": s}
            for p, t, u, s in zip(
                prompts, kept["teacher_samples"], kept["untouched_samples"], student_samples, strict=True
            )
        ]
        tokens = encoder_counts(data, encoder, rows, held_out_rows)
        summary = Summary(
            student=measures | sizes(student),
            untouched=untouched | sizes(student, None),
            teacher=teacher_measures
            | {"num_parameters": teacher.num_parameters if teacher else None, "num_bytes": None},
            run={
                "name": folder.name(config),
                "formula": formula.formula(),
                "steps": state.step,
                "kept_step": kept_step,
                "stopped_by": state.stopped_by if state.step else "max_steps",
                "tokens": state.tokens,
                "counted_tokens": state.counted_tokens,
                "seconds": time.time() - began,
                "seconds_per_step": state.seconds_per_step,
                "tokens_per_second": state.tokens / state.seconds if state.seconds else None,
                "peak_memory_bytes": peak_memory(device),
            },
            data=tokens | prints,
            environment=environment(config, accelerator, teacher),
        )
        if is_main:
            if max_steps > 0:
                card = report.model_card(asdict(config), asdict(summary))
                save_student(student, tokenizer, folder.path / "student", config.student.save_dtype, card)
                size = sum(f.stat().st_size for f in (folder.path / "student").glob("*.safetensors"))
                summary = dataclasses.replace(summary, student=summary.student | {"num_bytes": size})
                card = report.model_card(asdict(config), asdict(summary))
                (folder.path / "student" / "README.md").write_text(card, encoding="utf-8")
            folder.write_results(asdict(summary), final.rows, samples, report.samples_page(samples, MAX_NEW_TOKENS))
            tracker.samples(samples)
            final_scalars = {f"eval/{k}": v for k, v in measures.items()}
            final_scalars |= {f"untouched/{k}": v for k, v in untouched.items()}
            final_scalars |= {f"teacher/{k}": v for k, v in teacher_measures.items()}
            tracker.summary(final_scalars | {"temperature": formula.temperature, "alpha": formula.alpha})
            if not train_config.keep_checkpoints:
                checkpoint.remove(folder.path)
            closing(asdict(summary), folder.path, max_steps > 0)
        accelerator.wait_for_everyone()
        exit_code = 0
        return summary
    finally:
        tracker.finish(exit_code)


def build_accelerator(config: Config) -> Accelerator:
    """Choose device and precision, and refuse what accelerate would quietly do otherwise. Raises MachineError."""
    import os

    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    precision = config.train.precision
    if precision == "auto":
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if asked in ("bf16", "fp16"):
            precision = asked
        else:
            device = torch.device("cpu") if cpu else Accelerator().device
            precision = "bf16" if device_dtype(device)[0] == torch.bfloat16 else "fp32"
    if precision == "fp16" and cpu:
        raise MachineError("train.precision", "fp16 needs a GPU", "Use train.precision=bf16 or fp32")
    wanted = precision if precision in ("bf16", "fp16") else "no"
    AcceleratorState._reset_state(reset_partial_state=False)  # a job before this one may have had another precision
    accelerator = Accelerator(mixed_precision=wanted, cpu=cpu, step_scheduler_with_optimizer=False)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != accelerator.num_processes:
        what = f"{processes} processes were started, but accelerate sees {accelerator.num_processes}"
        raise MachineError("WORLD_SIZE", what, "Start them with torchrun, or with accelerate launch on GPUs")
    return accelerator


def load_tokenizers(config: Config) -> tuple[Any, int]:
    """Load the tokenizer, refuse two that differ, and find the longest row both models can read."""
    limits = {"data.max_length": config.data.max_length}
    tokenizers = []
    if config.teacher.path is not None:
        tokenizers.append(load_tokenizer(config.teacher, "teacher"))
        limits["teacher"] = num_positions(load_config(config.teacher, "teacher"))
    if config.student.init != "cut":
        tokenizers.append(load_tokenizer(config.student, "student"))
        limits["student"] = num_positions(load_config(config.student, "student"))
    if len(tokenizers) == 2:
        common_ids(*tokenizers)
    max_length = min(limit for limit in limits.values() if limit is not None)
    if config.data.max_length is not None and max_length < config.data.max_length:
        who = " and ".join(name for name, limit in limits.items() if limit == max_length)
        log.warning(
            "data.max_length=%d, but the %s can read %d tokens: that is used", config.data.max_length, who, max_length
        )
    return tokenizers[-1], max_length


def count_ids(tokenizer: Any, student: Any, teacher: Teacher | None) -> int:
    """The tokenizer's real ids: head rows past them are padding and are cut before the softmax. Raises ModelError."""
    num_ids = max(tokenizer.get_vocab().values()) + 1
    heads = {"student": head_of(student).num_ids} | ({"teacher": teacher.head.num_ids} if teacher else {})
    for group, rows in heads.items():
        if rows < num_ids:
            what = f"its head has {rows} rows, its tokenizer {num_ids} ids"
            raise ModelError(f"{group}.path", what, "Resize the model's embeddings, or use its own tokenizer")
        if rows > num_ids:
            log.info("%s's head has %d rows; those past the tokenizer's %d ids are cut", group, rows, num_ids)
    return num_ids


def micro_batch_size(config: Config, num_processes: int) -> int:
    """Rows at once on one device. Raises ConfigError if the batch cannot be shared out evenly."""
    size, asked = config.train.batch_size, config.train.micro_batch_size
    share = num_processes if asked == "auto" else asked * num_processes
    if size % share:
        per = "" if asked == "auto" else f" × train.micro_batch_size={asked}"
        what = f"is {size}, not a multiple of {num_processes} processes{per}"
        raise ConfigError("train.batch_size", what, f"Try {max(share, size // share * share)}")
    return size // num_processes if asked == "auto" else asked


def sample_prompts(config: Config, data: Dataset) -> list[dict[str, Any]]:
    """A few conversations up to the assistant's first turn, and what a person said there."""
    if not config.tracking.samples:
        return []
    prompts = []
    chosen: list[Conversation] = (data.validation or data.train)[:NUM_SAMPLES]
    for conversation in chosen:
        first = next(i for i, m in enumerate(conversation.messages) if m["role"] == "assistant")
        if first > 0:
            prompts.append(
                {"messages": conversation.messages[:first], "reference": conversation.messages[first]["content"]}
            )
    return prompts


def answers(model: Any, tokenizer: Any, prompts: list[dict[str, Any]]) -> list[str | None]:
    if model is None:
        return [None] * len(prompts)
    return [answer(model, tokenizer, prompt["messages"], MAX_NEW_TOKENS) for prompt in prompts]


def warn_about(untouched: dict[str, Any], teacher: dict[str, Any], held_out_rows: list[Row]) -> None:
    """Say what makes the measures, or the distillation, doubtful."""
    counted = sum(row.num_counted for row in held_out_rows)
    if counted < FEW_TOKENS:
        log.warning("only %d counted held-out tokens: measures are uncertain; raise data.validation", counted)
    if teacher["ce"] is not None and untouched["ce"] is not None and teacher["ce"] > untouched["ce"]:
        log.warning(
            "the teacher's held-out CE (%.3f) is above the untouched student's (%.3f): distillation will pull towards "
            "a worse model on these rows; a wrong chat template is the usual cause", teacher["ce"], untouched["ce"],
        )  # fmt: skip


def sizes(model: Any, num_bytes: int | None = 0) -> dict[str, Any]:
    return {"num_parameters": model.num_parameters(), "num_bytes": num_bytes}


def encoder_counts(data: Dataset, encoder: Encoder, rows: list[Row], held_out_rows: list[Row]) -> dict[str, Any]:
    """The data's part of the summary: rows, counted tokens, and what fell to which rule."""
    return {
        "num_rows": len(rows),
        "num_validation_rows": len(held_out_rows),
        "counted_tokens": sum(row.num_counted for row in rows),
        "counted_validation_tokens": sum(row.num_counted for row in held_out_rows),
        "num_dropped": dict(data.dropped + encoder.dropped),
        "num_truncated": dict(data.changed + encoder.truncated),
    }


def environment(config: Config, accelerator: Accelerator, teacher: Teacher | None) -> dict[str, Any]:
    """Versions, device, precision and commit: what a colleague needs to repeat the run."""
    import sys

    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "kdx": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "device": str(accelerator.device),
        "processor": platform.processor() or platform.machine(),
        "num_threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "precision": precision_words(accelerator, config),
        "teacher_precision": teacher.precision if teacher else None,
        "git_commit": git.stdout.strip() or None,
        "command": redact(" ".join(sys.argv)),
    }


def precision_words(accelerator: Accelerator, config: Config) -> str:
    if accelerator.mixed_precision in ("bf16", "fp16"):
        return f"{accelerator.mixed_precision} autocast over fp32 weights"
    return "fp64" if config.train.precision == "fp64" else "fp32"


def header(
    config: Config,
    accelerator: Accelerator,
    student: Any,
    teacher: Teacher | None,
    data: Dataset,
    encoder: Encoder,
    rows: list[Row],
    held_out_rows: list[Row],
    batches: StepBatches,
    max_steps: int,
    formula: Objective,
    template: str,
) -> list[str]:
    """Say in plain words what will happen."""
    plain = asdict(config)
    device = accelerator.device
    why = device_dtype(device)[1]
    layers = student.config.get_text_config().num_hidden_layers
    origin = {"cut": f"{layers} layers cut from the teacher", "random": "fresh weights"}.get(
        config.student.init, report.public_name(plain["student"])
    )
    counts = encoder_counts(data, encoder, rows, held_out_rows)
    num_micro = batches.batch_size // (batches.micro_batch_size * accelerator.num_processes)
    came = {key: f" ({where})" for key, where in config.run.origins.items()}
    lines = ["kdx " + __version__]
    if teacher is not None:
        uses = "" if formula.alpha > 0 else ", only to measure"
        lines.append(
            f"  teacher         {report.public_name(plain['teacher'])}, {report.count(teacher.num_parameters)} parameters, "
            f"{teacher.precision}{uses}"
        )
    lines += [
        f"  student         {origin}, {report.count(student.num_parameters())} parameters",
        f"  device          {device}, {accelerator.num_processes} process(es), {precision_words(accelerator, config)} ({why})",
        f"  data            {config.data.name}: {counts['num_rows']:,} rows, {counts['counted_tokens']:,} counted tokens; "
        f"held out {counts['num_validation_rows']:,} rows, {counts['counted_validation_tokens']:,} counted tokens",
    ]
    for words, rules in (("left out", counts["num_dropped"]), ("changed", counts["num_truncated"])):
        if rules:
            lines.append(f"                  {words}: {report.rules(rules)}")
    steps_from = came.get("train.max_steps", "")
    return [
        *lines,
        f"  chat template   {template}",
        f"  objective       {formula.formula()}",
        f"  steps           {max_steps}{steps_from} of {batches.batch_size} rows, {max_steps / batches.steps_per_epoch:.2f} epochs"
        + (f", {num_micro} micro-batches of {batches.micro_batch_size}" if num_micro > 1 else "")
        + f", {batches.padding(max_steps):.1%} padding",
        f"  learning rate   {config.optim.lr:g}{came.get('optim.lr', '')}, {config.optim.schedule}, "
        f"{config.optim.warmup_steps} steps of warm-up, {config.optim.name}",
        f"  longest row     {encoder.max_length} tokens{came.get('data.max_length', '')}",
    ]


def closing(summary: dict[str, Any], run_dir: Path, has_student: bool) -> None:
    """Print the table, and what one would type next."""
    CONSOLE.print(report.closing_table(summary))
    with (run_dir / "kdx.log").open("a", encoding="utf-8") as file:
        file.write(json.dumps({k: summary[k] for k in ("teacher", "untouched", "student")}) + "\n")
    if has_student:
        log.info("next:")
        code = f"from transformers import pipeline; chat = pipeline('text-generation', '{run_dir}/student'); "
        ask = "print(chat([{'role': 'user', 'content': 'Hello!'}])[0]['generated_text'][-1]['content'])"
        log.info('  python -c "%s%s"', code, ask)
    log.info("  less %s/samples.md", run_dir)
    log.info("  python -m kdx -m loss.temperature=1,2,4 loss.alpha=0.3,0.7")
