"""Renders a model's chat template, which is a program that nobody here has read, within bounds of time and size.

Jinja's immutable sandbox keeps it from everything but its variables. What it may still do is loop and build texts: it
runs on a thread that is interrupted, and whatever makes a text or list longer is checked before it is made.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, TypeVar

import jinja2
import jinja2.ext
import jinja2.utils
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.sandbox import ImmutableSandboxedEnvironment

T = TypeVar("T")

CPU_LIMIT_S = 2.0
"""Seconds of a core that a template may take; a usual one takes milliseconds."""
WALL_LIMIT_S = 20.0
"""The same by the clock, on a machine that is busy with other things."""
SPARE_CHARACTERS = 1 << 20
"""Characters of a text, and elements of a list, that a template may make beyond a multiple of what it was given."""
GROWTH = 8
"""Times what it was given that one of its texts may be long."""
WORK = 64
"""Times that limit that all its texts together may be long, intermediate ones included."""

# Filters that no chat template needs, and that make long texts of short ones.
_REMOVED_FILTERS = ("batch", "center", "pprint", "slice", "striptags", "urlize", "wordwrap", "xmlattr")
_WIDTH = re.compile(r"\d{4}|\*")


class RenderError(Exception):
    """A template took too long, made too long a text, or failed."""


class _Interrupted(BaseException):
    """Raised in a thread whose template takes too long; not an Exception, which Jinja would catch."""


class Sandbox(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with limits. Used by any number of threads."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self._limits = threading.local()
        self.code_generator_class = _CheckedCode
        self.concat = self.join  # type: ignore[method-assign]
        self.finalize = self.checked

        self.filters["tojson"] = _tojson
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        for name, function in list(self.filters.items()):
            self.filters[name] = self._checked_filter(name, function)
        self.globals = {
            "range": self.globals["range"],
            "cycler": self.globals["cycler"],
            "joiner": self.globals["joiner"],
            "dict": _TemplateDict(),
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def render(self, source: str, variables: dict[str, Any]) -> str:
        """Compile and render a template. Raises RenderError, also when it takes or makes too much."""
        limit = GROWTH * _weight(variables, None) + SPARE_CHARACTERS

        def work() -> str:
            self._limits.size, self._limits.left = limit, limit * WORK
            return self.join(_compiled(self, source).generate(**variables))

        return _within_time(work)

    # ---- what templates do

    def join(self, parts: Iterable[Any]) -> str:
        """Join texts, as `~`, blocks, macros and the whole template do."""
        texts = []
        size = 0
        for part in parts:
            text = part if isinstance(part, str) else str(self.checked(part))
            size += len(text)
            self._check(size)
            texts.append(text)
        self._charge(size)
        return "".join(texts)

    def checked(self, value: T) -> T:
        """Return a value whose text is no longer than allowed: one that holds another twice may be endless."""
        if isinstance(value, dict | list | tuple):
            _weight(value, self._size)
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """One of the operators that make long values."""
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
                    self._charge(len(value) * max(0, times))
            self._check(_bits(left) + _bits(right))
        elif operator == "**":
            self._check(_bits(left) * max(1, abs(right)) if isinstance(right, int) else 0)
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self._charge(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of a function, macro or method."""
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str | bytes):
            args = self._checked_method(owner, function.__name__, args, kwargs)
        result = super().call(context, function, *args, **kwargs)
        if isinstance(result, str):
            self._charge(len(result))
        return self.checked(result)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandbox's own str.format, which call() cannot tell from other functions."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            self._check_format(value.__self__, [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return checked

    def _checked_method(self, text: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
            widths = [value for value in (*args, *kwargs.values()) if isinstance(value, int)]
            self._charge(max(widths, default=8) * (1 + text.count("\t") if name == "expandtabs" else 1))
        elif name == "replace" and len(args) >= 2:
            self._charge(len(text) + text.count(args[0]) * len(args[1]))
        elif name == "join" and args:
            args = (list(args[0]),)
            self._charge(_weight(args[0], self._size) + len(text) * len(args[0]))
        elif name in ("format", "format_map"):
            self._check_format(text, [*args, *kwargs.values()])
        elif name == "translate" and args:
            self._charge(len(text) * _weight(args[0], self._size))
        return args

    def _checked_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            value, *others = args[skipped:]
            options = [*others, *kwargs.values()]
            if name == "join":
                value = list(value)
                args = (*args[:skipped], value, *others)
                glue = max((len(option) for option in options if isinstance(option, str)), default=0)
                self._charge(_weight(value, self._size) + len(value) * glue)
            elif name == "replace" and len(others) >= 2:
                self._charge(len(str(value)) + str(value).count(str(others[0])) * len(str(others[1])))
            elif name == "indent":
                width = max((len(o) if isinstance(o, str) else int(o) for o in options), default=4)
                self._charge(len(str(value)) + (1 + str(value).count("\n")) * width)
            elif name == "format":
                self._check_format(str(value), options)
            elif name == "tojson":
                width = max(
                    (len(o) if isinstance(o, str) else o for o in options if isinstance(o, str | int)), default=0
                )
                self._charge((1 + width) * _weight(value, self._size))
            elif name == "sum":
                value = list(value)
                args = (*args[:skipped], value, *others)
                self._charge(_weight(value, self._size) * (1 + len(value)) if any(map(_is_list, value)) else 0)
            else:
                self.checked(value)

            result = function(*args, **kwargs)
            if isinstance(result, str):
                self._charge(len(result))
            return self.checked(result)

        return checked

    def _check_format(self, text: str, values: Any) -> None:
        if _WIDTH.search(text) or re.search(r"\{[^}]*\{", text):
            raise RenderError("it formats to a width of a thousand or more")
        self._charge(len(text) * (1 + _weight(values, self._size)) if len(text) < 4096 else len(text) * 64)

    # ---- the bounds

    @property
    def _size(self) -> int:
        return int(getattr(self._limits, "size", SPARE_CHARACTERS))

    def _check(self, size: float) -> None:
        if size > self._size:
            raise RenderError(f"it makes a text or list longer than {self._size}, {GROWTH} times what it was given")

    def _charge(self, size: int) -> None:
        self._check(size)
        left = getattr(self._limits, "left", None)
        if left is not None:
            self._limits.left = left - size
            if left < size:
                raise RenderError(f"its texts are longer than {self._size * WORK} together")


class _CheckedCode(CodeGenerator):
    """Compiles a template so that what it joins and the lists it makes are checked, too."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Any) -> None:
        self.write("environment.checked(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self.write("environment.checked(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
        loads = node.ctx == "load"
        self.write("environment.checked(" if loads else "")
        super().visit_Tuple(node, frame)
        self.write(")" if loads else "")


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
            raise RenderError(f"it stores {name!r} in a namespace")
        super().__setitem__(name, value)


@functools.lru_cache(maxsize=8)
def _compiled(sandbox: Sandbox, source: str) -> jinja2.Template:
    return sandbox.from_string(source)


def _within_time(work: Callable[[], str]) -> str:
    """Run `work` on a thread of its own, which is interrupted if it takes too long. Raises RenderError."""
    results: list[str] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="phalanx-template", daemon=True)
    started = time.monotonic()
    thread.start()
    assert thread.ident is not None
    patience = CPU_LIMIT_S
    while thread.is_alive():
        thread.join(patience)
        patience = 0.1
        waited = time.monotonic() - started
        if thread.is_alive() and (waited > WALL_LIMIT_S or _cpu_seconds(thread.ident) > CPU_LIMIT_S):
            _interrupt(thread)
            raise RenderError(f"it took longer than {CPU_LIMIT_S:g} s")
    if results:
        return results[0]
    error = errors[0]
    raise RenderError(str(error) or type(error).__name__) from error


def _interrupt(thread: threading.Thread) -> None:
    """End a thread that runs Python code; nothing is left of it within moments."""
    for _ in range(20):
        assert thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Interrupted))
        thread.join(0.05)
        if not thread.is_alive():
            return


def _cpu_seconds(ident: int) -> float:
    with contextlib.suppress(OSError):  # a thread that has just ended has no clock
        return time.clock_gettime(time.pthread_getcpuclockid(ident))
    return 0.0


def _weight(value: Any, limit: int | None) -> int:
    """Characters and elements that a value has when it is written out. Raises RenderError above the limit."""
    total = 0
    pending = [value]
    while pending:
        item = pending.pop()
        total += len(item) + 1 if isinstance(item, str | bytes) else 1
        if isinstance(item, dict):
            pending += item.keys()
            pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item
        if limit is not None and total + len(pending) > limit:
            raise RenderError(f"it makes a text or list longer than {limit}, {GROWTH} times what it was given")
    return total


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | str)


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own escapes what HTML would take for tags.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format[:200])
