"""Programs whose standard output or error is full, closed or read by nobody, and Ctrl-C while they are imported."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from phalanx.tests.launch.programs import TIMEOUT_S, environment

PLAN = ("plan", "model=qwq_32b_preview")
FULL = "error: standard output cannot be written: No space left on device\n"


def shell(redirection: str, *words: str, unbuffered: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a program as the shell does with `redirection` after it."""
    variables = environment()
    if not unbuffered:
        del variables["PYTHONUNBUFFERED"]
    command = f"exec {sys.executable} -m phalanx.launch.{' '.join(words)} {redirection}"
    return subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=TIMEOUT_S, env=variables, check=False
    )


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("words", [PLAN, ("plan", "--help"), ("get_model", "--help"), ("generate", "--help")])
def test_a_full_disk_under_standard_output_is_said_in_one_line(words: tuple[str, ...], unbuffered: bool) -> None:
    ended = shell(">/dev/full", *words, unbuffered=unbuffered)
    assert (ended.returncode, ended.stderr) == (1, FULL)


def test_a_configuration_that_is_printed_to_a_full_disk_is_said_in_one_line() -> None:
    ended = shell(">/dev/full", "generate", "model=none/none", "--cfg", "job")
    assert (ended.returncode, ended.stderr) == (1, FULL)


@pytest.mark.parametrize("words", [PLAN, ("get_model",), ("generate", "--help")])
def test_a_pipe_that_nobody_reads_ends_a_program_quietly(words: tuple[str, ...]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", f"phalanx.launch.{words[0]}", *words[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(TIMEOUT_S) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_a_program_whose_standard_error_is_gone_still_ends_by_its_code(redirection: str) -> None:
    assert shell(redirection, *PLAN).returncode == 0
    assert shell(redirection, "generate", "model=none/none", "prompt=x", "input=y").returncode == 2


def test_closed_standard_output_is_the_null_device() -> None:
    ended = shell(">&-", "generate", "--help")
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", "2>/dev/full", "2>&-"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_answer_meets_the_same_streams(tiny: Path, redirection: str, ranks: int) -> None:
    words = ("generate", f"model={tiny}", f"ranks={ranks}", "prompt=Hello", "sampling.max_tokens=4")
    ended = shell(redirection, *words)
    assert "Traceback" not in ended.stderr
    full = redirection == ">/dev/full"
    assert ended.returncode == (1 if full else 0)
    assert FULL in ended.stderr if full else FULL not in ended.stderr
    assert bool(ended.stdout) == redirection.startswith("2")


def test_a_character_that_standard_output_has_no_code_for_is_escaped() -> None:
    code = "from phalanx.launch.ranks.process import watch_streams; watch_streams(); print('Ü🙂')"
    variables = {**environment(), "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "\\xdc\\U0001f642\n", "")


def test_an_output_that_cannot_be_opened_is_named_with_its_key(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "a"}\n')
    ended = shell("", "generate", f"model={smollm2}", f"input={tmp_path / 'in.jsonl'}", f"output={tmp_path}")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"error: output={str(tmp_path)!r} cannot be opened: Is a directory\n"


STOPPED_WHILE_IMPORTED = """
import os, runpy, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "phalanx.launch.cli.program":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
program = sys.argv[1]
sys.argv = ["-m"]
sys.orig_argv = [sys.executable, "-m", program]
runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("program", ["generate", "plan"])
def test_ctrl_c_while_a_program_is_imported_prints_no_traceback(program: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", STOPPED_WHILE_IMPORTED, f"phalanx.launch.{program}"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment(),
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_importing_the_programs_as_a_library_leaves_ctrl_c_alone() -> None:
    code = "import signal, phalanx.launch.plan; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert ended.stdout == "True\n"
