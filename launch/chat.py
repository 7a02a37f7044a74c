"""A conversation in the terminal: `python -m phalanx.launch.chat`, also under torchrun."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..engine.client.llm import LLM
from ..engine.config import EngineConfig
from ..engine.coordinator.tokenizer import Message, Tokenizer
from ..engine.errors import EngineStopped, PhalanxError
from ..engine.models.hub import resolve_model
from ..engine.protocol.messages import Delta, Finished, Submit
from .cli.compose import Job
from .cli.display import write_stdout
from .cli.program import run_program
from .cli.schema import Keys
from .cli.terminal import Terminal
from .ranks.progress import loading_progress
from .ranks.session import follow, open_llm, why_stopped

ANSWER_TOKENS = 512
"""Tokens kept free for an answer whose max_tokens is not set, but at most a quarter of max_model_len."""
PROMPT = "> "
HELP = """/reset   forget the conversation
/help    this list
/exit    leave (or Ctrl-D)
Ctrl-C   stop the answer, or drop the line being typed"""


@dataclass
class ChatKeys(Keys):
    """The keys of chat, besides the engine's configuration."""

    system: str | None = None
    """The system message with which the conversation begins. It is taken as written, unless quoted for Hydra."""


class Conversation:
    """The messages so far; the oldest turns make room when they outgrow the model."""

    def __init__(self, system: str | None, count_tokens: Callable[[list[Message]], int], limit: int) -> None:
        """`limit` is the most tokens of the rendered conversation."""
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._count_tokens = count_tokens
        self._limit = limit
        self._turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """The system message and every turn kept."""
        return self._system + self._turns

    def ask(self, text: str) -> int:
        """Add the user's turn. Returns how many earlier messages were dropped to make room for it."""
        self._turns.append({"role": "user", "content": text})
        dropped = 0
        while len(self._turns) > 1 and self._count_tokens(self.messages) > self._limit:
            # A question leaves with its answer: templates want the roles to alternate.
            end = next(i for i in range(1, len(self._turns)) if self._turns[i]["role"] == "user")
            del self._turns[:end]
            dropped += end
        return dropped

    def answer(self, text: str) -> None:
        """Add the model's turn."""
        self._turns.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Drop the user's last turn, which got no answer."""
        self._turns.pop()

    def reset(self) -> None:
        """Forget every turn."""
        self._turns.clear()


class Chat:
    """Reads lines and answers them until there are no more."""

    def __init__(self, llm: LLM, config: EngineConfig, conversation: Conversation, terminal: Terminal | None) -> None:
        self._llm = llm
        self._config = config
        self._conversation = conversation
        self._terminal = terminal
        self._numbers = 0

    def run(self) -> int:
        """Answer line after line. Returns the exit code: 0, or 1 if a request failed and input is no terminal."""
        code = 0
        for line in self._lines():
            text = line.strip()
            if text == "/exit":
                break

            if text == "/reset":
                self._conversation.reset()
                print("The conversation was forgotten.")
            elif text == "/help":
                print(HELP)
            elif text.startswith("/") and len(text.split()) == 1:
                print(f"{text} is no command.\n{HELP}")
            elif text:
                answered = self._answer(line)
                code = code if answered or self._terminal is not None else 1
            elif self._terminal is not None:
                print("(Ctrl-D or /exit leaves, /help lists the commands)")
        return code

    def _lines(self) -> Iterator[str]:
        if self._terminal is None:
            yield from (line.rstrip("\r\n") for line in sys.stdin)
            return
        while (line := self._terminal.read_line(PROMPT)) is not None:
            yield line
        print()

    def _answer(self, text: str) -> bool:
        try:
            dropped = self._conversation.ask(text)
            if dropped:
                print(f"(the conversation outgrew max_model_len: its {dropped} oldest messages were forgotten)")
            self._numbers += 1
            answer = self._stream(
                Submit(id=f"turn-{self._numbers}", messages=self._conversation.messages, sampling=self._config.sampling)
            )
        except EngineStopped as error:
            raise why_stopped(self._llm, error) from None
        except PhalanxError as error:
            print(f"error: {error}")
            self._conversation.take_back()
            return False
        self._conversation.answer(answer)
        return True

    def _stream(self, submit: Submit) -> str:
        handle = self._llm.submit(submit)
        assert handle is not None
        text = ""
        ending = ""

        watched = self._terminal.on_interrupt(handle.abort) if self._terminal else contextlib.nullcontext()
        with watched:
            for event in handle:
                if isinstance(event, Delta) and event.index == 0:
                    text += event.text
                    write_stdout(event.text)
                elif isinstance(event, Finished):
                    ending = event.completions[0].finish_reason

        notes = {"abort": " [stopped]", "length": " [sampling.max_tokens or max_model_len reached]"}
        write_stdout(f"{notes.get(ending, '')}\n")
        return text


def chat(job: Job[ChatKeys]) -> int:
    """Converse on standard input and output until their end."""
    config = job.engine_config()
    if job.rank_info.rank != 0:
        follow(config, job.rank_info)
        return 0

    tokenizer = Tokenizer(resolve_model(config.tokenizer or config.model, weights=False))
    with open_llm(config, job.rank_info, loading_progress(job.rank_info)) as llm:
        status = llm.status()
        room = min(config.sampling.max_tokens or ANSWER_TOKENS, status.max_model_len // 4)
        conversation = Conversation(
            job.keys.system, lambda messages: len(tokenizer.encode_messages(messages)), status.max_model_len - room
        )

        terminal = Terminal() if sys.stdin.isatty() else None
        try:
            if terminal is not None:
                print("\n".join(status.report), HELP, sep="\n\n")
            return Chat(llm, config, conversation, terminal).run()
        finally:
            if terminal is not None:
                terminal.restore()


if __name__ == "__main__":
    run_program(ChatKeys, chat, f"{__package__}.chat", "converse with a model in the terminal")
