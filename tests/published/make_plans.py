"""What the published code of robots computes: actions of poses, poses of actions, plans. Run by make.py."""

from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from tests.published import inputs


def poses() -> dict[str, Any]:
    """Poses and their ``poses_to_diffs``; from other poses, what ``compute_new_pose`` makes of actions taken there."""
    from app.vjepa_droid.droid import DROIDVideoDataset
    from notebooks.utils.mpc_utils import compute_new_pose

    states = inputs.poses("poses", 40)
    actions = DROIDVideoDataset.poses_to_diffs(None, states)
    start, taken = inputs.poses("from", 39), actions * np.array([1, 1, 1, 1, 1, 1, 2.0])
    reached = compute_new_pose(torch.from_numpy(start)[:, None], torch.from_numpy(taken)[:, None])[:, 0].numpy()
    arrays = {"states": states, "actions": actions, "from": start, "taken": taken, "reached": reached}
    return {name: array.tolist() for name, array in arrays.items()}


def plans() -> dict[str, Any]:
    """Action sequences [horizon, 7] that ``cem`` finds in the world of inputs.py, with its draws."""
    from notebooks.utils import mpc_utils

    def world(frames: Tensor, actions: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        last = [array[:, -1].double().numpy() for array in (frames, actions, past)]
        frame = torch.from_numpy(inputs.plan_world(last[0], last[1], last[2])).float()
        return frame[:, None], mpc_utils.compute_new_pose(past[:, -1:], actions[:, -1:])

    found = {}
    for name, case in inputs.PLAN_CASES.items():
        drawn = iter(
            inputs.plan_noise(name, iteration, step)
            for iteration in range(case.iterations)
            for step in range(case.horizon)
        )
        with patch.object(torch, "randn", lambda *_, drawn=drawn, **__: torch.from_numpy(next(drawn))):
            plan = mpc_utils.cem(
                torch.zeros(1, 1, *inputs.PLAN_FRAME),
                torch.from_numpy(inputs.plan_start(name))[None, None],
                torch.from_numpy(inputs.plan_goal(name)).float()[None, None],
                world,
                rollout=case.horizon,
                cem_steps=case.iterations,
                samples=case.samples,
                topk=case.elites,
                maxnorm=case.max_translation,
                momentum_mean=case.momentum,
                momentum_std=case.momentum,
                momentum_mean_gripper=case.momentum,
                momentum_std_gripper=case.momentum,
            )
        assert next(drawn, None) is None
        found[name] = plan[0].tolist()
    return found
