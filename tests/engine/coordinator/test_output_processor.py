"""From token ids to what a client reads: whole characters, stop strings, reasons, usage and timings."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from phalanx import LLM, InvalidRequest, SamplingParams
from phalanx.engine.client.outputs import CompletionOutput
from phalanx.engine.coordinator.output_processor import OutputProcessor, StopStrings
from phalanx.engine.coordinator.text.token_text import IncrementalDetokenizer, TokenBytes
from phalanx.engine.coordinator.tokenizer import Tokenizer
from phalanx.engine.protocol.logprobs import TokenLogprobs
from phalanx.engine.protocol.messages import Accepted, Delta, Event, Finished, Submit
from phalanx.engine.scheduling.request import Request, SequenceUpdate
from phalanx.engine.scheduling.step_plan import SlotSampling

BASE = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
TEXT = "naïve 你好 🙂👩‍👩‍👧 café — done."


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    """Byte-level without merges: every character outside ASCII is several tokens."""
    return Tokenizer(tiny)


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def smollm2_tokenizers(smollm2: Path) -> tuple[Tokenizer, Any]:
    from transformers import AutoTokenizer

    return Tokenizer(smollm2), AutoTokenizer.from_pretrained(smollm2)


def _pieces(stream: IncrementalDetokenizer, tokens: list[int]) -> list[str]:
    return [*(stream.step(token) for token in tokens), stream.flush()]


# ---- characters


def test_a_character_of_several_tokens_appears_once_it_is_whole(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a🙂b")
    assert len(tokens) == 6
    assert _pieces(tokenizer.decoder(True), tokens) == ["a", "", "", "", "🙂", "b", ""]


def test_text_in_any_script_comes_back_unbroken(tokenizer: Tokenizer) -> None:
    pieces = _pieces(tokenizer.decoder(True), tokenizer.encode(TEXT))
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_answer_that_ends_inside_a_character_shows_the_replacement_character(tokenizer: Tokenizer) -> None:
    assert "".join(_pieces(tokenizer.decoder(True), tokenizer.encode("a🙂")[:-1])) == "a\ufffd"


@settings(deadline=None, max_examples=200)
@given(tokens=st.lists(st.integers(0, 1030), max_size=80), skip=st.booleans())
@example(tokens=[104] * 80, skip=True)
def test_the_pieces_of_any_tokens_join_to_what_decoding_them_at_once_gives(
    tokenizer: Tokenizer, reference: Any, tokens: list[int], skip: bool
) -> None:
    whole = reference.decode(tokens, skip_special_tokens=skip)
    assert "".join(_pieces(tokenizer.decoder(skip), tokens)) == whole


@settings(deadline=None, max_examples=100)
@given(data=st.lists(st.binary(min_size=1, max_size=6), max_size=30))
def test_the_pieces_of_any_bytes_join_to_what_decoding_them_at_once_gives(
    tokenizer: Tokenizer, reference: Any, data: list[bytes]
) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    letters = _byte_letters(ByteLevel.alphabet())
    tokens = reference.convert_tokens_to_ids([letters[byte] for byte in b"".join(data)])
    assert "".join(_pieces(tokenizer.decoder(True), tokens)) == reference.decode(tokens, skip_special_tokens=True)


def _byte_letters(alphabet: list[str]) -> list[str]:
    """The letter of each byte in the byte-level alphabet: printable Latin-1 stands for itself, the rest follows 255."""
    printable = [chr(byte) for byte in range(256) if chr(byte) in alphabet]
    others = (chr(256 + number) for number in range(256 - len(printable)))
    return [chr(byte) if chr(byte) in printable else next(others) for byte in range(256)]


@settings(deadline=None, max_examples=100)
@given(tokens=st.lists(st.integers(0, 49151), max_size=60), skip=st.booleans())
def test_the_pieces_of_a_real_tokenizer_join_to_what_decoding_at_once_gives(
    smollm2_tokenizers: tuple[Tokenizer, Any], tokens: list[int], skip: bool
) -> None:
    ours, theirs = smollm2_tokenizers
    assert "".join(_pieces(ours.decoder(skip), tokens)) == theirs.decode(tokens, skip_special_tokens=skip)


def test_a_tokenizer_whose_bytes_fall_back_one_by_one_shows_whole_characters_too() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁a": 257, "b": 258}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = [257, 258, *(byte + 1 for byte in "🙂你".encode()), *[257, 258] * 20]
    pieces = _pieces(IncrementalDetokenizer(backend, frozenset()), tokens)
    assert "".join(pieces) == backend.decode(tokens) == "ab🙂你" + " ab" * 20
    assert not any("\ufffd" in piece for piece in pieces)


def test_special_tokens_are_left_out_unless_asked_for(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a<|im_start|>b")
    assert len(tokens) == 3
    assert "".join(_pieces(tokenizer.decoder(True), tokens)) == "ab"
    assert "".join(_pieces(tokenizer.decoder(False), tokens)) == "a<|im_start|>b"


# ---- chat


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "Hello, how are you?"}],
        [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": "Capital of France?"},
            {"role": "assistant", "content": "Paris."},
            {"role": "user", "content": "Und 日本? 🙂"},
        ],
    ],
)
def test_messages_are_encoded_as_transformers_chat_template_encodes_them(
    smollm2_tokenizers: tuple[Tokenizer, Any], messages: list[dict[str, Any]]
) -> None:
    ours, theirs = smollm2_tokenizers
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ours.encode_messages(messages) == expected


def test_a_content_of_text_parts_is_the_text_where_the_template_knows_no_parts(
    smollm2_tokenizers: tuple[Tokenizer, Any],
) -> None:
    ours, _ = smollm2_tokenizers
    parts = [{"type": "text", "text": "Hello,"}, {"type": "text", "text": "how are you?"}]
    whole = ours.encode_messages([{"role": "user", "content": "Hello,\nhow are you?"}])
    assert ours.encode_messages([{"role": "user", "content": parts}]) == whole
    for part in ({"type": "image_url", "image_url": {"url": "x"}}, "text", {"type": "text", "text": 3}, {}):
        with pytest.raises(InvalidRequest, match="content part"):
            ours.encode_messages([{"role": "user", "content": [part]}])


def test_a_template_that_knows_parts_gets_them(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "parts")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    ours = Tokenizer(folder)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert ours.encode_messages([{"role": "user", "content": parts}]) == ours.encode("[a][b]")
    assert ours.encode_messages([{"role": "user", "content": "c"}]) == ours.encode("c")


def test_a_prompt_far_too_long_is_refused_by_its_beginning(smollm2_tokenizers: tuple[Tokenizer, Any]) -> None:
    ours, _ = smollm2_tokenizers
    word, limit = "hello ", 100
    for count in (1, limit, 3 * limit):
        text = word * count
        tokens = ours.encode(text)
        if len(tokens) <= limit:
            assert ours.encode(text, limit) == tokens
    started = time.process_time()
    for encode in (
        lambda: ours.encode(word * 1_000_000, limit),
        lambda: ours.encode_messages([{"role": "user", "content": word * 1_000_000}], limit),
    ):
        with pytest.raises(
            InvalidRequest, match=r"the first \d+ of \d+ characters have \d+ tokens already.*at most 100"
        ):
            encode()
    assert time.process_time() - started < 1.0  # the whole takes many seconds
    # What is few tokens for its length is looked at in growing beginnings, and taken.
    assert ours.encode(" " * 1500, limit) == ours.encode(" " * 1500)


# ---- stop strings


def _feed(stops: tuple[str, ...], pieces: list[str]) -> tuple[list[str], str | None]:
    """What is shown after each piece, and the stop string that ended it."""
    strings, shown = StopStrings(stops), []
    for piece in pieces:
        text, stop = strings.feed(piece)
        shown.append(text)
        if stop is not None:
            return shown, stop
    text, stop = strings.feed("", last=True)
    return [*shown, text], stop


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3, unique=True),
    st.lists(st.text("abc", max_size=3), max_size=8),
    st.lists(st.text("abc", max_size=3), max_size=8),
)
def test_a_stop_string_that_ends_before_min_tokens_is_text_and_one_that_ends_after_it_stops(
    stops: list[str], early: list[str], late: list[str]
) -> None:
    strings, shown, stop = StopStrings(tuple(stops)), "", None
    for piece, too_early in [*((piece, True) for piece in early), *((piece, False) for piece in late)]:
        text, stop = strings.feed(piece, too_early=too_early)
        shown += text
        if stop is not None:
            break
    if stop is None:
        shown += strings.feed("", last=True)[0]
    whole, boundary = "".join(early + late), len("".join(early))
    # After each late piece the text is looked through; of what it completes, the first to be complete stops.
    length, expected = boundary, (whole, None)
    for piece in late:
        length += len(piece)
        seen = whole[:length]
        ends = [(place + len(s), place, s) for s in stops for place in range(length) if seen.startswith(s, place)]
        if found := sorted(end for end in ends if end[0] > boundary):
            expected = whole[: found[0][1]], found[0][2]
            break
    assert (shown, stop) == expected


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "stop"),
    [
        ((), ["ab", "c"], ["ab", "c", ""], None),
        (("END",), ["a E", "N", "D b"], ["a ", "", ""], "END"),
        (("END",), ["a E", "N", "x"], ["a ", "", "ENx", ""], None),
        (("END",), ["a EN"], ["a ", "EN"], None),
        (("aab",), ["aa", "aab"], ["", "aa"], "aab"),
        (("\n\n",), ["a\n", "b\n", "\nc"], ["a", "\nb", ""], "\n\n"),
        # Of two that begin together, the shorter is complete first; of two in one piece, the earlier complete one wins.
        (("abcd", "ab"), ["xab", "cd"], ["x"], "ab"),
        (("bcd", "abcde"), ["xabcde"], ["xa"], "bcd"),
        (("one", "two"), ["say two or one"], ["say "], "two"),
        (("🙂",), ["a", "🙂", "b"], ["a", ""], "🙂"),
        (("aXb", "X"), ["aX"], ["a"], "X"),
    ],
)
def test_stop_strings(stops: tuple[str, ...], pieces: list[str], shown: list[str], stop: str | None) -> None:
    assert _feed(stops, pieces) == (shown, stop)


@given(
    text=st.text("ab", max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=10),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_however_a_text_is_cut_the_first_complete_stop_string_ends_it(
    text: str, cuts: list[int], stops: list[str]
) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    shown, stop = _feed(tuple(stops), [text[a:b] for a, b in itertools.pairwise(edges)])
    ends = {end: [s for s in stops if text[:end].endswith(s)] for end in range(len(text) + 1)}
    first = next((end for end, found in ends.items() if found), None)
    if first is None:
        assert ("".join(shown), stop) == (text, None)
    else:
        assert stop in ends[first]
        # The longest of those complete at the same place begins first, and its text must not be shown.
        assert "".join(shown) == text[: first - max(map(len, ends[first]))]


# ---- one request's events


class _Harness:
    """An OutputProcessor and one request on it; its events and the stop strings it asked the scheduler to act on."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, eos: int = 258) -> None:
        self.events: list[Event] = []
        self.stops: list[tuple[str, int, str]] = []
        self.processor = OutputProcessor(
            tokenizer, lambda client, event: self.events.append(event), lambda *found: self.stops.append(found)
        )
        self.request = Request(
            id="inner",
            prompt=[5, 6],
            samplings=[SlotSampling()] * sampling.n,
            max_tokens=99,
            eos_token_ids=frozenset([eos]),
            stop_token_ids=frozenset(sampling.stop_token_ids),
            arrived_at=1.0,
        )
        self.request.take_on(0, 200, None)
        self.processor.start(b"", Submit(id="outer", token_ids=[5, 6], sampling=sampling), self.request)

    def bring(self, index: int, tokens: list[int], reason: str | None = None, last: bool = False) -> None:
        entries = [TokenLogprobs(token, -1.0, 1, [], []) for token in tokens]
        sequence = self.request.sequences[index]
        self.processor.update(SequenceUpdate(self.request, sequence, tokens, entries, reason, None, last))

    def text(self, index: int) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta) and event.index == index)

    def tokens(self, index: int) -> list[int]:
        deltas = [event for event in self.events if isinstance(event, Delta) and event.index == index]
        assert [entry.token_id for delta in deltas for entry in delta.logprobs or []] == [
            token for delta in deltas for token in delta.token_ids
        ]
        return [token for delta in deltas for token in delta.token_ids]


