"""/dev/shm is full when a loader worker passes a batch on.

The system's limit on the size of a file stands in for it: shared memory is a file there.
"""

import resource

import pytest
import torch

from vjepa_scale.core.errors import PassingError
from vjepa_scale.data.loader import Prefetched


def _batch_beyond_the_limit(size: int) -> torch.Tensor:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    return torch.zeros(size, dtype=torch.uint8)


@pytest.mark.fault(
    "disks",
    "/dev/shm becomes full during training",
    "an error that may pass, so another attempt follows; it names /dev/shm and the keys that help, the log has the "
    "worker's own error",
)
@pytest.mark.distributed
def test_a_batch_that_shared_memory_cannot_hold_ends_the_worker() -> None:
    loader = Prefetched(_batch_beyond_the_limit, [10, 3_000_000, 10], workers=1, prefetch=2)
    with pytest.raises(PassingError, match=r"/dev/shm: a loader worker cannot pass a batch on .*data\.workers"):
        list(loader)
    loader.close()
