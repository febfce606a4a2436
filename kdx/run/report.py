"""What a run says in words: the header before it, the table after it, the samples, the model card."""

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from huggingface_hub import ModelCardData
from rich.table import Table

from kdx.adapter import trained
from kdx.causal_lm import generation_config, stop_ids
from kdx.compare.ranking import EVERY, Column
from kdx.config import Config, Tree, replaced
from kdx.data.encode import MAX_NEW_TOKENS, Data
from kdx.errors import printable
from kdx.run.files import Lines
from kdx.run.folder import Record
from kdx.run.identity import adapter_base
from kdx.run.labels import public_name, student_name
from kdx.store import TeacherStore
from kdx.version import __version__

MEASURES = EVERY | {"num_parameters": Column("parameters", places=0)}  # rows of the table after a run


def counts(data: Data) -> Tree:
    """Count rows, counted tokens, and the rows that each rule left out or changed; and identify the rows."""
    return {
        "num_rows": len(data.train),
        "num_validation_rows": len(data.held_out),
        "counted_tokens": int(data.train.num_counted.sum()),
        "counted_validation_tokens": int(data.held_out.num_counted.sum()),
        "num_dropped": dict(data.dropped),
        "num_truncated": dict(data.changed),
        "num_noted": dict(data.said),
        "num_unused": dict(data.unused),
        "fingerprint": data.fingerprint,
        "validation_fingerprint": data.held_out_fingerprint,
    }


def header(training: Any) -> list[str]:
    """Describe what is about to happen, a line for each part of the run."""
    config, data, machine, batches = training.config, training.data, training.machine, training.batches
    teacher, student, optim = training.teacher, training.student, training.config.optim
    sources = training.record.sources.items()
    came = {key: f" ({where.removeprefix('conf/').removesuffix('.yaml')})" for key, where in sources}
    sharded = ", the student sharded (FSDP)" if machine.is_fsdp2 else ""
    processes = f", {machine.num_processes} processes{sharded}" if machine.num_processes > 1 else ""
    num_micro = batches.batch_size // (batches.micro_batch_size * machine.num_processes)
    micro = f" in {num_micro} micro-batches of {batches.micro_batch_size}" if num_micro > 1 else ""
    if batches.micro_batch_tokens:
        micro = f" in micro-batches of at most {batches.micro_batch_tokens:,} tokens"
    came.pop("train.max_steps" if config.train.max_steps is None else "train.epochs", None)  # one of them is null
    length_from = came.get("data.max_length", "") if training.max_length == config.data.max_length else ""
    epochs, warmup = training.max_steps / batches.steps_per_epoch, optim.warmup_steps
    lines = {}
    if teacher is not None:
        uses = f", with the adapter {config.teacher.adapter}" if config.teacher.adapter else ""
        uses += "" if config.loss.alpha > 0 else ", only to measure"
        size = f"{teacher.num_parameters:,} parameters"
        lines["teacher"] = f"{public_name(config.teacher)}, {size}, {teacher.identity.precision}{uses}"
        lines["teacher cache"] = teacher.store_words
    if config.rollout.name != "none":
        own = f", {config.rollout.share:.0%} of the rows" if config.rollout.name == "student" else ""
        most = f"at most {config.rollout.max_new_tokens} tokens at temperature {config.rollout.temperature:g}"
        lines["rollout"] = f"answers by the {config.rollout.name}{own}, {most}"
    size, num = student.num_parameters(), sum(tensor.numel() for tensor in trained(student).values())
    size = f"{size:,} parameters" + (f", {num:,} of them trained" if num < size else "")
    lines["student"] = f"{_origin(config)}, {size}, saved as {training.save_dtype}"
    lines["device"] = f"{machine.device}{processes}, {training.versions['precision']}"
    for name, what, rows in (("data", f"{config.data.name}: ", data.train), ("held out", "", data.held_out)):
        lines[name] = f"{what}{len(rows):,} rows, {int(rows.num_counted.sum()):,} counted tokens"
    for name, counted in (("left out", data.dropped), ("changed", data.changed), ("notes", data.said)):
        if counted:
            lines[name] = "; ".join(f"{rule} ({number:,} rows)" for rule, number in counted.items())
    lines |= {
        "chat template": data.template,
        "stops at": _stops(config, training),
        "objective": training.objective.mix.formula(),
        "steps": f"{training.max_steps:,}{came.get('train.max_steps', '')}, batch size {batches.batch_size}{micro}, "
        + f"{epochs:,.2f} epochs{came.get('train.epochs', '')}",
        "optimizer": f"{optim.name.partition('.')[2]}, lr {optim.lr:g}{came.get('optim.lr', '')}, {optim.schedule}, "
        + (f"{warmup:.0%} warm-up" if warmup < 1 else f"{warmup} steps of warm-up"),
        "row length": f"at most {training.max_length} tokens{length_from}",
    }
    if data.unused:
        lines["not used"] = ", ".join(f"{what} ({number:,} rows)" for what, number in data.unused.items())
    return [f"kdx {__version__}", *(f"  {name:<16}{text}" for name, text in lines.items())]


