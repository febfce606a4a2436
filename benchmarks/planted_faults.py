"""Plant faults in a copy of the working tree, one by one, and see which tests catch each.

    python benchmarks/planted_faults.py [--only mask,tied_head] [--all] [--list]

A fault is a piece of source and what replaces it. Each is planted alone; the test files that should catch it (--all:
the whole suite) run in the copy, in one process. Tests that fail without any fault are not counted. Ends with exit
code 1 if a fault is caught by no test, or if a piece of source is no longer there: then update the table below.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
MOST_SECONDS = 900  # of one run of pytest: a fault may make a test hang
COPIED = ("kdx", "conf", "tests", "benchmarks", "docs", *(file.name for file in ROOT.iterdir() if file.is_file()))


@dataclass(frozen=True)
class Fault:
    """One mistake: `source`, found exactly once in `file`, becomes `replacement`; `tests` should fail."""

    about: str
    file: str
    source: str
    replacement: str
    tests: tuple[str, ...]


FAULTS = {
    "denominator": Fault(
        "each step is divided by its last micro-batch's positions, not by all",
        "kdx/train.py",
        "factor = machine.num_processes / max(batch.num_tokens, 1)",
        "factor = machine.num_processes / max(len(batch.micro_batches[-1].counted_labels), 1)",
        ("test_objective.py",),
    ),
    "temperature_squared": Fault(
        "τ² is in the value, not in the gradient",
        "kdx/objective.py",
        "kd_weights * (mix.alpha * mix.factor / mix.temperature)",
        "kd_weights * (mix.alpha / mix.temperature)",
        ("test_objective.py",),
    ),
    "shift": Fault(
        "a position's label is its own token, not the next",
        "kdx/data/batches.py",
        "input_ids[row_of, at],",
        "input_ids[row_of, at - 1],",
        ("test_batches.py",),
    ),
    "mask": Fault(
        "tokens with the pad token's id do not count: no turn's end is learnt",
        "kdx/data/batches.py",
        "row_of, at = is_counted.nonzero(as_tuple=True)",
        "row_of, at = (is_counted & (input_ids != pad_id)).nonzero(as_tuple=True)",
        ("test_batches.py", "test_objective.py"),
    ),
    "tied_head": Fault(
        "the head's weight, tied to the embeddings, gets no gradient from the loss",
        "kdx/objective.py",
        "head = head_of(self.model).cut(self.num_ids)",
        "head = head_of(self.model).cut(self.num_ids)\n        head = replace(head, weight=head.weight.detach())",
        ("test_objective.py",),
    ),
    "soft_cap": Fault(
        "the gradient does not go through the logits' soft-cap",
        "kdx/causal_lm.py",
        "grad.mul_(1 - (logits / self.softcap) ** 2)",
        "pass",
        ("test_causal_lm.py", "test_objective.py"),
    ),
    "vocabulary_cut": Fault(
        "padding rows of the head take part in the softmax",
        "kdx/tokenizer.py",
        "return num_ids",
        "return min(head.num_ids for head in heads.values())",
        ("test_objective.py", "test_run.py"),
    ),
    "resume_random": Fault(
        "a resumed run draws its dropout anew",
        "kdx/run/checkpoint.py",
        '_set_random_state(rest["random"][rank])',
        "pass",
        ("test_checkpoint.py", "test_run.py"),
    ),
    "resume_optimizer": Fault(
        "a resumed run starts with empty moments",
        "kdx/train.py",
        "launch.set_optimizer_state(self.objective, self.optimizer, optimizer)",
        "pass",
        ("faults/test_exact.py",),
    ),
    "store_key": Fault(
        "the store's key leaves out the teacher's dtype",
        "kdx/store.py",
        "json.dumps(asdict(self), sort_keys=True)",
        'json.dumps(asdict(self) | {"dtype": ""}, sort_keys=True)',
        ("test_store.py", "test_store_runs.py"),
    ),
    "row_order": Fault(
        "every epoch has the same order",
        "kdx/data/batches.py",
        'random.Random(f"{seed}:{epoch}")',
        'random.Random(f"{seed}")',
        ("test_batches.py",),
    ),
    "best_weights": Fault(
        "train.keep=best saves the last weights",
        "kdx/train.py",
        "if self.kept_step < step:",
        "if step < 0:",
        ("test_run.py",),
    ),
    "baseline_alpha": Fault(
        "a sweep's baseline trains with alpha 1 instead of 0",
        "kdx/compose.py",
        'off = ["loss.alpha=0", ',
        'off = ["loss.alpha=1", ',
        ("test_cli.py",),
    ),
    "pairing": Fault(
        "the bootstrap draws other rows for the best student than for the others",
        "kdx/compare/ranking.py",
        "interval(means[point] - means[other])",
        "interval(means[point][::-1] - means[other])",
        ("test_compare.py",),
    ),
    "padding_counted": Fault(
        "padding counts in the denominator",
        "kdx/data/batches.py",
        "num_tokens=sum(row.num_counted for row in rows)",
        "num_tokens=len(rows) * max(lengths)",
        ("test_batches.py", "test_objective.py"),
    ),
    "last_batch": Fault(
        "the small batch at an epoch's end is filled up with rows of the epoch",
        "kdx/data/batches.py",
        "batches, full, rest = [], order[:num_full], order[num_full:]",
        "batches, full, rest = [], order[:num_full], order[-batch_size:] if order[num_full:] else []",
        ("test_batches.py",),
    ),
    "warm_up": Fault(
        "the learning rate does not warm up",
        "kdx/optim.py",
        "num_warmup_steps=warmup",
        "num_warmup_steps=0",
        ("test_optim.py",),
    ),
    "norm_decay": Fault(
        "weights of norms and biases decay",
        "kdx/optim.py",
        '"weight_decay": 0.0',
        '"weight_decay": config.weight_decay',
        ("test_optim.py",),
    ),
    "gradient_kept": Fault(
        "a step starts with the gradient of the one before",
        "kdx/train.py",
        "self.schedule.step()\n        self.optimizer.zero_grad(set_to_none=True)",
        "self.schedule.step()",
        ("test_run.py",),
    ),
    "eval_mode": Fault(
        "the student is measured with dropout on",
        "kdx/evaluate.py",
        "model.eval()\n        head",
        "model.train()\n        head",
        ("test_run.py",),
    ),
}


def plant(copy: Path, fault: Fault) -> str | None:
    """Replace the source in the copy → the file's text before, or None if the source is not there exactly once."""
    file = copy / fault.file
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if text.count(fault.source) != 1:
        return None
    file.write_text(text.replace(fault.source, fault.replacement), encoding="utf-8")
    return text


