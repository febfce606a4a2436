"""The direction of dependency: who may import whom, and how big the package may be."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "kdx"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
    if "conf" not in path.parts
}
CHOICES = {"teacher", "student", "data.sources", "loss", "optim"}
STANDARD = {"collections", "functools", "importlib", "inspect", "math", "typing"}
MAX_LINES, MAX_TOKENS = 10_370, 85_420
NOT_CODE = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENCODING", "ENDMARKER"}


def imported(name: str) -> set[str]:
    """The modules that a file imports, late imports included; names imported from a package count as modules."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def own(name: str) -> set[str]:
    return {module.removeprefix("kdx.") for module in imported(name)} & FILES.keys()


def top(name: str) -> set[str]:
    return {module.split(".")[0] for module in imported(name)}


def num_tokens(path: Path) -> int:
    """Tokens of code, without comments and docstrings: dense lines do not make a package smaller."""
    text = path.read_text(encoding="utf-8")
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(tokenize.tok_name[t.type] not in NOT_CODE and t.start[0] not in docstrings for t in tokens)


def test_the_package_stays_within_its_budget():
    lines = sum(path.read_text(encoding="utf-8").count("\n") for path in FILES.values())
    assert lines <= MAX_LINES
    assert sum(map(num_tokens, FILES.values())) <= MAX_TOKENS


def test_hydra_stays_in_the_command_line():
    assert {name for name in FILES if top(name) & {"hydra", "omegaconf"}} <= {"cli", "compose", "sweep"}


def test_torch_is_not_imported_before_a_run_starts():
    late = {"torch", "transformers", "accelerate", "datasets", "wandb"}
    early = {"__init__", "__main__", "cli", "compose", "config", "errors", "sweep", "run.devices"}
    early |= {name for name in FILES if name.startswith("compare")} - {"compare.wandb_run"}
    for name in early:
        assert not top(name) & late, name


@pytest.mark.parametrize("choice", sorted(CHOICES))
def test_the_five_choices_never_import_one_another(choice):
    assert not own(choice) & (CHOICES - {choice})


def test_only_the_command_line_imports_cli_and_distill():
    assert {name for name in FILES if own(name) & {"cli", "distill"}} <= {"__main__", "cli", "check", "sweep"}


def test_config_and_errors_import_nothing_of_kdx():
    assert not own("config")
    assert not own("errors")


def test_loss_needs_torch_and_the_standard_library_alone():
    assert top("loss") <= {"torch", *STANDARD}
