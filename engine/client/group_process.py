"""A client's own group of ranks: a supervisor in a process beside it (launch/ranks/own_group.py), and how its end is
noticed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import msgspec

from ...parallel.child_python import python_command
from ..config import EngineConfig
from ..errors import ERRORS_BY_NAME, ConfigError, EngineStopped, PhalanxError
from ..models.hub import resolve_model
from ..models.resolve import partition_model
from ..models.spec import read_config, spec_from_config
from ..protocol.transport import SOCKET_PATH_BYTES, Connection, ZmqConnection
from .client import Client
from .group_failure import FAILURE_FILE, STATE_FILE, GroupState, read_failure, read_state
from .resume.connection import ResumingConnection
from .thread_room import check_thread_room

STOP_TIMEOUT_S = 5.0
REMOVE_TIMEOUT_S = 1.0
"""A rank ends within a quarter of it once its supervisor has gone (launch/ranks/process.py)."""
SHORT_TMPDIR = "/tmp"  # nosec B108 # mkdtemp makes a folder of mode 0700 in it
_SOCKET = "engine"


class GroupProcess:
    """Starts `config.ranks` ranks and, unless told not to, waits until they are ready.

    A private folder holds what passes between them:
    config.json (the EngineConfig), store (by which the ranks meet), engine (the coordinator's ZeroMQ socket), ready
    (made once it takes requests), state.json (how the group is), failure.json (why a rank failed last).

    When a rank dies the supervisor starts the group again, up to config.max_restarts times, and the client goes on with
    what it had not finished (resume/connection.py).
    """

    def __init__(self, config: EngineConfig, *, wait: bool = True) -> None:
        """Raises the error that kept a rank from starting: ConfigError, CheckpointError, or else EngineStopped.

        Without `wait` only what can be told at once is raised here; the client's requests fail with the rest.
        """
        # What can be told without starting N processes is told at once.
        folder = resolve_model(config.model, weights=config.load_format != "dummy")
        partition_model(config, spec_from_config(read_config(folder), str(folder)), config.ranks)
        check_thread_room(config)

        self._folder = _private_folder()
        try:
            self._process = self._start(config)
            try:
                # Requests that no other engine will have end by what the supervisor says.
                self.client = Client(self._connection(config), supervised=not config.max_restarts)
            except BaseException:
                self._process.kill()
                self._process.wait()
                raise
        except BaseException:
            _remove(self._folder)
            raise

        self._state = GroupState("starting")
        self._state_written = 0
        self._closing = self._ready = False
        self._watch = threading.Thread(target=self._wait_for_end, name="phalanx-group-watch", daemon=True)
        self._watch.start()

        if wait:
            self._wait_until_ready()

    def _start(self, config: EngineConfig) -> subprocess.Popen[bytes]:
        """Start the supervisor, which ends the group when its standard input closes: it never outlives this process."""
        try:
            (self._folder / "config.json").write_bytes(msgspec.json.encode(config))
            package = __package__.partition(".")[0]
            return subprocess.Popen(
                python_command(f"{package}.launch.ranks.own_group", str(self._folder)),
                stdin=subprocess.PIPE,
                stdout=_inherited(1),
                stderr=_inherited(2),
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(
                f"the engine's processes cannot be started with {self._folder}: {error.strerror}; see that there is "
                f"room in that folder (TMPDIR sets another), and that this user may start processes and open files"
            ) from error

    def _connection(self, config: EngineConfig) -> Connection:
        connection: Connection = ZmqConnection(f"ipc://{self._folder}/{_SOCKET}", supervised=True)
        if config.max_restarts:
            connection = ResumingConnection(connection, killed_from_outside=self._was_killed_from_outside)
        return connection

    def _wait_until_ready(self) -> None:
        try:
            # However long loading takes: _wait_for_end ends the wait if the group does not get there.
            self.client.status(timeout_s=None)
            self._ready = True
        except BaseException:
            self.close()
            raise

    @property
    def state(self) -> GroupState:
        """What its supervisor said last: whether the group runs, or why it does not."""
        with contextlib.suppress(OSError):  # there is none yet
            written = os.stat(self._folder / STATE_FILE).st_mtime_ns
            if written != self._state_written:
                self._state = read_state(self._folder) or self._state
                self._state_written = written
        return self._state

    def close(self) -> None:
        """End every rank, within STOP_TIMEOUT_S, and remove the folder."""
        self._closing = True
        if self._process.poll() is None:
            assert self._process.stdin is not None
            if self._ready:
                self.client.shutdown()
                # A rank that is stuck does not hear of it: the signal below ends it.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(STOP_TIMEOUT_S / 2)

            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            try:
                self._process.wait(STOP_TIMEOUT_S / 2)
            except subprocess.TimeoutExpired:
                self._process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # one that the system itself holds up
                    self._process.wait(STOP_TIMEOUT_S)

        self._watch.join(STOP_TIMEOUT_S)
        self.client.close()
        _remove(self._folder)

    def _was_killed_from_outside(self) -> bool:
        failure = read_failure(self._folder / FAILURE_FILE)
        return failure is not None and failure.from_outside

    def _wait_for_end(self) -> None:
        code = self._process.wait()
        if self._closing:
            return

        error: PhalanxError = EngineStopped(f"the engine's group ended by itself with exit code {code}")
        failure = read_failure(self._folder / FAILURE_FILE) if code else None
        if failure is not None:
            kind = ERRORS_BY_NAME.get(failure.error)
            if kind is not None and kind is not EngineStopped:
                error = kind(failure.message)
            else:
                error = EngineStopped(str(failure))
        self.client.fail_all(error)


def _inherited(descriptor: int) -> int | None:
    """How a child gets a standard stream: this process's, or nowhere where that is closed.

    The first file that a child opens would stand in its place otherwise.
    """
    try:
        return None if os.get_inheritable(descriptor) else subprocess.DEVNULL
    except OSError:
        return subprocess.DEVNULL


def _private_folder() -> Path:
    """Make a folder of this user's alone, in which a socket's path is no longer than the system allows.

    Some clusters set TMPDIR to a path so long that a socket has no room in it, and ZeroMQ takes paths in UTF-8 alone:
    such a TMPDIR is passed over. Raises ConfigError if there is no other.
    """
    try:
        home = tempfile.gettempdir()
    except OSError as error:  # it has tried to write into each folder that there may be
        raise ConfigError(
            f"no folder for the engine's socket can be made: {error.strerror}; free some space, or set TMPDIR to a "
            f"folder that can be written"
        ) from error
    name_bytes = len(f"/phalanx-12345678/{_SOCKET}")
    if len(os.fsencode(home)) + name_bytes > SOCKET_PATH_BYTES or not _is_unicode(home):
        home = SHORT_TMPDIR
    try:
        return Path(tempfile.mkdtemp(prefix="phalanx-", dir=home))
    except OSError as error:
        raise ConfigError(
            f"no folder for the engine's socket can be made in {home}: {error.strerror}; set TMPDIR to a folder that "
            f"can be written, whose path has at most {SOCKET_PATH_BYTES - name_bytes} bytes"
        ) from error


def _remove(folder: Path) -> None:
    """Remove the folder, also if a rank that outlives a killed supervisor for a moment still writes into it."""
    deadline = time.monotonic() + REMOVE_TIMEOUT_S
    shutil.rmtree(folder, ignore_errors=True)
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
        shutil.rmtree(folder, ignore_errors=True)


def _is_unicode(path: str) -> bool:
    """Whether a path is UTF-8, as its bytes need not be."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
