"""What a run says in words: the header before it, the table after it, the samples, the model card."""

import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
import yaml
from rich.table import Table

from kdx.causal_lm import device_dtype
from kdx.config import as_dict
from kdx.errors import printable
from kdx.prepare import Prepared, in_bytes
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
    ("bytes of weights", "num_bytes", "{:,}"),
)


def header(run: Prepared) -> list[str]:
    """Say in plain words what will happen."""
    config, plain = run.config, as_dict(run.config)
    came: dict[str, str] = {}
    layers = run.student.config.get_text_config().num_hidden_layers
    start = {"cut": f"{layers} layers cut from the teacher", "random": "fresh weights"}
    student = start.get(config.student.init, public_name(plain["student"]))
    counts, batches = run.counts(), run.batches
    processes = run.accelerator.num_processes
    device = f"{run.accelerator.device}, {processes} process{'es' if processes > 1 else ''}"
    device += ", the student in shards (FSDP)" if run.accelerator.is_fsdp2 else ""
    num_micro = batches.batch_size // (batches.micro_batch_size * processes)
    micro = f", {num_micro} micro-batches of {batches.micro_batch_size}" if num_micro > 1 else ""
    epochs = run.max_steps / batches.steps_per_epoch
    counted = f"{counts['num_rows']:,} rows, {counts['counted_tokens']:,} counted tokens"
    held_out = f"{counts['num_validation_rows']:,} rows, {counts['counted_validation_tokens']:,} counted tokens"
    steps_key = "train.epochs" if config.train.max_steps is None else "train.max_steps"
    is_asked = run.max_length == config.data.max_length
    longest = came.get("data.max_length", "") if is_asked else " (what the models can read)"
    lines = [("", f"kdx {__version__}")]
    if run.teacher is not None:
        uses = "" if config.loss.alpha > 0 else ", only to measure"
        size = count(run.teacher.num_parameters)
        lines.append(("teacher", f"{public_name(plain['teacher'])}, {size} parameters, {run.teacher.precision}{uses}"))
        lines.append(("teacher's store", run.store_words))
    lines += [
        ("student", f"{student}, {count(run.student.num_parameters())} parameters"),
        ("device", f"{device}, {run.precision()} ({device_dtype(run.accelerator.device)[1]})"),
        ("data", f"{config.data.name}: {counted}; held out: {held_out}"),
    ]
    for words, fell in (("left out", counts["num_dropped"]), ("changed", counts["num_truncated"])):
        if fell:
            lines.append(("", f"{words}: {rules(fell)}"))
    lines += [
        ("chat template", run.template),
        ("objective", run.objective.objective.formula()),
        (
            "steps",
            f"{run.max_steps}{came.get(steps_key, '')} of {batches.batch_size} rows, {epochs:.2f} epochs{micro}, "
            f"{batches.padding(run.max_steps):.1%} padding",
        ),
        (
            "learning rate",
            f"{config.optim.lr:g}{came.get('optim.lr', '')}, {config.optim.schedule}, {config.optim.name}",
        ),
        ("longest row", f"{run.max_length} tokens{longest}"),
    ]
    return [lines[0][1], *(f"  {name:<16}{text}" for name, text in lines[1:])]


def next_commands(run_dir: Path, words: list[str], *, has_student: bool, has_samples: bool) -> list[str]:
    """The three commands one would type next."""
    folder = run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir
    code = f"from transformers import pipeline; chat = pipeline('text-generation', '{folder}/student'); "
    ask = "print(chat([{'role': 'user', 'content': 'Hello!'}])[0]['generated_text'][-1]['content'])"
    commands = [f'python -c "{code}{ask}"'] if has_student else []
    commands += [f"less {folder}/samples.md"] if has_samples else []
    others = ("run.", "sweep.", "hydra.", "loss.temperature=", "loss.alpha=")
    kept = [word for word in words if not word.lstrip("+~").startswith(others)]
    typed = ["python", "-m", "kdx", "-m", *kept, "loss.temperature=1,2,4", "loss.alpha=0.3,0.7"]
    commands.append(shlex.join(typed))
    return ["next:", *(f"  {command}" for command in commands)]


def _git_commit() -> str | None:
    """The commit of the working folder; None where there is no repository or no git."""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return git.stdout.strip() or None