def test_a_stop_string_across_tokens_is_cut_off_and_ends_its_completion(tokenizer: Tokenizer) -> None:
    harness = _Harness(tokenizer, SamplingParams(stop=("END",)))
    tokens = tokenizer.encode("hi END more")
    for token in tokens:
        harness.bring(0, [token])
    assert harness.text(0) == "hi "
    assert harness.tokens(0) == tokens[:6]
    assert harness.stops == [("inner", 0, "END")]
    harness.bring(0, [], "stop", last=True)
    finished = harness.events[-1]
    assert isinstance(finished, Finished)
    assert (finished.completions[0].finish_reason, finished.completions[0].stop_reason) == ("stop", "END")
    assert finished.usage.completion_tokens == 6
    assert harness.processor.forget("inner") is None


def test_a_stop_string_ends_one_of_several_completions_alone(tokenizer: Tokenizer) -> None:
    harness = _Harness(tokenizer, SamplingParams(n=2, stop=("b",)))
    a, b = tokenizer.encode("ab")
    harness.bring(0, [a])
    harness.bring(1, [a])
    harness.bring(0, [b])
    harness.bring(1, [a])
    harness.bring(0, [], "stop")
    harness.bring(1, [a], "length", last=True)
    assert (harness.text(0), harness.text(1)) == ("a", "aaa")
    finished = harness.events[-1]
    assert isinstance(finished, Finished)
    assert [(c.finish_reason, c.stop_reason) for c in finished.completions] == [("stop", "b"), ("length", None)]
    assert finished.usage.completion_tokens == 5


