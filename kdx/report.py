"""What a run says in words: the header before it, the table after it, the samples, the model card."""

import json
from typing import Any

import yaml
from rich.table import Table

from kdx.tracking import printable

ROWS = (
    ("KL to the teacher", "kl", "{:.4f}"),
    ("reverse KL", "reverse_kl", "{:.4f}"),
    ("agreement with the teacher", "agreement", "{:.4f}"),
    ("CE of the labels", "ce", "{:.4f}"),
    ("perplexity", "perplexity", "{:,.2f}"),
    ("accuracy", "accuracy", "{:.4f}"),
    ("parameters", "num_parameters", "{:,}"),
    ("bytes on disk", "num_bytes", "{:,}"),
)


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


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
