"""What a person starts: generate, chat, plan, get_model, serve, gateway and worker."""

import signal
import sys

# While `python -m phalanx.launch.PROGRAM` is imported, Ctrl-C ends it without a traceback; run_program and run_tool say
# what it does from then on. sys.argv[0] is "-m" only until the program's own module is found.
if (
    sys.argv[:1] == ["-m"]
    and any(word.startswith(f"{__name__}.") for word in sys.orig_argv)
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