def _stops(config: Config, training: Any) -> str:
    """Name the tokens at which the student will stop, and the teacher if it stops elsewhere."""
    ours = stop_ids(training.student.generation_config)
    theirs = stop_ids(generation_config(config.teacher, "teacher")) if config.teacher.path else ours
    names = [", ".join(training.tokenizer.convert_ids_to_tokens(ids)) or "nothing" for ids in (ours, theirs)]
    return names[0] + (f"; the teacher stops at {names[1]}" if set(ours) != set(theirs) else "")


def _origin(config: Config) -> str:
    """Say what the student is made of."""
    adapter = f", LoRA adapters of rank {config.adapter.r}" if config.adapter.name != "none" else ""
    if config.student.init == "cut":
        return f"{student_name(config)} cut from the teacher" + adapter
    return ("fresh weights" if config.student.init == "random" else public_name(config.student)) + adapter


def next_commands(run_dir: Path, config: Config, record: Record, *, has_samples: bool) -> list[str]:
    """Suggest what to type next."""
    folder = run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir
    lines = [f"less {folder}/samples.md"] if has_samples else []
    if config.sweep.name:
        lines.append(f"python -m kdx compare {folder.parent}")
    elif record.command and config.teacher.path and config.loss.name != "cross_entropy":
        varied = ("run.", "sweep.", "hydra.", "loss.temperature=", "loss.alpha=")
        words = [word for word in record.command if not word.lstrip("+~").startswith(varied)]
        lines.append(sweep_line([*words, "loss.temperature=1,2,4", "loss.alpha=0.3,0.7"]))
    return ["next:", *(f"  {line}" for line in lines)] if lines else []


def sweep_line(words: Sequence[str]) -> str:
    """Write the command of a sweep, with the plug-ins of this process."""
    own = os.environ.get("KDX_PLUGINS")
    return f"KDX_PLUGINS={own} " * bool(own) + f"python -m kdx -m {shlex.join(words)}"


def environment(training: Any, folder: Path) -> Tree:
    """Return versions, device, precision and commit: what a colleague needs to repeat the run."""
    machine, teacher = training.machine, training.teacher
    status, commit = subprocess.getstatusoutput("git rev-parse HEAD")
    return training.versions | {
        "python": platform.python_version(),
        "device": str(machine.device),
        "machine": platform.machine(),
        "num_threads": torch.get_num_threads(),
        "num_cores": os.cpu_count(),
        "processes": machine.num_processes,
        # Only runs of one teacher in one precision can be ranked together.
        "teacher_precision": teacher.identity.precision if teacher else None,
        "teacher_digest": teacher.identity.teacher if teacher else None,
        "git_commit": None if status else commit,
        "command": (folder / "command.txt").read_text(encoding="utf-8").strip(),
    }


