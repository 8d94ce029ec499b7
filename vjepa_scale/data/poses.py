"""Poses of a robot's hand, and the actions that lead from one to the next. method.md 8.

A state is [position (m), orientation (rad), gripper, 0 open to 1 closed]: 7 numbers. Orientations are extrinsic xyz
Euler angles, R = Rz·Ry·Rx, as scipy's "xyz". An action has the same 7 numbers: the differences of position and
gripper, and the angles of R(k+1)·R(k)ᵀ.

Functions compute in float64 and return the input's dtype, because an action's rotation is the small difference of two
large ones.
"""

import torch
from torch import Tensor

POSITION, ANGLES, GRIPPER = slice(0, 3), slice(3, 6), slice(6, 7)

# Cosine of the pitch below which only roll ∓ yaw is determined: yaw is then set to 0, as in scipy.
_LOCKED = 1e-7


def matrices_of(angles: Tensor) -> Tensor:
    """Returns the rotation matrices [..., 3, 3] of Euler angles [..., 3] in radians."""
    roll, pitch, yaw = angles.double().unbind(-1)
    (sin_x, sin_y, sin_z), (cos_x, cos_y, cos_z) = (
        [f(angle) for angle in (roll, pitch, yaw)] for f in (torch.sin, torch.cos)
    )
    rows = [
        torch.stack([cos_y * cos_z, sin_x * sin_y * cos_z - cos_x * sin_z, cos_x * sin_y * cos_z + sin_x * sin_z], -1),
        torch.stack([cos_y * sin_z, sin_x * sin_y * sin_z + cos_x * cos_z, cos_x * sin_y * sin_z - sin_x * cos_z], -1),
        torch.stack([-sin_y, sin_x * cos_y, cos_x * cos_y], -1),
    ]
    return torch.stack(rows, -2).to(angles.dtype)


def angles_of(matrices: Tensor) -> Tensor:
    """Returns the Euler angles [..., 3] of rotation matrices [..., 3, 3]: pitch in [-π/2, π/2], others in [-π, π].

    Also valid at gimbal lock (a pitch of ±π/2): ``matrices_of`` of the angles is always the given matrix.
    """
    m = matrices.double()
    cos_pitch = torch.hypot(m[..., 0, 0], m[..., 1, 0])
    yaw = torch.where(cos_pitch < _LOCKED, 0.0, torch.atan2(m[..., 1, 0], m[..., 0, 0]))
    # Rz(−yaw)·R = Ry·Rx, so roll and pitch are consistent with this yaw even where yaw is poorly determined.
    sin_z, cos_z = yaw.sin()[..., None], yaw.cos()[..., None]
    x_row = cos_z * m[..., 0, :] + sin_z * m[..., 1, :]
    y_row = cos_z * m[..., 1, :] - sin_z * m[..., 0, :]
    pitch = torch.atan2(-m[..., 2, 0], x_row[..., 0])
    roll = torch.atan2(-y_row[..., 2], y_row[..., 1])
    return torch.stack([roll, pitch, yaw], -1).to(matrices.dtype)


def actions_between(states: Tensor) -> Tensor:
    """Returns the action from each state to the next: [..., K, 7] → [..., K-1, 7]."""
    before, after = states[..., :-1, :].double(), states[..., 1:, :].double()
    turned = matrices_of(after[..., ANGLES]) @ matrices_of(before[..., ANGLES]).mT
    moved = after - before
    return torch.cat([moved[..., POSITION], angles_of(turned), moved[..., GRIPPER]], -1).to(states.dtype)


def advance(states: Tensor, actions: Tensor) -> Tensor:
    """Applies actions [..., 7] to states [..., 7]; returns the next states. The gripper is clamped to [0, 1]."""
    turned = matrices_of(actions[..., ANGLES].double()) @ matrices_of(states[..., ANGLES].double())
    moved = states.double() + actions.double()
    return torch.cat([moved[..., POSITION], angles_of(turned), moved[..., GRIPPER].clamp(0, 1)], -1).to(states.dtype)


def states_along(states: Tensor, actions: Tensor) -> Tensor:
    """Applies actions [..., H, 7] in turn to states [..., 7]; returns [..., H+1, 7], the first state included."""
    along = [states]
    for action in actions.unbind(-2):
        along.append(advance(along[-1], action))
    return torch.stack(along, -2)
