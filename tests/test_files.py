"""Rows from files, folders, globs, packages and the hub, and what is said of those that cannot be read."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from kdx.data.files import origins_of, read_rows
from kdx.errors import DataError, MachineError

ROWS = [{"source": "a", "target": "b"}, {"source": "c\u2028d", "target": "caf\u00e9, \N{GRINNING FACE}\nline two"}]


def write(path, rows=ROWS):
    """Write rows in the format that the name ends in; without one, as datasets saves them."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.suffix in (".jsonl", ".gz", ".zst"):
        with pyarrow.output_stream(str(path), compression="detect") as stream:
            stream.write(lines.encode())
    elif path.suffix == ".json":
        wrapped = {"version": "1", "data": rows} if path.stem == "wrapped" else rows
        path.write_text(json.dumps(wrapped, indent=1, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), "", *(",".join(f'"{cell}"' for cell in row.values()) for row in rows)]
        path.write_text("\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def read(path, split="train"):
    return list(read_rows(path, None, split))


def rows_of(path, split="train"):
    return [row for _, row in read(path, split)]


def error_of(path, split="train"):
    """The one error of a file, raised or yielded, as text."""
    try:
        (error,) = [item for item in read(path, split) if isinstance(item, DataError)]
    except DataError as raised:
        error = raised
    assert error.exit_code == 2
    return str(error)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("t.jsonl", [":1", ":2"]),
        ("t.jsonl.gz", [":1", ":2"]),
        ("t.jsonl.zst", [":1", ":2"]),
        ("t.json", ["[0]", "[1]"]),
        ("wrapped.json", ["[0]", "[1]"]),
        ("t.csv", [":3", ":4"]),
        ("t.parquet", ["[0]", "[1]"]),
        ("saved", ["/data-00000-of-00001.arrow[0]", "/data-00000-of-00001.arrow[1]"]),
    ],
)
def test_every_format_gives_the_same_rows_and_where_they_stand(tmp_path, name, places):
    file = write(tmp_path / name)
    assert read(str(file)) == [(f"{file}{place}", row) for place, row in zip(places, ROWS, strict=True)]


def test_csv_cells_may_be_long_and_hold_any_line_separator(tmp_path):
    rows = [{"source": "x" * 200_000, "target": "a\u2028b\x0bc\x85d"}]
    (tmp_path / "plain.csv").write_text("source,target\na\u2028b,c\x85d\n", encoding="utf-8")
    assert rows_of(str(write(tmp_path / "t.csv", rows))) == rows
    assert rows_of(str(tmp_path / "plain.csv")) == [{"source": "a\u2028b", "target": "c\x85d"}]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_bom_line_endings_and_blank_lines_are_accepted(tmp_path, suffix, bom, ending):
    lines = {
        ".jsonl": ["", '{"source": "a", "target": "b"}', "  ", '{"source": "c", "target": "d"}', ""],
        ".json": ["[", '{"source": "a", "target": "b"},', "", '{"source": "c", "target": "d"}]', ""],
        ".csv": ["source,target", "a,b", "", "c,d", ""],
    }[suffix]
    file = tmp_path / f"t{suffix}"
    file.write_bytes(bom + ending.join(lines).encode())
    assert rows_of(str(file)) == [{"source": "a", "target": "b"}, {"source": "c", "target": "d"}]


def test_a_folder_a_glob_and_a_list_give_their_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.csv", "c.parquet"):
        write(tmp_path / name, [{"source": name, "target": "x"}])
    (tmp_path / "README.md").write_text("about", encoding="utf-8")
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "d.json", [{"source": "d.json", "target": "x"}])

    def names(path):
        return [row["source"] for row in rows_of(path)]

    assert names(str(tmp_path)) == ["a.csv", "b.jsonl", "c.parquet"]
    assert names(str(tmp_path / "[ab].*")) == ["a.csv", "b.jsonl"]
    assert names(str(tmp_path / "**" / "*.json")) == ["d.json"]
    assert names([str(tmp_path / "c.parquet"), str(tmp_path / "deep")]) == ["c.parquet", "d.json"]


def test_a_folder_has_the_splits_its_files_are_named_for(tmp_path):
    for name in ("train.jsonl", "test-00000.jsonl", "test-00001.jsonl.gz", "tests.jsonl", "sft/test_sft-0.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, [{"source": name, "target": "x"}])
    assert [row["source"] for row in rows_of(str(tmp_path), "test")] == ["test-00000.jsonl", "test-00001.jsonl.gz"]
    assert [row["source"] for row in rows_of(str(tmp_path))] == ["train.jsonl"]
    assert "file of the split train" in error_of(str(tmp_path / "sft"))
    assert rows_of(str(tmp_path / "sft"), "test_sft")
    assert "file of the split dev" in error_of(str(tmp_path), "dev")
    (tmp_path / "sft/train_sft.jsonl").write_text('{"source": "a"}')
    assert rows_of(str(tmp_path / "sft")) == [{"source": "a"}]
    (tmp_path / "sft/train_gen.jsonl").write_text('{"source": "b"}')  # which of the two?
    assert "file of the split train" in error_of(str(tmp_path / "sft"))
    (tmp_path / "sft/test_sft-0.jsonl").unlink()
    assert len(rows_of(str(tmp_path / "sft"))) == 2  # no test set among them
    saved = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(tmp_path / "saved")
    assert rows_of(str(tmp_path / "saved"), "test") == ROWS[1:]
    assert "file of the split dev" in error_of(str(tmp_path / "saved"), "dev")
    assert "train.jsonl is on disk and has no split dev" in error_of(str(tmp_path / "train.jsonl"), "dev")


def test_home_and_packages_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "kdx_test_rows").mkdir()
    (tmp_path / "kdx_test_rows" / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    write(tmp_path / "kdx_test_rows" / "t.jsonl")
    assert rows_of("~/kdx_test_rows/t.jsonl") == ROWS
    assert rows_of("pkg:kdx_test_rows") == rows_of("pkg:kdx-test-rows/t.jsonl") == ROWS
    with pytest.raises(MachineError, match=r"data\.path: the package no-such is not installed\. Run: pip install"):
        read("pkg:no-such")


def test_the_files_behind_a_config_are_known_without_reading_them(tmp_path, data_config):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("not read")
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    assert origins_of(data_config("pairs", path=str(train))) == [train]
    assert origins_of(data_config("pairs", path=str(train), validation=str(test))) == [train, test]
    assert origins_of(data_config("messages", path=str(tmp_path), validation="split:test")) == [train, test]
    assert [file.name for file in origins_of(data_config("chitchat"))] == ["dataset.json"]
    assert origins_of(data_config("custom", name="tickets", path=str(train))) is None  # one's own


def test_all_files_are_looked_at_before_the_unreadable_ones_are_said(tmp_path):
    write(tmp_path / "good.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'"caf\xe9"')
    (tmp_path / "empty.jsonl").touch()
    paths = [str(tmp_path / name) for name in ("empty.jsonl", "latin.jsonl", "good.jsonl")]
    seen = []
    with pytest.raises(DataError) as caught:
        seen.extend(read_rows(paths, None, "train"))
    assert len(str(caught.value).splitlines()) == 2
    rows = read_rows(paths, None, "train")
    assert [next(rows)[1], next(rows)[1]] == ROWS
