"""The names of a sweep and its jobs, which are always the same and fit for a path, and who does which job."""

import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from processes import SERVER, ended, free_port

from kdx import sweep
from kdx.cli import compose
from kdx.compose import Plan, Point
from kdx.config import SAFE_NAME, replaced
from kdx.errors import ConfigError
from kdx.run.claim import BEAT


def name(keys: list[str], *words: str) -> str:
    return sweep.job_name(keys, list(words), compose(list(words)))


# Names


def test_a_name_says_the_point_by_the_shortest_unique_part_of_each_key() -> None:
    keys = ["loss.temperature", "loss.alpha"]
    assert re.fullmatch(r"temperature-2_alpha-0\.7_[0-9a-f]{6}", name(keys, "loss.temperature=2", "loss.alpha=0.7"))
    assert name(["train.seed", "data.seed"]).startswith("train.seed-0_data.seed-0_")
    assert name(["experiment"], "experiment=demo").startswith("experiment-demo_")
    assert name(keys, "loss.temperature=1") == name(keys, "loss.temperature=1.0")
    baseline = name(keys, "loss.temperature=1", "loss.alpha=0")  # its temperature is not used
    assert baseline == name(keys, "loss.temperature=4", "loss.alpha=0")
    assert baseline.startswith("alpha-0_")
    assert name(["loss.temperature"], "loss.alpha=0").startswith("baseline_")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["loss.beta"], ["loss=jsd", "loss.beta=0.25"]),
        (["teacher", "student"], ["teacher=dialogpt_medium", "student=dialogpt_small"]),
        (["data.path"], ["data=pairs", "data.path=['/a b/ü.jsonl',../c.jsonl]"]),
        (["data.path"], ["data=pairs", f"data.path={'long/' * 90}x.jsonl"]),
        (["student.layers"], ["student.layers=[0,3,29]"]),
        ([], []),
    ],
)
def test_names_are_fit_for_a_path(keys: list[str], words: list[str]) -> None:
    made = name(keys, *words)
    assert SAFE_NAME.fullmatch(made)
    assert len(made) < 200


def test_a_sweep_is_named_by_what_its_points_have_in_common() -> None:
    keys = ["loss.temperature"]
    two = [compose([f"loss.temperature={t}"]) for t in (1, 2)]
    made = sweep.sweep_name(keys, keys, two)
    assert re.fullmatch(r"temperature-[0-9a-f]{6}", made)
    assert sweep.sweep_name(keys, keys, [*two, compose(["loss.temperature=4"])]) == made
    assert sweep.sweep_name(keys, keys, [compose(["train.seed=1"])]) != made
    groups = [[compose([f"loss={n}", f"loss.alpha={a}"]) for n in ("jsd", "tvd")] for a in (0.3, 0.7)]
    by_loss = ["loss"], ["loss", "loss.alpha"]
    assert sweep.sweep_name(*by_loss, groups[0]) != sweep.sweep_name(*by_loss, groups[1])
    more = [*groups[0], compose(["loss=skew_forward_kl", "loss.alpha=0.3"])]  # it has a key of its own
    assert (
        sweep.sweep_name(*by_loss, more)
        == sweep.sweep_name(*by_loss, groups[0])
        == sweep.sweep_name(*by_loss, more[1:])
    )


# Who does which job


class Folders:
    """Stands in for the run folders of jobs 0, 1, …, and for the runs in them."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.runs, self.printed = root, list[str](), list[bool]()
        self.config = compose(["sweep.name=s"])
        monkeypatch.setattr(sweep, "start_run", self.start)
        monkeypatch.setattr(sweep.RunFolder, "is_done", self.is_done(self))
        monkeypatch.setattr(sweep, "_compare", lambda folder, is_last=False: self.printed.append(is_last))

    @staticmethod
    def is_done(folders: "Folders") -> Callable[[sweep.RunFolder, object], bool]:
        def is_done(run: sweep.RunFolder, _: object) -> bool:
            if run.kept("status.json").get("state") == "done" and run.path.name == "changed":
                raise ConfigError(str(run.path), "holds a run with a different plugins", "Set sweep.name=...")
            return bool(run.kept("status.json").get("state") == "done")

        return is_done

    def leave(self, name: str, state: str) -> None:
        file = self.root / name / "status.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'{{"state": "{state}"}}')

    def start(self, _: object, __: object, folder: Path) -> float:
        self.runs.append(folder.name)
        self.leave(folder.name, "done")
        return 1.5

    def plan(self, *names: str, workers: int = 1) -> Plan:
        config = replaced(self.config, sweep=replaced(self.config.sweep, workers=workers))
        point = Point([], config, {})
        jobs = {self.root / name: point for name in names}
        return Plan([point] * len(names), self.root, jobs=jobs)

    def sweep(self, *names: str) -> int:
        """One process that goes through these jobs → the exit code."""
        time.sleep(0.02)  # files have times of a clock that ticks slowly
        return sweep.run(self.plan(*names), [])


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    return Folders(tmp_path, monkeypatch)


def test_a_process_does_what_is_neither_done_nor_held_and_says_which_are(
    folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    folders.leave("old", "done")
    folders.leave("cut-off", "running")
    (folders.root / "held").mkdir()
    (folders.root / "held" / BEAT).write_text('{"pid": 7, "host": "elsewhere"}')
    assert folders.sweep("old", "held", "cut-off", "new") == 0
    assert folders.runs == ["cut-off", "new"]
    out, err = capsys.readouterr()
    assert f"kdx: {os.path.relpath(folders.root / 'old')}: already done" in out
    assert "held: in use by pid 7 on host elsewhere, skipped" in out
    assert "kdx: 1 of 4 jobs held by other processes:" in err
    assert True not in folders.printed  # that process will compare


def test_a_job_whose_data_have_changed_is_refused_and_fails(
    folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    folders.leave("changed", "done")
    assert folders.sweep("changed", "good") == 5
    assert folders.runs == ["good"]
    assert "changed  holds a run with a different plugins. Set sweep.name=..." in capsys.readouterr().err


@pytest.mark.parametrize("code", [-1, 144])
def test_a_job_that_submitit_requeues_has_not_failed(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """On Slurm its handler exits with -1, on this machine with 144: no result may be written."""
    monkeypatch.setattr(sweep, "start_run", lambda *_: sys.exit(code))
    with pytest.raises(SystemExit) as left:
        folders.sweep("0")
    assert left.value.code == code
    assert not sweep._failed


def test_a_loss_that_nothing_defines_is_refused_before_the_first_job(folders: Folders) -> None:
    plan = folders.plan("baseline", "0")
    config = compose(["loss.name=mine"])
    plan.points[1] = replace(plan.points[1], config=config)
    with pytest.raises(ConfigError, match=r"no divergence is named 'mine'.*Your own: KDX_PLUGINS=module"):
        sweep.run(plan, [])
    assert not folders.runs


# Several processes


def test_workers_need_points_that_are_known(folders: Folders) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.workers: is 2"):
        sweep.run(replace(folders.plan("0", workers=2), hydra=["x"]), [])


def agree(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for i in range(3):
        assert sweep._agreed(lambda i=i: f"answer {i} of rank {rank}") == f"answer {i} of rank 0"  # type: ignore[misc]


def test_rank_0_decides_for_all_ranks() -> None:
    port = free_port()
    ranks = [SERVER.Process(target=agree, args=(rank, port)) for rank in range(2)]
    for process in ranks:
        process.start()
    assert [ended(process) for process in ranks] == [0, 0]
