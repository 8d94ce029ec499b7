from pathlib import Path

import pytest

from tests.planning.material import write_world
from vjepa_scale import load_world_model
from vjepa_scale.planning.world import WorldModel


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def world(world_folder: Path) -> WorldModel:
    return load_world_model(world_folder)


@pytest.fixture(scope="session")
def camera_world(tmp_path_factory: pytest.TempPathFactory) -> WorldModel:
    return load_world_model(write_world(tmp_path_factory.mktemp("camera"), extrinsics=True))
