"""A sweep under joblib and submitit, in real processes: what the basic launcher promises holds there."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from processes import environment
from standins import write_place

from kdx.run import owner
from kdx.run.devices import num_cores

PLUGIN = '''
import json, os, signal, time
from pathlib import Path
import torch
from kdx.loss import forward_kl, register

calls = 0

def hold():
    Path(f"held-{os.getpid()}").touch()
    while not Path("go").exists():
        time.sleep(0.01)

if Path("hold-imports").exists():
    hold()

@register
def own(student, teacher, most: float = 9.0):
    """Forward KL that breaks for one point of a sweep, and is preempted once at another."""
    global calls
    calls += 1
    if calls == 1:
        with open("seen.jsonl", "a") as file:
            told = {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "threads": torch.get_num_threads(), "pid": os.getpid()}
            file.write(json.dumps(told) + chr(10))
    if most >= 4 and len(student) > 2 and Path("hold-steps").exists():  # not where it is tried on two rows
        hold()
    if most == 0:
        raise RuntimeError("most is too small")
    if most == 2 and calls == 6 and "SUBMITIT_FOLDER" in os.environ and not Path("preempted").exists():
        Path("preempted").touch()
        os.kill(os.getpid(), signal.SIGTERM)  # as Slurm does, and submitit passes over
        os.kill(os.getpid(), signal.SIGUSR2)
    return forward_kl(student, teacher)
'''
WORDS = ["-m", "teacher=hf", "teacher.path=medium", "student=hf", "student.path=small", "data=pairs"]
WORDS += ["data.path=pairs.jsonl", "loss.name=own", "train.max_steps=5", "train.log_every=1"]
OWN = environment(KDX_PLUGINS="my_plugin")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    write_place(folder)
    (folder / "my_plugin.py").write_text(PLUGIN)
    return folder


def kdx(
    place: Path, *words: str, points: str = "0,2", program: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python -m kdx` with the sweep's words and these."""
    left_out = ("WANDB_", "HF_", "KDX_", "OMP_", "MKL_", "CUDA_", "SLURM_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    clean |= {"HF_HUB_OFFLINE": "1", "NETRC": "none", "KDX_PLUGINS": "my_plugin"}
    command = [sys.executable, *(["-c", program] if program else ["-m", "kdx"]), *WORDS, f"+loss.most={points}", *words]
    return subprocess.run(command, cwd=place, env=clean | environment, capture_output=True, text=True, check=False)


def states(sweep: Path) -> dict[str, str]:
    return {f.parent.name: json.loads(f.read_text())["state"] for f in sorted(sweep.glob("*/status.json"))}


def seen(place: Path) -> list[dict]:
    """What each job noted of its process."""
    file = place / "seen.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.unlink()
    return lines


def check_outcome(told: subprocess.CompletedProcess[str], sweep: Path) -> None:
    """One job failed and is told of, the baseline and the other are done and compared."""
    assert told.returncode == 5, told.stderr
    assert "2 points + 1 baseline (alpha=0)" in told.stdout
    jobs = states(sweep)
    (failed,) = (name for name, state in jobs.items() if state == "failed")
    assert sorted(name.split("_")[0] for name in jobs) == ["baseline", "most-0", "most-2"]
    assert sorted(jobs.values()) == ["done", "done", "failed"]
    assert failed.startswith("most-0_")
    last = told.stderr.splitlines()[-2:]
    assert last[0] == "kdx: 1 job(s) of the sweep failed:"
    assert last[1].endswith(f"{failed}: failed: RuntimeError: most is too small")
    (table,) = json.loads((sweep / "compare.json").read_text())["tables"]
    assert len(table["students"]) == 2
    for job in jobs:
        assert (sweep / job / "command.txt").read_text().startswith("python -m kdx -m teacher=hf teacher.path=medium ")
        assert (sweep / job / "plugins" / "my_plugin.py").read_text() == PLUGIN


def test_joblib(place: Path) -> None:
    """Each job has a GPU of its own and a share of the cores; the same command again runs what failed, and only that."""
    words = ("hydra/launcher=parallel", "sweep.name=joblib", "tracking.mode=disabled")
    sweep = place / "outputs" / "sweeps" / "joblib"
    check_outcome(kdx(place, *words, CUDA_VISIBLE_DEVICES="3,5"), sweep)
    jobs = seen(place)
    assert {job["threads"] for job in jobs} == {max(1, num_cores() // 2)}
    assert {job["gpu"] for job in jobs} <= {"3", "5"}
    assert len({job["gpu"] for job in jobs}) == len({job["pid"] for job in jobs})  # a process keeps its own
    done = [name for name, state in states(sweep).items() if state == "done"]
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for n in done for p in (sweep / n).rglob("*") if p.is_file()}
    again = kdx(place, *words)
    assert again.returncode == 5, again.stderr
    assert again.stdout.count("is done already") == 2
    assert len(seen(place)) == 1
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in before}


@pytest.mark.parametrize(
    ("whom", "number", "points"),
    [
        ("command", signal.SIGTERM, "4,5,6"),  # as `kill` does; of three jobs two are running
        ("group", signal.SIGINT, "2,4,5"),  # as Ctrl-C and Slurm do; one of three processes is idle, or compares
    ],
)
def test_a_signal_to_a_sweep_under_joblib_loses_nothing(
    place: Path, whom: str, number: signal.Signals, points: str
) -> None:
    """The jobs that run finish their step and save, no other is begun; the same command goes on."""
    sweep = place / "outputs" / "sweeps" / f"stopped-{whom}"
    with holding(place, "steps", sweep.name, points) as (command, process):
        until(lambda: list(states(sweep).values()).count("done") == points.count("2"), process)
        os.kill(process.pid, number)
        if whom == "group":
            os.killpg(process.pid, number)  # so does `timeout`: first the command, then its group
        until(lambda: said(place).count("stopping at the next safe point") == 2, process)
        (place / "go").touch()
        assert process.wait() == 128 + number, said(place)
    assert said(place).splitlines()[-1] == "kdx: stopped; the same command goes on"
    assert sorted(states(sweep).values()) == [*["done"] * points.count("2"), "interrupted", "interrupted"]
    assert [path.name for path in sweep.glob("*/checkpoints/*")] == ["step-00000001"] * 2
    assert not list(sweep.glob(".notes-*"))
    again = subprocess.run(command, cwd=place, env=OWN, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert list(states(sweep).values()) == ["done"] * 3
    assert again.stdout.count("going on from") == 2
    for file in sweep.glob("*/metrics.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5]


def test_a_signal_to_a_sweep_under_joblib_whose_processes_still_import(place: Path) -> None:
    with holding(place, "imports", "imports", "4,5") as (command, process):
        os.killpg(process.pid, signal.SIGTERM)
        until(lambda: "stopping all jobs at a safe point" in said(place), process)
        (place / "go").touch()
        assert process.wait() == 143, said(place)
    assert said(place).splitlines()[-1] == "kdx: stopped; the same command goes on"
    assert states(place / "outputs" / "sweeps" / "imports") == {}
    assert subprocess.run(command, cwd=place, env=OWN, capture_output=True, check=False).returncode == 0


def test_a_second_signal_to_a_sweep_under_joblib_ends_it_at_once(place: Path) -> None:
    """The command and its processes, which would go on for ever."""
    with holding(place, "steps", "twice", "4,5") as (_, process):
        os.killpg(process.pid, signal.SIGINT)
        until(lambda: "stopping all jobs at a safe point" in said(place), process)
        while process.poll() is None:  # the second counts a second after the first
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.05)
        assert process.wait() == 130
        assert not list((place / "outputs" / "sweeps" / "twice").glob(".notes-*"))
        for _ in range(200):
            left = subprocess.run(
                ["ps", "-o", "stat=", "-g", str(process.pid)], capture_output=True, check=False
            ).stdout.decode()
            if all(state.startswith("Z") for state in left.split()):  # gone, or waiting to be asked what became of it
                return
            time.sleep(0.05)
        pytest.fail(f"still there: {left}")


@contextmanager
def holding(place: Path, what: str, name: str, points: str) -> Iterator[tuple[list[str], subprocess.Popen[str]]]:
    """A sweep under joblib in a process group of its own, of which two jobs wait in their imports or first steps."""
    words = [*WORDS, f"+loss.most={points}", f"sweep.name={name}", "sweep.baseline=false"]
    words += ["tracking.mode=disabled", "hydra/launcher=parallel", f"hydra.launcher.n_jobs={2 + points.count('2')}"]
    command = [sys.executable, "-m", "kdx", *words]
    (place / f"hold-{what}").touch()
    with (place / "said.txt").open("w") as file:
        process = subprocess.Popen(
            command, cwd=place, env=OWN, stdout=file, stderr=file, text=True, start_new_session=True
        )
    try:
        until(lambda: len(list(place.glob("held-*"))) == 2, process)
        yield command, process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pattern in ("hold-*", "held-*", "go"):
            for file in place.glob(pattern):
                file.unlink()


def said(place: Path) -> str:
    """What that sweep printed so far."""
    return (place / "said.txt").read_text()


def until(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Look until something is so, as long as the process lives."""
    while not is_so():
        assert process.poll() is None
        time.sleep(0.05)


def test_what_is_refused_before_a_done_job_is_opened_is_told_in_the_end(place: Path) -> None:
    """A link in one folder that leads elsewhere, and another that a process holds: exit 5, and neither is touched."""
    words = ["sweep.name=refused", "tracking.mode=disabled", "sweep.baseline=false"]
    sweep = place / "outputs" / "sweeps" / "refused"
    assert kdx(place, *words, points="2,3").returncode == 0
    linked, held = sorted(sweep.glob("most-*"))
    (linked / "student" / "link").symlink_to(place / "pairs.jsonl")
    status = json.loads((held / "status.json").read_text())
    status |= {"state": "running", "owner": owner.this_process()}
    (held / "status.json").write_text(json.dumps(status))

    def files() -> dict[Path, tuple[int, bytes]]:
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sweep.glob("most-*/**/*") if p.is_file()}

    before = files()
    for launcher in ("basic", "parallel", "submitit_local"):
        with owner.locked(held):
            told = kdx(place, *words, f"hydra/launcher={launcher}", points="2,3")
        assert told.returncode == 5, told.stderr
        head, *reasons = told.stderr.splitlines()[-3:]
        assert head == "kdx: 2 job(s) of the sweep failed:"
        elsewhere = f"is a link that leads elsewhere, to {place / 'pairs.jsonl'}. Remove the link"
        assert reasons[0].endswith(f"{linked.name}: failed: {linked / 'student' / 'link'}: {elsewhere}")
        assert f"{held.name}: failed: {held}: in use by pid {os.getpid()} on host " in reasons[1]
        assert files() == before
        assert not list(sweep.glob(".notes-*"))


def test_submitit_with_a_job_that_is_preempted(place: Path) -> None:
    """It saves, is started again by submitit, and goes on in its folder under its W&B id, as if it had not been."""
    words = ("hydra/launcher=submitit_local", "sweep.name=submitit", "tracking.mode=offline")
    sweep = place / "outputs" / "sweeps" / "submitit"
    check_outcome(kdx(place, *words, OMP_NUM_THREADS="1"), sweep)
    assert (place / "preempted").exists()
    (job,) = sweep.glob("most-2_*")
    log = (job / "kdx.log").read_text()
    assert "stopped after step" in log
    assert "going on from" in log
    steps = [
        json.loads(line)["step"] for line in (job / "metrics.jsonl").read_text().splitlines() if "train/loss" in line
    ]
    assert steps == [1, 2, 3, 4, 5]
    kept = (job / "wandb_id.txt").read_text().strip()
    assert len(list((sweep / "wandb").glob(f"offline-run-*-{kept}"))) == 2
    joblib = next((place / "outputs" / "sweeps" / "joblib").glob("most-2_*"))
    assert job.name == joblib.name


def test_submitit_keeps_no_secret_of_the_environment(place: Path) -> None:
    """A source takes its password from the environment, by one's own YAML: the job has it, and no file."""
    (place / "asks.py").write_text(
        "from pathlib import Path\nfrom kdx.data.sources import register_source\n\n"
        "@register_source\ndef asks(path, password: str):\n    assert password == 'open' + 'sesame'\n"
        "    for i in range(20):\n        yield {'source': f'What is {i}?', 'target': f'It is {i}.'}\n"
    )
    (place / "mine/experiment").mkdir(parents=True)
    (place / "mine/experiment/own.yaml").write_text(
        "# @package _global_\ndefaults: [{override /data: custom}]\n"
        "data: {name: asks, path: nowhere, password: '${oc.env:DB_PW}'}\n"
    )
    words = ["--config-dir", "mine", "experiment=own", "hydra/launcher=submitit_local", "sweep.name=secret"]
    words += ["sweep.baseline=false", "tracking.mode=disabled", "train.max_steps=1", "loss.temperature=1"]
    base = [
        word
        for word in WORDS
        if word.split("=")[0] not in ("data", "data.path", "loss.name", "+loss.most", "train.max_steps")
    ]
    command = [sys.executable, "-m", "kdx", *base, *words]
    told = environment(KDX_PLUGINS="asks", DB_PW="opensesame")
    done = subprocess.run(command, cwd=place, env=told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = [file for file in (place / "outputs").rglob("*") if file.is_file()]
    assert not [file for file in files if b"opensesame" in file.read_bytes()]
    pickles = list((place / "outputs/sweeps/secret").rglob("*.pkl"))
    assert [b"${oc.env:DB_PW}" in file.read_bytes() for file in pickles] == [True] * 2


def test_without_the_plug_in_the_command_that_installs_it_is_told(place: Path) -> None:
    program = "import hydra_plugins; hydra_plugins.__path__ = []\nfrom kdx.cli import main; main()"
    for launcher, package in (("parallel", "joblib"), ("slurm", "submitit"), ("submitit_local", "submitit")):
        told = kdx(place, f"hydra/launcher={launcher}", program=program)
        assert told.returncode == 2
        what = f"needs the package hydra-{package}-launcher, which is not installed"
        mend = f"pip install hydra-{package}-launcher"
        assert told.stderr == f"kdx: error: hydra/launcher: {what}. {mend}\n"


def test_a_launcher_that_can_start_nothing_is_the_machines_fault(place: Path) -> None:
    told = kdx(place, "hydra/launcher=slurm", "sweep.name=nowhere", PATH="")
    assert told.returncode == 3
    assert "Could not detect" in told.stderr.splitlines()[-1]
    assert states(place / "outputs" / "sweeps" / "nowhere") == {}
