"""What a run says in words: the header before it, the table after it, the samples, the model card."""

import os
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from huggingface_hub import ModelCardData
from rich.table import Table

from kdx.config import Config, as_dict
from kdx.data.encode import Data
from kdx.errors import printable
from kdx.run.folder import Record
from kdx.store import TeacherStore
from kdx.version import __version__

ROWS = (
    ("KL to the teacher", "kl", "{:.4f}"),
    ("reverse KL", "reverse_kl", "{:.4f}"),
    ("agreement", "agreement", "{:.4f}"),
    ("CE of the labels", "ce", "{:.4f}"),
    ("perplexity", "perplexity", "{:,.5g}"),
    ("accuracy", "accuracy", "{:.4f}"),
    ("parameters", "num_parameters", "{:,}"),
)


def counts(data: Data) -> dict[str, Any]:
    """Count rows, counted tokens, and the rows that each rule left out or changed."""
    return {
        "num_rows": len(data.train),
        "num_validation_rows": len(data.held_out),
        "counted_tokens": int(data.train.num_counted.sum()),
        "counted_validation_tokens": int(data.held_out.num_counted.sum()),
        "num_dropped": dict(data.dropped),
        "num_truncated": dict(data.changed),
    }


def header(config: Config, record: Record, data: Data, training: Any) -> list[str]:
    """Describe what is about to happen, a line for each part of the run."""
    plain, machine, batches, teacher = as_dict(config), training.machine, training.batches, training.teacher
    came = {key: f" ({where.removeprefix('conf/').removesuffix('.yaml')})" for key, where in record.sources.items()}
    num_layers = training.student.config.get_text_config().num_hidden_layers
    start = {"cut": f"{num_layers} layers cut from the teacher", "random": "fresh weights"}
    student = start.get(config.student.init, public_name(plain["student"]))
    processes = f", {machine.num_processes} processes" if machine.num_processes > 1 else ""
    processes += ", the student sharded (FSDP)" if machine.is_fsdp2 else ""
    num_micro = batches.batch_size // (batches.micro_batch_size * machine.num_processes)
    micro = f" in {num_micro} micro-batches of {batches.micro_batch_size}" if num_micro > 1 else ""
    counted = counts(data)
    steps_from = came.get("train.epochs" if config.train.max_steps is None else "train.max_steps", "")
    is_asked = training.max_length == config.data.max_length
    length_from = came.get("data.max_length", "") if is_asked else " (as long as the models can read)"
    warmup = config.optim.warmup_steps
    warmup_words = f", {warmup:.0%} warm-up" if 0 < warmup < 1 else f", {warmup} steps of warm-up" if warmup else ""
    lines = []
    if teacher is not None:
        uses = "" if config.loss.alpha > 0 else ", only to measure"
        size = f"{count(teacher.num_parameters)} parameters"
        lines.append(("teacher", f"{public_name(plain['teacher'])}, {size}, {teacher.identity.precision}{uses}"))
        lines.append(("teacher cache", teacher.store_words))
    student_size = f"{count(training.student.num_parameters())} parameters"
    precision = training.versions["precision"]
    lines += [
        ("student", f"{student}, {student_size}, saved as {training.save_dtype}"),
        ("device", f"{machine.device}{processes}, {precision}"),
        ("data", f"{config.data.name}: {counted['num_rows']:,} rows, {counted['counted_tokens']:,} counted tokens"),
        (
            "held out",
            f"{counted['num_validation_rows']:,} rows, {counted['counted_validation_tokens']:,} counted tokens",
        ),
    ]
    lines += [(words, rules(fell)) for words, fell in (("left out", data.dropped), ("changed", data.changed)) if fell]
    epochs = training.max_steps / batches.steps_per_epoch
    optimizer = f"{config.optim.name.partition('.')[2]}, lr {config.optim.lr:g}{came.get('optim.lr', '')}"
    lines += [
        ("chat template", data.template),
        ("objective", training.objective.mix.formula()),
        ("steps", f"{training.max_steps:,}{steps_from}, batch size {batches.batch_size}{micro}, {epochs:,.2f} epochs"),
        ("optimizer", f"{optimizer}, {config.optim.schedule}{warmup_words}"),
        ("row length", f"at most {training.max_length} tokens{length_from}"),
    ]  # fmt: skip
    return [f"kdx {__version__}", *(f"  {name:<16}{text}" for name, text in lines)]


def next_commands(run_dir: Path, config: Config, record: Record, *, has_samples: bool) -> list[str]:
    """Suggest what to type next."""
    folder = run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir
    lines = [f"less {folder}/samples.md"] if has_samples else []
    if (run_dir / "student").is_dir():
        code = f"from transformers import pipeline; chat = pipeline('text-generation', '{folder}/student'); "
        ask = "print(chat([{'role': 'user', 'content': 'Hello!'}])[0]['generated_text'][-1]['content'])"
        lines.append(f'python -c "{code}{ask}"')
    if config.sweep.name:
        lines.append(f"python -m kdx compare {folder.parent}")
    elif record.command:
        idle = ("run.", "sweep.", "hydra.", "loss.temperature=", "loss.alpha=")
        words = [word for word in record.command if not word.lstrip("+~").startswith(idle)]
        sweep = shlex.join([*words, "loss.temperature=1,2,4", "loss.alpha=0.3,0.7"])
        lines.append(f"python -m kdx -m {sweep}")
    return ["next:", *(f"  {line}" for line in lines)]


