"""What `kdx store …` does: fill the teacher's store ahead of the runs, show it, verify it, prune it."""

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from rich.markup import escape
from rich.table import Column, Table

from kdx.config import Config, replaced
from kdx.data.batches import by_length, collate
from kdx.data.encode import load_data
from kdx.errors import ConfigError, MachineError, Parser
from kdx.evaluate import num_prompts, teacher_answers
from kdx.generate import teacher_stops
from kdx.rollout import with_teachers_answers
from kdx.run.files import in_bytes, read_json, size_of
from kdx.run.launch import build_accelerator
from kdx.run.report import store_line
from kdx.run.tracking import CONSOLE, log, logging_to, working
from kdx.store import count_rows, damaged_files
from kdx.teacher import load_teacher
from kdx.tokenizer import load_tokenizer

FILL_ROWS = 8  # rows in a pass, unless teacher.micro_batch_size says


def fill(configs: Sequence[Config]) -> None:
    """Run each teacher of these configs over all rows of their data, and let it answer the sample prompts."""
    # What decides the rows; the student may limit their length.
    unique = {repr((config.teacher, config.data, config.student, config.rollout)): config for config in configs}
    with logging_to():
        for config in unique.values():
            _fill(replaced(config, teacher=replaced(config.teacher, store="on")))


def _fill(config: Config) -> None:
    machine = build_accelerator(config)
    shared = load_tokenizer(config)
    data = load_data(config.data, shared, num_prompts(config))
    if config.rollout.name == "teacher":
        data = with_teachers_answers(config, data, shared, machine, range(len(data.train)))
    rows = {row.digest: row for row in (*data.held_out, *data.train)}
    counted = {digest: row.num_counted for digest, row in rows.items()}
    teacher = load_teacher(config.teacher, machine.device, shared.max_length, counted, is_repeated=True)
    if teacher is None or (store := teacher.store) is None:
        raise ConfigError("teacher", "is none, so there is nothing to store", "Choose a teacher")
    log.info("teacher cache: %s", teacher.store_words)
    missing = [rows[digest] for digest in store.missing([*rows])]
    groups = by_length([len(row.tokens) for row in missing], teacher.rows_at_once or FILL_ROWS)
    groups = groups[machine.process_index :: machine.num_processes]
    with closing(store), working("Running teacher", len(groups)) as advance:
        for group in groups:
            teacher.answer(collate([missing[i] for i in group], shared.pad_id))
            advance()
        stops = teacher_stops(config.teacher, data.stops, shared)
        teacher_answers(teacher, shared, data.prompts, machine, stops)
    if machine.is_main_process:
        log.info(store_line(store))
    machine.wait_for_everyone()
    if store.is_full:
        raise MachineError(str(store.folder), "not all rows were stored", "Free space, or raise teacher.store_limit_gb")


def manage(words: list[str]) -> int:
    """Run `kdx store stat | verify | prune` → the exit code. Raises ConfigError or MachineError."""
    parser = Parser("kdx store", add_help=False)
    parser.add_argument("command", choices=("fill", "stat", "verify", "prune"))
    parser.add_argument("folder", nargs="?", default="")
    parser.add_argument("--unused-days", type=float)
    args = parser.parse_args(words)
    folder = args.folder.removeprefix("teacher.store_dir=") or os.environ.get("KDX_STORE") or "outputs/teacher-store"
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise ConfigError("teacher.store_dir", f"{root} does not exist", "Name the store's folder, or set KDX_STORE")
    teachers = {file.parent: file.stat().st_mtime for file in sorted(root.glob("*/teacher.json"))}
    if args.command == "prune":
        _prune(root, teachers, args.unused_days)
    else:
        _show(root, teachers, is_verify=args.command == "verify")
    return 0


def _show(root: Path, teachers: dict[Path, float], *, is_verify: bool) -> None:
    """Print a line for each teacher. teachers: folder → when a run last used it, in seconds since 1970."""
    columns = [Column(name, justify="right") for name in ("rows", "size", "last used")]
    table = Table("teacher", "dtype", *columns, title=escape(str(root)), title_justify="left")
    for folder, used in teachers.items():
        about = read_json(folder / "teacher.json")
        precision = f"{about.get('dtype')}\n{about.get('quantization')}".removesuffix("none")
        cells = (f"{about.get('name')}\n{folder.name}", precision, f"{count_rows(folder):,}", in_bytes(size_of(folder)))
        table.add_row(*map(escape, cells), time.strftime("%Y-%m-%d", time.localtime(used)))
    CONSOLE.print(table)
    damaged = [file for folder in teachers for file in damaged_files(folder)] if is_verify else []
    if is_verify and not damaged:
        CONSOLE.print("All checksums are right")
    if damaged:
        hint = "Run kdx store prune to remove them; the teacher computes their rows again when they are needed"
        raise MachineError(str(root), f"{len(damaged):,} damaged files, such as {damaged[0]}", hint)


def _prune(root: Path, teachers: dict[Path, float], unused_days: float | None) -> None:
    before, now = size_of(root), time.time()
    for folder, used in teachers.items():
        days = (now - used) / 86400
        if unused_days is not None and days > unused_days:
            shutil.rmtree(folder)
            CONSOLE.print(f"removed {folder}, unused for {days:.0f} days", markup=False)
        else:
            for file in damaged_files(folder):
                file.unlink(missing_ok=True)
    for left in root.rglob(".tmp-*"):
        if now - left.stat().st_mtime > 3600:  # its writer was killed
            left.unlink()
    CONSOLE.print(f"{in_bytes(before - size_of(root))} freed in {root}", markup=False)
