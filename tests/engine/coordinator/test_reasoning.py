"""A model's thinking apart from its answer, however its tags are written and wherever a step cuts them."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from phalanx import SamplingParams
from phalanx.engine.constraints.matcher import Beginning
from phalanx.engine.coordinator.output_processor import OutputProcessor
from phalanx.engine.coordinator.text.reasoning import Phase, ReasoningSplitter, ReasoningTags, find_tags
from phalanx.engine.coordinator.tokenizer import Tokenizer
from phalanx.engine.protocol.logprobs import TokenLogprobs
from phalanx.engine.protocol.messages import Delta, Event, Finished, Submit
from phalanx.engine.protocol.reasoning_tags import REASONING_TAGS
from phalanx.engine.scheduling.request import Request, SequenceUpdate
from phalanx.engine.scheduling.step_plan import SlotSampling

PIECES = [
    "Let me see.", "\n", "\n\n", " 2 < 3 ", "é你🙂", "<", "</", "</thin", "<think", "think>", "<tool_call>", "{1}", "x"
]  # fmt: skip


def _folder(folder: Path, tiny: Path, special: bool | None) -> Path:
    """The tiny model's tokenizer with the tags as special tokens, as tokens that are none, or (None) without them."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    if special is not None:
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        backend.add_tokens([AddedToken(tag, special=special, normalized=False) for tag in REASONING_TAGS[0]])
        backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("thinking")
    kinds = {"text": None, "token": False, "special": True}
    return {name: Tokenizer(_folder(root / name, tiny, special)) for name, special in kinds.items()}


