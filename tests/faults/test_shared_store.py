"""Many processes that share a store, some of them killed: no row is wrong, and none is waited for."""

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ended, started
from safetensors.torch import load_file, save_file
from standins import write_llama
from transformers import AutoModelForCausalLM

from kdx.data.batches import MicroBatch, Row, collate
from kdx.segments import survey
from kdx.store import Identity, TeacherStore
from kdx.teacher import Teacher

WHO = Identity("weights", "tokenizer", "bf16", "none")
WRONG = 77  # the exit code of a process that was told something wrong


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama") / "teacher", layers=4, width=128)


def test_four_share_a_store_and_one_is_killed(
    teacher: Path, tmp_path: Path, full: bool, figure: Callable[[str], None]
) -> None:
    """Each asks for the same batches in an order of its own, and compares what it is told with the live teacher."""
    live, batches = Teacher(partial(load, teacher), "bf16", WHO), batches_to_share(60 if full else 24)
    reference = [live.live(batch) for batch in batches]
    save_file({str(i): hidden for i, hidden in enumerate(reference)}, tmp_path / "reference.safetensors")
    per_row = {
        digest: part
        for batch, hidden in zip(batches, reference, strict=True)
        for digest, part in zip(batch.row_digests, hidden.split(batch.num_counted), strict=True)
    }
    seconds = 0.0
    for alone in ("first", "second"):  # with the first comes what they are forked from
        began = time.monotonic()
        assert ended(started(share, teacher, tmp_path / alone, 0)) == 0
        seconds = time.monotonic() - began
    num_rounds = 50 if full else 2
    wrong = stuck = killed = checked = 0
    for round_ in range(num_rounds):
        chance = random.Random(round_)
        root = tmp_path / str(round_)
        for shift in (0, 4):  # the second four find what the first four left
            processes = [started(share, teacher, root, number) for number in range(shift, shift + 4)]
            time.sleep(chance.uniform(0, seconds / 2))
            chance.choice(processes).kill()
            codes = [ended(process) for process in processes]
            stuck += codes.count(None)
            killed += codes.count(-signal.SIGKILL)
            wrong += codes.count(WRONG)
            assert {*codes} <= {0, WRONG, None, -signal.SIGKILL}
        reader = TeacherStore(root, WHO, name="teacher", owner="reader")
        for digest, part in per_row.items():
            found = reader.peek([digest])
            wrong += found is None or not torch.equal(found[0], part)
            checked += 1
        assert reader.rows.num_bad == 0 and survey(reader.folder / "rows").num_bad == 0
        assert reader.kept() is not None and reader.answer("prompt") == "answer"
        reader.close()
    figure(
        f"a shared store: {num_rounds} rounds of twice 4 processes, {killed} killed: {wrong} wrong of {checked} rows, "
        f"{stuck} stuck"
    )
    assert (wrong, stuck) == (0, 0) and killed > 0


def load(teacher: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16)


def batches_to_share(number: int) -> list[MicroBatch]:
    draw = random.Random(0).randrange
    lengths = [[draw(5, 40) for _ in range(4)] for _ in range(number)]
    rows = [
        [Row(str(n), [draw(3, 250) for _ in range(n)], [t >= n // 3 for t in range(n)]) for n in four]
        for four in lengths
    ]
    return [collate(four, 0) for four in rows]


def share(teacher: Path, root: Path, number: int) -> None:
    """Ask for every batch twice."""
    torch.set_num_threads(1)
    reference = load_file(root.parent / "reference.safetensors")
    batches = batches_to_share(len(reference))
    store = TeacherStore(root, WHO, name="teacher", owner=f"run{number}")
    asked = Teacher(partial(load, teacher), "bf16", WHO, store=store)
    order = list(range(len(batches)))
    random.Random(number).shuffle(order)
    for i in order * 2:
        if not torch.equal(asked.hidden(batches[i]), reference[str(i)]):
            os._exit(WRONG)
    store.keep_answer("prompt", "answer")
    store.close()
