"""launch.chat, in a real terminal, and on pipes."""

from __future__ import annotations

from pathlib import Path

import pytest
from phalanx.launch.chat import Conversation
from phalanx.tests.launch.programs import ALONE, TORCHRUN, InTerminal, command, run

ENDLESS = ("sampling.max_tokens=20000", "sampling.ignore_eos=true", "sampling.temperature=1")
READY = "drop the line being typed"


def count_words(messages: list[dict[str, object]]) -> int:
    return sum(len(str(message["content"]).split()) for message in messages)


def test_the_oldest_turns_make_room_and_the_system_message_stays() -> None:
    conversation = Conversation("be brief", count_words, limit=8)
    assert conversation.ask("one two") == 0
    conversation.answer("three")
    assert conversation.ask("four") == 0
    conversation.answer("five six")
    assert conversation.ask("seven eight") == 2
    assert [message["content"] for message in conversation.messages] == ["be brief", "four", "five six", "seven eight"]


def test_a_question_that_alone_is_too_long_is_kept_for_the_engine_to_refuse() -> None:
    conversation = Conversation(None, count_words, limit=3)
    conversation.ask("short")
    conversation.answer("yes")
    assert conversation.ask("a much too long question") == 2
    conversation.take_back()
    assert conversation.messages == []


def test_reset_forgets_all_but_the_system_message() -> None:
    conversation = Conversation("be brief", count_words, limit=100)
    conversation.ask("one")
    conversation.answer("two")
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "be brief"}]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ALONE, TORCHRUN], ids=["alone", "torchrun"])
def test_ctrl_c_stops_the_answer_and_not_the_program(tiny: Path, launcher: tuple[str, ...]) -> None:
    terminal = InTerminal(command("chat", f"model={tiny}", *ENDLESS, launcher=launcher))
    terminal.expect(READY)
    for question in ("first", "second"):
        terminal.expect("> ")
        terminal.type(f"{question}\r")
        terminal.expect(question)
        terminal.expect("\n")
        while not terminal.more(0.5):  # the answer has begun
            pass
        terminal.type("\x03")
        terminal.expect("[stopped]")
    terminal.expect("> ")
    terminal.type("/exit\r")
    assert terminal.wait() == 0


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ALONE, TORCHRUN], ids=["alone", "torchrun"])
def test_ctrl_c_at_the_prompt_drops_the_line_and_says_how_to_leave(tiny: Path, launcher: tuple[str, ...]) -> None:
    terminal = InTerminal(command("chat", f"model={tiny}", "sampling.max_tokens=2", launcher=launcher))
    modes = terminal.modes()
    terminal.expect(READY)
    terminal.expect("> ")
    terminal.type("half a question\x03")
    terminal.expect("(Ctrl-D or /exit leaves")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.wait() == 0
    assert terminal.modes() == modes


@pytest.mark.slow
def test_a_conversation_that_outgrows_the_model_says_so_and_goes_on(tiny: Path) -> None:
    lines = [f"question number {number}" for number in range(6)]
    ended = run("chat", f"model={tiny}", "max_model_len=128", "sampling.max_tokens=8", stdin="\n".join(lines) + "\n")
    assert "oldest messages were forgotten" in ended.stdout
    assert "error" not in ended.stdout
    assert ended.returncode == 0


@pytest.mark.slow
def test_on_pipes_each_line_is_answered_and_a_refused_one_ends_nothing(tiny: Path) -> None:
    long = "much " * 100
    ended = run(
        "chat", f"model={tiny}", "max_model_len=128", "sampling.max_tokens=4", stdin=f"hello\n{long}\n/reset\nbye"
    )
    assert ended.stdout.count("[sampling.max_tokens or max_model_len reached]") == 2
    assert ended.stdout.count("error: the prompt has") == 1
    assert "The conversation was forgotten." in ended.stdout
    assert ended.returncode == 1


@pytest.mark.slow
def test_commands_are_listed_and_a_mistyped_one_is_no_question(tiny: Path) -> None:
    ended = run("chat", f"model={tiny}", stdin="/help\n/rest\n/exit\nnever asked\n")
    assert ended.stdout.count("/reset   forget the conversation") == 2
    assert "/rest is no command." in ended.stdout
    assert ended.returncode == 0
