"""What a user's error says: where, what, and the hint; and the exit code of its kind."""

import inspect
import pickle

import pytest
import torch

from kdx import errors
from kdx.errors import DataError, KdxError, MachineError, ModelError, did_you_mean, out_of_memory, together

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, KdxError)]
CODES = {"MachineError": 3, "InUseError": 3, "DivergedError": 4}  # all others: 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_one_line_of_where_what_and_hint_in_any_process(kind):
    error = kind("loss.alpha", "is 2", "Allowed: 0 to 1")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(error) == error.lines[0] == again.lines[0] == "loss.alpha: is 2. Allowed: 0 to 1"
    assert error.exit_code == CODES.get(kind.__name__, 2)


def test_an_unreachable_hub_is_the_machines_error_and_a_wrong_name_the_users():
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


def test_every_kind_of_out_of_memory():
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
        assert said.lines[0].startswith("out of memory: ")
        assert said.lines[0].endswith(errors.MEMORY)
        assert len(said.lines[0].splitlines()) == 1
    assert out_of_memory(RuntimeError("shapes do not match")) is None


def test_control_characters_are_escaped():
    assert errors.printable("a\x1b[2J\r\u202eb\n\tc\xa0d") == "a\\x1b[2J\\r\\u202eb\n\tc\xa0d"
    assert errors.DataError("a\nb", "c\xa0", "d").lines == ["a\\nb: c\\xa0. d"]
