"""What a user can get wrong: every bad input with its exit code and the line that names where, what and the mend.

Each is typed at the real command, in this process; a few as processes of their own.
"""

import gzip
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from processes import environment, in_process
from safetensors.torch import load_file, save_file
from standins import write_pairs

from kdx import loss

BASE = ["teacher=hf", "teacher.path=teacher", "student=hf", "student.path=student", "data=pairs"]
BASE += ["data.path=t.jsonl", "train.max_steps=1", "tracking.mode=disabled", "teacher.store=off"]
GOOD = {"source": "a", "target": "b"}
LINE = json.dumps(GOOD).encode() + b"\n"
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture
def place(beside_models: Path) -> Path:
    return beside_models


def words_of(*words: str) -> list[str]:
    keys = {word.split("=")[0] for word in words}
    return [word for word in BASE if word.split("=")[0] not in keys] + list(words)


@pytest.fixture
def refused(place: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Type a command with these words → the lines it ends with, each without the program's name."""

    def run(*words: str, code: int = 2) -> list[str]:
        got, _, lines = in_process(capfd, *words_of(*words))
        assert got == code, lines
        lines = [line for line in lines if not line.startswith("warning: data.max_length=")]
        assert all(line.startswith("kdx: error: ") for line in lines), lines
        return [line.removeprefix("kdx: error: ") for line in lines]

    return run


def jsonl(*rows: object) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


# ---- files. name: (file, content, the start of the line, what else it says)
FILES = {
    "broken JSON on line 2": ("t.jsonl", LINE + b'{"source": x}\n' + LINE, "t.jsonl:2:12: is not JSON", "one JSON object a line"),
    "trailing comma": ("t.jsonl", LINE + b'{"source": "a",}\n' + LINE, "t.jsonl:2:1", "is not JSON ("),
    "truncated last line, in text": ("t.jsonl", LINE + b'{"source": "a", "tar', "t.jsonl:2:17: is not JSON", "Was the copy cut short?"),
    "truncated last line": ("t.jsonl", LINE + b'{"source": "a"', "t.jsonl:2:15: is not JSON", "Was the copy cut short?"),
    "truncated list": ("t.json", b'[{"source": "a"},', "t.json:1:", "Was the copy cut short?"),
    "broken list": ("t.json", b'[{"source": "a"},\n {"source": }]', "t.json:2:13: is not JSON", "Mend it"),
    "lines in a .json": ("t.json", LINE * 2, "t.json:2:1: is not JSON", "name the file .jsonl"),
    "an object for a list": ("t.json", b'{"data": []}', "t.json: holds an object, expected a list of rows", "Wrap the rows in [ ]"),
    "NaN": ("t.jsonl", LINE + b'{"source": NaN}', "t.jsonl:2:1: is not JSON", "NaN is not a JSON value"),
    "a key twice": ("t.jsonl", LINE + b'{"target": "a", "target": "b"}', "t.jsonl:2:", "'target' stands twice"),
    "deep nesting": ("t.jsonl", b"[" * 200_000, "t.jsonl:1:", "is not JSON"),
    "latin-1": ("t.jsonl", LINE + b'{"source": "caf\xe9"}\n', "t.jsonl:2: byte 0xe9 is not UTF-8", "iconv -f LATIN1 -t UTF-8 t.jsonl"),
    "latin-1 after a BOM": ("t.jsonl", b"\xef\xbb\xbf" + LINE + b'"\xe9"', "t.jsonl:2: byte 0xe9", "iconv"),
    "latin-1 CSV": ("t.csv", b"source,target\na,caf\xe9\n", "t.csv:2: byte 0xe9", "iconv"),
    "UTF-16": ("t.jsonl", LINE.decode().encode("utf-16"), "t.jsonl:1: is UTF-16 (first bytes ff fe)", "iconv -f UTF-16 -t UTF-8"),
    "UTF-16 without BOM": ("t.json", LINE.decode().encode("utf-16-le"), "t.json:1: is UTF-16", "iconv"),
    "UTF-16, big end first": ("t.jsonl", LINE.decode().encode("utf-16-be"), "t.jsonl:1: is UTF-16", "iconv"),
    "UTF-32": ("t.jsonl", LINE.decode().encode("utf-32"), "t.jsonl:1: is UTF-32 (first bytes ff fe)", "iconv -f UTF-32 -t UTF-8"),
    "UTF-32 without BOM": ("t.json", LINE.decode().encode("utf-32-be"), "t.json:1: is UTF-32", "iconv"),
    "a comma at the end": ("t.jsonl", LINE + b'{"source": "a",}', "t.jsonl:2:16: is not JSON", "Mend the line"),
    "columns without commas": ("t.csv", b"source;target\na;b\nc;d\ne;f\n", 't.csv:2: "source" is missing; the columns are: source;target (and so in all 3 rows)', "with commas: its columns stand apart by ';'"),
    "a comma too few": ("t.csv", b"source,target\na,b\nc\n", "t.csv:3: ", '"target" is null, expected text. Fill it in'),
    "a header alone": ("t.csv", b"source,target\n", "data.path: t.csv holds no rows", "Give data that has some"),
    "an empty list": ("t.json", b"[]", "data.path: t.json holds no rows", "Give data that has some"),
    "numbers": ("t.jsonl", b'{"source": 1, "target": "a"}\n{"source": 22, "target": "b"}\n{"source": 3.5, "target": "c"}\n', 't.jsonl:1: "source" is a number, expected text (and so in all 3 rows)', "Quote it in the file"),
    "chats": ("t.jsonl", json.dumps({"messages": TALK}).encode() * 1 + b"\n" + json.dumps({"messages": TALK}).encode() + b"\n" + json.dumps({"messages": TALK}).encode(), 't.jsonl:1: "source" is missing; the columns are: messages (and so in all 3 rows)', "Choose data=messages, or name the column"),
    "ShareGPT's chats": ("t.json", json.dumps([{"conversations": TALK}] * 3).encode(), 't.json[0]: "source" is missing', "Choose data=sharegpt, or name the column"),
    "zeros": ("t.jsonl", b"\0" * 4096, "t.jsonl: holds only zero bytes", "copy the file again"),
    "copies of one row": ("t.jsonl", LINE * 20, "data.validation: all 20 rows are copies of one", "Give rows that differ"),
    "empty": ("t.jsonl", b"", "t.jsonl: is empty", "Give a file with rows"),
    "empty but for a BOM": ("t.csv", b"\xef\xbb\xbf\r\n \n", "t.csv: is empty", "Give a file"),
    "a column twice": ("t.csv", b"source,target,source\na,b,c\n", "t.csv: has the column 'source' more than once", "Rename one"),
    "gzip under another name": ("t.jsonl", gzip.compress(LINE), "t.jsonl: is gzip, expected text", "Unpack it"),
    "a comma too many": ("t.csv", b"source,target\na,b\na,b, and c\n", "t.csv:3: has more than the 2 columns", "Quote the commas"),
    "a broken quote": ("t.csv", b'source,target\n"a"b,c\n', "t.csv:2: is not CSV", "Mend the quoting"),
    "an open quote": ("t.csv", b'source,target\na,"b\n', "t.csv:2: is not CSV", "Mend the quoting"),
    "not parquet": ("t.parquet", b"PAR1 but no more", "t.parquet: is not a whole parquet file", "Was the copy cut short?"),
    "another format": ("t.txt", b"hello", "data.path: t.txt is none of .jsonl, .json, .csv, .parquet", "Convert it"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "content", "start", "says"), FILES.values(), ids=FILES)
def test_files(refused, file, content, start, says):
    Path(file).write_bytes(content)
    (line,) = refused(f"data.path={file}", "data.on_bad_row=stop")
    assert line.startswith(start), line
    assert says in line


def test_parquet_files(refused):
    pyarrow.parquet.write_table(pyarrow.table({"source": ["a"], "target": ["b"]}), "whole.parquet")
    whole = Path("whole.parquet").read_bytes()
    names = [f"cut{n}.parquet" for n in (len(whole) // 2, len(whole) - 1)]
    for name in names:
        Path(name).write_bytes(whole[: int(name[3:-8])])
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["source", "source"]), "twice.parquet")
    *lines, total = refused(f"data.path=[{','.join(names)},twice.parquet]")
    for name, line in zip(names, lines, strict=False):
        assert line.startswith(f"{name}: is not a whole parquet file (")
        assert line.endswith("Was the copy cut short? Copy the file again")
    assert lines[2:] == ["twice.parquet: has the column 'source' more than once. Rename one of them"]
    assert total == "data: 3 faults. Mend them"


# ---- rows. (choice, row, what is said of it)
CHAT = 'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
ROWS = [
    ("pairs", {"source": "a"}, '"target" is missing; the columns are: source. Name the column: data.target_column=...'),
    ("pairs", {"q": "a", "a": "b"}, '"source" is missing; the columns are: q, a. Name the column: data.source_column=...'),
    ("pairs", {}, '"source" is missing; the columns are: none. Name the column: data.source_column=...'),
    ("pairs", {**GOOD, "target": None}, '"target" is null, expected text. Fill it in, or take the row out'),
    ("pairs", {**GOOD, "target": 5}, '"target" is a number (5), expected text. Quote it in the file'),
    ("pairs", {**GOOD, "target": 1.5}, '"target" is a number (1.5), expected text. Quote it in the file'),
    ("pairs", {**GOOD, "target": True}, '"target" is true or false (true), expected text. Quote it in the file'),
    ("pairs", {**GOOD, "source": ["a"]}, '"source" is a list, expected text. Join it into one text, or map another column: data.source_column=...'),
    ("pairs", {**GOOD, "source": {"a": 1}}, '"source" is an object, expected text. Join it into one text, or map another column: data.source_column=...'),
    ("pairs", {**GOOD, "target": ""}, '"target" is empty or blank. Give it text, or take the row out'),
    ("pairs", {**GOOD, "source": " \n\u2028"}, '"source" is empty or blank. Give it text, or take the row out'),
    ("pairs", {**GOOD, "source": "a\ud83d"}, 'messages[0]: "content" has half of a surrogate pair (\\ud83d), which is no text. Was the text cut in the middle of an emoji? Mend it'),
    ("pairs", ["a", "b"], "is a list, expected an object. Write one JSON object a row"),
    ("pairs", "oops", 'is text ("oops"), expected an object. Write one JSON object a row'),
    ("pairs", None, "is null, expected an object. Write one JSON object a row"),
    ("messages", {"text": "a"}, '"messages" is missing; the columns are: text. Name the column: data.messages_column=...'),
    ("messages", {"messages": "oops"}, f'"messages" is text ("oops"), expected a list of messages. {CHAT}'),
    ("messages", {"messages": None}, f'"messages" is null, expected a list of messages. {CHAT}'),
    ("messages", {"messages": []}, f'"messages" is an empty list, expected a list of messages. {CHAT}'),
    ("messages", {"messages": ["hi", *TALK]}, 'messages[0]: needs "role" and "content", it has: text ("hi"). Name them: data.role_key, data.content_key'),
    ("messages", {"messages": [*TALK, {"role": "user"}]}, 'messages[2]: needs "role" and "content", it has: role. Name them: data.role_key, data.content_key'),
    ("messages", {"messages": [TALK[0], {"role": "bot", "content": "b"}]}, 'messages[1]: the role is text ("bot"). Roles are system, user, assistant; map others with data.roles, as in \'+data.roles.bot=assistant\''),
    ("messages", {"messages": [{**TALK[0], "role": 3}, TALK[1]]}, "messages[0]: the role is a number (3). Roles are system, user, assistant; map others with data.roles, as in '+data.roles.bot=assistant'"),
    ("messages", {"messages": [{**TALK[0], "role": []}, TALK[1]]}, "messages[0]: the role is a list. Roles are system, user, assistant; map others with data.roles, as in '+data.roles.bot=assistant'"),
    ("messages", {"messages": [TALK[0], {**TALK[1], "content": None}]}, 'messages[1]: "content" is null, expected text. Fill it in, or take the row out'),
    ("messages", {"messages": [TALK[0], {**TALK[1], "content": [1]}]}, 'messages[1]: "content" is a list, expected text. Join it into one text'),
    ("messages", {"messages": [TALK[0], {**TALK[1], "content": " "}]}, 'messages[1]: "content" is empty or blank. Give it text, or take the row out'),
    ("messages", {"messages": [TALK[0]]}, "no message is the assistant's. The assistant's turns are what is learnt: add one"),
    ("messages", [TALK], "is a list, expected an object. Write one JSON object a row"),
    ("sharegpt", {"messages": TALK}, '"conversations" is missing; the columns are: messages. Choose data=messages, or name the column: data.messages_column=...'),
    ("sharegpt", {"conversations": "oops"}, f'"conversations" is text ("oops"), expected a list of messages. {CHAT}'),
    ("sharegpt", {"conversations": TALK}, 'messages[0]: needs "from" and "value", it has: role, content. Name them: data.role_key, data.content_key'),
    ("sharegpt", {"conversations": [{"from": "human"}]}, 'messages[0]: needs "from" and "value", it has: from. Name them: data.role_key, data.content_key'),
]  # fmt: skip


@pytest.mark.parametrize("choice", ["pairs", "messages", "sharegpt"])
def test_rows(refused, choice, monkeypatch):
    """All rows of a source in one file, so in one pass, and before a model is loaded."""
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("a model is loaded")
    )
    bad = [(row, says) for name, row, says in ROWS if name == choice]
    good = {"pairs": GOOD, "messages": {"messages": TALK}}.get(choice)
    good = good or {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    Path("t.jsonl").write_bytes(jsonl(*(part for row, _ in bad for part in (good, row))))
    *lines, total = refused(f"data={choice}")
    assert lines == [f"t.jsonl:{2 * i}: {says}" for i, (_, says) in enumerate(bad, 1)]
    assert total == f"data: {len(bad)} faults. Mend them, or set data.on_bad_row=skip"


def test_parsing_encoding_and_held_out_rows_are_one_pass(refused):
    template = '{% for m in messages %}{{ raise_exception("no sums") if "+" in m.content else m.content }}{% endfor %}'
    long = {"source": "a", "target": "b " * 100}
    Path("t.jsonl").write_bytes(jsonl(GOOD, {"source": "a"}, long, {"source": "2+2", "target": "4"}, *[GOOD] * 20))
    Path("held.jsonl").write_bytes(jsonl(b"{oops\n", long))
    words = (
        f"data.chat_template='{template}'",
        "data.on_long=error",
        "data.max_length=20",
        "data.validation=held.jsonl",
    )
    lines = refused(*words)
    assert [line.split(": ")[0] for line in lines] == ["t.jsonl:2", "held.jsonl:1:2", "t.jsonl:4", "t.jsonl:3", "held.jsonl:2", "data"]  # fmt: skip
    assert lines[2] == "t.jsonl:4: the chat template refuses the conversation: no sums. Mend the row, or give a data.chat_template"  # fmt: skip
    assert lines[3].endswith("data.max_length is 20. Raise it, or set data.on_long=truncate")
    Path("t.jsonl").write_bytes(jsonl(GOOD, long, *[GOOD] * 20))  # without faults in the text
    Path("held.jsonl").write_bytes(jsonl(*({**row, "source": "c"} for row in (GOOD, long))))
    assert [line.split(": ")[0] for line in refused(*words)] == ["t.jsonl:2", "held.jsonl:2", "data"]


ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
)
REFUSED = "the chat template refuses the conversation: roles must alternate. Mend the row, or give a data.chat_template"