class _Answer:
    """What a client gets of one scripted completion."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        continues: bool = False,
        splits: bool = True,
        stop_in_reasoning: bool = False,
        **sampling: Any,
    ) -> None:
        self.events: list[Event] = []
        self.stopped = False
        self.processor = OutputProcessor(tokenizer, lambda client, event: self.events.append(event), self._stop)
        self.request = Request(
            id="inner",
            prompt=tokenizer.encode(prompt),
            samplings=[SlotSampling()],
            max_tokens=9999,
            eos_token_ids=frozenset([258]),
            stop_token_ids=frozenset(),
            arrived_at=1.0,
        )
        self.request.take_on(0, 20000, None)
        submit = Submit(
            id="outer",
            prompt=prompt,
            sampling=SamplingParams(**sampling),
            split_reasoning=splits,
            stop_in_reasoning=stop_in_reasoning,
            continue_final_message=continues,
        )
        self.processor.start(b"", submit, self.request)

    def _stop(self, request: str, index: int, stop: str) -> None:
        self.stopped = True

    def bring(self, tokens: list[int], reason: str | None = None) -> _Answer:
        """Take in the tokens of one step."""
        entries = [TokenLogprobs(token, -1.0, 1, [], []) for token in tokens]
        sequence = self.request.sequences[0]
        self.processor.update(SequenceUpdate(self.request, sequence, tokens, entries, reason, None, reason is not None))
        return self

    def end(self, reason: str = "length") -> _Answer:
        """Nothing more comes."""
        return self.bring([], reason)

    @property
    def deltas(self) -> list[Delta]:
        return [event for event in self.events if isinstance(event, Delta)]

    @property
    def parts(self) -> tuple[str, str]:
        """(thinking, answer)"""
        return "".join(delta.reasoning for delta in self.deltas), "".join(delta.text for delta in self.deltas)

    @property
    def finished(self) -> Finished:
        finished = self.events[-1]
        assert isinstance(finished, Finished)
        return finished


@pytest.mark.parametrize("kind", ["text", "token", "special"])
@pytest.mark.parametrize(
    ("prompt", "answer", "parts"),
    [
        ("user: hi\n<think>\n", "Hm.</think>Yes", ("Hm.", "Yes")),
        ("user: hi\n<think>", "\nHm.\n</think>\n\nYes", ("\nHm.\n", "\n\nYes")),
        ("user: hi\n<think>\n\n</think>\n\n", "Yes <think>no</think>", ("", "Yes <think>no</think>")),
        ("user: hi\n", "<think>Hm.</think>Yes", ("Hm.", "Yes")),
        ("user: hi\n", "\n \n<think>Hm.</think>Yes", ("Hm.", "Yes")),
        ("user: hi\n", "<think></think>Yes", ("", "Yes")),
        ("user: hi\n", "Yes. <think>Hm.</think>", ("", "Yes. <think>Hm.</think>")),
        ("user: hi\n", "\n\nYes", ("", "\n\nYes")),
        ("user: hi\n", " \n", ("", " \n")),
        ("user: hi\n", "<thin ice", ("", "<thin ice")),
        ("user: what is <think>?\n", "A tag.", ("", "A tag.")),
        ("<think>a</think> b\nuser: more\n", "Yes", ("", "Yes")),
        ("user: hi\n<think>\n", "Hm. </thin", ("Hm. </thin", "")),
        ("user: hi\n<think>\n", "", ("", "")),
        ("user: hi\n<think>\n", "a</think>b</think>c", ("a", "b</think>c")),
    ],
)
def test_thinking_is_split_off(
    tokenizers: dict[str, Tokenizer], kind: str, prompt: str, answer: str, parts: tuple[str, str]
) -> None:
    tokenizer = tokenizers[kind]
    one_by_one = _Answer(tokenizer, prompt)
    for token in tokenizer.encode(answer):
        one_by_one.bring([token])
    at_once = _Answer(tokenizer, prompt).bring(tokenizer.encode(answer)).end()
    assert one_by_one.end().parts == at_once.parts == parts
    thinking = prompt.rstrip().endswith("<think>") and "</think>" not in answer
    assert at_once.finished.completions[0].thinking == thinking


@pytest.mark.parametrize("kind", ["text", "token", "special"])
@pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_thinking_is_the_same_wherever_a_step_cuts_it(tokenizers: dict[str, Tokenizer], kind: str, count: int) -> None:
    tokenizer = tokenizers[kind]
    random_pieces = random.Random(17)

    def text(most: int) -> str:
        return "".join(random_pieces.choices(PIECES, k=random_pieces.randrange(most)))

    for number in range(count):
        thinking, answer = text(8).replace("</think>", ""), text(6)
        prompt, begins = [("hi\n<think>\n", ""), ("hi\n", "<think>")][number % 2]
        tokens = tokenizer.encode(f"{begins}{thinking}</think>{answer}")
        reasoning_tokens = len(tokenizer.encode(f"{begins}{thinking}</think>"))
        for place in range(len(tokens) + 1):
            made = _Answer(tokenizer, prompt).bring(tokens[:place]).bring(tokens[place:]).end()
            assert made.parts == (thinking, answer), (number, place)
            assert made.finished.usage.reasoning_tokens == reasoning_tokens
            assert made.finished.usage.completion_tokens == len(tokens)


@pytest.mark.parametrize("kind", ["text", "token", "special"])
def test_a_deltas_texts_are_those_of_its_tokens(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    tokens = tokenizer.encode("\n<think>né </thi 你</think>🙂 yes STO")
    made = _Answer(tokenizer, "hi\n", stop=["STOP"])
    for token in tokens:
        made.bring([token])
    made.end()
    sent: list[int] = []
    for delta in made.deltas:
        assert (delta.position, len(delta.logprobs or [])) == (len(sent), len(delta.token_ids))
        sent += delta.token_ids
        reached = "".join(each.reasoning + each.text for each in made.deltas[: made.deltas.index(delta) + 1])
        decoded = tokenizer.decode(sent).replace("</think>", "").lstrip().removeprefix("<think>")
        assert reached == decoded or not decoded.isprintable()
    assert sent == tokens
    assert made.parts == ("né </thi 你", "🙂 yes STO")


@pytest.mark.parametrize("kind", ["text", "token"])
def test_stop_strings_do_not_fire_within_thinking_unless_asked(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    tokens = tokenizer.encode("a STOP b</think>c STOP d")
    later = _Answer(tokenizer, "hi<think>", stop=["STOP"])
    sooner = _Answer(tokenizer, "hi<think>", stop=["STOP"], stop_in_reasoning=True)
    at_tag = _Answer(tokenizer, "hi<think>", stop=["</think>"], stop_in_reasoning=True)
    for token in tokens:
        for made in (later, sooner, at_tag):
            if not made.stopped:
                made.bring([token])
    assert (later.stopped, later.parts) == (True, ("a STOP b", "c "))
    assert (sooner.stopped, sooner.parts) == (True, ("a ", ""))
    assert (at_tag.stopped, at_tag.parts) == (True, ("a STOP b", ""))
    thinking = [made.bring([], "stop").finished.completions[0].thinking for made in (later, sooner, at_tag)]
    assert thinking == [False, True, True]


def test_a_stop_string_does_not_begin_in_the_thinking_and_end_in_the_answer(tokenizers: dict[str, Tokenizer]) -> None:
    made = _Answer(tokenizers["token"], "hi<think>", stop=["ab"])
    made.bring(tokenizers["token"].encode("xa</think>bab")).end()
    assert (made.stopped, made.parts) == (True, ("xa", "b"))


def test_without_the_field_thinking_is_text_with_its_tags(tokenizers: dict[str, Tokenizer]) -> None:
    made = _Answer(tokenizers["token"], "hi\n", splits=False)
    made.bring(tokenizers["token"].encode("<think>a</think>b")).end()
    assert made.parts == ("", "<think>a</think>b")
    assert made.finished.usage.reasoning_tokens == 0
    assert not made.finished.completions[0].thinking


@pytest.mark.parametrize("kind", ["text", "token", "special"])
def test_a_message_that_is_continued_goes_on_where_it_was(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    begun = "<|im_start|>assistant\n<think>\nHm, let me"
    assert _Answer(tokenizer, begun, continues=True).bring(tokenizer.encode(" see</think>Yes")).end().parts == (
        " see",
        "Yes",
    )
    ended = f"{begun}</think>Well, "
    assert _Answer(tokenizer, ended, continues=True).bring(tokenizer.encode("yes")).end().parts == ("", "yes")
    other = "<|im_start|>user\n<think>\n<|im_end|>\n<|im_start|>assistant\nWell, "
    assert _Answer(tokenizer, other, continues=True).bring(tokenizer.encode("yes")).end().parts == ("", "yes")


def test_a_tag_that_is_a_token_is_not_what_spells_it(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["token"]
    spelled = [token for letter in "</think>" for token in tokenizer.encode(letter)]
    closing = tokenizer.encode("</think>")
    assert len(closing) == 1
    made = _Answer(tokenizer, "hi<think>").bring([*tokenizer.encode("a"), *spelled, *closing, *tokenizer.encode("b")])
    assert made.end().parts == ("a</think>", "b")


def test_an_answer_that_ends_within_its_thinking_says_so(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["token"]
    for tokens, reason in ((tokenizer.encode("Hm"), "length"), ([*tokenizer.encode("Hm"), 258], "stop")):
        made = _Answer(tokenizer, "hi<think>").bring(tokens, reason)
        assert made.parts == ("Hm", "")
        (completion,) = made.finished.completions
        assert (completion.finish_reason, completion.thinking) == (reason, True)
        assert made.finished.usage.reasoning_tokens == len(tokens)


def test_white_space_without_end_is_shown() -> None:
    splitter = ReasoningSplitter(ReasoningTags(*REASONING_TAGS[0]), Phase.START)
    assert "".join("".join(splitter.feed(" ")) for _ in range(100)) == " " * 100


def test_tags_are_a_models_tokens_or_what_its_template_names() -> None:
    assert find_tags({"[THINK]": 5, "[/THINK]": 6, "<think>": 7}, None) == ReasoningTags("[THINK]", "[/THINK]", 5, 6)
    assert find_tags({}, "{{ '[/THINK]' }}") == ReasoningTags("[THINK]", "[/THINK]")
    assert find_tags({}, None) == ReasoningTags("<think>", "</think>")


def test_a_grammar_begins_after_thinking_that_the_prompt_or_the_answer_opens(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["token"]
    opening, closing = (tokenizer.encode(tag, special=True)[-1] for tag in REASONING_TAGS[0])
    text = tokenizer.encode("ab")
    may_open = Beginning(after=closing, opens=opening)
    for prompt, continues, expected in [
        ([*text, opening], False, Beginning(after=closing, open=True)),
        ([*text, opening, *text], True, Beginning(after=closing, open=True)),
        ([*text, opening, closing], False, Beginning()),
        ([opening, closing, *text], True, Beginning()),
        ([opening, closing, *text], False, may_open),  # of an earlier message
        (text, False, may_open),
    ]:
        assert tokenizer.grammar_beginning(prompt, continues) == expected, (prompt, continues)
    assert tokenizers["text"].grammar_beginning(text, False) == Beginning()
