"""Equal effective alphas beside equal nominal ones: three divergences and three temperatures on the default pair.

    python benchmarks/alpha.py [--shares 0.25 0.5] [--nominal 0.3 0.7] [--workers 2] [--out outputs/alpha] [words ...]

Asks `kdx check` how strongly each term pulls, chooses for each divergence and temperature the alphas with these effective
ones, runs them beside the nominal ones in one sweep folder, the two best again with a second seed, and compares all of
them, with a picture of KL and CE over effective alpha. Runs that are done are skipped, so the same command resumes where
it stopped. A run takes three to five minutes on two cores; two runs at once, with a core each, take less than one after the
other.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

NAMES, TEMPERATURES = ("forward_kl", "reverse_kl", "jsd"), (1, 2, 4)
COLORS = ("#0072B2", "#D55E00", "#009E73")
PLAIN = ["eval.every=0", "eval.num_prompts=0", "tracking.samples=false", "tracking.mode=disabled", "teacher.store=on"]


def kdx(*words: str) -> None:
    """Run kdx; jobs that failed (exit code 5) leave the others to compare."""
    code = subprocess.run([sys.executable, "-m", "kdx", *words], check=False).returncode
    if code not in (0, 5):
        raise SystemExit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5])
    parser.add_argument("--nominal", type=float, nargs="*", default=[0.7])
    parser.add_argument("--best", type=int, default=2, help="points that are run with a second seed")
    parser.add_argument("--out", type=Path, default=Path("outputs/alpha"))
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    args, words = parser.parse_known_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // args.workers)))
    grid = [f"loss={','.join(NAMES)}", f"loss.temperature={','.join(map(str, TEMPERATURES))}", "loss.alpha=0.3,0.7"]
    kdx("check", "-m", *grid, "sweep.name=alpha", *words)
    found = json.loads(Path("outputs/check/alpha/check.json").read_text(encoding="utf-8"))["rows"]
    points: list[list[str]] = []
    for row in found:
        kd, ce, name = row["grad_kd"], row["grad_ce"], row["divergence"].split()[0]
        even = [share * ce / (share * ce + (1 - share) * kd) for share in args.shares]
        for alpha in [*args.nominal, *even]:
            points.append([f"loss={name}", f"loss.temperature={row['temperature']:g}", f"loss.alpha={alpha:.4g}"])
    run_all(args, [(["loss=cross_entropy"], "0"), *((point, "0") for point in points)], words)
    kdx("compare", str(args.out))
    students = json.loads((args.out / "compare.json").read_text(encoding="utf-8"))["tables"][0]["students"]
    best = [run_name for s in students if not s["baseline"] for run_name in s["runs"].split()[:1]][: args.best]
    run_all(args, [(point, "1") for point in points if folder_of(point, "0") in best], words)
    kdx("compare", str(args.out))
    draw(args.out)


def draw(folder: Path) -> None:
    """Draw KL and CE of a comparison over effective alpha, the mean of its start and end, into alpha.png."""
    rows = pd.read_csv(folder / "compare.csv")
    students = rows[
        ~rows["baseline"] & (rows["kl"] < rows.loc[rows["baseline"], "kl"].min())
    ].copy()  # of those that recovered
    students["pull"] = (students["effective_alpha_start"] + students["effective_alpha_end"]) / 2
    markers = dict(zip(sorted(students["loss.temperature"].unique()), "osD^", strict=False))
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    both = figure.subplots(1, 2)
    for axes, measure in zip(both, ("kl", "ce"), strict=True):
        for (name, temperature), group in students.sort_values("pull").groupby(["loss.name", "loss.temperature"]):
            look = {"color": COLORS[NAMES.index(name)], "marker": markers[temperature], "linestyle": ":"}
            axes.plot(group["pull"], group[measure], label=f"{name}, τ {temperature:g}", **look)
        axes.set(xlabel="effective alpha, mean of start and end", ylabel=f"held-out {measure.upper()}")
    both[0].legend(fontsize=8, frameon=False, loc="upper right")
    figure.savefig(folder / "alpha.png", dpi=110)


def folder_of(point: list[str], seed: str) -> str:
    return "_".join(word.partition("=")[2] for word in point) + f"_seed-{seed}"


def run_all(args: argparse.Namespace, jobs: list[tuple[list[str], str]], words: list[str]) -> None:
    def run(job: tuple[list[str], str]) -> None:
        point, seed = job
        kdx(*point, f"train.seed={seed}", f"hydra.run.dir={args.out / folder_of(point, seed)}", *PLAIN, *words)

    with ThreadPoolExecutor(args.workers) as pool:
        deque(pool.map(run, jobs), maxlen=0)  # raises what one of them raised


if __name__ == "__main__":
    main()