@pytest.fixture
def alternating(place: Path) -> list[str]:
    """The words of a run whose chat template refuses rows 4, 8 and 12 of 20, where row 2 is bad as text."""
    Path("alternating.jinja").write_text(ALTERNATING)
    twice = [
        {"messages": [TALK[0], TALK[0], TALK[1]]},
        {"messages": [TALK[1], TALK[1]]},
        {"messages": TALK * 2 + [TALK[1]]},
    ]
    rows: list[object] = [{"messages": [{**TALK[0], "content": f"a{i}"}, TALK[1]]} for i in range(20)]
    rows[1], rows[3::4] = {"messages": "oops"}, [*twice, *rows[15::4]]
    Path("t.jsonl").write_bytes(jsonl(*rows))
    return ["data=messages", "data.chat_template=alternating.jinja", "data.validation=2"]


@pytest.mark.parametrize("how", ["stop", "skip"])
def test_a_chat_template_that_refuses_all_rows_is_one_fault(refused, how):
    write_pairs(Path("t.jsonl"), 20)
    words = ["""data.chat_template='{{ raise_exception("no") }}'""", f"data.on_bad_row={how}", "data.validation=2"]
    (line,) = refused(*words)
    assert line.startswith("data.chat_template: the chat template refuses all 20 rows: no. Mend it, or ")


