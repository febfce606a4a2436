"""Full training beside LoRA of rank 8 and 64, steps and seconds equal: SmolLM2-135M-Instruct under itself.

    python benchmarks/adapters.py [--steps 50] [--noise 0.06] [--rates 2e-5,1e-4] [--out outputs/adapters] [words of kdx ...]

The student is the teacher with Gaussian noise on its matrices, made here: the KL that it starts with can be trained away
to zero, which the teacher's own weights could not show. Noise has full rank and adapters do not, so they cannot just
take it back: they have to learn from the rows what it spoilt. Only the divergence is trained (alpha 1).

Each kind of student has each of the rates, those of adapters ten times as high, and so many steps; the best rate of each
rank is run again with as many steps as full training takes seconds. Runs that are done are skipped, so the same command
resumes where it stopped. A run takes three to five minutes on two cores.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pretrained import write_student
from rich import print
from rich.table import Table

KINDS = {"full": [], **{f"r-{r}": ["adapter=lora", f"adapter.r={r}"] for r in (8, 64)}}
HEADS = ("", "lr", "steps", "s / step", "peak GB", "KL before", "KL after", "CE", "agreement")


def kdx(*words: str) -> None:
    code = subprocess.run([sys.executable, "-m", "kdx", *words], check=False).returncode
    if code:
        raise SystemExit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--noise", type=float, default=0.06, help="in standard deviations of each matrix")
    parser.add_argument("--rates", default="2e-5,1e-4", help="of full training")
    parser.add_argument("--out", type=Path, default=Path("outputs/adapters"))
    args, words = parser.parse_known_args()
    if not (args.out / "student").is_dir():
        write_student(args.out / "student", args.noise)
    same = [
        "student=hf", f"student.path={args.out}/student", "data.max_length=128", "loss.alpha=1", "loss.temperature=1",
        "teacher.store=on", "eval.every=0", "eval.num_prompts=0", "tracking.samples=false", *words,
    ]  # fmt: skip
    table, best = Table(*HEADS), dict[str, tuple[float, float]]()

    def run(name: str, lr: float, steps: int) -> float:
        """Run one point unless it is done, and show it → the seconds of a step."""
        folder = args.out / f"{name}_lr-{lr:g}_steps-{steps}"
        kdx(*same, *KINDS[name], f"optim.lr={lr:g}", f"train.max_steps={steps}", f"hydra.run.dir={folder}")
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        before, after, of_run = (summary[part] for part in ("untouched", "student", "run"))
        figures = [of_run["seconds_per_step"], of_run["peak_memory_bytes"] / 1e9, before["kl"], after["kl"]]
        figures += [after["ce"], after["agreement"]]
        table.add_row(name, f"{lr:g}", str(steps), *(f"{figure:.3f}" for figure in figures))
        best[name] = min(best.get(name, (after["kl"], lr)), (after["kl"], lr))
        return float(of_run["seconds_per_step"])

    seconds = {}
    for name in KINDS:
        for rate in map(float, args.rates.split(",")):
            seconds[name] = run(name, rate if name == "full" else 10 * rate, args.steps)
    for name in list(KINDS)[1:]:
        run(name, best[name][1], round(args.steps * seconds["full"] / seconds[name]))
    kdx("compare", str(args.out))
    print(table)


if __name__ == "__main__":
    main()
