"""What others wrote, given to the real command: it runs nothing, writes nothing elsewhere, and keeps no secret.

Each in a process of its own; in short, what is refused is given to one process after another, in folders of their own.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from runs import commands, config_of, make_place, signal_at, start, words_of

from kdx.compose import preflight
from kdx.folders import Source
from kdx.run.files import MANIFEST, seal

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


def lay_out(folder: Path, place: Path) -> Path:
    """A folder to type commands in, with a copy of all that is in a place, beside one that nothing may change."""
    shutil.copytree(place, folder / "work")
    (folder / "outside" / "folder").mkdir(parents=True)
    (folder / "outside" / "kept.txt").write_text("kept\n")
    return folder / "work"


@pytest.fixture
def box(tmp_path, place):
    return lay_out(tmp_path, place)


def beside(box: Path) -> dict[str, bytes]:
    """All that stands outside of the folder."""
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in box.parent.rglob("*") if box not in [p, *p.parents]}


def obey(box: Path, *words: str) -> tuple[int, str]:
    """Run the command, and see that it did no harm → its exit code and what it printed."""
    (told,) = obey_all([(box, list(words))])
    return told


def obey_all(typed: list[tuple[Path, list[str]]]) -> list[tuple[int, str]]:
    """The same of several in one process, each in a folder of its own."""
    before = [beside(box) for box, _ in typed]
    logs = [box / "told.log" for box, _ in typed]
    store = {"KDX_STORE": "store"}  # in each folder
    codes = commands([(words, box, log) for (box, words), log in zip(typed, logs, strict=True)], **SECRETS, **store)
    for (box, _), known, log in zip(typed, before, logs, strict=True):
        assert beside(box) == known, "written outside"
        assert not [p for p in box.rglob("*") if p.name.startswith("marker")], f"code was run in {box}"
        for file in (p for p in box.rglob("*") if p.is_file() and p.name != "trap.yaml"):
            text = file.read_bytes()
            for secret in (*SECRETS.values(), *TYPED):
                assert secret.encode() not in text, f"{file} has a secret"
        assert "\x1b" not in log.read_text(), "the terminal was told to obey"
    return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


@pytest.fixture
def refused(request, full, tmp_path, figure):
    """Lay out and type each of many → name, code and what was said; all in one process, or in one each."""

    def obeyed(names: Iterable[str], place: Path, words_in: Callable[[str, Path], list[str]]):
        boxes = {name: lay_out(tmp_path / str(i), place) for i, name in enumerate(names)}
        typed = [(box, words_in(name, box)) for name, box in boxes.items()]
        told = [obey(box, *words) for box, words in typed] if full else obey_all(typed)
        kind = request.node.name.removeprefix("test_")
        figure(f"hostile {kind}: {len(told)} tried: 0 marker files, 0 written outside, 0 secrets on disk")
        return [(name, *one) for name, one in zip(boxes, told, strict=True)]

    return obeyed


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
    "secret in a sweep": "hydra: {mode: MULTIRUN, sweeper: {params: {train.seed: '1,2'}}}\ntracking: {notes: " + TYPED[1] + "}",
    "Python object": "loss: !!python/object/apply:os.mkdir [marker]",
    "package": "hydra: {searchpath: ['pkg://evil']}",
}  # fmt: skip


def test_yaml(refused, place):
    def words_in(name, box):
        write(box / "evil.py", "import os\nos.mkdir('marker')\n")
        coded(box / "coded")
        write(box / "mine/experiment/trap.yaml", f"# @package _global_\n{YAML[name]}\n")
        words = [
            w for w in words_of(Path(), "train.max_steps=1") if "teacher.path" not in w or "coded" not in YAML[name]
        ]
        return ["--config-dir", "mine", "experiment=trap", *words]

    for name, code, told in refused(YAML, place, words_in):
        assert (code, len(told.splitlines())) == (2, 1), (name, told)


PACKAGES = {
    "plain": "hydra: {searchpath: ['pkg://evil']}",
    "a letter by its number": 'hydra: {searchpath: ["p\\u006bg://evil"]}',
    "over two lines": 'hydra: {searchpath: ["pk\\\n  g://evil"]}',
    "an interpolated letter": "hydra: {searchpath: ['p${oc.env:NOPE,kg}://evil']}",
    "an interpolated list": "hydra: {searchpath: '${mine}'}\nmine: ['pkg://evil']",
    "an interpolated part": "hydra: '${mine}'\nmine: {searchpath: ['pkg://evil']}",
    "a part from a word": "hydra: \"${oc.create:${oc.decode:'{searchpath: [pkg://evil]}'}}\"",
    "an alias": "mine: &a {searchpath: ['pkg://evil']}\nhydra: *a",
    "after kdx's own": "hydra: {searchpath: ['pkg://kdx.conf', 'pkg://kdx.conf/../evil', 'pkg://evil']}",
}  # fmt: skip


def test_a_config_of_ones_own_searches_in_no_package(refused, place):
    def words_in(name, box):
        write(box / "mine/trap.yaml", f"defaults: [_self_]\n{PACKAGES[name]}\n")
        write(box / "evil/__init__.py", "import os\nos.mkdir('marker')\n")
        write(box / "evil/config.yaml", "{}\n")
        return ["--config-path", "mine", "--config-name", "trap", "train.seed=1"]

    for name, code, told in refused(PACKAGES, place, words_in):
        assert (code, len(told.splitlines())) == (2, 1), (name, told)
        assert "a Python package to search" in told, name


def test_a_config_of_ones_own_that_is_broken_is_told_by_its_line(box):
    write(box / "mine/config.yaml", "defaults: [_self_]\nhydra: {searchpath: [file://x}\n")
    code, told = obey(box, "--config-path", "mine")
    assert code == 2
    assert "mine/config.yaml:2: does not parse" in told


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
        write(box / "teacher/model.safetensors.index.json", f'{{"metadata": {{}}, "weight_map": {{"w": "{name}"}}}}')

    return lay


def with_template(text: str):
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
    "shards on a drive": (with_shards("C:\\\\outside.safetensors"), "names weights outside its folder"),
    "chat template": (with_template(ESCAPE), "the chat template"),
    "chat template's call": (with_template(CALL), "the chat template"),
    "endless chat template": (with_template(ENDLESS), "the chat template"),
    "huge chat template": (with_template(HUGE), "the chat template"),
}


def test_models(refused, place):
    def words_in(name, box):
        MODELS[name][0](box)
        return words_of(Path(), "train.max_steps=1")

    for name, code, told in refused(MODELS, place, words_in):
        assert code == 2, (name, told)
        assert MODELS[name][1] in told, (name, told)
        assert "Traceback" not in told, (name, told)


# Data of somebody's


def with_rows(text: str):
    def lay(box: Path) -> list[str]:
        write(box / "pairs.jsonl", text)
        return []

    return lay


def quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def with_words(*words: str):
    return lambda box: list(words)


GOOD = "".join(json.dumps({"source": f"What is {i}?", "target": f"It is {i}."}) + "\n" for i in range(20))
DATA = {
    "row template": (with_words(f"data.template.user={quoted(ESCAPE)}"), 2, "data.template.user cannot be filled"),
    "chat template of the run": (with_words(f"data.chat_template={quoted(ESCAPE)}"), 2, "chat template"),
    "deep JSON": (with_rows('{"source": ' + "[" * 200_000 + "\n"), 2, "is not JSON"),
    "huge number": (with_rows('{"source": ' + "9" * 100_000 + ', "target": "a"}\n'), 2, "pairs.jsonl:1"),
    "infinite number": (with_rows('{"source": 1e999, "target": "a"}\n'), 2, "is a number"),
    "huge row": (with_rows(GOOD + json.dumps({"source": "a " * 50_000, "target": "b"}) + "\n"), 0, "next:"),
    "escapes in good rows": (with_rows(GOOD + GOOD.replace("is", "\\u001b[2J\\u009bis")), 0, "next:"),
    "escapes in rows": (
        with_rows('{"source": "\\u001b[2J\\u009b2J", "target": {"\\u001b]0;x\\u0007": 1}}\n'),
        2,
        "target",
    ),
    "escapes in names": (with_rows('{"\\u001b[2J": "\\u001b[2J", "target": "x"}\n'), 2, "the columns are"),
}


def test_data(refused, place):
    def words_in(name, box):
        return words_of(Path(), "train.max_steps=1", "tracking.samples=true", *DATA[name][0](box))

    for name, code, told in refused(DATA, place, words_in):
        assert code == DATA[name][1], (name, told)
        assert DATA[name][2] in told, (name, told)
        assert "Traceback" not in told, (name, told)


# Run folders, sweeps and stores of somebody's


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A place with a run that was stopped at step 2 of 4, and a store."""
    folder = make_place(tmp_path_factory.mktemp("made"))
    words = ["teacher.store=on", f"teacher.store_dir={folder / 'store'}", "train.max_steps=4"]
    assert start(config_of(folder, *words), folder / "theirs", signal_at(2)).code == 143
    write(folder / "theirs/overrides.yaml", json.dumps(words_of(folder, *words)))
    for file in (folder / "theirs/overrides.yaml", folder / "theirs/config.yaml"):  # as typed in that folder
        write(file, file.read_text().replace(f"{folder}/", ""))
    return folder