def test_held_back_text_is_delivered_when_the_length_ends_the_answer(tokenizer: Tokenizer) -> None:
    harness = _Harness(tokenizer, SamplingParams(stop=("END",)))
    for token in tokenizer.encode("a E"):
        harness.bring(0, [token])
    assert harness.text(0) == "a "
    harness.bring(0, tokenizer.encode("N"), "length", last=True)
    assert harness.text(0) == "a EN"
    assert isinstance(harness.events[-1], Finished)


def test_a_stop_string_in_the_last_token_wins_over_the_length(tokenizer: Tokenizer) -> None:
    harness = _Harness(tokenizer, SamplingParams(stop=("b",)))
    harness.bring(0, tokenizer.encode("ab"), "length", last=True)
    finished = harness.events[-1]
    assert isinstance(finished, Finished)
    assert (finished.completions[0].finish_reason, finished.completions[0].stop_reason) == ("stop", "b")
    assert harness.text(0) == "a"
    assert harness.stops == []


def test_an_end_of_sequence_token_is_counted_but_not_shown(tokenizer: Tokenizer) -> None:
    [end] = tokenizer.encode("<|im_end|>")
    harness = _Harness(tokenizer, SamplingParams(skip_special_tokens=False), eos=end)
    harness.bring(0, tokenizer.encode("a"))
    harness.bring(0, [end], "stop", last=True)
    assert harness.text(0) == "a"
    assert harness.tokens(0) == [*tokenizer.encode("a"), end]


