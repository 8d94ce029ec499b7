"""Sizes, weights and inputs of the comparison, drawn alike where the published code runs and where ours does.

Values are a function of their name alone, from PCG64's raw bits, which numpy keeps the same in every version.
Nothing is zero: every parameter takes part.
"""

import zlib
from dataclasses import dataclass

import numpy as np

# -- three steps of pretraining ------------------------------------------------------------------------

STEPS, CLIPS, FRAMES, SIZE, PATCH, TUBELET = 3, 4, 8, 32, 4, 2
WIDTH, DEPTH, HEADS = 28, 2, 2  # heads of 14 channels: three axis groups of 4 and 2 channels that are not rotated
PREDICTOR_WIDTH, PREDICTOR_DEPTH, PREDICTOR_HEADS = 24, 2, 2  # the published rotation cannot do fewer channels a head
START_LR, PEAK_LR, FINAL_LR = 1e-3, 5e-3, 2e-3
WEIGHT_DECAY, ADAM_EPS, MOMENTUM = 0.04, 1e-5, 0.9  # eps damps Adam where the true gradient is 0

# -- encoder on clips that are not square ---------------------------------------------------------------

WIDE_CLIP = (2, 3, 6, 12, 20)  # [B, C, T, H, W]: 3×3×5 tokens

# -- action-conditioned predictor -------------------------------------------------------------------------

STATE, CAMERA = 7, 6
ACTION_WIDTH, ACTION_DEPTH, ACTION_HEADS = 40, 2, 2  # heads of 20: groups of 6, rest 2


@dataclass(frozen=True)
class ActionCase:
    """pretrained: side of the square grid to which positions are rescaled. steps_of_mask: what the published
    network's mask is built for; it takes that many steps or fewer."""

    steps: int
    grid: tuple[int, int]
    pretrained: int
    extrinsics: bool = False
    steps_of_mask: int = 4


ACTION_CASES = {
    "square": ActionCase(steps=4, grid=(4, 4), pretrained=4),
    "extrinsics": ActionCase(steps=3, grid=(3, 3), pretrained=3, extrinsics=True),
    "not_square": ActionCase(steps=3, grid=(3, 5), pretrained=3),
    "another_grid": ActionCase(steps=3, grid=(4, 3), pretrained=6, extrinsics=True),
}

# -- three steps of action-conditioned training: STEPS, CLIPS, PATCH, encoder and predictor as above ----------------

ACTION_FRAMES, ACTION_SIZE = 5, 16


@dataclass(frozen=True)
class ActionRun:
    """As the published config's auto_steps, use_extrinsics and loss_exp."""

    rollout_steps: int
    extrinsics: bool
    exponent: float


ACTION_RUNS = {
    "published": ActionRun(rollout_steps=2, extrinsics=False, exponent=1.0),
    "extrinsics": ActionRun(rollout_steps=3, extrinsics=True, exponent=2.0),
}

# -- sine-cosine positions: a table of 6 frames (or of images) of 32×32 pixels in patches of 8 -----------------

SINCOS_WIDTH, SINCOS_FRAMES, SINCOS_SIZE, SINCOS_PATCH = 40, 6, 32, 8
# frames of the table, and whether its axes have equal shares
SINCOS_TABLES = {"third_each": (SINCOS_FRAMES, True), "half_to_time": (SINCOS_FRAMES, False), "images": (1, False)}
SINCOS_CLIPS = {"own": (6, 32, 32), "shorter": (4, 32, 32), "larger": (8, 48, 40), "smaller": (4, 16, 24)}  # T, H, W
# Only videos: the published code interpolates an image's table otherwise, and only to squares.
SINCOS_CASES = [(table, clip) for table in SINCOS_TABLES for clip in SINCOS_CLIPS if table != "images" or clip == "own"]

# -- attentive probe -----------------------------------------------------------------------------------------

PROBE_WIDTH, PROBE_HEADS, PROBE_CLASSES = 32, 4, 7
PROBE_DEPTHS = (1, 4)

# -- planning: the published planner in a world whose next frame is a formula ---------------------------------

PLAN_FRAME = (3, 4)  # tokens of a frame, numbers of a token


@dataclass(frozen=True)
class PlanCase:
    """As the published planner's arguments: rollout, samples, topk, cem_steps, maxnorm and both momenta."""

    horizon: int
    samples: int = 60
    elites: int = 6
    iterations: int = 8
    max_translation: float = 0.05
    momentum: float = 0.15


