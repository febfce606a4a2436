"""The same measures for teacher, untouched student and student: on held-out rows, at temperature 1.

N counted positions, n positions of a chunk, V vocabulary.
"""

import math
import resource
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import GenerationConfig

from kdx import loss
from kdx.causal_lm import Head, counted_hidden, head_of
from kdx.data.batches import Batches, MicroBatch, Rows, by_length, collate
from kdx.objective import blocks_of, chunk_size_of, chunks_of
from kdx.run.signals import StopRequest
from kdx.run.tracking import log, working
from kdx.teacher import Answer, Teacher

MEASURES = ("ce", "kl", "reverse_kl", "agreement", "accuracy")
MIN_ROWS = 8  # rows at once: measuring needs less memory than training
NUM_SAMPLES, MAX_NEW_TOKENS = 3, 48  # of the sample answers
PADDING_SAMPLE = 128  # positions at which the teacher's mass on padding rows of its head is measured


@dataclass(frozen=True)
class Measures:
    """Sums over the counted positions of each held-out row, and their means over all of them."""

    rows: list[dict[str, Any]]  # row, counted, and the sum of each measure (null where there is no teacher)

    @property
    def num_counted(self) -> int:
        return sum(row["counted"] for row in self.rows)

    def mean(self, name: str) -> float | None:
        """Return the mean of a measure per counted position, or None where it was not taken."""
        if not self.rows or any(row[name] is None for row in self.rows):
            return None
        return math.fsum(row[name] for row in self.rows) / self.num_counted

    def named(self) -> dict[str, float | None]:
        """Return the mean of each measure that is logged."""
        return {name: self.mean(name) for name in MEASURES}

    def means(self) -> dict[str, float | None]:
        """Return all measures, and the perplexity that belongs to ce."""
        means = self.named()
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
    answers: list[Answer] = field(default_factory=list)  # in main memory, by batch

    @classmethod
    def build(cls, rows: Rows, like: Batches, device: torch.device, num_ids: int) -> "HeldOut":
        """Share rows out as the training batches are, rows of similar length together."""
        groups = by_length(rows, max(like.micro_batch_size, MIN_ROWS))[like.rank :: like.num_processes]
        return cls([collate([rows[i] for i in group], like.pad_id) for group in groups], device, num_ids)

    @torch.no_grad()
    def measure(
        self, model: Any, precision: AbstractContextManager[Any], after_each: Callable[[], None] = lambda: None
    ) -> tuple[Measures, Measures]:
        """Measure a student → its own measures, and the teacher's from the same pass (empty without a teacher)."""
        was_training = model.training
        model.eval()
        head = head_of(model).cut(self.num_ids)
        student_rows: list[dict[str, Any]] = []
        teacher_rows: list[dict[str, Any]] = []
        try:
            with precision:
                chunk_head = head.in_compute_dtype()
                for i, batch in enumerate(self.batches):
                    batch = batch.to(self.device)
                    hidden = counted_hidden(model, batch)
                    answer = self.answers[i] if self.answers else None
                    ours, theirs = score(hidden, chunk_head, answer, batch.counted_labels)
                    student_rows += _by_row(ours, batch)
                    teacher_rows += _by_row(theirs, batch) if theirs else []
                    after_each()
        finally:
            model.train(was_training)
        return Measures(gather_object(student_rows)), Measures(gather_object(teacher_rows))


