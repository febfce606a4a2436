"""The same work with Hugging Face's Trainer or TRL: python benchmarks/peers.py hf|trl WORK.json

WORK.json names model folders, rows (tokens and labels), batch size and precision; everything else is the library's
default. Prints one JSON line with the seconds of each step.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments


class Clock(TrainerCallback):
    """Seconds of each optimizer step, from its first micro-batch to the end of the optimizer's step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": torch.tensor(mask)}


def main() -> None:
    kind, work = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    student = AutoModelForCausalLM.from_pretrained(work["student"], dtype=torch.float32)
    rows = [{"input_ids": tokens, "labels": labels} for tokens, labels in work["rows"]]
    clock = Clock()
    settings = {
        "per_device_train_batch_size": work["batch_size"], "max_steps": work["steps"], "learning_rate": 1e-4,
        "bf16": work["bf16"], "use_cpu": not torch.cuda.is_available(), "report_to": [], "save_strategy": "no",
        "logging_steps": 10_000, "disable_tqdm": True, "remove_unused_columns": False, "gradient_checkpointing": False,
        "dataloader_pin_memory": False, "output_dir": tempfile.mkdtemp(),
    }  # fmt: skip
    if kind == "hf":
        trainer: Any = Trainer(
            student, TrainingArguments(**settings), train_dataset=rows, data_collator=collate, callbacks=[clock]
        )  # type: ignore[arg-type]
    else:
        from datasets import Dataset
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        teacher = AutoModelForCausalLM.from_pretrained(
            work["teacher"], dtype=torch.bfloat16 if work["bf16"] else torch.float32
        )
        config = GKDConfig(
            lmbda=0.0,
            beta=0.0,
            temperature=2.0,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            **settings,
        )
        trainer = GKDTrainer(
            student, teacher, config, data_collator=collate, train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(work["tokenizer"]), callbacks=[clock],
        )  # fmt: skip
    trainer.train()
    print(json.dumps({"seconds": clock.seconds}))


if __name__ == "__main__":
    main()
