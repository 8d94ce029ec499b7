"""The grid of processes: ``shard`` alone, or ``replicate`` × ``shard`` for hybrid sharding."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def build_mesh(device_type: str, *, world_size: int, replicate: int, timeout_s: float) -> DeviceMesh:
    """A mesh over all processes of the (already started) group, whose collectives wait so long for a peer.

    Neighbouring ranks shard together, so that with one replica per node the all-gathers stay in the node.
    """
    if replicate == 1:  # the group of all processes, which has that timeout
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    ranks = torch.arange(world_size).view(replicate, world_size // replicate)
    groups = [_own_group(lists, timeout_s) for lists in (ranks.T.tolist(), ranks.tolist())]
    return DeviceMesh.from_group(groups, device_type, mesh=ranks.int(), mesh_dim_names=("replicate", "shard"))


def _own_group(lists: list[list[int]], timeout_s: float) -> dist.ProcessGroup:
    """This rank's of some groups. (A mesh that makes its groups itself leaves them PyTorch's timeouts.)"""
    own, _ = dist.new_subgroups_by_enumeration(lists, timeout=timedelta(seconds=timeout_s))
    assert own is not None, "each rank is in one"
    return own
