"""Attentive probes: what can be read from a frozen encoder's tokens (V-JEPA 2 paper, section 5; docs/method.md 10)."""

from collections.abc import Mapping
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vjepa_scale.data.batch import MicroBatch
from vjepa_scale.data.kept import task_of
from vjepa_scale.data.manifest import Manifest
from vjepa_scale.model.init import probe_initial_value
from vjepa_scale.model.probe import probe_of
from vjepa_scale.objective.effective_rank import FeatureCovariance
from vjepa_scale.objective.objective import Objective, pooled
from vjepa_scale.parallel.engine import Engine
from vjepa_scale.parallel.optim import GroupSetting
from vjepa_scale.recipe import Recipe, resolve_phases


class Probes(Objective):
    """One frozen encoder, and a probe for each learning rate and weight decay: all see the same tokens.

    The loss is the sum of the probes' cross-entropies, so that each gets the gradient of its own alone. A probe whose
    rate is too high for it is lost by itself: what is not finite counts nothing for the others.
    """

    def __init__(self, recipe: Recipe, engine: Engine, *, classes: list[str]) -> None:
        super().__init__(recipe, engine)
        assert recipe.probe is not None, "the stage of this objective"
        config = recipe.probe
        self.encoder = self._frozen_encoder()
        self._settings = {
            f"probe_{number:02d}": GroupSetting(*pair)
            for number, pair in enumerate(product(config.lr_scales, config.weight_decays))
        }
        self.probes: dict[str, nn.Module] = {}
        for name in self._settings:
            with torch.device("meta"):
                probe = probe_of(recipe.model, config, classes=len(classes))
            start = partial(probe_initial_value, depth=config.depth, width=recipe.model.encoder.width)
            # One name for all: they start equal, and differ by their settings alone.
            self.probes[name] = engine.shard(
                probe, name="probe", seed=recipe.run.seed, trainable=True, initial_value=start
            )

    @property
    def trained(self) -> dict[str, nn.Module]:
        return self.probes

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, **self.probes}

    @property
    def settings(self) -> dict[str, GroupSetting]:
        return self._settings

    def loss(self, batch: MicroBatch, observe: FeatureCovariance | None = None) -> dict[str, Tensor]:
        """The sum over the probes; ``best_loss``, of the best of them; ``accuracy``, the mean over the probes.

        Without those whose loss is not finite, unless that is all of them.
        """
        assert batch.labels is not None, "labelled clips"
        labels_B = batch.labels.to(self._engine.device, non_blocking=True)
        logits = self.logits(batch.clips)
        losses = torch.stack([F.cross_entropy(one, labels_B) for one in logits.values()])
        right = torch.stack([(one.argmax(1) == labels_B).float().mean() for one in logits.values()])
        lost = ~losses.detach().isfinite()
        counted = losses.where(~lost | lost.all(), 0.0)  # the others' gradients are their own
        best = losses.detach().where(~lost, torch.inf).min()
        return {"loss": counted.sum(), "best_loss": best, "accuracy": right.where(~lost, 0.0).mean()}

    def logits(self, clips: Tensor) -> dict[str, Tensor]:
        """Of uint8 clips [B, 3, T, H, W]: float32 [B, classes] of each probe."""
        with torch.no_grad():
            tokens_BND = self.encoder(self._normalised(clips))
        return {name: probe(tokens_BND).float() for name, probe in self.probes.items()}

    def look(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Without gradients, of uint8 clips [B, 3, T, H, W]; all ranks together, as it gathers weights.

        Returns logits of the P probes, float32 [B, P, classes], and features: tokens averaged over space
        (frozen.encoder_features), float32 [B, T/tubelet · D].
        """

        def forward() -> tuple[Tensor, Tensor]:
            tokens_BND = self.encoder(self._normalised(clips))
            logits = [probe(tokens_BND).float() for probe in self.probes.values()]
            times = clips.shape[2] // self._recipe.model.tubelet
            return torch.stack(logits, 1), pooled(tokens_BND.float(), times)

        return self._engine.look(forward)


def task_classes(recipe: Recipe, manifests: Mapping[str, Manifest]) -> list[str]:
    """The classes of the probe stage."""
    return task_of(resolve_phases(recipe, "probe"), manifests).classes
