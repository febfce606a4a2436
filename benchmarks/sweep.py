"""The documented sweep: kdx's six runs with one store, and its baseline, beside six runs of TRL's GKDTrainer.

    python benchmarks/sweep.py [--steps 24]

Times whole commands, from start to saved student, on the same rows: `python -m kdx -m loss.temperature=1,2,4
loss.alpha=0.3,0.7` starting with an empty store, without and with the baseline; and one run of TRL, times six. Writes
benchmarks/results/sweep.json.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from work import prepare_work, write_results


def seconds_of(command: list[str], environment: dict[str, str]) -> float:
    """Run a command → its wall time in seconds."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = prepare_work("smollm2", folder, steps=args.steps)
        sweep = ["-m", "kdx", "-m", "loss.temperature=1,2,4", "loss.alpha=0.3,0.7", *work.words]
        shutil.rmtree(folder / "store")  # the sweep fills its own
        six = seconds_of([*sweep, "sweep.baseline=false", f"hydra.sweep.dir={folder}/six"], work.environment)
        baseline = seconds_of([*sweep, f"hydra.sweep.dir={folder}/six"], work.environment)  # the six are done by now
        one = seconds_of([str(Path(__file__).with_name("peers.py")), "trl", str(work.file)], work.environment)
    results = {"kdx_six": six, "kdx_baseline": baseline, "trl_one": one, "trl_six": 6 * one, "steps": args.steps}
    table = Table(title=f"six runs of {args.steps} steps, SmolLM2-135M to 10 layers")
    for column in ("", "seconds", "÷ kdx"):
        table.add_column(column, justify="right" if column else "left")
    for what, seconds in (("kdx, six runs", six), ("kdx, and the baseline", six + baseline), ("TRL GKD × 6", 6 * one)):
        table.add_row(what, f"{seconds:.0f}", f"{seconds / six:.2f}")
    Console().print(table)
    write_results("sweep", results)


if __name__ == "__main__":
    main()
