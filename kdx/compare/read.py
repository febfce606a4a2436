"""Compare runs: find their folders, read them, rank the students, write the tables and the page.

No torch: it reads JSON and YAML, and runs after every job of a sweep.
"""

import argparse
import glob
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from rich.console import Console

from kdx.compare import ranking
from kdx.compare.ranking import MEASURES, Comparison, Ranking, Run
from kdx.compare.tables import as_csv, as_json, as_markdown, terminal_parts
from kdx.errors import ConfigError, MachineError
from kdx.run.files import write_beside
from kdx.run.tracking import CONSOLE

MARK = "status.json"  # a folder with it is a run's
NARROWEST = 100  # letters of a line, in a pipe too; less would break every line of the table
FILES = ("compare.csv", "compare.json", "compare.md", "compare.html")
EXAMPLE = "Example: kdx compare outputs/sweeps/NAME"


def main(words: list[str]) -> int:
    """Run `kdx compare PATH… [--out DIR] [--wandb]` and return the exit code."""
    parser = argparse.ArgumentParser("kdx compare", description="Compare runs, sweeps and globs of them.")
    parser.error = _usage_error  # type: ignore[method-assign]
    parser.add_argument("paths", nargs="*", metavar="PATH", help="a run folder, a sweep's folder, or a glob")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; by default the sweep's own folder")
    parser.add_argument("--wandb", action="store_true", help="also save a W&B dashboard of these runs")
    args = parser.parse_intermixed_args(words)
    paths = [Path(word) for word in args.paths]
    if args.wandb:
        from kdx.compare import workspace

        workspace.check()
    comparison = compare(paths, args.out or default_out(paths))
    console = Console(file=CONSOLE.file, width=max(CONSOLE.width, NARROWEST), highlight=False)
    for part in terminal_parts(comparison):
        console.print(part, markup=False)
    CONSOLE.print(f"Wrote {comparison.out / 'compare.html'}, .csv, .json and .md", markup=False)
    if args.wandb:
        CONSOLE.print(f"Dashboard: {workspace.save(comparison)}", markup=False)
    return 0


def _usage_error(message: str) -> NoReturn:
    raise ConfigError("kdx compare", message, "Usage: kdx compare PATH... [--out DIR] [--wandb]")


def default_out(paths: Sequence[Path]) -> Path:
    """Return the folder of the one sweep that is compared, else ./comparison."""
    is_sweep = len(paths) == 1 and paths[0].is_dir() and any(paths[0].glob(f"*/{MARK}"))
    return paths[0] if is_sweep else Path("comparison")


def compare(paths: list[Path], out: Path) -> Comparison:
    """Rank the runs in these folders and globs, and write compare.csv, .json, .md and .html into `out`.

    Raises KdxError if there is nothing to compare. A run that cannot be read is listed with the reason.
    """
    comparison = compared(find(paths), out)
    from kdx.compare.page import page  # matplotlib is slow to import

    texts = (as_csv(comparison), as_json(comparison), as_markdown(comparison), page(comparison))
    for name, text in zip(FILES, texts, strict=True):
        try:
            write_beside(out / name, text)
        except OSError as error:
            what = f"cannot be written: {error.strerror}"
            raise MachineError(str(out / name), what, "Choose another folder with --out") from None
    return comparison


# Finding


def find(paths: Sequence[Path]) -> dict[str, Path]:
    """Return the run folders in these folders and globs by name, the path below their common parent.

    Raises ConfigError if a path does not exist or there is no run at all.
    """
    folders: dict[Path, Path] = {}  # each once, however it is reached
    for path in paths:
        places = [path] if path.exists() else [Path(p) for p in glob.glob(str(path), recursive=True)]
        if not places:
            raise ConfigError(str(path), "matches nothing" if glob.has_magic(str(path)) else "does not exist", EXAMPLE)
        folders |= {mark.parent.resolve(): mark.parent for place in places for mark in place.rglob(MARK)}
    if not folders:
        raise ConfigError(" ".join(map(str, paths)) or "kdx compare", "no runs found", EXAMPLE)
    shared = os.path.commonpath([folder.parent for folder in folders])
    return {str(folder.relative_to(shared)): folders[folder] for folder in sorted(folders)}