def closing_table(summary: Tree) -> Table:
    data = summary["data"]
    title = f"held out: {data['num_validation_rows']} rows, {data['counted_validation_tokens']:,} counted tokens, τ = 1"
    table = Table("", title=title, title_justify="left")
    for column in ("teacher", "untouched student", "student"):
        table.add_column(column, justify="right")
    for row in measures(summary):
        table.add_row(*row)
    return table


def measures(summary: Tree) -> list[list[str]]:
    """Lay out the measures that were taken: a name, and the values of teacher, untouched student and student."""
    table = []
    for name, column in MEASURES.items():
        values = [summary[who].get(name) for who in ("teacher", "untouched", "student")]
        form = ",.5g" if name == "perplexity" else f",.{4 if column.places is None else column.places}f"
        if any(value is not None for value in values):
            table.append([column.heading, *("" if value is None else format(value, form) for value in values)])
    return table


def store_line(store: TeacherStore) -> str:
    """Summarise what the teacher's cache did for the run."""
    hits, computed, bad = store.counts.values()
    damaged = f", {bad:,} damaged and computed again" if bad else ""
    return f"teacher cache: {hits:,} rows read, {computed:,} computed{damaged}"


def samples_page(samples: Lines, own: Lines) -> str:
    """Write samples.md: each prompt, and the greedy answers of teacher, untouched student and student.

    own: answers of the student's own that it was trained on, by step.
    """

    def quoted(text: str) -> str:  # as a block, so that no markup in it takes effect
        return indent(printable(text), "    ")

    parts = [f"# Samples\n\nGreedy answers of at most {MAX_NEW_TOKENS} tokens to held-out prompts.\n"]
    for i, sample in enumerate(samples, 1):
        parts.append(f"## {i}\n")
        parts += [f"**{m['role']}**\n\n{quoted(m['content'])}\n" for m in sample["prompt"]]
        for who in ("reference", "teacher", "untouched", "student"):
            if sample[who] is not None:
                parts.append(f"*{who}*\n\n{quoted(sample[who])}\n")
    parts += ["# Own answers\n\nSampled from the student as it was then, and trained on.\n"] if own else []
    parts += [f"**step {x['step']}**\n\n{quoted(x['prompt'])}\n\n*student*\n\n{quoted(x['answer'])}\n" for x in own]
    return "\n".join(parts)


def model_card(config: Config, summary: Tree) -> str:
    """Write the student's README.md: metadata that the hub reads, how it was made, and how well it does."""
    teacher, student, run, rows = config.teacher, config.student, summary["run"], public_name(config.data)
    base = teacher if student.init == "cut" else student
    base = replaced(base, path=adapter_base(base.path) or base.path)  # of an adapter that is trained further
    is_adapter = config.adapter.name != "none" and config.adapter.save == "adapter"
    relation: Tree = {"base_model_relation": "adapter"} if is_adapter else {}
    metadata = ModelCardData(
        base_model=public_name(base), license=base.license or "unknown", library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation", datasets=[rows], tags=["distillation", "kdx"],
        **relation,
    )  # fmt: skip
    title = f"A student of {public_name(teacher)}" if teacher.path else f"{public_name(student)}, fine-tuned"
    table = "\n".join(f"| {' | '.join(row)} |" for row in measures(summary))
    return f"""---
{metadata.to_yaml()}
---

# {title}

Made with kdx: {_origin(config)}, on {rows}.

    {run["formula"]}

{run["steps"]} steps, {run["counted_tokens"]:,} counted tokens. Loss: `{config.loss.name}`.

Held out ({summary["data"]["num_validation_rows"]} rows, at temperature 1):

| | teacher | untouched student | student |
|---|---:|---:|---:|
{table}

```python
from transformers import pipeline

chat = pipeline("text-generation", model="student")
print(chat([{{"role": "user", "content": "Hello, how are you?"}}])[0]["generated_text"][-1]["content"])
```
"""
