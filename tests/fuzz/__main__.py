"""Fuzzes one target, guided by coverage: `python -m phalanx.tests.fuzz TARGET --seconds 600`.

It goes on after a finding. Each kind of finding, told by its exception and its last lines, is kept once, as the bytes
that brought it about. The last line is JSON: runs, seconds, findings. Needs atheris.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from phalanx.tests.fuzz import bounds
from phalanx.tests.fuzz.folders import scratch
from phalanx.tests.fuzz.targets import CORPUS, TARGETS

MOST_BYTES = 4096
"""Bytes of an input at most."""
HANG_S = 60
"""Seconds by the clock after which an input that does not end stops the run."""
MEMORY_MIB = 4096
"""What the process may take: torch and transformers are a quarter of it."""


class _Findings:
    """What went wrong, each kind once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.kinds: dict[str, str] = {}
        self.runs = 0

    def note(self, data: bytes, error: BaseException) -> None:
        """Keep the input of a new kind of error."""
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        kind = f"{type(error).__name__} " + " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
        if kind in self.kinds:
            return
        name = hashlib.sha1(kind.encode(), usedforsecurity=False).hexdigest()[:12]
        (self._folder / name).write_bytes(data)
        self.kinds[kind] = name
        print(f"\nFINDING {name}: {kind}", file=sys.stderr)
        traceback.print_exception(error, limit=-12)


def main() -> None:
    """Run the target that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--found", type=Path, help="folder for inputs that cover something new; kept")
    parser.add_argument("--findings", type=Path, help="folder for inputs that brought about an error")
    options = parser.parse_args()
    import atheris

    found = options.found or Path(tempfile.mkdtemp(prefix="fuzz-"))
    findings = _Findings(options.findings or found.parent / f"{options.target}-findings")
    for folder in (found, findings._folder):
        folder.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.CRITICAL)
    bounds.INSTRUMENTED = 5.0
    with atheris.instrument_imports(include=["phalanx", "jinja2", "gguf"], exclude=["phalanx.tests"]):
        fuzz_one: Any = importlib.import_module(f"phalanx.tests.fuzz.targets.{TARGETS[options.target]}").fuzz_one

    began = time.monotonic()

    def one(data: bytes) -> None:
        findings.runs += 1
        try:
            fuzz_one(data)
        except Exception as error:
            findings.note(data, error)
        if time.monotonic() - began > options.seconds:
            _report(options.target, began, findings)

    kept = CORPUS / options.target
    arguments = [
        sys.argv[0],
        str(found),
        *([str(kept)] if kept.is_dir() else []),
        f"-max_len={MOST_BYTES}",
        "-len_control=0",
        f"-timeout={HANG_S}",
        f"-rss_limit_mb={MEMORY_MIB}",
        "-print_final_stats=1",
        f"-artifact_prefix={findings._folder}/hang-",
    ]
    atheris.Setup(arguments, one)
    atheris.Fuzz()


def _report(target: str, began: float, findings: _Findings) -> None:
    """Print what came of the run, and end the process, which libFuzzer would not."""
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"target": target, "runs": findings.runs, "seconds": seconds, "findings": findings.kinds}))
    sys.stdout.flush()
    shutil.rmtree(scratch(), ignore_errors=True)
    os._exit(1 if findings.kinds else 0)


if __name__ == "__main__":
    main()