def test_rows_that_the_chat_template_refuses_are_skipped_and_counted(alternating, capfd):
    words = [*alternating, "data.on_bad_row=skip", "data.max_bad_rows=0.2", "hydra.run.dir=run"]
    code, _, lines = in_process(capfd, *words_of(*words, "data.max_length=100"))
    assert code == 0, lines
    told = json.loads(Path("run/summary.json").read_text())["data"]
    assert told["num_dropped"] == {"bad row (data.on_bad_row=skip)": 4}
    assert (told["num_rows"], told["num_validation_rows"]) == (14, 2)
    assert "skipped 4 bad rows, the first: t.jsonl:2: " in " ".join(Path("run/kdx.log").read_text().split())


def test_where_only_the_template_refuses_rows_the_log_names_the_first(alternating, capfd):
    lines = Path("t.jsonl").read_bytes().splitlines(keepends=True)
    Path("t.jsonl").write_bytes(b"".join(lines[2:]))
    words = [*alternating, "data.on_bad_row=skip", "data.max_bad_rows=3", "hydra.run.dir=run"]
    assert in_process(capfd, *words_of(*words, "data.max_length=100"))[0] == 0
    assert f"skipped 3 bad rows, the first: t.jsonl:2: {REFUSED}" in " ".join(Path("run/kdx.log").read_text().split())