def test_an_unfinished_character_is_delivered_when_the_request_is_aborted(tokenizer: Tokenizer) -> None:
    harness = _Harness(tokenizer, SamplingParams())
    harness.bring(0, tokenizer.encode("🙂")[:2])
    harness.bring(0, [], "abort", last=True)
    assert harness.text(0) == "\ufffd"


def test_the_first_event_says_that_the_request_was_accepted_and_with_what(tokenizer: Tokenizer) -> None:
    harness = _Harness(tokenizer, SamplingParams())
    assert harness.events == [Accepted(id="outer", prompt_tokens=2, seed=0, max_tokens=99)]


@pytest.mark.parametrize("include", [False, True])
def test_the_stop_string_is_shown_where_it_is_wanted(tokenizer: Tokenizer, include: bool) -> None:
    harness = _Harness(tokenizer, SamplingParams(stop=("END", "more"), include_stop_str_in_output=include))
    for token in tokenizer.encode("hi END more"):
        harness.bring(0, [token])
    assert harness.text(0) == ("hi END" if include else "hi ")


@settings(deadline=None, max_examples=300)
@given(
    text=st.text(alphabet="ENDab 🙂é你", max_size=30),
    stops=st.lists(st.sampled_from(["END", "E🙂", "aab", "你"]), max_size=2),
    steps=st.lists(st.integers(1, 4), min_size=1, max_size=20),
    ends=st.booleans(),
)
def test_a_deltas_text_is_that_of_its_tokens(
    tokenizer: Tokenizer, text: str, stops: list[str], steps: list[int], ends: bool
) -> None:
    harness = _Harness(tokenizer, SamplingParams(stop=tuple(stops)))
    tokens = tokenizer.encode(text)
    place = 0
    for count in itertools.cycle(steps):
        if place >= len(tokens) or harness.stops:
            break
        harness.bring(0, tokens[place : place + count])
        place += count
    if ends and not harness.stops:
        harness.bring(0, [], "length", last=True)

    deltas = [event for event in harness.events if isinstance(event, Delta)]
    position, sent = 0, ""
    for number, delta in enumerate(deltas):
        assert (delta.position, len(delta.logprobs or [])) == (position, len(delta.token_ids))
        position += len(delta.token_ids)
        sent += delta.text
        decoded = tokenizer.decode(tokens[:position])
        if harness.stops and number == len(deltas) - 1:
            assert decoded.startswith(sent)  # cut at the stop string
        else:
            assert decoded == sent
    if ends and not harness.stops:
        assert (position, sent) == (len(tokens), text)


