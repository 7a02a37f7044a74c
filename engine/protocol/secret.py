"""The secret that clients and engines on several hosts share, and the CURVE keys of ZeroMQ that are made of it.

Both sides derive both key pairs from the secret (BLAKE2b). A client proves that it knows the secret by knowing the
server's public key, which CurveZMQ never sends (rfc.zeromq.org/spec/26): whoever lacks it cannot finish the handshake,
and reads nothing of what others send.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import zmq
from zmq.utils import z85

from ...parallel.loading.json_files import shown
from ..errors import ConfigError

SECRET_BYTES = 32
"""Fewest bytes of a secret."""
_HOW_TO_MAKE_ONE = "`python -c 'import secrets; print(secrets.token_hex(32))' > FILE; chmod 600 FILE` makes one"


@dataclass(frozen=True)
class CurveKeys:
    """The key pairs of an engine and of its clients, in ZeroMQ's Z85 form."""

    server_secret: bytes
    server_public: bytes
    client_secret: bytes
    client_public: bytes


def read_secret(path: str | Path) -> bytes:
    """Return the secret in a file, without white space around it.

    Raises ConfigError if it cannot be read, if others than its owner may read it, or if it is short.
    """
    try:
        path = os.fsdecode(path)
        file = Path(os.path.expanduser(path))
        others = stat.S_IMODE(file.stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO)
        secret = file.read_bytes().strip()
    except (TypeError, ValueError) as error:  # no text, or one that no path has
        raise ConfigError(f"secret_file={shown(path)} is no path of a file: {error}") from error
    except OSError as error:
        raise ConfigError(f"secret_file={str(path)!r} cannot be read: {error.strerror}; {_HOW_TO_MAKE_ONE}") from error
    if others:
        raise ConfigError(f"secret_file={str(path)!r} may be used by others than its owner: chmod 600 it")
    if len(secret) < SECRET_BYTES:
        raise ConfigError(
            f"secret_file={str(path)!r} holds {len(secret)} bytes; a secret has at least {SECRET_BYTES}: "
            f"{_HOW_TO_MAKE_ONE}"
        )
    return secret


def curve_keys(secret: bytes) -> CurveKeys:
    """Return the key pairs that follow from a secret. Raises ConfigError if this ZeroMQ has no CURVE."""
    if not zmq.has("curve"):
        raise ConfigError("this libzmq has no CURVE, which tcp:// needs: install pyzmq from a wheel, or use ipc://")
    pairs = []
    for role in (b"phalanx-server", b"phalanx-client"):
        private = z85.encode(blake2b(secret, digest_size=32, person=role).digest())
        pairs += [private, zmq.curve_public(private)]
    return CurveKeys(*pairs)


def check_address(address: str, secret: bytes | None) -> None:
    """Raise ConfigError for an address that is neither ipc:// nor tcp://, or for tcp:// without a secret."""
    if not isinstance(address, str) or not address.startswith(("ipc://", "tcp://")) or "\0" in address:
        raise ConfigError(f"address={shown(address)} must be ipc://PATH or tcp://HOST:PORT")
    if address.startswith("tcp://") and secret is None:
        raise ConfigError(
            f"address={address!r} lets everybody in who reaches it: set secret_file to a file that this engine and its "
            f"clients share, or use ipc://PATH; {_HOW_TO_MAKE_ONE}"
        )
