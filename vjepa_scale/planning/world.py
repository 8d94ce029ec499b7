"""A world model: predicts futures from a robot's pictures and poses, their energies, and plans.

Further letters in tensor names: K pictures with their poses, H future steps, N = h·w tokens of a picture. States are
[position (m), extrinsic-xyz Euler angles (rad), gripper 0 … 1], actions lead from one to the next: data/poses.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vjepa_scale.checkpoint.formats import open_weights
from vjepa_scale.checkpoint.formats.source import ConsolidatedConfig
from vjepa_scale.checkpoint.load import network_of
from vjepa_scale.core.errors import UserError
from vjepa_scale.data.augment import squashed_crop
from vjepa_scale.data.poses import states_along
from vjepa_scale.inference.clips import pictures_of
from vjepa_scale.inference.model import usable_device
from vjepa_scale.model import Encoder
from vjepa_scale.model.encoder import PixelNormaliser
from vjepa_scale.model.predictor import CAMERA, POSE, ActionPredictor, build_action_predictor
from vjepa_scale.objective.action import frame_tokens
from vjepa_scale.objective.objective import normalised
from vjepa_scale.planning.cem import Imagine, Imagined, Plan, PlanConfig, cross_entropy_plan
from vjepa_scale.planning.landscape import AXES, Landscape, energy_landscape
from vjepa_scale.recipe.schema import ModelConfig

# Width over height of the crop in the published training (docs/action.md).
PUBLISHED_CROP_ASPECT = (0.75, 1.35)
# Pictures per forward pass of the encoder.
_AT_ONCE = 16
# Tokens per forward pass of the predictor: its hidden activations take a gigabyte at the published sizes.
_TOKENS_AT_ONCE = 2**16


def load_world_model(
    path: str | Path, device: str | torch.device | None = "cpu", *, model: str | ModelConfig | None = None
) -> "WorldModel":
    """Loads the encoder and the action-conditioned predictor of a checkpoint, float32, in eval mode.

    path:  a run with an action stage, that stage or one of its checkpoints; a result of tools/consolidate.py; a
           published action-conditioned ``.pt``
    model: for a published file of others: ``vit_giant``, or ``heads=22,predictor_heads=16``, or a ModelConfig

    device: None: a GPU where there is one

    Raises UserError where the path is something else or has no action-conditioned predictor, and where there is no
    such device.
    """
    return WorldModel(Path(path), usable_device(device), model)


class WorldModel:
    """Predicts how a picture changes when the robot moves, in the encoder's features.

    config:      of the checkpoint
    size:        (height, width) in pixels that pictures are resized to
    grid:        (h, w) of a picture in tokens
    crop_aspect: range of width over height; a picture outside it is cropped to the largest centred part inside it

    Methods run without gradients, on the model's device. Raises UserError for input that does not fit.
    """

    def __init__(self, path: Path, device: torch.device, model: str | ModelConfig | None) -> None:
        source = open_weights(path, model=model, networks=("encoder", "action_predictor"))
        self.device = device
        self.config: ConsolidatedConfig = source.config
        self.encoder: Encoder = network_of(source, "encoder", Encoder, device).requires_grad_(False)
        predictor = network_of(source, "action_predictor", build_action_predictor, device)
        self.predictor: ActionPredictor = predictor.requires_grad_(False)
        self.size = self.config.size
        patch = self.config.model.patch
        self.grid = (self.size[0] // patch, self.size[1] // patch)
        stage = (self.config.recipe or {}).get(str(self.config.stage)) or {}
        low, high = stage.get("crop_aspect", PUBLISHED_CROP_ASPECT)
        self.crop_aspect: tuple[float, float] = (low, high)
        self._pixels = PixelNormaliser(self.config.mean, self.config.std, device)

    # -- pictures ----------------------------------------------------------------------------------

    def preprocess(self, pictures: Any) -> Tensor:
        """Preprocesses pictures as in training: normalised, float32 [B, 3, height, width].

        pictures: uint8 RGB [B, H, W, 3], or one [H, W, 3], of any size; or an image file
        """
        pictures_BHWC = pictures_of(pictures)
        crops_3BHW = squashed_crop(list(pictures_BHWC), self.size, aspect=self.crop_aspect)
        return self._pixels(crops_3BHW.transpose(0, 1))

    @torch.no_grad()
    def encode(self, pictures: Any) -> Tensor:
        """Returns tokens of single pictures, [B, N, D]: repeats each to one tubelet, encodes it, layer-norms over D.

        pictures: as for ``preprocess``
        """
        tokens = []
        for part_BCHW in self.preprocess(pictures).split(_AT_ONCE):
            tokens.append(frame_tokens(self.encoder, part_BCHW, self.config.model.tubelet))
        return torch.cat(tokens)

    # -- futures -----------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, tokens: Any, actions: Any, states: Any, extrinsics: Any = None) -> Tensor:
        """Predicts the tokens of the picture after the last of K, [B, N, D], layer-normalised as those of ``encode``.

        tokens:     of K pictures in order, [B, K, N, D] or [B, K·N, D]
        actions:    [B, K, 7]: from each picture to the next; the last one leads to the predicted picture
        states:     [B, K, 7]: the poses at the K pictures
        extrinsics: [B, K, 6]: the camera's poses; required exactly where this model was trained with them
        """
        tokens = torch.as_tensor(tokens, dtype=torch.float32, device=self.device)
        steps = np.shape(actions)[1] if np.ndim(actions) == 3 else 0
        tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
        shape = (len(tokens), steps * self._per_frame, self.encoder.width)
        if steps == 0 or tuple(tokens.shape) != shape:
            raise UserError(
                f"tokens of shape {list(tokens.shape)} and actions of shape {list(np.shape(actions))}",
                where="predict",
                fix=f"[B, K, {self._per_frame}, {self.encoder.width}] and [B, K, 7] with one action per picture",
            )
        poses = {"actions": (actions, POSE), "states": (states, POSE), "extrinsics": (extrinsics, CAMERA)}
        given = {
            name: self._numbers(f"predict {name}", value, (len(tokens), steps, channels))
            for name, (value, channels) in poses.items()
            if value is not None
        }
        self._check_extrinsics("predict", extrinsics)
        return self._next(tokens, given["actions"], given["states"], given.get("extrinsics"))

    @torch.no_grad()
    def rollout(self, tokens: Any, state: Any, actions: Any, extrinsics: Any = None) -> tuple[Tensor, Tensor]:
        """Predicts what the robot will see while it executes actions: (tokens [B, H, N, D], states [B, H+1, 7]).

        tokens:     of the current picture, [B, N, D]
        state:      the current pose, [B, 7]; the first of the returned states
        actions:    [B, H, 7]
        extrinsics: the pose of the fixed camera, [B, 6]; required exactly where this model was trained with them

        Every step is predicted from the current picture and the predictions before it, at poses computed from the
        actions. No future picture is used.
        """
        tokens = torch.as_tensor(tokens, dtype=torch.float32, device=self.device)
        self._check_frame("rollout tokens", tokens)
        batch, steps = len(tokens), np.shape(actions)[1] if np.ndim(actions) == 3 else 1
        actions = self._numbers("rollout actions", actions, (batch, steps, POSE))
        state = self._numbers("rollout state", state, (batch, POSE))
        self._check_extrinsics("rollout", extrinsics)
        if extrinsics is not None:
            extrinsics = self._numbers("rollout extrinsics", extrinsics, (batch, CAMERA))
        return self._rollout(tokens, state, actions, extrinsics)

    def _rollout(
        self, tokens_BND: Tensor, state_B7: Tensor, actions_BH7: Tensor, camera_B6: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        frames, states_BS7 = [tokens_BND], states_along(state_B7, actions_BH7)
        for step in range(1, actions_BH7.shape[1] + 1):
            camera_BK6 = None if camera_B6 is None else camera_B6[:, None].expand(-1, step, -1)
            frames.append(self._next(torch.cat(frames, dim=1), actions_BH7[:, :step], states_BS7[:, :step], camera_BK6))
        return torch.stack(frames[1:], dim=1), states_BS7

    def _next(self, tokens_BND: Tensor, actions_BK7: Tensor, states_BK7: Tensor, camera_BK6: Tensor | None) -> Tensor:
        predicted = self.predictor(tokens_BND, actions_BK7, states_BK7, camera_BK6, grid=self.grid)
        return normalised(predicted[:, -self._per_frame :])

    # -- goals and plans ---------------------------------------------------------------------------

    @torch.no_grad()
    def energy(self, tokens: Any, goal_tokens: Any) -> Tensor:
        """Returns the distance of pictures from their goals, [B]: the mean of |tokens − goal| over [N, D].

        tokens:      [B, N, D]
        goal_tokens: [B, N, D], or [1, N, D] for all of them
        """
        tokens, goal = (
            torch.as_tensor(value, dtype=torch.float32, device=self.device) for value in (tokens, goal_tokens)
        )
        self._check_frame("energy tokens", tokens)
        self._check_frame("energy goal_tokens", goal, batch=len(tokens))
        return _distance(tokens, goal)

    def plan(
        self,
        pictures: Any,
        states: Any,
        goals: Any,
        config: PlanConfig | None = None,
        *,
        seed: int | Sequence[int] = 0,
        extrinsics: Any = None,
    ) -> Plan:
        """Plans actions whose predicted last picture is nearest to the goals, by the cross-entropy method.

        pictures:   current ones of B episodes, as for ``encode``; or their tokens [B, N, D]
        states:     current poses, [B, 7]; for one episode also [7]
        goals:      as ``pictures``; B of them, or one for all
        config:     default: the published setting
        seed:       equal seeds give equal plans; one seed, or one per episode
        extrinsics: as for ``rollout``

        Plans all episodes at once; they are independent. Execute the first action, then take a new picture and plan
        again.
        """
        config = config or PlanConfig()
        state, imagine = self._episodes("plan", pictures, states, goals, extrinsics)
        if not isinstance(seed, int) and len(seed) != len(state):
            raise UserError(f"{len(seed)} seeds", where="plan seed", fix=f"one number, or {len(state)}")
        return cross_entropy_plan(imagine, state, config, seed=seed, rows=self._rows(config.horizon))

    def landscape(
        self,
        picture: Any,
        state: Any,
        goal: Any,
        *,
        axes: tuple[int, int] = (0, 1),
        limits: tuple[float, float] = (0.05, 0.05),
        points: int = 21,
        around: Any = None,
        extrinsics: Any = None,
    ) -> Landscape:
        """Returns energies of points × points first actions of one episode, over two of an action's seven numbers.

        picture, state, goal, extrinsics: as for ``plan``, of one episode
        axes:   two of 0 to 2 position (m), 3 to 5 angles (rad), 6 the gripper
        limits: largest absolute value on each axis
        around: actions [H, 7] of which the other numbers are kept; default: one step, and all others 0
        """
        start, imagine = self._episodes("landscape", picture, state, goal, extrinsics)
        if len(start) != 1 or len(set(axes)) != 2 or not set(axes) <= set(range(len(AXES))) or points < 2:
            raise UserError(
                f"{len(start)} episodes, axes {axes}, {points} points",
                where="landscape",
                fix="one episode, two different axes of 0 to 6, two points or more",
            )
        steps = len(around) if around is not None else 1
        around = None if around is None else self._numbers("landscape around", around, (steps, POSE))
        return energy_landscape(
            imagine, start[0], axes=axes, limits=limits, points=points, around_H7=around, rows=self._rows(steps)
        )

    def _episodes(self, where: str, pictures: Any, states: Any, goals: Any, extrinsics: Any) -> tuple[Tensor, Imagine]:
        """Returns the current states [B, 7], and the ``Imagine`` of all episodes."""
        tokens_BND, goals_BND = (
            self._tokens(f"{where} {name}", value) for name, value in (("pictures", pictures), ("goals", goals))
        )
        batch = len(tokens_BND)
        self._check_frame(f"{where} goals", goals_BND, batch)
        goals_BND = goals_BND.expand(batch, -1, -1)
        states_B7 = self._numbers(f"{where} states", states, (batch, POSE))
        self._check_extrinsics(where, extrinsics)
        if extrinsics is not None:
            extrinsics = self._numbers(f"{where} extrinsics", extrinsics, (batch, CAMERA))

        @torch.no_grad()
        def imagine(states_C7: Tensor, actions_CH7: Tensor, episodes_C: Tensor) -> Imagined:
            camera_C6 = None if extrinsics is None else extrinsics[episodes_C]
            tokens_CHND, reached = self._rollout(tokens_BND[episodes_C], states_C7, actions_CH7, camera_C6)
            return Imagined(_distance(tokens_CHND[:, -1], goals_BND[episodes_C]), tokens_CHND, reached)

        return states_B7, imagine

    def _tokens(self, where: str, value: Any) -> Tensor:
        """Encodes pictures; returns tokens unchanged."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return self.encode(value)
        value = value.to(self.device, torch.float32)
        self._check_frame(where, value)
        return value

    def _rows(self, steps: int) -> int:
        """Returns how many action sequences of ``steps`` steps are predicted together."""
        return max(1, _TOKENS_AT_ONCE // (steps * (self._per_frame + 2)))

    # -- input -------------------------------------------------------------------------------------

    @property
    def _per_frame(self) -> int:
        return self.grid[0] * self.grid[1]

    def _check_frame(self, where: str, tokens: Tensor, batch: int | None = None) -> None:
        """Raises UserError unless tokens are [B, N, D]; with ``batch``, B must be 1 or ``batch``."""
        fits = tuple(tokens.shape[1:]) == (self._per_frame, self.encoder.width)
        if not fits or not len(tokens) or (batch is not None and len(tokens) not in (1, batch)):
            raise UserError(
                f"tokens of shape {list(tokens.shape)}",
                where=where,
                fix=f"[{'B' if batch is None else batch}, {self._per_frame}, {self.encoder.width}], as encode gives",
            )

    def _check_extrinsics(self, where: str, extrinsics: Any) -> None:
        if (extrinsics is not None) != self.predictor.extrinsics:
            raise UserError(
                f"extrinsics {'given' if extrinsics is not None else 'missing'}",
                where=where,
                fix=f"this model was trained with{'' if self.predictor.extrinsics else 'out'} them",
            )

    def _numbers(self, where: str, value: Any, shape: tuple[int, ...]) -> Tensor:
        """Converts to float32 on the model's device. Raises UserError unless it has ``shape`` and is finite.

        For one episode the first axis may be missing.
        """
        try:
            found = torch.as_tensor(value, dtype=torch.float32, device=self.device)
        except (TypeError, ValueError):
            raise UserError(f"a {type(value).__name__} that is no array", where=where, fix=f"{list(shape)}") from None
        found = found[None] if shape[0] == 1 and found.ndim == len(shape) - 1 else found
        if tuple(found.shape) != shape or 0 in shape:
            raise UserError(f"shape {list(found.shape)}", where=where, fix=f"{list(shape)}")
        if not found.isfinite().all():
            raise UserError("not all of it are finite numbers", where=where, fix="metres, radians, gripper 0 … 1")
        return found


def _distance(tokens_BND: Tensor, goals_BND: Tensor) -> Tensor:
    """Returns the mean of the absolute differences, [B]."""
    return (tokens_BND - goals_BND).abs().mean(dim=(1, 2))
