"""How this process starts another Python: with the folders that it imports from itself, and no others."""

from __future__ import annotations

import sys

_BEGIN = (
    "import sys; sys.path[:] = sys.argv[1].split('\\n'); del sys.argv[:2]; "
    "import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs a module as `python -m` does, but imports from this process's sys.path.

    `python -m` alone looks into the working folder first. It may be anybody's, as /tmp is: whoever puts a torch.py
    there would have it run. A program that lies elsewhere does not import from it.
    """
    folders = "\n".join(folder for folder in sys.path if isinstance(folder, str) and "\n" not in folder)
    return [sys.executable, "-c", _BEGIN, folders, "-m", module, *arguments]
