"""The points of a sweep: what they are, and names that are the same on any day and fit for a path."""

import re

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from kdx import sweep
from kdx.cli import compose
from kdx.compose import Composer, Point, preflight
from kdx.config import SAFE_NAME, Config
from kdx.folders import Source

PARSER = OverridesParser.create()


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer(Source())


def parsed(*words: str) -> list[Override]:
    return PARSER.parse_overrides(list(words))


def config(composer: Composer, *words: str) -> Config:
    point: Point = composer.point(composer.parsed(list(words)))
    assert point.faults == []
    return point.config()


def name(composer: Composer, keys: list[str], *words: str) -> str:
    return sweep.job_name(keys, config(composer, *words))


def test_points_are_every_combination_in_the_order_typed():
    words = parsed("train.max_steps=5", "loss.temperature=1,2", "loss.alpha=0.3,0.7")
    assert sweep.points(words) == [
        ["train.max_steps=5", f"loss.temperature={t}", f"loss.alpha={a}"] for t in (1, 2) for a in (0.3, 0.7)
    ]
    assert sweep.swept_keys(words) == ["loss.temperature", "loss.alpha"]


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("loss.temperature=1,2,4", ["1", "2", "4"]),
        ("loss.temperature=choice(1,2)", ["1", "2"]),
        ("train.seed=range(0,3)", ["0", "1", "2"]),
        ("loss=forward_kl,jsd", ["forward_kl", "jsd"]),
        ("+loss.beta=0.1,0.2", ["0.1", "0.2"]),
        ("data.path=[a,b],[c]", ["[a,b]", "[c]"]),
        ("loss.alpha=interval(0,1)", ["0.0", "1.0"]),  # of an interval, its ends are checked
    ],
)
def test_every_way_to_write_values(word, values):
    key = word.split("=")[0]
    assert sweep.points(parsed(word)) == [[f"{key}={value}"] for value in values]


def test_a_list_is_one_value_and_of_a_key_typed_twice_the_last_counts():
    assert sweep.swept_keys(parsed("data.path=[a,b]")) == []
    assert sweep.points(parsed("train.seed=1,2", "train.seed=3")) == [["train.seed=3"]]
    assert sweep.swept_keys(parsed("train.seed=1,2", "train.seed=3")) == []


def test_a_name_tells_the_point(composer):
    keys = ["loss.temperature", "loss.alpha"]
    made = name(composer, keys, "loss.temperature=2", "loss.alpha=0.7")
    assert re.fullmatch(r"temperature-2_alpha-0\.7_[0-9a-f]{6}", made)


def test_one_and_one_point_nought_are_one_point(composer):
    keys = ["loss.temperature"]
    assert name(composer, keys, "loss.temperature=1") == name(composer, keys, "loss.temperature=1.0")
    jsd = ["loss=jsd", "train.max_steps=5"]
    assert name(composer, ["loss.beta"], *jsd, "loss.beta=1") == name(composer, ["loss.beta"], *jsd, "loss.beta=1.0")


def test_what_cannot_change_the_student_is_not_in_a_name(composer):
    keys = ["loss.temperature"]
    free = ["tracking.mode=disabled", "train.log_every=3", "train.save_every=7", "sweep.name=x"]
    free += ["teacher.store=on", "teacher.store_dir=x", "train.keep_checkpoints=true"]
    assert name(composer, keys) == name(composer, keys, *free)
    other = ["train.seed=1", "data.take=9", "optim.lr=1", "student.layers=3", "+optim.eps=1e-6", "train.precision=bf16"]
    other += ["teacher.precision=fp32", "teacher.micro_batch_size=4", "train.eval_every=3"]
    for word in other:
        assert name(composer, keys) != name(composer, keys, word), word


def test_alpha_nought_is_cross_entropy_whatever_the_rest_of_loss_says(composer):
    plain = sweep.identity(config(composer, "loss=cross_entropy"))
    assert sweep.identity(config(composer, "loss=jsd", "loss.alpha=0", "loss.temperature=4")) == plain
    keys = ["loss.temperature", "loss.alpha"]
    one = name(composer, keys, "loss.temperature=1", "loss.alpha=0")
    assert name(composer, keys, "loss.temperature=4", "loss.alpha=0") == one
    assert one.startswith("alpha-0_")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["loss"], ["loss=jsd"]),
        (["loss.beta"], ["loss=jsd", "loss.beta=0.25"]),
        (["teacher", "student"], ["teacher=dialogpt_medium", "student=dialogpt_small"]),
        (["student"], ["student=cut"]),
        (["experiment"], ["experiment=demo"]),
        (["data.path"], ["data=pairs", "data.path=['/a b/ü.jsonl',../c.jsonl]"]),
        (["data.path"], ["data=pairs", f"data.path={'long/' * 90}x.jsonl"]),
        (["train.max_grad_norm"], ["train.max_grad_norm=null"]),
        (["student.layers"], ["student.layers=[0,3,29]"]),
        ([], []),
    ],
)
def test_names_are_fit_for_a_path(composer, keys, words):
    made = name(composer, keys, *words)
    assert SAFE_NAME.fullmatch(made)
    assert len(made) < 200
    assert "None" not in made or "null" in words[0]


def test_a_sweeps_name_is_that_of_what_its_points_share(composer):
    keys = ["loss.temperature"]
    two = [config(composer, f"loss.temperature={t}") for t in (1, 2)]
    three = [*two, config(composer, "loss.temperature=4")]
    assert sweep.sweep_name(keys, two) == sweep.sweep_name(keys, three)
    assert sweep.sweep_name(keys, two) != sweep.sweep_name(keys, [config(composer, "train.seed=1")])
    assert SAFE_NAME.fullmatch(sweep.sweep_name(keys, two))
    groups = [[config(composer, f"loss={n}", f"loss.alpha={a}") for n in ("jsd", "tvd")] for a in (0.3, 0.7)]
    assert sweep.sweep_name(["loss"], groups[0]) != sweep.sweep_name(["loss"], groups[1])
    betas = [[config(composer, "loss=jsd", f"loss.beta={b}")] for b in (0.3, 0.7)]
    assert sweep.sweep_name(["loss.beta"], betas[0]) == sweep.sweep_name(["loss.beta"], betas[1])


def test_names_are_the_same_on_any_day(composer):
    """A name that moves would repeat what is done: change this only with what it names."""
    assert sweep._digest({"a": 1.0, "b": [None, "x"]}) == sweep._digest({"b": [None, "x"], "a": 1}) == "601e57"
    shared = sweep.sweep_name(["loss.temperature"], [config(composer), config(composer, "loss.temperature=4")])
    assert shared == sweep.sweep_name(["loss.temperature"], [config(Composer(Source()))])


def test_a_sweep_as_a_file_is_the_sweep_as_typed():
    typed = preflight(["loss.temperature=1,2,4", "loss.alpha=0.3,0.7"], Source(), True).added
    assert preflight(["experiment=temperature_alpha"], Source()).added == typed
    assert typed[-1] == "sweep.keys=[loss.temperature,loss.alpha]"
    fewer = preflight(["experiment=temperature_alpha", "loss.temperature=3"], Source()).added
    assert fewer[-1] == "sweep.keys=[loss.alpha]"


def test_a_run_of_a_sweep_composes_in_python():
    made = compose(["loss.temperature=2", "sweep.name=mine", "sweep.keys=[loss.temperature]"])
    assert made.sweep.name == "mine"