def test_rows_that_the_chat_template_refuses_count_towards_the_most_that_are_skipped(refused, alternating):
    first, *lines, total = refused(*alternating, "data.on_bad_row=skip", "data.max_bad_rows=3")
    assert first == "data: 4 of 20 rows are bad, and data.max_bad_rows is 3. Mend them, or raise it"
    assert lines[0].startswith("t.jsonl:2: ")
    assert lines[1:] == [f"t.jsonl:{n}: {REFUSED}" for n in (4, 8, 12)]
    assert total == "data: 5 faults. Mend them"


def test_without_skip_all_rows_that_the_chat_template_refuses_are_said(refused, alternating):
    first, *lines, total = refused(*alternating)
    assert first.startswith("t.jsonl:2: ")
    assert lines == [f"t.jsonl:{n}: {REFUSED}" for n in (4, 8, 12)]
    assert total == "data: 4 faults. Mend them, or set data.on_bad_row=skip"
    lines = Path("t.jsonl").read_bytes().splitlines(keepends=True)
    Path("t.jsonl").write_bytes(b"".join(lines[2:]))  # now the template is the only one to refuse
    *lines, total = refused(*alternating)
    assert {*lines} == {f"t.jsonl:{n}: {REFUSED}" for n in (2, 6, 10)}
    assert total == "data: 3 faults. Mend them, or set data.on_bad_row=skip"


