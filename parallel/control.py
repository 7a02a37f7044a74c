"""The channel on which rank 0 sends the other ranks what to do: small messages, in order, never over NCCL."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from .collectives.base import Collectives

_FIRST = 16384  # bytes of a message that travel with its length, in one broadcast
_HEADER = 8


class ControlChannel(ABC):
    """Rank 0 sends; every other rank receives each message once, in order."""

    @abstractmethod
    def send(self, data: bytes) -> None:
        """Send to all other ranks. Raises CollectiveError if one has gone."""

    @abstractmethod
    def receive(self) -> bytes:
        """Wait for the next message. Raises CollectiveError if rank 0 has gone or stays silent for timeout_s."""

    def close(self) -> None:
        """Release what this object made; it is not used any more."""
        return


class BroadcastControl(ControlChannel):
    """Control messages as broadcasts of CPU collectives: one for a message up to 16 KiB, two for a longer one."""

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._buffer = torch.zeros(_HEADER + _FIRST, dtype=torch.uint8)

    def send(self, data: bytes) -> None:
        """Broadcast the length and the first 16 KiB, then what is left. Raises CollectiveError if a rank has gone."""
        self._buffer[:_HEADER].view(torch.int64)[0] = len(data)
        first = data[:_FIRST]
        self._buffer[_HEADER : _HEADER + len(first)] = _tensor(first)
        self._collectives.broadcast(self._buffer)
        if len(data) > _FIRST:
            self._collectives.broadcast(_tensor(data[_FIRST:]))

    def receive(self) -> bytes:
        """Wait for the next message. Raises CollectiveError if rank 0 has gone."""
        buffer = self._collectives.broadcast(self._buffer)
        length = int(buffer[:_HEADER].view(torch.int64)[0])
        data = buffer[_HEADER : _HEADER + min(length, _FIRST)].numpy().tobytes()
        if length > _FIRST:
            data += self._collectives.broadcast(torch.empty(length - _FIRST, dtype=torch.uint8)).numpy().tobytes()
        return data


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
