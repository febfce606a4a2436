"""What the contestants share: models on disk, rows tokenised by kdx, and the folder for results."""

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from kdx.causal_lm import device_dtype
from kdx.cli import compose
from kdx.data.batches import Row
from kdx.data.encode import load_data
from kdx.distill import build_student
from kdx.run.launch import build_accelerator
from kdx.run.tracking import quiet_libraries
from kdx.store_commands import fill
from kdx.teacher import load_teacher
from kdx.tokenizer import load_tokenizer

PAIRS = ("smollm2", "dialogpt")
BATCH_SIZE = 8
RESULTS = Path(__file__).parent / "results"


@dataclass
class Work:
    """The input of a contestant: the words of a kdx run, and the same work as a file for the others."""

    words: list[str]
    file: Path
    environment: dict[str, str]
    steps: int
    tokens_per_step: float


def prepare_work(pair: str, folder: Path, *, steps: int) -> Work:
    """Write the models and rows of a pair, and fill the teacher's store."""
    quiet_libraries()
    os.environ["KDX_STORE"] = str(folder / "store")
    words = ["data.validation=8", f"data.take={steps * BATCH_SIZE}", "data.max_length=192", "tracking.mode=disabled"]
    words += [
        "tracking.samples=false",
        f"train.batch_size={BATCH_SIZE}",
        "train.log_every=1",
        f"train.max_steps={steps}",
    ]
    words += ["optim.lr=1e-4", "train.seed=0"]
    if pair == "dialogpt":
        write_gpt2(folder / "teacher", layers=24, width=1024)
        write_gpt2(folder / "student", layers=12, width=768)
        words += ["teacher=hf", f"teacher.path={folder}/teacher", "student=hf", f"student.path={folder}/student"]
    fill([compose(words)])
    config = compose(words)
    machine = build_accelerator(config)
    shared = load_tokenizer(config)
    rows = load_data(config.data, shared).train
    if pair == "smollm2":  # the others read model folders
        build_student(config, machine, shared.max_length).save_pretrained(folder / "student")
        shared.tokenizer.save_pretrained(folder / "student")
        teacher = load_teacher(config.teacher, machine.device, shared.max_length)
        assert teacher is not None
        teacher.model.save_pretrained(folder / "teacher")
    work = {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "tokenizer": str(folder / "student"),
        "rows": [labelled(row) for row in rows],
        "batch_size": BATCH_SIZE,
        "steps": steps,
        "bf16": device_dtype(machine.device) == "bf16",
    }
    (folder / "work.json").write_text(json.dumps(work), encoding="utf-8")
    tokens = float(rows.lengths.mean()) * BATCH_SIZE
    environment = {"KDX_STORE": os.environ["KDX_STORE"], "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    return Work(words, folder / "work.json", environment, steps, tokens)


def labelled(row: Row) -> tuple[list[int], list[int]]:
    return row.tokens, [token if counts else -100 for token, counts in zip(row.tokens, row.counted, strict=True)]


def write_gpt2(folder: Path, *, layers: int, width: int) -> None:
    """A GPT-2 of this shape with fresh weights, and a tokenizer of 50,257 ids: $GPT2_TOKENIZER, or one trained here."""
    torch.manual_seed(layers)
    shape = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, n_positions=1024, vocab_size=50257)
    GPT2LMHeadModel(shape).save_pretrained(folder)
    given = os.environ.get("GPT2_TOKENIZER")
    if given:
        GPT2Tokenizer(vocab=f"{given}/vocab.json", merges=f"{given}/merges.txt").save_pretrained(folder)
        return
    texts = [" ".join(m["content"] for m in c.messages) for c in _chats()]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=50257, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(folder))
    tokenizer = GPT2Tokenizer(vocab=f"{folder}/vocab.json", merges=f"{folder}/merges.txt")
    tokenizer.add_tokens([f"<|unused{i}|>" for i in range(50257 - len(tokenizer))])
    tokenizer.save_pretrained(folder)


def _chats() -> list[Any]:
    from kdx.data.sources import read_conversations

    return list(read_conversations(compose([]).data))


def write_results(name: str, results: dict[str, Any]) -> None:
    """Write the results and the machine they were measured on."""
    RESULTS.mkdir(exist_ok=True)
    machine = {
        "processor": _processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "precision": device_dtype(torch.device("cpu")), "system": platform.system(),
    }  # fmt: skip
    text = json.dumps({"machine": machine, "results": results}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
