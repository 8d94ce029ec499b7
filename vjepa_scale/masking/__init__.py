"""Which tokens are context and which are targets (method: multi-block masking, V-JEPA 2 paper section 2.1)."""

from vjepa_scale.masking.draw import MaskPair, check_masks, draw_masks

__all__ = ["MaskPair", "check_masks", "draw_masks"]