def failing(copy: Path, tests: list[str], most: int | None) -> set[str] | None:
    """Run pytest in the copy → the tests that fail, at most `most`; None if it does not end in time."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "--tb=no", "-rfE", "--no-header"]
    command += [f"--maxfail={most}"] if most else []
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*command, *tests],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=MOST_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode not in (0, 1, 2):
        raise SystemExit(f"pytest could not run:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return set(re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(FAULTS), help="faults, separated by commas")
    parser.add_argument("--all", action="store_true", help="run the whole suite for each")
    parser.add_argument("--tests", nargs="+", help="run these for each instead, as tests/test_batches.py::test_collate")
    parser.add_argument("--list", action="store_true", help="list the faults and whether their source is there")
    parser.add_argument("--most", type=int, default=1, help="stop after so many failing tests")
    args = parser.parse_args()
    chosen = args.only.split(",")
    if unknown := set(chosen) - FAULTS.keys():
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; --list shows them")
    if args.list:
        for name, fault in FAULTS.items():
            file = ROOT / fault.file
            is_there = file.is_file() and file.read_text(encoding="utf-8").count(fault.source) == 1
            print(f"{name:20} {'' if is_there else 'SOURCE NOT FOUND  '}{fault.about}")
        return
    table = Table(title="planted faults")
    for column in ("fault", "what it does", "caught by"):
        table.add_column(column, overflow="fold")
    is_ok = True
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "kdx"
        copy.mkdir()
        for part in COPIED:
            source, ignored = ROOT / part, shutil.ignore_patterns("__pycache__", "conf" if part == "kdx" else "results")
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=ignored)
            elif source.is_file():
                shutil.copy(source, copy / part)
        (copy / "kdx/conf").symlink_to("../conf")
        for key in chosen:
            fault, began = FAULTS[key], time.monotonic()
            # A test file may have been renamed or removed: the others still run.
            files = [f"tests/{test}" for test in fault.tests if (copy / "tests" / test).is_file()]
            tests = [] if args.all else args.tests or files
            before = plant(copy, fault)
            if before is None:
                caught = f"NOTHING: {fault.file} no longer has the source to replace"
            else:
                found = failing(copy, tests, args.most) if tests or args.all else set()
                (copy / fault.file).write_text(before, encoding="utf-8")
                if found:  # those that fail without the fault too do not count
                    found -= failing(copy, sorted(found), None) or set()
                caught = "a test that hangs" if found is None else "\n".join(sorted(found)) or "NOTHING"
            is_ok &= not caught.startswith("NOTHING")
            table.add_row(key, fault.about, caught)
            print(f"{key}: {caught.replace(chr(10), ', ')} ({time.monotonic() - began:.0f} s)", flush=True)
    Console(width=160).print(table)
    sys.exit(0 if is_ok else 1)


if __name__ == "__main__":
    main()
