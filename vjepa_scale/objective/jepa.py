"""The V-JEPA 2 objective: predicts the features of masked tokens (method: paper section 2.1)."""

from functools import partial

import torch
from torch import Tensor, nn

from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.distributed.engine import Engine
from vjepa_scale.eval.observation import Observation
from vjepa_scale.model.encoder import Encoder
from vjepa_scale.model.predictor import Predictor
from vjepa_scale.objective.objective import Objective, lp_distance, normalised
from vjepa_scale.recipe import Recipe, Stage


def mask_tokens_of(recipe: Recipe) -> list[int]:
    """Returns the index of the mask token that each mask generator uses."""
    tokens = recipe.model.predictor.mask_tokens
    per_generator = recipe.jepa.mask_token == "per_generator"
    return [j % tokens if per_generator else 0 for j in range(len(recipe.masks.generators))]


class Jepa(Objective):
    """Encoder E, predictor P and target encoder Ē, an exponential moving average of E that is never trained.

    The loss of one clip and one (context, target) pair of token sets, with x the clip:

        | P(E(x, context), context, target) − LayerNorm(Ē(x))[target] |   averaged over tokens and channels
    """

    def __init__(self, stage: Stage, engine: Engine) -> None:
        super().__init__(stage, engine)
        recipe = stage.recipe
        with torch.device("meta"):
            encoder, predictor, target = Encoder(recipe.model), Predictor(recipe.model), Encoder(recipe.model)
        seed = recipe.run.seed
        self.encoder = engine.shard(encoder, name="encoder", seed=seed, trainable=True)
        self.predictor = engine.shard(predictor, name="predictor", seed=seed, trainable=True)
        # With the encoder's name it gets the same keyed values, so Ē starts as an exact copy of E.
        self.target_encoder = engine.shard(target, name="encoder", seed=seed, trainable=False)
        engine.match_ema(self.target_encoder, self.encoder)
        engine.set_forward_order([self.target_encoder, self.encoder, self.predictor])
        self.ema_momentum: float = recipe.jepa.ema_momentum
        self._exponent = recipe.jepa.loss_exponent
        self._mask_token_of = mask_tokens_of(recipe)
        self._unused_mask_tokens = set(range(recipe.model.predictor.mask_tokens)) - set(self._mask_token_of)
        self._patch, self._tubelet = recipe.model.patch, recipe.model.tubelet

    @property
    def trained(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "predictor": self.predictor}

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {**self.trained, "target_encoder": self.target_encoder}

    @property
    def unreached(self) -> frozenset[str]:
        """Mask tokens that no generator uses: published models have ten, and two generators."""
        return frozenset(f"predictor.mask_tokens.{token}" for token in self._unused_mask_tokens)

    def loss(self, batch: MicroBatch, observe: Observation | None = None) -> dict[str, Tensor]:
        """Returns the mean loss over the micro-batch's mask pairs, and ``mask_loss/N`` of generator N."""
        clips_BCTHW = self._normalised(batch.clips)
        T, H, W = clips_BCTHW.shape[2:]
        grid = (T // self._tubelet, H // self._patch, W // self._patch)

        with torch.no_grad():
            features_BND = self.target_encoder(clips_BCTHW).float()
            targets_BND = normalised(features_BND)
            if observe is not None:
                observe.add_target(features_BND, grid)

        losses = []
        for generator, masks in enumerate(pair.to(clips_BCTHW.device, non_blocking=True) for pair in batch.masks):
            context_BK, target_BM = masks.context, masks.target
            tokens_BKD = self.encoder(clips_BCTHW, context_BK)
            mask_token = self._mask_token_of[generator]
            predicted_BMD = self.predictor(tokens_BKD, context_BK, target_BM, grid, mask_token)
            wanted_BMD = tokens_of(targets_BND, target_BM)
            losses.append(lp_distance(predicted_BMD.float(), wanted_BMD, self._exponent))
            if observe is not None:
                with torch.no_grad():
                    if generator == 0:
                        observe.add_context(tokens_BKD.float(), tokens_of(features_BND, context_BK))
                    distance = partial(lp_distance, exponent=self._exponent)
                    observe.add_losses(predicted_BMD.float(), wanted_BMD, batch.datasets, distance)
        of_masks = {f"mask_loss/{generator}": loss.detach() for generator, loss in enumerate(losses)}
        return {"loss": torch.stack(losses).mean(), **of_masks}

    def observe_networks(self, observe: Observation) -> None:
        observe.add_distance(*self._engine.ema_distance(self.target_encoder, self.encoder))

    def after_step(self) -> None:
        """θ̄ ← m·θ̄ + (1−m)·θ over all parameters of the encoder."""
        self._engine.ema_update(self.target_encoder, self.encoder, self.ema_momentum)


def tokens_of(tokens_BND: Tensor, indices_BM: Tensor) -> Tensor:
    """Returns the tokens with these indices: [B, M, D]."""
    return tokens_BND.gather(1, indices_BM[..., None].expand(-1, -1, tokens_BND.shape[-1]))
