"""The registry of kinds: for each ``kind`` that a recipe may name, a line with the module and class of its code.

A module is imported when a recipe names its kind, so launchers do not import PyTorch or code that they do not need.

To add a kind of training, write in one file of objective/ (or in two, as here, one of them without PyTorch), in order:

    1. its section: a subclass of StageConfig (recipe/stage_sections.py) with its own keys
    2. its Stage: ``section``, ``networks``, ``has_target_encoder``, ``evaluates``; ``check`` for checks across keys;
       ``records`` that it draws; ``squashed_aspect`` of its crops; ``complete`` for the inputs of a micro-batch besides
       clips, and ``beside_clips`` for their size; ``clip_flops``; ``objective``
    3. its Objective: see objective/objective.py
    4. a line in STAGES

A recipe then uses it by ``NAME: {kind: …}``. tests/training/test_new_objective.py does all of this.
"""

import importlib
from collections.abc import Mapping
from typing import Any

# Kinds of training: subclasses of recipe/stage.py's Stage, in modules without PyTorch.
STAGES = {
    "jepa": "vjepa_scale.objective.jepa_stage:JepaStage",
    "action": "vjepa_scale.objective.action_stage:ActionStage",
    "probe": "vjepa_scale.objective.probe_stage:ProbeStage",
}
# Kinds of the stages that need no ``kind`` key.
DEFAULT_KINDS = {"pretrain": "jepa", "cooldown": "jepa", "action": "action", "probe": "probe"}
# Masks: ``masks.generators.N.kind`` → its class, a vjepa_scale.masking.generator.MaskGenerator.
MASK_GENERATORS = {
    "blocks": "vjepa_scale.masking.blocks:BlockMasks",
    "future": "vjepa_scale.masking.frames:FutureMasks",
    "frame_dropout": "vjepa_scale.masking.frames:FrameDropoutMasks",
    "multi_rate": "vjepa_scale.masking.frames:MultiRateMasks",
}


def kind_of(stage: str, named: str | None) -> str:
    """Returns the kind of a stage from its name and the ``kind`` of its section, which may be None. Empty: unknown."""
    return named or DEFAULT_KINDS.get(stage, "")


def class_of(kinds: Mapping[str, str], kind: str) -> Any:
    """Imports and returns the class of a kind, ``module:class``. Raises KeyError for an unregistered kind."""
    module, _, name = kinds[kind].partition(":")
    return getattr(importlib.import_module(module), name)
