"""The same measures for teacher, untouched student and student: on held-out rows, at temperature 1.

N counted positions, n positions of a chunk, V vocabulary.
"""

import math
import re
import resource
import sys
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, repeat
from typing import Any

import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import gather_object
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor

from kdx import loss
from kdx.causal_lm import Head, counted_hidden, head_of
from kdx.config import Config
from kdx.data.batches import MicroBatch, Row, by_length, collate, in_groups
from kdx.data.encode import MAX_NEW_TOKENS, Prompts
from kdx.generate import Answers, Sampling, answers_to, stops_of, teacher_stops
from kdx.objective import blocks_of, chunk_size_of, chunks_of
from kdx.run.files import Lines, hash_json
from kdx.run.signals import StopRequest
from kdx.run.tracking import log, working
from kdx.store import TeacherStore
from kdx.teacher import Answer, Teacher
from kdx.tokenizer import SharedTokenizer

MEASURES = ("ce", "kl", "reverse_kl", "agreement", "accuracy")
KEPT_BYTES = 2 * 2**30  # of a teacher's answers to held-out rows in main memory; it is asked again for the others
MIN_ROWS = 8  # rows at once: measuring needs less memory than training
LEAST_MEASURED, MOST_MEASURED = 8, 64  # prompts, with eval.num_prompts=auto
TOKENS_FOR_A_PROMPT = 4000  # trained on: three models that each say 48 take about a tenth as long
# Thai and Lao, Burmese, Khmer, Japanese, Chinese
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
NUM_SAMPLES = 3  # answers that a run shows
GREEDY = Sampling(MAX_NEW_TOKENS)

Means = dict[str, float | None]  # by measure; None where it was not taken


@dataclass(frozen=True)
class Measures:
    """Sums over the counted positions of each held-out row, and their means over all of them."""

    rows: Lines  # row, counted, and the sum of each measure (None where there is no teacher)
    sources: tuple[str, ...] = ()  # of a mixture; the id of a row begins with its source

    def means(self) -> Means:
        """Average each measure over all counted positions, None where it was not taken; with the perplexity of ce.

        Those of each source of a mixture are named `SOURCE/MEASURE`.
        """
        means = self._means(self.rows)
        for source in self.sources:
            some = [row for row in self.rows if row["row"].startswith(f"{source}/")]
            means |= {f"{source}/{name}": value for name, value in self._means(some).items()}
        return means

    def _means(self, rows: Lines) -> Means:
        counted = sum(row["counted"] for row in rows)
        means: Means = dict.fromkeys((*MEASURES, "perplexity"))
        for name in MEASURES:
            if rows and rows[0][name] is not None:
                means[name] = math.fsum(row[name] for row in rows) / counted
        if (ce := means["ce"]) is not None:
            means["perplexity"] = math.exp(min(ce, 700.0))
        return means


class Words:
    """Splits text into words for ROUGE, in any script; rouge_score's own tokenizer keeps a–z and 0–9 alone."""

    def tokenize(self, text: str) -> list[str]:
        """Return lower-case words; of scripts without spaces, characters."""
        letters = (c if c.isalnum() or unicodedata.category(c) in ("Mn", "Mc") else " " for c in text.lower())
        return re.findall(f"[{UNSPACED}]|[^\\s{UNSPACED}]+", "".join(letters))


@dataclass(frozen=True)
class Said:
    """Greedy answers of a model to prompts, and a row of measures for each of those that are measured, the first."""

    answers: Answers
    rows: Lines  # row, rouge_l, answer_length, finished; on_policy_kl, the sum over its tokens, or None

    def means(self) -> Means:
        """Average each measure over the answers, on_policy_kl over their tokens; empty if none is measured.

        distinct_2 is the share of the bigrams of all answers that are different ones.
        """
        if not self.rows:
            return {}
        sums = {name: math.fsum(row[name] for row in self.rows) for name in ("rouge_l", "answer_length", "finished")}
        means: Means = {name: value / len(self.rows) for name, value in sums.items()}
        bigrams = [pair for answer in self.answers[: len(self.rows)] for pair in pairwise(answer)]
        means["distinct_2"] = len(set(bigrams)) / len(bigrams) if bigrams else None
        kls = [row["on_policy_kl"] for row in self.rows]
        means["on_policy_kl"] = None if None in kls else math.fsum(kls) / sums["answer_length"]
        return means


