"""One job, one device: locks and thread counts, which need no GPU."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from processes import needs_glibc

from kdx.run import devices
from kdx.run.devices import listed, num_at_once, num_cores, one_device, share_cores
from kdx.run.signals import STOPS

HOLD = """
import sys
from pathlib import Path
from kdx.run import devices, signals
signals.note()
devices.LOCKS = Path(sys.argv[1])
with devices.one_device(is_parallel=sys.argv[2] == "parallel"):
    print(devices.listed(), flush=True)
    sys.stdin.readline()
"""
JOBLIB = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"


@pytest.fixture(autouse=True)
def locks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(devices, "LOCKS", tmp_path)
    monkeypatch.setattr(devices, "PATIENCE", 0.0)
    monkeypatch.setattr(devices, "_home", [])
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return tmp_path


def other(locks: Path, kind: str, gpus: str, **environment: str) -> subprocess.Popen[str]:
    """Another kdx job of this machine, until its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(locks), kind],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": gpus} | environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return process


def say(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_parallel_jobs_take_different_gpus_and_wait_where_none_is_free(
    locks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b,4")
    with other(locks, "parallel", "GPU-b,4") as first:
        assert say(first) == "['GPU-b']"
        with one_device(is_parallel=True):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"
            with other(locks, "parallel", "GPU-b,4") as third:
                assert say(third) == "kdx: other jobs hold GPU GPU-b, 4; waiting for one"
                first.communicate("\n")
                assert say(third) == "['GPU-b']"
                third.communicate("\n")
    assert capsys.readouterr().out == ""
    with other(locks, "parallel", "4") as fourth:  # what was held is free again
        assert say(fourth) == "['4']"
        fourth.kill()  # and what a killed job held is, too
    with one_device(is_parallel=True):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"  # CUDA reads it once a process: it stays


def test_a_job_that_waits_for_a_gpu_heeds_a_signal_that_is_held_back(
    locks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    with one_device(is_parallel=True):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        with other(locks, "parallel", "4") as second:  # born so, as joblib's processes are
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            assert say(second) == "kdx: other jobs hold GPU 4; waiting for one"
            second.terminate()
            assert second.wait() == 143


def test_a_process_between_two_jobs_is_left_its_gpu_where_there_is_another(
    locks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with one_device(is_parallel=True):
        assert listed() == ["0"]
    with other(locks, "parallel", "0,1") as second:
        assert say(second) == "['1']"
        with other(locks, "parallel", "0,1") as third:
            assert say(third) == "['0']"  # there is no other
            third.communicate("\n")
        with one_device(is_parallel=True):
            assert listed() == ["0"]
        second.communicate("\n")


def test_a_run_of_its_own_runs_where_torch_puts_it_and_holds_that(locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with other(locks, "single", "0,1") as single:
        assert say(single) == "['0', '1']"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        with one_device(is_parallel=False):  # taken, and used all the same
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
        with one_device(is_parallel=True):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
        single.communicate("\n")


def test_two_slurm_allocations_number_their_gpus_anew(locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with other(locks, "parallel", "0", SLURM_JOB_ID="7") as one:
        assert say(one) == "['0']"
        with other(locks, "parallel", "0", SLURM_JOB_ID="8") as two:
            assert say(two) == "['0']"
            two.communicate("\n")
        one.communicate("\n")
    assert {stat.S_IMODE(file.stat().st_mode) for file in locks.iterdir()} == {0o666}  # other people's jobs lock them


@pytest.mark.parametrize(
    ("gpus", "names"), [("0,1", ["0", "1"]), ("2", ["2"]), ("", []), ("-1", []), ("1,-1,0", ["1"]), (" 0 , 3", ["0", "3"])]
)  # fmt: skip
def test_the_list_is_cudas(gpus: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert listed() == names


def test_without_a_list_all_gpus_of_the_machine_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert listed() == []
    with one_device(is_parallel=True):
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho '  MIG 1g: y'\necho 'GPU 1: A (UUID: z)'\n")
    command.chmod(0o755)
    assert listed() == ["0", "1"]


@pytest.mark.parametrize(
    ("launcher", "jobs"),
    [
        ({"_target_": JOBLIB, "n_jobs": 2}, 2),
        ({"_target_": JOBLIB, "n_jobs": 100}, 6),
        ({"_target_": f"{SUBMITIT}.LocalLauncher"}, 6),
        ({"_target_": f"{SUBMITIT}.SlurmLauncher"}, 1),
        ({"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}, 1),
    ],
)
def test_jobs_at_once(launcher: dict, jobs: int) -> None:
    assert num_at_once(launcher, 6) == jobs


def test_jobs_at_once_are_counted_as_joblib_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "num_cores", lambda: 8)
    assert [num_at_once({"_target_": JOBLIB, "n_jobs": n}, 99) for n in (-1, -2, -20)] == [8, 7, 1]


def test_jobs_share_the_cores_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_cores() >= 1
    monkeypatch.setattr(devices, "num_cores", lambda: 8)
    monkeypatch.setattr(os, "environ", {})
    share_cores(1)
    assert "OMP_NUM_THREADS" not in os.environ
    share_cores(3)
    assert os.environ["OMP_NUM_THREADS"] == "2"
    share_cores(8)
    assert os.environ["OMP_NUM_THREADS"] == "2"  # as it was set
    monkeypatch.setattr(os, "environ", {})
    share_cores(99)
    assert os.environ["OMP_NUM_THREADS"] == "1"


@needs_glibc
@pytest.mark.parametrize(
    ("device", "variable", "keeps"), [("cpu", "A", True), ("cuda", "A", False), ("cpu", "MALLOC_ARENA_MAX", False)]
)
def test_what_a_step_frees_is_kept_on_a_processor(device: str, variable: str, keeps: bool) -> None:
    size = 64 * 2**20
    script = f"""
import ctypes, resource
from pathlib import Path
from kdx.run.devices import keep_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
keep_memory("{device}")
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
before, block = resident(), libc.malloc({size})
ctypes.memset(block, 1, {size})
libc.free(block)
print(resident() - before)
"""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    told = subprocess.run(
        [sys.executable, "-c", script], env=own | {variable: "1"}, capture_output=True, text=True, check=True
    )
    assert (int(told.stdout) > size // 2) == keeps
