"""W&B's real client in real kdx processes: online against a stand-in for the server, offline, and in trouble.

Two of these tests start processes in the short suite; the others do so with --full alone.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from standins import FUSSY, write_place
from wandb.sdk.launch.sweeps import utils as agent
from wandb_server import KEY, Server, StoredRun

from kdx.cli import compose
from kdx.run import labels
from kdx.run.folder import Record, RunFolder
from kdx.run.tracking import Tracker, logging_to
from kdx.words import CONF

only_full = pytest.mark.usefixtures("_only_full")
SECRET = "hf_abcdefgh12345678"
SWEEP = CONF / "wandb_sweep.yaml"
NOBODY = "http://127.0.0.1:9"  # the discard port
PLUGIN = '''
import os, signal, urllib.request
from kdx.loss import forward_kl, register

calls = 0

@register
def eventful(student, teacher):
    """Forward KL; at the sixth call of a process happens what the environment says."""
    global calls
    calls += 1
    if calls == 6 and os.environ["EVENT"].startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, os.environ["EVENT"]))
    elif calls == 6 and os.environ["EVENT"] == "vanish":
        urllib.request.urlopen(os.environ["WANDB_BASE_URL"] + "/vanish", b"", timeout=60).read()
    return forward_kl(student, teacher)
'''
PLUGIN += FUSSY


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to type commands in: models, data, plug-ins, and a git repository with a change in it."""
    folder = tmp_path_factory.mktemp("wandb")
    write_place(folder)
    (folder / "plugin.py").write_text(PLUGIN)
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@example.com"]
    for words in (["init", "-q"], ["add", "plugin.py"], ["commit", "-qm", "begun"]) if shutil.which("git") else ():
        subprocess.run([*git, *words], cwd=folder, check=True)
    (folder / "plugin.py").write_text(PLUGIN + "# changed since\n")
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def _only_full(full: bool) -> None:
    if not full:
        pytest.skip("starts processes: --full")