class Judge:
    """Takes the same measures and sample answers of every model of a run.

    run: the training whose student and teacher are judged. stop: asked between two batches, where nothing is lost. Rows
    are shared out over processes by batch, and the sums are gathered: no row is counted twice.
    """

    def __init__(self, run: Any, stop: StopRequest) -> None:
        self.run, self.stop = run, stop
        self.num_samples, self.num_measured = NUM_SAMPLES * run.config.tracking.samples, num_measured(run)
        self.prompts: Prompts = run.data.prompts[: max(self.num_samples, self.num_measured)]
        rows, like = run.data.held_out, run.batches
        groups = by_length(rows.lengths, max(like.micro_batch_size, MIN_ROWS), like.micro_batch_tokens)
        groups = groups[like.rank :: like.num_processes]
        self.rows, self.groups, self.pad_id = rows, groups, like.pad_id
        self.answers: list[Answer] | None = None  # of the teacher to the first batches, taken once; in main memory
        self.teacher_measures = Measures([])

    @torch.no_grad()
    def __call__(self, model: Any, *, as_saved: bool = False) -> Measures:
        """Measure a student in the precision it trains in, or, with its weights cast, as anyone would who loads it."""
        if self.run.teacher is not None and self.answers is None:
            self._ask_teacher()
        model.eval()
        head = head_of(model).cut(self.run.objective.num_ids)
        with nullcontext() if as_saved else self.run.machine.autocast():
            hidden_of = partial(counted_hidden, model)
            return self._measured("Evaluating student", head.in_compute_dtype(), hidden_of, self.answers)

    def _ask_teacher(self) -> None:
        """Take the teacher's answers to the held-out rows, and measure them as a student's."""
        answers, room = list[Answer](), KEPT_BYTES

        def hidden_of(batch: MicroBatch) -> Tensor:
            nonlocal room
            answer = self._teachers(batch)
            room -= answer.hidden.nbytes
            if room > 0:
                answers.append(replace(answer, hidden=answer.hidden.cpu()))
            return answer.hidden

        head = self.run.teacher.head.cut(self.run.objective.num_ids)
        self.teacher_measures = self._measured("Evaluating teacher", head, hidden_of)
        self.answers = answers

    def _teachers(self, batch: MicroBatch) -> Answer:
        answer = self.run.teacher.answer(batch)
        return replace(answer, head=answer.head.cut(self.run.objective.num_ids))

    def _measured(
        self, what: str, head: Head, hidden_of: Callable[[MicroBatch], Tensor], answers: list[Answer] | None = None
    ) -> Measures:
        rows: Lines = []
        with working(what, len(self.groups)) as advance:
            for i, group in enumerate(self.groups):
                batch = collate([self.rows[k] for k in group], self.pad_id).to(head.weight.device)
                answer = None if answers is None else answers[i] if i < len(answers) else self._teachers(batch)
                rows += by_row(score(hidden_of(batch), head, batch, answer), batch)
                advance()
                self.stop.check()
        return Measures(gather_object(rows), tuple(self.run.data.held_out.sources))

    def before_training(self) -> dict[str, Any]:
        """Measure and sample the teacher and the untouched student: untouched.json."""
        student, teacher, run = self.run.student, self.run.teacher, self.run
        untouched, of_teacher = self(student).means(), Said([], [])
        if teacher:
            stops = teacher_stops(run.config.teacher, run.data.stops, run.shared)
            answers = teacher_answers(teacher, run.shared, self.prompts, run.machine, stops)
            of_teacher = said_of(answers, self.prompts[: self.num_measured], run.tokenizer, stops)
        of_student = self.answered(student)
        self.stop.check()
        num = teacher and teacher.num_parameters
        return {
            "untouched": untouched | of_student.means(),
            "teacher": self.teacher_measures.means() | of_teacher.means() | {"num_parameters": num},
            "teacher_samples": self.samples(of_teacher) if teacher else [None] * self.num_samples,
            "untouched_samples": self.samples(of_student),
        }

    def answered(self, student: Any, *, is_final: bool = False) -> Said:
        """Let a student answer the prompts greedily. is_final: whether training is over, so the teacher may be loaded."""
        self.stop.check()
        run, asked = self.run, self.run.config.eval.on_policy_kl
        teacher = run.teacher if self.num_measured and self.prompts and asked is not False else None
        if teacher and not teacher.is_loaded and not (asked is True and is_final):
            teacher = None
            if asked is True:
                log.info("on-policy KL of the untouched student: not measured, the teacher is loaded after training")
            elif is_final:
                log.info("on-policy KL: not measured, the teacher is not loaded; eval.on_policy_kl=true loads it")
        return answered(student, run.shared, self.prompts, self.num_measured, run.machine, teacher)

    def samples(self, said: Said) -> list[str]:
        """Return the answers to show as text, with the token that they stopped at."""
        return [self.run.tokenizer.decode(answer) for answer in said.answers[: self.num_samples]]