PLAN_CASES = {
    "published": PlanCase(horizon=2),
    "one_step": PlanCase(horizon=1, max_translation=0.075),
    "long": PlanCase(horizon=4, samples=40, elites=10, iterations=5, momentum=0.4),
}


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 in [−1, 1)."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    return ((raw >> np.uint64(11)) * 2.0**-52 - 1.0).reshape(shape)


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 inputs, of standard deviation 1."""
    return (uniform(name, shape) * 3**0.5).astype(np.float32)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter, float32. name: with its network, ``encoder.blocks.0.attn.qkv.weight``."""
    drawn = uniform(name, shape)
    if "norm" in name:
        drawn = 0.3 * drawn + (1.0 if name.endswith("weight") else 0.0)
    elif name.endswith("weight"):
        drawn *= 2.0 / np.prod(shape[1:]) ** 0.5
    else:  # biases, mask tokens, the probe's query
        drawn *= 0.5
    return drawn.astype(np.float32)


def clips(step: int) -> np.ndarray:
    """uint8 [4, 3, 8, 32, 32]."""
    return np.floor((uniform(f"clips {step}", (CLIPS, 3, FRAMES, SIZE, SIZE)) + 1) * 128).astype(np.uint8)


def action_clips(step: int) -> np.ndarray:
    """uint8 [4, 3, 5, 16, 16]."""
    shape = (CLIPS, 3, ACTION_FRAMES, ACTION_SIZE, ACTION_SIZE)
    return np.floor((uniform(f"action clips {step}", shape) + 1) * 128).astype(np.uint8)


def action_states(step: int) -> np.ndarray:
    """float64 [4, 5, 7], that turn by large angles."""
    return np.stack([poses(f"action states {step} {clip}", ACTION_FRAMES) for clip in range(CLIPS)])


def action_cameras(step: int) -> np.ndarray:
    """float64 [4, 5, 6], another one in each frame."""
    return np.stack([poses(f"action cameras {step} {clip}", ACTION_FRAMES)[:, :CAMERA] for clip in range(CLIPS)])


def action_inputs(name: str) -> list[np.ndarray]:
    """Tokens, actions, states, extrinsics of one of the cases."""
    case = ACTION_CASES[name]
    tokens = (2, case.steps * case.grid[0] * case.grid[1], WIDTH)
    shapes = [tokens, *((2, case.steps, channels) for channels in (STATE, STATE, CAMERA))]
    return [values(f"{name} {i}", shape) for i, shape in enumerate(shapes)]


def probe_tokens() -> np.ndarray:
    """Small ones, of variance 1e-4, so that LayerNorm's eps of 1e-5 shows."""
    return np.float32(0.01) * values("probe tokens", (3, 11, PROBE_WIDTH))


def poses(name: str, steps: int) -> np.ndarray:
    """States of a robot, float64 [steps, 7], that turn by large angles: pitch within ±1.5, the others within ±π."""
    scale = np.array([0.5, 0.5, 0.5, np.pi, 1.5, np.pi, 0.5])
    return uniform(name, (steps, STATE)) * scale + np.array([0, 0, 0, 0, 0, 0, 0.5])


def plan_start(name: str) -> np.ndarray:
    """The pose [7] from which a case of planning starts."""
    return poses(f"{name} start", 1)[0].astype(np.float32)


def plan_noise(name: str, iteration: int, step: int) -> np.ndarray:
    """What a case of planning has for normal draws: float32 [samples, 4], of position and gripper."""
    return values(f"{name} noise {iteration} {step}", (PLAN_CASES[name].samples, 4))


def plan_world(frame: np.ndarray, action: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """The next frame [n, 3, 4] of frame [n, 3, 4], action [n, 7] and pose [n, 7]; float64, smooth, with one goal."""
    moved = action @ uniform("world action", (STATE, 12)) * np.array(10.0)
    placed = np.tanh(pose @ uniform("world pose", (STATE, 12)))
    return frame + (moved * (1.0 + 0.2 * placed)).reshape(-1, *PLAN_FRAME)


def plan_goal(name: str) -> np.ndarray:
    """The frame [3, 4] that is to be reached."""
    return uniform(f"{name} goal", PLAN_FRAME) * 0.6
