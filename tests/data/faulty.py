"""A decoder with faults that no test file can bring about in the real one."""

import os
from pathlib import Path

from tests.chain import ROOT

# PyAV, but for videos that begin with a word: on those it hangs in C, with the interpreter's lock held, or crashes.
_DECODER = """
import ctypes, os
import av

honest = av.open

def faulty(file, *args, **kwargs):
    word = file.read(4) if hasattr(file, "read") else b""
    if hasattr(file, "seek"):
        file.seek(0)
    if word == b"HANG":
        ctypes.PyDLL(None).sleep(1000)
    if word == b"DIES":
        os.abort()
    return honest(file, *args, **kwargs)

av.open = faulty
"""


def with_faulty_decoder(folder: Path) -> dict[str, str]:
    """The environment of a command whose processes, all of them, have that decoder. folder: for what they import."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(_DECODER)
    return {**os.environ, "PYTHONPATH": f"{folder / 'site'}:{ROOT}"}
