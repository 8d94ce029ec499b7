"""Draws which tokens are context and which are targets (method: multi-block masking, V-JEPA 2 paper section 2.1).

Nothing here imports PyTorch: ``data/batch.py`` converts masks to index tensors.
"""

from vjepa_scale.masking.generator import check_masks, drawn_masks

__all__ = ["check_masks", "drawn_masks"]
