"""Values against the shape of a run: types, ranges, contradictions, and other tools' words."""

import copy
import dataclasses
from typing import Any

import pytest

from kdx.cli import compose
from kdx.compose import Composer
from kdx.folders import Source
from kdx.resolve import as_tree
from kdx.validation import ALIASES, binding_problems, contradictions, has_type, nearest_key, problems, type_words


@pytest.fixture(scope="module")
def default() -> dict[str, Any]:
    return dataclasses.asdict(compose())


@pytest.fixture
def tree(default):
    return copy.deepcopy(default)


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree[parent]
    tree[last] = value


@pytest.mark.parametrize(
    ("value", "wanted", "fits"),
    [
        (1, float, True),
        (1.5, int, False),
        (True, int, False),
        (True, float, False),
        (1, bool, False),
        (7, str, True),  # numbers typed for text keys
        (True, str, False),
        (None, str, False),
        (None, str | None, True),
        ([1, 2], list[int], True),
        ([1, "a"], list[int], False),
        ("a", list[str], False),
        ({}, dict[str, Any], True),
        (object(), Any, True),
    ],
)
def test_types(value, wanted, fits):
    assert has_type(value, wanted) is fits


def test_types_are_said_as_a_person_would():
    assert type_words(int | None) == "a whole number or null"
    assert type_words(list[str]) == "a list"


def test_the_default_run_has_no_problem(tree):
    assert problems(tree) == []
    assert contradictions(tree) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss.alpha", -0.1),
        ("loss.alpha", 1.1),
        ("loss.temperature", 0),
        ("loss.temperature", 1e308),
        ("train.epochs", 0),
        ("train.epochs", 1e308),
        ("train.max_grad_norm", 0),
        ("train.log_every", 0),
        ("train.eval_every", -1),
        ("train.save_every", -1),
        ("teacher.store_limit_gb", 0),
        ("loss.temperature", float("nan")),
        ("optim.lr", 0),
        ("optim.lr", float("inf")),
        ("optim.lr", "fast"),
        ("optim.name", "os.system"),
        ("optim.warmup_steps", 1.5),
        ("optim.warmup_steps", None),
        ("optim.weight_decay", -1),
        ("train.batch_size", 0),
        ("train.batch_size", 8.0),
        ("train.batch_size", True),
        ("train.max_steps", -1),
        ("train.micro_batch_size", "some"),
        ("train.micro_batch_size", 0),
        ("train.precision", "bfloat16"),
        ("train.keep", "first"),
        ("train.early_stopping.patience", 0),
        ("train.early_stopping", 3),
        ("student.layers", 0),
        ("student.layers", []),
        ("student.layers", [0, -1]),
        ("student.layers", True),
        ("data.path", []),
        ("data.path", ""),
        ("data.path", "???"),
        ("data.validation", 1.5),
        ("data.validation", 0),
        ("data.max_length", 1),
        ("data.take", 0),
        ("data.max_bad_rows", 1.5),
        ("data.max_bad_rows", -1),
        ("train.on_nonfinite", "ignore"),
        ("train.max_nonfinite", 0),
        ("sweep.name", "../x"),
        ("sweep.name", "a b"),
        ("teacher.device_map", "cuda:0"),
        ("tracking.tags", "a"),
        ("train", 5),
        ("train.typo", 5),
        ("typo", 5),
    ],
)
def test_a_wrong_value_is_one_problem_that_names_its_key(tree, key, value):
    put(tree, key, value)
    (found,) = problems(tree)
    assert found.key == key
    assert found.what
    assert found.mend


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.validation", None),
        ("data.validation", 0.1),
        ("data.validation", "held_out.jsonl"),
        ("data.path", ["a.jsonl", "b.jsonl"]),
        ("student.layers", [0, 3, 29]),
        ("optim.warmup_steps", 0.5),
        ("train.max_steps", 0),
        ("tracking.name", 12),
        ("train.max_grad_norm", None),
    ],
)
def test_values_at_their_range_are_fine(tree, key, value):
    put(tree, key, value)
    assert problems(tree) == []
    assert contradictions(tree) == []


