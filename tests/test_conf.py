"""conf/: every option composes, fits Config and what it names; every key has its comment."""

import re
from pathlib import Path

import pytest
import yaml

from kdx import loss
from kdx.compose import Composer
from kdx.data.sources import check_source
from kdx.optim import optimizer_class

CONF = Path(__file__).parents[1] / "conf"
FILES = sorted(CONF.rglob("*.yaml"))
OPTIONS = [file for file in FILES if file.parent != CONF]
NEEDS = {  # what an option cannot have a value for
    "teacher/hf": ["teacher.path=x"],
    "teacher/none": ["student=hf", "student.path=x", "loss=cross_entropy"],
    "student/hf": ["student.path=x"],
    "student/random": ["student.path=x"],
    "adapter/qlora": ["student=hf", "student.path=x"],
    "data/custom": ["data.name=chitchat", "data.path=x.json", "data.min_turns=2", "data.max_turns=4"],
    "data/pairs": ["data.path=x.jsonl"],
    "data/messages": ["data.path=x.jsonl"],
    "data/sharegpt": ["data.path=x.jsonl"],
    "data/alpaca": ["data.path=x.jsonl"],
    "data/text": ["data.path=x.jsonl"],
    "data/mix": ["data.sources.a={layout: text, path: x.jsonl, weight: 1}"],
}


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer()


def option(file: Path) -> str:
    return file.relative_to(CONF).with_suffix("").as_posix()


@pytest.mark.parametrize("file", OPTIONS, ids=option)
def test_every_option_composes_fits_and_binds(file, composer):
    name = option(file)
    config = composer.point(["=".join(name.rsplit("/", 1)), *NEEDS.get(name, [])]).config
    if config.loss.name == "cross_entropy":
        assert config.loss.options == {}
        assert config.loss.alpha == 0
    else:
        loss.check_options(config.loss.name, config.loss.options)
    assert issubclass(optimizer_class(config.optim), object)
    check_source(config.data)


@pytest.mark.parametrize("file", FILES, ids=option)
def test_every_file_opens_with_a_comment_and_every_key_has_one(file):
    text = file.read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict) and "_target_" not in text  # it names no code
    lines = text.splitlines()
    assert lines[0].startswith("# ")
    if "defaults: [" in text and lines[0] != "# @package _global_":
        return  # what a key means stands in the file this one builds on; here the first line says what it is for
    in_hydra = False
    for line in lines:
        in_hydra = line.startswith("hydra:") or (in_hydra and not re.match(r"\w", line))
        is_value = re.match(r" *[\w.]+: *[^ ]", line) and not line.startswith("defaults:")
        assert in_hydra or not is_value or " # " in line, line


@pytest.mark.parametrize("file", sorted((CONF / "experiment").glob("*.yaml")), ids=option)
def test_every_experiment_opens_with_its_command_and_question(file):
    package, command, question = file.read_text(encoding="utf-8").splitlines()[:3]
    assert package == "# @package _global_"
    assert command == f"# python -m kdx experiment={file.stem}"
    assert question.startswith("# Question: ")
    assert "?" in question


def test_students_start_from_values_that_suit_them(composer):
    cut = composer.point([])
    assert cut.config.train.max_steps == 125
    assert cut.config.optim.lr > 1e-4
    assert cut.sources["optim.lr"] == "conf/recipe/cut.yaml"
    pretrained = composer.point(["teacher=dialogpt_medium", "student=dialogpt_small"]).config
    assert (pretrained.optim.lr, pretrained.optim.schedule, pretrained.optim.warmup_steps) == (2e-5, "linear", 0.05)
    assert pretrained.train.epochs == 1
    assert pretrained.data.max_length > cut.config.data.max_length
