"""Which sequences share the blocks of a common prefix: those computed before, and those being computed right now."""

from __future__ import annotations

from collections.abc import Mapping

from .block_pool import BlockPool, PrefixChain
from .request import Request, Sequence


class PrefixSharing:
    """Matches waiting sequences with published blocks, and knows which blocks a running sequence will publish.

    A waiting sequence does better to wait while a sequence ahead of it computes its next block: see
    `is_being_computed`.
    """

    def __init__(self, pool: BlockPool, block_size: int, enabled: bool) -> None:
        """`enabled`: there is a prefix cache. Without one only the completions of one prompt share its blocks."""
        self._pool = pool
        self._block_size = block_size
        self._enabled = enabled
        self._computing: dict[bytes, Sequence] = {}  # digest of a block to come -> sequence that will publish it

    @property
    def computing(self) -> Mapping[bytes, Sequence]:
        """Digests of the blocks that running sequences will publish, and which sequence will."""
        return self._computing

    def chain_of(self, request: Request, arrival: int) -> PrefixChain | None:
        """Return the digests of the prompt's full blocks; None if nobody may share them."""
        if self._enabled:
            chain = PrefixChain(self._block_size, request.cache_salt)
        elif len(request.samplings) > 1:
            # Without a prefix cache the completions of one prompt still share its blocks: nobody else has this salt.
            chain = PrefixChain(self._block_size, f"request {arrival}")
        else:
            return None
        chain.extend(request.prompt, len(request.prompt))
        return chain

    def match(self, sequence: Sequence) -> list[int]:
        """Return the cached blocks it may use, and set its `awaited_digest` to the digest of the first one missing."""
        sequence.awaited_digest = b""
        if sequence.chain is None:
            return []
        limit = min(sequence.cacheable // self._block_size, len(sequence.chain.digests))
        cached = self._pool.match(sequence.chain.digests, limit)
        if len(cached) < limit:
            sequence.awaited_digest = sequence.chain.digests[len(cached)]
        return cached

    def is_being_computed(self, sequence: Sequence) -> bool:
        """Whether a running sequence that ranks before `sequence` will publish the block it awaits."""
        by = self._computing.get(sequence.awaited_digest)
        return by is not None and by.order < sequence.order

    def announce(self, sequence: Sequence, first: int) -> None:
        """Note that a sequence which starts to run will publish its blocks from index `first`."""
        if sequence.chain is not None:
            for digest in sequence.chain.digests[first:]:
                self._computing.setdefault(digest, sequence)

    def publish(self, sequence: Sequence, first: int) -> None:
        """Offer the blocks from index `first` that are computed in full to the prefix cache."""
        chain = sequence.chain
        last = sequence.num_computed_tokens // self._block_size
        if chain is None or last <= first:
            return
        chain.extend(sequence.tokens, sequence.num_computed_tokens)
        for index in range(first, last):
            digest = chain.digests[index]
            self._pool.publish(sequence.blocks[index], digest)
            if self._computing.get(digest) is sequence:
                del self._computing[digest]

    def withdraw(self, sequence: Sequence) -> None:
        """Forget what a sequence that stops running would have published."""
        if sequence.chain is not None:
            for digest in sequence.chain.digests[sequence.num_computed_tokens // self._block_size :]:
                if self._computing.get(digest) is sequence:
                    del self._computing[digest]
