"""Exits with a one-line error where a library is missing or incompatible with another one.

Scripts that run a model import this before any library: a version mismatch would otherwise surface
as a traceback from a library. An installer cannot prevent all of it. torchaudio's wheels, for
example, do not say which torch they fit, and load with some releases only.
"""

import importlib
import importlib.metadata
import sys

# a library, and the one that it is built against
BUILT_AGAINST = {
    "numpy": None,
    "torch": "numpy",
    "torchaudio": "torch",
    "transformers": "torch",
    "soundfile": "numpy",
}


def with_version(name):
    """A library's name and installed version, e.g. "torch 2.15.0"."""
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return name


def problem(name, partner):
    """What keeps a library from being used, in one line, or None."""
    try:
        library = importlib.import_module(name)
        if name == "transformers" and not library.utils.is_torch_available():
            raise ImportError("it does not recognise this torch")
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed for {sys.executable}"
    except Exception as error:  # a library that does not fit raises errors of many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        against = f" does not work with {with_version(partner)}" if partner else " cannot be used"
        return f"{with_version(name)}{against} ({reason})"
    return None


for name, partner in BUILT_AGAINST.items():
    reason = problem(name, partner)
    if reason:
        print(
            f"error: {reason}: activate the environment (. .venv/bin/activate), or install the "
            "versions that were tested (uv pip install -r requirements.txt)",
            file=sys.stderr,
        )
        raise SystemExit(2)
