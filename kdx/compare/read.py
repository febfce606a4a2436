"""Many runs → one comparison: find run folders, read them, rank the students, write the tables and the page.

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

import numpy as np
import yaml
from rich.console import Console

from kdx.compare import ranking
from kdx.compare.ranking import COSTS, MEASURES, RANKED_BY, Comparison, Ranking, Rows, Run
from kdx.compare.tables import as_csv, as_json, as_markdown, terminal_tables
from kdx.data.files import nearby
from kdx.errors import ConfigError, MachineError, printable, together
from kdx.run.files import write_beside
from kdx.run.redact import redact
from kdx.run.tracking import CONSOLE

MARKS = ("status.json", "summary.json", "metrics.jsonl")  # a folder with one of these is a run's
WIDEST = 240  # letters of a line of the terminal's table
MOST_COLUMNS = 5  # keys that stand in the table; all that differ stand in a table of their own
GREEK = {"loss.temperature": "τ", "loss.alpha": "α"}
FILES = ("compare.csv", "compare.json", "compare.md", "compare.html")
EXAMPLE = "As in: kdx compare outputs/sweeps/NAME"


def main(words: list[str]) -> int:
    """Do `kdx compare PATH… [--out DIR] [--wandb]` → the exit code."""
    parser = argparse.ArgumentParser("kdx compare", description="Compare runs, sweeps and globs of them.")
    parser.error = _refuse  # type: ignore[method-assign]
    parser.add_argument("paths", nargs="*", metavar="PATH", help="a run folder, a sweep's folder, or a glob")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the files go; else into the one sweep's folder")
    parser.add_argument("--wandb", action="store_true", help="also save a dashboard of these runs at W&B")
    args = parser.parse_intermixed_args(words)
    paths = [Path(word) for word in args.paths]
    if args.wandb:
        from kdx.compare import workspace

        workspace.check()
    comparison = compare(paths, args.out or default_out(paths))
    wide = Console(width=max(CONSOLE.width, WIDEST))  # whole figures, though a narrow terminal wraps the lines
    for part in terminal_tables(comparison):
        if isinstance(part, str):
            CONSOLE.print(part, markup=False)
        else:
            wide.print(part)
    for name in FILES:
        CONSOLE.print(f"  {comparison.out / name}", markup=False)
    if args.wandb:
        CONSOLE.print(f"  {workspace.save(comparison)}", markup=False)
    return 0


def _refuse(message: str) -> NoReturn:
    raise ConfigError("kdx compare", message, "Usage: kdx compare PATH... [--out DIR] [--wandb]")


def default_out(paths: Sequence[Path]) -> Path:
    """The folder of the one sweep that is compared, else ./comparison."""
    if len(paths) == 1 and paths[0].is_dir() and any(_is_run(f) for f in paths[0].iterdir() if f.is_dir()):
        return paths[0]
    return Path("comparison")


def compare(paths: list[Path], out: Path) -> Comparison:
    """Read the runs in these folders and globs, rank them, and write compare.csv, .json, .md and .html into `out`.

    Raises KdxError where there is nothing to compare; a damaged run is listed.
    """
    comparison = compared(*find(paths), out)
    from kdx.compare.page import page  # matplotlib takes a while to import

    texts = (as_csv(comparison), as_json(comparison), as_markdown(comparison), page(comparison))
    for name, text in zip(FILES, texts, strict=True):
        _write(out / name, text)
    return comparison


# Finding


def find(paths: Sequence[Path]) -> tuple[list[tuple[str, Path]], list[str]]:
    """The run folders in these folders and globs, each once and with a name → and what was passed over.

    Raises ConfigError. A name is the path below the folder that all share.
    """
    if not paths:
        raise ConfigError("kdx compare", "names no runs", EXAMPLE)
    found: dict[Path, Path] = {}
    notes, missing = [], []
    for path in paths:
        places = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        if not places:
            missing.append(_missing(path))
        here = [run for place in places if place.is_dir() for run in _runs_in(place)]
        if places and not here and path.is_dir():
            notes.append(f"no run in {path}")
        found.update((run.resolve(), run) for run in here)
    if missing:
        raise together(missing)
    if not found:
        raise ConfigError(" ".join(map(str, paths)), "no run in it (a run has a status.json)", EXAMPLE)
    shared = os.path.commonpath([folder.parent for folder in found])
    return [(printable(str(folder.relative_to(shared))), found[folder]) for folder in sorted(found)], notes


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in MARKS)


def _runs_in(place: Path) -> list[Path]:
    """A folder if it is a run's, else the runs anywhere below it."""
    runs = []
    for here, folders, _ in os.walk(place):
        if _is_run(Path(here)):
            runs.append(Path(here))
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]
    return runs


