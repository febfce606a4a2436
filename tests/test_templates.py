"""Templates without end in time or size: one line, within seconds, and in bounded memory."""

import resource
from types import SimpleNamespace

import pytest

from kdx import templates
from kdx.encoder import prepare_tokenizer
from kdx.errors import ConfigError, DataError
from kdx.templates import RowTemplate, fault_of

LONG = "takes more than 2 s for one short row"
BIG = "writes more than 10,000,000 characters, or takes more than 512 MB, for one short row"
BOMBS = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": LONG,
    "{{ 9 ** (9 ** 9) }}": LONG,  # when it is compiled, and without coming back to Python
    "{% if false %}{{ 9 ** (9 ** 9) }}{% endif %}": LONG,
    "{{ 'a' * 10 ** 10 }}": BIG,
    "{% if false %}{{ 'a' * 10 ** 10 }}{% endif %}": BIG,
    "{{ 'a' | center(10 ** 10) }}": BIG,
    "{% for i in range(99999) %}{{ 'a' * 10 ** 6 }}{% endfor %}": BIG,
    "{{ 'a' * 2 * 10 ** 7 }}": BIG,
}


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    monkeypatch.setattr(templates, "_passed", set())


@pytest.fixture
def peak():
    """Bytes by which this process grew at its peak."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return lambda: (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


@pytest.mark.parametrize(("text", "says"), BOMBS.items())
def test_row_templates(peak, text, says):
    with pytest.raises(ConfigError) as caught:
        RowTemplate(text, "data.template.user").render({"source": "a"}, ["source"], "t.jsonl:1")
    assert caught.value.lines == [f"data.template.user: {says}. Mend the template"]
    assert peak() < 100e6


@pytest.mark.parametrize(("text", "says"), BOMBS.items())
def test_chat_templates(peak, make_tokenizer, data_config, text, says):
    for whose, tokenizer, config in (
        ("it", make_tokenizer(), data_config("custom", chat_template=text)),
        ("the chat template that the tokenizer brings", make_tokenizer(text), data_config("custom")),
    )[: 1 if says == LONG else 2]:  # the same way for both
        with pytest.raises(DataError) as caught:
            prepare_tokenizer(tokenizer, config)
        assert caught.value.lines == [f"data.chat_template: {whose} {says}. Give another: data.chat_template=FILE"]
    assert peak() < 100e6


def test_what_one_row_makes_of_it():
    template = RowTemplate("{% for a in source %}{% for b in source %}{% endfor %}{% endfor %}", "data.template.user")
    with pytest.raises(ConfigError, match=LONG):
        template.render({"source": "a" * 30_000}, ["source"], "t.jsonl:1")


def test_a_template_is_tried_once_and_a_plain_one_never(monkeypatch):
    forks = []
    fork = templates.os.fork
    monkeypatch.setattr(templates.os, "fork", lambda: forks.append(1) or fork())
    for _ in range(3):
        assert RowTemplate("{{ source }}\n{{ more }}", "k").render({"source": "a", "more": "b"}, [], "w") == "a\nb"
    assert not forks
    for _ in range(3):
        assert RowTemplate("{{ source | upper }}", "k").render({"source": "a"}, [], "w") == "A"
    assert len(forks) == 2  # to compile, and to render


def test_what_a_template_refuses_is_no_fault_of_its_size():
    def texts():
        yield "a"
        raise ValueError("turns must alternate")

    assert fault_of("x", "render", texts) is None


def test_without_fork_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(templates, "os", SimpleNamespace())
    assert fault_of("{{ 1 }}", "render", lambda: pytest.fail("tried")) is None
