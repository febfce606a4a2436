"""Let a model answer prompts, many at once: tokens in, tokens out.

A row's answer depends on its prompt and seed; other rows of the batch change rounding alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from kdx.causal_lm import generation_config, num_positions, stop_ids
from kdx.config import TeacherConfig
from kdx.data.batches import by_length
from kdx.run.files import hash_json
from kdx.run.tracking import working
from kdx.store import TeacherStore
from kdx.tokenizer import SharedTokenizer

AT_ONCE = 32  # prompts; a step of generation takes hardly longer for many

Answers = list[list[int]]  # token ids


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stops: tuple[int, ...] = ()  # tokens that end an answer; empty: those of the model


class Drawn(LogitsProcessor):
    """Makes the likeliest token a sample: Gumbel noise from a generator of each row's own (Gumbel, 1954)."""

    def __init__(self, sampling: Sampling, num_ids: int, seeds: Sequence[int], device: torch.device) -> None:
        self.num_ids, self.temperature = num_ids, sampling.temperature
        self.top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [B, V] whose maximum is the next token of each row; ids past num_ids are padding of the head."""
        scores = scores.float().clone()
        scores[:, self.num_ids :] = -math.inf
        if self.temperature == 0:
            return scores
        scores /= self.temperature
        if self.top_p is not None:
            scores = self.top_p(input_ids, scores)
        for row, generator in zip(scores, self.generators, strict=True):
            row -= torch.empty_like(row).exponential_(generator=generator).log()
        return scores


def generate(
    model: Any, prompts: Sequence[list[int]], sampling: Sampling, shared: SharedTokenizer, seeds: Sequence[int] = ()
) -> Answers:
    """Continue prompts in one batch, padded on the left, in eval mode → the new tokens, with the stop token if one was said.

    Of the model's generation config only the stop tokens are used. No random generator but those of the rows is used.
    seeds: of each row.

    An answer ends where the model can read no further. Prompts that leave it less room than the others are a batch of
    their own: beside them it would read on, past its last position.
    """
    seeds, length = seeds or [0] * len(prompts), num_positions(model.config) or math.inf
    rooms = [int(min(sampling.max_new_tokens, length - len(prompt))) for prompt in prompts]
    answers: Answers = [[] for _ in prompts]
    for room in sorted({room for room in rooms if room > 0}):
        some = [i for i, own in enumerate(rooms) if own == room]
        drawn = Drawn(sampling, shared.num_ids, [seeds[i] for i in some], model.device)
        said = _continued(model, [prompts[i] for i in some], room, drawn, shared, [*sampling.stops])
        for i, answer in zip(some, said, strict=True):
            answers[i] = answer
    return answers


@torch.no_grad()
def _continued(
    model: Any, prompts: list[list[int]], num_tokens: int, drawn: Drawn, shared: SharedTokenizer, stops: list[int]
) -> Answers:
    """Continue prompts, each by at most `num_tokens` tokens. stops: as in Sampling."""
    longest, own, was_training = max(map(len, prompts)), model.generation_config, model.training
    input_ids, stops = torch.full((len(prompts), longest), shared.pad_id), stops or stops_of(own, shared)
    mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):
        input_ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    # Not arguments of generate(): unset values would be taken from the model's own.
    ids: dict[str, Any] = {"eos_token_id": stops or None, "pad_token_id": shared.pad_id}
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=num_tokens, **ids)
    model.eval()
    try:
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            logits_processor=LogitsProcessorList([drawn]),
        )
    finally:
        model.generation_config = own
        model.train(was_training)
    answers = output[:, longest:].tolist()  # padded behind their stop tokens
    return [next((a[: i + 1] for i, token in enumerate(a) if token in stops), a) for a in answers]


def stops_of(config: GenerationConfig, shared: SharedTokenizer) -> list[int]:
    """Return the tokens that end an answer; a model that names none stops at the tokenizer's end of text."""
    end = shared.tokenizer.eos_token_id
    return stop_ids(config) or ([] if end is None else [end])


def teacher_stops(config: TeacherConfig, stops: Sequence[int], shared: SharedTokenizer) -> tuple[int, ...]:
    """Return the tokens that end a teacher's answer: its own, and those that end the rows of the data."""
    return tuple(dict.fromkeys([*stops_of(generation_config(config, "teacher"), shared), *stops]))


def shared_out(groups: Sequence[list[int]], answer: Callable[[list[int]], Answers], machine: Accelerator) -> Answers:
    """Have each process answer some of these groups of prompts → the answers to all, in the order of the prompts."""
    said: list[tuple[int, list[int]]] = []
    for group in filter(None, groups[machine.process_index :: machine.num_processes]):
        said += zip(group, answer(group), strict=True)
    return [tokens for _, tokens in sorted(gather_object(said))]


def answers_to(
    prompts: Sequence[list[int]],
    load: Callable[[], Any],
    sampling: Sampling,
    shared: SharedTokenizer,
    machine: Accelerator,
    *,
    batch_size: int = AT_ONCE,
    store: TeacherStore | None = None,
    about: object = None,
) -> Answers:
    """Return a model's answer to each prompt, from a store or generated now; an empty prompt has an empty one.

    load: gives the model, if it is needed. about: what else the answers depend on; with the rest it decides the seeds.
    """
    keys = [hash_json([prompt, *astuple(sampling), about]) for prompt in prompts]
    there = {*keys} - {*store.missing(keys)} if store else set[str]()
    known = {key: rows[0].tolist() for key in there if store and (rows := store.read([key]))}
    missing = [i for i, prompt in enumerate(prompts) if prompt and keys[i] not in known]
    known, missing = broadcast_object_list([known, missing])  # the same for all, whatever others write meanwhile
    answers = [known.get(key, []) for key in keys]
    if missing:
        model, groups = load(), by_length([len(prompts[i]) for i in missing], batch_size)
        with working("Answering prompts", len(groups) // machine.num_processes) as advance:

            def answer(group: list[int]) -> Answers:
                some = [missing[k] for k in group]
                seeds = [int(keys[i][:15], 16) for i in some]
                said = generate(model, [prompts[i] for i in some], sampling, shared, seeds)
                if store:
                    rows = store.write([keys[i] for i in some], [torch.tensor(tokens) for tokens in said])
                    said = [row.tolist() for row in rows]
                advance()
                return said

            said = shared_out(groups, answer, machine)
        for i, tokens in zip(missing, said, strict=True):
            answers[i] = tokens
    if store:
        store.close()
    return answers