def with_pickle_in_checkpoint(name: str):
    def lay(box: Path) -> None:
        (checkpoint,) = (box / "theirs/checkpoints").iterdir()
        (checkpoint / name).write_bytes(pickle.dumps(Runs(box / "marker")))
        (checkpoint / MANIFEST).unlink()
        seal(checkpoint)

    return lay


def with_text(name: str, text: str):
    return lambda box: write(box / name, text)


def with_command(box: Path) -> None:
    write(box / "theirs/command.txt", "python -m kdx --config-dir evil experiment=trap")
    write(box / "theirs/overrides.yaml", "[experiment=trap]")


def with_folders_in_another_order(box: Path) -> None:
    """The flags name a main config, what it has searched, and a folder that Hydra looks into before that."""
    write(box / "theirs/c/main.yaml", "defaults: [config, extra, _self_]\n"
          "hydra: {searchpath: [pkg://kdx.conf, file://theirs/more]}\n")  # fmt: skip
    write(box / "theirs/more/extra.yaml", "train: {seed: 1}\n")
    write(box / "theirs/d/extra.yaml", f"# @package _global_\n{YAML['callback']}\n")
    flags = "--config-path theirs/c --config-name main --config-dir theirs/d"
    write(box / "theirs/command.txt", f"python -m kdx {flags}")


