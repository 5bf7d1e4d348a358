"""Small helpers that every script uses: errors in one line, files written whole, seeded numbers,
bootstrap intervals. Scripts import this first, so that Ctrl-C and a closed pipe (`| head`) end
without a traceback even during imports."""

import argparse
import atexit
import contextlib
import hashlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent

# -------------------------------------------------------------------------------------------------
# Ctrl-C and broken pipes


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
    """Python's hook for errors that nobody caught: all but Ctrl-C and a closed pipe are shown."""
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


if Path(sys.argv[0]).resolve().parent in (ROOT, ROOT / "mini"):
    # one of our scripts runs; a notebook or a test that imports this file keeps its own handlers
    signal.signal(signal.SIGINT, interrupt)
    sys.excepthook = end_quietly
    atexit.register(flush_quietly)

# under torchrun one process draws the progress bars
os.environ.setdefault("TQDM_DISABLE", "" if os.environ.get("RANK", "0") == "0" else "1")

import numpy as np  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from tqdm import tqdm  # noqa: E402

# -------------------------------------------------------------------------------------------------
# the command line


class Parser(argparse.ArgumentParser):
    """A parser that shows a script's docstring as it is, and prints a mistake in one line, without
    the usage."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def group(self, title):
        """The flags that --help shows under this heading, an argparse group; made where it is new."""
        for group in self._action_groups:
            if group.title == title:
                return group
        return self.add_argument_group(title)

    def error(self, message):
        self.exit(2, f"error: {message}; --help lists the flags\n")


def count(text):
    """A flag's type: a whole number, 1 or more."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no whole number, 1 or more")
    return int(text)


def printable(text):
    """Text as it may be shown: a stranger's line breaks and terminal codes are spelled out."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return "".join(shown)


def say(message):
    """Prints one line that may hold a stranger's text: a corpus's, a file's name."""
    print(printable(message))


def die(message):
    """A user error: prints one line and exits with status 2."""
    # on a line of its own, even while a progress bar is drawn
    tqdm.write(f"error: {printable(message)}", file=sys.stderr)
    raise SystemExit(2)


def first_line(error):
    """The first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# -------------------------------------------------------------------------------------------------
# files


def temporary_name(path):
    """The name beside `path` under which it is written first: no other process has it, on this
    machine or on another."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


# what writing to a full disk, or where one may not, raises: torch.save a RuntimeError
CANNOT_WRITE = (OSError, RuntimeError, SafetensorError)


def die_of_writing(path, error):
    die(f"cannot write {path} ({first_line(error)}): check the disk's space and permissions")


def write_atomically(path, content, optional=False):
    """Writes text or, by a function of the temporary path, anything to `path`, whole or not at all.
    Where that is impossible, it exits with a one-line error, unless the file is `optional`."""
    path = Path(path)
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(temporary)
        else:
            temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    except CANNOT_WRITE as error:
        if not optional:
            die_of_writing(path, error)
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder):
    """A temporary folder that becomes `folder` if all goes well. Exits with a one-line error if
    `folder` exists and is not empty."""
    folder = Path(folder).resolve()
    temporary = temporary_name(folder)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            die(f"{folder}: there is something already; name a new folder")
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        die_of_writing(folder, error)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# -------------------------------------------------------------------------------------------------
# this program's version


def git(*command):
    """What a git command prints about the folder of this program; empty where it fails."""
    command = ["git", "-C", str(ROOT), *command]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # there is no git
        return ""


def commit():
    """The commit of this program, "COMMIT with changes" where its files were edited since; empty
    where that cannot be known, as in a copy that lies in another repository."""
    top_level = git("rev-parse", "--show-toplevel")
    if not top_level or Path(top_level).resolve() != ROOT:
        return ""
    edited = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + (" with changes" if edited else "")


# -------------------------------------------------------------------------------------------------
# numbers


def seed_of(name):
    """64 bits decided by `name` alone, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(name).encode()).digest()[:8], "big")


def generator(*name):
    """A numpy generator seeded by `name` alone."""
    return np.random.default_rng(seed_of(name))


def draw(*name):
    """A number in [0, 1) decided by `name` alone."""
    return seed_of(name) / 2**64


def interval(values, weights=None, speakers=None, samples=1000, seed=0):
    """sum(values) / sum(weights), by default the mean, with its 95% bootstrap interval. values,
    weights, speakers: (n,). Whole speakers are drawn, as a speaker's utterances are alike, and
    "by_speaker" keeps each one's two sums; without `speakers`, or with only one, single values
    are drawn."""
    pairs = np.ones((len(values), 2))
    pairs[:, 0] = values
    if weights is not None:
        pairs[:, 1] = weights
    figure = dict(value=ratio(pairs), n=len(pairs))
    if speakers is not None:
        names, speaker_of = np.unique(np.asarray(speakers, dtype=str), return_inverse=True)
        sums = np.stack([pairs[speaker_of == i].sum(0) for i in range(len(names))])
        figure["by_speaker"] = dict(zip(names.tolist(), sums.round(6).tolist()))
        if len(names) > 1:
            pairs = sums
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(samples):
        draws.append(ratio(pairs[rng.integers(0, len(pairs), len(pairs))]))
    low, high = np.percentile(draws, [2.5, 97.5])
    return dict(figure, low=float(low), high=float(high))


def ratio(pairs):
    """The sum of (n, 2) pairs' first numbers over that of their second ones, over 1 for 0."""
    numerator, denominator = pairs.sum(0).tolist()
    return numerator / (denominator or 1.0)
