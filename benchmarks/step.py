"""What a step costs: kdx without a teacher, with a live and with a stored one, beside Hugging Face and TRL.

    python benchmarks/step.py [--pair smollm2 dialogpt] [--steps 5] [--repeats 3]

Each contestant runs in its own process, on the same rows; the order alternates between repeats. Figures are medians
over steps (without the first) and then over repeats. Writes benchmarks/results/step.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from work import PAIRS, Work, prepare_work, write_results

CONTESTANTS = ("kdx plain CE", "kdx live", "kdx stored", "HF Trainer CE", "TRL GKD")


def run(work: Work, contestant: str, folder: Path) -> dict[str, float]:
    """Run one contestant once → median seconds per step, and the peak resident memory of its process."""
    if contestant.startswith("kdx"):
        words = {
            "kdx plain CE": [
                "loss=cross_entropy",
                "teacher.store=on",
            ],  # the teacher's held-out answers come from the store
            "kdx live": ["teacher.store=off"],
            "kdx stored": ["teacher.store=on"],
        }[contestant]
        out = Path(tempfile.mkdtemp(dir=folder))
        command = ["-m", "kdx", *work.words, *words, f"train.max_steps={work.steps}", f"hydra.run.dir={out}/run"]
    else:
        kind = "hf" if contestant.startswith("HF") else "trl"
        command = [str(Path(__file__).with_name("peers.py")), kind, str(work.file)]
    log = (folder / "log.txt").open("w+", encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, env=os.environ | work.environment
    )
    _, status, usage = os.wait4(process.pid, 0)
    log.seek(0)
    text = log.read()
    if status != 0:
        raise SystemExit(f"{contestant} failed:\n{text[-3000:]}")
    if contestant.startswith("kdx"):
        lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "speed/tokens_per_second" in line]  # one a step
        before = [0, *(line["tokens"] for line in steps)]
        seconds = [(s["tokens"] - b) / s["speed/tokens_per_second"] for s, b in zip(steps, before, strict=False)]
    else:
        seconds = json.loads(text.strip().splitlines()[-1])["seconds"]
    return {"seconds": statistics.median(seconds[1:]), "peak_bytes": usage.ru_maxrss * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for pair in args.pair:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            work = prepare_work(pair, folder, steps=args.steps)
            runs: dict[str, list[dict[str, float]]] = {contestant: [] for contestant in args.contestants}
            for repeat in range(args.repeats):
                for contestant in args.contestants[:: 1 if repeat % 2 == 0 else -1]:
                    runs[contestant].append(run(work, contestant, folder))
                    print(f"{pair}, repeat {repeat + 1}, {contestant}: {runs[contestant][-1]['seconds']:.2f} s a step")
        results[pair] = {
            contestant: {
                "seconds_per_step": statistics.median(r["seconds"] for r in of),
                "tokens_per_second": work.tokens_per_step / statistics.median(r["seconds"] for r in of),
                "peak_bytes": statistics.median(r["peak_bytes"] for r in of),
                "repeats": of,
            }
            for contestant, of in runs.items()
        }
        show(pair, results[pair])
    write_results("step", results)


def show(pair: str, results: dict[str, dict[str, Any]]) -> None:
    table = Table(title=pair)
    for column in ("", "s / step", "tokens/s", "peak GB", "time ÷ plain CE", "tokens/s ÷ TRL", "peak ÷ TRL"):
        table.add_column(column, justify="right" if column else "left")
    ce, trl = results.get("kdx plain CE"), results.get("TRL GKD")
    for contestant, r in results.items():
        table.add_row(
            contestant,
            f"{r['seconds_per_step']:.2f}",
            f"{r['tokens_per_second']:.0f}",
            f"{r['peak_bytes'] / 1e9:.2f}",
            f"{r['seconds_per_step'] / ce['seconds_per_step']:.2f}" if ce else "",
            f"{r['tokens_per_second'] / trl['tokens_per_second']:.2f}" if trl else "",
            f"{r['peak_bytes'] / trl['peak_bytes']:.2f}" if trl else "",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
