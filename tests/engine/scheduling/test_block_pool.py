from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from phalanx.engine.scheduling.block_pool import BlockPool, IntegrityError, PrefixChain


def chain(tokens: list[int], block_size: int = 2, salt: str = "") -> PrefixChain:
    result = PrefixChain(block_size, salt)
    result.extend(tokens, len(tokens))
    return result


def filled(pool: BlockPool, tokens: list[int]) -> tuple[list[int], PrefixChain]:
    """Hold newly allocated blocks of two tokens each and publish all of them."""
    prefix = chain(tokens)
    blocks = pool.allocate(len(prefix.digests))
    for block, digest in zip(blocks, prefix.digests, strict=True):
        pool.publish(block, digest)
    return blocks, prefix


# -- PrefixChain


def test_a_chain_hashes_full_blocks_only() -> None:
    assert len(chain([1, 2, 3], block_size=2).digests) == 1
    assert len(chain([1, 2, 3, 4], block_size=2).digests) == 2


@given(
    tokens=st.lists(st.integers(0, 2**32 - 1), max_size=40), cuts=st.lists(st.integers(0, 40)), size=st.integers(1, 5)
)
def test_a_chain_built_bit_by_bit_equals_one_built_at_once(tokens: list[int], cuts: list[int], size: int) -> None:
    grown = PrefixChain(size, "salt")
    for cut in sorted(cuts):
        grown.extend(tokens, min(cut, len(tokens)))
    grown.extend(tokens, len(tokens))
    assert grown.digests == chain(tokens, size, "salt").digests


@given(
    a=st.lists(st.integers(0, 1), max_size=12),
    b=st.lists(st.integers(0, 1), max_size=12),
    salts=st.tuples(st.sampled_from(["", "x"]), st.sampled_from(["", "x"])),
)
def test_digests_are_equal_exactly_where_salt_and_whole_prefix_are(
    a: list[int], b: list[int], salts: tuple[str, str]
) -> None:
    pairs = zip(chain(a, 2, salts[0]).digests, chain(b, 2, salts[1]).digests, strict=False)
    for index, (left, right) in enumerate(pairs):
        end = 2 * (index + 1)
        assert (left == right) == (salts[0] == salts[1] and a[:end] == b[:end])


def test_a_copied_chain_goes_on_by_itself() -> None:
    first = chain([1, 2])
    twin = first.copy()
    first.extend([1, 2, 3, 4], 4)
    twin.extend([1, 2, 9, 9], 4)
    assert first.digests == chain([1, 2, 3, 4]).digests
    assert twin.digests == chain([1, 2, 9, 9]).digests


# -- BlockPool


def test_allocation_hands_out_each_block_once_and_takes_it_back() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(3), pool.allocate(1)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert pool.available == 0
    pool.release(first)
    assert pool.available == 3
    pool.check_integrity([("b", second, None)])


def test_asking_for_more_blocks_than_there_are_is_an_internal_error() -> None:
    pool = BlockPool(2)
    with pytest.raises(IntegrityError, match=r"3 blocks asked for, 2 of 2 available"):
        pool.allocate(3)


def test_a_published_prefix_is_matched_up_to_where_it_differs() -> None:
    pool = BlockPool(8)
    blocks, prefix = filled(pool, [1, 2, 3, 4, 5, 6])
    other = chain([1, 2, 3, 4, 9, 9])
    assert pool.match(prefix.digests, 3) == blocks
    assert pool.match(other.digests, 3) == blocks[:2]
    assert pool.match(other.digests, 1) == blocks[:1]
    assert pool.match(chain([1, 2], salt="x").digests, 1) == []


def test_a_shared_block_is_free_only_after_its_last_holder_released_it() -> None:
    pool = BlockPool(2)
    blocks, prefix = filled(pool, [1, 2])
    pool.acquire(blocks)
    pool.check_integrity([("a", blocks, prefix), ("b", blocks, prefix)])
    pool.release(blocks)
    assert (pool.available, pool.held(blocks)) == (1, 1)
    pool.release(blocks)
    assert (pool.available, pool.held(blocks)) == (2, 0)
    pool.check_integrity([])


def test_what_is_forgotten_is_matched_no_more_unless_somebody_else_holds_it() -> None:
    pool = BlockPool(3)
    blocks, prefix = filled(pool, [1, 2])
    pool.acquire(blocks)
    pool.forget(blocks)
    pool.release(blocks)
    assert pool.match(prefix.digests, 1) == blocks
    pool.check_integrity([("b", blocks, prefix)])
    pool.forget(blocks)
    pool.release(blocks)
    assert pool.match(prefix.digests, 1) == []
    assert pool.available == 3
    pool.check_integrity([])


def test_a_released_block_stays_matchable_until_it_is_evicted() -> None:
    pool = BlockPool(2)
    blocks, prefix = filled(pool, [1, 2])
    pool.release(blocks)
    assert pool.match(prefix.digests, 1) == blocks
    pool.allocate(1)
    assert pool.match(prefix.digests, 1) == blocks, "blank blocks go before cached ones"
    pool.allocate(1)
    assert pool.match(prefix.digests, 1) == []


def test_eviction_takes_the_least_recently_used_prefix_and_its_tail_first() -> None:
    pool = BlockPool(4)
    old, old_chain = filled(pool, [1, 1, 1, 1])
    new, new_chain = filled(pool, [2, 2, 2, 2])
    pool.release(old)
    pool.release(new)
    pool.acquire(pool.match(old_chain.digests, 2))  # used again: now the other one is older
    pool.release(old)
    assert pool.allocate(1) == new[1:]
    assert pool.match(new_chain.digests, 2) == new[:1]
    assert pool.allocate(2) == [new[0], old[1]]
    assert pool.match(old_chain.digests, 2) == old[:1]


def test_the_first_block_published_for_a_prefix_serves_it() -> None:
    pool = BlockPool(2)
    first, prefix = filled(pool, [1, 2])
    second, _ = filled(pool, [1, 2])
    assert pool.match(prefix.digests, 1) == first
    pool.check_integrity([("a", first, prefix), ("b", second, prefix)])
    pool.release(first)
    pool.release(second)
    pool.check_integrity([])


def test_the_integrity_check_finds_a_leaked_block() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(IntegrityError, match="block 0 has 1 references but is held by nobody"):
        pool.check_integrity([])


def test_the_integrity_check_finds_a_block_owned_twice() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    with pytest.raises(IntegrityError, match="block 0 has 1 references"):
        pool.check_integrity([("a", blocks, None), ("b", blocks, None)])
    with pytest.raises(IntegrityError, match="occurs twice in the table of a"):
        pool.check_integrity([("a", blocks * 2, None)])


def test_the_integrity_check_finds_a_block_shared_before_it_was_published() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.acquire(blocks)
    with pytest.raises(IntegrityError, match=r"shared by \['a', 'b'\] but was never published"):
        pool.check_integrity([("a", blocks, None), ("b", blocks, None)])


def test_the_integrity_check_finds_a_block_that_caches_another_prefix() -> None:
    pool = BlockPool(2)
    blocks, _ = filled(pool, [1, 2])
    with pytest.raises(IntegrityError, match="block 0 is entry 0 of a but caches another prefix"):
        pool.check_integrity([("a", blocks, chain([3, 4]))])


def test_the_integrity_check_finds_a_block_released_too_often() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    pool.release(blocks)
    with pytest.raises(IntegrityError, match="block 0 has -1 references"):
        pool.check_integrity([])
