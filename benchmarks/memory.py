"""How much memory the loss takes: kdx, the same loss in plain torch, and Liger's chunked JSD.

    python benchmarks/memory.py

By how much the peak resident memory of a process rises in one forward and backward pass of the loss, from hidden states
to the gradients of hidden states and head, for N counted positions and a vocabulary of V. Weights are random; each
figure is measured in its own process. Writes benchmarks/results/memory.json.
"""

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from work import write_results

from kdx.causal_lm import Head
from kdx.objective import distillation_loss

POSITIONS = (1024, 4096, 16384)
VOCABULARIES = (50257, 151936)
WIDTH, TEACHER_WIDTH = 576, 1024
TEMPERATURE, ALPHA = 2.0, 0.7
LARGEST = 14e9  # bytes; shapes that need more are not tried


def measure(contestant: str, num_positions: int, num_ids: int) -> int:
    """Run the loss once in this process → the rise of its peak resident memory, in bytes."""
    torch.manual_seed(0)
    hidden = torch.randn(num_positions, WIDTH, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(num_ids, WIDTH) * 0.02)
    teacher_hidden, teacher_weight = (
        torch.randn(num_positions, TEACHER_WIDTH),
        torch.randn(num_ids, TEACHER_WIDTH) * 0.02,
    )
    labels = torch.randint(0, num_ids, (num_positions,))
    # Every contestant needs the gradients themselves. They are written to, so that their memory is resident.
    weight.grad = torch.full_like(weight, 1e-6)
    hidden.grad = torch.full_like(hidden, 1e-6)
    before = _resident()
    if contestant == "kdx":
        total = distillation_loss(
            hidden, Head(weight), teacher_hidden, Head(teacher_weight), labels, alpha=ALPHA, temperature=TEMPERATURE
        )
    elif contestant == "plain torch":
        student, teacher = hidden @ weight.T, teacher_hidden @ teacher_weight.T
        kd = F.kl_div(
            F.log_softmax(student / TEMPERATURE, -1), F.log_softmax(teacher / TEMPERATURE, -1),
            log_target=True, reduction="batchmean",
        )  # fmt: skip
        total = ALPHA * TEMPERATURE**2 * kd + (1 - ALPHA) * F.cross_entropy(student, labels)
    else:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=1 - ALPHA, weight_soft_loss=ALPHA, beta=0.0, temperature=TEMPERATURE, compiled=False
        )
        total = loss(hidden, weight, teacher_hidden, teacher_weight, labels)
        total = total[0] if isinstance(total, tuple) else total
    total.backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, metavar=("CONTESTANT", "N", "V"), help="measure one, in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), int(args.one[2]))))
        return
    results: list[dict[str, Any]] = []
    table = Table(title="rise of the peak memory, MB")
    for column in ("V", "N", "kdx", "plain torch", "Liger JSD"):
        table.add_column(column, justify="right")
    for num_ids in VOCABULARIES:
        for num_positions in POSITIONS:
            cells = []
            for contestant in ("kdx", "plain torch", "Liger JSD"):
                peak, cell = None, "not tried"
                if contestant != "plain torch" or num_positions * num_ids * 4 * 5 < LARGEST:
                    command = [sys.executable, __file__, "--one", contestant, str(num_positions), str(num_ids)]
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                    peak = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
                    cell = "failed" if peak is None else f"{peak / 1e6:,.0f}"
                results.append({"contestant": contestant, "positions": num_positions, "ids": num_ids, "bytes": peak})
                cells.append(cell)
            table.add_row(f"{num_ids:,}", f"{num_positions:,}", *cells)
    Console().print(table)
    write_results("memory", {"peaks": results})


if __name__ == "__main__":
    main()
