"""The same measures for teacher, untouched student and student: on held-out rows, at temperature 1.

N counted positions, n positions of a chunk, V vocabulary.
"""

import math
import resource
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import GenerationConfig

from kdx import loss
from kdx.causal_lm import Head, counted_hidden, head_of
from kdx.data.batches import MicroBatch, by_length, collate
from kdx.objective import blocks_of, chunk_size_of, chunks_of
from kdx.run.signals import StopRequest
from kdx.run.tracking import working
from kdx.teacher import Answer, Teacher
from kdx.tokenizer import pad_id_of

MEASURES = ("ce", "kl", "reverse_kl", "agreement", "accuracy")
MIN_ROWS = 8  # rows at once: measuring needs less memory than training
NUM_SAMPLES, MAX_NEW_TOKENS = 3, 48  # of the sample answers


@dataclass(frozen=True)
class Measures:
    """Sums over the counted positions of each held-out row, and their means over all of them."""

    rows: list[dict[str, Any]]  # row, counted, and the sum of each measure (None where there is no teacher)
    sources: tuple[str, ...] = ()  # of a mixture; the id of a row begins with its source

    def means(self) -> dict[str, float | None]:
        """Average each measure over all counted positions, None where it was not taken; with the perplexity of ce.

        Those of each source of a mixture are named `SOURCE/MEASURE`.
        """
        means = self._means(self.rows)
        for source in self.sources:
            some = [row for row in self.rows if row["row"].startswith(f"{source}/")]
            means |= {f"{source}/{name}": value for name, value in self._means(some).items()}
        return means

    def _means(self, rows: list[dict[str, Any]]) -> dict[str, float | None]:
        counted = sum(row["counted"] for row in rows)
        means: dict[str, float | None] = dict.fromkeys((*MEASURES, "perplexity"))
        for name in MEASURES:
            if rows and rows[0][name] is not None:
                means[name] = math.fsum(row[name] for row in rows) / counted
        if (ce := means["ce"]) is not None:
            means["perplexity"] = math.exp(min(ce, 700.0))
        return means


class Judge:
    """Takes the same measures and sample answers of every model of a run.

    run: the training whose student and teacher are judged. stop: asked between two batches, where nothing is lost. Rows
    are shared out over processes by batch, and the sums are gathered: no row is counted twice.
    """

    def __init__(self, run: Any, stop: StopRequest) -> None:
        self.run, self.stop = run, stop
        self.prompts: list[dict[str, Any]] = run.data.prompts if run.config.tracking.samples else []
        rows, like = run.data.held_out, run.batches
        groups = by_length(rows, max(like.micro_batch_size, MIN_ROWS), like.micro_batch_tokens)
        groups = groups[like.rank :: like.num_processes]
        self.batches = [collate([rows[i] for i in group], like.pad_id) for group in groups]
        self.answers: list[Answer] | None = None  # of the teacher, in main memory, by batch; taken once
        self.teacher_measures = Measures([])
        self.sources = tuple(rows.sources)

    @torch.no_grad()
    def __call__(self, model: Any, *, as_saved: bool = False) -> Measures:
        """Measure a student in the precision it trains in, or, with its weights cast, as anyone would who loads it."""
        if self.run.teacher is not None and self.answers is None:
            self._ask_teacher()
        machine = self.run.machine
        model.eval()
        head = head_of(model).cut(self.run.objective.num_ids)
        rows: list[dict[str, Any]] = []
        precision = nullcontext() if as_saved else machine.autocast()
        with precision, working("Evaluating student", len(self.batches), machine.is_main_process) as advance:
            head = head.in_compute_dtype()
            for i, micro_batch in enumerate(self.batches):
                batch = micro_batch.to(machine.device)
                hidden = counted_hidden(model, batch)
                rows += _by_row(score(hidden, head, batch, self.answers[i] if self.answers else None), batch)
                advance()
                self.stop.check()
        return Measures(gather_object(rows), self.sources)

    def _ask_teacher(self) -> None:
        """Take the teacher's answers to the held-out rows, and measure them as a student's."""
        teacher, rows = self.run.teacher, []
        self.answers = []
        head = teacher.head.cut(self.run.objective.num_ids)
        with working("Evaluating teacher", len(self.batches), self.run.machine.is_main_process) as advance:
            for batch in self.batches:
                answer = Answer(teacher.answer(batch).hidden.cpu(), head)
                rows += _by_row(score(answer.hidden, head, batch.to(head.weight.device)), batch)
                self.answers.append(answer)
                advance()
                self.stop.check()
        self.teacher_measures = Measures(gather_object(rows), self.sources)

    def before_training(self) -> dict[str, Any]:
        """Measure and sample the teacher and the untouched student: untouched.json."""
        student, teacher = self.run.student, self.run.teacher
        untouched = self(student).means()
        return {
            "untouched": untouched | {"num_parameters": student.num_parameters()},
            "teacher": self.teacher_measures.means() | {"num_parameters": teacher and teacher.num_parameters},
            "teacher_samples": teacher_samples(teacher, self.run.tokenizer, self.prompts),
            "untouched_samples": self.samples(),
        }

    def samples(self) -> list[str]:
        """Let the student answer the sample prompts."""
        return [answer(self.run.student, self.run.tokenizer, prompt["text"]) for prompt in self.prompts]


