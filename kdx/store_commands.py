"""What `kdx store …` does: fill the teacher's store ahead of the runs, show it, verify it, tidy it."""

import argparse
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from rich.markup import escape
from rich.table import Table

from kdx.certificate import certify, words_of
from kdx.config import Config, DataConfig, StudentConfig, TeacherConfig, replaced
from kdx.data.batches import by_length, collate
from kdx.data.files import at_home
from kdx.errors import ConfigError, MachineError, printable
from kdx.evaluate import HeldOut
from kdx.measuring import Measurer
from kdx.prepare import check_names, in_bytes, prepare
from kdx.run.files import read_json, verify
from kdx.run.launch import build_accelerator
from kdx.run.report import store_line
from kdx.run.tracking import CONSOLE, log, logging_to, quiet_libraries, working
from kdx.segments import compact, survey
from kdx.store import head_is_whole, size_of

LEFT_BEHIND = 3600  # seconds after which a file half written is no one's
FILL_ROWS = 8  # at least so many rows at once: the teacher's pass needs less memory than training


def fill(configs: Sequence[Config]) -> None:
    """Ask each teacher of these runs for every row of their data, and for its answers to the sample prompts."""
    quiet_libraries()
    with logging_to(None, is_main=os.environ.get("RANK", "0") == "0"):
        done: list[tuple[TeacherConfig, DataConfig, StudentConfig]] = []
        for config in configs:
            asks = (config.teacher, config.data, config.student)  # the student decides too how long rows may be
            if asks in done:
                continue
            done.append(asks)
            if config.teacher.path is None:
                raise ConfigError("teacher", "is none, so there is nothing to keep", "Choose a teacher")
            check_names(config)
            _fill(replaced(config, teacher=replaced(config.teacher, store="on")))


def _fill(config: Config) -> None:
    accelerator = build_accelerator(config)
    run = prepare(config, accelerator, owner=f"fill{os.getpid()}", is_fill=True)
    assert run.teacher is not None and run.teacher.store is not None
    store, is_main = run.teacher.store, accelerator.is_main_process
    log.info("the teacher's store: %s", run.store_words)
    rows = {row.digest: row for row in [*run.held_out_rows, *run.rows]}
    wanted = store.missing(list(rows))
    missing = [rows[digest] for digest in wanted]
    size = max(FILL_ROWS, run.batches.micro_batch_size, run.teacher.rows_at_once or 0)
    groups = by_length(missing, size)[accelerator.process_index :: accelerator.num_processes]
    try:
        with working("the teacher reads", len(groups), is_main) as advance:
            for group in groups:
                run.teacher.hidden(collate([missing[i] for i in group], run.batches.pad_id))
                advance()
        if is_main:
            held_out = HeldOut.build(run.held_out_rows, run.batches, accelerator.device, run.num_ids)
            Measurer(run, held_out).teacher_answers()
            certificate = certify(run.teacher, run.held_out_rows or run.rows, run.batches.pad_id)
            if certificate:
                log.info(words_of(certificate))
            log.info(store_line(store))
    finally:
        store.close()
    accelerator.wait_for_everyone()
    if store.is_full:
        raise MachineError(str(store.folder), "took not all rows", "Make room, or raise teacher.store_limit_gb")


def tend(words: list[str]) -> int:
    """Run `kdx store stat | verify | prune` → the exit code. Raises ConfigError or MachineError."""
    parser = argparse.ArgumentParser(prog="kdx store")

    def refuse(message: str) -> NoReturn:
        raise ConfigError("kdx store", message, "As in: kdx store stat teacher.store_dir=FOLDER")

    parser.error = refuse  # type: ignore[method-assign]
    parser.add_argument("what", choices=("stat", "verify", "prune"))
    parser.add_argument("place", nargs="?", default="", metavar="teacher.store_dir=FOLDER")
    parser.add_argument("--unused-days", type=float, help="prune: remove teachers that no run asked for so long")
    args = parser.parse_args(words)
    place = args.place.removeprefix("teacher.store_dir=") or os.environ.get("KDX_STORE") or "outputs/teacher-store"
    root = at_home(place, "teacher.store_dir").resolve()
    if not root.is_dir():
        raise ConfigError("teacher.store_dir", f"{root} does not exist", "Name the store's folder, or set KDX_STORE")
    teachers = sorted(folder for folder in root.glob("[0-9a-f]" * 16) if folder.is_dir())
    if args.what == "prune":
        if args.unused_days is not None and not args.unused_days >= 0:  # not-a-number is no number of days
            raise ConfigError("--unused-days", f"is {args.unused_days:g}", "Give a number of days, 0 or more")
        return _prune(root, teachers, args.unused_days)
    return _show(root, teachers, is_verify=args.what == "verify")


