"""KV blocks: who holds which, and which hold a prefix that another sequence may read. Ids only, no tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from struct import Struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # requests hold chains of blocks, and blocks are shared among requests
    from .request import Request, Sequence

DIGEST_BYTES = 32  # 256 bits of a cryptographic hash: equal digests mean equal prefixes, also against an adversary


class IntegrityError(RuntimeError):
    """The state of the pool or the scheduler contradicts itself: a bug in this package, never bad input."""


class PrefixChain:
    """Digests of the full blocks of one token sequence, each over its parent's digest and its own token ids.

    `digests[i]` therefore identifies all tokens up to the end of block i, and the salt.
    """

    __slots__ = ("_block_size", "_pack", "_root", "digests")

    def __init__(self, block_size: int, salt: str) -> None:
        self._block_size = block_size
        self._pack = Struct(f"<{block_size}I").pack
        self._root = blake2b(salt.encode(), digest_size=DIGEST_BYTES).digest()
        self.digests: list[bytes] = []

    def extend(self, tokens: list[int], length: int) -> None:
        """Hash the full blocks of `tokens[:length]` that are not hashed yet."""
        size = self._block_size
        parent = self.digests[-1] if self.digests else self._root
        for start in range(len(self.digests) * size, length - size + 1, size):
            parent = blake2b(parent + self._pack(*tokens[start : start + size]), digest_size=DIGEST_BYTES).digest()
            self.digests.append(parent)

    def copy(self) -> PrefixChain:
        """Return an independent chain over the same blocks, for a sequence that goes on differently."""
        twin = PrefixChain.__new__(PrefixChain)
        twin._block_size = self._block_size
        twin._pack = self._pack
        twin._root = self._root
        twin.digests = list(self.digests)
        return twin


class BlockPool:
    """Block ids 0 to num_blocks-1 with reference counts, and a prefix cache over them.

    A published block stays readable under its digest after its last holder released it, until it is evicted for an
    allocation: blocks that cache nothing go first, then the least recently used.
    """

    def __init__(self, num_blocks: int) -> None:
        self.total = num_blocks
        self._references = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))  # free, nothing cached; a stack with block 0 on top
        # Free but cached blocks and their digests, the least recently used first.
        self._evictable: OrderedDict[int, bytes] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that nobody holds, cached or not."""
        return len(self._blank) + len(self._evictable)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks of unspecified content; raises IntegrityError if fewer are available."""
        if count > self.available:
            raise IntegrityError(f"{count} blocks asked for, {self.available} of {self.total} available")
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, digest = self._evictable.popitem(last=False)
            del self._cached[digest]
            self._digests[block] = None
        self._references[block] = 1
        return block

    def match(self, digests: list[bytes], limit: int) -> list[int]:
        """The cached blocks of the longest known beginning of `digests[:limit]`. Changes nothing; see `acquire`."""
        blocks = []
        for digest in digests[:limit]:
            block = self._cached.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def held(self, blocks: list[int]) -> int:
        """How many of `blocks` are held already: acquiring these makes no fewer blocks available."""
        return sum(self._references[block] > 0 for block in blocks)

    def acquire(self, blocks: list[int]) -> None:
        """Add a holder to blocks that `match` has just returned."""
        for block in blocks:
            if self._references[block] == 0:
                del self._evictable[block]
            self._references[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Give back one hold on each block of a table. Its tail counts as less recently used: it is evicted first."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                digest = self._digests[block]
                if digest is None:
                    self._blank.append(block)
                else:
                    self._evictable[block] = digest

    def forget(self, blocks: list[int]) -> None:
        """Take those of these blocks that have a single holder out of the prefix cache: their KV may be NaN."""
        for block in blocks:
            digest = self._digests[block]
            if digest is not None and self._references[block] == 1:
                del self._cached[digest]
                self._digests[block] = None

    def publish(self, block: int, digest: bytes) -> None:
        """Let others match a block whose KV is computed in full. A digest that another block has stays with that."""
        if self._digests[block] is None and digest not in self._cached:
            self._cached[digest] = block
            self._digests[block] = digest

    def check_integrity(self, tables: Iterable[tuple[str, list[int], PrefixChain | None]]) -> None:
        """Compare the pool's state with every holder's name, block table and chain.

        Raises IntegrityError if a block is leaked, owned twice, shared without being published, or published for
        another prefix than its holder's.
        """
        owners: list[list[str]] = [[] for _ in range(self.total)]
        for name, blocks, chain in tables:
            for index, block in enumerate(blocks):
                if name in owners[block]:
                    raise IntegrityError(f"block {block} occurs twice in the table of {name}")
                owners[block].append(name)
                digest = self._digests[block]
                if digest is not None and (chain is None or chain.digests[index : index + 1] != [digest]):
                    raise IntegrityError(f"block {block} is entry {index} of {name} but caches another prefix")

        self._check_owners(owners)
        published = {block: digest for block, digest in enumerate(self._digests) if digest is not None}
        if {block: digest for digest, block in self._cached.items()} != published:
            raise IntegrityError("the prefix cache and the digests of its blocks disagree")

    def _check_owners(self, owners: list[list[str]]) -> None:
        blank = set(self._blank)
        evictable = set(self._evictable)
        if len(blank) != len(self._blank) or blank & evictable:
            raise IntegrityError(f"blocks {sorted(blank & evictable) or self._blank} are free twice")
        for block, names in enumerate(owners):
            references = self._references[block]
            digest = self._digests[block]
            if references != len(names):
                raise IntegrityError(f"block {block} has {references} references but is held by {names or 'nobody'}")
            if len(names) > 1 and digest is None:
                raise IntegrityError(f"block {block} is shared by {names} but was never published")
            if names and (block in blank or block in evictable):
                raise IntegrityError(f"block {block} is free but held by {names}")
            if not names and block not in (blank if digest is None else evictable):
                raise IntegrityError(f"block {block} is leaked: nobody holds it and it is not free")


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
