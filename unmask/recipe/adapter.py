"""The recipe's `lora`: a small addition to frozen weights in place of training them all."""

from __future__ import annotations

from pydantic import model_validator

from unmask.recipe.section import Decay, Positive, PositiveFloat, Section, Texts


class LoraRecipe(Section):
    """Low-rank adapters by peft: the weights stay as they are, and what is learnt is saved beside them."""

    r: Positive | None = None
    """rank of the adapters; null = none, all weights are trained"""
    alpha: PositiveFloat | None = None
    """what an adapter adds is multiplied by alpha / r; null = 2 r"""
    dropout: Decay = 0.0
    """share of an adapter's inputs that are left out at random in training"""
    target_modules: Texts | None = None
    """names of the linear layers that get an adapter, such as [q_proj, v_proj]; null = all of them but the
    output head"""
    use_dora: bool = False
    """DoRA: the length of each row of a weight is learnt by itself, and the adapter its direction alone"""

    @model_validator(mode="after")
    def _check(self) -> LoraRecipe:
        if self.r is None and self.changed():
            raise ValueError(f"lora.{self.changed()[0]} has no effect without lora.r; set lora.r, such as 16")
        return self
