"""Everything of a gateway that its journal makes possible, put together."""

from __future__ import annotations

from ...journal.journal import Journal
from ..config import GatewayConfig
from ..engine_pool import EnginePool
from ..generation.response_store import ResponseStore
from ..http.exchange import BodyBudget
from .batches import Batches
from .files import Files
from .recovery import Recovery
from .requests import DurableRequests
from .responses import ResponseMirror

PURPOSE = "gateway"
_MIB = 2**20


class Journaling:
    """One for each gateway with a journal; used on its event loop alone."""

    def __init__(self, path: str, pool: EnginePool, config: GatewayConfig, bodies: BodyBudget) -> None:
        """Open the journal at `path`. Raises ConfigError; see JournalFile.open."""
        max_bytes = config.journal_max_mb * _MIB
        self.journal = Journal(path, PURPOSE, max_bytes=max_bytes, keep_s=config.journal_keep_s)
        self._mirror = ResponseMirror(self.journal)
        self.responses = ResponseStore(config, mirror=self._mirror)
        self._mirror.load(self.responses)
        self.requests = DurableRequests(self.journal, config, bodies, self.responses)
        self.files = Files(self.journal, config)
        self.recovery = Recovery(self.requests, pool, config)
        self.batches = Batches(self.requests, self.files, config, self.recovery.abort)

    def start(self) -> None:
        """Begin to compute what an earlier process has left, on the event loop."""
        self.recovery.start(self.batches.prune)

    def stop(self) -> None:
        """The process ends: what is not answered by now stays in the journal, for the next one."""
        self._mirror.closing = True
        self.recovery.stop()

    def close(self) -> None:
        """Write what is left to be written, and let another process have the journal. May block for some seconds."""
        self.stop()
        self.journal.close()