def with_link(name: str, to: str):
    def lay(box: Path) -> None:
        link = box / name
        shutil.rmtree(link) if link.is_dir() else link.unlink(missing_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(box.parent / "outside" / to)

    return lay


def with_linked_store(box: Path) -> None:
    (key,) = (box / "store").glob("[0-9a-f]*")
    shutil.move(key, box.parent / "outside" / "key")
    with_link(f"store/{key.name}", "key")(box)


OBJECT = "!!python/object/apply:os.mkdir [marker]\n"
RESUME, LIKE = ("run.resume=theirs",), ("run.like=theirs", "teacher.store_dir=store")
SWEEP = ("-m", *words_of(Path(), "train.max_steps=1"), "train.seed=1,2", "sweep.name=s", "sweep.baseline=false")
FOLDERS = {
    "optimizer": (with_pickle_in_checkpoint("optimizer.pt"), RESUME, 2, "holds more than numbers"),
    "random numbers": (with_pickle_in_checkpoint("random.pt"), RESUME, 2, "holds more than numbers"),
    "config": (with_text("theirs/config.yaml", OBJECT), RESUME, 2, "is not the config of a run"),
    "words": (with_text("theirs/overrides.yaml", OBJECT), LIKE, 2, "holds words that are not a run's"),
    "Hydra's words": (
        with_text("theirs/overrides.yaml", "['+hydra.job.env_set.KDX_PLUGINS=evil']"), LIKE, 2, "holds words"),
    "a model's code": (
        with_text("theirs/overrides.yaml", "[teacher=hf, teacher.path=coded, teacher.trust_remote_code=true, "
                  f"teacher.revision={'a' * 40}, student=hf, student.path=student, data=pairs, data.path=pairs.jsonl]"),
        LIKE, 2, "is not taken from theirs"),
    "command": (with_command, LIKE, 2, "names code"),
    "command's folders": (with_folders_in_another_order, LIKE, 2, "names code"),
    "command's flags": (with_text("theirs/command.txt", "python -m kdx '"), LIKE, 2, "is not a command"),
    "status": (with_text("theirs/status.json", '{"state": "done", "owner": []}'), RESUME, 2, "theirs"),
    "data": (with_text("theirs/data.json", "[1"), RESUME, 3, "theirs"),
    "linked log": (with_link("theirs/kdx.log", "kept.txt"), RESUME, 2, "is a link that leads elsewhere"),
    "linked figures": (with_link("theirs/metrics.jsonl", "kept.txt"), RESUME, 2, "is a link that leads elsewhere"),
    "linked plug-ins": (with_link("theirs/plugins", "folder"), RESUME, 2, "is a link that leads elsewhere"),
    "linked checkpoints": (with_link("theirs/checkpoints", "folder"), RESUME, 2, "is a link that leads elsewhere"),
    "linked job": (lambda box: None, SWEEP, 5, "is a link that leads elsewhere"),
    "linked teacher": (with_linked_store, LIKE, 2, "is a link out of it"),
    "sweep's name": (lambda box: None, (*SWEEP, "sweep.name=../x"), 2, "sweep.name"),
    "sweep's name elsewhere": (lambda box: None, (*SWEEP, "sweep.name=/elsewhere/x"), 2, "sweep.name"),
}  # fmt: skip


def test_folders(refused, made):
    def words_in(name, box):
        lay, words, _, _ = FOLDERS[name]
        write(box / "evil.py", "import os\nos.mkdir('marker')\n")
        write(box / "evil/experiment/trap.yaml", f"# @package _global_\n{YAML['callback']}\n")
        coded(box / "coded")
        if words is SWEEP:
            for job in preflight(list(words[1:]), Source(), is_multirun=True).jobs:
                with_link(f"outputs/sweeps/s/{job}", "folder")(box)
        lay(box)
        return list(words)

    for name, code, told in refused(FOLDERS, made, words_in):
        assert code == FOLDERS[name][2], (name, told)
        assert FOLDERS[name][3] in told, (name, told)
        assert "Traceback" not in told, (name, told)


# Secrets


URL = f"https://me:{TYPED[0]}@127.0.0.1:9/x.jsonl"
KEPT = {
    "typed": ((f"tracking.notes=see {TYPED[1]}", f"tracking.tags=[{TYPED[2]}]", f"tracking.name='{SECRETS['DB_PASSWORD']}'"), 0),
    "of the environment": (("tracking.notes=${oc.env:HF_TOKEN}", "tracking.name=${oc.env:AWS_SECRET_ACCESS_KEY}"), 0),
    "in an address": ((f"data.path={URL}", f"teacher.path=https://127.0.0.1:9/{TYPED[1]}"), 2),
    "in a sweep": (("-m", "train.seed=1,2", f"tracking.notes={TYPED[1]}"), 2),
    "in a dict of a sweep": (("-m", "train.seed=1,2", f"+data.auth={{password: {TYPED[0]}}}"), 2),
    "behind a later word": (("-m", "train.seed=1,2", f"++data.password={TYPED[0]}", "++data.password=${oc.env:HF_TOKEN}"), 2),
    "in a dict": ((f"+data.auth={{password: {TYPED[0]}}}",), 2),
    "of a sweep's environment": (("-m", "train.seed=1", "sweep.name=s", "sweep.baseline=false", "tracking.notes=${oc.env:HF_TOKEN}"), 0),
}  # fmt: skip


def test_secrets(refused, place):
    def words_in(kind, box):
        words, _ = KEPT[kind]
        more = ["tracking.mode=offline", "train.max_steps=1", *(word for word in words if word != "-m")]
        return [*(["-m"] if "-m" in words else []), *words_of(Path(), *more)]

    for kind, code, told in refused(KEPT, place, words_in):
        assert code == KEPT[kind][1], (kind, told)
        assert "Traceback" not in told, (kind, told)
