"""Lines of a file that grows come once, whole, from where the reader is."""

from pathlib import Path

import pytest

from vjepa_scale.core.files import GrowingFile


def test_lines_come_once_and_whole(tmp_path: Path) -> None:
    file = GrowingFile(tmp_path / "log")
    assert list(file.lines()) == []
    with open(file.path, "wb", buffering=0) as writer:
        writer.write(b"one\ntw")
        assert list(file.lines()) == [b"one\n"]
        writer.write("o é\n\n".encode())
        assert list(file.lines()) == ["two é\n".encode(), b"\n"]
        writer.write(b"end")
        assert list(file.lines()) == []
        assert list(file.lines(whole=False)) == [b"end"]
        writer.write(b"left out\nlast\n")
        file.skip_all()
        assert list(file.lines()) == []


@pytest.mark.parametrize(("count", "line_bytes", "seen"), [(2, 200, 2), (9, 200, 5), (2, 4, 1), (1, 1, 0)])
def test_the_last_lines(tmp_path: Path, count: int, line_bytes: int, seen: int) -> None:
    """Five lines of six bytes; where too little is looked at, a line that is not whole is left out."""
    lines = [f"line{n}\n".encode() for n in range(5)]
    file = GrowingFile(tmp_path / "log")
    file.path.write_bytes(b"".join(lines))
    file.skip_to_last(count, line_bytes=line_bytes)
    assert list(file.lines()) == lines[5 - seen :]