def test_rows_of_a_held_out_file_that_the_chat_template_refuses_are_skipped_too(alternating, capfd):
    words = [*alternating[:-1], "data.validation=held.jsonl", "data.on_bad_row=skip", "data.max_bad_rows=4"]
    good = [{"messages": [{**TALK[0], "content": f"b{i}"}, TALK[1]]} for i in range(3)]
    Path("held.jsonl").write_bytes(jsonl(*good, {"messages": [*TALK, TALK[1]]}))
    assert in_process(capfd, *words_of(*words, "data.max_length=100", "hydra.run.dir=run"))[0] == 0
    told = json.loads(Path("run/summary.json").read_text())["data"]
    assert told["num_dropped"] == {"bad row (data.on_bad_row=skip)": 5}
    assert (told["num_rows"], told["num_validation_rows"]) == (16, 3)


def test_the_first_20_of_all_faults_and_how_many(refused):
    Path("t.jsonl").write_bytes(jsonl(*[{"source": "a"}] * 15, *[b"{\n"] * 15))
    lines = refused()
    assert [line.split(": ")[0] for line in lines[:-1]] == [
        *(f"t.jsonl:{n}" for n in range(1, 16)), *(f"t.jsonl:{n}:2" for n in range(16, 21)),
    ]  # fmt: skip
    assert lines[-1] == "data: 30 faults, the first 20 shown. Mend them, or set data.on_bad_row=skip"


# ---- words. (words, exit code, the lines)
PATHS = {
    "data/trian.jsonl": "data.path: data/trian.jsonl does not exist. Did you mean data/t.jsonl?",
    "dta/train.jsonl": "data.path: dta/train.jsonl does not exist. Did you mean data?",
    "zzz/t.jsonl": "data.path: zzz/t.jsonl does not exist. This folder (*) has: data/, notes/, outputs/, student/, t.jsonl, teacher/",
    "t.josnl": "data.path: t.josnl is nothing on disk, and the hub could not give it: *. Did you mean t.jsonl? Check the name, data.subset, data.split and the network",
    "data/*.csv": "data.path: no file matches data/*.csv. data has: t.jsonl",
    "notes": "data.path: the folder notes has no .jsonl, .json, .csv, .parquet file. notes has: a.txt",
    "data/t.jsonl/x.jsonl": "data.path: data/t.jsonl/x.jsonl does not exist. Did you mean data/t.jsonl?",
    "pkg:no-such-package": "3 data.path: the package no-such-package is not installed. Run: pip install no_such_package",
}  # fmt: skip
WORDS: dict[tuple[str, ...], list[str]] = {
    ("data.max_length=3",): ["data: no training row is left (40 no counted token left). Raise data.max_length, or give other data"],
    ("data.max_length=5", "data.on_long=drop"): ["data: no training row is left (40 longer than data.max_length). Raise data.max_length, or give other data"],
    ("data=chitchat", "data.path=pkg:chitchat_dataset", "data.min_turns=10000"): ["data: no row is left *rows: fewer turns than data.min_turns). Loosen the rule, or give other data"],
    ("data.on_long=trunc",): ["data.on_long: is 'trunc'. Did you mean truncate? Allowed: one of truncate, drop, error"],
    ("loss=jds",): ["loss=jds: loss has no option jds. Did you mean jsd? Choices: adaptive_kl, cross_entropy, forward_kl, jsd, reverse_kl, skew_forward_kl, skew_reverse_kl, tvd"],
    ("loss.name=forwad_kl",): ["loss.name: no divergence is named 'forwad_kl'. Did you mean forward_kl? Choices: adaptive_kl, *"],
    ("loss=jsd", "+loss.btea=0.3"): ["loss.btea: is not an option here. Did you mean beta? It takes: beta"],
    ("loss=jsd", "loss.beta=7"): ["loss: beta is 7; it must be between 0 and 1. See conf/loss/jsd.yaml, or the function itself"],
    ("data.path=5",): ["data.path: is 5 (int). Allowed: a file, glob, folder, hub data set, or a list of them"],
    ("teacher.micro_batch_size=2.5",): ["teacher.micro_batch_size: is 2.5 (float). Allowed: auto or a number of rows"],
    ("optim.name=5",): ["optim.name: is '5'. Allowed: torch.CLASS or bitsandbytes.CLASS"],
    ("teacher.store_dir=''",): ["teacher.store_dir: is ''. Allowed: a folder"],
    ("optim.name=torch.SparseAdam",): ["optim.name: torch has no optimizer SparseAdam that trains a student. *"],
    ("optim.name=bitsandbytes.LARS", "~optim.betas"): ["optim: bitsandbytes.LARS: *. See conf/optim/ for its options"],
    ("student.attn_implementation=x",): ["student.attn_implementation: is not supported by student. Use auto, eager or sdpa"],
    ("optim.schedule=polynomial", "+optim.schedule_options.powr=2"): ["optim.schedule_options: polynomial: * unexpected keyword argument 'powr'. Set one with +optim.schedule_options.NAME=..."],
    ("optim.name=torch.SGD",): ["optim.betas: is not an option here. It takes: lr, momentum, *. To leave it out: ~optim.betas"],
    ("optim.name=torch.Muon",): ["optim.name: torch has no optimizer Muon that trains a student. *"],
    ('data.path="~no-such-user/t.jsonl"',): ["data.path: ~no-such-user/t.jsonl names no user of this machine. Give the whole path"],
    ('teacher.store_dir="~no-such-user/store"', "teacher.store=on"): ["teacher.store_dir: ~no-such-user/store names no user of this machine. Give the whole path"],
    ("optim.name=torch.AdmW",): ["optim.name: torch has no optimizer AdmW. Did you mean AdamW? Choices: *"],
    ("optim.lr=0", "loss.temperature=0", "loss.alpha=1.2", "train.batch_size=0", "optim.warmup_steps=-1"): [
        "loss.alpha: is 1.2. Allowed: between 0 and 1",
        "loss.temperature: is 0. Allowed: above 0, at most 1e+06",
        "optim.lr: is 0. Allowed: above 0",
        "optim.warmup_steps: is -1. Allowed: a number of steps, or a share of all steps below 1",
        "train.batch_size: is 0. Allowed: 1 or more",
    ],
    ("train.batch_size=6", "train.micro_batch_size=4", "optim.warmup_steps=5"): [
        "train.batch_size: is 6, not a multiple of train.micro_batch_size=4. Try 4",
        "optim.warmup_steps: is 5, more than train.max_steps=1. Allowed: 0 to 1",
    ],
    ("train.batch_size=eight",): ["train.batch_size: is 'eight' (str), expected a whole number. Allowed: 1 or more"],
    ("data.path=${oc.env:KDX_NOWHERE}",): ["data.path: environment variable KDX_NOWHERE is not set. Set it: export KDX_NOWHERE=..."],
    ("--config-dir=notes", "optim=twice"): ["notes/optim/twice.yaml:2: does not parse: found duplicate key name. Mend the YAML"],
    ("--config-dir=notes", "optim=open"): ["notes/optim/open.yaml:2: does not parse: *. Mend the YAML"],
    ("data.chat_template=no/such.jinja",): ["data.chat_template: no/such.jinja does not exist. Give a file, or Jinja text with {{ }}"],
    ("data.chat_template='{% for m in messages %}{{ m.content'",): ["data.chat_template: it is not Jinja: * (line 1). Give another: data.chat_template=FILE"],
    ("data.chat_template=notes",): ["data.chat_template: notes is not a file. Give a file, or Jinja text with {{ }}"],
    ("optim.betas=[0.9]",): ["optim.betas: is [0.9] (list), expected a list of 2 numbers. For example [0.9, 0.999]"],
    ("--config-dir=notes", "optim=itself"): ["notes/optim/itself.yaml: names itself in its defaults, maybe through others. Take that out"],
    ("--config-dir=notes", "optim=through"): ["notes/optim/back.yaml: names itself in its defaults, maybe through others. Take that out"],
    ("--config-dir=notes", "optim=list"): ["notes/optim/list.yaml: holds no keys. Write one a line: KEY: VALUE"],
    ("--config-dir=notes", "optim=number"): ["notes/optim/number.yaml: holds no keys. Write one a line: KEY: VALUE"],
    ("--config-dir=notes", "optim=mapping"): ["config: Invalid defaults list in 'optim/mapping', defaults must be a list (got mapping). Mend the YAML"],
    ("train.precision=fp16",): ["3 train.precision: fp16 needs a GPU. Use train.precision=bf16 or fp32"],
}  # fmt: skip


