"""The recipe's `distributed`: how the devices of a run share the model."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from unmask.recipe.section import Section


class DistributedRecipe(Section):
    """How several processes, one a device, share the model; without effect on a single one."""

    type: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """ddp = every device holds the whole model; fsdp = weights, gradients and optimizer are divided over the
    devices (PyTorch's FSDP2); deepspeed = as `distributed.deepspeed_config` says"""
    deepspeed_config: str | None = None
    """DeepSpeed's JSON file, such as recipes/deepspeed_zero3.json; `distributed.type: deepspeed` only"""

    @model_validator(mode="after")
    def _check(self) -> DistributedRecipe:
        if self.type == "deepspeed" and self.deepspeed_config is None:
            raise ValueError(
                "distributed.deepspeed_config: missing; distributed.type: deepspeed needs a JSON file such as"
                " recipes/deepspeed_zero3.json"
            )
        if self.type != "deepspeed" and self.deepspeed_config is not None:
            raise ValueError(
                f"distributed.deepspeed_config has no effect with distributed.type: {self.type}; remove it or"
                " set distributed.type: deepspeed"
            )
        return self
