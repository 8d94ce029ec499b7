"""The Python lines of the README's section and of docs/inference.md, as they stand there."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.chain import ROOT, tool
from tests.inference.test_clips import image_file
from tests.videos import encoded, picture


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the documents name: DIR, video.mp4, image.png and OUT."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(checkpoint, folder / "DIR")
    (folder / "videos").mkdir()
    (folder / "videos" / "video.mp4").write_bytes(encoded(120, rate=25))
    shutil.copy(folder / "videos" / "video.mp4", folder)
    image_file(folder / "image.png", picture(3), "png", "rgb24")
    tool("extract_features", folder / "videos", folder / "DIR", folder / "OUT", "--workers", 1)
    return folder


@pytest.mark.parametrize(("document", "lines"), [("README.md", 5), ("docs/inference.md", 30), ("docs/surprise.md", 14)])
def test_the_lines_run(document: str, lines: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / document).read_text()
    if document == "README.md":
        text = text.partition("### Use a trained encoder\n")[2].partition("\n### ")[0]
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert len([line for line in code.splitlines() if line.strip()]) >= lines - 1
    monkeypatch.chdir(folder)
    names = {"pictures": np.stack([picture(k) for k in range(6)])}
    exec(compile(code, document, "exec"), names)
    if document == "docs/surprise.md":
        # 24 pictures in windows of 8, one tubelet further each, and of those with a stride of 4 every second one.
        assert torch.equal(names["one_ahead"], names["several"].errors[:, 1, :, 2])
        assert names["one_ahead"].isfinite().all()
        assert (names["found"].windows.shape, names["one_ahead"].shape) == ((1, 9), (1, 5))
        assert names["figures"]["pairs"] == 5
        return
    future = names["future"]
    assert future.tokens.shape == (1, 2 * 16, 48)
    if document == "docs/inference.md":
        assert names["predicted"].shape == names["truth"][:, 16:32].shape
        assert names["deeper"].tokens.shape[1] == 2
        assert torch.equal(names["last"], names["tokens"])
        # The mean of a chunk's tokens is the row that the index names.
        first = next(names["model"].encode_chunks("video.mp4", start=0.0))
        with open("OUT/index.jsonl") as index:
            assert len(index.readlines()) == 3
        assert names["rows"].shape == (1, 48)
        assert names["chunk"]["start_s"] == pytest.approx(16 / 5)
        assert first.tokens.shape == (1, 4 * 16, 48)