def to_minimise(measures: dict[str, Any], metric: str) -> float | None:
    """Return what train.keep=best, early stopping and a sweep make small: a measure, ROUGE-L with the sign turned.

    In place of KL it is CE where there is no teacher; None if the measure was not taken.
    """
    value = measures.get(metric)
    if value is None and metric == "kl":
        value = measures["ce"]
    return -value if value is not None and metric == "rouge_l" else value


def num_prompts(config: Config) -> int:
    """Return how many prompts are answered, for measures and samples."""
    asked = config.eval.num_prompts
    return MOST_MEASURED if asked == "auto" else max(NUM_SAMPLES, asked)


def num_measured(run: Any) -> int:
    """Return how many answers are measured: as many as are asked for, or so many that they cost a short run little."""
    asked = run.config.eval.num_prompts
    if asked != "auto":
        return int(asked)
    tokens = int(run.max_steps / run.batches.steps_per_epoch * run.data.train.lengths.sum())
    return min(MOST_MEASURED, max(LEAST_MEASURED, tokens // TOKENS_FOR_A_PROMPT))


def answered(
    student: Any,
    shared: SharedTokenizer,
    prompts: Prompts,
    num_measured: int,
    machine: Accelerator,
    teacher: Teacher | None = None,
) -> Said:
    """Let a student answer prompts greedily, and measure the first; with a teacher, take its KL to it there."""
    inputs = [prompt["tokens"] for prompt in prompts]
    answers = answers_to(inputs, lambda: student, GREEDY, shared, machine)
    kls = on_policy_kls(student, teacher, inputs[:num_measured], answers, shared) if teacher else None
    return said_of(answers, prompts[:num_measured], shared.tokenizer, stops_of(student.generation_config, shared), kls)


def teacher_answers(
    teacher: Teacher, shared: SharedTokenizer, prompts: Prompts, machine: Accelerator, stops: tuple[int, ...]
) -> Answers:
    """Let the teacher answer prompts greedily, or read its answers from its store."""
    of_rows, inputs = teacher.store, [prompt["tokens"] for prompt in prompts]
    store = of_rows and TeacherStore(of_rows.root, teacher.identity, part="said")
    greedy = replace(GREEDY, stops=stops)
    return answers_to(inputs, lambda: teacher.model, greedy, shared, machine, store=store, about=shared.num_ids)


def said_of(
    answers: Answers, prompts: Prompts, tokenizer: Any, stops: Sequence[int], kls: list[float] | None = None
) -> Said:
    """Measure the answers to these prompts: ROUGE-L (F) to the people's answer, tokens, whether a stop token was said.

    kls: of each, the KL to the teacher summed over its tokens, if it was taken.
    """
    scorer, rows = RougeScorer(["rougeL"], tokenizer=Words()), []
    for prompt, answer, kl in zip(prompts, answers, kls or repeat(None), strict=False):
        text = tokenizer.decode(answer, skip_special_tokens=True)
        row = {
            "row": hash_json([prompt["text"], prompt["reference"]], xxhash.xxh3_64_hexdigest),
            "rouge_l": scorer.score(prompt["reference"], text)["rougeL"].fmeasure,
            "answer_length": len(answer),
            "finished": int(bool(answer) and answer[-1] in stops),
            "on_policy_kl": kl,
        }
        rows.append(row)
    return Said(answers, rows)


@torch.no_grad()
def on_policy_kls(
    student: Any, teacher: Teacher, prompts: list[list[int]], answers: Answers, shared: SharedTokenizer
) -> list[float]:
    """Sum KL(student ‖ teacher) over the tokens of each of the student's own answers, with the teacher's body."""
    student.eval()
    head, teacher_head = (each.cut(shared.num_ids) for each in (head_of(student).in_compute_dtype(), teacher.head))
    pairs = zip(prompts, answers, strict=False)
    rows = [Row("", prompt + said, [False] * len(prompt) + [True] * len(said)) for prompt, said in pairs]
    kls: list[float] = []
    for some in in_groups(rows, MIN_ROWS):
        batch = collate(some, shared.pad_id).to(student.device)
        values = score(counted_hidden(student, batch), head, batch, Answer(teacher.live(batch), teacher_head))
        kls += [row["reverse_kl"] for row in by_row(values, batch)]
    return kls


def score(hidden: Tensor, head: Head, batch: MicroBatch, answer: Answer | None = None) -> dict[str, Tensor]:
    """Measure a batch's N counted positions, a chunk at a time → each measure [N]; ce and accuracy without an answer."""
    parts: list[dict[str, Tensor]] = []
    for chunk in chunks_of(len(hidden), chunk_size_of(head)):
        product = head.product(hidden[chunk])
        theirs = answer.head.product(answer.hidden[chunk]).to(product.device) if answer else None
        for block in blocks_of(product):
            label = batch.counted_labels[chunk][block].unsqueeze(-1)
            s = loss.log_probabilities(head.finish(product[block]))
            choice = s.argmax(-1, keepdim=True)
            part = {"ce": -s.gather(-1, label), "accuracy": (choice == label).float()}
            if answer and theirs is not None:
                t = loss.log_probabilities(answer.head.finish(theirs[block]))
                part["kl"], part["reverse_kl"] = loss.forward_kl(s, t), loss.reverse_kl(s, t)
                part["agreement"] = (choice == t.argmax(-1, keepdim=True)).float()
            parts.append(part)
    return {name: torch.cat([part[name].flatten() for part in parts]) for name in (parts[0] if parts else ())}


def by_row(values: dict[str, Tensor], batch: MicroBatch) -> Lines:
    """Sum each measure over the positions of each row, in float64."""
    row_of, zeros = batch.row_of.cpu(), torch.zeros(len(batch.row_ids), dtype=torch.float64)
    sums = {name: zeros.index_add(0, row_of, value.double().cpu()).tolist() for name, value in values.items()}
    return [
        {"row": row, "counted": counted} | {name: sums[name][i] if name in sums else None for name in MEASURES}
        for i, (row, counted) in enumerate(zip(batch.row_ids, batch.num_counted, strict=True))
    ]


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of the GPU's allocator, or of the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
