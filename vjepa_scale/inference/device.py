"""Where a trained model computes."""

import torch

from vjepa_scale.core.errors import UserError


def usable_device(asked: str | torch.device | None) -> torch.device:
    """The device asked for; None: a GPU where there is one. Raises UserError where it is not there."""
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise UserError(f"{str(asked)!r} is no device", where="device", fix="cpu, cuda, or cuda:1") from None
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise UserError(f"{device}: {found} GPUs found", where="device", fix="cpu, or a GPU that PyTorch sees")
    return device
