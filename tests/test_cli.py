"""The command line: what is refused and how, what is added to the words, what a run keeps of them."""

import errno
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from processes import in_process as run

from kdx import __version__, cli, plugins
from kdx.cli import compose
from kdx.compose import Composer, compose_points, preflight
from kdx.errors import ConfigError, KdxError
from kdx.folders import CONF, Source
from kdx.hostile import refuse_typed_secrets
from kdx.run import typed
from kdx.run.redact import redact, secrets_in

HF = ["student=hf", "student.path=x"]


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """Each test in a folder of its own, with an environment that is put back."""
    monkeypatch.chdir(tmp_path)
    for name in ("HYDRA_FULL_ERROR", "KDX_DEBUG"):
        monkeypatch.setenv(name, "0")
    for name in ("KDX_PLUGINS", "KDX_LR", "KDX_SEED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["kdx"])
    monkeypatch.setattr(sys, "path", list(sys.path))


def write(file: str, text: str) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text, encoding="utf-8")


def refused(*words: str, sweep: bool = False, **source: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        preflight(list(words), Source(**source), sweep)
    return caught.value.lines


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer(Source())


def test_config_errors_and_what_only_shows_come_without_torch(tmp_path):
    program = """
import sys
from kdx.cli import main
for words in (["bad.key=1"], ["--cfg", "job"], ["--help"], ["--info", "defaults"]):
    sys.argv = ["kdx", *words]
    try:
        main()
    except SystemExit as end:
        print(words, end.code, file=sys.stderr)
print(sorted({"torch", "transformers", "datasets", "accelerate", "wandb"} & sys.modules.keys()), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    codes = [line for line in done.stderr.splitlines() if not line.startswith("kdx: error: ")]
    assert [line.rsplit(" ", 1)[-1] for line in codes] == ["2", "0", "0", "0", "[]"]
    assert list(tmp_path.iterdir()) == []


def test_the_real_command_says_it_in_one_line(tmp_path):
    command = [sys.executable, "-m", "kdx", "loss.temprature=2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    wanted = "kdx: error: loss.temprature: is not a key of kdx. Did you mean loss.temperature?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", wanted)


def test_all_that_is_wrong_is_said_in_one_go():
    words = ["train.learning_rate=1e-4", "loss=jds", "optim=adamw_bnb_8bit", "loss.alpha=2", "train.batch_size=eight"]
    assert refused(*words, "tain.seed=1") == [
        "loss=jds: loss has no option jds. Did you mean jsd? Choices: adaptive_kl, cross_entropy, forward_kl, jsd, "
        "reverse_kl, skew_forward_kl, skew_reverse_kl, tvd",
        "optim=adamw_bnb_8bit: optim has no option adamw_bnb_8bit. Did you mean optim=adamw_8bit?",
        "train.learning_rate: is not a key of kdx. Did you mean optim.lr?",
        "tain.seed: is not a key of kdx. Did you mean train.seed?",
        "loss.alpha: is 2. Allowed: between 0 and 1",
        "train.batch_size: is 'eight' (str), expected a whole number. Allowed: 1 or more",
    ]


def test_other_tools_words_are_known():
    meant = {
        "distillation_weight=0.5": "loss.alpha",
        "loss.distillation_weight=0.5": "loss.alpha",
        "learning_rate=1e-4": "optim.lr",
        "train.learning_rate=1e-4": "optim.lr",
        "per_device_train_batch_size=2": "train.micro_batch_size",
        "gradient_accumulation_steps=4": "train.batch_size with train.micro_batch_size",
        "num_train_epochs=1": "train.epochs",
        "train.bf16=true": "train.precision=bf16",
        "temperature=2": "loss.temperature",
        "optimizer.lr=1": "optim.lr",
    }
    for line, (word, key) in zip(refused(*meant), meant.items(), strict=True):
        assert line.startswith(f"{word.split('=')[0]}: is not a key of kdx. Did you mean {key}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["loss.beta=0.3"], "loss=jsd"),
        (["data.min_turn=3"], "Did you mean data.min_turns?"),
        (["optim.epsilon_of_mine=3"], "+optim.epsilon_of_mine=..."),
        (["+loss.alpha=0.3"], "Type it without the +"),
        (["+foo=1"], "+foo: is not a key"),
        (["+train.foo=1"], "train.foo: is not a key"),
        (["~train.seed"], "train.seed: is not set"),
        (["train=5"], "train: is 5 (int), but holds keys of its own"),
        (["teacher=hf"], "Give it: teacher.path=..."),
        (["optim.lr=${oc.env:KDX_LR}"], "optim.lr: environment variable KDX_LR is not set"),
        (["data=null"], "data=null: data has no option null. Choices: chitchat, "),
        (["student=null"], "student=null: student has no option null. Choices: cut, "),
        (["optim=null"], "optim=null: optim has no option null. Choices: adamw, "),
        (["loss=null"], "loss=null: loss has no option null. Choices: adaptive_kl, "),
        (["teacher=null"], "teacher=null: teacher has no option null. Did you mean teacher=none?"),
        (
            ["train.seed=18446744073709551616"],
            "train.seed: is 18446744073709551616. Allowed: 0 or more, and below 2^63",
        ),
        (["data.seed=-1"], "data.seed: is -1. Allowed: 0 or more, and below 2^63"),
        (["hydra.run.dri=x"], "hydra.run.dri"),
        (["hydra/launcher=nope"], "hydra/launcher/nope"),
        (["train.max_steps=3", "train.epochs=2"], "are both set"),
    ],
)
def test_one_line_with_the_mend(words, says, composer):
    (fault,) = composer.point(composer.parsed(words)).faults
    assert says in str(fault)


def test_a_sweep_without_m_and_words_that_cannot_be_read():
    assert refused("loss.temperature=1,2") == [
        "loss.temperature: has several values, which is a sweep. Add -m: python -m kdx -m ..."
    ]
    unread = refused("data.path=a b=c", "tracking.notes=it's")
    assert [line.split(" (")[0] for line in unread] == ["data.path: cannot be read", "tracking.notes: cannot be read"]


@pytest.mark.parametrize(
    "words",
    [
        ["+optim.eps=1e-6"],
        ["data=custom", "data.name=tickets", "data.path=t.db", "+data.min_turns=3"],
        ["loss.name=mine", "+loss.beta=0.3"],
        ["data.path=[a.jsonl,b.jsonl]", "student.layers=[0,3,29]"],
        ["tracking.name=3", "teacher.revision=12", "optim.lr=1"],
        ["tracking={mode: offline}"],
        ["optim.betas.0=0.8"],
        ["experiment=demo", "experiment=null", "recipe=null", "pair=null"],
        ["train.seed=9223372036854775807"],
        ["loss.temperature=1", "loss.temperature=2"],
    ],
)
def test_what_is_right_passes(words, composer):
    assert composer.point(composer.parsed(words)).faults == []


@pytest.mark.parametrize(
    ("words", "added"),
    [
        (["train.max_steps=3"], []),  # the recipe's own key
        (["train.epochs=2"], ["train.max_steps=null"]),
        ([*HF, "train.max_steps=3"], ["train.epochs=null"]),
        ([*HF, "train.epochs=3"], []),
        (["experiment=demo", "train.epochs=1"], ["train.max_steps=null"]),
        (["experiment=dialogpt", "++train.max_steps=5"], ["train.epochs=null"]),
        ([*HF, "train.max_steps=3", "train.epochs=null"], []),
        ([*HF, "train.max_steps=null"], []),
    ],
)
def test_typing_steps_frees_epochs_and_the_reverse(words, added, composer):
    assert composer.point(composer.parsed(words)).freed == added


def test_a_sweep_over_epochs_frees_steps():
    added = preflight(["train.epochs=1,2", "sweep.name=x"], Source(), True).added
    assert added == ["train.max_steps=null", "sweep.keys=[train.epochs]"]


def test_every_point_of_a_sweep_is_checked():
    (alpha, choice) = refused("loss=forward_kl,nope", "loss.alpha=0.1,3", sweep=True)
    assert alpha.startswith("loss.alpha: is 3")
    assert choice.startswith("loss=nope")


def test_ones_own_folder_of_options():
    write("mine/teacher/mine.yaml", "defaults: [hf, _self_]\npath: /models/big\n")
    write("mine/student/mine.yaml", "defaults: [hf, _self_]\npath: /models/small\n")
    write("mine/recipe/mine.yaml", "# @package _global_\noptim: {lr: 3.0e-4}\ntrain: {max_steps: 7}\n")
    experiment = "# @package _global_\ndefaults:\n  - override /teacher: mine\n  - override /student: mine\n"
    write("mine/experiment/mine.yaml", experiment + "data: {max_length: 99}\n")
    config = compose(["experiment=mine"], config_dir="mine")
    assert (config.teacher.path, config.student.path) == ("/models/big", "/models/small")
    assert (config.train.max_steps, config.train.epochs) == (7, None)  # the recipe's steps free the default's epochs
    assert config.run.origins == {
        "optim.lr": "mine/recipe/mine.yaml",
        "train.max_steps": "mine/recipe/mine.yaml",
        "train.epochs": "conf/config.yaml",
        "data.max_length": "mine/experiment/mine.yaml",
    }
    assert refused("teacher=mine")[0].startswith("teacher=mine: teacher has no option mine")
    assert refused(config_dir="absent") == [
        "--config-dir: absent is not a folder. Give the folder that holds teacher/, data/, …"
    ]


def test_a_main_config_of_ones_own_that_has_more_folders_searched(capfd):
    write("mine/main.yaml", "defaults: [config, _self_]\nhydra: {searchpath: [pkg://kdx.conf, file://more]}\n")
    write("more/student/small.yaml", "defaults: [hf, _self_]\npath: /models/small\n")
    write("third/loss/sharp.yaml", "defaults: [forward_kl, _self_]\ntemperature: 0.5\n")
    flags = ["--config-path", "mine", "--config-name", "main", "--config-dir", "third"]
    code, out, lines = run(capfd, *flags, "--cfg", "job", "student=small", "loss=sharp")
    assert (code, lines) == (0, [])
    assert "path: /models/small" in out
    assert "temperature: 0.5" in out
    _, _, (line,) = run(capfd, *flags, "student=smal")
    assert "Did you mean small?" in line
    write("more/student/deep.yaml", "path: " + "[" * 1000)
    _, _, (line,) = run(capfd, *flags, "student=small")
    assert "more/student/deep.yaml: is nested too deep" in line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("student/cut", ["student=cut"]),
        ("student/hf", ["student=mine"]),  # what an option builds on
        ("recipe/cut", ["student=cut", "recipe=cut"]),
    ],
)
def test_a_file_of_ones_own_that_hydra_would_not_read(name, words):
    """Hydra takes the first of a name, and that is kdx's."""
    write("mine/student/mine.yaml", "defaults: [hf, _self_]\npath: /models/small\n")
    write(f"mine/{name}.yaml", "a: 1\n")
    what = f"{Path.cwd()}/mine/{name}.yaml: is not read: conf/{name}.yaml has its name. Give it another name"
    assert refused(*words, config_dir="mine") == [what]
    shutil.copy(CONF / f"{name}.yaml", f"mine/{name}.yaml")  # the same: whichever is read
    assert compose(words, config_dir="mine").train.seed == 0


def test_of_ones_own_folders_the_first_wins_as_in_hydra(capfd):
    """Of what is checked and what is run, all is the same: main, --config-dir, and what the main config has searched."""
    write("mine/main.yaml", "defaults: [config, mine, _self_]\nhydra: {searchpath: [file://more, pkg://kdx.conf]}\n")
    for number, folder in enumerate(("third", "more")):
        write(f"{folder}/mine.yaml", f"train: {{seed: {number}}}\n")
        write(f"{folder}/student/small.yaml", f"defaults: [hf, _self_]\npath: {folder}\n")
    write("more/recipe/cut.yaml", "# @package _global_\ntrain: {log_every: 77}\n")  # before kdx's, as it is searched
    flags = ["--config-path", "mine", "--config-name", "main", "--config-dir", "third"]
    source = Source(*(str(Path(name)) for name in ("third", "mine")), "main")
    (config,), _ = compose_points(["student=small", "recipe=cut"], source)
    code, out, lines = run(capfd, *flags, "--cfg", "job", "student=small", "recipe=cut")
    assert (code, lines) == (0, [])
    shown = yaml.safe_load(out)
    for told in (asdict(config), shown):
        assert (told["student"]["path"], told["train"]["seed"], told["train"]["log_every"]) == ("third", 0, 77)


def test_a_main_config_that_hydra_would_not_read():
    write("mine/config.yaml", "a: 1\n")
    told = f"{Path.cwd()}/mine/config.yaml: is not read: conf/config.yaml has its name."
    assert refused(config_dir="mine") == [f"{told} Choose it with --config-path {Path.cwd()}/mine"]


def test_odd_yaml_of_ones_own(capfd):
    write("mine/teacher/date.yaml", "defaults: [hf, _self_]\npath: x\nlicense: 2024-02-30\n")
    assert compose(["teacher=date", *HF], config_dir="mine").teacher.license == "2024-02-30"
    write("mine/teacher/odd.yaml", "defaults: [hf, {'': x}]\n")
    code, _, (line,) = run(capfd, "--config-dir", "mine", "teacher=odd")
    assert (code, line.startswith("kdx: error: config: ")) == (2, True)


def test_a_sweep_over_students_of_which_some_have_a_recipe():
    plan = preflight(["student=cut,hf", "student.path=x", "train.max_steps=2", "sweep.name=x"], Source(), True)
    assert plan.added == ["train.epochs=null", "sweep.keys=[student]"]
    assert plan.num_points == 2


def test_an_option_of_ones_own_that_is_not_as_it_must_be(capfd):
    write("mine/teacher/bare.yaml", "path: x\n")
    write("mine/teacher/other.yml", "path: x\n")
    write("mine/teacher/broken.yaml", "path: [\n")
    Path("mine/teacher/latin.yaml").write_bytes(b"\xe9: 1\n")
    write("mine/experiment/plain.yaml", "train: {seed: 1}\n")
    for word, says in {
        "teacher=bare": "teacher: has no gguf_file, revision, trust_remote_code,",
        "teacher=other": f"teacher has no option other. Rename {Path.cwd()}/mine/teacher/other.yml to .yaml",
        "teacher=latin": "mine/teacher/latin.yaml: is not UTF-8 (byte 0)",  # the other one was not chosen
        "experiment=plain": """Begin the file of experiment=... with the line "# @package _global_\"""",
    }.items():
        code, _, (line,) = run(capfd, "--config-dir", "mine", word)
        assert code == 2
        assert says in line


def test_where_values_came_from():
    config = compose(["optim.lr=1e-4", "student=dialogpt_small", "optim=adamw_8bit", "experiment=demo"])
    assert config.run.origins["optim.lr"] == "typed"
    assert config.run.origins["train.max_steps"] == "conf/experiment/demo.yaml"
    assert config.run.origins["data.max_length"] == "conf/data/custom.yaml"  # what chitchat builds on
    assert compose(HF).run.origins["train.epochs"] == "conf/config.yaml"


def test_composing_in_python_refuses_what_the_command_line_does():
    with pytest.raises(ConfigError, match="Add -m"):
        compose(["loss.alpha=0.1,0.2"])
    with pytest.raises(ConfigError) as caught:
        compose(["loss.alpha=2", "bad.key=1"])
    assert len(caught.value.lines) == 2
    with pytest.raises(ConfigError, match="Set loss=cross_entropy"):
        compose([*HF, "teacher=none"])


def test_composing_leaves_hydra_as_it_was():
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_module("kdx.conf", version_base="1.3"):
        before = GlobalHydra.instance().hydra
        compose()
        assert GlobalHydra.instance().hydra is before


def test_every_unset_variable_is_named():
    text = "# @package _global_\noptim: {lr: '${oc.env:KDX_LR}'}\ntrain: {seed: '${oc.env:KDX_SEED}', typo: 1}\n"
    write("mine/experiment/x.yaml", text)
    assert refused("experiment=x", config_dir="mine") == [
        "optim.lr: environment variable KDX_LR is not set. Set it: export KDX_LR=...",
        "train.seed: environment variable KDX_SEED is not set. Set it: export KDX_SEED=...",
        "train.typo: is not a key of kdx. Take it out",
    ]


def test_what_only_a_person_may_ask_for_is_obeyed_when_typed():
    assert preflight(["+hydra.job.env_set.A=b", "hydra.run.dir=/elsewhere/x"], Source()).added == []


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["cheque", "loss=jsd"], "cheque: is not a command of kdx"),
        (["improve", "outputs"], "improve: is not a command of kdx"),
        ([""], "'': is not a command of kdx"),
        (["--foo"], "unrecognized arguments: --foo"),
        (["-m", "--cfg", "job"], "asks for several things at once"),
        (["--experimental-rerun", "x"], "reads a pickle"),
        (["--config-name", "nope"], "Cannot find primary config 'nope'"),
        (["loss.alpha=0", ""], "'': cannot be read"),
        (["="], "'=': is not a key of kdx. Type KEY=VALUE"),
        (["=x"], "'=x': is not a key of kdx. Type KEY=VALUE"),
        (["hydra.searchpath=[file://x]"], "hydra.searchpath: may not be typed. Use --config-dir FOLDER"),
        (["hydra=null"], "'hydra=null': is not a key of kdx. Type KEY=VALUE, of Hydra's hydra.KEY"),
        (["data.template.user={{ a }} 'b'"], """: 'data.template.user="{{ a }} '"'"'b'"'"'"'"""),
        (['tracking.name=a "b"'], r"""Quote it for the shell and for Hydra: 'tracking.name="a \"b\""'"""),
        (["data.path=[a b"], "Quote what the shell or Hydra would take apart, as in 'data.path=[a.jsonl,b.jsonl]'"),
        (["loss="], "loss=: names no option. Choices: "),
        (["loss.beta=0.5"], "loss.beta: is not a key of kdx. It is one with loss=jsd"),
        (["hydra.run.dir="], "hydra.run.dir: is empty"),
        (["-m", "train.seed=1,2", "hydra.sweep.dir="], "hydra.sweep.dir: is empty"),
        (["hydra.job.chdir=true"], "hydra.job.chdir: would have every path"),
        (["train.max_steps=9999999999"], "train.max_steps: is 9999999999. Allowed: 0 or more, at most 1e+09"),
        (["+data.x={a:1,b c"], "Quote what the shell or Hydra would take apart"),
        (["teacher=0"], "teacher=0: teacher has no option 0. Choices: "),
        ([f"teacher={'a' * 300}"], "teacher has no option aaa"),
        (["teacher=none", "teacher.path=x", *HF], "teacher.path: is x, beside teacher=none"),
        (["data.path=~/x"], """Quote it for the shell and for Hydra: 'data.path="~/x"'"""),
        (["optim.eps=1e-6"], "optim.eps: is not a key of kdx. For an option of what optim.name names: +optim.eps=..."),
        (["-m", "loss=glob(x*)"], "loss: names no value (glob(x*)). Give at least one"),
        (["-m", "train.seed=range(3,1)"], "train.seed: names no value (range(3,1)). Give at least one"),
        (["-m", "train.seed=range(0,100000000)"], "sweep: has more than 10,000 points"),
        (["-m", "train.seed=range(0,200)", "data.seed=range(0,200)"], "sweep: has more than 10,000 points"),
        (["--resolve"], "--resolve: belongs to --cfg"),
        (["-sc", "bash"], "command line: Expecting one subcommand"),
        (["--config-dir", ""], "--config-dir: is empty"),
        (["check", "--cfg", "job"], "asks to show the configuration. Leave out check or store fill"),
        (["run.resume=last"], "there is no run under outputs/"),
        (["run.resume=nope"], "nope is not a run folder"),
        (["run.like=a", "run.resume=b"], "are both given"),
        (["-m", "run.resume=a", "train.seed=1,2"], "goes on with one run"),
    ],
)
def test_a_word_or_flag_that_is_none(argv, says, capfd):
    code, out, lines = run(capfd, *argv)
    assert (code, out, len(lines)) == (2, "", 1)
    assert says in lines[0]


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
@pytest.mark.parametrize("value", ["x", "", "-1", "1.5", "²"])
def test_a_launcher_that_says_no_number(capfd, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    code, out, lines = run(capfd, "train.seed=1")
    assert (code, out) == (2, "")
    assert f"{name}: is {value!r} in the environment, expected a number" in lines[0]


def test_help_is_given_whoever_is_asked(capfd):
    for argv in (["help"], ["check", "--help"], ["store", "fill", "-h", "train.seed=1"]):
        code, out, _ = run(capfd, *argv)
        assert (code, out[:11]) == (0, "kdx distils")


def test_flags_may_stand_anywhere_and_show_what_would_run(capfd):
    write("mine/teacher/mine.yaml", "defaults: [hf, _self_]\npath: /models/big\n")
    code, out, lines = run(capfd, *HF, "--cfg", "job", "train.max_steps=3", "-cd", "mine", "teacher=mine")
    assert (code, lines) == (0, [])
    shown = yaml.safe_load(out)
    assert (shown["train"]["max_steps"], shown["train"]["epochs"]) == (3, None)
    assert shown["teacher"]["path"] == "/models/big"


def test_help_lists_the_groups_and_ones_own_options(capfd):
    write("mine/teacher/mine.yaml", "defaults: [hf, _self_]\npath: /models/big\n")
    code, out, lines = run(capfd, "--help", "-cd", "mine")
    assert (code, lines) == (0, [])
    assert "teacher: dialogpt_large, dialogpt_medium, hf, mine, none, smollm2_135m" in out
    assert run(capfd, "--version")[:2] == (0, f"kdx {__version__}\n")


def test_a_folder_that_cannot_be_made_is_the_machines_error(capfd):
    Path("file").write_text("")
    code, _, lines = run(capfd, "hydra.run.dir=file/x")
    assert (code, len(lines)) == (3, 1)
    assert lines[0].startswith("kdx: error: file/x: ")


MACHINES = [getattr(errno, name) for name in ("EDQUOT", "EROFS", "EIO", "EFBIG", "EISDIR", "ENOTDIR", "EPERM")]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ConfigError("a", "b", "c"), 2, "kdx: error: a: b. c"),
        (PermissionError(13, "Permission denied", "/x"), 3, "kdx: error: /x: Permission denied"),
        (OSError(28, "No space left on device"), 3, "kdx: error: disk: No space left"),
        *((OSError(n, os.strerror(n)), 3, f"kdx: error: disk: {os.strerror(n)}") for n in MACHINES),
        (MemoryError(), 3, "train.micro_batch_size, train.gradient_checkpointing=true"),
        (RuntimeError("CUDA out of memory. Tried"), 3, "optim=adamw_8bit"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 3, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
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


def test_debugging_shows_the_traceback(monkeypatch, capfd):
    monkeypatch.setenv("KDX_DEBUG", "1")
    code, _, lines = run(capfd, "bad.key=1")
    assert code == 2
    assert lines[0].startswith("Traceback")


def recalled(*argv: str) -> list[str]:
    args = cli._parsed(list(argv))
    return cli._recalled(list(args.overrides), args)


def test_coming_back_takes_the_runs_words_and_lays_what_is_typed_over_them():
    folder = Path("outputs/2026-01-02/a b")
    typed.keep(folder, ["teacher=mine", "loss.alpha=0.3", "train.epochs=2", "train.max_steps=null", "sweep.name=s"], [])
    write(str(folder / "status.json"), "{}")
    in_place = [f"hydra.run.dir='{folder}'", "hydra.mode=RUN"]
    words = recalled(f"run.resume='{folder}'", "loss.alpha=0.5", "train.max_steps=9")
    assert words == ["teacher=mine", "sweep.name=s", "loss.alpha=0.5", "train.max_steps=9", *in_place]
    assert recalled("run.resume=last")[-2:] == in_place
    like = recalled(f"run.like='{folder}'", "+optim.eps=1e-6")
    assert like == ["teacher=mine", "loss.alpha=0.3", "train.epochs=2", "train.max_steps=null", "+optim.eps=1e-6"]
    assert recalled("run.resume=null", "train.seed=1") == ["run.resume=null", "train.seed=1"]


def test_coming_back_to_a_job_of_a_sweep_is_one_run():
    words = ["experiment=temperature_alpha", "loss.temperature=2", "loss.alpha=0.3", "sweep.name=s"]
    assert preflight([*words, "hydra.mode=RUN"], Source()).added == []


def test_coming_back_finds_the_folder_of_options_again():
    typed.keep(Path("outputs/a/b"), ["teacher=mine"], ["--config-dir", "/mine", "teacher=mine"])
    args = cli._parsed(["run.like=outputs/a/b"])
    cli._recalled(list(args.overrides), args)
    assert args.config_dir == "/mine"


@pytest.mark.parametrize(
    "text", ["", "\0\0", "- hydra.run.dir=/x\n", "a: 1\n", "- 3\n", "[", "- +hydra.callbacks.x=1\n"]
)
def test_words_that_are_not_a_runs_are_not_taken(text):
    write("r/overrides.yaml", text)
    with pytest.raises(ConfigError, match="holds words that are not a run's"):
        recalled("run.like=r")


def test_a_command_that_is_not_text_is_not_taken():
    write("r/overrides.yaml", "[]")
    Path("r/command.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"r/command\.txt: is not a command \("):
        recalled("run.resume=r")


def test_an_experiment_of_null_is_none(capfd):
    code, shown, lines = run(capfd, "--cfg", "job", "experiment=demo", "experiment=null")
    assert (code, lines) == (0, [])
    assert shown == run(capfd, "--cfg", "job")[1]


def test_the_record_has_no_secrets_and_is_never_written_over(monkeypatch):
    token, commit = "hf_" + "a1" * 12, "0123456789" * 4
    monkeypatch.setenv("MY_API_KEY", "open sesame")
    words = [
        f"tracking.notes={token}",
        f"teacher.revision={commit}",
        "+data.password=pass",
        "tracking.name=open sesame",
    ]
    typed.keep(Path("r"), words, words)
    typed.keep(Path("r"), ["other=1"], ["other=1"])
    kept = yaml.safe_load(Path("r/overrides.yaml").read_text())
    hidden = "[redacted]"
    wanted = [f"tracking.notes={hidden}", words[1], f"+data.password={hidden}", f"tracking.name={hidden}"]
    assert kept == wanted
    with pytest.raises(ConfigError, match="kept without its secret"):
        recalled("run.like=r")
    assert redact({"revision": commit, "other": commit}) == {"revision": commit, "other": hidden}
    plain = [
        f"teacher.revision='{commit}','{commit}'",
        f"snapshots/{commit}/x",
        f"data.path=/c/{commit}/train.jsonl",
        "+data.eos_token=</s>",
        "+data.max_tokens=8",
        "+data.api_key=???",
        "+data.auth={password: null, user: me}",
        "hf_datasets/t",
        "task-instructions-filtered",
    ]
    assert redact(plain) == plain
    assert redact({"password": 12345678, "is_token": True, "token": ["x", 1.5]}) == {
        "password": hidden,
        "is_token": True,
        "token": [hidden, hidden],
    }
    for auth in ("password: hunter2", "api_key: 'a, b'", "'token': ${oc.env:P,x}", "password: [a, b]"):
        key = auth.partition(":")[0]
        assert redact(f"+data.auth={{user: me, {auth}, a: 1}}") == f"+data.auth={{user: me, {key}: {hidden}, a: 1}}"
    for text in ("['password={}']", "[a,password={}]", "'password={}'", '"my.token={}"', "{{a: 'password={}'}}"):
        word = f"tracking.tags={text}"
        assert redact(word.format("hunter2")) == redact(redact(word.format("hunter2"))) == word.format(hidden)
        assert redact(word.format("null")) == word.format("null")
    assert redact(["https://me:pw@host/x", 3, None]) == [f"https://{hidden}@host/x", 3, None]


SECRET = "hf_" + "a1" * 12
IN_YAML = {
    "data: {password: pass}": "data.password",
    "data: {password: 'pre${oc.env:PW}'}": "data.password",
    "data: {password: '${oc.env:PW,pass}'}": "data.password",
    "data: {password: 12345678}": "data.password",
    "data: {password: [pass]}": "data.password[0]",
    "data: {password: null}\ntracking: {notes: open sesame}": "tracking.notes",  # what the environment holds
    f"tracking: {{notes: see {SECRET}}}": "tracking.notes",
    f"tracking: {{tags: [a, {SECRET}]}}": "tracking.tags[1]",
    "hydra: {sweeper: {params: {+data.password: pass}}}": "hydra.sweeper.params.+data.password",
    "hydra: {sweeper: {params: {+data.auth: '{a: {password: pass}}'}}}": "hydra.sweeper.params.+data.auth",
    f"hydra: {{launcher: {{comment: {SECRET}}}}}": "hydra.launcher.comment",
    "hydra: {launcher: {comment: '${oc.env:MY_API_KEY}'}}": "hydra.launcher.comment",  # resolved before it is kept
    "hydra: {launcher: {comment: '${data.password}'}}\ndata: {password: '${oc.env:PW}'}": "hydra.launcher.comment",
}


@pytest.mark.parametrize(("text", "key"), IN_YAML.items())
@pytest.mark.parametrize("launcher", ["submitit_local", "basic"])
def test_a_secret_in_ones_own_yaml_is_in_no_sweep(capfd, monkeypatch, text, key, launcher):
    monkeypatch.setenv("MY_API_KEY", "open sesame")
    monkeypatch.setenv("PW", "pass")
    if "comment" in text:
        if launcher == "basic":
            return
        text = text.replace("comment", "name")  # a key that submitit has everywhere
        key = key.replace("comment", "name")
    write("mine/experiment/own.yaml", f"# @package _global_\n{text}\n")
    words = ["--config-dir", "mine", "experiment=own", f"hydra/launcher={launcher}", "loss.temperature=1,2"]
    code, _, (line,) = run(capfd, "-m", *words)
    assert code == 2
    assert line.startswith(f"kdx: error: {key}: holds a secret, which ")
    assert "environment" in line
    assert not Path("outputs").exists()


def test_what_is_taken_from_the_environment_is_no_secret_of_a_sweep(monkeypatch):
    monkeypatch.setenv("PW", "pass")
    write(
        "mine/experiment/own.yaml",
        "# @package _global_\ndata: {password: '${oc.env:PW}', token: '${oc.env:PW, null}', api_key: '???', eos_token: a,\n"
        "  secret: \"${oc.env:PW,''}\", passwd: '${oc.env:PW,${oc.env:PW}}', credential: null, x: .nan}\n",
    )
    words = [
        "experiment=own",
        "loss.temperature=1,2",
        "teacher.revision=" + "0123456789" * 4,
        "data.api_key=${oc.env:PW}",
    ]
    plan = preflight(words, Source(config_dir="mine"), is_multirun=True)
    assert plan.num_points == 2
    assert not list(secrets_in({"data.password": "${oc.env:PW}", "tracking.notes": "https://me:${oc.env:PW}@host"}))


def test_a_secret_may_be_typed_as_what_the_environment_holds(capfd, monkeypatch):
    """What the mend says can be typed; the run then fails for another reason, before torch."""
    monkeypatch.setenv("PW", "pass")
    monkeypatch.setenv("KDX_PLUGINS", "no_such_module")
    words = ["-m", "loss.temperature=1", "sweep.baseline=false"]
    code, _, (line,) = run(capfd, *words, "+data.password=pass")
    assert (code, line.split(": ")[2]) == (2, "+data.password")
    code, _, lines = run(capfd, *words, "+data.password='${oc.env:PW}'")
    assert code == 5
    assert "no_such_module" in lines[0]
    (sweep,) = Path("outputs/sweeps").iterdir()
    assert all("pass\n" not in file.read_text() for file in sweep.rglob("*") if file.is_file())
    assert "password: ${oc.env:PW}" in (sweep / "multirun.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["+data.auth={password: hunter2}"], "+data.auth.password"),
        (["+data.auth=[{a: {token: 'b c'}}]"], "+data.auth[0].a.token"),
        (["++data.password=hunter2", "++data.password=${oc.env:HOME}"], "++data.password"),
        (["+data.password=[x]"], "+data.password[0]"),
        (["+data.password=12345678"], "+data.password"),
        (["+data.password='${oc.env:HOME}','hunter2'"], "+data.password"),
        (["+data.password='${oc.env:HOME,hunter2}'"], "+data.password"),
        (["hydra.launcher.setup=[\"export X=${oc.env:HF_TOKEN,''}\"]"], "hydra.launcher.setup[0]"),
        (['hydra.launcher.setup=["export X=${oc.env:HF_TOKEN,a}"]'], "hydra.launcher.setup[0]"),
    ],
)
def test_no_word_of_a_sweep_holds_a_secret_in_clear(capfd, words, key):
    launcher = ["hydra/launcher=submitit_slurm"] if "launcher" in key else []
    code, _, (line,) = run(capfd, "-m", "loss.temperature=1,2", *launcher, *words)
    assert code == 2
    assert line.startswith(f"kdx: error: {key}: h")
    assert "a secret, which" in line
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    "word",
    [
        "+data.password='${oc.env:P, null}'",
        "+data.password=\"${oc.env:P,''}\"",
        "+data.password='${oc.env:P}','${oc.env:Q}'",
        "+data.auth={password: '${oc.env:P}', token: null, eos_token: a}",
        "+data.pad_token=b",
        "+data.max_tokens=8",
        "tracking.notes='in short, a token: of thanks'",
        f"data.path=/c/{'0123456789' * 4}/train.jsonl",
    ],
)
def test_what_no_word_of_a_sweep_is_refused_for(word):
    typed = OverridesParser.create().parse_override(word)
    refuse_typed_secrets([(typed.get_key_element(), typed.value())])


def test_plugins_are_imported_and_their_source_kept(monkeypatch):
    def kept(names: str, folder: str) -> set[str]:
        """The files that are kept of these plug-ins."""
        monkeypatch.setenv("KDX_PLUGINS", names)
        plugins.load()
        plugins.keep(Path(folder))
        files = Path(folder, "plugins")
        return {file.relative_to(files).as_posix() for file in files.rglob("*.py")}

    write("my_kdx_loss.py", "LOADED = True\n")
    write("my_kdx_pack/__init__.py", "from my_kdx_pack import inner\n")
    write("my_kdx_pack/inner.py", "X = 1\n")
    own = {"my_kdx_loss.py", "my_kdx_pack/__init__.py", "my_kdx_pack/inner.py"}
    assert kept("my_kdx_loss, my_kdx_pack", "r") == own
    assert "my_kdx_loss" in sys.modules
    for name in ("my_kdx_loss", "my_kdx_pack", "my_kdx_pack.inner"):
        del sys.modules[name]
    write("my_kdx_main.py", "import json, my_kdx_lib.sums, my_kdx_help\n")
    write("my_kdx_help.py", "Y = 1\n")
    write("my_kdx_lib/sums.py", "Z = 1\n")
    assert kept("my_kdx_main", "r2") == {"my_kdx_main.py", "my_kdx_help.py", "my_kdx_lib/sums.py"}
    before = plugins.digest()
    plugins.load()  # as the next job of a sweep does
    assert plugins.digest() == before
    for name, text in (("my_kdx_help.py", "Y = 2\n"), ("my_kdx_lib/sums.py", "Z = 2\n")):
        write(name, text)
        assert plugins.digest() != before, "what a plug-in imports decides, too"
        before = plugins.digest()
    write("my_kdx_space/plug.py", "from my_kdx_space import other\n")  # a package without __init__.py
    write("my_kdx_space/other.py", "A = 1\n")
    assert kept("my_kdx_space.plug", "r3") == {"my_kdx_space/plug.py", "my_kdx_space/other.py"}


@pytest.mark.parametrize(("name", "why"), [("no_such_module", ""), ("my_kdx_script", ": SystemExit: 0")])
def test_plugins_that_cannot_be_imported(monkeypatch, name, why):
    write("my_kdx_script.py", "raise SystemExit(0)\n")
    monkeypatch.setenv("KDX_PLUGINS", name)
    with pytest.raises(KdxError, match=f"KDX_PLUGINS: cannot import {name}{why}"):
        plugins.load()


def test_a_sweep_goes_on_after_a_job_that_fails_and_ends_with_5(capfd, monkeypatch):
    monkeypatch.setenv("KDX_PLUGINS", "no_such_module")  # fails in the job, before torch is there
    code, _, lines = run(capfd, "-m", "loss.temperature=1,1.0,2", "+optim.eps=1e-6", "sweep.baseline=false")
    assert code == 5
    assert [line.split(" ")[1] for line in lines[:3]] == ["error:"] * 3
    assert lines[3] == "kdx: 2 job(s) of the sweep failed:"  # 1 and 1.0 are one
    (sweep,) = Path("outputs/sweeps").iterdir()
    jobs = sorted(path for path in sweep.iterdir() if path.is_dir())
    assert [job.name.split("_")[0] for job in jobs] == ["temperature-1", "temperature-2"]
    assert "loss.temperature=1" in yaml.safe_load((jobs[0] / "overrides.yaml").read_text())
    assert (
        jobs[0] / "command.txt"
    ).read_text() == "python -m kdx -m loss.temperature=1,1.0,2 +optim.eps=1e-6 sweep.baseline=false\n"
