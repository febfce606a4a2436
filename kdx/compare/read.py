"""Compare runs: find their folders, read them, write the tables and the page.

No torch: it reads JSON and YAML, and runs after every job of a sweep.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.markdown import Markdown

from kdx.compare.ranking import DIGESTS, Comparison, Run, compared, make_ranking
from kdx.compare.tables import as_csv, as_json, as_markdown
from kdx.config import leaves
from kdx.errors import ConfigError, Parser, one_line
from kdx.run.files import read_json, read_lines, write_beside
from kdx.run.tracking import CONSOLE

MARK = "status.json"  # a folder with it is a run's
EXAMPLE = "Example: kdx compare outputs/sweeps/NAME"


def main(words: list[str]) -> int:
    """Run `kdx compare PATH… [--out DIR] [--wandb]` and return the exit code."""
    parser = Parser("kdx compare", description="Compare runs and sweeps.")
    parser.add_argument("paths", nargs="*", metavar="PATH", type=Path, help="a run folder or a sweep's folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write: PATH, or ./comparison for several")
    parser.add_argument("--wandb", action="store_true", help="also put it into W&B, with a dashboard of these runs")
    args = parser.parse_intermixed_args(words)
    out = args.out or (args.paths[0] if len(args.paths) == 1 else Path("comparison"))
    comparison = show(args.paths, out)
    if args.wandb:
        from kdx.compare.wandb_run import publish, save_dashboard

        CONSOLE.print(publish(comparison, out, "auto"), markup=False)
        CONSOLE.print(f"Dashboard: {save_dashboard(comparison)}", markup=False)
    return 0


def show(paths: Sequence[Path], out: Path) -> Comparison:
    comparison = compare(paths, out)
    CONSOLE.print(Markdown(as_markdown(comparison, is_brief=True)))
    CONSOLE.print(f"Wrote {out / 'compare.html'}, .csv, .json and .md", markup=False)
    return comparison


def compare(paths: Sequence[Path], out: Path) -> Comparison:
    """Rank the runs in these folders, and write compare.csv, .json, .md and .html into `out`.

    Raises ConfigError if there is nothing to compare. A run that cannot be read is listed with the reason.
    """
    from kdx.compare.page import page  # matplotlib is slow to import

    comparison = compared([read_run(name, folder) for name, folder in find(paths).items()])
    for suffix, text in (("csv", as_csv), ("json", as_json), ("md", as_markdown), ("html", page)):
        write_beside(out / f"compare.{suffix}", text(comparison))
    return comparison


def find(paths: Sequence[Path]) -> dict[str, Path]:
    """Return the run folders in these folders by name, the path below their common parent.

    Raises ConfigError if a path does not exist or there is no run at all.
    """
    for path in paths:
        if not path.exists():
            raise ConfigError(str(path), "does not exist", EXAMPLE)
    folders = sorted({mark.parent.resolve() for path in paths for mark in path.rglob(MARK)})
    if not folders:
        raise ConfigError(" ".join(map(str, paths)) or "kdx compare", "no runs found", EXAMPLE)
    shared = os.path.commonpath([folder.parent for folder in folders])
    return {str(folder.relative_to(shared)): folder for folder in folders}


def read_run(name: str, folder: Path) -> Run:
    """Read a run folder. A run that is not done, or of which a file does not parse, is not ranked for this reason."""
    run = Run(name, folder)
    try:
        status = _load(folder / MARK)
        run.state = status["state"]
        run.config = leaves(_load(folder / "config.yaml"))
        run.swept = _load(folder / "record.json")["swept"]
        kept = read_json(folder / "data.json")
        run.config |= {key: digest[:8] for key, name in DIGESTS.items() if (digest := kept.get(name))}
        if run.state != "done":  # only then are all measures finite
            run.reason = status.get("reason") or f"step {status['step']} of {status['max_steps']}"
            return run
        run.summary = _load(folder / "summary.json")
        if run.summary["student"]["ce"] is None:
            run.reason = "nothing was held out"
            return run
        run.rows = sorted(_load(folder / "eval_rows.jsonl"), key=lambda line: str(line["row"]))
        if len(run.rows) != run.summary["data"]["num_validation_rows"]:
            raise ValueError(f"eval_rows.jsonl has {len(run.rows)} rows")
        run.answers = read_lines(folder / "eval_answers.jsonl")  # not there if no prompts were asked
        run.curve = [line for line in _load(folder / "metrics.jsonl") if "eval/ce" in line]
        run.samples = _load(folder / "samples.json")
        make_ranking([run])  # reads what ranking will
    except Exception as error:  # a damaged file, or one of another version
        run.reason = f"cannot be read ({type(error).__name__}: {one_line(error)})"
    return run


def _load(file: Path) -> Any:
    """Parse a file. Raises ValueError that names it."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines()]
        return yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file.name}: {error}") from None