def fits(line: str, pattern: str) -> bool:
    """Whether a line is as told; * stands for what is another library's, or long, and (*) for the folder one is in."""
    pattern = pattern.replace("(*)", f"({Path.cwd()})")
    head, *tails = pattern.split(" *")
    return line.startswith(head) and all(tail in line for tail in tails) if tails else line == pattern


@pytest.mark.parametrize(
    ("words", "told"),
    [*WORDS.items(), *((("data.path=" + path,), [told]) for path, told in PATHS.items())],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_words(refused, place, words, told):
    write_pairs(Path("t.jsonl"))
    Path("data").mkdir()
    shutil.copy("t.jsonl", "data/t.jsonl")
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("x")
    if "--config-dir=notes" in words:
        Path("notes/optim").mkdir()
        name = words[-1].removeprefix("optim=")
        text = {"twice": "name: a\nname: b\n", "open": "name: pairs\n  path: [a\n"}
        text |= {"itself": "defaults: [itself]\n", "through": "defaults:\n  - /optim: back\n"}
        text |= {"list": "- 1\n", "number": "3\n", "mapping": "defaults: {a: b}\n"}
        Path(f"notes/optim/{name}.yaml").write_text(text[name])
        Path("notes/optim/back.yaml").write_text("defaults: [through]\n" if name == "through" else "")
    code = 3 if told[0].startswith("3 ") else 2
    lines = refused(*words, "data.validation=2", code=code)
    assert len(lines) == len(told), lines
    for line, wanted in zip(lines, told, strict=True):
        assert fits(line.removeprefix(f"{place}/"), wanted.removeprefix("3 ")), line


def test_a_loss_of_ones_own_in_a_wrong_shape_is_named(refused, monkeypatch):
    def shape(student, teacher):
        return (student - teacher).mean()

    write_pairs(Path("t.jsonl"))
    monkeypatch.setitem(loss._REGISTRY, "shape", shape)
    what = "shape returns shape [] for 2 positions; it must be one number each"
    assert refused("loss.name=shape") == [f"loss: {what}. See {__name__}.shape, the function itself"]
    monkeypatch.setitem(loss._REGISTRY, "shape", lambda student, teacher: 0.0)
    assert "shape returns shape float for 2 positions" in refused("loss.name=shape")[0]
    for value, told in (
        (lambda s, _: s.argmax(-1), "int64 on cpu"),
        (lambda s, _: s.sum(-1) > 0, "bool on cpu"),
        (lambda s, _: s.detach().sum(-1), "float32 on cpu"),
        (lambda s, t: t.sum(-1), "float32 on cpu"),
        (lambda s, _: s.to("meta").sum(-1), "float32 on meta"),
    ):
        monkeypatch.setitem(loss._REGISTRY, "shape", value)
        assert f"shape returns {told} without a gradient by the student" in refused("loss.name=shape")[0]


def test_a_loss_that_ends_the_process_is_an_error(refused, monkeypatch):
    """In the first step: an exit code of 0 would say that all is well."""

    def ends(student, teacher):
        return sys.exit(0) if len(student) > 2 else loss.forward_kl(student, teacher)  # two, when it is tried

    write_pairs(Path("t.jsonl"))
    monkeypatch.setitem(loss._REGISTRY, "ends", ends)
    lines = refused("loss.name=ends", "data.validation=2", "hydra.run.dir=run")
    assert lines == ["KDX_PLUGINS: code of your own ended the process (sys.exit(0)). Raise an error there, or return"]
    assert json.loads(Path("run/status.json").read_text())["state"] == "failed"


def test_annotations_that_name_nothing_are_no_bug(refused, monkeypatch):
    def noted(student, teacher, scale: "Nothing" = 1.0):  # type: ignore[name-defined] # noqa: F821
        return scale * loss.forward_kl(student, teacher)

    monkeypatch.setitem(loss._REGISTRY, "noted", noted)
    assert "loss.sclae: is not an option here. Did you mean scale?" in refused("loss.name=noted", "+loss.sclae=2")[0]


# ---- models
def no_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def adapter(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")


def other_tokenizer(folder: Path) -> None:
    vocab = json.loads((folder / "vocab.json").read_text())
    by_id = sorted(vocab, key=vocab.get)
    first, second = by_id[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "vocab.json").write_text(json.dumps(vocab))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": Path("t.jsonl")}, folder / "pytorch_model.bin")


def no_numbers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


INDEX = "model.safetensors.index.json"
MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "student.path: bad has no weights. bad has: config.json, generation_config.json, merges.txt, *"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "student.path: bad has no config.json. bad has: generation_config.json, *"),
    "no tensor": (no_tensor, "student.path: bad lacks 1 tensors, the first transformer.ln_f.weight. They would be random: use a complete checkpoint"),
    "adapter": (adapter, "student.path: bad is a LoRA adapter, which kdx would ignore. Merge it first: from peft import AutoPeftModelForCausalLM as M; M.from_pretrained('bad').merge_and_unload().save_pretrained('bad-merged')"),
    "other tokenizer": (other_tokenizer, "tokenizer: teacher and student differ at 2 of * ids, the first is 300: *. Choose a teacher and a student with the same tokenizer"),
    "damaged": (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 64), "student.path: the weights in bad are damaged or truncated. Copy them again; from git: git lfs pull"),
    "a damaged config": (lambda folder: (folder / "config.json").write_text("{"), "student.path: bad has a damaged config.json. bad has: *"),
    "a pointer of Git LFS": (lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "student.path: the weights in bad are damaged or truncated. Copy them again; from git: git lfs pull"),
    "cut short": (lambda folder: os.truncate(folder / "model.safetensors", 20_000), "student.path: the weights in bad are damaged or truncated. Copy them again; from git: git lfs pull"),
    "a damaged index": (lambda folder: (folder / INDEX).write_text("{"), "student.path: bad/model.safetensors.index.json is damaged, or names files outside its folder. Copy the model again"),
    "an adapter beside": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "student.path: bad is a LoRA adapter, which kdx would ignore. Merge it first: *"),
    "a pickle": (pickled, "student.path: the weights in bad are a pickle of more than tensors, which could run code. Ask for them as .safetensors"),
    "no numbers": (no_numbers, "student.path: the logits of GPT2LMHeadModel are not finite. Check its weights for NaN and inf"),
    "outside": (lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "../elsewhere/model.safetensors"}}'), "student.path: bad/model.safetensors.index.json is damaged, or names files outside its folder. Copy the model again"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "told"), MODELS.values(), ids=MODELS)
