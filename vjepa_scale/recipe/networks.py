"""The networks of a model, and the check that a file's networks match the recipe's."""

from collections.abc import Iterable
from typing import Final, Literal, get_args

from vjepa_scale.core.errors import UserError
from vjepa_scale.recipe.schema import ModelConfig

Network = Literal["encoder", "predictor", "action_predictor"]
NETWORKS: Final[tuple[Network, ...]] = get_args(Network)


def refuse_other_model(
    found: ModelConfig,
    wanted: ModelConfig,
    *,
    where: object,
    by: str = "the recipe",
    networks: Iterable[str] = ("encoder", "predictor"),
) -> None:
    """Raises UserError that lists all differences between the model of a file and the wanted one.

    by: the source of ``wanted``, for the message
    """
    words = {
        "depth": "{} blocks in the file, {} in {by}",
        "width": "width {} in the file, {} in {by}",
        "heads": "{} heads in the file, {} in {by}",
        "mlp_hidden": "{} hidden channels in the file, {} in {by}",
        "mask_tokens": "{} mask tokens in the file, {} in {by}",
        "extrinsics": "extrinsics {} in the file, {} in {by}",
        "grid": "grid {} in the file, {} in {by}",
        "layout": "layout {} in the file, {} in {by}",
    }
    differences = [
        f"{network}: " + words[key].format(here, there, by=by)
        for network in networks
        for key in words
        if (here := getattr(getattr(found, network), key, None))
        != (there := getattr(getattr(wanted, network), key, None))
    ]
    differences += [
        f"{key} {here} in the file, {there} in {by}"
        for key in ("patch", "tubelet", "positions")
        if (here := getattr(found, key)) != (there := getattr(wanted, key))
    ]
    if found.positions == wanted.positions == "rope" and found.rope.layout != wanted.rope.layout:
        differences.append(f"rope.layout {found.rope.layout} in the file, {wanted.rope.layout} in {by}")
    key = "sincos" if found.positions == "sincos" else "rope.grid"
    here, there = ((m.sincos if m.positions == "sincos" else m.rope.grid) for m in (found, wanted))
    if found.positions == wanted.positions and here != there:
        differences.append(f"{key} {here} in the file, {there} in {by}")
    if differences:
        raise UserError(
            "; ".join(differences), where=where, fix="give the weights of such a model, or change the model"
        )
