"""Renders a model's chat template, which is a program that nobody here has read, in a process that can be ended.

`python -m phalanx.engine.coordinator.text.sandbox` serves the requests of its standard input, a socket, until that
closes. Jinja's immutable sandbox keeps a template from everything but its variables. What it may still do is take time
and memory: the system ends the process at a limit of CPU time, also within one call of C, and refuses it more memory.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable
from datetime import datetime
from functools import cache
from typing import Any

import jinja2
import jinja2.debug
import jinja2.ext
import jinja2.utils
import msgspec
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .template_processes import CPU_LIMIT_S, REPLY, REQUEST

MEMORY_BYTES = 256 * 2**20
"""What a template may take beyond a multiple of what it was given."""
MEMORY_FACTOR = 24
"""Times what it was given: of text in UTF-8 a character takes up to four bytes, and a template copies its texts."""
SPARE_CHARACTERS, GROWTH = 1 << 20, 8
"""Characters that the whole text may have, and times the bytes of what the template was given that it may have
beyond."""
ERROR_CHARACTERS = 1000

_ORPHAN_MS = 1000
"""Milliseconds between two looks at whether the process that started this one still lives."""
_RECEIVED_AT_ONCE = 1 << 20


class _Generation(jinja2.ext.Extension):
    """The tags {% generation %} and {% endgeneration %}, between which transformers finds an answer."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Callable[[], str]) -> str:
        return caller()


class _TemplateDict:
    """dict, without the attributes of a type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.TemplateError(f"it stores {name!r} in a namespace")
        super().__setitem__(name, value)


@cache
def environment() -> ImmutableSandboxedEnvironment:
    """transformers' environment for chat templates."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], cache_size=0
    )
    made.filters["tojson"] = _tojson
    made.globals = {
        "range": made.globals["range"],
        "cycler": made.globals["cycler"],
        "joiner": made.globals["joiner"],
        "dict": _TemplateDict(),
        "namespace": _Namespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return made


class Renderer:
    """Keeps the template that was used last, compiled."""

    def __init__(self) -> None:
        self._source: str | None = None
        self._template: jinja2.Template | None = None

    def reply(self, request: bytes) -> tuple[bool, bytes]:
        """(whether it is the text, the text or what went wrong) of a request."""
        most = GROWTH * len(request) + SPARE_CHARACTERS
        try:
            source, variables = msgspec.msgpack.decode(request)
            text = self._compiled(source).render(variables)
            if len(text) > most:
                return False, b"it makes a text longer than %d, %d times what it was given" % (most, GROWTH)
            return True, text.encode()
        except MemoryError:
            return False, b"it takes more than %d MiB of memory" % (_memory_limit(len(request)) >> 20)
        except BaseException as error:
            why = str(error)[:ERROR_CHARACTERS] or type(error).__name__
            return False, why.encode(errors="replace")

    def _compiled(self, source: str) -> jinja2.Template:
        if self._template is None or source != self._source:
            self._template, self._source = environment().from_string(source), source
        return self._template


def serve(channel: socket.socket, address_space: int) -> None:
    """Answer requests until the other side is gone. `address_space` is what this process has mapped without them."""
    renderer = Renderer()
    waiting = select.poll()
    waiting.register(channel, select.POLLIN)
    parent = os.getppid()
    while True:
        while not waiting.poll(_ORPHAN_MS):
            if os.getppid() != parent:
                return
        header = _receive(channel, REQUEST.size)
        if header is None:
            return

        (size,) = REQUEST.unpack(header)
        _limit(resource.RLIMIT_AS, address_space + _memory_limit(size))
        request = _receive(channel, size)
        if request is None:
            return
        # At its end the signal ends the process, whatever it does.
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
        right, text = renderer.reply(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        channel.sendall(REPLY.pack(right, len(text)))
        channel.sendall(text)
        del request, text


def _receive(channel: socket.socket, size: int) -> bytes | None:
    """The next `size` bytes; None at the end."""
    pieces = []
    while size:
        piece = channel.recv(min(size, _RECEIVED_AT_ONCE))
        if not piece:
            return None
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _memory_limit(size: int) -> int:
    """Bytes that a template may take for a request of `size` bytes."""
    return MEMORY_BYTES + MEMORY_FACTOR * size


def _address_space() -> int:
    """Bytes that this process has mapped."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _limit(what: int, most: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _give_up_rights() -> None:
    """Open no file any more, and start no process, for the case that a template leaves its sandbox."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def _prepare() -> None:
    """Do what would open a file later: Jinja imports some modules when they are needed, and the clock's time zone."""
    import pprint  # noqa: F401
    import textwrap  # noqa: F401
    import unicodedata  # noqa: F401

    time.localtime()
    environment().from_string("{{ raise_exception('x') if y }}{{ 1 | pprint }}").render()


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own escapes what HTML would take for tags.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format[:200])


def main() -> None:
    """Serve standard input."""
    channel = socket.socket(fileno=0)
    _prepare()
    address_space = _address_space()
    _give_up_rights()
    try:
        serve(channel, address_space)
    except (BrokenPipeError, ConnectionResetError):
        return  # the other side has gone
    finally:
        channel.detach()


if __name__ == "__main__":
    main()
