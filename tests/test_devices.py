"""The GPU and the cores of a process: locks and counts, which need no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdx.run import devices
from kdx.run.devices import take_gpu, visible_gpus

HOLD = """
import sys
from pathlib import Path
from kdx.run import devices
devices.LOCKS = Path(sys.argv[1])
devices.take_gpu(is_own=sys.argv[2] == "worker")
print(",".join(devices.visible_gpus()), flush=True)
sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def locks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(devices, "LOCKS", tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return tmp_path


def other(locks: Path, kind: str, gpus: str, **environment: str) -> subprocess.Popen[str]:
    """Another kdx process of this machine, until its input is closed."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(locks), kind],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": gpus} | environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def gpu_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_workers_take_free_gpus_first_and_then_share_them_evenly(locks: Path) -> None:
    with other(locks, "single", "GPU-b,4") as single:
        assert gpu_of(single) == "GPU-b,4"  # torch will choose the first
        with other(locks, "worker", "GPU-b,4") as first:
            assert gpu_of(first) == "4"
            second = other(locks, "worker", "4")
            assert gpu_of(second) == "4"
            with other(locks, "worker", "GPU-b,4") as third:
                assert gpu_of(third) == "GPU-b"
                third.communicate("\n")
            first.kill()  # what a killed process had taken is free
            first.wait()
            with other(locks, "worker", "4,GPU-b") as fourth:
                assert gpu_of(fourth) == "4"
                fourth.communicate("\n")
            second.communicate("\n")
        single.communicate("\n")


@pytest.mark.parametrize(
    ("gpus", "names"), [("0,1", ["0", "1"]), ("2", ["2"]), ("", []), ("-1", []), ("1,-1,0", ["1"]), (" 0 , 3", ["0", "3"])]
)  # fmt: skip
def test_the_list_is_cudas(gpus: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert visible_gpus() == names


def test_without_a_list_all_gpus_of_the_machine_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []
    take_gpu(is_own=True)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho '  MIG 1g: y'\necho 'GPU 1: A (UUID: z)'\n")
    command.chmod(0o755)
    assert visible_gpus() == ["0", "1"]


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
