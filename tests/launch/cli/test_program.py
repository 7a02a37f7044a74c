"""The outermost level of every program."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SIGNALLED = """
import os, sys, time
from phalanx.launch.chat import ChatKeys
from phalanx.launch.cli.program import run_program

def body(job):
    try:
        os.kill(os.getpid(), number)
        time.sleep(10)
    except BaseException:
        raise AttributeError("what a library made of it") from None

number = int(sys.argv[1])
sys.argv[1:] = ["model=none"]
run_program(ChatKeys, body, "program", "about")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_of_which_a_library_made_an_error_ends_a_program_quietly(number: signal.Signals) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(number.value)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + number, "", "")
