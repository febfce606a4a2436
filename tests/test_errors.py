"""What a user's error says: where, what, and the mend; and the exit code of its kind."""

import ast
import inspect
import pickle
from pathlib import Path

import pytest
import torch

from kdx import errors
from kdx.errors import ConfigError, DataError, KdxError, MachineError, ModelError, did_you_mean, out_of_memory, together

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, KdxError)]
CODES = {
    "ConfigError": 2,
    "DataError": 2,
    "ModelError": 2,
    "KdxError": 2,
    "MachineError": 3,
    "InUseError": 3,
    "DivergedError": 4,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_where_what_and_the_mend_in_one_line(kind):
    error = kind("loss.alpha", "is 2", "Allowed: 0 to 1")
    assert error.lines == ["loss.alpha: is 2. Allowed: 0 to 1"]
    assert str(error) == error.lines[0]
    assert error.exit_code == CODES[kind.__name__]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [("", "a", "b"), ("a", "", "b"), ("a", "b", "")])
def test_an_error_without_place_or_mend_is_refused(kind, parts):
    with pytest.raises(AssertionError):
        kind(*parts)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_the_way_between_processes(kind):
    again = pickle.loads(pickle.dumps(kind("a", "b", "c")))
    assert type(again) is kind
    assert again.lines == ["a: b. c"]


def test_a_hub_that_cannot_be_reached_is_the_machines_error_and_a_name_the_users():
    def told(raised: str, shown: str) -> KdxError:
        try:
            try:
                raise type(raised, (Exception,), {})("no route")
            except Exception as error:
                raise OSError(shown) from error
        except OSError as error:
            return errors.of_hub(error, ModelError, "teacher.path", "a/b: the hub gave nothing", "Check the name")

    cut = "We couldn't connect. Check your internet connection or see how to run the library in offline mode at 'https://x'."
    for raised, kind in (("ConnectionError", MachineError), ("OfflineModeIsEnabled", ModelError), ("Any", ModelError)):
        error = told(raised, cut)
        assert type(error) is kind
        assert error.lines == ["teacher.path: a/b: the hub gave nothing: We couldn't connect. Check the name"]


def test_errors_together_have_a_line_each_and_no_line_twice():
    joined = together([DataError("f:1", "x", "m"), DataError("f:2", "y", "m"), DataError("f:1", "x", "m")])
    assert isinstance(joined, DataError)
    assert joined.lines == ["f:1: x. m", "f:2: y. m"]


def test_did_you_mean_names_the_nearest_and_few_choices():
    assert did_you_mean("forwad_kl", ["forward_kl", "tvd"]) == "Did you mean forward_kl? Choices: forward_kl, tvd"
    assert did_you_mean("zzz", ["forward_kl", "tvd"]) == "Choices: forward_kl, tvd"
    many = [f"option_{i:03}" for i in range(40)]
    assert did_you_mean("option_7", many).startswith("Did you mean option_")
    assert did_you_mean("zzz", many)  # a mend is never empty
    assert ConfigError("a", "b", did_you_mean("zzz", many))


def built_in(source: str) -> list[ast.Call]:
    """Every place that builds a user's error, or a Problem, which becomes one."""
    names = {kind.__name__ for kind in KINDS} | {"Problem"}
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func).rsplit(".", 1)[-1] in names]


def lacks(call: ast.Call) -> bool:
    """Whether a call gives no place, fault or mend, or an empty one; a whole Problem (`*problem`) has all three."""
    if any(isinstance(part, ast.Starred) for part in call.args):
        return ast.unparse(call.args[0]).lstrip("*") not in ("problem", "p")
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    return len(given) != 3 or any(
        isinstance(part, ast.Constant) and not str(part.value or "").strip() for part in given
    )


def test_every_error_in_the_code_has_a_mend():
    files = sorted(Path(errors.__file__).parent.glob("*.py"))
    calls = [(file.name, call) for file in files for call in built_in(file.read_text(encoding="utf-8"))]
    assert len(calls) > 100
    assert not [f"{name}:{call.lineno}" for name, call in calls if lacks(call)]
    for wrong in ('DataError("a", "b")', 'errors.DataError("a", "b", "")', 'ConfigError("a", mend="", what="c")'):
        assert [lacks(call) for call in built_in(wrong)] == [True]


def test_out_of_memory_is_said_in_one_way():
    for error in (
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12"),
        torch.OutOfMemoryError("HIP out of memory."),
    ):
        said = out_of_memory(error)
        assert said.exit_code == 3
        assert said.lines[0].startswith("memory: ran out of memory (")
        assert said.lines[0].endswith(errors.MEMORY)
        assert len(said.lines[0].splitlines()) == 1
    assert out_of_memory(RuntimeError("shapes do not match")) is None


def test_what_a_terminal_would_obey_is_shown():
    assert errors.printable("a\x1b[2J\r\u202eb\n\tc\xa0d") == "a\\x1b[2J\\r\\u202eb\n\tc\xa0d"
    assert errors.DataError("a\nb", "c\xa0", "d").lines == ["a\\nb: c\\xa0. d"]