def test_models(refused, place, damage, told):
    write_pairs(Path("t.jsonl"))
    shutil.copytree(place / "student", "bad")
    damage(Path("bad"))
    (line,) = refused("student.path=bad", "data.validation=2")
    assert fits(line, told), line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("teacher.path=teechr", "teacher.path: teechr does not exist. Did you mean teacher?"),
        ("student.path=./nowhere", "student.path: ./nowhere does not exist. This folder (*) has: outputs/, student/, *"),
        ("teacher.path=some-org/nothing", "teacher.path: some-org/nothing is not a folder, and its tokenizer could not be read from the hub: *Check the name and the network, log in for gated models (hf auth login), or give a local folder"),
        ("teacher.path=pkg:os", "teacher.path: pkg:os is a module without a folder, so it carries no files. Name a package that does, or give a folder"),
        ("teacher.path=pkg:winreg", "teacher.path: pkg:winreg is a module without a folder, so it carries no files. Name a package that does, or give a folder"),
        ("teacher.path=pkg:json/none", "teacher.path: *json/none does not exist. *"),
        ("teacher.gguf_file=x.gguf", "teacher.gguf_file: teacher/x.gguf does not exist. teacher has: config.json, *"),
    ],
)  # fmt: skip
def test_model_paths(refused, words, told):
    write_pairs(Path("t.jsonl"))
    (line,) = refused(words)
    assert fits(line, told), line