def run(place: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python module with nothing of W&B's from outside."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "HF_", "KDX_"))}
    clean |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NETRC": "none", "KDX_PLUGINS": "plugin", "EVENT": "none"}
    clean |= {f"WANDB_{name}_DIR": str(place / "home") for name in ("CONFIG", "CACHE", "DATA")}
    clean |= {"WANDB_ERROR_REPORTING": "false"}
    command = (sys.executable, "-m", *command)
    return subprocess.run(
        command, cwd=place, env=clean | environment, capture_output=True, text=True, check=False, timeout=120
    )


BASE = ["teacher=hf", "teacher.path=medium", "student=hf", "student.path=small", "data=pairs", "optim.lr=1e-2"]
BASE += ["data.path=pairs.jsonl", "data.validation=8", "train.max_steps=8", "train.batch_size=4", "train.log_every=1"]


def kdx(place: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run kdx on the small models; words come before those of every test, and win over them."""
    typed = {word.split("=")[0] for word in words}
    base = [] if "run.resume" in typed else [word for word in BASE if word.split("=")[0] not in typed]
    return run(place, "kdx", *words, *base, **environment)


def sync(place: Path, server: Server, told: str) -> None:
    """Do as kdx said: the last `wandb sync …` among its lines."""
    _, said = told.rsplit("wandb sync ", 1)
    done = run(place, "wandb", "sync", *shlex.split(said.splitlines()[0]), **server.environment)
    assert done.returncode == 0, done.stderr


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def stored(server: Server, run_dir: Path) -> StoredRun:
    return server.runs[(run_dir / "wandb_id.txt").read_text().strip()]


def steps(stored_run: StoredRun) -> list[int]:
    return [row["_step"] for row in stored_run.history if "train/loss" in row]


@pytest.fixture(scope="module")
def online(place: Path, server: Server) -> StoredRun:
    """A plain run online, with secrets among its words, as the server has it."""
    words = ["loss.temperature=3", "hydra.run.dir=outputs/online", f"tracking.notes={SECRET}"]
    words += ["tracking.log_model=end", "tracking.group=together"]
    words += ["tracking.tags=[one,open sesame]"]
    told = kdx(place, *words, MY_TOKEN="open sesame", **server.environment)
    assert told.returncode == 0, told.stderr
    kept = stored(server, place / "outputs" / "online")
    assert f"W&B: {server.url}/team/kdx/runs/{kept.id}" in told.stdout
    return kept


def test_a_run_online(place: Path, online: StoredRun) -> None:
    """All of a run arrives: what it is called and belongs to, config, curves over tokens, final figures, samples."""
    kept, run_dir = online, place / "outputs" / "online"
    assert kept.exit_codes == [0]
    assert kept.about["displayName"] == "medium → small · forward_kl α0.7 τ3"
    assert kept.about["jobType"] == "student"
    assert kept.about["groupName"] == "together"
    assert set(kept.about["tags"]) == {"forward_kl", "medium", "small", "one", "[redacted]"}
    assert kept.about["notes"] == "[redacted]"

    assert kept.config["loss"]["temperature"] == 3
    assert kept.config["student"]["path"] == "small"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert {"loss.temperature=3", "train.max_steps=8"} <= {*kept.config["typed"]}
    resolved = kept.config["resolved"]
    assert kept.config["data"]["max_length"] == 128
    assert resolved["steps"] == summary["run"]["steps"]
    assert resolved["student_parameters"] == summary["student"]["num_parameters"]
    assert resolved["teacher_parameters"] == summary["teacher"]["num_parameters"]
    expected = {key: value for key, value in (summary["data"] | summary["environment"]).items() if value != {}}
    assert {key: resolved[key] for key in expected} == expected
    assert not {"run", "sweep", "tracking"} & kept.config.keys()
    told_metrics = kept.config["_wandb"]["m"]
    names = [metric.get("1") for metric in told_metrics]
    (every,) = (metric for metric in told_metrics if metric.get("2") == "*")
    assert names[every["5"] - 1] == "tokens"  # an index from 1

    logged: dict[int, dict] = {}
    for line in lines(run_dir / "metrics.jsonl"):
        logged.setdefault(line["step"], {}).update(line)
    assert steps(kept) == list(logged) == list(range(1, 9))
    for row in kept.history:
        assert logged[row["_step"]].items() <= (row | {"step": row["_step"]}).items()

    for name, part in (("eval", "student"), ("untouched", "untouched"), ("teacher", "teacher")):
        for measure in ("ce", "kl", "reverse_kl", "agreement", "accuracy", "perplexity", "num_parameters"):
            assert kept.summary.get(f"{name}/{measure}") == summary[part][measure]
    assert kept.summary["run/tokens"] == summary["run"]["tokens"]
    assert (kept.summary["alpha"], kept.summary["temperature"]) == (0.7, 3)
    logged_lines = "\n".join(kept.lines["output.log"])
    assert "teacher         medium, 65,216 parameters" in logged_lines and "step 8/8  eval/ce" in logged_lines

    (table,) = (json.loads(file) for name, file in kept.files.items() if name.startswith("media/table/samples"))
    assert table["columns"] == ["prompt", "reference", "teacher", "untouched", "student"]
    samples = json.loads((run_dir / "samples.json").read_text())
    assert [row[-1] for row in table["data"]] == [sample["student"] for sample in samples]


def test_the_student_as_an_artifact(place: Path, server: Server, online: StoredRun) -> None:
    """tracking.log_model=end uploads what is in student/, card included."""
    (number,) = (i for i, made in enumerate(server.artifacts, 1) if made["artifactTypeName"] == "model")
    assert server.artifacts[number - 1]["runName"] == online.id
    sent = {name: body for (of, name), body in server.artifact_files.items() if of == str(number)}
    del sent["wandb_manifest.json"]
    assert sent == {file.name: file.read_bytes() for file in (place / "outputs/online/student").iterdir()}


def test_neither_secrets_nor_code_leave_the_machine(server: Server, online: StoredRun) -> None:
    """Whatever was sent, in any request: a typed token, one of the environment, W&B's own key, uncommitted lines."""
    assert b"loss.temperature=3" in online.files["wandb-metadata.json"]  # the command is kept, but not …
    everything = b"".join(server.received)
    for secret in (SECRET, "open sesame", KEY, "changed since"):
        assert secret.encode() not in everything
    assert not [name for name in online.files if "diff" in name or "code" in name]


@only_full
def test_a_stopped_run_goes_on_in_its_wandb_run(place: Path, server: Server) -> None:
    """Stopped twice and gone on with, once online and once offline: still one run, each step once."""
    words = ["loss.name=eventful", "train.max_steps=14", "hydra.run.dir=outputs/stopped"]
    told = kdx(place, *words, EVENT="SIGTERM", **server.environment)
    assert told.returncode == 143, told.stderr
    kept, known = stored(server, place / "outputs" / "stopped"), set(server.runs)
    first = len(steps(kept))
    assert 0 < first < 7
    resume = next(word for word in told.stderr.split() if word.startswith("run.resume="))
    asked = server.asked.count("RunResumeStatus")
    online = kdx(place, resume, EVENT="SIGTERM", **server.environment)
    assert online.returncode == 143, online.stderr
    assert server.asked.count("RunResumeStatus") == asked + 1
    assert kept.exit_codes == [143, 143]
    assert steps(kept) == list(range(1, 2 * first + 1))
    offline = kdx(place, resume, WANDB_MODE="offline")
    assert offline.returncode == 0, offline.stderr
    sync(place, server, offline.stdout)
    assert set(server.runs) == known
    assert kept.exit_codes == [143, 143, 0]
    assert steps(kept) == list(range(1, 15))
    logged = {line["step"]: line["tokens"] for line in lines(place / "outputs" / "stopped" / "metrics.jsonl")}
    assert {row["_step"]: row["tokens"] for row in kept.history} == logged


def test_a_server_that_vanishes_costs_nothing_but_the_wait(place: Path) -> None:
    """The server falls silent in mid-run: the same student, an end in time, and a line that uploads the rest."""
    told = kdx(place, "loss.name=eventful", "tracking.mode=disabled", "hydra.run.dir=outputs/without")
    assert told.returncode == 0, told.stderr
    without, run_dir = load_file(place / "outputs/without/student/model.safetensors"), place / "outputs/lost"
    with Server() as server:
        environment = server.environment | {"EVENT": "vanish", "WANDB_FINISH_TIMEOUT": "1"}
        told = kdx(place, "loss.name=eventful", "hydra.run.dir=outputs/lost", **environment)
        waited = time.time() - (run_dir / "summary.json").stat().st_mtime
        assert told.returncode == 0, told.stderr
        assert "Traceback" not in told.stderr and "kdx: error" not in told.stderr
        assert waited < 30  # seconds, on a busy machine; its finish_timeout is 1 s
        student = load_file(run_dir / "student/model.safetensors")
        assert all(torch.equal(student[name], weight) for name, weight in without.items())
        assert told.stdout.count("warning: W&B") == 1
        assert json.loads((run_dir / "status.json").read_text())["state"] == "done"
        kept = stored(server, run_dir)
        assert not server.answering.is_set()
        assert kept.exit_codes == []
        server.answering.set()
        sync(place, server, told.stdout)
        assert steps(kept) == list(range(1, 9))
        assert kept.exit_codes[-1] == 0


def check_comparison(server: Server, sweep: Path) -> StoredRun:
    """Compare a sweep's runs at the server, and the run `comparison`, with the files of the sweep."""
    arrived = {kept.id: kept for kept in server.runs.values() if kept.about.get("groupName") == sweep.name}
    for file in sweep.glob("*/wandb_id.txt"):
        kept = arrived.pop(file.read_text().strip())
        summary = json.loads((file.parent / "summary.json").read_text())
        taken = {name: value for name, value in summary["student"].items() if value is not None}
        assert {kept.summary[f"eval/{name}"] == value for name, value in taken.items()} == {True}
        assert (kept.about["jobType"] == "baseline") == ("temperature" not in kept.summary)
        curve = [line for line in lines(file.parent / "metrics.jsonl") if "eval/kl" in line]
        assert [row["eval/kl"] for row in kept.history if "eval/kl" in row] == [line["eval/kl"] for line in curve]
        assert len(curve) > 1
        assert steps(kept) == list(range(1, 9))
    (comparison,) = arrived.values()
    assert (comparison.about["displayName"], comparison.about["jobType"]) == ("comparison", "comparison")
    files = {name: body for name, body in comparison.files.items() if name.startswith("media/")}
    (page,) = (body for name, body in files.items() if name.startswith("media/html/page"))
    assert page == (sweep / "compare.html").read_bytes()
    (table,) = (json.loads(body) for name, body in files.items() if name.startswith("media/table/ranking"))
    (ranked,) = json.loads((sweep / "compare.json").read_text())["tables"]
    for cells, student in zip(table["data"], ranked["students"], strict=True):
        row = dict(zip(table["columns"], cells, strict=True))
        assert row["point"].endswith(student["label"])
        assert (row["pareto"], "kl" in row["tied"]) == (student["pareto_front"], student["kl_is_best"])
        intervals = ("kl_minus_best_low", "ce_minus_best_high", "agreement_minus_best_low")
        for name in ("kl", "ce", "agreement", *intervals, "runs"):
            assert row.get(name) == student.get(name)
    assert {name.split("/")[3].rsplit("_", 2)[0] for name in files if "images" in name} >= {"CE_against_KL", "KL", "CE"}
    return comparison


SIX = ["-m", "loss.temperature=1,2,4", "loss.alpha=0.3,0.7", "loss.name=eventful", "tracking.samples=false"]


def test_a_sweep_online(place: Path, server: Server) -> None:
    """Six points and their baseline, killed once and typed again: a group, named by what differs, compared once."""
    words, sweep = [*SIX, "sweep.name=six"], place / "outputs/sweeps/six"
    killed = kdx(place, *words, EVENT="SIGKILL", **server.environment)
    assert killed.returncode == -9, killed.stderr
    ids = {file: file.read_text() for file in sweep.glob("*/wandb_id.txt")}
    assert len(ids) == 2  # the baseline, and the job that was killed
    told = kdx(place, *words, **server.environment)
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines()[-1] == f"kdx: W&B: {server.url}/team/kdx/groups/six"
    assert {file: file.read_text() for file in ids} == ids
    check_comparison(server, sweep)
    names = {kept.about["displayName"] for kept in server.runs.values() if kept.about.get("groupName") == "six"}
    assert names == {"baseline", "comparison", *(f"τ={t} α={a}" for t in (1, 2, 4) for a in (0.3, 0.7))}
    known = len(server.received)
    again = kdx(place, *words, **server.environment)
    assert again.stdout.splitlines()[-1] == told.stdout.splitlines()[-1]
    assert len(server.received) == known  # nothing new, nothing sent


@only_full
def test_a_sweep_without_a_server(place: Path, server: Server) -> None:
    """Each job says in one line that it is kept offline; killed and typed again, one `wandb sync` brings all."""
    absent = {"WANDB_BASE_URL": NOBODY, "WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "1"}
    assert kdx(place, *SIX, "sweep.name=later", EVENT="SIGKILL", **absent).returncode == -9
    told = kdx(place, *SIX, "sweep.name=later", **absent)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("cannot reach W&B") == 6  # the baseline was done; the comparison says it elsewhere
    assert told.stdout.splitlines()[-1].startswith("kdx: W&B: offline; to upload: wandb sync ")
    sync(place, server, told.stdout)
    check_comparison(server, place / "outputs/sweeps/later")


@only_full
def test_a_failed_run_alerts(place: Path, server: Server) -> None:
    """If tracking.alerts asks for it."""
    words = ["loss.name=fussy", "+loss.most=0.5", "hydra.run.dir=outputs/failed", "tracking.alerts=true"]
    assert kdx(place, *words, **server.environment).returncode == 1
    (alert,) = server.alerts
    assert (alert["title"], alert["severity"]) == ("A run failed", "ERROR")
    assert alert["text"].endswith("most is too small")


@pytest.fixture(scope="module")
def swept(place: Path) -> Path:
    """A sweep of a loss's option, kept offline."""
    words = ["-m", "loss.name=fussy", "+loss.most=2,3", "loss.alpha=0.3", "sweep.name=swept", "train.max_steps=2"]
    told = kdx(place, *words, WANDB_MODE="offline")
    assert told.returncode == 0, told.stderr
    return place / "outputs/sweeps/swept"


@only_full
def test_a_dashboard_of_a_sweep(place: Path, swept: Path, server: Server) -> None:
    """Saved by the real library once the runs are synced."""
    sync(place, server, "wandb sync outputs/sweeps/swept/wandb")
    for _ in range(2):  # the second time it is renewed
        told = run(place, "kdx", "compare", "outputs/sweeps/swept", "--wandb", **server.environment)
        assert (told.returncode, told.stderr) == (0, "")
    (view,) = server.views
    assert told.stdout.splitlines()[-1] == f"Dashboard: {server.url}/team/kdx?nw={view['name'][3:-2]}"
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("team", "kdx", "kdx: swept")

    section = json.loads(view["spec"])["section"]
    (shown,) = section["runSets"][0]["filters"]["filters"]
    ids = {file.read_text().strip() for file in swept.glob("*/wandb_id.txt")}
    assert (shown["key"], shown["op"], set(shown["value"])) == ({"section": "run", "name": "name"}, "IN", ids)
    panels = [panel for part in section["panelBankConfig"]["sections"] for panel in part["panels"]]
    kinds = {kind: [p["config"] for p in panels if p["viewType"] == kind] for kind in (p["viewType"] for p in panels)}
    assert sorted(kinds) == ["Parallel Coordinates Plot", "Run History Line Plot", "Scatter Plot"]
    (scatter, plane), (parallel,) = kinds["Scatter Plot"], kinds["Parallel Coordinates Plot"]
    assert {scatter["xAxis"], scatter["yAxis"]} == {"summary:eval/kl", "summary:eval/ce"}
    assert scatter["zAxis"] == "summary:run/effective_alpha_end"
    assert all("run/effective_alpha_end" in server.runs[name].summary for name in ids)
    assert (plane["xAxis"], plane["yAxis"]) == ("config:loss.value.temperature", "config:loss.value.alpha")
    assert [part["isOpen"] for part in section["panelBankConfig"]["sections"]] == [True, True, False]
    bands = [curve for curve in kinds["Run History Line Plot"] if curve["metrics"][0].startswith("eval/")]
    assert {(curve["groupBy"], curve["groupArea"]) for curve in bands} == {("point.value", "minmax")}
    axes = [column["accessor"] for column in parallel["columns"]]
    assert {"config:loss.value.most", "config:loss.value.alpha"} <= set(axes)
    assert {"summary:eval/kl", "summary:eval/ce"} <= set(axes)
    assert {curve["xAxis"] for curve in kinds["Run History Line Plot"]} == {"tokens"}
    curves = {name for curve in kinds["Run History Line Plot"] for name in curve["metrics"]}
    assert {"eval/kl", "eval/ce", "train/loss", "train/effective_alpha"} <= curves

    runs = [server.runs[name] for name in ids]  # all that the panels name has been logged
    assert curves <= {key for kept in runs for row in kept.history for key in row}
    assert {axis.split(":")[1] for axis in axes if axis.startswith("summary:")} <= runs[0].summary.keys()
    assert {kept.config["loss"].get("most") for kept in runs} == {None, 2, 3}


def test_the_sweep_for_wandb_agents_drives_the_same_command_line() -> None:
    """W&B's own code makes the agent's command of the YAML; its words compose."""
    config = yaml.safe_load(SWEEP.read_text(encoding="utf-8"))
    assert config["metric"]["name"] == "eval/kl"
    values = {
        key: {"value": (node.get("values") or [node.get("max")])[-1]} for key, node in config["parameters"].items()
    }
    made = agent.create_sweep_command_args({"args": values})
    command = agent.create_sweep_command(config["command"])
    words = [word for part in command for word in made.get(part.strip("${}"), [part])]
    assert words[:4] == ["${env}", "python", "-m", "kdx"]
    loss = compose(words[4:]).loss
    assert {f"loss.{key}": {"value": getattr(loss, key)} for key in ("temperature", "alpha")} == values


@only_full
def test_a_wandb_agent(place: Path, server: Server) -> None:
    """A real agent takes two points from the server: their runs have its ids and are in its sweep."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    server.sweep = yaml.safe_load(SWEEP.read_text(encoding="utf-8"))
    server.sweep["command"] += BASE
    server.points = {f"point{i}": {"loss.temperature": 2 * i, "loss.alpha": 0.5} for i in (1, 2)}
    told = run(place, "wandb", "agent", "team/kdx/chosen", PATH=path, **server.environment)
    assert told.returncode == 0, told.stderr
    for i in (1, 2):
        kept = server.runs[f"point{i}"]
        assert (kept.about["sweep"], kept.exit_codes, steps(kept)) == ("chosen", [0], list(range(1, 9)))
        assert kept.config["loss"]["temperature"] == kept.config["loss.temperature"] == 2 * i
        assert kept.about["displayName"] == f"medium → small · forward_kl α0.5 τ{2 * i}"
        assert kept.summary["eval/kl"] > 0  # what the sweep minimises


@pytest.mark.parametrize("lacks", ["init", "run"])
def test_a_client_that_changed_costs_one_line(
    lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It cannot be called as kdx does, or its run lacks what kdx uses: a warning, and metrics.jsonl has everything."""
    run = SimpleNamespace(id="a", offline=True, dir=str(tmp_path))
    monkeypatch.setattr("wandb.init", {"init": lambda: run, "run": lambda **_: run}[lacks])
    monkeypatch.setattr(labels, "config_of", lambda *_: {})
    state = SimpleNamespace(step=1, tokens=2, counted_tokens=2, lines=0)
    config, folder = compose(["tracking.mode=online"]), RunFolder(tmp_path / "run")
    training = SimpleNamespace(config=config, record=Record(), state=state, max_steps=1)
    folder.path.mkdir()
    with logging_to(), Tracker(folder, training) as tracker:
        tracker.log(state, {"eval/ce": 1.5})
        tracker.finish({part: {} for part in ("student", "untouched", "teacher", "run")}, [])
    assert capsys.readouterr().out.count("warning: ") == 1
    assert [line["eval/ce"] for line in lines(folder.path / "metrics.jsonl")] == [1.5]


@pytest.mark.parametrize(
    ("words", "swept", "name", "tags"),
    [
        (["loss=jsd"], [], "SmolLM2-135M → 10 layers · jsd α0.7 τ2 beta=0.5", ["jsd", "10 layers", "SmolLM2-135M"]),
        (
            ["loss=cross_entropy", "experiment=demo"],
            [],
            "SmolLM2-135M → 10 layers · cross_entropy",
            ["baseline", "10 layers", "SmolLM2-135M", "demo"],
        ),
        (["loss.alpha=0.5"], ["loss.temperature", "loss.alpha", "train.seed"], "τ=2 α=0.5 seed=0", None),
        (["loss.alpha=0", "train.seed=1"], ["loss.temperature", "train.seed"], "baseline seed=1", None),
        (
            ["data=pairs", "data.path=[/home/me/a.jsonl,/b.jsonl]", "+loss.api_key=abc", "student=/home/me/gpt/"],
            ["data.path", "loss.api_key", "student"],
            "data=a.jsonl,b.jsonl api_key=[redacted] student=gpt",
            ["forward_kl", "gpt", "SmolLM2-135M"],
        ),
        (["adapter=lora", f"tracking.notes={SECRET}", f"+loss.word={SECRET}"], ["loss.word"], "word=[redacted]", None),
    ],
)
def test_names_and_tags(words: list[str], swept: list[str], name: str, tags: list[str] | None) -> None:
    """What distinguishes a run: its point in a sweep, else models and loss; of local paths the last part."""
    record = Record(words, swept)
    assert labels.run_name(compose(words), record) == name
    assert tags is None or labels.tags(compose(words), record) == tags
