"""The same measures for teacher, untouched student and student: on held-out rows, at temperature 1.

N counted positions, n positions of a chunk, V vocabulary.
"""

import math
import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from kdx import loss
from kdx.causal_lm import Head, counted_hidden, head_of
from kdx.data.batches import MicroBatch, Row, StepBatches, by_length, collate
from kdx.objective import blocks_of, chunk_size_of, chunks_of
from kdx.teacher import Teacher

MEASURES = ("ce", "kl", "reverse_kl", "agreement", "accuracy")
SAMPLE = 128  # positions at which it is looked for what the teacher says past the ids
MIN_ROWS = 8  # measuring needs less memory than training


@dataclass(frozen=True)
class Measures:
    """Sums over the counted positions of each held-out row, and their means over all of them."""

    rows: list[dict[str, Any]]  # row, counted, and the sum of each measure (null where there is no teacher)

    @property
    def num_counted(self) -> int:
        return sum(row["counted"] for row in self.rows)

    def mean(self, name: str) -> float | None:
        """The mean of a measure per counted position, or None where it was not taken."""
        if not self.rows or any(row[name] is None for row in self.rows):
            return None
        return math.fsum(row[name] for row in self.rows) / self.num_counted

    def means(self) -> dict[str, float | None]:
        """All measures, with the perplexity that belongs to ce."""
        means = {name: self.mean(name) for name in MEASURES}
        ce = means["ce"]
        perplexity = None if ce is None else math.exp(min(ce, 700.0))
        return {"ce": ce, "perplexity": perplexity, **{k: v for k, v in means.items() if k != "ce"}}


@dataclass
class HeldOut:
    """Held-out rows with the teacher's answers, taken once; measures any student against them.

    Rows are shared out over processes by batch, and the sums are gathered: no row is counted twice.
    """

    batches: list[MicroBatch]
    device: torch.device
    num_ids: int
    teacher_head: Head | None = None
    teacher_hidden: list[Tensor] = field(default_factory=list)

    @classmethod
    def build(cls, rows: Sequence[Row], like: StepBatches, device: torch.device, num_ids: int) -> "HeldOut":
        """Share the rows out as the training batches are; rows of like length stand together."""
        groups = by_length(rows, max(like.micro_batch_size, MIN_ROWS))[like.rank :: like.num_processes]
        return cls([collate([rows[i] for i in group], like.pad_id) for group in groups], device, num_ids)

    def ask(self, teacher: Teacher, advance: Callable[[], None] = lambda: None) -> None:
        """Take the teacher's hidden states at every counted position, once. They are kept in main memory."""
        self.teacher_head = teacher.head.cut(self.num_ids)
        self.teacher_hidden = []
        for batch in self.batches:
            self.teacher_hidden.append(teacher.answer(batch).hidden.cpu())
            advance()

    @torch.no_grad()
    def measure(
        self, model: Any, precision: AbstractContextManager[Any], advance: Callable[[], None] = lambda: None
    ) -> tuple[Measures, Measures]:
        """Measure a student → its own measures, and the teacher's from the same pass (empty without a teacher)."""
        was_training = model.training
        model.eval()
        head = head_of(model).cut(self.num_ids)
        student_rows: list[dict[str, Any]] = []
        teacher_rows: list[dict[str, Any]] = []
        with precision:
            chunk_head = head.in_compute_dtype()
            for i, batch in enumerate(self.batches):
                batch = batch.to(self.device)
                hidden = counted_hidden(model, batch)
                answers = self.teacher_hidden[i] if self.teacher_head is not None else None
                ours, theirs = score(hidden, chunk_head, answers, self.teacher_head, batch.counted_labels)
                student_rows += _by_row(ours, batch)
                teacher_rows += _by_row(theirs, batch) if theirs else []
                advance()
        model.train(was_training)
        return Measures(gather_object(student_rows)), Measures(gather_object(teacher_rows))


def score(
    hidden: Tensor, head: Head, teacher_hidden: Tensor | None, teacher_head: Head | None, labels: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Measure N positions, a chunk at a time → each measure [N] of the student, and ce and accuracy of the teacher."""
    parts: list[dict[str, Tensor]] = []
    teacher_parts: list[dict[str, Tensor]] = []
    for chunk in chunks_of(len(labels), chunk_size_of(head)):
        product = head.product(hidden[chunk])
        teacher_product = None
        if teacher_hidden is not None and teacher_head is not None:
            teacher_product = teacher_head.product(teacher_hidden[chunk]).to(product.device)
        for block in blocks_of(product):
            label = labels[chunk][block].unsqueeze(-1)
            s = loss.log_probabilities(head.finish(product[block]))
            choice = s.argmax(-1, keepdim=True)
            part = {"ce": -s.gather(-1, label), "accuracy": (choice == label).float()}
            if teacher_head is not None and teacher_product is not None:
                t = loss.log_probabilities(teacher_head.finish(teacher_product[block]))
                teacher_choice = t.argmax(-1, keepdim=True)
                part["kl"] = loss.forward_kl(s, t)
                part["reverse_kl"] = loss.reverse_kl(s, t)
                part["agreement"] = (choice == teacher_choice).float()
                teacher_parts.append({"ce": -t.gather(-1, label), "accuracy": (teacher_choice == label).float()})
            parts.append(part)
    return _joined(parts), _joined(teacher_parts)


def mass_past(num_ids: int, head: Head, hidden: list[Tensor]) -> float:
    """The teacher's mean probability of the head rows past the tokenizer's real ids, on the first batch."""
    if not hidden:  # a process without held-out rows
        return 0.0
    probabilities = loss.log_probabilities(head.logits(hidden[0][:SAMPLE])).exp()
    return probabilities[:, num_ids:].sum(-1).mean().item() if len(probabilities) else 0.0


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name].flatten() for part in parts]) for name in parts[0]} if parts else {}


def _by_row(values: dict[str, Tensor], batch: MicroBatch) -> list[dict[str, Any]]:
    """Sum each measure over the positions of each row, in float64."""
    num_rows = len(batch.row_ids)
    row_of = batch.row_of.cpu()
    sums = {
        name: torch.zeros(num_rows, dtype=torch.float64).index_add_(0, row_of, value.double().cpu()).tolist()
        for name, value in values.items()
    }
    counted = torch.bincount(row_of, minlength=num_rows).tolist()
    return [
        {"row": batch.row_ids[i], "counted": counted[i]}
        | {name: sums[name][i] if name in sums else None for name in MEASURES}
        for i in range(num_rows)
    ]


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """Let a model go on with a rendered conversation greedily, as `pipeline("text-generation", …)` would."""
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
    was_training = model.training
    model.eval()
    pad = model.generation_config.pad_token_id
    pad = pad if pad is not None else tokenizer.eos_token_id
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad)
    model.train(was_training)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of the GPU's allocator, or of the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