def test_log_probabilities_bear_the_bytes_of_their_tokens(tokenizer: Tokenizer) -> None:
    harness = _Harness(tokenizer, SamplingParams())
    harness.request.prompt_logprobs = [TokenLogprobs(tokenizer.encode("b")[0], -1.0, 1, [], [])]
    smile = tokenizer.encode("🙂")
    for token in smile:
        harness.bring(0, [token])
    harness.bring(0, [], "length", last=True)
    [delta] = [event for event in harness.events if isinstance(event, Delta)]
    assert b"".join(entry.token_bytes for entry in delta.logprobs or []) == "🙂".encode()
    assert (delta.logprobs or [])[1].token_bytes == "🙂".encode()[1:2]
    finished = harness.events[-1]
    assert isinstance(finished, Finished)
    assert [entry.token_bytes for entry in finished.prompt_logprobs or []] == [b"b"]


@settings(deadline=None, max_examples=200)
@given(tokens=st.lists(st.integers(0, 49151), max_size=60))
def test_the_bytes_of_tokens_join_to_their_text(smollm2_tokenizers: tuple[Tokenizer, Any], tokens: list[int]) -> None:
    ours, _ = smollm2_tokenizers
    joined = b"".join(ours.token_bytes[token] for token in tokens)
    assert joined.decode(errors="replace") == ours.decode(tokens)


def test_a_token_of_byte_fallback_stands_for_its_byte_and_an_unknown_one_for_nothing() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁a": 257, "<0xZZ>": 258}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    known = TokenBytes(backend, 300)
    assert [known[token] for token in (1 + 0xF0, 257, 258, 299, 300, -1)] == [b"\xf0", b" a", b"<0xZZ>", b"", b"", b""]


# ---- through the engine


def _one(llm: LLM, sampling: SamplingParams, prompt: str = "abc") -> CompletionOutput:
    return llm.generate([prompt], sampling)[0].outputs[0]


def test_the_answers_text_is_its_tokens_decoded_at_once(llm: LLM, reference: Any) -> None:
    for skip in (True, False):
        for seed in range(8):
            sampling = SamplingParams(
                max_tokens=40, temperature=3.0, seed=seed, ignore_eos=True, skip_special_tokens=skip
            )
            completion = _one(llm, sampling)
            assert completion.text == reference.decode(completion.token_ids, skip_special_tokens=skip)


def test_a_stop_string_cuts_the_same_answer_short(llm: LLM, tokenizer: Tokenizer) -> None:
    likely = dict.fromkeys(tokenizer.encode("abcdefgh"), 100.0)
    base = SamplingParams(max_tokens=40, temperature=1.5, seed=4, ignore_eos=True, logit_bias=likely)
    whole = _one(llm, base)
    stop = whole.text[10:13]
    place = whole.text.find(stop)
    stopped = _one(llm, msgspec.structs.replace(base, stop=("not in it", stop)))
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (whole.text[:place], "stop", stop)
    assert stopped.token_ids == whole.token_ids[: place + 3]


def test_a_stop_token_ends_the_answer_and_is_reported(llm: LLM) -> None:
    whole = _one(llm, BASE)
    stop = whole.token_ids[7]
    place = whole.token_ids.index(stop)
    stopped = _one(llm, msgspec.structs.replace(BASE, stop_token_ids=(stop,)))
    assert stopped.token_ids == whole.token_ids[: place + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)


def test_end_of_sequence_ends_the_answer_unless_ignored_or_too_early(llm: LLM, tiny: Path) -> None:
    eos = json.loads((tiny / "config.json").read_text())["eos_token_id"]
    likely = msgspec.structs.replace(BASE, logit_bias={eos: 100.0}, ignore_eos=False)
    ended = _one(llm, likely)
    assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == ([eos], "", "stop", None)
    ignored = _one(llm, msgspec.structs.replace(likely, ignore_eos=True))
    assert (ignored.token_ids, ignored.finish_reason) == ([eos] * 32, "length")
    late = _one(llm, msgspec.structs.replace(likely, min_tokens=5))
    assert eos not in late.token_ids[:5]
    assert (late.token_ids[5:], late.finish_reason) == ([eos], "stop")


def test_the_context_ends_an_answer_that_max_tokens_does_not(llm: LLM) -> None:
    output = llm.generate([[5] * 500], SamplingParams(ignore_eos=True))[0]
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (12, "length")


def test_usage_and_timings_fit_the_answer(llm: LLM) -> None:
    output = llm.generate([[9, 8, 7] * 7], msgspec.structs.replace(BASE, n=3, temperature=2.0))[0]
    assert output.usage.prompt_tokens == 21
    assert output.usage.completion_tokens == sum(len(completion.token_ids) for completion in output.outputs) == 96
    timings = output.timings
    assert 0 <= timings.queued_s <= timings.ttft_s <= timings.total_s
    assert timings.tpot_ms > 0
