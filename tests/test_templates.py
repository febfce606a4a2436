"""Templates without end in time or size: one line, within seconds, and in bounded memory, on whichever row it comes."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from processes import environment, forked, needs_glibc, wait
from standins import write_dialogpt

from kdx.data import templates
from kdx.data.encode import Encoder, prepare_tokenizer
from kdx.data.sources import Conversation, load_data
from kdx.data.templates import RowTemplate, Unbounded, each, fault_of, is_plain
from kdx.errors import ConfigError, DataError, KdxError, together

LONG = "takes more than 0.5 s"
BIG = "writes more than 10,000,000 characters, or takes more than 512 MB,"
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
WHEN_FILLED = {bomb for bomb in BOMBS if "in range" in bomb}  # the others are computed when they are compiled
TALK = [{"role": role, "content": "a"} for role in ("user", "assistant") * 3]
SPEAK = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
LATER = {  # templates that are well until a conversation is longer than any that they are tried on
    "an endless loop": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", LONG),
    "a gigabyte": ("{% set ns = namespace(x='a' * 10) %}{% for i in range(27) %}{% set ns.x = ns.x * 2 %}{% endfor %}", BIG),
    "twenty million letters": ("{{ 'a' * messages | length * 2 * 10 ** 6 }}", BIG),
}  # fmt: skip


def later(bomb):
    return "{% if messages | length > 5 %}" + bomb + "{% endif %}" + SPEAK


@pytest.fixture(autouse=True)
def forgetful_and_impatient(request, monkeypatch):
    """Impatient with what takes long; what grows may be slow to grow where memory is."""
    told = getattr(request.node, "callspec", None)
    grows = told is not None and BIG in (told.params.get("says"), *LATER.get(told.params.get("kind"), ()))
    monkeypatch.setattr(templates, "_passed", set())
    monkeypatch.setattr(templates, "SECONDS", 20 if grows else 0.5)


@pytest.fixture
def peak():
    """Bytes by which this process grew at its peak."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return lambda: (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


@pytest.fixture
def filled(tmp_path, data_config):
    """Fill a template with rows, as the source `pairs` does → what the user is told."""

    def fill(text, *sources):
        file = tmp_path / "t.jsonl"
        file.write_text("".join(json.dumps({"source": source, "target": "b"}) + "\n" for source in sources))
        config = data_config("pairs", path=str(file), template={"user": text, "assistant": "{{ target }}"})
        with pytest.raises(KdxError) as caught:
            load_data(config)
        (line,) = caught.value.lines
        return line.removeprefix(f"{tmp_path}/")

    return fill


@pytest.mark.parametrize(("text", "says"), BOMBS.items())
def test_row_templates(peak, filled, text, says):
    compiled = f"data.template.user: {says} for one short row. Mend the template"
    rendered = f"t.jsonl:1: data.template {says} for this row. Mend the template"
    assert filled(text, "a") == (rendered if text in WHEN_FILLED else compiled)
    assert peak() < 100e6


@pytest.mark.parametrize(("text", "says"), BOMBS.items())
def test_chat_templates(peak, make_tokenizer, data_config, text, says):
    for whose, tokenizer, config in (
        ("it", make_tokenizer(), data_config("custom", chat_template=text)),
        ("the chat template that the tokenizer brings", make_tokenizer(text), data_config("custom")),
    )[: 1 if says == LONG else 2]:  # the same way for both
        with pytest.raises(DataError) as caught:
            prepare_tokenizer(tokenizer, config)
        what = f"{whose} {says} for one short row"
        assert caught.value.lines == [f"data.chat_template: {what}. Give another: data.chat_template=FILE"]
    assert peak() < 100e6


def test_what_a_later_row_makes_of_a_row_template(peak, filled):
    loops = "{{ source }}{% for a in source %}{% for b in source %}{% endfor %}{% endfor %}"
    told = f"t.jsonl:3: data.template {LONG} for this row. Mend the template"
    assert filled(loops, "a", "bb", "a" * 30_000, "c") == told
    grows = "{{ source * 10 ** (source | length) }}"
    told = f"t.jsonl:2: data.template {BIG} for this row. Mend the template"
    assert filled(grows, "a", "b" * 9) == told
    assert peak() < 100e6


