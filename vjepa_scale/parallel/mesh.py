"""The grid of processes: ``shard`` alone, or ``replicate`` × ``shard`` for hybrid sharding."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vjepa_scale.core.errors import UserError


def check_replicate(world_size: int, replicate: int) -> None:
    """Raise UserError where the processes do not divide into that many full copies."""
    if world_size % replicate:
        raise UserError(
            f"{world_size} processes do not divide into {replicate} replicas",
            where="engine.replicate",
            fix="a divisor of launch.nodes × launch.tasks_per_node",
        )


def build_mesh(device_type: str, *, world_size: int, replicate: int) -> DeviceMesh:
    """A mesh over all processes of the (already started) group.

    Neighbouring ranks shard together, so that with one replica per node the all-gathers stay in the node.
    """
    check_replicate(world_size, replicate)
    if replicate == 1:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    shape = (replicate, world_size // replicate)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