def _show(root: Path, teachers: list[Path], *, is_verify: bool) -> int:
    table = Table(title=str(root), title_justify="left")
    for column in ("teacher", "dtype", "rows", "size", "last used", "certificate", *(["damaged"] if is_verify else [])):
        table.add_column(column, justify="right" if column in ("rows", "size", "damaged") else "left")
    num_bad = 0
    for folder in teachers:
        about = read_json(folder / "teacher.json")
        found = survey(folder / "rows", is_verify=is_verify)
        bad = found.num_bad + bool(found.num_stray_bytes) + (is_verify and _has_damaged_head(folder))
        num_bad += bad if is_verify else 0
        certificate = read_json(folder / "certificate.json").get("stored_to_live")
        exact = f"KL ≤ {max(certificate.values()):.2g}" if certificate else ""
        quantised = about.get("quantization", "none")
        dtype = escape(printable(str(about.get("dtype", "")))) + ("" if quantised == "none" else f", {quantised}")
        cells = [
            f"{escape(printable(str(about.get('name', '?'))))}\n{folder.name}",
            dtype,
            f"{found.num_rows:,}",
            in_bytes(size_of(folder)),
        ]
        cells += [str(read_json(folder / "use.json").get("used", ""))[:10], exact, *([f"{bad:,}"] if is_verify else [])]
        table.add_row(*cells)
    for folder in sorted((root / "students").glob("[!.]*")):
        fault = verify(folder) if is_verify else None
        num_bad += fault is not None
        table.add_row(f"student {folder.name}", "", "", in_bytes(size_of(folder)), "", "", fault or "")
    CONSOLE.print(table)
    if num_bad:
        mend = "Run: kdx store prune; what is damaged is then computed again when it is asked for"
        raise MachineError(str(root), f"{num_bad} damaged", mend)
    return 0


def _has_damaged_head(folder: Path) -> bool:
    return (folder / "teacher.json").exists() and not head_is_whole(folder)


def _prune(root: Path, teachers: list[Path], unused_days: float | None) -> int:
    freed = 0
    for folder in teachers:
        used = folder / "use.json"
        age = (time.time() - (used if used.exists() else folder).stat().st_mtime) / 86400
        if unused_days is not None and age > unused_days:
            name = read_json(folder / "teacher.json").get("name", folder.name)
            freed += _remove(folder)
            CONSOLE.print(f"removed {name}, unused for {age:.0f} days", markup=False)
            continue
        freed += compact(folder / "rows")
        if _has_damaged_head(folder):
            freed += _remove(folder / "head.safetensors") + _remove(folder / "teacher.json")
    for folder in sorted((root / "students").glob("[!.]*")):
        if verify(folder) is not None:
            freed += _remove(folder)
    for left in list(root.rglob(".tmp-*")):
        with suppress(FileNotFoundError):  # whoever was writing it is done
            if time.time() - left.stat().st_mtime > LEFT_BEHIND:
                freed += _remove(left)
    CONSOLE.print(f"{in_bytes(freed)} freed in {root}", markup=False)
    return 0


def _remove(path: Path) -> int:
    """Remove a file or folder → its bytes."""
    if path.is_dir():
        freed = size_of(path)
        shutil.rmtree(path, ignore_errors=True)
        return freed
    freed = path.stat().st_size if path.exists() else 0
    path.unlink(missing_ok=True)
    return freed
