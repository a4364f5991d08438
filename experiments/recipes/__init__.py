"""How the small parts of learned methods are trained: one recipe a file."""

from experiments.recipes.attention_gate import train_attention_gate
from experiments.recipes.cskv import train_cskv
from experiments.recipes.duoattention import train_duoattention
from experiments.recipes.lococo import train_lococo
from experiments.recipes.locret import train_locret
from experiments.recipes.matryoshka import train_matryoshka
from experiments.recipes.prefix import train_prefix
from experiments.recipes.recipe import Frozen, Recipe
