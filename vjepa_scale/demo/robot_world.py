"""Renders a robot arm over a table: pictures are a function of the 7-number state.

An arm of two links on a turning base, elbow up, carries a hand with two fingers (inverse kinematics in closed form).
All parts are round-ended bars in perspective, with a shadow straight below. With a hand only, the picture would hardly
change near a goal; with a whole arm and its shadow, the change grows with the distance.

States are as in data/trajectories.py, metres and radians in the frame of the robot's base: x forward, y to the left, z
up from the table. At angles 0 the hand points down, and its fingers are apart along y.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from vjepa_scale.core.rng import KeyedRng
from vjepa_scale.data.trajectories import STATE, Floats
from vjepa_scale.demo.synthetic import F32, SPLITS, U8, Paint, World

Range = tuple[float, float]

_SHOULDER = np.array([0.0, 0.0, 0.30])
_LINK = 0.38  # of each of the two
_HAND, _FINGER = 0.15, 0.07  # from the wrist to the fingertips, and the fingers' part of it
_CLOSED, _OPENING = 0.015, 0.075  # distance of a finger from the hand's middle when closed, and what opening adds
_UP, _FLOOR = np.array([0.0, 0.0, 1.0]), np.array([1.0, 1.0, 0.0])
_TABLE = ((-0.30, 0.90), (-0.65, 0.65))  # x, y
_ARM, _RED = (0.85, 0.85, 0.85), (0.80, 0.35, 0.20)  # colours, before they are tinted
_SHADE = np.float32(0.45)


@dataclass(frozen=True)
class RobotWorld:
    """Parameters of the robot's data set. Metres, radians, seconds; lengths in pictures in frame sides.

    size: pixels; fps: of log and video, one picture per step; seconds: of a trajectory
    x, y, z, tilt, yaw: ranges of the fingertips, of roll and pitch, and of yaw; the gripper has 0 to 1
    speed, turn, grip: largest rates in exploration, per axis and second; hold: time between changes of rate
    step_m: largest motion of the hand in one step of the environment, per axis
    thickness: radius of the upper arm
    centre, distance, azimuth, elevation, focal: the camera's target and position; focal length in frame sides
    tint, texture: of the colours, and of table and wall, as in the shapes' world
    """

    size: int = 64
    fps: int = 15
    seconds: float = 5.0
    x: Range = (0.30, 0.65)
    y: Range = (-0.25, 0.25)
    z: Range = (0.05, 0.35)
    tilt: Range = (-0.15, 0.15)
    yaw: Range = (-0.5, 0.5)
    speed: float = 0.3
    turn: float = 0.5
    grip: float = 2.0
    hold: Range = (0.2, 0.6)
    step_m: float = 0.075
    thickness: float = 0.06
    centre: tuple[float, float, float] = (0.42, 0.0, 0.24)
    distance: float = 1.6
    azimuth: float = 0.7
    elevation: float = 0.7
    focal: float = 2.0
    tint: float = 0.2
    texture: float = 0.5

    @property
    def steps(self) -> int:
        return round(self.fps * self.seconds)

    @property
    def bounds(self) -> Floats:
        """Lowest and highest states, [2, 7]."""
        return np.array([self.x, self.y, self.z, self.tilt, self.tilt, self.yaw, (0.0, 1.0)]).T

    @property
    def rates(self) -> Floats:
        """Largest rates of the seven numbers in exploration, per second: [7]."""
        return np.array([self.speed] * 3 + [self.turn] * 3 + [self.grip])


@dataclass(frozen=True)
class Scene:
    """The constant parts of a trajectory's pictures.

    ground: table and wall without the arm, [size, size, 3] in [0, 1]; colours: of the arm, then of the hand, [2, 3]
    """

    world: RobotWorld
    ground: F32
    colours: F32

    @property
    def extrinsics(self) -> Floats:
        """The camera's position and Euler angles in the base frame, [6]; camera axes: x right, y down, z forward."""
        import torch

        from vjepa_scale.data.poses import angles_of

        place, axes = _camera(self.world)
        return np.concatenate([place, angles_of(torch.from_numpy(axes.T.copy())).numpy()])


def draw_scene(world: RobotWorld, seed: int, split: str, index: int) -> Scene:
    """Draws the scene of trajectory ``index`` of a split."""
    draws = KeyedRng(seed, "robot scene", SPLITS.index(split), index)
    paints = World(tint=world.tint, texture=world.texture)
    wall = Paint.draw(draws, paints, (0.0, 0.25), (0.4, 1.0))
    table = Paint.draw(draws, paints, (0.25, 0.65), (0.2, 0.6))
    colours = np.array([_ARM, _RED]) + world.tint * (draws.uniforms(6).reshape(2, 3) - 0.5)

    screen_y, screen_x = _screen(world.size)
    place, axes = _camera(world)
    rays = np.stack([screen_x - 0.5, screen_y - 0.5, np.full_like(screen_x, world.focal)], -1) @ axes
    far = -place[2] / np.minimum(
        rays[..., 2], -1e-6
    )  # intersection of each ray with the table's plane; no camera looks up
    x, y = (place[i] + far * rays[..., i] for i in (0, 1))
    inside = (x > _TABLE[0][0]) & (x < _TABLE[0][1]) & (y > _TABLE[1][0]) & (y < _TABLE[1][1])
    ground = np.where(inside[..., None], table.at(_f32(x), _f32(y)), wall.at(screen_x, screen_y))
    return Scene(world, _f32(ground), _f32(colours))