class Judge:
    """Takes the same measures and sample answers of every model of a run.

    training: whose student and teacher are judged. stop: asked between two batches, where nothing is lost.
    """

    def __init__(self, data: Any, training: Any, stop: StopRequest) -> None:
        batches, self.machine, self.num_ids = training.batches, training.machine, training.objective.num_ids
        self.held_out = HeldOut.build(data.held_out, batches, self.machine.device, self.num_ids)
        self.num_rows = len(data.held_out)
        self.prompts: list[dict[str, Any]] = data.prompts if training.config.tracking.samples else []
        self.teacher: Teacher | None = training.teacher
        self.is_taught = training.objective.mix.alpha > 0  # else the teacher is only measured
        self.tokenizer, self.stop = training.tokenizer, stop
        self.teacher_measures = Measures([])

    def __call__(self, model: Any, *, as_saved: bool = False) -> Measures:
        """Measure a student in the precision it trains in, or, with its weights cast, as anyone would who loads it."""
        if not self.num_rows:
            return Measures([])
        self.ask_teacher()
        precision = nullcontext() if as_saved else self.machine.autocast()
        with working("Evaluating student", len(self.held_out.batches), self.machine.is_main_process) as advance:

            def after_each() -> None:
                advance()
                self.stop.check()

            measures, self.teacher_measures = self.held_out.measure(model, precision, after_each)
        return measures

    def ask_teacher(self) -> None:
        """Take the teacher's answers to the held-out rows, once."""
        teacher, held_out = self.teacher, self.held_out
        if teacher is None or held_out.answers or not held_out.batches:
            return
        head = teacher.head.cut(self.num_ids)
        answers = []
        with working("Evaluating teacher", len(held_out.batches), self.machine.is_main_process) as advance:
            for batch in held_out.batches:
                answers.append(Answer(teacher.answer(batch).hidden.cpu(), head))
                advance()
                self.stop.check()
        held_out.answers = answers
        padding = teacher.head.num_ids - self.num_ids
        if padding > 0:
            logits = teacher.head.logits(answers[0].hidden[:PADDING_SAMPLE])
            mass = loss.log_probabilities(logits).exp()[:, self.num_ids :].sum(-1).mean().item()
            log.info("the teacher's head has %d rows of padding, which are cut: %.2g of its mass", padding, mass)

    def before_training(self, student: Any) -> dict[str, Any]:
        """Measure and sample the teacher and the untouched student: untouched.json."""
        untouched = self(student).means()
        teacher = self.teacher
        sizes = {"num_parameters": None} if teacher is None else {"num_parameters": teacher.num_parameters}
        before = {
            "untouched": untouched | {"num_parameters": student.num_parameters()},
            "teacher": self.teacher_measures.means() | sizes,
            "teacher_samples": teacher_samples(teacher, self.tokenizer, self.prompts),
            "untouched_samples": self.samples(student),
        }
        return before

    def free_teacher(self) -> None:
        """Let go of a teacher that is only measured, once its answers are taken. A resumed run takes them again."""
        if self.teacher is not None and not self.is_taught:
            self.ask_teacher()
            self.teacher.free()

    def samples(self, model: Any) -> list[str]:
        """Let a model answer the sample prompts."""
        return [answer(model, self.tokenizer, prompt["text"], MAX_NEW_TOKENS) for prompt in self.prompts]


def teacher_samples(teacher: Teacher | None, tokenizer: Any, prompts: list[dict[str, Any]]) -> list[str | None]:
    """Let the teacher answer the sample prompts, or read its answers from its store."""
    answers = []
    for prompt in prompts:
        key = f"{MAX_NEW_TOKENS} tokens: {prompt['text']}"
        text = teacher.store.load_answer(key) if teacher and teacher.store else None
        if teacher and text is None:
            text = answer(teacher.model, tokenizer, prompt["text"], MAX_NEW_TOKENS)
            if teacher.store:
                teacher.store.save_answer(key, text)
        answers.append(text)
    return answers


def score(
    hidden: Tensor, head: Head, answer: Answer | None, labels: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Measure N positions, a chunk at a time → each measure [N] of the student, and ce and accuracy of the teacher."""
    parts: list[dict[str, Tensor]] = []
    teacher_parts: list[dict[str, Tensor]] = []
    for chunk in chunks_of(len(labels), chunk_size_of(head)):
        product = head.product(hidden[chunk])
        teacher_product = None
        if answer is not None:
            teacher_product = answer.head.product(answer.hidden[chunk]).to(product.device)
        for block in blocks_of(product):
            label = labels[chunk][block].unsqueeze(-1)
            s = loss.log_probabilities(head.finish(product[block]))
            choice = s.argmax(-1, keepdim=True)
            part = {"ce": -s.gather(-1, label), "accuracy": (choice == label).float()}
            if answer is not None and teacher_product is not None:
                t = loss.log_probabilities(answer.head.finish(teacher_product[block]))
                teacher_choice = t.argmax(-1, keepdim=True)
                part["kl"] = loss.forward_kl(s, t)
                part["reverse_kl"] = loss.reverse_kl(s, t)
                part["agreement"] = (choice == teacher_choice).float()
                teacher_parts.append({"ce": -t.gather(-1, label), "accuracy": (teacher_choice == label).float()})
            parts.append(part)
    return _joined(parts), _joined(teacher_parts)


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
    """Continue a rendered conversation greedily, whatever the model's own generation config prefers."""
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
    own, was_training = model.generation_config, model.training
    eos = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    pad = next((i for i in (own.pad_token_id, tokenizer.pad_token_id) if i is not None), eos)
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos,
        pad_token_id=pad[0] if isinstance(pad, list) else pad,
    )  # fmt: skip
    model.eval()
    model.generation_config = greedy  # else unset values are taken from the model's own
    try:
        output = model.generate(**inputs)
    finally:
        model.generation_config = own
        model.train(was_training)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of the GPU's allocator, or of the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
