"""What lies where in a tar of samples, by WebDataset's rule: the key is the name up to the base name's first dot."""

import tarfile
from dataclasses import dataclass, field
from pathlib import Path

_VIDEO = {
    "mp4",
    "m4v",
    "mov",
    "mkv",
    "webm",
    "avi",
    "mpg",
    "mpeg",
    "ts",
    "mts",
    "ogv",
    "flv",
    "wmv",
    "3gp",
    "gif",
    "video",
}
_IMAGE = {"jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff"}
MEDIA_EXTENSIONS = frozenset(_VIDEO | _IMAGE)


@dataclass(frozen=True)
class Member:
    """Where one file of a tar lies: offset and size of its bytes."""

    offset: int
    size: int


@dataclass
class Sample:
    """Members of one key, by extension, in the order of the tar."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)


@dataclass
class Contents:
    """A tar's samples in order. problems: of single members; damage: where reading had to stop, if it had."""

    samples: list[Sample]
    problems: list[str]
    damage: str | None = None


def list_tar(path: Path) -> Contents:
    """Samples of an uncompressed tar. Damage ends the listing and is told, never raised."""
    contents, bytes_in_file = Contents([], []), path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if not member.name.isprintable() or not member.isreg() or member.issparse() or not (stem and dot):
                    contents.problems.append(f"{member.name!r} is no member <key>.<extension> of a sample")
                    continue
                if member.offset_data + member.size > bytes_in_file:
                    contents.damage = f"{member.name!r} goes beyond the end of the file"
                    break
                key = f"{folder}/{stem}" if folder else stem
                if not contents.samples or contents.samples[-1].key != key:
                    contents.samples.append(Sample(key))
                found = contents.samples[-1].members
                if extension.lower() in found:
                    contents.problems.append(f"{member.name!r} occurs twice")
                    continue
                found[extension.lower()] = Member(member.offset_data, member.size)
    except (tarfile.TarError, UnicodeDecodeError, ValueError) as error:
        contents.damage = str(error) or type(error).__name__
    return contents
