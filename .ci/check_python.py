"""Checks that `make env` can use this Python. If not, prints one line to stderr and exits with 1.

python .ci/check_python.py VENV [asked]     asked: the user's value of PYTHON in make env PYTHON=…

May run under an old Python: uses nothing newer than Python 3.4.
"""

import importlib.util
import os
import platform
import sys

GONE = "the Python that {} was made with is gone: run make clean, then this again"
OTHER = "{} has Python {}, and PYTHON={} is {}: run make clean first, or leave PYTHON out"
OLD = "Python {} is too old: 3.11 or newer is needed, as in make env PYTHON=python3.12"
NO_VENV = (
    "this Python cannot make environments, it has no venv or no ensurepip: "
    "on Debian and Ubuntu, apt-get install python{}.{}-venv"
)


def problem(environment, asked):
    here = platform.python_version()
    python = os.path.join(environment, "bin", "python")
    if os.path.lexists(python):
        if not os.access(python, os.X_OK):
            return GONE.format(environment)
        there = version_of(environment)
        if asked and there and there != here:
            return OTHER.format(environment, there, asked, here)
        if os.path.exists(os.path.join(environment, ".ready")):
            return None  # it exists, so the Python that runs this does not matter
    if sys.version_info < (3, 11):
        return OLD.format(here)
    if any(importlib.util.find_spec(name) is None for name in ("venv", "ensurepip")):
        return NO_VENV.format(*sys.version_info)
    return None


def version_of(environment):
    """Returns the version in pyvenv.cfg; None if there is none."""
    try:
        with open(os.path.join(environment, "pyvenv.cfg")) as file:
            settings = dict(line.partition("=")[::2] for line in file)
    except OSError:
        return None
    return {key.strip(): value.strip() for key, value in settings.items()}.get("version")


if __name__ == "__main__":
    found = problem(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")
    sys.exit("make env: {}".format(found) if found else 0)
