"""Does a pretrained student train with the default learning rate? SmolLM2-135M-Instruct under itself.

    python benchmarks/pretrained.py [--noise 0.06] [--take 400] [--rates 2e-5:0.05 5e-6:0]

The student is the teacher with Gaussian noise on its matrices: pretrained, and away from the teacher. It trains for one
epoch with each learning rate (RATE:WARMUP, linear schedule). Prints by how much the held-out KL falls and the 95 %
interval of that difference (paired bootstrap over held-out rows). No model hub is needed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdx.causal_lm import locate
from kdx.cli import compose


def write_student(folder: Path, noise: float) -> None:
    """Add noise to each matrix, in units of its own standard deviation, and save the model."""
    package = locate(compose([]).teacher, "teacher")
    model = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package).save_pretrained(folder)


def held_out(words: list[str], run_dir: Path) -> np.ndarray:
    """Run kdx → for each held-out row its counted positions and summed KL [R, 2], in one order for all runs."""
    command = [sys.executable, "-m", "kdx", *words, f"hydra.run.dir={run_dir}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"kdx failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (run_dir / "eval_rows.jsonl").read_text().splitlines()]
    return np.array([[row["counted"], row["kl"]] for row in sorted(rows, key=lambda row: str(row["row"]))])


def fall(before: np.ndarray, after: np.ndarray, num: int = 4000) -> tuple[float, float, float]:
    """By how much the KL per token fell, and its 95 % interval: rows drawn with replacement, the same for both."""
    drawn = np.random.default_rng(0).integers(len(before), size=(num, len(before)))
    differences = (before[drawn, 1] - after[drawn, 1]).sum(1) / before[drawn, 0].sum(1)
    low, high = np.percentile(differences, (2.5, 97.5))
    return float((before[:, 1] - after[:, 1]).sum() / before[:, 0].sum()), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, default=0.06, help="in standard deviations of each matrix")
    parser.add_argument("--take", type=int, default=400, help="training rows")
    parser.add_argument("--rates", nargs="+", default=["2e-5:0.05", "5e-6:0"], help="learning rate and warm-up")
    parser.add_argument("--words", nargs="+", default=[], help="further words of every run")
    args = parser.parse_args()
    table = Table(title=f"one epoch of {args.take} rows, noise {args.noise}")
    for column in ("lr", "warm-up", "KL before", "KL after", "fall", "95 % interval", "fall ÷ half-width", "÷ width"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_student(folder / "student", args.noise)
        words = [
            "student=hf", f"student.path={folder}/student", "data.max_length=128", f"data.take={args.take}",
            "train.epochs=1", "tracking.mode=disabled", "tracking.samples=false", "optim.schedule=linear",
            "teacher.store=on", f"teacher.store_dir={folder}/store", *args.words,
        ]  # fmt: skip
        before = held_out([*words, "train.epochs=null", "train.max_steps=0"], folder / "untouched")
        start = before[:, 1].sum() / before[:, 0].sum()
        print(f"untouched: KL {start:.4f} on {len(before)} rows", flush=True)
        for i, rate in enumerate(args.rates):
            lr, warmup = rate.split(":")
            after = held_out([*words, f"optim.lr={lr}", f"optim.warmup_steps={warmup}"], folder / f"run-{i}")
            moved, low, high = fall(before, after)
            ratios = [f"{moved / part:.1f}" for part in ((high - low) / 2, high - low)]
            table.add_row(
                lr, warmup, f"{start:.4f}", f"{start - moved:.4f}", f"{moved:.4f}", f"{low:.4f} to {high:.4f}", *ratios
            )
            print(f"lr {lr}: KL {start - moved:.4f}, fall {moved:.4f} ({low:.4f} to {high:.4f})", flush=True)
    Console().print(table)


if __name__ == "__main__":
    main()