@pytest.mark.parametrize(
    ("kind", "ask"), [*((kind, "encode") for kind in LATER), ("a gigabyte", "faults"), ("a gigabyte", "refused")]
)
def test_what_a_later_row_makes_of_a_chat_template(peak, make_tokenizer, data_config, kind, ask):
    bomb, says = LATER[kind]
    tokenizer = make_tokenizer()
    prepare_tokenizer(tokenizer, data_config("custom", chat_template=later(bomb)))
    rows = [Conversation(str(i), TALK[: 6 if i == 7 else 4], f"c.jsonl:{i}") for i in range(9)]
    with pytest.raises(DataError) as caught:
        getattr(Encoder(tokenizer, 100, "error", True), ask)(rows)
    what = f"c.jsonl:7: the chat template {says} for this row"
    assert caught.value.lines == [f"{what}. Give another: data.chat_template=FILE"]
    assert peak() < 100e6


def test_what_the_generation_prompt_of_a_row_makes_of_a_chat_template(make_tokenizer):
    bomb, _ = LATER["an endless loop"]
    template = "{% if add_generation_prompt and messages[0].content == 'boom' %}" + bomb + "{% endif %}" + SPEAK
    talks = [[{"role": "user", "content": content}, TALK[1]] for content in ("Hello", "boom")]
    rows = [Conversation(str(i), talk, f"c.jsonl:{i}") for i, talk in enumerate(talks)]
    encoder = Encoder(make_tokenizer(template), 100, "error", True)
    assert [len(part) for part in encoder.encode(rows)] == [2]
    with pytest.raises(DataError, match=f"c.jsonl:1: the chat template {LONG} for this row"):
        encoder.prompts(rows, 3, 10)
    prompts = encoder.prompts(rows, 1, 10)
    assert prompts == [{"messages": talks[0][:1], "text": "Hello<|endoftext|>", "reference": "a"}]


@pytest.mark.parametrize("kind", LATER)
def test_a_run_whose_template_explodes_on_a_later_row(tmp_path, kind):
    """The real command: its line, its exit code, and neither it nor a child of it ever large or long."""
    bomb, says = LATER[kind]
    write_dialogpt(tmp_path / "small", 1, 16, pickled=False)
    (tmp_path / "bomb.jinja").write_text(later(bomb))
    talks = [TALK[: 6 if i == 17 else 4] for i in range(1, 41)]
    rows = [
        json.dumps({"messages": [{**m, "content": f"{m['content']}{i}"} for m in talk]}) for i, talk in enumerate(talks)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    words = [
        "teacher=none",
        "loss=cross_entropy",
        "student=hf",
        "student.path=small",
        "data=messages",
        "data.path=t.jsonl",
    ]
    words += ["data.chat_template=bomb.jinja", "data.max_length=100", "data.on_bad_row=skip", "tracking.mode=disabled"]
    limited = f"ulimit -v {12 * 2**20}; exec {sys.executable} -m kdx {' '.join(words)}"
    done = subprocess.run(
        ["sh", "-c", limited], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    says = says.replace("0.5 s", "2 s")  # in a process of its own
    told = f"kdx: error: t.jsonl:17: the chat template {says} for this row. Give another: data.chat_template=FILE\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 * 2**20  # kilobytes, of the largest so far


def test_a_template_is_tried_once_and_a_plain_one_never(monkeypatch, make_tokenizer, data_config):
    forks = []
    fork = templates.os.fork
    monkeypatch.setattr(templates.os, "fork", lambda: forks.append(1) or fork())
    for _ in range(3):
        assert RowTemplate("{{ source }}\n{{ more }}", "k").render({"source": "a", "more": "b"}, [], "w") == "a\nb"
        tokenizer = make_tokenizer(SPEAK)
        prepare_tokenizer(tokenizer, data_config("custom"))
        assert len(Encoder(tokenizer, 100, "error", True).encode([Conversation("", TALK, "w")])[0]) == 1
    assert not forks
    for _ in range(3):
        RowTemplate("{{ source | capitalize }}", "k")
    assert len(forks) == 1


def test_each_row_is_rendered_once_where_bad_ones_are_skipped(tmp_path, monkeypatch, make_tokenizer, data_config):
    rendered = []
    render = Encoder._render
    monkeypatch.setattr(Encoder, "_render", lambda self, row: rendered.append(row.where) or render(self, row))
    encoder = Encoder(
        make_tokenizer("{{ messages[1].content / 2 if 'no' in messages[0].content }}" + SPEAK), 9, "drop", True
    )
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"source": f"{'no' * (i == 3)}{i % 5}", "target": f"{i % 7}"}) + "\n" for i in range(12))
    )
    config = data_config("pairs", path=str(tmp_path / "t.jsonl"), on_bad_row="skip", max_bad_rows=1, validation=2)
    monkeypatch.setattr(encoder, "_is_plain", True)  # so that it is seen here
    data = load_data(config, refused=encoder.refused)
    rows, held_out = encoder.encode(data.train, data.validation)
    assert len(rows) + len(held_out) == 11
    assert sorted(rendered) == sorted({f"{tmp_path}/t.jsonl:{i}" for i in range(1, 13)})


