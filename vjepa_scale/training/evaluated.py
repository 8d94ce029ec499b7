"""A probe stage is done when its probes are evaluated, not when they are trained."""

from vjepa_scale.core.errors import UserError
from vjepa_scale.core.files import read_json
from vjepa_scale.recipe import Recipe
from vjepa_scale.recipe.folders import evaluation_file


def is_evaluated(recipe: Recipe, stage_name: str, *, step: int) -> bool:
    """Whether what follows the last step is there too; of stages that have nothing to follow: always.

    step: of the stage's last checkpoint; an evaluation of another one does not count
    """
    if stage_name != "probe":
        return True
    try:
        result = read_json(evaluation_file(recipe, stage_name))
    except UserError:  # absent or damaged: the probes are evaluated again
        return False
    return isinstance(result, dict) and result.get("step") == step
