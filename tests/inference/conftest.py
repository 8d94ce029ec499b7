from pathlib import Path

import pytest
from transformers import VJEPA2Model

from tests.inference.checkpoint import hugging_face, write_checkpoint
from tests.videos import encoded
from vjepa_scale import load_model
from vjepa_scale.inference.model import Model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("consolidated"))


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Model:
    return load_model(checkpoint)


@pytest.fixture(scope="session")
def published() -> VJEPA2Model:
    return hugging_face()


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4.2 seconds at 20 frames per second, 48 × 64: at 5 a second 21 pictures, an odd number."""
    path = tmp_path_factory.mktemp("video") / "long.mp4"
    path.write_bytes(encoded(84, rate=20, gop=10))
    return path
