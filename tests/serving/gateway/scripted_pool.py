"""A pool of engines that says what a test tells it to: no model, no tokenizer, events from another thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from phalanx.engine.errors import InvalidRequest, PhalanxError
from phalanx.engine.protocol.logprobs import TokenLogprobs
from phalanx.engine.protocol.messages import (
    Accepted,
    Completion,
    Delta,
    Detokenize,
    Detokenized,
    Event,
    Failed,
    Finished,
    ModelInfo,
    Submit,
    Timings,
    Tokenize,
    Tokenized,
    Usage,
)
from phalanx.serving.gateway.engine_pool import OnEvent, PoolState, Question

MODEL = ModelInfo(
    version="0",
    model="demo",
    dtype="float32",
    ranks=1,
    max_model_len=4096,
    max_num_seqs=64,
    block_size=16,
    total_blocks=100,
    vocab_size=256,
    eos_token_ids=[0],
    tokenizer_class="Bytes",
    chat_template="{{ messages }}",
    prefix_cache=True,
    report=[],
)


class ScriptedTicket:
    """Notes that its request was aborted."""

    def __init__(self) -> None:
        self.aborted = threading.Event()

    def abort(self) -> None:
        self.aborted.set()


class ScriptedPool:
    """Answers every request with `answer`, a token for each byte, and counts each byte of a prompt as a token."""

    def __init__(self, answer: str = "Hello world") -> None:
        self.answer = answer
        self.reasoning = ""
        """Thinking before the answer, of requests that split it off."""
        self.model = MODEL
        self.phase: PoolState = PoolState("ready")
        self.progress = True
        self.token_s = 0.0
        """Seconds between two tokens."""
        self.start_s = 0.0
        """Seconds before a request is accepted."""
        self.go_on = threading.Event()
        """No request is accepted before it is set."""
        self.go_on.set()
        self.refuse: PhalanxError | None = None
        """Raised by submit."""
        self.fail_first: PhalanxError | None = None
        """The request fails before it is accepted."""
        self.fail_after: tuple[int, PhalanxError] | None = None
        """The request fails after so many tokens."""
        self.stop_reason: str | int | None = None
        self.submits: list[Submit] = []
        self.tickets: list[ScriptedTicket] = []
        self.affinities: list[bytes] = []
        self.threads: list[threading.Thread] = []

    @property
    def state(self) -> PoolState:
        return self.phase

    def ready(self) -> bool:
        return self.phase.phase == "ready" and self.progress

    def models(self) -> Mapping[str, ModelInfo]:
        return {} if self.phase.phase == "loading" else {"demo": self.model, "org/alias": self.model}

    def submit(self, submit: Submit, on_event: OnEvent, *, affinity: bytes = b"") -> ScriptedTicket:
        if self.refuse is not None:
            raise self.refuse
        check_vocabulary(submit.token_ids)
        ticket = ScriptedTicket()
        self.submits.append(submit)
        self.tickets.append(ticket)
        self.affinities.append(affinity)
        thread = threading.Thread(target=self._run, args=(submit, on_event, ticket), daemon=True)
        self.threads.append(thread)
        thread.start()
        return ticket

    async def ask(self, command: Question) -> Event:
        if isinstance(command, Detokenize):
            check_vocabulary(command.token_ids)
            return Detokenized(id=command.id, text=bytes(command.token_ids).decode(errors="replace"))
        if isinstance(command, Tokenize):
            check_vocabulary(command.token_ids)
            ids = prompt_ids(command)
            return Tokenized(
                id=command.id, token_ids=ids, text=command.prompt, token_bytes=[bytes([token]) for token in ids]
            )
        raise InvalidRequest("not scripted")

    def join(self) -> None:
        for thread in self.threads:
            thread.join()

    def _run(self, submit: Submit, on_event: OnEvent, ticket: ScriptedTicket) -> None:
        self.go_on.wait()
        ended = ticket.aborted.wait(self.start_s) if self.start_s else False
        if self.fail_first is not None:
            on_event(Failed(submit.id, type(self.fail_first).__name__, str(self.fail_first)))
            return
        prompt, sampling = prompt_ids(submit), submit.sampling
        thinking = list(self.reasoning.encode()) if submit.split_reasoning else []
        tokens = [*thinking, *self.answer.encode()][: sampling.max_tokens or 1000]
        if not ended:
            on_event(Accepted(id=submit.id, prompt_tokens=len(prompt), seed=sampling.seed or 1, max_tokens=1000))
        text = _texts(bytes(tokens))
        made = 0
        for place, token in enumerate(tokens):
            if ended := ended or ticket.aborted.wait(self.token_s):
                break
            if self.fail_after is not None and place == self.fail_after[0]:
                error = self.fail_after[1]
                on_event(Failed(submit.id, type(error).__name__, str(error)))
                return
            logprobs = None if sampling.logprobs is None else [logprob_of(token, sampling.logprobs)]
            for index in range(sampling.n):
                said = ("", text[place]) if place < len(thinking) else (text[place], "")
                on_event(Delta(submit.id, index, said[0], [token], logprobs, place, said[1]))
            made += 1

        reason = "abort" if ended else "length" if len(tokens) == sampling.max_tokens else "stop"
        on_event(
            Finished(
                submit.id,
                [
                    Completion(index, reason, self.stop_reason, thinking=0 < made <= len(thinking))
                    for index in range(sampling.n)
                ],
                Usage(len(prompt), made * sampling.n, 2, min(made, len(thinking)) * sampling.n),
                Timings(0.5, 1.5, 1.0, 4.0),
                prompt if submit.return_prompt_token_ids else None,
                None
                if sampling.prompt_logprobs is None
                else [logprob_of(token, sampling.prompt_logprobs) for token in prompt[1:]],
            )
        )


def check_vocabulary(token_ids: list[int] | None) -> None:
    """Refuse what is no byte, as an engine refuses what its model does not know."""
    for token in token_ids or ():
        if token > 255:
            raise InvalidRequest(f"token_ids holds {token}, which is outside the model's vocabulary: 0 to 255")


def prompt_ids(prompt: Submit | Tokenize) -> list[int]:
    """A token for each byte of the text, or of the messages' contents; those that are kept."""
    if prompt.token_ids is not None:
        return prompt.token_ids
    text = prompt.prompt
    if text is None:
        text = "".join(str(message["content"]) for message in prompt.messages or ())
    return list(text.encode())[-(prompt.truncate_prompt_tokens or 0) :]


def logprob_of(token: int, count: int) -> TokenLogprobs:
    """The token is the likeliest; its rivals are the next bytes."""
    rivals = [(token + step) % 256 for step in range(count)]
    return TokenLogprobs(
        token,
        -0.25,
        1,
        rivals,
        [-0.25 if step == 0 else -1.0 - step for step in range(count)],
        bytes([token]),
        [bytes([rival]) for rival in rivals],
    )


def _texts(data: bytes) -> list[str]:
    """The text that each byte completes."""
    texts, begun = [], b""
    for byte in data:
        begun += bytes([byte])
        try:
            texts.append(begun.decode())
            begun = b""
        except UnicodeDecodeError:
            texts.append("")
    return texts


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for what another thread does; fail where it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
