"""A model without its weights: what a recipe would train, and what autograd would keep of it.

Shapes: B batch, L sequence.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from unmask.errors import UnmaskError
from unmask.model.attention import registered_name
from unmask.model.checkpoint import is_diffusion, read_config
from unmask.model.config import diffusion_values
from unmask.model.families import MODEL_CLASSES
from unmask.recipe import Recipe
from unmask.training.build import config_overrides, scratch_config
from unmask.training.dataset import run_tokenizer


def model_config(recipe: Recipe) -> Any:
    """Make the config of the model that a recipe trains; neither weights nor data are read.

    Raises:
        UnmaskError: no config can be read or made.
    """
    settings, overrides = recipe.model, config_overrides(recipe)
    if settings.config is not None:
        ids = settings.config.get("vocab_size") or max(run_tokenizer(recipe).get_vocab().values()) + 1
        return scratch_config(settings.config, ids, overrides)
    name = cast(str, settings.name_or_path)
    values = read_config(name, weights=False)
    if not is_diffusion(values):
        values = diffusion_values(values)
    try:
        return MODEL_CLASSES[values["model_type"]].config_class.from_dict({**values, **overrides})
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UnmaskError(f"{name}: no model can be made from its config.json: {error}.") from error


def outline(recipe: Recipe, config: Any) -> PreTrainedModel:
    """Build the model on the device "meta": shapes and which parameters learn, without memory."""
    return _build(recipe, config, getattr(torch, recipe.model.dtype))


def _build(recipe: Recipe, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return _what_learns(MODEL_CLASSES[config.model_type](config), recipe)
    finally:
        torch.set_default_dtype(before)


def _what_learns(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """Freeze what the recipe freezes, and add the adapters that it adds."""
    if recipe.model.freeze_embeddings:
        cast(Any, model).get_input_embeddings().requires_grad_(False)
    if recipe.lora.r is None:
        return model
    from unmask.model.adapter import add_adapter  # which imports peft: seconds

    lora = recipe.lora
    adapted = add_adapter(
        model,
        cast(str, recipe.model.name_or_path),
        r=cast(int, lora.r),
        alpha=1,
        target_modules=lora.target_modules,
        use_dora=lora.use_dora,
    )
    return cast(PreTrainedModel, adapted)


@dataclass(frozen=True)
class Saved:
    """Bytes that autograd keeps between the forward and the backward pass of a micro-batch."""

    layer: int
    """Of one decoder layer: all it saves."""
    layer_input: int
    """Of one decoder layer: its input, which is all that gradient checkpointing keeps."""
    rest: int
    """Of everything outside the layers but the output head."""


def saved_bytes(recipe: Recipe, config: Any, batch: int, length: int) -> Saved:
    """Count what a forward of the network saves, by running it on tensors without memory.

    The model's own code runs, with one decoder layer and with two, and what autograd asks to be kept is added
    up. Attention is that of a CPU, whose fused kernel keeps what those of other devices do.

    Args:
        recipe: settles what learns, the attention kernel and the types.
        config: of the whole model.
        batch, length: B and L of a micro-batch.
    """
    (one, width), (two, _) = (_run(recipe, config, layers, batch, length) for layers in (1, 2))
    return Saved(two - one, width, 2 * one - two)


def _run(recipe: Recipe, config: Any, layers: int, batch: int, length: int) -> tuple[int, int]:
    """Bytes saved by a network of a few layers, and those of a layer's input."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * layers)[:layers]
    model = cast(Any, _build(recipe, config, weight_dtype(recipe, computing=True)))
    network = (model.get_base_model() if recipe.lora.r else model).model
    network.set_attn_implementation(registered_name(recipe.model.attn_implementation))
    with FakeTensorMode(allow_non_fake_inputs=True):
        _pretend(model)
        own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        kept: dict[int, Tensor] = {}  # one of each storage: views of it cost nothing more

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage()._cdata not in own:
                kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        inputs: list[Tensor] = []
        network.layers[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=uses_autocast(recipe)):
            network(input_ids=torch.zeros(batch, length, dtype=torch.long), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), inputs[0].nbytes


def uses_autocast(recipe: Recipe) -> bool:
    """Whether bf16 is a matter of single operations, and not of the weights that an engine hands out."""
    assert recipe.precision != "auto", "see `with_precision`"
    return recipe.precision == "bf16" and recipe.distributed.type == "ddp"


def weight_dtype(recipe: Recipe, computing: bool) -> torch.dtype:
    """The type that weights are held in, or are handed to the network in for computing."""
    if recipe.precision == "bf16" and recipe.distributed.type != "ddp":
        return torch.bfloat16 if computing else torch.float32
    return getattr(torch, recipe.model.dtype)


def _pretend(model: nn.Module) -> None:
    """Move a model from "meta" to tensors that say they are on the CPU, in the FakeTensorMode around it."""
    seen: dict[int, Tensor] = {}  # what is tied stays so

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in seen:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            learns = tensor.requires_grad
            seen[id(tensor)] = (
                nn.Parameter(empty, requires_grad=learns) if isinstance(tensor, nn.Parameter) else empty
            )
        return seen[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    cast(Any, tensors)[name] = fake(tensor)