def environment(run: Prepared, folder: Path) -> dict[str, Any]:
    """Versions, device, precision and commit: what a colleague needs to repeat the run."""
    told = folder / "command.txt"
    return {
        "kdx": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "device": str(run.accelerator.device),
        "machine": platform.machine(),
        "num_threads": torch.get_num_threads(),
        "processes": run.accelerator.num_processes,
        "precision": run.precision(),
        # Only runs of one teacher in one precision can be ranked together.
        "teacher_precision": run.teacher.identity.precision if run.teacher else None,
        "teacher_digest": run.teacher.identity.model if run.teacher else None,
        "git_commit": _git_commit(),
        "command": told.read_text(encoding="utf-8").strip() if told.is_file() else None,
    }


def closing_table(summary: dict[str, Any]) -> Table:
    """The measures of teacher, untouched student and student, side by side."""
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
    """What the teacher's store did for the run."""
    counts, bad = store.counts, store.rows.num_bad
    others = f" ({counts.from_others:,} kept by other runs)" if counts.from_others else ""
    damaged = f", {bad:,} found damaged and computed again" if bad else ""
    return (
        f"teacher's store: {counts.hits:,} rows read{others}, {counts.computed:,} computed{damaged}; "
        f"{in_bytes(counts.bytes_written)} written, about {counts.seconds_saved:.0f} s of the teacher's time saved"
    )


def samples_page(samples: list[dict[str, Any]], max_new_tokens: int) -> str:
    """samples.md: each prompt, and what teacher, untouched student and student answer (greedy)."""
    parts = [f"# Samples\n\nGreedy answers of at most {max_new_tokens} tokens to held-out prompts.\n"]
    for i, sample in enumerate(samples, 1):
        parts.append(f"## {i}\n")
        parts += [f"**{m['role']}**\n\n{_quoted(m['content'])}\n" for m in sample["prompt"]]
        for who in ("reference", "teacher", "untouched", "student"):
            if sample[who] is not None:
                parts.append(f"*{who}*\n\n{_quoted(sample[who])}\n")
    return "\n".join(parts)


def _quoted(text: str) -> str:
    """An indented block: no markup in sample text is obeyed."""
    return "\n".join("    " + line for line in printable(text).splitlines() or [""])


def model_card(config: dict[str, Any], summary: dict[str, Any]) -> str:
    """The student's README.md: a header that the hub reads, what it was made from, and how well it does."""
    teacher, student, data, loss = config["teacher"], config["student"], config["data"], config["loss"]
    teacher_name = public_name(teacher)
    base = teacher if student["init"] == "cut" else student
    header = {
        "base_model": public_name(base),
        "license": base["license"] or "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "datasets": [_data_name(data)],
        "tags": ["distillation", "kdx"],
    }
    of = {"cut": f"cut from the teacher (layers: {student['layers']})", "random": "fresh weights"}
    rows = [
        f"| {label} | "
        + " | ".join(_cell(summary[w].get(key), form) for w in ("teacher", "untouched", "student"))
        + " |"
        for label, key, form in ROWS
    ]
    start = of.get(student["init"], f"trained on from {public_name(student)}")
    return "\n".join([
        "---",
        yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# A student of {teacher_name}" if teacher["path"] else f"# {public_name(student)}, fine-tuned",
        "",
        f"Made with kdx: {start}, on {_data_name(data)}.",
        "",
        f"    {summary['run']['formula']}",
        "",
        f"{summary['run']['steps']} steps, {summary['run']['counted_tokens']:,} counted tokens. Loss: `{loss['name']}`.",
        "",
        f"Held out ({summary['data']['num_validation_rows']} rows, at temperature 1):",
        "",
        "| | teacher | untouched student | student |",
        "|---|---:|---:|---:|",
        *rows,
        "",
        "```python",
        "from transformers import pipeline",
        "",
        'chat = pipeline("text-generation", model="student")',
        'print(chat([{"role": "user", "content": "Hello, how are you?"}])[0]["generated_text"][-1]["content"])',
        "```",
        "",
    ])  # fmt: skip


def _cell(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)


def public_name(model: dict[str, Any]) -> str:
    """A model's name for others: its hub id, or of a local path the last part alone."""
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
    """A number of parameters as people say it."""
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number:,}"


def rules(counts: dict[str, int]) -> str:
    return "; ".join(f"{number:,} {rule}" for rule, number in counts.items())
