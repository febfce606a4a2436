"""What may differ when a run goes on, and which folder of a sweep's job is its last."""

import copy
from dataclasses import asdict

import pytest

from kdx.cli import compose
from kdx.run.identity import drift, only_longer
from kdx.stale import newest


def config(**keys):
    tree = {"loss": {"alpha": 0.7, "temperature": 2.0}, "teacher": {"micro_batch_size": None, "store": "auto"}}
    tree["train"] = {"max_steps": 9, "on_nonfinite": "stop", "max_nonfinite": 10, "log_every": 10, "eval_every": 2}
    tree["train"] |= {"keep": "last", "early_stopping": {"patience": None}}
    for key, value in keys.items():
        group, name = key.split("__")
        tree[group][name] = value
    return tree


BEST, PATIENT = {"train__keep": "best"}, {"train__early_stopping": {"patience": 2}}


@pytest.mark.parametrize(
    ("was", "now", "found"),
    [
        ({}, {"train__log_every": 1, "teacher__store": "on"}, []),
        ({}, {"teacher__micro_batch_size": 4}, ["teacher.micro_batch_size"]),  # other bits
        ({}, {"loss__temperature": 1.0}, ["loss.temperature"]),
        ({"loss__alpha": 0}, {"loss__alpha": 0, "loss__temperature": 1.0}, []),  # without a teacher it is not used
        ({"loss__alpha": 0}, {"loss__temperature": 1.0}, ["loss.alpha", "loss.temperature"]),
        ({}, {"train__eval_every": 5}, []),
        ({}, {"train__eval_every": 5, "train__keep": "best"}, ["train.eval_every", "train.keep"]),
        (BEST, BEST | {"train__eval_every": 5}, ["train.eval_every"]),
        (PATIENT, PATIENT | {"train__eval_every": 5}, ["train.eval_every"]),
        ({}, {"train__on_nonfinite": "skip", "train__max_nonfinite": 20}, []),
        ({"train__on_nonfinite": "skip"}, {"train__max_nonfinite": 5}, ["train.on_nonfinite", "train.max_nonfinite"]),
    ],
)
def test_what_matters(was, now, found):
    assert [key for key, _, _ in drift(config(**was), config(**now))] == found


@pytest.mark.parametrize("key", ["train.max_steps", "train.max_nonfinite"])
def test_a_damaged_number_is_another(key):
    group, name = key.split(".")
    found = drift(config(**{f"{group}__{name}": "1p"}), config())
    assert [key for key, _, _ in found] == [key]
    assert not only_longer(found, {"optim": {"schedule": "constant", "warmup_steps": None}})


def test_a_damaged_loss_is_another():
    assert "loss" in [key for key, _, _ in drift(config() | {"loss": 3}, config())]


def test_only_the_folders_of_a_sweeps_jobs_take_each_others_place(tmp_path):
    for name in (
        "lr",
        "lr-2",
        "20261124-1",
        "20261124-2",
        "alpha-0.3_1a2b3c",
        "alpha-0.3_1a2b3c-2",
        "1a2b3c",
        "1a2b3c-2",
    ):
        (tmp_path / name).mkdir()
    for name in ("lr", "20261124-1"):
        assert newest(tmp_path / name).name == name
    for name in ("alpha-0.3_1a2b3c", "1a2b3c"):
        assert newest(tmp_path / name).name == newest(tmp_path / f"{name}-2").name == f"{name}-2"


KEPT_FREE = {
    "train.log_every", "train.save_every", "train.keep_checkpoints", "train.eval_every",  # of a run that keeps the last
    "teacher.store", "teacher.store_dir", "teacher.store_limit_gb",
}  # fmt: skip


def leaves(tree, prefix=""):
    for name, value in tree.items():
        yield from leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [f"{prefix}{name}"]


def test_every_key_but_a_short_list_matters():
    was = asdict(compose([]))
    free = set()
    for key in leaves({group: was[group] for group in was if group not in ("run", "sweep", "tracking")}):
        now = copy.deepcopy(was)
        *groups, name = key.split(".")
        node = now
        for group in groups:
            node = node[group]
        node[name] = "another"
        if not drift(was, now):
            free.add(key)
    assert free == KEPT_FREE


@pytest.mark.parametrize(
    ("schedule", "warmup", "may"),
    [
        ("constant", 0, True),
        ("constant_with_warmup", 5, True),
        ("constant_with_warmup", 0.1, False),
        ("cosine", 0, False),
    ],
)
def test_what_may_be_longer(schedule, warmup, may):
    now = {"optim": {"schedule": schedule, "warmup_steps": warmup}}
    assert only_longer([("train.max_steps", 5, 8)], now) == may
    assert not only_longer([("train.max_steps", 8, 5)], now)
    assert not only_longer([("train.max_steps", 5, 8), ("optim.lr", 1, 2)], now)
