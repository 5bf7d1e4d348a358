"""What every script starts with, so that its first seconds are covered too: errors of the command
line in one line, Ctrl-C and a reader that has gone away (`| head`) without a traceback."""

import argparse
import atexit
import os
import signal
import sys
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """A parser that shows a script's docstring as it is, and prints a mistake in one line, without
    the usage."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        self.exit(2, f"error: {message}; --help lists the flags\n")


def whole(text):
    """A flag's type: a whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no whole number, 0 or more")
    return int(text)


def count(text):
    """A flag's type: a whole number, 1 or more."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no whole number, 1 or more")
    return int(text)


def interrupt(signum, frame):
    """Ctrl-C as Python does it. Within an import, which libraries would go on from or make another
    error of, it ends the program at once: nothing is being written then."""
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            print("\ninterrupted", file=sys.stderr, flush=True)
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def end_quietly(kind, error, traceback):
    """Python's hook for what nobody caught: all but the user's own doing is shown in full."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    elif not issubclass(kind, BrokenPipeError):
        sys.__excepthook__(kind, error, traceback)


def flush_quietly():
    """Python's own flush at the end would complain about a reader that has gone away."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


ROOT = Path(__file__).resolve().parent
if Path(sys.argv[0]).resolve().parent in (ROOT, ROOT / "mini"):
    # a script of ours runs; a notebook or a test that imports this file keeps its own ways
    signal.signal(signal.SIGINT, interrupt)
    sys.excepthook = end_quietly
    atexit.register(flush_quietly)
