"""The one thread that uses the journal's file: it commits together what was asked for while it was committing."""

from __future__ import annotations

import collections
import contextlib
import logging
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from .file import JournalFile

Result = TypeVar("Result")
Action = Callable[[sqlite3.Connection], Result]

MOST_AT_ONCE = 1024
"""Actions in one transaction."""
CLOSE_S = 10.0
"""Longest time that closing waits for what is still to be written."""

_log = logging.getLogger(__name__)


class JournalError(Exception):
    """The journal could not be written or read: the disk is full, or broken."""


class JournalFull(Exception):
    """There is no room, though every answer that may be forgotten is."""


class WriterThread:
    """Runs actions on the connection, in their order. An action's result is there once it is on the disk."""

    def __init__(self, file: JournalFile, on_rollback: Callable[[sqlite3.Connection], None]) -> None:
        """`on_rollback` is called on the thread when a transaction was given up."""
        self._file, self._on_rollback = file, on_rollback
        self._actions: collections.deque[tuple[Action[Any], Future[Any]]] = collections.deque()
        self._news = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="phalanx-journal", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._actions)

    def run(self, action: Action[Result]) -> Future[Result]:
        """Have the action run; its error, or JournalError, is the future's."""
        future: Future[Result] = Future()
        with self._news:
            if self._closing:
                future.set_exception(JournalError("the journal is closed"))
                return future
            self._actions.append((action, future))
            self._news.notify()
        return future

    def close(self) -> None:
        """Write what is left, and close the file. Closing twice is harmless."""
        with self._news:
            self._closing = True
            self._news.notify()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        try:
            while actions := self._take():
                self._commit(actions)
        finally:
            self._file.close()

    def _take(self) -> list[tuple[Action[Any], Future[Any]]]:
        """The next actions; none once the journal is closed and all is written."""
        with self._news:
            self._news.wait_for(lambda: self._actions or self._closing)
            return [self._actions.popleft() for _ in range(min(len(self._actions), MOST_AT_ONCE))]

    def _commit(self, actions: list[tuple[Action[Any], Future[Any]]]) -> None:
        connection = self._file.connection
        done: list[tuple[Future[Any], Any]] = []
        failed: list[tuple[Future[Any], Exception]] = []
        try:
            connection.execute("BEGIN IMMEDIATE")
            for action, future in actions:
                try:
                    done.append((future, action(connection)))
                except sqlite3.Error:
                    raise
                except Exception as error:  # the action's own refusal, before it has written anything
                    failed.append((future, error))
            connection.execute("COMMIT")
        except Exception as error:
            self._give_up(actions, error)
            return

        # Only now: what is told to be written is on the disk.
        for future, result in done:
            _settle(future, result)
        for future, refusal in failed:
            _settle(future, refusal, failed=True)

    def _give_up(self, actions: list[tuple[Action[Any], Future[Any]]], error: Exception) -> None:
        _log.error("the journal cannot be written: %s", error)
        with contextlib.suppress(sqlite3.Error):
            self._file.connection.execute("ROLLBACK")
        with contextlib.suppress(sqlite3.Error):
            self._on_rollback(self._file.connection)
        for _, future in actions:
            _settle(future, JournalError(f"the journal cannot be used: {error}"), failed=True)


def _settle(future: Future[Any], value: Any, *, failed: bool = False) -> None:
    if not future.set_running_or_notify_cancel():  # its caller waits no more
        return
    if failed:
        future.set_exception(value)
    else:
        future.set_result(value)