def teacher_samples(teacher: Teacher | None, tokenizer: Any, prompts: list[dict[str, Any]]) -> list[str | None]:
    """Let the teacher answer the sample prompts, or read its answers from its store."""
    answers = []
    for prompt in prompts:
        key = f"{MAX_NEW_TOKENS} tokens, with the last: {prompt['text']}"
        text = teacher.store.load_answer(key) if teacher and teacher.store else None
        if teacher and text is None:
            text = answer(teacher.model, tokenizer, prompt["text"])
            if teacher.store:
                teacher.store.save_answer(key, text)
        answers.append(text)
    return answers


def score(hidden: Tensor, head: Head, batch: MicroBatch, answer: Answer | None = None) -> dict[str, Tensor]:
    """Measure a batch's N counted positions, a chunk at a time → each measure [N]; ce and accuracy without an answer."""
    parts: list[dict[str, Tensor]] = []
    for chunk in chunks_of(len(hidden), chunk_size_of(head)):
        product = head.product(hidden[chunk])
        teacher_product = None
        if answer is not None:
            teacher_product = answer.head.product(answer.hidden[chunk]).to(product.device)
        for block in blocks_of(product):
            label = batch.counted_labels[chunk][block].unsqueeze(-1)
            s = loss.log_probabilities(head.finish(product[block]))
            choice = s.argmax(-1, keepdim=True)
            part = {"ce": -s.gather(-1, label), "accuracy": (choice == label).float()}
            if answer is not None and teacher_product is not None:
                t = loss.log_probabilities(answer.head.finish(teacher_product[block]))
                part["kl"], part["reverse_kl"] = loss.forward_kl(s, t), loss.reverse_kl(s, t)
                part["agreement"] = (choice == t.argmax(-1, keepdim=True)).float()
            parts.append(part)
    return {name: torch.cat([part[name].flatten() for part in parts]) for name in (parts[0] if parts else ())}


def _by_row(values: dict[str, Tensor], batch: MicroBatch) -> list[dict[str, Any]]:
    """Sum each measure over the positions of each row, in float64."""
    row_of, zeros = batch.row_of.cpu(), torch.zeros(len(batch.row_ids), dtype=torch.float64)
    sums = {name: zeros.index_add(0, row_of, value.double().cpu()).tolist() for name, value in values.items()}
    return [
        {"row": row, "counted": counted} | {name: sums[name][i] if name in sums else None for name in MEASURES}
        for i, (row, counted) in enumerate(zip(batch.row_ids, batch.num_counted, strict=True))
    ]


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """Continue a rendered conversation greedily, whatever the model's own generation config prefers."""
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
    own = model.generation_config
    eos = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    pad = own.pad_token_id if own.pad_token_id is not None else pad_id_of(tokenizer)
    # Not an argument of generate(): unset values would be taken from the model's own.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=eos, pad_token_id=pad
    )
    model.eval()
    output = model.generate(**inputs)
    model.generation_config = own
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])  # with the token that it stopped at


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of the GPU's allocator, or of the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
