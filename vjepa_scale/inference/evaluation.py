"""Evaluates a saved checkpoint of masked prediction on fixed held-out clips.

    clips ──► target encoder ─► pooled features ─► k-NN and linear probe (with labels)
      │              └────────► tokens ──────────► effective rank
      └─► context encoder, predictor, fixed masks ► held-out loss

Only reads the checkpoint, so it works for a run that trains, is over, or was copied.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vjepa_scale.checkpoint.formats.native import open_checkpoint
from vjepa_scale.checkpoint.load import network_of
from vjepa_scale.checkpoint.manifest import identity, read_manifest
from vjepa_scale.core.rng import key64
from vjepa_scale.data.batch import draw_masks
from vjepa_scale.data.evaluation import LabelledClips, evaluation_clips
from vjepa_scale.data.held_out import Chosen, choose_held_out
from vjepa_scale.eval import knn_linear
from vjepa_scale.eval.observation import Observation
from vjepa_scale.model import Encoder, Predictor
from vjepa_scale.model.encoder import PixelNormaliser, pooled
from vjepa_scale.objective.jepa import mask_tokens_of, tokens_of
from vjepa_scale.objective.objective import lp_distance, normalised
from vjepa_scale.recipe import Stage
from vjepa_scale.recipe.evaluate_section import EvaluateConfig, settings_of

_log = logging.getLogger(__name__)

# The masks of the held-out loss: the same for all checkpoints, and for runs with other seeds.
MASK_SEED = key64(0, "evaluate.masks")
# Decoded clips up to this size stay in memory for the next checkpoint; larger sets are decoded again.
KEPT_BYTES = 2**30

Floats = npt.NDArray[np.float32]


class CheckpointEvaluation:
    """Evaluates checkpoints of one stage with the same clips and settings.

    Raises UserError naming the key of a data set that cannot be used.
    """

    def __init__(self, stage: Stage, config: EvaluateConfig, device: torch.device) -> None:
        self._stage, self._config, self._device = stage, config, device
        self._settings = settings_of(stage, config)
        self._frames, self._size = self._settings["frames"], tuple(self._settings["size"])
        self._chosen = choose_held_out(stage, config)
        self._kept: dict[str, list[LabelledClips]] = {}
        augment = stage.recipe.data.augment
        self._pixels = PixelNormaliser(augment.mean, augment.std, device)

    def evaluate(self, checkpoint: Path) -> dict[str, Any]:
        """Returns the checkpoint's row (checkpoint/evaluations.py).

        Raises UserError for a damaged checkpoint, OSError for one that is removed meanwhile.
        """
        began = time.monotonic()
        manifest = read_manifest(checkpoint)
        networks = _Networks(self._stage, checkpoint, self._device)
        train, val = self._chosen.train, self._chosen.val
        features, labels, rank, loss = self._held_out(networks)
        knn = linear = None
        if train is not None:
            examples, classes = self._features(networks, train)
            knn = knn_linear.knn_accuracy(examples, classes, features, labels, k=self._config.neighbours)
            linear = knn_linear.linear_probe_accuracy(examples, classes, features, labels)
        return {
            "step": manifest["step"],
            "checkpoint": checkpoint.name,
            "identity": identity(manifest),
            "knn": knn,
            "linear": linear,
            "effective_rank": rank,
            "held_out_loss": loss,
            "settings": self._settings,
            "train_clips": None if train is None else len(train.records),
            "val_clips": len(val.records),
            "time": time.time(),
            "seconds": round(time.monotonic() - began, 2),
        }

    def _held_out(self, networks: "_Networks") -> tuple[Floats, npt.NDArray[np.int64], float, float]:
        """Returns features, labels, effective rank and loss of the held-out clips."""
        observe, losses = Observation(), list[Tensor]()
        rows, labels = list[Tensor](), list[Tensor]()
        done = 0
        for shown in self._clips("val", self._chosen.val):
            clips = self._normalised(shown.clips)
            tokens_BND = networks.target_tokens(clips)
            rows.append(pooled(tokens_BND, self._frames // self._stage.recipe.model.tubelet).cpu())
            labels.append(shown.labels)
            observe.add_target(tokens_BND, networks.grid(clips))
            losses.append(networks.loss(clips, tokens_BND, first=done).cpu() * len(clips))
            done += len(clips)
        loss = float(torch.stack(losses).sum() / done)
        figures = observe.measured(self._device)
        assert figures is not None, "this process is in no group"
        return torch.cat(rows).numpy(), torch.cat(labels).numpy(), figures.result()["effective_rank"], loss

    def _features(self, networks: "_Networks", chosen: Chosen) -> tuple[Floats, npt.NDArray[np.int64]]:
        rows, labels = list[Tensor](), list[Tensor]()
        for shown in self._clips("train", chosen):
            tokens_BND = networks.target_tokens(self._normalised(shown.clips))
            rows.append(pooled(tokens_BND, self._frames // self._stage.recipe.model.tubelet).cpu())
            labels.append(shown.labels)
        return torch.cat(rows).numpy(), torch.cat(labels).numpy()

    def _normalised(self, clips: Tensor) -> Tensor:
        return self._pixels(clips.to(self._device))

    def _clips(self, split: str, chosen: Chosen) -> Iterator[LabelledClips]:
        if split in self._kept:
            yield from self._kept[split]
            return
        height, width = self._size
        keeps = len(chosen.records) * 3 * self._frames * height * width <= KEPT_BYTES
        kept = list[LabelledClips]()
        for shown in evaluation_clips(
            chosen.manifest,
            frames=self._frames,
            size=(height, width),
            fps=self._settings["fps"],
            # Batches must not cross mask groups, whose clips share the lengths of masks.
            batch=_largest_divisor(self._stage.recipe.masks.group, self._config.batch),
            classes=self._chosen.classes,
            labelled=self._chosen.train is not None,
            records=chosen.records,
            workers=self._config.workers,
        ):
            if keeps:
                kept.append(shown)
            yield shown
        if keeps:
            self._kept[split] = kept


class _Networks:
    """The three networks of a checkpoint, in evaluation mode, on one device."""

    def __init__(self, stage: Stage, checkpoint: Path, device: torch.device) -> None:
        self._recipe, self._device = stage.recipe, device
        # Each tensor's checksum is verified as it is read; the optimiser's state is not read.
        trained = open_checkpoint(checkpoint, weights="target")
        self._target = network_of(trained, "encoder", Encoder, device)
        self._encoder = network_of(open_checkpoint(checkpoint, weights="context"), "encoder", Encoder, device)
        self._predictor = network_of(trained, "predictor", Predictor, device)
        self._mask_token_of = mask_tokens_of(stage.recipe)

    def _precision(self) -> AbstractContextManager[Any]:
        if self._device.type == "cuda" and self._recipe.engine.precision == "bfloat16":
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    def grid(self, clips_BCTHW: Tensor) -> tuple[int, int, int]:
        """Returns time, height and width of clips in tokens."""
        (T, H, W), model = clips_BCTHW.shape[2:], self._recipe.model
        return T // model.tubelet, H // model.patch, W // model.patch

    @torch.no_grad()
    def target_tokens(self, clips: Tensor) -> Tensor:
        """Returns the target encoder's tokens of normalised clips, float32 [B, N, D]."""
        with self._precision():
            return self._target(clips).float()

    @torch.no_grad()
    def loss(self, clips_BCTHW: Tensor, tokens_BND: Tensor, *, first: int) -> Tensor:
        """Returns the training loss of consecutive held-out clips, as objective/jepa.py defines it.

        tokens_BND: the target encoder's
        first:      number of the first of these clips; clip n has the masks of slot n mod G of step n div G, with G the
                    size of a mask group
        """
        recipe, grid = self._recipe, self.grid(clips_BCTHW)
        step, slot = divmod(first, recipe.masks.group)
        masks = draw_masks(
            recipe.masks, seed=MASK_SEED, step=step, slots=range(slot, slot + len(clips_BCTHW)), grid=grid
        )
        targets_BND = normalised(tokens_BND)
        losses = []
        for pair, mask_token in zip((pair.to(self._device) for pair in masks), self._mask_token_of, strict=True):
            with self._precision():
                seen_BKD = self._encoder(clips_BCTHW, pair.context)
                predicted_BMD = self._predictor(seen_BKD, pair.context, pair.target, grid, mask_token)
            wanted_BMD = tokens_of(targets_BND, pair.target)
            losses.append(lp_distance(predicted_BMD.float(), wanted_BMD, recipe.jepa.loss_exponent))
        return torch.stack(losses).mean()


def _largest_divisor(number: int, limit: int) -> int:
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)
