"""The action-conditioned objective of V-JEPA 2-AC: predicts the features of the next frame (paper, section 3.1)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.data.order import Ints
from vjepa_scale.data.poses import actions_between
from vjepa_scale.data.trajectories import merged, trajectory_statistics
from vjepa_scale.distributed import process_group
from vjepa_scale.distributed.engine import Engine
from vjepa_scale.eval.observation import Observation
from vjepa_scale.model.predictor import build_action_predictor
from vjepa_scale.objective.action_stage import ActionStage
from vjepa_scale.objective.objective import Objective, lp_distance, normalised


class ActionConditioned(Objective):
    """A frozen encoder E and a predictor P of the next frame's tokens from all frames, states and actions so far.

    With z_k = LayerNorm(E(frame k, repeated to one tubelet)), s_k the state and a_k the action that follows it:

        teacher forcing   ẑ_k+1 = LayerNorm(P(z_0 … z_k, s_0 … s_k, a_0 … a_k))              for every k
        rollout           ẑ_1 = …(z_0), ẑ_2 = …(z_0, ẑ_1), … with true states and actions    of rollout_steps steps

    The loss is the sum of both parts' |ẑ − z| averaged over tokens and channels.
    """

    def __init__(
        self, stage: ActionStage, engine: Engine, manifests: Mapping[str, Manifest], records: Mapping[str, Ints]
    ) -> None:
        super().__init__(stage, engine)
        recipe, self._manifests, self._records = stage.recipe, manifests, records
        self._statistics: dict[str, Any] = {}
        with torch.device("meta"):
            predictor = build_action_predictor(recipe.model)
        self.encoder = self._frozen_encoder()
        self.predictor = engine.shard(predictor, name="action_predictor", seed=recipe.run.seed, trainable=True)
        engine.set_forward_order([self.encoder, self.predictor])
        self._rollout_steps, self._exponent = stage.config.rollout_steps, stage.config.loss_exponent
        self._patch, self._tubelet = recipe.model.patch, recipe.model.tubelet

    @property
    def trained(self) -> dict[str, nn.Module]:
        return {"action_predictor": self.predictor}

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, **self.trained}

    def before_training(self, resumed: Mapping[str, Any] | None) -> None:
        """Computes statistics of the states and actions of the records. Each rank reads its share of the logs once."""
        if resumed is not None:
            self._statistics = resumed["trajectories"]
            return
        ranks = self._engine.ranks
        mine = {
            name: trajectory_statistics(
                self._manifests[name], records[ranks.rank :: ranks.world_size], self._recipe.data.fps_of(name)
            )
            for name, records in self._records.items()
        }
        everyone = process_group.from_all(mine)
        self._statistics = {name: merged([part[name] for part in everyone]) for name in mine}

    def checkpoint_facts(self) -> dict[str, Any]:
        return {"trajectories": self._statistics}

    def loss(self, batch: MicroBatch, observe: Observation | None = None) -> dict[str, Tensor]:
        """Returns both parts of the loss, and ``copy_loss``: the teacher-forcing loss of predicting no change."""
        device = self._engine.device
        extras = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.extras.items()}
        states_BK7, extrinsics_BK6 = extras["states"], extras.get("extrinsics")
        actions_BL7 = actions_between(states_BK7)
        tokens_BKND = self._frame_tokens(batch.clips)
        grid = (batch.clips.shape[3] // self._patch, batch.clips.shape[4] // self._patch)

        def predicted(seen_BkND: Tensor) -> Tensor:
            """Returns the prediction of the frame after each given frame. Given frames may be predictions."""
            steps = seen_BkND.shape[1]
            cameras = None if extrinsics_BK6 is None else extrinsics_BK6[:, :steps]
            seen = seen_BkND.flatten(1, 2)
            out = self.predictor(seen, actions_BL7[:, :steps], states_BK7[:, :steps], cameras, grid=grid).float()
            return normalised(out).unflatten(1, (steps, -1))

        forced_BLND = predicted(tokens_BKND[:, :-1])
        imagined = [forced_BLND[:, 0]]  # predicted from the first frame only
        for _ in range(1, self._rollout_steps):
            imagined.append(predicted(torch.stack([tokens_BKND[:, 0], *imagined], dim=1))[:, -1])
        teacher = lp_distance(forced_BLND, tokens_BKND[:, 1:], self._exponent)
        rollout = lp_distance(torch.stack(imagined, dim=1), tokens_BKND[:, 1 : 1 + len(imagined)], self._exponent)
        if observe is not None:
            with torch.no_grad():
                distance = partial(lp_distance, exponent=self._exponent)
                observe.add_losses(
                    forced_BLND.flatten(1, 2), tokens_BKND[:, 1:].flatten(1, 2), batch.datasets, distance
                )
        return {
            "loss": teacher + rollout,
            "teacher_loss": teacher.detach(),
            "rollout_loss": rollout.detach(),
            "copy_loss": lp_distance(tokens_BKND[:, :-1], tokens_BKND[:, 1:], self._exponent),
        }

    def figures(self, reported: Mapping[str, float]) -> dict[str, float]:
        copied = reported["copy_loss"]
        return {"collapse/to_copy": reported["teacher_loss"] / copied} if copied else {}

    @torch.no_grad()
    def _frame_tokens(self, clips: Tensor) -> Tensor:
        """uint8 [B, 3, K, H, W] → normalised tokens of each frame, encoded separately, float32 [B, K, h·w, D]."""
        B, _, K = clips.shape[:3]
        frames = self._normalised(clips).transpose(1, 2).flatten(0, 1)
        return frame_tokens(self.encoder, frames, self._tubelet).unflatten(0, (B, K))


def frame_tokens(encoder: nn.Module, pictures_BCHW: Tensor, tubelet: int) -> Tensor:
    """Returns the predictor's input for single pictures, normalised [B, 3, H, W]: each is repeated to one tubelet,
    encoded and layer-normalised: float32 [B, h·w, D]."""
    tokens = encoder(pictures_BCHW[:, :, None].expand(-1, -1, tubelet, -1, -1)).float()
    return normalised(tokens)
