"""What `kdx store …` does: fill the teacher's store ahead of the runs, show it, verify it, compact it.

What imports torch is imported late, so that `kdx store --help` answers at once.
"""

import argparse
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from kdx.config import Config, replaced
from kdx.data.files import at_home
from kdx.errors import ConfigError, MachineError, printable
from kdx.run.files import in_bytes, read_json, size_of

ABANDONED_SECONDS = 3600  # age at which a temporary file is taken for a killed process's
FILL_ROWS = 8  # at least so many rows in a pass: it needs less memory than training
HELP = """
fill KEY=VALUE ...   run the teacher over all rows of a run or sweep (words as for the run), so that its jobs need not
stat                 list the teachers, their rows and sizes, and when each was last used
verify               compare the checksum of every row; exit code 3 if one is damaged
prune                join small shards, drop damaged rows and, with --unused-days, teachers that no run used lately
"""


def fill(configs: Sequence[Config]) -> None:
    """Run each teacher of these configs over all rows of their data, and let it answer the sample prompts."""
    from kdx.prepare import check_names
    from kdx.run.tracking import logging_to, quiet_libraries

    quiet_libraries()
    # What decides the rows; the student may limit their length.
    unique = {repr((config.teacher, config.data, config.student)): config for config in configs}
    with logging_to(None, is_main=os.environ.get("RANK", "0") == "0"):
        for config in unique.values():
            if config.teacher.path is None:
                raise ConfigError("teacher", "is none, so there is nothing to store", "Choose a teacher")
            check_names(config)
            _fill(replaced(config, teacher=replaced(config.teacher, store="on")))


def _fill(config: Config) -> None:
    from kdx.data.batches import by_length, collate
    from kdx.evaluate import HeldOut
    from kdx.measuring import Measurer
    from kdx.prepare import prepare
    from kdx.run.launch import build_accelerator
    from kdx.run.report import store_line
    from kdx.run.tracking import log, working

    accelerator = build_accelerator(config)
    run = prepare(config, accelerator, owner=f"fill{os.getpid()}", is_fill=True)
    assert run.teacher is not None and run.teacher.store is not None
    store, is_main = run.teacher.store, accelerator.is_main_process
    log.info("teacher cache: %s", run.store_words)
    rows = {row.digest: row for row in [*run.held_out_rows, *run.rows]}
    missing = [rows[digest] for digest in store.missing(list(rows))]
    size = max(FILL_ROWS, run.batches.micro_batch_size, run.teacher.rows_at_once or 0)
    groups = by_length(missing, size)[accelerator.process_index :: accelerator.num_processes]
    try:
        with working("Running teacher", len(groups), is_main) as advance:
            for group in groups:
                run.teacher.answer(collate([missing[i] for i in group], run.batches.pad_id))
                advance()
        if is_main:
            held_out = HeldOut.build(run.held_out_rows, run.batches, accelerator.device, run.num_ids)
            Measurer(run, held_out).teacher_answers()
    finally:
        store.close()
    if is_main:
        log.info(store_line(store))
    accelerator.wait_for_everyone()
    if store.is_full:
        raise MachineError(str(store.folder), "not all rows were stored", "Free space, or raise teacher.store_limit_gb")


def manage(words: list[str]) -> int:
    """Run `kdx store stat | verify | prune`, or answer --help → the exit code. Raises ConfigError or MachineError."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("kdx store", description=HELP.strip(), formatter_class=layout)
    parser.add_argument("command", choices=("fill", "stat", "verify", "prune"))
    where = "the store's folder; default: $KDX_STORE, else outputs/teacher-store"
    parser.add_argument("folder", nargs="?", default="", metavar="teacher.store_dir=FOLDER", help=where)
    parser.add_argument("--unused-days", type=float, metavar="N", help="prune: remove teachers unused for N days")

    def refuse(message: str) -> NoReturn:
        raise ConfigError("kdx store", message, "See kdx store --help")

    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_args(words)
    folder = args.folder.removeprefix("teacher.store_dir=") or os.environ.get("KDX_STORE") or "outputs/teacher-store"
    root = at_home(folder, "teacher.store_dir").resolve()
    if not root.is_dir():
        raise ConfigError("teacher.store_dir", f"{root} does not exist", "Name the store's folder, or set KDX_STORE")
    teachers = sorted(path for path in root.glob("[0-9a-f]" * 16) if path.is_dir())
    if args.command == "prune":
        _prune(root, teachers, args.unused_days)
    else:
        _show(root, teachers, is_verify=args.command == "verify")
    return 0


def _show(root: Path, teachers: list[Path], *, is_verify: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    from kdx.run.tracking import CONSOLE
    from kdx.store import count_rows

    table = Table(title=str(root), title_justify="left")
    for column in ("teacher", "dtype", "rows", "size", "last used", *(["damaged"] if is_verify else [])):
        table.add_column(column, justify="right" if column in ("rows", "size", "damaged") else "left")
    total_bad = 0
    for folder in teachers:
        about = read_json(folder / "teacher.json")
        name, dtype, quantization = (str(about.get(key, "?")) for key in ("name", "dtype", "quantization"))
        dtype = dtype if quantization == "none" else f"{quantization}, {dtype}"
        used = str(read_json(folder / "use.json").get("used", ""))[:10]
        num_rows, num_bad = count_rows(folder, is_verify=is_verify)
        total_bad += num_bad
        cells = [
            f"{printable(name)}\n{folder.name}",
            printable(dtype),
            f"{num_rows:,}",
            in_bytes(size_of(folder)),
            used,
        ]
        table.add_row(*(escape(cell) for cell in cells), *([f"{num_bad:,}"] if is_verify else []))
    CONSOLE.print(table)
    if is_verify and total_bad:
        hint = "Run kdx store prune to drop them; the teacher computes them again when they are needed"
        raise MachineError(str(root), f"{total_bad:,} damaged", hint)


def _prune(root: Path, teachers: list[Path], unused_days: float | None) -> None:
    from kdx.run.tracking import CONSOLE
    from kdx.store import compact

    before, now = size_of(root), time.time()
    for folder in teachers:
        used = folder / "use.json"
        days = (now - (used if used.exists() else folder).stat().st_mtime) / 86400
        if unused_days is None or days <= unused_days:
            compact(folder)
            continue
        name = read_json(folder / "teacher.json").get("name", folder.name)
        shutil.rmtree(folder, ignore_errors=True)
        CONSOLE.print(f"removed {name}, unused for {days:.0f} days", markup=False)
    for left in root.rglob(".tmp-*"):
        with suppress(FileNotFoundError):  # its writer has finished meanwhile
            if now - left.stat().st_mtime > ABANDONED_SECONDS:
                left.unlink()
    CONSOLE.print(f"{in_bytes(before - size_of(root))} freed in {root}", markup=False)
