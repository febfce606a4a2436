"""The direction of dependency: who may import whom, and how long a file may be."""

import ast
from pathlib import Path

import pytest

FILES = {path.stem: path for path in sorted((Path(__file__).parents[1] / "kdx").glob("*.py"))}
CHOICES = {"teacher", "student", "data", "loss", "optim"}
STANDARD = {"collections", "functools", "importlib", "inspect", "math", "typing"}


def imported(name: str) -> set[str]:
    """The modules that a file imports, late ones too; those of kdx as kdx.NAME."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"kdx.{alias.name}" for alias in node.names} if node.module == "kdx" else {str(node.module)}
    return found


def own(name: str) -> set[str]:
    return {module.split(".")[1] for module in imported(name) if module.startswith("kdx.")} & FILES.keys()


def top(name: str) -> set[str]:
    return {module.split(".")[0] for module in imported(name)}


def test_hydra_stays_at_the_door():
    assert {name for name in FILES if top(name) & {"hydra", "omegaconf"}} <= {
        "cli",
        "composition",
        "jobs",
        "resolve",
        "sweep",
    }


def test_torch_stays_out_of_the_door():
    for name in (
        "__init__",
        "__main__",
        "cli",
        "composition",
        "devices",
        "hostile",
        "resolve",
        "surroundings",
        "typed",
        "jobs",
        "sweep",
        "check",
        "config",
        "errors",
        "redact",
        "compare",
        "ranking",
        "tables",
        "page",
    ):
        assert not top(name) & {"torch", "transformers", "accelerate", "datasets", "wandb"}, name


@pytest.mark.parametrize("choice", sorted(CHOICES))
def test_the_five_choices_never_import_one_another(choice):
    assert not own(choice) & (CHOICES - {choice})


def test_only_the_door_imports_cli_and_distill():
    assert {name for name in FILES if own(name) & {"cli", "distill"}} <= {"__main__", "cli"}


def test_config_and_errors_import_nothing_of_kdx():
    assert not own("config")
    assert not own("errors")


def test_loss_needs_torch_and_the_standard_library_alone():
    assert top("loss") <= {"torch", *STANDARD}


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_is_one_thing(name):
    lines = len(FILES[name].read_text(encoding="utf-8").splitlines())
    assert lines < 200 if name == "train" else lines <= 400
