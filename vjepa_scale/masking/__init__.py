"""Which tokens are context and which are targets (method: multi-block masking, V-JEPA 2 paper section 2.1)."""

from typing import TYPE_CHECKING

from vjepa_scale.core import lazy_names
from vjepa_scale.masking.generator import check_masks, drawn_masks

if TYPE_CHECKING:
    from vjepa_scale.masking.pairs import MaskPair, draw_masks

__all__ = ["MaskPair", "check_masks", "draw_masks", "drawn_masks"]
__getattr__ = lazy_names(__name__, {"MaskPair": "vjepa_scale.masking.pairs", "draw_masks": "vjepa_scale.masking.pairs"})
