"""Let a model answer prompts, many at once: tokens in, tokens out.

A row's answer depends on its prompt and seed; other rows of the batch change rounding alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from kdx.causal_lm import num_positions, stop_ids


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


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


def groups_of(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Group prompts of similar length, the longest first → numbers of prompts."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def generate(
    model: Any,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    num_ids: int,
    pad_id: int,
    seeds: Sequence[int] = (),
    stops: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue prompts in one batch, padded on the left, in eval mode → the new tokens, with the stop token if one was said.

    All stop tokens of the model's generation config are heeded, and nothing else in it. No generator but those of the
    rows is used. seeds: of each row. stops: in place of the model's own stop tokens.

    An answer ends where the model can read no further. Prompts that leave it less room than the others are a batch of
    their own: beside them it would read on, past its last position.
    """
    seeds, stops = seeds or [0] * len(prompts), stop_ids(model.generation_config) if stops is None else stops
    most, length = sampling.max_new_tokens, num_positions(model.config) or math.inf
    rooms = [int(min(most, length - len(prompt))) for prompt in prompts]
    answers: dict[int, list[int]] = {}
    for room in sorted(set(rooms)):
        some = [i for i, own in enumerate(rooms) if own == room]
        if room > 0:
            processor = Drawn(sampling, num_ids, [seeds[i] for i in some], model.device)
            said = _continued(model, [prompts[i] for i in some], room, processor, pad_id, stops)
            answers |= zip(some, said, strict=True)
    return [answers.get(i, []) for i in range(len(prompts))]


@torch.no_grad()
def _continued(
    model: Any, prompts: list[list[int]], num_tokens: int, processor: Drawn, pad_id: int, stops: Sequence[int]
) -> list[list[int]]:
    """Continue prompts, each by at most `num_tokens` tokens."""
    longest, device = max(map(len, prompts)), model.device
    input_ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):
        input_ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    own, was_training = model.generation_config, model.training
    # Not arguments of generate(): unset values would be taken from the model's own.
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=list(stops) or None,
        pad_token_id=pad_id,
    )
    model.eval()
    try:
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            logits_processor=LogitsProcessorList([processor]),
        )
    finally:
        model.generation_config = own
        model.train(was_training)
    return [until_stop(row, stops) for row in output[:, longest:].tolist()]


def until_stop(tokens: list[int], stops: Sequence[int]) -> list[int]:
    """Cut tokens behind the first stop token."""
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in stops), tokens)
