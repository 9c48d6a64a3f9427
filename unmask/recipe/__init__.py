"""The typed recipe: a YAML file and `key=value` overrides, checked before anything heavy starts.

Every key has its unit and meaning beside it; `docs/recipes.md` is generated from them. An unknown
key fails with the nearest known one, and a setting that would have no effect is refused. Paths are
relative to the current working directory.
"""

from unmask.recipe.data import DataRecipe as DataRecipe
from unmask.recipe.read import RecipeField as RecipeField
from unmask.recipe.read import load_recipe as load_recipe
from unmask.recipe.read import recipe_fields as recipe_fields
from unmask.recipe.read import recipe_from_dict as recipe_from_dict
from unmask.recipe.run import Recipe as Recipe
