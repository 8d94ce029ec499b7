"""Parameters and floating-point operations of the networks, by formula.

One multiply-add is two operations; only matrix products are counted (LayerNorm, GELU and softmax are under 1 %).
These are model FLOPs, as for model-FLOPs utilisation: recomputation by activation checkpointing is not counted.
"""

from collections.abc import Callable

from vjepa_scale.recipe.schema import CHANNELS, ActionPredictorConfig, EncoderConfig, ModelConfig, PredictorConfig


def encoder_parameters(model: ModelConfig) -> int:
    D = model.encoder.width
    return (_tubelet(model) + 1) * D + _block_parameters(model.encoder) + 2 * D


def predictor_parameters(model: ModelConfig) -> int:
    D, P = model.encoder.width, model.predictor.width
    return (D + 1) * P + model.predictor.mask_tokens * P + _block_parameters(model.predictor) + 2 * P + (P + 1) * D


def action_predictor_parameters(model: ModelConfig) -> int:
    network, D = model.action_predictor, model.encoder.width
    P = network.width
    conditions = 8 * P + 8 * P + 7 * P  # actions, states, extrinsics
    return (D + 1) * P + conditions + _block_parameters(network) + 2 * P + (P + 1) * D


# By the network's name.
PARAMETERS: dict[str, Callable[[ModelConfig], int]] = {
    "encoder": encoder_parameters,
    "predictor": predictor_parameters,
    "action_predictor": action_predictor_parameters,
}


def encoder_forward(model: ModelConfig, tokens: int) -> int:
    """Returns FLOPs for one clip with ``tokens`` computed tokens."""
    return patch_embedding(model, tokens) + _blocks(model.encoder, tokens)


def predictor_forward(model: ModelConfig, context: int, target: int) -> int:
    """Returns FLOPs for one clip: ``context`` tokens given, ``target`` tokens predicted."""
    ends = 2 * model.encoder.width * model.predictor.width * (context + target)
    return ends + _blocks(model.predictor, context + target)


def blocks_forward(model: ModelConfig, network: str, tokens: int) -> int:
    """Returns FLOPs of all blocks of a network, by its name, over ``tokens`` tokens."""
    return _blocks(getattr(model, network), tokens)


def block_parameters(model: ModelConfig, network: str) -> int:
    """Returns the parameters of one block of a network, by its name."""
    sizes = getattr(model, network)
    return _block_parameters(sizes) // sizes.depth


def patch_embedding(model: ModelConfig, tokens: int) -> int:
    return 2 * tokens * _tubelet(model) * model.encoder.width


def jepa_step(model: ModelConfig, tokens: int, pairs: list[tuple[int, int]]) -> int:
    """Returns FLOPs for one clip of a training step, forward and backward.

    tokens: of the whole clip, which the target encoder computes
    pairs:  (context, target) tokens of each mask generator

    A backward pass costs twice the forward: gradients of inputs and of weights. Pixels need no gradient.
    """
    trained = sum(
        3 * (encoder_forward(model, context) + predictor_forward(model, context, target))
        - patch_embedding(model, context)
        for context, target in pairs
    )
    return encoder_forward(model, tokens) + trained


def action_predictor_forward(model: ModelConfig, steps: int, tokens: int) -> int:
    """Returns FLOPs for one clip: ``steps`` time steps of ``tokens`` patch tokens each, with actions and states."""
    network, D = model.action_predictor, model.encoder.width
    conditions = 3 if network.extrinsics else 2
    embedded = 2 * steps * network.width * (2 * D * tokens + 7 * conditions)  # in and out; a condition has 6 or 7
    return embedded + _blocks(network, steps * (tokens + conditions))


def action_step(model: ModelConfig, frames: int, tokens: int, rollout_steps: int) -> int:
    """Returns FLOPs for one clip of a step of action-conditioned training, forward and backward.

    tokens: of one frame; the frozen encoder computes each frame separately
    Kernels do not skip masked pairs, so all pairs of tokens count.
    """
    passes = [frames - 1, *range(2, rollout_steps + 1)]
    trained = sum(3 * action_predictor_forward(model, steps, tokens) for steps in passes)
    return frames * encoder_forward(model, tokens) + trained


def probe_step(model: ModelConfig, tokens: int, *, probes: int, depth: int, classes: int, encoded: bool = True) -> int:
    """Returns FLOPs for one clip of a step that trains probes on a frozen encoder. encoded: the step encodes clips."""
    D = model.encoder.width
    blocks = _blocks(EncoderConfig(width=D, depth=depth, heads=1), tokens) * (depth - 1) // depth
    pooled = 2 * tokens * 2 * D * D + 2 * 2 * tokens * D + 2 * D * (D + 8 * D + classes)  # keys, values; the query's
    return encoded * encoder_forward(model, tokens) + 3 * probes * (blocks + pooled)


def _tubelet(model: ModelConfig) -> int:
    return CHANNELS * model.tubelet * model.patch**2


def _block_parameters(network: EncoderConfig | PredictorConfig | ActionPredictorConfig) -> int:
    D, hidden = network.width, network.mlp_hidden
    return network.depth * ((D + 1) * 3 * D + (D + 1) * D + (D + 1) * hidden + (hidden + 1) * D + 4 * D)


def _blocks(network: EncoderConfig | PredictorConfig | ActionPredictorConfig, tokens: int) -> int:
    D = network.width
    linear = 4 * D * D + 2 * D * network.mlp_hidden  # qkv and projection, MLP
    attention = 2 * tokens * D  # scores, and their product with the values
    return 2 * network.depth * tokens * (linear + attention)
