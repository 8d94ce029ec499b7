"""A picture, a pose and two actions for the published world model, and ours. As inputs.py."""

import numpy as np

from tests.published import inputs

CASE = inputs.ACTION_CASES["square"]
SIDE = inputs.PATCH * CASE.pretrained  # pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def picture() -> np.ndarray:
    """uint8 [16, 16, 3]."""
    return np.floor((inputs.uniform("action picture", (SIDE, SIDE, 3)) + 1) * 128).astype(np.uint8)


def start() -> np.ndarray:
    """A pose, float32 [7]: metres, radians, gripper."""
    return (inputs.uniform("action start", (inputs.STATE,)) * 0.3 + 0.5).astype(np.float32)


def actions() -> np.ndarray:
    """float32 [2, 7], large ones: the second closes the gripper further than it can."""
    drawn = inputs.uniform("actions", (2, inputs.STATE)) * 0.5
    drawn[1, 6] = 0.9
    return drawn.astype(np.float32)
