"""Used by every room: the user error, keyed randomness, atomic files, the rank environment, lazy packages."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a ``__getattr__`` for a package's ``__init__`` (PEP 562): it imports a name's module at its first use.

    Commands that do not use PyTorch then start quickly.

    modules: name -> the module that defines it
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(modules[name]), name)

    return get
