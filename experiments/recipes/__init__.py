"""How the small parts of learned methods are trained: one recipe a file."""

from experiments.recipes.cskv import cskv
from experiments.recipes.duoattention import duoattention
from experiments.recipes.locret import locret
from experiments.recipes.matryoshka import matryoshka
from experiments.recipes.recipe import Frozen, Recipe
