"""/inference/v1/generate: token ids in and out."""

from __future__ import annotations

from msgspec import UNSET

from ....engine.protocol.messages import Delta, Event, Finished, Submit
from ..gateway import Gateway, affinity_of
from ..http.exchange import Exchange
from ..http.sse import event as sse_event
from ..schemas.fields import check_stream, timeout_of, to_sampling
from ..schemas.refused import REFUSED_GENERATE
from ..schemas.responses import GenerateChoice, GenerateResponse
from ..schemas.tokens import GenerateRequest, GenerateSampling
from .answering import Answer, Counter, collect, reason, stream, timings, usage
from .logprobs import chat_logprobs, prompt_logprobs


async def generate(gateway: Gateway, exchange: Exchange) -> None:
    """Continue token ids."""
    request = await exchange.read(GenerateRequest, REFUSED_GENERATE)
    exchange.take_request_id(request.request_id)
    given = request.sampling_params or GenerateSampling()
    check_stream(request.stream, request.stream_options, given.prompt_logprobs)
    _, info = gateway.model(request.model)
    sampling = to_sampling(
        given,
        gateway.config,
        info,
        max_tokens=given.max_tokens,
        logprobs=given.logprobs,
        prompt_logprobs=given.prompt_logprobs,
        prefix="sampling_params.",
    )
    submit = Submit(
        id=gateway.new_id(),
        token_ids=request.token_ids,
        sampling=sampling,
        priority=request.priority or 0,
        cache_salt=exchange.salted(request.cache_salt),
    )

    affinity = affinity_of(submit.cache_salt, request.token_ids)
    async with gateway.generation(
        exchange, bool(request.stream), timeout_of(request.timeout, gateway.config)
    ) as generation:
        generation.admit(1, len(request.token_ids))
        await generation.start([submit], affinity)
        if request.stream:
            await stream(gateway, exchange, generation, _Writer(request, exchange.request_id))
            return
        collected = await collect(generation)

    finished = collected.finished[0]
    choices = []
    for index in range(sampling.n):
        answer = collected.answers.get((0, index), Answer())
        choices.append(
            GenerateChoice(
                index=index,
                token_ids=answer.token_ids,
                logprobs=None if given.logprobs is None else chat_logprobs(answer.logprobs or [], as_ids=True),
                finish_reason=reason(answer.ending),
                stop_reason=answer.ending.stop_reason if answer.ending else None,
            )
        )
    made = GenerateResponse(
        request_id=exchange.request_id,
        choices=choices,
        usage=usage([finished]),
        timings=timings([finished], request.return_timings),
    )
    if given.prompt_logprobs is not None:
        made.prompt_logprobs = prompt_logprobs(finished.prompt_logprobs or [])
    await exchange.respond_json(made)


class _Writer:
    """The chunks of a streamed answer."""

    def __init__(self, request: GenerateRequest, name: str) -> None:
        self._request = request
        self._name = name
        self._logprobs = request.sampling_params is not None and request.sampling_params.logprobs is not None
        self._counter = Counter(request.stream_options)

    def write(self, number: int, event: Event) -> bytes:
        self._counter.count(number, event)
        if isinstance(event, Delta) and event.token_ids:
            choice = GenerateChoice(index=event.index, token_ids=event.token_ids)
            if self._logprobs:
                choice.logprobs = chat_logprobs(event.logprobs or [], as_ids=True)
            return self._chunk(choice)
        if isinstance(event, Finished):
            return b"".join(
                self._chunk(
                    GenerateChoice(
                        index=ending.index,
                        token_ids=[],
                        finish_reason=reason(ending),
                        stop_reason=ending.stop_reason,
                    )
                )
                for ending in event.completions
            )
        return b""

    def end(self) -> bytes:
        usage_at_end = self._counter.at_end()
        if usage_at_end is None and not self._request.return_timings:
            return b""
        return sse_event(
            GenerateResponse(
                request_id=self._name,
                choices=[],
                usage=UNSET if usage_at_end is None else usage_at_end,
                timings=timings(self._counter.finished, self._request.return_timings),
            )
        )

    def _chunk(self, choice: GenerateChoice) -> bytes:
        usage_so_far = self._counter.so_far(0, choice.index)
        return sse_event(GenerateResponse(request_id=self._name, choices=[choice], usage=usage_so_far))
