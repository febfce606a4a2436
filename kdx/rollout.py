"""On-policy rows: which rows of a step get the student's own answer, and how the loss weighs it."""

import inspect
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock

from kdx import plugins
from kdx.causal_lm import stop_ids
from kdx.config import Config, RolloutConfig, replaced
from kdx.data.batches import Batches, MicroBatch, Row, Rows, StepBatch, collate, write_rows
from kdx.data.encode import Data, Encoder, load_data
from kdx.data.mix import parts_of
from kdx.data.sources import Conversation, read_conversations
from kdx.errors import ConfigError, did_you_mean
from kdx.evaluate import NUM_SAMPLES
from kdx.generate import Sampling, generate, groups_of
from kdx.run.files import cache_dir, read_lines, whole_folder, write_beside, write_lines
from kdx.run.launch import build_accelerator
from kdx.run.tracking import logging_to, quiet_libraries, working
from kdx.store import TeacherStore
from kdx.teacher import identity_of, load_teacher
from kdx.tokenizer import SharedTokenizer, load_tokenizer, pad_id_of

log = logging.getLogger("kdx")

Sampler = Callable[[Any, list[list[int]], int], list[list[int]]]
_SAMPLERS: dict[str, Sampler] = {}
ENOUGH = 64  # answers, before a warning that most of them are cut


def register_sampler(function: Sampler) -> Sampler:
    """Register a sampler under its name: (model, prompts, step) → answers, both as lists of token ids.

    The model is the student with its weights of now. An answer ends with the stop token where one was said; one that is
    longer than `rollout.max_new_tokens` is cut.
    """
    if len(inspect.signature(function).parameters) != 3:
        raise TypeError(f"{function.__name__} must take (model, prompts, step)")
    _SAMPLERS[function.__name__] = function
    return function


def check_rollout(config: RolloutConfig) -> None:
    """Refuse a sampler that is not registered. Raises ConfigError."""
    if config.sampler is not None and config.sampler not in _SAMPLERS:
        hint = f"{did_you_mean(config.sampler, list(_SAMPLERS))}. Your own: KDX_PLUGINS=module"
        raise ConfigError("rollout.sampler", f"no sampler is named {config.sampler!r}", hint)


@dataclass(frozen=True)
class OwnRow(Row):
    """A row whose last turn, from token `start` on, the student said itself."""

    start: int = 0

    @property
    def digest(self) -> str:
        """Nothing: such a row never enters the teacher's store."""
        return ""


class StepRows(list[Row]):
    """The rows of a step in memory, with the columns that `Rows` has in its file."""

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.array([len(row.tokens) for row in self])

    @cached_property
    def num_counted(self) -> np.ndarray:
        return np.array([row.num_counted for row in self])


