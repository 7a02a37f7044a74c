from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from phalanx.engine.scheduling.step_plan import Idle, SlotSampling, SlotStart, StepPlan, Stop, decode, encode

token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=5)
floats = st.floats(allow_nan=False, allow_infinity=False)
samplings = st.builds(
    SlotSampling,
    temperature=floats,
    top_k=st.integers(0, 2**31),
    top_p=floats,
    seed=st.integers(-(2**63), 2**63 - 1),
    end_token_ids=token_ids.map(tuple),
    bias_token_ids=token_ids.map(tuple),
    bias_values=st.lists(floats, max_size=5).map(tuple),
    logprobs=st.integers(-1, 20),
    processed_logprobs=st.booleans(),
)
plans = st.builds(
    StepPlan,
    step=st.integers(0, 2**62),
    starts=st.lists(
        st.builds(SlotStart, st.integers(0, 4096), st.integers(1, 32768), token_ids, samplings), max_size=2
    ),
    token_slots=token_ids,
    token_ids=token_ids,
    block_slots=token_ids,
    block_indices=token_ids,
    block_ids=token_ids,
    slots=token_ids,
    positions=token_ids,
    counts=token_ids,
    num_decodes=st.integers(0, 4096),
    sample_rows=token_ids,
)


@given(plan=plans)
def test_a_plan_comes_back_from_its_bytes_unchanged(plan: StepPlan) -> None:
    assert decode(encode(plan)) == plan


@pytest.mark.parametrize("message", [Stop(), Stop(b"\x00\xffpayload"), Idle()])
def test_other_control_messages_come_back_from_their_bytes_unchanged(message: Stop | Idle) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x93\x01\x02\x03", encode(Stop())[:-2]])
def test_bytes_that_are_no_control_message_are_refused(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode(data)


def test_a_plan_with_a_field_of_the_wrong_type_is_refused() -> None:
    wrong = msgspec.msgpack.encode(["step", "one", [], [], [], [], [], [], [], [], [], 0, []])
    with pytest.raises(msgspec.ValidationError, match="int"):
        decode(wrong)


def test_the_tokens_of_a_plan_are_those_of_all_its_rows() -> None:
    plan = StepPlan(1, [], [], [], [], [], [], [0, 1, 2], [4, 9, 0], [1, 1, 30], 2, [0, 1])
    assert plan.num_tokens == 32
