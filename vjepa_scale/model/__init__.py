"""The networks: plain modules, independent of processes, sharding and precision.

Parameter names are those of the published weights (``blocks.3.attn.qkv.weight``), so a checkpoint needs no table of
names. Letters in tensor names: B clips, T frames, H×W pixels, N tokens of a clip,
K tokens kept, M tokens predicted, D width, h heads, d channels of a head.
"""

from typing import TYPE_CHECKING

from vjepa_scale.core import lazy_names

if TYPE_CHECKING:
    from vjepa_scale.model.encoder import Encoder
    from vjepa_scale.model.init import initial_value, initialise
    from vjepa_scale.model.predictor import ActionPredictor, Predictor
    from vjepa_scale.model.probe import AttentiveProbe

__all__ = ["ActionPredictor", "AttentiveProbe", "Encoder", "Predictor", "initial_value", "initialise"]
__getattr__ = lazy_names(
    __name__,
    {
        "ActionPredictor": "vjepa_scale.model.predictor",
        "Encoder": "vjepa_scale.model.encoder",
        "initial_value": "vjepa_scale.model.init",
        "initialise": "vjepa_scale.model.init",
        "Predictor": "vjepa_scale.model.predictor",
        "AttentiveProbe": "vjepa_scale.model.probe",
    },
)
