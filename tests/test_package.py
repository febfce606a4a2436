"""The wheel: everything that kdx needs is in it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from made_runs import write_sweep

ROOT = Path(__file__).parents[1]


def test_the_wheel_composes_and_compares(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("kdx-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    write_sweep(tmp_path / "runs", [1.0, 2.0], [0.3])
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    for words in (["--cfg", "job"], ["compare", "runs"]):
        command = [sys.executable, "-P", "-m", "kdx", *words]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
    assert (tmp_path / "runs" / "compare.html").is_file()
    where = subprocess.run(
        [sys.executable, "-P", "-c", "import kdx, kdx.conf; print(kdx.__file__, *kdx.conf.__path__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.count(str(tmp_path)) == 2