def test_the_templates_of_the_default_models_are_plain(smollm2_tokenizer):
    assert is_plain(smollm2_tokenizer.chat_template)
    assert is_plain("{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}")  # DialoGPT's


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'a' * 10 }}", "{{ 2 ** 3 }}", "{{ [x, x] }}", "{{ -x }}", "{{ '%9d' % 1 }}", "{{ loop.index % 2 }}",
        "{% for m in messages %}{{ m.index % 2 }}{% endfor %}", "{{ range(9) }}", "{% for m in x %}{% endfor %}",
        "{% for m in messages recursive %}{{ loop(m) }}{% endfor %}", "{% for a in messages[0] %}{% endfor %}",
        "{% for a in messages %}{% if a %}{% for b in messages %}{% endfor %}{% endif %}{% endfor %}",
        "{% set messages = messages[0].content %}", "{% set a, messages = x %}",
        "{% set x = x + x %}", "{% set x = x ~ x %}", "{% set x %}{{ x }}{{ x }}{% endset %}", "{% set ns.a = 1 %}",
        "{{ x | center(9) }}", "{{ x | join(y) }}", "{{ x.center(9) }}", "{{ x.format(1) }}", "{{ a.strip()() }}",
        "{% macro a() %}{% endmacro %}", "{% filter upper %}{% endfilter %}", "{{ '", "{% nosuch %}", None,
    ],
)  # fmt: skip
def test_what_could_grow_is_not_plain(text):
    assert not is_plain(text)


@pytest.mark.parametrize(
    "text",
    ["{% for m in messages[1:] %}{% if loop.index % 2 %}{{ m.content.strip() | trim }}{% endif %}{% endfor %}", SPEAK],
)
def test_loops_over_messages_are_plain_where_there_are_messages(text):
    assert is_plain(text)
    assert not is_plain(text, may_loop=False)


def test_what_each_item_makes(tmp_path):
    """In order, over the border of what one process does, and with the faults of items and of what they come from."""

    def double(number):
        if number % 1000 == 3:
            raise DataError(f"row {number}", "is odd", "Mend it")
        return 2 * number

    def numbers():
        yield from range(9000)
        raise DataError("t.jsonl", "breaks off", "Copy it again")

    for is_plain_ in (False, True):
        told = []
        with pytest.raises(DataError, match="breaks off"):
            told.extend(each(double, numbers(), is_plain=is_plain_))
        assert [item for item, _ in told] == list(range(9000))
        assert [item for item, value in told if isinstance(value, DataError)] == list(range(3, 9000, 1000))
        assert all(value == 2 * item for item, value in told if item % 1000 != 3)
        assert told[3][1].lines == ["row 3: is odd. Mend it"]


def test_a_bug_in_what_is_called_is_raised_here():
    with pytest.raises(ZeroDivisionError):
        list(each(lambda number: 1 / number, [1, 0]))


def test_an_item_that_ends_its_process_is_named():
    def work(number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(Unbounded, match=rf"ends the process that renders it \(signal {signal.SIGUSR1}\)") as caught:
        list(each(work, [1, 2, 3]))
    assert caught.value.item == 2


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (signal.SIGXCPU, r"takes more than 0.5 s"),
        (signal.SIGKILL, r"was killed, as when memory runs out,"),
        (signal.SIGALRM, r"waits for more than 600 s"),
    ],
)
def test_what_ended_the_process_is_told(number, says):
    with pytest.raises(Unbounded, match=f"^{says}$"):
        list(each(lambda _: os.kill(os.getpid(), number), [1]))


def test_what_is_not_done_there_is_done_here():
    """A fault of the process alone, and a value that is none of JSON; those after it are done there."""
    here = os.getpid()

    def work(kind):
        if kind == "fails there" and os.getpid() != here:
            raise OSError("no room")
        return {1j} if kind == "no JSON" else os.getpid() == here

    told = list(each(work, ["fails there", "no JSON", "well"]))
    assert told == [("fails there", True), ("no JSON", {1j}), ("well", False)]


