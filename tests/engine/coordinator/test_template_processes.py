"""Chat templates that take too much, within one call of C too: they fail with the reason, and the others go on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from phalanx import LLM, EngineFault, InvalidRequest, SamplingParams
from phalanx.engine.coordinator.text import template_processes
from phalanx.engine.coordinator.text.chat_template import ChatTemplate
from phalanx.engine.coordinator.text.sandbox import MEMORY_BYTES
from phalanx.engine.coordinator.text.template_processes import RenderError, TemplateProcesses
from phalanx.tests.engine.conftest import CONFIG
from phalanx.tests.hostile_values import read_json

CHAT = [{"role": "user", "content": "Hi"}]
HANG_S = 60.0
LOOP = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
GROWING = "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = GROW %}{% endfor %}{{ ns.x }}"
MEMORY = "it takes more than|it makes a text longer than|it took longer than"  # on a busy machine, time comes first

TOO_MUCH_MEMORY = (
    "{{ 'a' * 10**9 }}", "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}", "{{ 'a' | center(10**9) }}",
    "{{ '%1000000000d' % 1 }}", "{{ '{:>1000000000}'.format(1) }}", "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ ('a\n' * 1000) | indent(10**9) }}", "{{ [1] | tojson(indent=10**9) }}", "{{ 'a'.ljust(10**10) | tojson }}",
    "{{ [0] * 10**9 }}", "{{ ('x' * 10**6).join(['y'] * 1000) }}",
    "{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}",
    *(GROWING.replace("GROW", grow) for grow in ("ns.x ~ ns.x", "'%s%s' % (ns.x, ns.x)", "[ns.x, ns.x] | join")),
)  # fmt: skip
TOO_MUCH_TIME = ("{{ 9 ** (9 ** 9) }}", GROWING.replace("GROW", "[ns.x, ns.x]"), LOOP)


@pytest.fixture(scope="module")
def shared() -> Iterator[TemplateProcesses]:
    made = TemplateProcesses()
    made.prepare()
    yield made
    made.close()


@pytest.fixture
def processes() -> Iterator[TemplateProcesses]:
    made = TemplateProcesses()
    yield made
    made.close()


def _peak_bytes(processes: TemplateProcesses) -> int:
    """What the processes that are idle took at their peak."""
    found = 0
    for process in processes._idle:
        with open(f"/proc/{process._process.pid}/status") as file:
            found = max(found, *(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:")))
    return found


@pytest.mark.parametrize("template", TOO_MUCH_MEMORY)
def test_a_template_that_makes_too_much_fails_at_once_and_takes_no_more_memory(
    shared: TemplateProcesses, template: str
) -> None:
    started = time.monotonic()
    with pytest.raises(RenderError, match=MEMORY):
        shared.render(template, {})
    assert time.monotonic() - started < HANG_S
    assert shared.render("{{ a }}", {"a": "well"}) == "well"
    assert _peak_bytes(shared) < 2 * MEMORY_BYTES


@pytest.mark.parametrize("template", TOO_MUCH_TIME, ids=["one call of C", "one text of a list", "a loop"])
def test_a_template_that_takes_too_long_fails_and_holds_up_no_other(shared: TemplateProcesses, template: str) -> None:
    errors: list[str] = []

    def render() -> None:
        try:
            ChatTemplate(template, {}, [], shared).render(CHAT)
        except InvalidRequest as error:
            errors.append(str(error))

    thread = threading.Thread(target=render)
    thread.start()
    neighbours = 0
    while thread.is_alive():
        assert ChatTemplate("{{ messages[0].content }}", {}, [], shared).render(CHAT).text == "Hi"
        neighbours += 1
    assert errors in (
        ["the chat template refused the messages: it took longer than 2 s"],
        ["the chat template refused the messages: it takes more than 256 MiB of memory"],
    )
    assert neighbours > 5


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ range(10**9) | list }}", "Range too big"),
        ("{{ raise_exception('no system messages') }}", "no system messages"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
        ("{{ a", "unexpected end of template"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
        ("{% " + "if a %}{% " * 3000, "recursion|memory|exit code|nested"),
        ("{{ " + "(" * 10_000 + ")" * 10_000 + " }}", "recursion|memory|exit code|nested"),
    ],
)
def test_a_template_that_cannot_be_rendered_says_why(shared: TemplateProcesses, template: str, why: str) -> None:
    with pytest.raises(RenderError, match=why):
        shared.render(template, {})
    assert shared.render("{{ a }}", {"a": 1}) == "1"


@pytest.mark.parametrize("value", [object(), 2**70, "\ud800", {"\ud800": 1}], ids=repr)
def test_a_value_that_no_message_can_hold_is_refused(shared: TemplateProcesses, value: object) -> None:
    with pytest.raises(InvalidRequest, match=r"cannot get|no.* valid Unicode"):
        shared.render("{{ a }}", {"a": value})


def test_a_template_may_open_no_file_and_start_no_process_even_outside_its_sandbox(
    processes: TemplateProcesses,
) -> None:
    processes.prepare()
    limits = psutil.Process(processes._idle[0]._process.pid)
    processes.render("", {})
    assert limits.rlimit(psutil.RLIMIT_NOFILE) == (3, 3)
    assert limits.rlimit(psutil.RLIMIT_NPROC) == (0, 0)
    assert [connection for connection in limits.net_connections("inet") if connection.laddr] == []


def test_a_process_that_was_killed_while_it_was_idle_is_replaced(processes: TemplateProcesses) -> None:
    processes.prepare()
    processes.render("", {})
    [process] = processes._idle
    os.kill(process._process.pid, signal.SIGKILL)
    process._process.wait()
    assert processes.render("{{ a }}", {"a": "again"}) == "again"


def test_a_process_that_is_stopped_is_ended_after_a_while(
    processes: TemplateProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_processes, "WALL_LIMIT_S", 0.3)
    monkeypatch.setattr(template_processes, "PATIENCE_S", 0.0)
    processes.prepare()
    process = processes._idle[0]._process
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(RenderError, match=r"longer than 0\.3 s"):
        processes.render("", {"a": "x" * 10**6})
    assert process.poll() is not None
    monkeypatch.undo()
    assert processes.render("{{ a }}", {"a": 1}) == "1"


def test_processes_end_when_they_are_closed_dropped_or_left_alone(processes: TemplateProcesses) -> None:
    processes.prepare()
    closed = processes._idle[0]._process
    processes.close()
    assert closed.poll() is not None

    dropped = TemplateProcesses()
    dropped.prepare()
    child = psutil.Process(dropped._idle[0]._process.pid)
    del dropped
    child.wait(HANG_S)

    program = (
        "import os, signal\nfrom phalanx.engine.coordinator.text.template_processes import TemplateProcesses\n"
        "made = TemplateProcesses(); made.prepare(); print(made._idle[0]._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
    deadline = time.monotonic() + HANG_S
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize("program", ["/no/such/python", "/bin/false"])
def test_a_process_that_does_not_start_is_no_fault_of_the_template(
    processes: TemplateProcesses, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", program)
        with pytest.raises(EngineFault, match=r"cannot be started|ended with exit code 1"):
            processes.render("{{ a }}", {"a": 1})
    assert processes.render("{{ a }}", {"a": 1}) == "1"


def test_many_threads_share_few_processes(processes: TemplateProcesses) -> None:
    texts: list[str] = []
    threads = [
        threading.Thread(
            target=lambda name: texts.append(processes.render("{{ a }}", {"a": name})), args=(str(number),)
        )
        for number in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts, key=int) == [str(number) for number in range(40)]
    assert len(processes._idle) == processes._count <= template_processes.PROCESSES


def test_an_engine_goes_on_after_such_a_template_and_leaves_no_process(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    settings = read_json(folder / "tokenizer_config.json")
    template = "{% if messages[0].content == 'Hi' %}{{ 'a' * 10**9 }}{% else %}{{ messages[0].content }}{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    before = set(psutil.Process().children())
    with LLM(str(folder), **CONFIG) as llm:
        with pytest.raises(InvalidRequest, match="it takes more than 256 MiB of memory"):
            llm.chat(CHAT, SamplingParams(max_tokens=1))
        answer = llm.chat([{"role": "user", "content": "on"}], SamplingParams(max_tokens=1, ignore_eos=True))
        assert len(answer.outputs[0].token_ids) == 1
        assert len(set(psutil.Process().children()) - before) == 1
    assert set(psutil.Process().children()) <= before
