"""Euler angles and actions against scipy's rotations and the published code's numbers."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from vjepa_scale.data.poses import actions_between, advance, angles_of, matrices_of, states_along

PUBLISHED = json.loads((Path(__file__).parents[1] / "published" / "poses.json").read_text())
QUARTER = math.pi / 2


def scipy_matrices(angles: np.ndarray) -> np.ndarray:
    return Rotation.from_euler("xyz", angles.reshape(-1, 3)).as_matrix().reshape(*angles.shape, 3)


def scipy_angles(matrices: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of gimbal lock
        return Rotation.from_matrix(matrices.reshape(-1, 3, 3)).as_euler("xyz").reshape(matrices.shape[:-1])


def apart(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> float:
    """Largest difference of two sets of angles, which are the same a full turn apart."""
    difference = np.asarray(a) - np.asarray(b)
    return float(np.abs((difference + np.pi) % (2 * np.pi) - np.pi).max())


def random_angles(*shape: int, seed: int = 0, largest: float = math.pi) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-largest, largest, size=(*shape, 3))


def random_states(*shape: int, seed: int = 0) -> Tensor:
    draw = np.random.default_rng(seed)
    states = draw.normal(size=(*shape, 7))
    states[..., 3:6] = scipy_angles(scipy_matrices(random_angles(*shape, seed=seed)))
    states[..., 6] = draw.uniform(size=shape)
    return torch.from_numpy(states)


def test_matrices_are_scipys_for_angles_of_any_size() -> None:
    for largest in (0.01, math.pi, 50.0):
        angles = random_angles(500, largest=largest)
        assert np.abs(matrices_of(torch.from_numpy(angles)).numpy() - scipy_matrices(angles)).max() < 1e-13


def test_angles_are_scipys_for_random_rotations() -> None:
    matrices = Rotation.random(2000, rng=np.random.default_rng(1)).as_matrix()
    assert apart(angles_of(torch.from_numpy(matrices)), scipy_angles(matrices)) < 1e-12


NEAR = [0.0, 1e-17, 1e-16, 1e-12, 1e-9, 5e-8, 0.99e-7, 1e-7, 1.01e-7, 1e-6, 1e-4, 1e-2]


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("short", NEAR)
def test_angles_give_the_matrix_back_at_and_near_gimbal_lock(sign: int, short: float) -> None:
    angles = random_angles(500, seed=2)
    angles[:, 1] = sign * (QUARTER - short)
    angles[:4, [0, 2]] = [[0, 0], [math.pi, 0], [0, math.pi], [-math.pi, math.pi]]
    matrices = torch.from_numpy(scipy_matrices(angles))
    found = angles_of(matrices)
    assert torch.isfinite(found).all()
    assert (matrices_of(found) - matrices).abs().max() < 1.5e-7, "at the edge of the lock; scipy loses half as much"
    if short < 5e-8 or short > 2e-7:  # where both say that it is locked, or that it is not
        assert apart(found, scipy_angles(matrices.numpy())) < 1e-8 / max(short, 1e-2)


def test_noise_in_a_locked_matrix_is_no_rotation() -> None:
    """The four numbers that vanish at the lock are rounding; angles that trusted them apart would not fit together."""
    matrix = torch.tensor([[0.0, 0.6, 0.8], [0.0, 0.8, -0.6], [-1.0, 0.0, 0.0]], dtype=torch.float64)
    noise = torch.from_numpy(np.random.default_rng(3).normal(size=(300, 3, 3)))
    for size in (1e-17, 1e-13, 1e-9, 1e-8):
        noisy = matrix + size * noise
        assert (matrices_of(angles_of(noisy)) - matrix).abs().max() < 20 * size + 1e-15


def test_float32_is_worked_out_in_float64() -> None:
    matrices = Rotation.random(2000, rng=np.random.default_rng(4)).as_matrix().astype(np.float32)
    found = angles_of(torch.from_numpy(matrices))
    assert torch.equal(found, angles_of(torch.from_numpy(matrices).double()).float())
    assert (matrices_of(found) - torch.from_numpy(matrices)).abs().max() < 5e-7
    states = random_states(50, seed=5)
    states[1:] = states[:1] + 1e-4 * states[1:]  # the hand hardly moves
    states = states.float()
    single, double = actions_between(states), actions_between(states.double())
    assert single.dtype == torch.float32
    assert (single - double).abs().max() < 1e-10


def test_actions_are_the_formula() -> None:
    """Δposition; the angles of R(k+1)·R(k)ᵀ; Δgripper."""
    states = random_states(40, seed=6)
    actions = actions_between(states).numpy()
    plain = states.numpy()
    assert actions.shape == (39, 7)
    np.testing.assert_allclose(actions[:, :3], np.diff(plain[:, :3], axis=0), atol=1e-15)
    np.testing.assert_allclose(actions[:, 6], np.diff(plain[:, 6]), atol=1e-15)
    rotations = Rotation.from_euler("xyz", plain[:, 3:6])
    assert apart(actions[:, 3:6], (rotations[1:] * rotations[:-1].inv()).as_euler("xyz")) < 1e-10


def test_a_turn_past_pi_is_a_small_action() -> None:
    states = torch.zeros(4, 7, dtype=torch.float64)
    states[:, 3] = states.new_tensor([math.pi - 0.02, math.pi - 0.01, -math.pi + 0.01, -math.pi + 0.02])
    turned = actions_between(states)[:, 3:6]
    assert (turned - states.new_tensor([[0.01, 0, 0], [0.02, 0, 0], [0.01, 0, 0]])).abs().max() < 1e-12
    back = advance(states[1], actions_between(states)[1])
    assert apart(back[3:6], states[2, 3:6]) < 1e-12
    assert back[3].abs() <= math.pi


def test_an_action_advances_to_the_next_state() -> None:
    states = random_states(3, 50, seed=7)
    reached = advance(states[:, :-1], actions_between(states))
    assert apart(reached, states[:, 1:]) < 1e-6, "angles near gimbal lock are worth less than their matrices"
    matrices = [matrices_of(s[..., 3:6]) for s in (reached, states[:, 1:])]
    assert (matrices[0] - matrices[1]).abs().max() < 1e-12


@pytest.mark.parametrize("pitch", [QUARTER, -QUARTER, QUARTER - 1e-9, -QUARTER + 1e-7])
def test_an_action_into_and_out_of_gimbal_lock(pitch: float) -> None:
    states = random_states(60, seed=8)
    states[20:40, 4] = pitch
    reached = advance(states[:-1], actions_between(states))
    assert torch.isfinite(reached).all()
    difference = matrices_of(reached[:, 3:6]) - matrices_of(states[1:, 3:6])
    assert difference.abs().max() < 3e-7


def test_the_gripper_stays_between_open_and_closed() -> None:
    states, actions = torch.zeros(3, 7), torch.zeros(3, 7)
    states[:, 6], actions[:, 6] = torch.tensor([0.2, 0.9, 0.5]), torch.tensor([-0.5, 0.5, 0.25])
    assert advance(states, actions)[:, 6].tolist() == [0.0, 1.0, 0.75]


def test_leading_dimensions() -> None:
    states = random_states(2, 3, 5, seed=9)
    together = actions_between(states)
    assert together.shape == (2, 3, 4, 7)
    assert torch.equal(together[1, 2], actions_between(states[1, 2]))
    assert angles_of(matrices_of(states[0, 0, 0, 3:6])).shape == (3,)
    assert matrices_of(states[..., 3:6]).shape == (2, 3, 5, 3, 3)
    assert actions_between(states[..., :1, :]).shape == (2, 3, 0, 7)


def test_states_along_a_sequence_of_actions() -> None:
    states = random_states(4, 6, seed=10)
    along = states_along(states[:, 0], actions_between(states))
    assert along.shape == states.shape
    assert apart(along, states) < 1e-6
    assert torch.equal(states_along(states[:, 0], torch.zeros(4, 0, 7, dtype=torch.float64)), states[:, :1])


def test_actions_are_the_published_codes() -> None:
    theirs = torch.tensor(PUBLISHED["actions"], dtype=torch.float64)
    ours = actions_between(torch.tensor(PUBLISHED["states"], dtype=torch.float64))
    assert (ours - theirs).abs().max() < 1e-9
    assert (theirs[:, 3:6].norm(dim=-1) > 1).any(), "large turns are among them"


def test_advanced_poses_are_the_published_codes() -> None:
    """Given its own actions, scaled so that the gripper meets both ends."""
    states, actions, theirs = (
        torch.tensor(PUBLISHED[name], dtype=torch.float64) for name in ("from", "taken", "reached")
    )
    assert (advance(states, actions) - theirs).abs().max() < 1e-9
    assert {0.0, 1.0} <= set(theirs[:, 6].tolist())