# ---- the machine
Usage = namedtuple("Usage", "total used free")
MACHINE = {
    ("train.save_every=1",): r"run: the student and its checkpoints need [\d,]+ bytes, and 10 are free. Make room, or choose another disk with hydra.run.dir=...; train.save_every=0 needs no room for checkpoints",
    ("train.save_every=0",): r"run: the student and its checkpoints need [\d,]+ bytes, and 10 are free. Make room, or choose another disk with hydra.run.dir=...",
    ("teacher.store=on", "teacher.store_dir=store"): r"teacher.store: needs [\d,]+ bytes in \S*store\S*, where 10 are free, a tenth of the disk to be left. Make room, set teacher.store_dir=..., or teacher.store=off",
}  # fmt: skip


@pytest.mark.parametrize(("words", "told"), MACHINE.items(), ids=lambda value: value[0] if len(value) < 3 else "")
def test_disks_that_are_too_small(refused, monkeypatch, words, told):
    write_pairs(Path("t.jsonl"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 990, 10))
    (line,) = refused(*words, "data.validation=2", "hydra.run.dir=run", code=3)
    assert re.fullmatch(told, line.removeprefix(f"{Path().resolve()}/")), line
    assert not list(Path("run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("words", "package", "told"),
    [
        (("optim=adamw_8bit",), "bitsandbytes.optim", "optim.name: bitsandbytes is not installed. Run: pip install bitsandbytes"),
        (("teacher.quantization=8bit",), "bitsandbytes", "teacher.path: teacher needs a package: *bitsandbytes *Install it"),
    ],
)  # fmt: skip
def test_packages_that_are_not_installed(refused, monkeypatch, words, package, told):
    write_pairs(Path("t.jsonl"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    monkeypatch.setitem(sys.modules, package, None)
    (line,) = refused(*words, "data.validation=2", code=3)
    assert fits(line, told), line


def test_a_file_that_may_not_be_read(refused, monkeypatch):
    def read_bytes(file: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(file))

    Path("t.jsonl").write_bytes(LINE)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert refused(code=3) == ["t.jsonl: cannot be read: Permission denied. Check its permissions"]


# ---- processes of their own
@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ((), 2, "t.jsonl:2:12: is not JSON (Expecting value). Mend the line: one JSON object a line"),
        (("teacher.path=nowhere",), 2, "teacher.path: nowhere does not exist. This folder (*) has: outputs/, student/, t.jsonl, teacher/. On the hub it is OWNER/nowhere"),
        (("data.chat_template='{{ 9 ** (9 ** 9) }}'",), 2, "data.chat_template: it takes more than 2 s for one short row. Give another: data.chat_template=FILE"),
        (("optim.lr=-1", "loss.alpha=${oc.env:KDX_NOWHERE}"), 2, "loss.alpha: environment variable KDX_NOWHERE is not set. Set it: export KDX_NOWHERE=...\nkdx: error: optim.lr: is -1. Allowed: above 0"),
    ],
)  # fmt: skip
def test_processes(place, words, code, told):
    Path("t.jsonl").write_bytes(LINE + b'{"source": x}\n' + LINE)
    command = [sys.executable, "-m", "kdx", *words_of("data.max_length=100", *words)]
    done = subprocess.run(command, cwd=place, env=environment(), capture_output=True, text=True, check=False)
    told = told.replace("(*)", f"({place})")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"kdx: error: {told}\n")