@dataclass(frozen=True)
class Rollouts(Batches):
    """Batches in which the student answers a share of the rows itself, with its weights of that step.

    Who answers which prompts together is the same for any number of processes: each does a part, and all get the answers.
    """

    student: Any = None
    words: Any = None  # config.rollout
    machine: Accelerator | None = None
    mix: Any = None
    max_steps: int = 1
    num_ids: int = 0
    max_length: int = 0
    said: Counter[str] = field(default_factory=Counter)  # answers so far, and those with a stop token

    def steps(self, first: int, last: int) -> Iterator[StepBatch | None]:
        """Yield this process's share of steps first … last − 1, then None. Nothing is prepared ahead of the weights."""
        every = self.words.reuse_steps
        plan = self.plan(first, -(-last // every) * every)  # whole spans: a longer run has the same answers
        for _, span in groupby(plan, lambda step_rows: step_rows[0] // every):
            steps = dict(span)
            seconds = self._answer(steps)
            for step in range(min(steps), min(last, max(steps) + 1)):
                yield self._mixed(step, steps[step], seconds)
                seconds = 0.0
        yield None

    def _answer(self, steps: dict[int, list[int]]) -> float:
        """Have the student answer its rows of these steps, unless a checkpoint had the answers → seconds."""
        started, first = time.perf_counter(), min(steps)
        if str(first) in self.kept:
            return 0.0
        chosen = [(step, i, row) for step, rows in steps.items() for i in rows if (row := self._prompt(step, i))]
        prompts = [row.tokens[: row.start] for *_, row in chosen]
        words = self.words
        if words.sampler is None:
            groups = groups_of(prompts, words.batch_size)
        else:  # all prompts of this process at once
            groups = [list(range(rank, len(prompts), self.num_processes)) for rank in range(self.num_processes)]
        said: list[tuple[int, list[int]]] = []
        for group in filter(None, groups[self.rank :: self.num_processes]):
            seeds = [self._number("answer", chosen[k][0], chosen[k][2].id) for k in group]
            said += zip(group, self._sampled([prompts[k] for k in group], seeds, first), strict=True)
        answers: dict[str, dict[str, list[int]]] = {str(step): {} for step in steps}
        for k, answer in gather_object(said):
            step, i, row = chosen[k]
            room = min(self.max_length - row.start, words.max_new_tokens)
            answers[str(step)][str(i)] = answer[:room]
        self.kept.clear()
        self.kept.update(answers)
        return time.perf_counter() - started

    def _sampled(self, prompts: list[list[int]], seeds: list[int], step: int) -> list[list[int]]:
        assert self.machine is not None
        words = self.words
        with self.machine.autocast():
            if words.sampler is None:
                sampling = Sampling(words.max_new_tokens, words.temperature, words.top_p)
                return generate(self.student, prompts, sampling, num_ids=self.num_ids, pad_id=self.pad_id, seeds=seeds)
            with torch.random.fork_rng():  # it may draw as it likes: training's own numbers stay
                torch.manual_seed(seeds[0])
                was_training = self.student.training
                self.student.eval()
                answers = _SAMPLERS[words.sampler](self.student, prompts, step)
                self.student.train(was_training)
        if len(answers) != len(prompts):
            what = f"returned {len(answers)} answers to {len(prompts)} prompts"
            raise ConfigError(f"rollout.sampler={words.sampler}", what, "Return one for each, as lists of token ids")
        return [list(map(int, answer)) for answer in answers]

    def _prompt(self, step: int, i: int) -> OwnRow | None:
        """Return a row if the student is to answer it, with the place of its last turn."""
        row = self.rows[i]
        start = last_turn(row)
        if not 0 < start < self.max_length:
            return None
        if self._number("share", step, row.id) >= self.words.share * 2**63:
            return None
        return OwnRow(**{name: getattr(row, name) for name in ("id", "tokens", "counted", "where")}, start=start)

    def _number(self, what: str, step: int, row_id: str) -> int:
        """Return a number below 2⁶³ that looks random, the same in every process and after a resume."""
        return xxhash.xxh3_64_intdigest(f"{what}:{self.seed}:{step}:{row_id}".encode()) >> 1

    def _mixed(self, step: int, numbers: list[int], seconds: float) -> StepBatch:
        """Put the student's answers into the rows of a step; the denominator is counted then."""
        answers = self.kept[str(step)]
        rows = StepRows(own_row(self.rows[i], answers.get(str(i))) for i in numbers)
        own = [row for row in rows if isinstance(row, OwnRow)]
        stops = stop_ids(self.student.generation_config)
        num_finished = sum(row.tokens[-1] in stops for row in own)
        before = self.said["rows"]
        self.said.update(rows=len(own), finished=num_finished)
        if before < ENOUGH <= self.said["rows"] and 2 * self.said["finished"] < self.said["rows"]:
            log.warning("over half of the student's answers are cut before they end: raise rollout.max_new_tokens")
        figures = {
            "own_rows": len(own),
            "own_tokens": sum(len(row.tokens) - row.start for row in own),
            "finished": num_finished,
            "generation": seconds,
        }
        return replace(self._shared_out(step, list(range(len(rows))), rows), figures=figures)

    def _collated(self, rows: Sequence[Row], step: int) -> MicroBatch:
        """Pad rows, and weigh what the student said: the divergence counts in full, and there is no cross-entropy."""
        batch = collate(rows, self.pad_id)
        starts = torch.tensor([getattr(row, "start", len(row.tokens)) for row in rows])
        is_own = batch.positions % batch.input_ids.shape[1] + 1 >= starts[batch.row_of]
        alpha, is_fp64 = self.mix.at(step, self.max_steps).alpha, self.student.dtype == torch.float64
        weights = {
            "kd": torch.where(is_own, 1 / alpha, torch.ones((), dtype=torch.float64)),
            "ce": (~is_own).double(),
            "own": is_own * torch.tensor(alpha, dtype=torch.float64),  # of kd, for the log: its value there
        }
        return replace(
            batch,
            weights={name: weight.to(torch.float64 if is_fp64 else torch.float32) for name, weight in weights.items()},
        )


def last_turn(row: Row) -> int:
    """Return where the last run of counted tokens begins."""
    end = max(i for i, is_counted in enumerate(row.counted) if is_counted)
    return next((i + 1 for i in range(end, -1, -1) if not row.counted[i]), 0)


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
        prompt = run.tokenizer.decode(row.tokens[: last_turn(row)])
        lines.append({"step": step, "row": row.id, "prompt": prompt, "answer": run.tokenizer.decode(answer)})
    write_lines(file, lines)


def own_row(row: Row, answer: list[int] | None) -> Row:
    """Replace a row's last turn by an answer; without one it stays as it is given."""
    if not answer:
        return row
    start = last_turn(row)
    tokens, counted = row.tokens[:start] + answer, row.counted[:start] + [True] * len(answer)
    return OwnRow(row.id, tokens, counted, row.where, start)


def figures(window: list[dict[str, Any]]) -> dict[str, float | None]:
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
    if set(stop_ids(student.generation_config)) != set(teacher_stops):
        log.warning("student and teacher stop at other tokens: the student's own answers may grow without end")
    if config.rollout.share == 1 and config.student.init != "pretrained":
        log.warning(
            "rollout.share=1 with a student that cannot speak yet: its own answers teach little; train it on given "
            "answers first, and start from it (student=hf student.path=RUN/student)"
        )


def with_teachers_answers(config: Config, data: Data, shared: SharedTokenizer, machine: Accelerator) -> Data:
    """Replace the last turn of each training row by the teacher's answer, from its store or generated now → the data.

    Rows whose prompt leaves no room for an answer stay as they are. Held-out rows keep the people's words.
    """
    if config.rollout.name != "teacher":
        return data
    root = cache_dir() / "data"
    known = teachers_answers(config, data.train, shared, machine)
    about = json.dumps([data.fingerprint, shared.max_length, [*known.items()]])
    folder = root / xxhash.xxh3_128_hexdigest(about.encode())

    def rows() -> Iterator[Row]:
        for row in data.train:
            start = last_turn(row)
            answer = known.get(_key(config, row.tokens[:start]), [])[: shared.max_length - start]
            counted = row.counted[:start] + [True] * len(answer)
            yield Row(row.id, row.tokens[:start] + answer, counted, row.where) if answer else row

    with FileLock(root / f"{folder.name}.lock"):
        if not folder.is_dir():
            with whole_folder(folder) as beside:
                (beside / "fingerprint").write_text(write_rows(beside / "train", rows()))
    train = Rows(folder / "train")
    train.sources, train.drawn = data.train.sources, data.train.drawn
    return replace(data, train=train, fingerprint=(folder / "fingerprint").read_text())


def teachers_answers(
    config: Config, rows: Sequence[Row], shared: SharedTokenizer, machine: Accelerator
) -> dict[str, list[int]]:
    """Have the teacher answer each prompt of these rows once → key of the prompt → token ids, with the stop token."""
    words, teacher = config.rollout, config.teacher
    identity = identity_of(teacher, machine.device)
    store = None
    if teacher.store != "off":
        root = Path(teacher.store_dir).expanduser().resolve()
        store = TeacherStore(root, identity, name=str(teacher.base_model or teacher.path), part="said")
    prompts = {}
    for row in rows:
        if 0 < (start := last_turn(row)) < shared.max_length:
            prompts[_key(config, row.tokens[:start])] = row.tokens[:start]
    missing = store.missing([*prompts]) if store else [*prompts]
    answers: dict[str, list[int]] = {}
    if missing:
        off = replaced(teacher, store="off")
        model = load_teacher(off, machine.device, shared.max_length, {}, is_repeated=False).model  # type: ignore[union-attr]
        sampling = Sampling(words.max_new_tokens, words.temperature, words.top_p)
        groups = groups_of([prompts[key] for key in missing], words.batch_size)
        groups = groups[machine.process_index :: machine.num_processes]
        with working("Teacher answers", len(groups), machine.is_main_process) as advance:
            for group in groups:
                keys = [missing[k] for k in group]
                seeds = [int(key[:15], 16) for key in keys]
                some = [prompts[key] for key in keys]
                num_ids, pad_id = shared.num_ids, pad_id_of(shared.tokenizer)
                said = generate(model, some, sampling, num_ids=num_ids, pad_id=pad_id, seeds=seeds)
                if store:
                    said = [row.tolist() for row in store.write(keys, [torch.tensor(tokens) for tokens in said])]
                answers |= zip(keys, said, strict=True)
                advance()
        if store:
            store.close()
        log.info("the teacher answered %d prompts", len(missing))
    answers = dict(gather_object([*answers.items()]))
    for key in prompts:
        if key not in answers:
            (tokens,) = store.read([key]) or [torch.tensor([], dtype=torch.long)]  # type: ignore[union-attr]
            answers[key] = tokens.tolist()
    return answers


def _key(config: Config, prompt: list[int]) -> str:
    """Name a prompt and how it is answered; the same for all training seeds of a sweep."""
    words = config.rollout
    about = [prompt, words.max_new_tokens, words.temperature, words.top_p, config.data.seed]
    return xxhash.xxh3_128_hexdigest(json.dumps(about).encode())


def write_answers(config: Config, file: Path) -> None:
    """Write each training conversation up to its last turn, with the teacher's answer, as a line for data=messages."""
    quiet_libraries()
    plugins.load()
    machine, shared = build_accelerator(config), load_tokenizer(config)
    with logging_to(None, machine.is_main_process):
        rows = load_data(config.data, shared).train
        answers = teachers_answers(config, rows, shared, machine)
        if not machine.is_main_process:
            return
        parts = parts_of(config.data) if config.data.name == "mix" else {"": (config.data, 1.0)}
        conversations: dict[str, Conversation] = {}
        for name, (data, _) in parts.items():
            encoder = Encoder(shared, day=data.template_date)
            found = read_conversations(data, cache_dir() / "data", encoder)
            conversations |= {f"{name}/{c.id}".removeprefix("/"): c for c in map(found.__getitem__, range(len(found)))}
        texts = []
        for row in rows:
            answer = answers.get(_key(config, row.tokens[: last_turn(row)]))
            if answer is None or (conversation := conversations.get(row.id)) is None:  # a later part of a long row
                continue
            messages, unlearned = conversation.messages, conversation.unlearned
            turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i not in unlearned]
            number = sum(is_counted for is_counted, _ in groupby(row.counted)) - 1  # of the row's last turn
            if number < len(turns):
                said = shared.tokenizer.decode(answer, skip_special_tokens=True)
                turn = {"role": "assistant", "content": said}
                texts.append(json.dumps({"messages": [*messages[: turns[number]], turn]}, ensure_ascii=False) + "\n")
        write_beside(file.expanduser(), "".join(texts))
        log.info("%s: %d answers to the %d training rows", file, len(texts), len(rows))
