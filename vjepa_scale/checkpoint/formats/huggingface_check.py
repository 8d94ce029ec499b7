"""Runs a folder for Hugging Face beside our networks: where the numbers differ, the export is wrong.

The only file outside the tests that imports transformers.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import VJEPA2Model
from transformers.utils import logging

from vjepa_scale.checkpoint.formats.huggingface import mask_token
from vjepa_scale.checkpoint.formats.source import WeightSource
from vjepa_scale.core.errors import UserError
from vjepa_scale.model import Encoder, Predictor

# Largest difference over largest output, float32. Rounding gives about 1e-6; a wrong name, 1e-2 and more.
LIMIT = 1e-4
# Positions along time enter like those along height and width: two steps are enough, whatever the clip's length.
TIME_STEPS = 2


@torch.no_grad()
def check_against_transformers(folder: Path, source: WeightSource) -> str:
    """Features and predictions of a random clip through both, float32 on the CPU; a sentence with the differences.

    source: what ``folder`` was written from. Mask tokens are used as they are.
    Both models are in memory. Raises UserError where they differ by more than LIMIT, or transformers cannot load it.
    """
    config = source.config
    logging.disable_progress_bar()
    try:
        theirs, info = VJEPA2Model.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"transformers cannot load the result: {error}", where=source.where) from None
    if strangers := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise UserError(f"transformers finds {strangers[:3]} missing or unexpected in the result", where=source.where)
    theirs.eval()
    with torch.device("meta"):
        encoder, predictor = Encoder(config.model), Predictor(config.model)
    for prefix, network in (("encoder.", encoder), ("predictor.", predictor)):
        names = [name for name, _, _ in source.entries if name.startswith(prefix)]
        state = {name.removeprefix(prefix): source.read(name).float() for name in names}
        network.load_state_dict(state, assign=True)

    generator = torch.Generator().manual_seed(0)
    height, width = config.size
    clips = torch.randn(1, 3, TIME_STEPS * config.model.tubelet, height, width, generator=generator)
    grid = (TIME_STEPS, height // config.model.patch, width // config.model.patch)
    order = torch.randperm(grid[0] * grid[1] * grid[2], generator=generator)[None]
    context, target = order[:, : order.shape[1] // 3], order[:, order.shape[1] // 2 :]
    output = theirs(clips.transpose(1, 2), context_mask=[context], target_mask=[target])
    tokens = encoder(clips)
    kept = tokens.gather(1, context[..., None].expand(-1, -1, tokens.shape[-1]))
    predictions = predictor(kept, context, target, grid, mask_token=mask_token(config.model))
    differences = {
        "features": _difference(tokens, output.last_hidden_state),
        "predictions": _difference(predictions, output.predictor_output.last_hidden_state),
    }
    text = ", ".join(f"{name} differ by {value:.1e}" for name, value in differences.items())
    if not all(value <= LIMIT for value in differences.values()):  # also where it is not a number
        raise UserError(
            f"transformers computes something else: {text} of the largest output (at most {LIMIT:g})",
            where=source.where,
            fix="report this; --no-check writes it all the same",
        )
    return f"checked against transformers: {text} of the largest output, float32"


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())
