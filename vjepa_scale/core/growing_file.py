"""A text file that another process writes, read line by line as it grows."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


class GrowingFile:
    """position: in bytes; the lines before it have been read."""

    def __init__(self, path: Path, position: int = 0) -> None:
        self.path, self.position = path, position

    def lines(self, *, whole: bool = True) -> Iterator[bytes]:
        """The lines that have come since, each with its end; none while there is no file.

        whole: leave out a last line without its end, which is still being written
        A line counts as read when the next one is asked for: one whose reader failed comes again.
        """
        with suppress(FileNotFoundError), open(self.path, "rb") as file:
            file.seek(self.position)
            for line in file:
                if whole and not line.endswith(b"\n"):
                    return
                yield line
                self.position += len(line)

    def skip_all(self) -> None:
        """Go on at the end of what there is now."""
        self.position = self.path.stat().st_size

    def skip_to_last(self, count: int, *, line_bytes: int = 200) -> None:
        """Go on with the last ``count`` lines of what there is now; with fewer where lines are longer than given."""
        with open(self.path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = max(0, size - line_bytes * count)
            file.seek(begin)
            content = file.read(size - begin)
        lines = content.splitlines(keepends=True)
        if begin > 0 and len(lines) <= count:
            lines = lines[1:]  # its beginning is not in sight
        self.position = size - sum(map(len, lines[-count:]))
