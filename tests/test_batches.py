"""Labels, batches and their order."""

import json
import random
from dataclasses import replace

import plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdx.data.batches import Batches, Row, Rows, by_length, collate, epoch_batches, write_rows


def make_rows(count, seed=0, longest=40):
    """Rows of random length and mask; their tokens tell them apart."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        length = rng.randint(2, longest)
        counted = [rng.random() < 0.6 for _ in range(length - 1)] + [True]
        rows.append(Row(f"r{i}", [rng.randrange(1000) for _ in range(length)], counted))
    return rows


@pytest.mark.parametrize("sizes", [[], [2], [2, 7, 3], [5, 5]])
def test_collate_shifts_labels_once_and_pads_on_the_right(sizes):
    rows = [Row(str(n), list(range(10, 10 + n)), [i % 3 != 1 for i in range(n)]) for n in sizes]
    batch = collate(rows, pad_id=99)
    length = max(sizes, default=1)
    assert batch.input_ids.shape == batch.attention_mask.shape == (len(sizes), length)
    expected = []
    for i, row in enumerate(rows):
        n = len(row.tokens)
        assert batch.input_ids[i].tolist() == row.tokens + [99] * (length - n)
        assert batch.attention_mask[i].tolist() == [1] * n + [0] * (length - n)
        expected += [(i * length + t - 1, row.tokens[t], i) for t in range(1, n) if row.counted[t]]
    found = zip(batch.positions.tolist(), batch.counted_labels.tolist(), batch.row_of.tolist(), strict=True)
    assert list(found) == expected
    assert batch.row_ids == tuple(row.id for row in rows)
    assert batch.positions.dtype == batch.counted_labels.dtype == torch.long
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.positions, batch.positions)
    assert moved.row_ids == batch.row_ids


@given(st.lists(st.integers(2, 200), min_size=1, max_size=400), st.integers(1, 9), st.integers(0, 3), st.booleans())
@settings(max_examples=50, deadline=None)
def test_an_epoch_has_every_row_once(lengths, batch_size, epoch, shuffle):
    batches = epoch_batches(lengths, batch_size, seed=1, epoch=epoch, shuffle=shuffle)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size
    if not shuffle:
        assert [i for batch in batches for i in batch] == list(range(len(lengths)))


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = [len(row.tokens) for row in make_rows(100)]

    def order(seed, epoch):
        return epoch_batches(lengths, 8, seed=seed, epoch=epoch, shuffle=True)

    random.seed(5)
    first = order(0, 0)
    random.seed(6)
    assert order(0, 0) == first
    different = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert len({json.dumps(batches) for batches in different}) == 4
    assert len({json.dumps(sorted(map(sorted, batches))) for batches in different}) == 4


def padding_of(lengths, batches):
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths) / padded


def test_rows_of_like_length_stand_together_and_long_ones_do_not_come_first():
    lengths = [len(row.tokens) for row in make_rows(2000, longest=200)]
    batches = epoch_batches(lengths, 8, seed=0, epoch=0, shuffle=True)
    unsorted = epoch_batches(lengths, 8, seed=0, epoch=0, shuffle=False)
    assert padding_of(lengths, batches) < 0.08
    assert padding_of(lengths, unsorted) > 0.3
    means = [sum(lengths[i] for i in batch) / 8 for batch in batches]
    halves = sum(means[:125]) / 125, sum(means[125:]) / 125
    assert abs(halves[0] - halves[1]) < 10
    assert means[:16] not in (sorted(means[:16]), sorted(means[:16], reverse=True))


def step_batches(rows, **changes):
    options = {"batch_size": 8, "micro_batch_size": 4, "seed": 3, "shuffle": True, "pad_id": 0} | changes
    return Batches(plain.Rows(rows), **options)


def steps(batches, first, last):
    """The batches of these steps, without the None that ends them."""
    *found, end = batches.steps(first, last)
    assert end is None
    return found


def plain_rows(batch):
    """Each row of a step as its text and labels, without padding or order."""
    found = []
    for micro in batch.micro_batches:
        for i, name in enumerate(micro.row_ids):
            tokens = micro.input_ids[i][micro.attention_mask[i] == 1].tolist()
            found.append((name, tokens, micro.counted_labels[micro.row_of == i].tolist()))
    return sorted(found)


@pytest.mark.parametrize("shuffle", [True, False])
def test_any_step_can_be_reached_directly(shuffle):
    batches = step_batches(make_rows(29), shuffle=shuffle)
    assert batches.steps_per_epoch == 4
    straight = steps(batches, 0, 11)
    assert [batch.epoch for batch in straight] == [(step + 1) / 4 for step in range(11)]
    for first in range(12):
        direct = steps(step_batches(make_rows(29), shuffle=shuffle), first, 11)
        assert len(direct) == 11 - first
        for one, other in zip(direct, straight[first:], strict=True):
            assert one.epoch == other.epoch
            for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
                assert a.row_ids == b.row_ids
                assert torch.equal(a.input_ids, b.input_ids)
                assert torch.equal(a.positions, b.positions)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_micro_batches_of_so_many_tokens_hold_the_same_rows(processes):
    rows = make_rows(21)
    whole = steps(step_batches(rows, micro_batch_size=8), 0, 3)
    options = {"micro_batch_tokens": 24, "num_processes": processes}
    shares = [steps(step_batches(rows, rank=rank, **options), 0, 3) for rank in range(processes)]
    for step, everything in enumerate(whole):
        mine = [share[step] for share in shares]
        assert sorted(row for share in mine for row in plain_rows(share) if row[0]) == plain_rows(everything)
        assert len({len(share.micro_batches) for share in mine}) == 1
        for batch in (batch for share in mine for batch in share.micro_batches):
            assert batch.input_ids.numel() <= 24 or len(batch.row_ids) == 1


@pytest.mark.parametrize(("processes", "micro"), [(1, 8), (1, 3), (2, 4), (2, 2), (4, 2), (4, 1), (8, 1)])
def test_processes_share_the_rows_of_a_step(processes, micro):
    rows = make_rows(21)  # the last batch has 5 rows: some of 8 processes go without
    whole = steps(step_batches(rows, micro_batch_size=8), 0, 6)
    shares = [
        steps(step_batches(rows, micro_batch_size=micro, rank=rank, num_processes=processes), 0, 6)
        for rank in range(processes)
    ]
    for step, everything in enumerate(whole):
        mine = [share[step] for share in shares]
        together = sorted(row for share in mine for row in plain_rows(share) if row[0])
        assert together == plain_rows(everything)
        assert len({len(share.micro_batches) for share in mine}) == 1
        assert {share.num_tokens for share in mine} == {sum(len(labels) for _, _, labels in together)}
        assert {share.num_input_tokens for share in mine} == {sum(len(tokens) for _, tokens, _ in together)}
        for share in mine:
            assert all(1 <= len(batch.row_ids) <= micro for batch in share.micro_batches)
            # a process without rows still runs its micro-batches, and adds nothing
            empty = [batch for batch in share.micro_batches if batch.row_ids == ("",)]
            assert all(len(batch.positions) == 0 for batch in empty)
    last = [share[2] for share in shares]
    assert sum(len([r for r in plain_rows(share) if r[0]]) for share in last) == 5


def test_by_length_has_every_row_once_longest_first():
    rows = plain.Rows(make_rows(23))
    batches = by_length(rows.lengths, 4)
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(23))
    lengths = [len(rows[i].tokens) for i in order]
    assert lengths == sorted(lengths, reverse=True)


def test_rows_in_files_are_the_rows_that_were_written(tmp_path):
    """And their fingerprint depends on ids, tokens, what counts and order."""
    rows = [Row("a", [1, 2, 3], [False, True, True], "f:1"), Row("b", [4, 5], [False, True], "f:2")]
    one, two = rows
    digest = write_rows(tmp_path / "rows", rows)
    kept = Rows(tmp_path / "rows")
    assert list(kept) == rows
    assert kept.lengths.tolist() == [3, 2] and kept.num_counted.tolist() == [2, 1]
    assert kept.digests == [row.digest for row in rows]
    assert [row.where for row in collate(list(kept), 0).rows] == ["f:1", "f:2"]
    others = [
        [two, one],
        [one],
        [Row("c", one.tokens, one.counted), two],
        [Row("a", [1, 2, 4], one.counted), two],
        [Row("a", one.tokens, [False, False, True]), two],
    ]
    assert len({digest, *(write_rows(tmp_path / "other", other) for other in others)}) == 6
    write_rows(tmp_path / "none", [])
    assert len(Rows(tmp_path / "none")) == 0


def test_the_rows_that_some_steps_read():
    batches = step_batches(make_rows(23), batch_size=4)
    for last in (0, 1, 5, 6, 7, 18):
        seen = {name for step in steps(batches, 0, last) for micro in step.micro_batches for name in micro.row_ids}
        assert {batches.rows[i].id for i in batches.rows_seen(last)} == seen


def test_which_rows_come_before_the_end_of_a_window_does_not_depend_on_lengths():
    rows = make_rows(100)
    one, other = (
        step_batches(rows, batch_size=2),
        step_batches([replace(r, tokens=r.tokens[:2], counted=r.counted[:2]) for r in rows], batch_size=2),
    )
    assert [one.end_of_window(step) for step in (0, 1, 16, 17, 49, 50, 51)] == [0, 16, 16, 32, 50, 50, 66]
    for step in (16, 32, 50):
        assert set(one.rows_seen(step)) == set(other.rows_seen(step))
    assert one.rows_seen(16) != other.rows_seen(16)
