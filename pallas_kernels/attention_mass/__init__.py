"""How much attention every slot received."""

from pallas_kernels.attention_mass.api import Reduce, attention_mass

__all__ = ["Reduce", "attention_mass"]
