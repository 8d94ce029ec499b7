"""What a recipe may name by ``kind``: one line for each says where its code is.

A kind is a class, by the name of its module and its own. Modules are imported when a recipe names the kind, so that
launchers, which work without PyTorch, pay for nothing else.

To add a kind of training, write in one file of objective/ (or in two, as here, one of them without PyTorch), in order:

    1. its section: a subclass of recipe/stage_sections.py's StageConfig, with the keys of its own
    2. its Stage: ``section``, ``networks``, ``has_target_encoder``, ``evaluates``; ``check``, what keys say together;
       ``records``, those that it draws; ``squashed_aspect``, how clips are cropped; ``complete``, what a micro-batch
       has beside them, and ``beside_clips``, how large that is; ``clip_flops``; ``objective``
    3. its Objective: see objective/objective.py
    4. a line in STAGES

A recipe then has it as ``NAME: {kind: …}``. tests/training/test_new_objective.py does all of this.
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
# Of the stages that need not say theirs.
DEFAULT_KINDS = {"pretrain": "jepa", "cooldown": "jepa", "action": "action", "probe": "probe"}
# Masks: ``masks.generators.N.kind`` → its class, a vjepa_scale.masking.generator.MaskGenerator.
MASK_GENERATORS = {
    "blocks": "vjepa_scale.masking.blocks:BlockMasks",
    "future": "vjepa_scale.masking.frames:FutureMasks",
    "frame_dropout": "vjepa_scale.masking.frames:FrameDropoutMasks",
    "multi_rate": "vjepa_scale.masking.frames:MultiRateMasks",
}


def kind_of(stage: str, named: str | None) -> str:
    """The kind of a stage of this name whose section names this ``kind``, or none. Empty where nothing says it."""
    return named or DEFAULT_KINDS.get(stage, "")


def class_of(kinds: Mapping[str, str], kind: str) -> Any:
    """The class that a kind's line names, ``module:class``. Raises KeyError for a kind without a line."""
    module, _, name = kinds[kind].partition(":")
    return getattr(importlib.import_module(module), name)
