"""On-policy rows: which rows of a step get the student's own answer, and how the loss weighs it."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import Accelerator

from kdx.causal_lm import stop_ids
from kdx.config import Config, RolloutConfig
from kdx.data.batches import Batches, MicroBatch, Row, Rows, StepBatch, by_length, collate, write_rows
from kdx.data.encode import Data, Encoder, load_data
from kdx.data.sources import Conversation, parts_of, read_conversations
from kdx.errors import ConfigError, DataError, did_you_mean
from kdx.evaluate import NUM_SAMPLES, Means
from kdx.generate import Answers, Sampling, answers_to, generate, shared_out, stops_of, teacher_stops
from kdx.run.files import cache_dir, hash_json, locked, read_lines, whole_folder, write_beside, write_lines
from kdx.run.launch import build_accelerator
from kdx.run.tracking import log, logging_to
from kdx.store import TeacherStore
from kdx.teacher import identity_of, load_teacher
from kdx.tokenizer import SharedTokenizer, load_tokenizer

Sampler = Callable[[Any, list[list[int]], int], Answers]
_SAMPLERS: dict[str, Sampler] = {}
ENOUGH = 64  # answers, before a warning that most of them are cut


def register_sampler(function: Sampler) -> Sampler:
    """Register a sampler under its name: (model, prompts, step) → answers, both as lists of token ids.

    The model is the student with its current weights. An answer ends with its stop token, if it has one; one that is
    longer than `rollout.max_new_tokens` is cut.
    """
    _SAMPLERS[function.__name__] = function
    return function


def check_rollout(config: Config) -> None:
    """Refuse a sampler that is not registered, and data without prompts. Raises ConfigError."""
    sampler, data = config.rollout.sampler, config.data
    if sampler is not None and sampler not in _SAMPLERS:
        hint = f"{did_you_mean(sampler, list(_SAMPLERS))}. Your own: KDX_PLUGINS=module"
        raise ConfigError("rollout.sampler", f"no sampler is named {sampler!r}", hint)
    if config.rollout.name != "none" and any(part.name == "text" for part, _ in parts_of(data).values()):
        raise ConfigError("rollout", "needs prompts to answer, and plain text has none", "Leave that source out")


@dataclass(frozen=True)
class Rollouts(Batches):
    """Batches in which the student answers a share of the rows itself, with its weights of that step.

    Who answers which prompts together is the same for any number of processes: each does a part, and all get the answers.
    """

    objective: Any = None  # of the student that answers
    words: Any = None  # config.rollout
    shared: Any = None  # the tokenizer
    machine: Any = None
    max_steps: int = 1
    said: Counter[str] = field(default_factory=Counter)  # answers so far, and those with a stop token

    def steps(self, first: int, last: int) -> Iterator[StepBatch | None]:
        """Yield this process's share of steps first … last − 1, then None. Nothing is prepared ahead of the weights."""
        every = self.words.reuse_steps
        for _, span in groupby(self.plan(first, last), lambda step_rows: step_rows[0] // every):
            steps = dict(span)
            seconds = self._answer(steps)
            for step in steps:
                yield self._mixed(step, steps[step], seconds)
                seconds = 0.0
        yield None

    def _answer(self, steps: dict[int, list[int]]) -> float:
        """Have the student answer its rows of these steps, unless a checkpoint had the answers → seconds."""
        started, first, words = time.perf_counter(), min(steps), self.words
        if str(first) in self.kept:
            return 0.0
        pairs = [(step, i) for step, rows in steps.items() for i in rows if self._is_own(step, self.rows[i])]
        seeds = [self._number("answer", step, self.rows[i].id) for step, i in pairs]
        prompts = [prompt_of(self.rows[i]) for _, i in pairs]
        groups = by_length([*map(len, prompts)], words.batch_size)
        if words.sampler is not None:  # all prompts of a process at once
            groups = [[*range(rank, len(prompts), self.num_processes)] for rank in range(self.num_processes)]

        def answer(group: list[int]) -> Answers:
            return self._sampled([prompts[k] for k in group], [seeds[k] for k in group], first)

        said = shared_out(groups, answer, self.machine)
        self.kept.clear()
        self.kept.update({str(step): {} for step in steps})
        for (step, i), prompt, tokens in zip(pairs, prompts, said, strict=True):
            self.kept[str(step)][str(i)] = tokens[: min(self.shared.max_length - len(prompt), words.max_new_tokens)]
        return time.perf_counter() - started

    def _sampled(self, prompts: list[list[int]], seeds: list[int], step: int) -> Answers:
        student, words = self.objective.model, self.words
        with self.machine.autocast():
            if words.sampler is None:
                return generate(student, prompts, sampling_of(words), self.shared, seeds)
            with torch.random.fork_rng():  # it may draw as it likes: training's own numbers stay
                torch.manual_seed(seeds[0])
                was_training = student.training
                student.eval()
                answers = _SAMPLERS[words.sampler](student, prompts, step)
                student.train(was_training)
        return [list(map(int, answer)) for answer in answers]

    def _is_own(self, step: int, row: Row) -> bool:
        """Whether the student is to answer a row at a step."""
        is_chosen = self._number("share", step, row.id) < self.words.share * 2**63
        return is_chosen and 0 < last_turn(row) < self.shared.max_length

    def _number(self, what: str, step: int, row_id: str) -> int:
        """Return a number below 2⁶³ that looks random, the same in every process and after a resume."""
        return xxhash.xxh3_64_intdigest(f"{what}:{self.seed}:{step}:{row_id}".encode()) >> 1

    def _mixed(self, step: int, numbers: list[int], seconds: float) -> StepBatch:
        """Put the student's answers into the rows of a step; the denominator is counted then."""
        answers = self.kept[str(step)]
        rows = [answered(self.rows[i], answers.get(str(i)), is_own=True) for i in numbers]
        own = [row for row in rows if row.start is not None]
        stops = stops_of(self.objective.model.generation_config, self.shared)
        num_finished = sum(row.tokens[-1] in stops for row in own)
        before = self.said["rows"]
        self.said.update(rows=len(own), finished=num_finished)
        if before < ENOUGH <= self.said["rows"]:
            warn_if_cut("student", self.said["finished"], self.said["rows"])
        figures = {
            "own_rows": len(own),
            "own_tokens": sum(len(row.tokens) - (row.start or 0) for row in own),
            "finished": num_finished,
            "generation": seconds,
        }
        return replace(self._shared_out(step, rows), figures=figures)

    def _collated(self, rows: Sequence[Row], step: int) -> MicroBatch:
        """Pad rows, and weigh what the student said: the divergence counts in full, and there is no cross-entropy."""
        batch = collate(rows, self.pad_id)
        starts = torch.tensor([len(row.tokens) if row.start is None else row.start for row in rows])
        is_own = batch.positions % batch.input_ids.shape[1] + 1 >= starts[batch.row_of]
        alpha = self.objective.mix.at(step, self.max_steps).alpha
        own = is_own.to(torch.promote_types(self.objective.model.dtype, torch.float32))
        kd = torch.where(is_own, own.new_tensor(1 / alpha), 1)
        return replace(batch, weights={"kd": kd, "ce": 1 - own, "own": alpha * own})  # own: of kd, for the log


def warn_if_cut(who: str, num_finished: int, num: int) -> None:
    """Warn if most answers have no end."""
    if 2 * num_finished < num:
        log.warning("over half of the %s's answers are cut before they end: raise rollout.max_new_tokens", who)


def sampling_of(config: RolloutConfig, stops: tuple[int, ...] = ()) -> Sampling:
    return Sampling(config.max_new_tokens, config.temperature, config.top_p, stops)


def last_turn(row: Row) -> int:
    """Return where the last run of counted tokens begins."""
    end = max(i for i, is_counted in enumerate(row.counted) if is_counted)
    return next((i + 1 for i in range(end, -1, -1) if not row.counted[i]), 0)


def prompt_of(row: Row) -> list[int]:
    return row.tokens[: last_turn(row)]


def write_samples(run: Any, folder: Path) -> None:
    """Write the first of the student's own answers at this step, or the last there were, to rollouts.jsonl.

    Its lines of later steps are from before the run was resumed, and are left out.
    """
    config, batches, step, file = run.config, run.batches, run.state.step, folder / "rollouts.jsonl"
    if not (config.rollout.is_on_policy and config.tracking.samples and run.machine.is_main_process):
        return
    answers: dict[str, list[int]] = batches.kept.get(str(step)) or next(reversed(batches.kept.values()), {})
    lines = [line for line in read_lines(file) if line["step"] < step]
    for i, answer in [*answers.items()][:NUM_SAMPLES]:
        row = batches.rows[int(i)]
        prompt, said = (run.tokenizer.decode(tokens) for tokens in (prompt_of(row), answer))
        lines.append({"step": step, "row": row.id, "prompt": prompt, "answer": said})
    write_lines(file, lines)


def answered(row: Row, answer: list[int] | None, *, is_own: bool = False) -> Row:
    """Replace a row's last turn by an answer, the student's own or the teacher's; without one it stays as it is given."""
    if not answer:
        return row
    start = last_turn(row)
    tokens, counted = row.tokens[:start] + answer, row.counted[:start] + [True] * len(answer)
    return Row(row.id, tokens, counted, row.where, start if is_own else None)


def figures(window: list[dict[str, Any]]) -> Means:
    """Average what the log says of the student's own answers since the last line: kl is the loss's own divergence."""
    some = [part for part in window if part.get("own_rows")]
    if not any("own_rows" in part for part in window):
        return {}
    rows, tokens = (sum(part[name] for part in some) for name in ("own_rows", "own_tokens"))
    kl = sum(part["own"] * part["counted"] for part in some if part["counted"])
    return {
        "rollout/kl": kl / tokens if tokens else None,
        "rollout/length": tokens / rows if rows else None,
        "rollout/finished": sum(part["finished"] for part in some) / rows if rows else None,
        "speed/generation_seconds": sum(part["generation"] for part in window if "generation" in part),
        "speed/training_seconds": sum(part["seconds"] for part in window),
    }


def warn_about(config: Config, student: Any, teacher_stops: list[int]) -> None:
    """Warn about what makes training on own answers go wrong."""
    if not {*stop_ids(student.generation_config)} & {*teacher_stops}:
        log.warning("student and teacher share no stop token: the student's answers may never end")
    if config.rollout.share == 1 and config.student.init != "pretrained":
        log.warning(
            "rollout.share=1 with an untrained student: its own answers teach it little. Train it on the data first, "
            "and start from that (student=hf student.path=RUN/student)"
        )


def with_teachers_answers(
    config: Config, data: Data, shared: SharedTokenizer, machine: Accelerator, numbers: Sequence[int]
) -> Data:
    """Replace the last turn of training rows by the teacher's answer (rollout=teacher) → the data.

    numbers: of the rows that are read; the teacher answers no others. Rows whose prompt leaves no room for an answer stay
    as they are. Held-out rows keep the people's words.
    """
    asked = (data.train[i] for i in numbers)
    stops = teacher_stops(config.teacher, data.stops, shared)
    answers = dict(zip(numbers, teachers_answers(config, asked, stops, shared, machine), strict=True))
    root, settings = cache_dir() / "data", [config.data.seed, *astuple(sampling_of(config.rollout))]
    folder = root / hash_json([data.fingerprint, shared.max_length, sorted(answers.items())])

    with locked(root / f"{folder.name}.lock"):
        if not folder.is_dir():
            with whole_folder(folder) as beside:
                write_rows(beside / "train", (answered(row, answers.get(i)) for i, row in enumerate(data.train)))
    train = Rows(folder / "train")
    train.sources, train.drawn = data.train.sources, data.train.drawn
    # Of how rows were answered, not of the answers: a run of another length reads other rows of the same data.
    return replace(data, train=train, fingerprint=hash_json([data.fingerprint, settings], xxhash.xxh3_64_hexdigest))


def teachers_answers(
    config: Config, rows: Iterable[Row], stops: tuple[int, ...], shared: SharedTokenizer, machine: Accelerator
) -> Answers:
    """Have the teacher answer the prompt of each row → token ids, with the stop token; none where there is no room."""
    words, teacher, store = config.rollout, config.teacher, None
    if teacher.store != "off":
        root = Path(teacher.store_dir).expanduser().resolve()
        identity = identity_of(teacher, machine.device)
        store = TeacherStore(root, identity, part="said")

    prompts = [tuple(prompt) if len(prompt) < shared.max_length else () for prompt in map(prompt_of, rows)]
    unique = [list(prompt) for prompt in dict.fromkeys(prompts)]
    how: dict[str, Any] = {"batch_size": words.batch_size, "store": store, "about": config.data.seed}

    def load() -> Any:
        return load_teacher(teacher, machine.device, shared.max_length).model  # type: ignore[union-attr]

    answers = answers_to(unique, load, sampling_of(words, stops), shared, machine, **how)
    warn_if_cut("teacher", sum(answer[-1] in stops for answer in answers if answer), sum(map(bool, answers)))
    known = dict(zip(map(tuple, unique), answers, strict=True))
    return [known[prompt][: shared.max_length - len(prompt)] for prompt in prompts]


def write_answers(config: Config, file: Path) -> None:
    """Write each training conversation up to its last turn, with the teacher's answer, as a line for data=messages."""
    machine, shared = build_accelerator(config), load_tokenizer(config)
    with logging_to():
        given = load_data(config.data, shared)
        rows, stops = given.train, teacher_stops(config.teacher, given.stops, shared)
        answers = teachers_answers(config, rows, stops, shared, machine)
        if not machine.is_main_process:
            return
        conversations: dict[str, Conversation] = {}
        for name, (data, _) in parts_of(config.data).items():
            encoder = Encoder(shared, data)
            found = read_conversations(data, encoder)
            training = map(found.__getitem__, range(found.num_train))
            conversations |= {f"{name}/{c.id}".removeprefix("/"): c for c in training}
        texts, left_out = list[str](), Counter[str]()
        for row, answer in zip(rows, answers, strict=True):
            if not answer or (conversation := conversations.get(row.id)) is None:
                left_out["without room, or a later part of a long row"] += 1
                continue
            messages, unlearned = conversation.messages, conversation.unlearned
            turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i not in unlearned]
            number = sum(is_counted for is_counted, _ in groupby(row.counted)) - 1  # of the row's last turn
            *words, last = answer
            said = shared.tokenizer.decode(words)
            if last not in stops:
                left_out["cut before their end"] += 1
            elif encoder.end_ids.intersection(words) or not said.rpartition("</think>")[2].strip():
                left_out["with special tokens or no text"] += 1
            elif number < len(turns):
                asked = replace(conversation, messages=messages[: turns[number]])
                if (message := as_message(encoder, asked, said)) is None:
                    left_out["that the chat template rewrites"] += 1
                    continue
                before = [m | {"weight": 0} if i in unlearned else m for i, m in enumerate(asked.messages)]
                line = {"messages": [*before, message], **conversation.variables}
                texts.append(json.dumps(line, ensure_ascii=False) + "\n")
        write_beside(file.expanduser(), "".join(texts))
        notes = ", ".join(f"{num} {what}" for what, num in left_out.items()) or "none"
        log.info("%s: %d answers to the %d training rows; left out: %s", file, len(texts), len(rows), notes)


def as_message(encoder: Encoder, asked: Conversation, said: str) -> dict[str, str] | None:
    """Return an answer as a message that the chat template writes as it was said, its thinking apart if need be, or None."""
    thinking, _, words = said.rpartition("</think>")
    apart = {"content": words.strip(), "reasoning_content": thinking.strip().removeprefix("<think>").strip()}
    for keys in ({"content": said}, apart):
        message = {"role": "assistant", **keys}
        whole = replace(asked, messages=[*asked.messages, message])
        with suppress(DataError):  # it is refused
            if encoder.turn_of(whole, len(asked.messages)) == said.strip():
                return message
    return None
