"""What a user's error says: where, what, and the mend; and the exit code of its kind."""

import inspect
import pickle

import pytest

from kdx import errors
from kdx.errors import ConfigError, DataError, KdxError, did_you_mean, together

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, KdxError)]
CODES = {"ConfigError": 2, "DataError": 2, "ModelError": 2, "MachineError": 3, "DivergedError": 4, "KdxError": 2}


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