def _missing(path: Path) -> ConfigError:
    if glob.has_magic(str(path)):
        return ConfigError(str(path), "matches nothing", EXAMPLE)
    return ConfigError(str(path), "does not exist", nearby(path))


# Reading


def read_run(name: str, folder: Path) -> Run:
    """Read a run folder. What is missing or damaged is said, and keeps it out of the ranking where it matters."""
    faults: dict[str, str] = {}

    def read(file: str, reader: Callable[[Path], Any], empty: Any) -> Any:
        try:
            if (folder / file).exists() and not (folder / file).is_file():  # a pipe would be waited for
                raise ValueError("it is no file")
            return reader(folder / file)
        except FileNotFoundError:
            faults[file] = f"{file} is missing"
        except (OSError, ValueError, ArithmeticError, RecursionError, yaml.YAMLError) as error:
            faults[file] = f"{file} is damaged: {' '.join(printable(str(error)).split())[:100]}"
        return empty

    status = read("status.json", _object, {})
    state = str(status.get("state", "unknown"))
    config = read("config.yaml", _config, {})
    summary = read("summary.json", _summary, {}) if state == "done" else {}
    rows = read("eval_rows.jsonl", lambda file: _rows(file, summary), None) if summary else None
    curve = read("metrics.jsonl", _curve, ()) if summary else ()
    samples = read("samples.json", _samples, ()) if summary else ()
    serious = [faults.pop(file) for file in ("status.json", "summary.json", "config.yaml") if file in faults]
    reason = _why_not(status, summary, serious)
    return Run(name, folder, state, reason, tuple(faults.values()), config, summary, rows, curve, samples)


def _why_not(status: dict[str, Any], summary: dict[str, Any], faults: list[str]) -> str:
    """Why a run is not ranked; empty if it is."""
    if status.get("state") != "done" and (status or not faults):
        step = f"step {status.get('step')} of {status.get('max_steps')}, written {status.get('updated')}"
        return str(redact(str(status.get("reason") or step)))
    if faults:
        return "; ".join(faults)
    student = summary["student"]
    if student.get("ce") is None:
        return "nothing was held out"
    bad = [name for name in MEASURES if student.get(name) is not None and not math.isfinite(student[name])]
    return f"not finite: {', '.join(bad)}" if bad else ""


