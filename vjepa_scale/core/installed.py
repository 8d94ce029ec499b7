"""How the package is installed: the names of its commands, and the recipes and site profiles that come with it."""

import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NoReturn

from vjepa_scale.core.errors import run_command

PACKAGE = Path(__file__).absolute().parents[1]

# -- commands --------------------------------------------------------------------------------------

# tools/NAME.py → its module in vjepa_scale.commands; the console command is vjepa-MODULE.
_MODULES = {
    "launch": "launch",
    "make_shards": "shards",
    "consolidate": "consolidate",
    "extract_features": "features",
    "evaluate": "evaluate",
    "surprise": "surprise",
    "plan": "plan",
    "report": "report",
    "demo": "demo",
    "make_synthetic": "synthetic",
}
_WITHOUT_CONSOLE_COMMAND = ("make_synthetic",)
_TOOL = re.compile(rf"(?<![\w/.-])(?:python )?tools/({'|'.join(_MODULES)})\.py")
_RECIPE = re.compile(r"(?<![\w/.-])recipes/(\w+)\.yaml")
# Set by a console command for the processes that it starts.
_VARIABLE = "VJEPA_CONSOLE_COMMANDS"


def run_console_command(command: Callable[[], int | None]) -> NoReturn:
    """``run_command`` for a console command: messages of the processes that it starts name console commands, too."""
    os.environ[_VARIABLE] = "1"
    run_command(command)


def module_command(tool: str, *words: str) -> list[str]:
    """Returns the command line of tools/NAME.py under this Python. Run it in ``module_environment``.

    -P: the current folder may hold another vjepa_scale, or files with the names of Python's own modules.
    """
    return [sys.executable, "-P", "-m", _module(tool), *words]


def module_environment() -> dict[str, str]:
    """Returns the environment of a ``module_command``, in which Python imports the package that runs here.

    An installed package needs no PYTHONPATH: site-packages in it would come before Python's own modules.
    """
    if PACKAGE.parent.name in ("site-packages", "dist-packages"):
        return dict(os.environ)
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *others])}


def _module(tool: str) -> str:
    return f"vjepa_scale.commands.{_MODULES[tool]}"


def command(tool: str) -> str:
    """Returns what the user types for tools/NAME.py: ``python tools/launch.py``, or ``vjepa-launch`` if installed."""
    if not _uses_console_commands():
        return f"python tools/{tool}.py"
    return f"python -m {_module(tool)}" if tool in _WITHOUT_CONSOLE_COMMAND else f"vjepa-{_MODULES[tool]}"


def program(tool: str) -> str:
    """Returns the name of tools/NAME.py in a usage line or before a flag: ``launch.py``, or ``vjepa-launch``."""
    return command(tool).removeprefix("python ").removeprefix("tools/").removeprefix("-m ")


def as_called(text: str) -> str:
    """Replaces ``[python ]tools/NAME.py`` and ``recipes/NAME.yaml`` in a text by what the user types for them."""
    if not _uses_console_commands():
        return text
    return _RECIPE.sub(r"\1", _TOOL.sub(lambda found: command(found[1]), text))


def _uses_console_commands() -> bool:
    called = Path(sys.argv[0] if getattr(sys, "argv", None) else "")
    if called.name.startswith("vjepa-"):
        return True
    if called.parent.name == "tools" and called.stem in _MODULES:
        return False
    # A rank, or another program that imports the package: without a checkout there is no tools/.
    return _VARIABLE in os.environ or _inside("recipes").is_dir()


# -- recipes and site profiles ---------------------------------------------------------------------

Kind = Literal["recipes", "profiles"]
_IN_CHECKOUT: dict[Kind, str] = {"recipes": "recipes", "profiles": "slurm/profiles"}


def shipped_folder(kind: Kind) -> Path:
    """Returns the folder of the shipped recipes or profiles: inside an installed package, next to it in a checkout."""
    inside = _inside(kind)
    return inside if inside.is_dir() else PACKAGE.parent / _IN_CHECKOUT[kind]


def find_shipped(kind: Kind, name: str) -> Path | None:
    """Returns the shipped file NAME or NAME.yaml; None if there is none, or if ``name`` is a path with folders."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        return None
    path = shipped_folder(kind) / f"{name.removesuffix('.yaml')}.yaml"
    return path if path.is_file() else None


def suggest_shipped(kind: Kind, name: str) -> str:
    """Returns the fix of an error about an unknown name: the closest name, and all of them.

    In a checkout the folder may have the user's own files too, so the names are not called shipped there.
    """
    folder = shipped_folder(kind)
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    close = difflib.get_close_matches(Path(name).name.removesuffix(".yaml"), names, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    where = f"shipped {kind}" if folder == _inside(kind) else f"{kind} in {folder}"
    return f"{meant}{where}: {', '.join(names) or f'none in {folder}'}"


def _inside(kind: Kind) -> Path:
    return PACKAGE / kind
