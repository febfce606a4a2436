"""What the student's own answers cost: generation in batches, and a step on them beside its parts.

    python benchmarks/rollout.py [--steps 4] [--prompts 64] [--batch 16] [words of kdx ...]

Two ratios on the default pair, medians, everything in one process:

- 64 held-out prompts answered greedily with 48 tokens in batches, beside one after the other: the same answers (up to
  rounding), in how much less time;
- a step on rows whose last turn the student has just said (share 1, 32 new tokens), beside the sum of what it must do:
  that generation, one pass of the teacher's body, and one step on the same rows with cross-entropy alone.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rich import print

from kdx.cli import compose
from kdx.data.batches import StepBatch, by_length
from kdx.distill import prepared
from kdx.generate import Sampling, generate
from kdx.run.folder import Record
from kdx.run.launch import build_accelerator
from kdx.train import Training

WORDS = ["rollout=student", "rollout.share=1", "rollout.max_new_tokens=32", "data.max_length=192", "train.batch_size=4"]
WORDS += ["teacher.store=off", "tracking.mode=disabled"]


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare_generation(training: Training, num_prompts: int, batch_size: int) -> None:
    """Answer the same prompts in batches and one by one."""
    student, shared = training.student, training.shared
    prompts = [prompt["tokens"] for prompt in training.data.prompts[:num_prompts]]
    student.generation_config.eos_token_id = shared.num_ids  # never said: all 48 tokens

    def answer(size: int) -> list[list[int]]:
        answers: dict[int, list[int]] = {}
        for group in by_length([*map(len, prompts)], size):
            some = [prompts[i] for i in group]
            answers |= zip(group, generate(student, some, Sampling(48), shared), strict=True)
        return [answers[i] for i in range(len(prompts))]

    answer(batch_size)  # the first is slower
    took, answers = {}, {}
    for size in (batch_size, 1):
        started = time.perf_counter()
        answers[size] = answer(size)
        took[size] = time.perf_counter() - started
    same = sum(a == b for a, b in zip(*answers.values(), strict=True))
    print(f"{len(prompts)} prompts, 48 tokens each, in batches of {batch_size}: {took[batch_size]:.1f} s")
    print(f"one by one: {took[1]:.1f} s; {same} answers are equal; speed ratio {took[1] / took[batch_size]:.2f}")


class Never:
    """Nothing asks these steps to stop."""

    signal = None
    is_agreed = False


def step_on(training: Training, batch: StepBatch) -> None:
    terms, norm = training.forward_backward(batch, Never())  # type: ignore[arg-type]
    training.update(batch, terms, norm)


def compare_step(training: Training, num_steps: int) -> None:
    """Time a step on own answers, and what it is made of."""
    teacher, mix = training.teacher, training.objective.mix
    assert teacher is not None
    steps = training.batches.steps(0, num_steps + 1)
    rows: list[dict[str, float]] = []
    for _ in range(num_steps + 1):  # the first is slower
        found: list[StepBatch] = []
        generation = seconds(lambda found=found: found.append(next(steps)))  # type: ignore[misc]
        (batch,) = found
        own = seconds(lambda batch=batch: step_on(training, batch))  # type: ignore[misc]
        asked = seconds(lambda batch=batch: list(teacher.answers(batch.micro_batches)))  # type: ignore[misc]
        plain = replace(batch, micro_batches=[replace(micro, weights={}) for micro in batch.micro_batches])
        training.objective.mix = replace(mix, alpha=0.0)
        ce = seconds(lambda plain=plain: step_on(training, plain))  # type: ignore[misc]
        training.objective.mix = mix
        rows.append({"generation": generation, "own step": own, "teacher": asked, "CE step": ce})
    medians = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}
    whole = medians["generation"] + medians["own step"]
    parts = medians["generation"] + medians["teacher"] + medians["CE step"]
    print({name: round(value, 3) for name, value in medians.items()})
    print(f"a step on own answers ÷ (generation + teacher + CE step): {whole / parts:.3f}; without generation on both "
          f"sides: {medians['own step'] / (medians['teacher'] + medians['CE step']):.3f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    args, words = parser.parse_known_args()
    config = compose([*WORDS, f"eval.num_prompts={args.prompts}", "train.max_steps=60", *words])
    with prepared(config, Record(), build_accelerator(config)) as training:
        training.objective.train()
        compare_step(training, args.steps)
        compare_generation(training, args.prompts, args.batch)


if __name__ == "__main__":
    main()