def test_all_problems_are_found_at_once(tree):
    for key in ("loss.alpha", "optim.lr", "train.batch_size"):
        put(tree, key, -1)
    del tree["data"]["seed"]
    assert {p.key for p in problems(tree)} == {"loss.alpha", "optim.lr", "train.batch_size", "data.seed"}


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"teacher.trust_remote_code": True}, "teacher.trust_remote_code"),
        ({"teacher.trust_remote_code": True, "teacher.revision": "main"}, "teacher.trust_remote_code"),
        ({"teacher.path": None, "student.init": "pretrained", "student.path": "x"}, "loss.alpha"),
        ({"student.init": "pretrained"}, "student.path"),
        ({"student.layers": None}, "student.layers"),
        ({"loss.name": "cross_entropy"}, "loss.alpha"),
        ({"train.epochs": 1}, "train.max_steps and train.epochs"),
        ({"train.max_steps": None}, "train.max_steps and train.epochs"),
        ({"train.batch_size": 8, "train.micro_batch_size": 3}, "train.batch_size"),
        ({"train.max_steps": 9, "optim.warmup_steps": 10}, "optim.warmup_steps"),
        ({"train.keep": "best"}, "train.keep=best"),
        ({"train.early_stopping.patience": 2}, "train.early_stopping.patience"),
    ],
)
def test_contradictions_name_their_key(tree, values, key):
    for name, value in values.items():
        put(tree, name, value)
    assert problems(tree) == []
    assert [p.key for p in contradictions(tree)] == [key]


def test_a_pinned_commit_may_run_its_own_code(tree):
    put(tree, "teacher.trust_remote_code", True)
    put(tree, "teacher.revision", "0123456789abcdef" * 2 + "01234567")
    assert contradictions(tree) == []


def test_the_nearest_key():
    known = ["loss.alpha", "loss.temperature", "optim.lr", "train.seed", "data.seed", "train.batch_size"]
    assert nearest_key("learning_rate", known) == "Did you mean optim.lr?"
    assert nearest_key("train.learning_rate", known) == "Did you mean optim.lr?"
    assert nearest_key("loss.distillation_weight", known) == "Did you mean loss.alpha?"
    assert nearest_key("tain.seed", known) == "Did you mean train.seed?"
    assert nearest_key("temprature", known) == "Did you mean loss.temperature?"
    assert nearest_key("nothing.like.it", known) == "See `python -m kdx --cfg job` for all keys"


def test_what_other_tools_words_point_to_is_there():
    """Every alias that names a key or an option leads to one that composes."""
    composer = Composer(Source())
    known = as_tree(composer._base([]))
    for meant in ALIASES.values():
        word = meant.split()[0].rstrip(",")
        key, _, value = word.partition("=")
        if key in composer.groups:
            assert value in composer.groups[key], meant
        elif "." in key and key not in ("loss.beta", "+optim.eps"):  # options of some choices alone
            group, name = key.split(".")
            assert name in known[group], meant


def source(path: str, min_turns: int = 2) -> None: ...


def test_binding_names_what_a_function_takes():
    assert binding_problems(source, {"path": "x", "min_turns": 3}, "data.", 0) == []
    (unknown,) = binding_problems(source, {"path": "x", "min_turn": 3}, "data.", 0)
    assert (unknown.key, unknown.mend) == ("data.min_turn", "Did you mean min_turns? It takes: path, min_turns")
    (wrong,) = binding_problems(source, {"path": "x", "min_turns": "few"}, "data.", 0)
    assert (wrong.key, wrong.what) == ("data.min_turns", "is 'few' (str), expected a whole number")
    (missing,) = binding_problems(source, {}, "data.", 0)
    assert missing.key == "data.path"
    (unset,) = binding_problems(source, {"path": "???"}, "data.", 0)
    assert unset.what == "is missing"