def render(scene: Scene, states: Floats) -> U8:
    """Renders pictures [..., size, size, 3] of states [..., 7]."""
    flat = states.reshape(-1, STATE)
    ends, radii, painted = _bars(scene.world, flat)
    fallen = ends * _FLOOR
    shadow = np.max([_cover(scene.world, fallen[:, i], radii[i]) for i in range(len(radii))], axis=0)
    pictures = scene.ground * (1 - _SHADE * shadow[..., None])
    for i, radius in enumerate(radii):
        cover = _cover(scene.world, ends[:, i], radius)
        pictures += cover[..., None] * (scene.colours[painted[i]] - pictures)
    frames = np.clip(pictures * 255 + np.float32(0.5), 0, 255).astype(np.uint8)
    return frames.reshape(*states.shape[:-1], *frames.shape[1:])


def arm_joints(states: Floats) -> tuple[Floats, Floats, Floats]:
    """Returns the positions of shoulder, elbow and wrist in states [K, 7]: each [K, 3]."""
    wrist = states[:, :3] + _HAND * _turns(states)[..., 2]
    shoulder = np.broadcast_to(_SHOULDER, wrist.shape)
    reach = wrist - shoulder
    length = np.linalg.norm(reach, axis=1, keepdims=True)
    ahead = reach / length
    over = _UP - ahead * ahead[:, 2:]  # perpendicular to the reach, upwards
    over /= np.linalg.norm(over, axis=1, keepdims=True)
    elbow = shoulder + reach / 2 + over * np.sqrt(np.maximum(_LINK**2 - (length / 2) ** 2, 0))
    return shoulder, elbow, wrist


def _turns(states: Floats) -> Floats:
    import torch  # slow to import, and not needed for the world's parameters

    from vjepa_scale.data.poses import matrices_of

    return cast(Floats, matrices_of(torch.from_numpy(states[:, 3:6].copy())).numpy())


def _bars(world: RobotWorld, states: Floats) -> tuple[Floats, Floats, list[int]]:
    """Returns both ends of the robot's bars, back to front: [K, bars, 2, 3]; their radii; their colour indices."""
    shoulder, elbow, wrist = arm_joints(states)
    turns, tip, thick = _turns(states), states[:, :3], world.thickness
    knuckle = tip + _FINGER * turns[..., 2]
    spread = turns[..., 1] * (_CLOSED + _OPENING * (1 - states[:, 6:]))  # offset of the fingers from the middle
    bars = [
        (shoulder * _FLOOR, shoulder, 1.3 * thick, 1),
        (shoulder, elbow, thick, 0),
        (elbow, wrist, 0.8 * thick, 0),
        (wrist, 0.7 * knuckle + 0.3 * wrist, 0.8 * thick, 1),
        (knuckle - spread, knuckle + spread, 0.4 * thick, 1),
        (knuckle - spread, tip - spread, 0.4 * thick, 1),
        (knuckle + spread, tip + spread, 0.4 * thick, 1),
    ]
    ends = np.stack([np.stack([start, end], 1) for start, end, _, _ in bars], 1)
    return ends, np.array([radius for _, _, radius, _ in bars]), [colour for _, _, _, colour in bars]


def _cover(world: RobotWorld, ends: Floats, radius: float) -> F32:
    """Returns the share of each pixel that a bar covers: [K, size, size], from its ends [K, 2, 3]."""
    place, axes = _camera(world)
    seen = (ends - place) @ axes.T
    scale = world.focal / seen[..., 2:]
    x, y = np.moveaxis(_f32(seen[..., :2] * scale + 0.5)[..., None, None], 2, 0)  # each [K, 2, 1, 1]
    thick = _f32(radius * scale)[..., None]  # [K, 2, 1, 1]
    screen_y, screen_x = _screen(world.size)
    along_x, along_y = x[:, 1] - x[:, 0], y[:, 1] - y[:, 0]
    from_x, from_y = screen_x - x[:, 0], screen_y - y[:, 0]
    part = np.clip(
        (from_x * along_x + from_y * along_y) / np.maximum(along_x**2 + along_y**2, np.float32(1e-8)),
        0,
        1,
    )
    distance = np.hypot(from_x - part * along_x, from_y - part * along_y)
    edge = distance - (thick[:, 0] + part * (thick[:, 1] - thick[:, 0]))
    return cast(F32, np.clip(np.float32(0.5) - edge * np.float32(world.size), 0, 1))  # an edge one pixel soft


def _camera(world: RobotWorld) -> tuple[Floats, Floats]:
    """Returns the camera's position, [3], and its axes right, down and forward as rows, [3, 3]."""
    level = np.array([np.cos(world.azimuth), np.sin(world.azimuth), 0.0])
    back = np.cos(world.elevation) * level + np.sin(world.elevation) * _UP
    right = np.array([-level[1], level[0], 0.0])
    down = -np.cross(back, right)
    return np.array(world.centre) + world.distance * back, np.stack([right, down, -back])


def _screen(size: int) -> tuple[F32, F32]:
    side = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    screen_y, screen_x = np.meshgrid(side, side, indexing="ij")
    return screen_y, screen_x


def _f32(array: npt.NDArray[np.floating]) -> F32:
    return array.astype(np.float32)
