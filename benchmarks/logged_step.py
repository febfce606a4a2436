"""What a step that logs costs beside one that does not: it also measures how hard each term of the loss pulls.

    python benchmarks/logged_step.py [--steps 12] [words ...]

Takes the same batches of a run twice, once with and once without, in alternating order, and prints the median of the
ratios. Words are those of a run; the default is the demo's with a stored teacher. Writes
benchmarks/results/logged_step.json.
"""

import argparse
import statistics
import time
from pathlib import Path

from work import write_results

from kdx.cli import compose
from kdx.distill import prepared
from kdx.run.folder import Record
from kdx.run.launch import build_accelerator
from kdx.run.signals import StopRequest

LOSSES = (["loss=forward_kl"], ["loss=forward_kl", "loss.temperature=1"], ["loss=reverse_kl"], ["loss=jsd"], ["loss=tvd"],
          ["loss=cross_entropy"])  # fmt: skip


def ratio_of(words: list[str], num_steps: int) -> tuple[float, float]:
    """Return the median ratio, and the median seconds of a step that does not log."""
    words = [*words, "tracking.mode=disabled", f"train.max_steps={num_steps}"]
    logged, config = (compose([*words, f"train.log_every={every}"]) for every in (1, 10**9))
    with prepared(config, Record(), build_accelerator(config)) as training, StopRequest(Path()) as stop:
        training.objective.train()
        ratios, plain = [], []
        for i, batch in enumerate(training.batches.steps(0, num_steps)):
            if batch is None:
                break
            seconds = {}
            for training.config in (logged, config)[:: 1 if i % 2 else -1]:
                started = time.perf_counter()
                terms, norm = training.forward_backward(batch, stop)
                training.update(batch, terms, norm)
                seconds[training.config.train.log_every] = time.perf_counter() - started
            if 0 < i < num_steps - 1:  # without the warm-up, and the last, which always logs
                ratios.append(seconds[1] / seconds[10**9])
                plain.append(seconds[10**9])
        return statistics.median(ratios), statistics.median(plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    args, words = parser.parse_known_args()
    results = {}
    for loss in LOSSES:
        ratio, seconds = ratio_of([*loss, "teacher.store=on", *words], args.steps)
        results[" ".join(loss)] = {"ratio": ratio, "seconds": seconds}
        print(f"{' '.join(loss)}: {ratio:.3f} × a step of {seconds:.2f} s")
    write_results("logged_step", results)


if __name__ == "__main__":
    main()