def _git_commit() -> str | None:
    """Return the commit of the working folder; None where there is no repository or no git."""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return git.stdout.strip() or None


def environment(training: Any, folder: Path) -> dict[str, Any]:
    """Return versions, device, precision and commit: what a colleague needs to repeat the run."""
    machine, teacher = training.machine, training.teacher
    return {
        "kdx": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "device": str(machine.device),
        "machine": platform.machine(),
        "num_threads": torch.get_num_threads(),
        "num_cores": os.cpu_count(),
        "processes": machine.num_processes,
        "precision": training.versions["precision"],
        # Only runs of one teacher in one precision can be ranked together.
        "teacher_precision": teacher.identity.precision if teacher else None,
        "teacher_digest": teacher.identity.teacher if teacher else None,
        "git_commit": _git_commit(),
        "command": (folder / "command.txt").read_text(encoding="utf-8").strip(),
    }


def closing_table(summary: dict[str, Any]) -> Table:
    """Lay out the measures of teacher, untouched student and student."""
    data = summary["data"]
    title = f"held out: {data['num_validation_rows']} rows, {data['counted_validation_tokens']:,} counted tokens, τ = 1"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("teacher", "untouched student", "student"):
        table.add_column(column, justify="right")
    for label, key, form in ROWS:
        values = [summary[who].get(key) for who in ("teacher", "untouched", "student")]
        if any(value is not None for value in values):
            table.add_row(label, *("" if value is None else form.format(value) for value in values))
    return table


def store_line(store: TeacherStore) -> str:
    """Summarise what the teacher's cache did for the run."""
    counts = store.counts
    damaged = f", {counts.bad:,} damaged and computed again" if counts.bad else ""
    return f"teacher cache: {counts.hits:,} rows read, {counts.computed:,} computed{damaged}"


def samples_page(samples: list[dict[str, Any]], max_new_tokens: int) -> str:
    """Write samples.md: each prompt, and the greedy answers of teacher, untouched student and student."""
    parts = [f"# Samples\n\nGreedy answers of at most {max_new_tokens} tokens to held-out prompts.\n"]
    for i, sample in enumerate(samples, 1):
        parts.append(f"## {i}\n")
        parts += [f"**{m['role']}**\n\n{_quoted(m['content'])}\n" for m in sample["prompt"]]
        for who in ("reference", "teacher", "untouched", "student"):
            if sample[who] is not None:
                parts.append(f"*{who}*\n\n{_quoted(sample[who])}\n")
    return "\n".join(parts)


def _quoted(text: str) -> str:
    """Indent text as a block, so that no markup in it takes effect."""
    return "\n".join("    " + line for line in printable(text).splitlines() or [""])


def model_card(config: dict[str, Any], summary: dict[str, Any]) -> str:
    """Write the student's README.md: metadata that the hub reads, how it was made, and how well it does."""
    teacher, student, data, loss, run = (*(config[k] for k in ("teacher", "student", "data", "loss")), summary["run"])
    base = teacher if student["init"] == "cut" else student
    metadata = ModelCardData(
        base_model=public_name(base), license=base["license"] or "unknown", library_name="transformers",
        pipeline_tag="text-generation", datasets=[_data_name(data)], tags=["distillation", "kdx"],
    )  # fmt: skip
    of = {"cut": f"cut from the teacher (layers: {student['layers']})", "random": "fresh weights"}
    start = of.get(student["init"], f"fine-tuned from {public_name(student)}")
    title = f"A student of {public_name(teacher)}" if teacher["path"] else f"{public_name(student)}, fine-tuned"
    who = ("teacher", "untouched", "student")
    cells = [(label, *(_cell(summary[w].get(key), form) for w in who)) for label, key, form in ROWS]
    table = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    return f"""---
{metadata.to_yaml()}
---

# {title}

Made with kdx: {start}, on {_data_name(data)}.

    {run["formula"]}

{run["steps"]} steps, {run["counted_tokens"]:,} counted tokens. Loss: `{loss["name"]}`.

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


def _cell(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)


def public_name(model: dict[str, Any]) -> str:
    """Return a model's public name: its hub id, or the last part of a local path."""
    name = model["base_model"] or model["path"] or "none"
    return name if not name.startswith(("/", ".", "~")) else name.rstrip("/").rsplit("/", 1)[-1]


def _data_name(data: dict[str, Any]) -> str:
    if not data["path"]:
        return str(data["name"])
    path = data["path"] if isinstance(data["path"], str) else data["path"][0]
    if path.startswith("pkg:"):
        return path.removeprefix("pkg:").split("/")[0].replace("_", "-")
    return (
        path if path.count("/") == 1 and not path.startswith((".", "/", "~")) else path.rstrip("/").rsplit("/", 1)[-1]
    )


def count(number: int) -> str:
    """Format a number of parameters for people."""
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number:,}"


def rules(counts: dict[str, int]) -> str:
    return "; ".join(f"{number:,} {rule}" for rule, number in counts.items())
