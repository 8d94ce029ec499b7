"""The typed recipe: schema, loading, overrides, errors that name the key; its stages, and their phases."""

from vjepa_scale.recipe.load import load_recipe, recipe_yaml
from vjepa_scale.recipe.phases import Phase
from vjepa_scale.recipe.schema import Recipe
from vjepa_scale.recipe.stage import Stage, stages_of

__all__ = ["Phase", "Recipe", "Stage", "load_recipe", "recipe_yaml", "stages_of"]