# Reading


def read_run(name: str, folder: Path) -> Run:
    """Read a run folder. One in which a file is missing or does not parse is not ranked, for this reason."""

    def read(file: str, parse: Callable[[str], Any]) -> Any:
        try:
            return parse((folder / file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{file} is missing") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())[:100]
            raise ValueError(f"{file} cannot be read: {what}") from None

    found: dict[str, Any] = {}
    try:
        status = read("status.json", lambda text: dict(json.loads(text)))
        found["state"] = str(status.get("state"))
        found["config"] = read("config.yaml", lambda text: flat(yaml.safe_load(text)))
        found["swept"] = found["config"].get("sweep.keys") or []
        if (folder / "record.json").exists():
            found["swept"] = read("record.json", lambda text: list(json.loads(text)["swept"]))
        if status.get("state") != "done":
            step = f"step {status.get('step')} of {status.get('max_steps')}, written {status.get('updated')}"
            raise ValueError(status.get("reason") or step)
        found["summary"] = read("summary.json", _summary)
        _check_measures(found["summary"]["student"])
        found["rows"] = read("eval_rows.jsonl", lambda text: sorted(_lines(text), key=lambda line: str(line["row"])))
        found["curve"] = read("metrics.jsonl", lambda text: [line for line in _lines(text) if "eval/ce" in line])
        if (folder / "samples.json").exists():
            found["samples"] = read("samples.json", _samples)
    except ValueError as error:
        return Run(name, folder, str(error), **found)
    return Run(name, folder, **found)


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a config to dotted keys as they are typed; older runs keep a group's own keys under `options`."""
    keys: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            keys |= flat(value, prefix if key == "options" else f"{prefix}{key}.")
        else:
            is_whole = isinstance(value, float) and value.is_integer()  # 1.0 and 1 are the same value
            keys[f"{prefix}{key}"] = int(value) if is_whole else value
    return keys


def _summary(text: str) -> dict[str, Any]:
    tree = json.loads(text)
    return {part: dict(tree[part]) for part in ("student", "untouched", "teacher", "run", "data", "environment")}


def _check_measures(measures: dict[str, Any]) -> None:
    """Raise ValueError if a student cannot be ranked."""
    if measures.get("ce") is None:
        raise ValueError("nothing was held out")
    bad = [name for name in MEASURES if not math.isfinite(measures.get(name) or 0)]
    if bad:
        raise ValueError(f"not finite: {', '.join(bad)}")


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _samples(text: str) -> list[dict[str, Any]]:
    """Return prompts, as (role, content) pairs, and the answers of each model."""
    samples = json.loads(text)
    for sample in samples:
        sample["prompt"] = tuple((turn["role"], turn["content"]) for turn in sample["prompt"] or [])
    return list(samples)


# Ranking


def compared(found: dict[str, Path], out: Path) -> Comparison:
    """Read run folders and rank the finished ones, in as many tables as it takes."""
    runs = [read_run(name, folder) for name, folder in found.items()]
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if not run.reason:
            groups.setdefault(run.measured_on, []).append(run)
    rankings = [ranking.make_ranking(group) for group in groups.values()]
    not_ranked = [run for run in runs if run.reason]
    return Comparison(rankings, not_ranked, runs, ranking.differing(runs), _why_apart(rankings), out)


def _why_apart(rankings: Sequence[Ranking]) -> list[str]:
    """Say what the tables differ in."""
    parts = {
        "held-out rows": {table.data.get("validation_fingerprint") for table in rankings},
        "teacher": {table.teacher["digest"] or table.teacher["name"] for table in rankings},
        "precision of the teacher": {table.teacher["precision"] for table in rankings},
    }
    different = " and ".join(name for name, values in parts.items() if len(values) > 1) or "held-out rows"
    what = f"Measures compare only on the same held-out rows and with the same teacher. These {len(rankings)} tables"
    return [f"{what} differ in: {different}."] if len(rankings) > 1 else []