def test_a_fault_of_several_lines_has_them_all():
    def work(_):
        raise together([DataError(f"row {i}", "is odd", "Mend it") for i in (1, 2)])

    ((_, fault),) = each(work, [1])
    assert fault.lines == ["row 1: is odd. Mend it", "row 2: is odd. Mend it"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_meant_for_the_run_is_not_the_templates(monkeypatch, number):
    """From its first moment on, when it still has the run's handlers."""
    work = templates._work
    monkeypatch.setattr(templates, "_work", lambda *given: os.kill(os.getpid(), number) or work(*given))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def ignores(_):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
        return signal.getsignal(number) == signal.SIG_IGN

    assert list(each(ignores, [1])) == [(1, True)]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


KEPT = """
import ctypes
from kdx.data import templates
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
assert libc.mallopt(-1, 2**30) and libc.mallopt(-3, 2**30)  # gives back nothing, and takes all from one heap
libc.free(libc.malloc(2**28))
templates.MEMORY = 2**26
told = []
for size in (2**25, 2**27):
    try:
        told += templates.each(lambda _: len(bytes(size)), [size])
    except templates.Unbounded as fault:
        print([value for _, value in told], fault)
"""


@needs_glibc
def test_what_the_allocator_keeps_is_no_room_for_a_template():
    done = subprocess.run([sys.executable, "-c", KEPT], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == f"[{2**25}] {BIG.replace('512', '64')}\n"


@pytest.mark.parametrize("said", ["{{ messages }}", "{{ messages[0].content }}"])
def test_a_plain_template_that_grows_with_what_is_said_is_bounded_too(peak, monkeypatch, make_tokenizer, said):
    template = "{% for m in messages %}" + said + "{% endfor %}"
    assert is_plain(template)
    forks = []
    fork = templates.os.fork
    monkeypatch.setattr(templates.os, "fork", lambda: forks.append(1) or fork())
    encoder = Encoder(make_tokenizer(template), 100, "error", False)
    talk = [{"role": "user", "content": "a" * 9000}, *({"role": "assistant", "content": "hi"} for _ in range(2499))]
    assert encoder.refused([Conversation("", TALK, "c.jsonl:1")]) == [None]
    assert not forks
    with pytest.raises(DataError, match=f"c.jsonl:2: the chat template ({BIG}|{LONG}) for this row"):
        encoder.refused([Conversation("", TALK, "c.jsonl:1"), Conversation("", talk, "c.jsonl:2")])
    assert forks
    assert peak() < 100e6


def test_what_is_left_early_leaves_no_process(monkeypatch):
    fork, pids = os.fork, []
    monkeypatch.setattr(templates.os, "fork", lambda: pids.append(fork()) or pids[-1])
    told = each(lambda _: time.sleep(60) if _ else 1, [0, 1])
    assert next(told) == (0, 1)
    began = time.monotonic()
    told.close()
    assert time.monotonic() - began < 30
    with pytest.raises(ChildProcessError):
        os.waitpid(pids[0], os.WNOHANG)


def test_what_is_forked_later_can_tokenise(monkeypatch, smollm2_tokenizer):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    many = ["Good morning. And how are you?"] * 100
    smollm2_tokenizer(many)  # in several threads, which a fork leaves behind
    list(each(str, [1, 2]))

    def tokenise():
        signal.alarm(60)  # it may wait for a thread that is not there
        smollm2_tokenizer(many)

    assert wait(forked(tokenise)) == 0


def test_in_a_thread_it_is_the_same():
    """A parallel launcher's job, or somebody's notebook, need not be in the main thread."""
    found = []

    def work():
        try:
            list(each(lambda _: [0 for _ in range(10**10)], [1]))
        except Unbounded as fault:
            found.append(str(fault))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found in ([LONG], [BIG])


def test_what_a_template_refuses_is_no_fault_of_its_size(make_tokenizer, data_config):
    template = "{% macro a() %}{% endmacro %}{{ raise_exception('turns must alternate') }}"
    prepare_tokenizer(make_tokenizer(), data_config("custom", chat_template=template))


def test_without_fork_all_is_done_in_place(monkeypatch):
    monkeypatch.setattr(templates, "os", SimpleNamespace())
    assert list(each(lambda number: 2 * number, [1, 2])) == [(1, 2), (2, 4)]
    assert fault_of("x", lambda: None) is None
    assert fault_of("x", lambda: pytest.fail("tried again")) is None
    with pytest.raises(ConfigError, match="is not Jinja"):
        RowTemplate("{{ a | nosuch }}", "k")
