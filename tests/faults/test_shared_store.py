"""Many processes that share a store, some of them killed: no row is wrong, and none is waited for."""

import os
import random
import signal
import time
from functools import partial

import pytest
import torch
from processes import ended, started
from safetensors.torch import load_file, save_file
from standins import write_llama
from transformers import AutoModelForCausalLM

from kdx import store as store_module
from kdx.data.batches import Row, collate
from kdx.store import Identity, TeacherStore, damaged_files, load_head
from kdx.teacher import Teacher

WHO = Identity("teacher", "bf16", "none")
WRONG = 77  # the exit code of a process that was given a wrong row


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama") / "teacher", layers=4, width=128)


def test_some_share_a_store_and_one_is_killed(teacher, tmp_path, full, figure):
    """Each asks for the same batches in an order of its own, and compares the answers with the live teacher's."""
    live, batches = Teacher(partial(load, teacher), WHO), batches_to_share(60 if full else 24)
    reference = [live.live(batch) for batch in batches]
    save_file({str(i): hidden for i, hidden in enumerate(reference)}, tmp_path / "reference.safetensors")
    num_rounds, num_at_once = (100, 4) if full else (2, 2)
    wrong = stuck = killed = checked = 0
    for round_ in range(num_rounds):
        chance, root = random.Random(round_), tmp_path / str(round_)
        processes = [started(share, teacher, root, number) for number in range(num_at_once)]
        num_shards, until = chance.randrange(1, 5), time.monotonic() + 100
        while len(list(root.glob("*/rows/*"))) < num_shards and time.monotonic() < until:
            time.sleep(0.01)
        chance.choice(processes).kill()
        codes = [ended(process) for process in processes]
        stuck += codes.count(None)
        killed += codes.count(-signal.SIGKILL)
        wrong += codes.count(WRONG)
        assert {*codes} <= {0, WRONG, None, -signal.SIGKILL}
        reader = TeacherStore(root, WHO, name="teacher")
        for batch, hidden in zip(batches, reference, strict=True):
            rows = reader.read(batch.row_digests)
            wrong += rows is None or not torch.equal(torch.cat(rows), hidden)
            checked += len(batch.row_digests)
        assert damaged_files(reader.folder) == []
        assert load_head(reader.folder) is not None
    figure(f"a shared store: {num_rounds} × {num_at_once} processes, {killed} killed: {wrong} of {checked} rows wrong")
    assert (wrong, stuck) == (0, 0) and killed > 0


def load(teacher):
    return AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16)


def batches_to_share(number):
    draw = random.Random(0).randrange
    lengths = [[draw(5, 40) for _ in range(4)] for _ in range(number)]
    rows = [
        [Row(str(n), [draw(3, 250) for _ in range(n)], [t >= n // 3 for t in range(n)]) for n in four]
        for four in lengths
    ]
    return [collate(four, 0) for four in rows]


def share(teacher, root, number):
    """Ask for every batch twice, with a shard for every few of them."""
    torch.set_num_threads(1)
    store_module.SHARD_BYTES = 50_000
    reference = load_file(root.parent / "reference.safetensors")
    batches = batches_to_share(len(reference))
    store = TeacherStore(root, WHO, name="teacher")
    asked = Teacher(partial(load, teacher), WHO, store=store)
    order = list(range(len(batches)))
    random.Random(number).shuffle(order)
    for i in order * 2:
        if not torch.equal(asked.answer(batches[i]).hidden, reference[str(i)]):
            os._exit(WRONG)
    store.close()
