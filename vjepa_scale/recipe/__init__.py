"""The typed recipe: schema, loading, overrides, errors that name the key, phases of the global step."""

from vjepa_scale.recipe.load import load_recipe, recipe_yaml
from vjepa_scale.recipe.phases import Phase, resolve_phases
from vjepa_scale.recipe.schema import Recipe

__all__ = ["Phase", "Recipe", "load_recipe", "recipe_yaml", "resolve_phases"]