def _clean(value: Any) -> Any:
    """Strip control characters from all text: a run folder may be somebody else's."""
    if isinstance(value, dict):
        return {printable(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def _object(file: Path) -> dict[str, Any]:
    return _as_object(json.loads(file.read_text(encoding="utf-8")))


def _as_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("expected an object")
    cleaned: dict[str, Any] = _clean(value)
    return cleaned


def _lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    with file.open(encoding="utf-8") as stream:
        return [_as_object(json.loads(line)) for line in stream if line.strip()]


class _NoAliases(yaml.SafeLoader):
    """YAML as kdx writes it: nested aliases would grow without bound when they are walked."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("has an alias")
        return super().compose_node(parent, index)


def _config(file: Path) -> dict[str, Any]:
    """The config as dotted keys, as they are typed: what stands in `options` stands beside its node's keys."""
    flat: dict[str, Any] = {}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, prefix if key == "options" else f"{prefix}{key}.")
            else:
                plain = json.loads(json.dumps(value, default=str), parse_constant=str)  # a date or NaN becomes text
                flat[f"{prefix}{key}"] = redact(plain, key)

    walk(_as_object(yaml.load(file.read_text(encoding="utf-8"), _NoAliases)), "")
    return flat


def _summary(file: Path) -> dict[str, Any]:
    summary = _object(file)
    for part in ("student", "untouched", "teacher", "run", "data"):
        if not isinstance(summary.get(part), dict):
            raise ValueError(f"{part} is not there")
        for name in (*MEASURES, *COSTS):
            value = summary[part].get(name)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise ValueError(f"{part}.{name} is not a number")
                summary[part][name] = float(value)
    return summary


def _rows(file: Path, summary: dict[str, Any]) -> Rows:
    """The measures of each held-out row. Raises ValueError unless they add up to the summary's."""
    lines = sorted(_lines(file), key=lambda line: str(line.get("row")))
    ids = tuple(str(line.get("row")) for line in lines)
    if not lines or len(set(ids)) < len(ids):
        raise ValueError("a row stands there twice" if lines else "no rows")
    taken = [name for name in MEASURES if all(line.get(name) is not None for line in lines)]
    values = [[line.get(name) for name in ("counted", *taken)] for line in lines]
    if not all(type(value) in (int, float) for sums in values for value in sums):
        raise ValueError("a sum is not a number")
    counted, *columns = np.array(values, dtype=float).T
    if not (counted > 0).all():
        raise ValueError("a row without counted tokens")
    sums = dict(zip(taken, columns, strict=True))
    for name in RANKED_BY:
        mean, told = (sums[name].sum() / counted.sum() if name in sums else None), summary["student"].get(name)
        if (mean is None) != (told is None) or (mean is not None and not math.isclose(mean, told, rel_tol=1e-6)):
            raise ValueError(f"its {name} is not that of summary.json")
    return Rows(ids, counted, sums)


def _curve(file: Path) -> tuple[dict[str, Any], ...]:
    """The held-out measures over training; what is not a finite number is left out."""
    return tuple(
        {k: v for k, v in line.items() if type(v) in (int, float) and math.isfinite(v)}
        for line in _lines(file)
        if line.get("eval/ce") is not None
    )


def _samples(file: Path) -> tuple[dict[str, Any], ...]:
    """Prompts and answers as text."""
    found = json.loads(file.read_text(encoding="utf-8"))
    samples = []
    for sample in map(_as_object, found if isinstance(found, list) else [found]):
        turns = [_as_object(turn) for turn in sample.pop("prompt", None) or []]
        prompt = tuple((str(turn.get("role")), str(turn.get("content"))) for turn in turns)
        samples.append({"prompt": prompt} | {who: str(text) for who, text in sample.items() if text is not None})
    return tuple(samples)


# Ranking


def compared(found: Sequence[tuple[str, Path]], notes: list[str], out: Path) -> Comparison:
    """Read the named run folders and rank those that may be ranked, in as many tables as it takes."""
    runs = [read_run(name, folder) for name, folder in found]
    keys = ranking.differing(runs)
    ranked = [run for run in runs if not run.reason]
    apart = set(ranking.differing(ranked)) | {key for key in keys if key in ranking.swept(runs)}
    columns = short_names([key for key in keys if key in apart and key != ranking.SEED_KEY][:MOST_COLUMNS])
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in ranked:
        groups.setdefault(run.comparable_with, []).append(run)
        notes += [f"{run.name}: {fault}" for fault in run.faults]
    rankings = [ranking.make_ranking(group, keys, columns) for group in groups.values()]
    not_ranked = [run for run in runs if run.reason]
    return Comparison(rankings, not_ranked, runs, keys, columns, _why_apart(rankings), notes, out)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Headings for keys: τ, α, else the last part, or the whole key where that is not clear."""
    short = {}
    for key in keys:
        group, _, last = key.rpartition(".")
        short[key] = GREEK.get(key) or (group if last in ("name", "path", "init") and group else last)
    return {key: name if list(short.values()).count(name) == 1 else key for key, name in short.items()}


def _why_apart(rankings: Sequence[Ranking]) -> list[str]:
    """Why there are several tables: which runs differ in what."""
    if len(rankings) < 2:
        return []
    number = len(rankings)
    lines = [f"Measures compare only on the same held-out rows beside the same teacher, so there are {number} tables."]
    parts = (
        ("held-out rows", [r.fingerprint for r in rankings]),
        ("teachers", [r.digest or r.teacher for r in rankings]),
        ("precisions of the teacher", [r.precision for r in rankings]),
    )
    for what, values in parts:
        if len(set(values)) > 1:
            told = []
            for i, (value, table) in enumerate(zip(values, rankings, strict=True), 1):
                names = [run.name for point in table.points for run in point.runs]
                told.append(f"table {i} {(value or 'not recorded')[:40]} ({ranking.listed(names, 3)})")
            lines.append(f"Different {what}: {', '.join(told)}.")
    return lines


def _write(file: Path, text: str) -> None:
    """Write a whole file or none, though other jobs of the sweep may write it at the same time."""
    try:
        write_beside(file, text)
    except OSError as error:
        raise MachineError(
            str(file), f"cannot be written: {error.strerror}", "Choose another folder with --out"
        ) from None
