"""What others wrote, given to the real command: it runs nothing, writes nothing elsewhere, and keeps no secret."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import yaml
from runs import start_command, words_of

from kdx.durable import seal

SECRETS = {  # the environment of every command below
    "HF_TOKEN": "hf_" + "aB3dE5" * 6,
    "WANDB_API_KEY": "0f1e2d3c4b" * 4,
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/bPxRfi",
    "DB_PASSWORD": "open sesame",
}
TYPED = ("pa55word", "hf_" + "Zy9xW8" * 6, "sk-" + "qwerty" * 5)  # and what some of them type
SLURM = "defaults: [{override /hydra/launcher: slurm}]\n"


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def box(tmp_path, place):
    """A folder to type commands in, with copies of the models, beside one that nothing may change."""
    shutil.copytree(place, tmp_path / "work")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept.txt").write_text("kept\n")
    return tmp_path / "work"


def beside(box: Path) -> dict[str, str]:
    """All that stands outside of the folder."""
    return {str(p): p.read_text() if p.is_file() else "" for p in box.parent.rglob("*") if box not in [p, *p.parents]}


def obey(box: Path, *words: str, **environment: str) -> tuple[int, str]:
    """Run the command, and see that it did no harm → its exit code and what it printed."""
    before = beside(box)
    log = box / "told.log"
    run = start_command(list(words), box, log, **SECRETS, KDX_STORE=str(box / "store"), **environment)
    code = run.code  # waits
    assert beside(box) == before, "written outside"
    assert not [p for p in box.rglob("*") if p.name.startswith("marker")], "code was run"
    for file in (p for p in box.rglob("*") if p.is_file() and p.name != "trap.yaml"):
        text = file.read_bytes()
        for secret in (*SECRETS.values(), *TYPED):
            assert secret.encode() not in text, f"{file.relative_to(box)} has a secret"
    assert "\x1b" not in run.text, "the terminal was told to obey"
    return code, run.text


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


# YAML of somebody's, under --config-dir

YAML = {
    "callback": "hydra: {callbacks: {x: {_target_: os.mkdir, path: marker}}}",
    "launcher": "hydra: {launcher: {_target_: os.mkdir, path: marker}}",
    "sweeper": "hydra: {sweeper: {_target_: '${oc.env:EVIL,os.mkdir}', path: marker}}",
    "through a plug-in": "hydra: {launcher: {_target_: hydra._internal.core_plugins.bash_completion.os.mkdir}}",
    "log factory": "hydra: {job_logging: {handlers: {x: {'()': os.mkdir, path: marker}}}}",
    "log class": "hydra: {job_logging: {handlers: {x: {class: os.mkdir, path: marker}}}}",
    "log file": "hydra: {hydra_logging: {handlers: {x: {class: logging.FileHandler, filename: marker}}}}",
    "environment": "hydra: {job: {env_set: {KDX_PLUGINS: evil}}}",
    "swept environment": "hydra: {mode: MULTIRUN, sweeper: {params: {+hydra.job.env_set.KDX_PLUGINS: evil}}}",
    "swept folder": "hydra: {mode: MULTIRUN, sweeper: {params: {hydra.sweep.subdir: ../../../../outside/x}}}",
    "folder": "hydra: {run: {dir: ../outside/x}}",
    "shell": SLURM + "hydra: {launcher: {setup: [touch marker]}}",
    "two lines": SLURM + 'hydra: {launcher: {comment: "a\\ntouch marker"}}',
    "launcher's folder": SLURM + "hydra: {launcher: {submitit_folder: ../outside/x}}",
    "parent": "hydra: {sweep: {subdir: ../../../outside}}",
    "sweep's name": "hydra: {mode: MULTIRUN, sweeper: {params: {train.seed: '1,2'}}}\nsweep: {name: ../../../outside/x}",
    "target": "loss: {_target_: os.mkdir}",
    "target in a list": "optim: {schedule_options: {a: [{'()': os.mkdir}]}}",
    "class": "data: {options: {class: os.mkdir}}",
    "plug-ins": "plugins: [evil]",
    "code of a model": "teacher: {path: coded, trust_remote_code: true, revision: " + "a" * 40 + "}",
    "swept code of a model": "hydra: {mode: MULTIRUN, sweeper: {params: {teacher.trust_remote_code: 'true'}}}\n"
    "teacher: {path: coded, revision: " + "a" * 40 + "}",
    "Python object": "loss: !!python/object/apply:os.mkdir [marker]",
    "package": "hydra: {searchpath: ['pkg://evil']}",
}  # fmt: skip


@pytest.mark.parametrize("text", YAML.values(), ids=YAML)
def test_yaml(box, place, text):
    write(box / "evil.py", "import os\nos.mkdir('marker')\n")
    coded(box / "coded")
    write(box / "mine/experiment/trap.yaml", f"# @package _global_\n{text}\n")
    words = [w for w in words_of(Path(), "train.max_steps=1") if "teacher.path" not in w or "coded" not in text]
    code, told = obey(box, "--config-dir", "mine", "experiment=trap", *words)
    assert (code, len(told.splitlines())) == (2, 1), told


def test_a_config_of_ones_own_searches_in_no_package(box):
    write(box / "mine/config.yaml", "defaults: [_self_]\nhydra: {searchpath: ['pkg://evil']}\n")
    write(box / "evil/__init__.py", "import os\nos.mkdir('marker')\n")
    code, told = obey(box, "--config-path", "mine")
    assert code == 2
    assert "names a Python package" in told


# Folders of somebody's: models


def coded(folder: Path) -> None:
    """A model and tokenizer that bring code."""
    shutil.copytree(folder.parent / "teacher", folder)
    source = "import os\nos.mkdir('marker')\n"
    for name in ("evil_model.py", "evil_tokens.py"):
        (folder / name).write_text(source)
    edit(folder / "config.json", model_type="evil", auto_map={
        "AutoConfig": "evil_model.EvilConfig", "AutoModelForCausalLM": "evil_model.EvilModel"})  # fmt: skip
    edit(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map={
        "AutoTokenizer": [None, "evil_tokens.EvilTokenizer"]})  # fmt: skip


def edit(file: Path, **keys: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def with_code(box: Path) -> None:
    shutil.rmtree(box / "teacher", ignore_errors=True)
    shutil.copytree(box / "student", box / "teacher")
    shutil.move(box / "teacher", box / "kept")
    shutil.copytree(box / "kept", box / "teacher")
    coded(box / "coded")
    shutil.rmtree(box / "teacher")
    shutil.move(box / "coded", box / "teacher")


def with_tokenizers_code(box: Path) -> None:
    plain = (box / "teacher" / "config.json").read_text()
    with_code(box)
    (box / "teacher" / "config.json").write_text(plain)


def with_a_pickle(box: Path) -> None:
    (box / "teacher/model.safetensors").unlink()
    (box / "teacher/pytorch_model.bin").write_bytes(pickle.dumps({"w": Runs(box / "marker")}))


def with_shards(name: str):
    def lay(box: Path) -> None:
        shutil.move(box / "teacher/model.safetensors", box.parent / "outside" / "x.safetensors")
        write(box / "teacher/model.safetensors.index.json", '{"metadata": {}, "weight_map": {"w": "%s"}}' % name)

    return lay


def with_template(text: str, *, of_data: bool = False):
    def lay(box: Path) -> None:
        for model in ("teacher", "student"):
            edit(box / model / "tokenizer_config.json", chat_template=text)

    return lay


ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
CALL = "{% for x in ().__class__.__base__.__subclasses__() %}{{ x.__init__.__globals__ }}{% endfor %}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}"
HUGE = "{{ 'x' * 9999999999 }}"
MODELS = {
    "code of a model": (with_code, "teacher.path"),
    "code of a tokenizer": (with_tokenizers_code, "teacher.path"),
    "pickled weights": (with_a_pickle, "teacher.path"),
    "shards above": (with_shards("../../outside/x.safetensors"), "names weights outside its folder"),
    "shards in JSON's letters": (with_shards("\\u002e\\u002e/\\u002e./outside/x.safetensors"), "names weights outside"),
    "shards elsewhere": (with_shards("/outside/x"), "names weights outside its folder"),
    "chat template": (with_template(ESCAPE), "the chat template"),
    "chat template's call": (with_template(CALL), "the chat template"),
    "endless chat template": (with_template(ENDLESS), "the chat template"),
    "huge chat template": (with_template(HUGE), "the chat template"),
}


@pytest.mark.parametrize(("lay", "says"), MODELS.values(), ids=MODELS)
def test_models(box, lay, says):
    lay(box)
    code, told = obey(box, *words_of(Path(), "train.max_steps=1"))
    assert code == 2, told
    assert says in told
    assert "Traceback" not in told


# Data of somebody's


def with_rows(text: str):
    def lay(box: Path) -> list[str]:
        write(box / "pairs.jsonl", text)
        return []

    return lay


def with_words(*words: str):
    return lambda box: list(words)


GOOD = "".join(json.dumps({"source": f"What is {i}?", "target": f"It is {i}."}) + "\n" for i in range(20))
DATA = {
    "row template": (with_words(f"data.template.user='{ESCAPE}'"), 2, "data.template.user cannot be filled"),
    "chat template of the run": (with_words(f"data.chat_template='{ESCAPE}'"), 2, "chat template"),
    "deep JSON": (with_rows('{"source": ' + "[" * 200_000 + "\n"), 2, "is not JSON"),
    "huge number": (with_rows('{"source": ' + "9" * 100_000 + ', "target": "a"}\n'), 2, "pairs.jsonl:1"),
    "infinite number": (with_rows('{"source": 1e999, "target": "a"}\n'), 2, "is a number"),
    "huge row": (with_rows(GOOD + json.dumps({"source": "a " * 500_000, "target": "b"}) + "\n"), 0, "next:"),
    "escapes in rows": (
        with_rows('{"source": "\\u001b[2J\\u009b2J", "target": {"\\u001b]0;x\\u0007": 1}}\n'),
        2,
        "target",
    ),
    "escapes in names": (with_rows('{"\\u001b[2J": "\\u001b[2J", "target": "x"}\n'), 2, "the columns are"),
}


@pytest.mark.parametrize(("lay", "code", "says"), DATA.values(), ids=DATA)
def test_data(box, lay, code, says):
    more = lay(box)
    found, told = obey(box, *words_of(Path(), "train.max_steps=1", "tracking.samples=true", *more))
    assert found == code, told
    assert says in told
    assert "Traceback" not in told
