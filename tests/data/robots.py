"""A small data set of robot trajectories, made from files in DROID's layout."""

from pathlib import Path

import numpy as np

from tests.data.droid import EXTRINSICS, READ_START, STEPS, good, jittered_ms, world, write
from tests.videos import encoded, quiet
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.shards.make import Settings, make_shards

PLAIN = "plain"  # 20 steps at 20 Hz, no extrinsics
UNEVEN = "uneven"  # a log with a pause in it, and a video that was given its times


def robots(folder: Path, *, even: int = 3) -> Manifest:
    """Some records of 3 s at 15 Hz, one of 1 s, one of 3.28 s. Frame k of each shows the number k, and is of step k."""
    for seed in range(even):
        good(folder / "droid" / f"even{seed}", seed)
    plain = {name: array for name, array in world(20, 11).items() if name != EXTRINSICS}
    times = {READ_START: 50 * np.arange(20)}
    write(folder / "droid" / PLAIN, plain | times, encoded(20, rate=20))
    write(folder / "droid" / UNEVEN, world(seed=12) | {READ_START: jittered_ms()}, encoded(STEPS, rate=60))
    settings = Settings(trajectories="droid", retime=True, shard_records=3)
    make_shards(folder / "droid", folder / "shards", settings, workers=1, progress=quiet)
    return Manifest.open(folder / "shards")
