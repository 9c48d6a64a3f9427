"""unmask: Qwen3 as a masked-diffusion language model, trained, sampled and evaluated.

The flow, in the order of the folders:

    records -> Example(input_ids, src_mask) -> Batch -> Noised(x_t, is_masked, t) -> hidden -> loss
            -> checkpoint -> generate -> evaluate

Names are imported when first used, so that `import unmask` is quick. The Auto classes of transformers know
diffusion checkpoints once `unmask.model` is imported, which using a model class or `load_model` does too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.config import Recipe as Recipe
    from unmask.config import load_recipe as load_recipe
    from unmask.data.collate import SFTDataCollator as SFTDataCollator
    from unmask.data.encode import Encoder as Encoder
    from unmask.data.encode import Example as Example
    from unmask.data.tokenizer import byte_tokenizer as byte_tokenizer
    from unmask.data.tokenizer import load_tokenizer as load_tokenizer
    from unmask.diffusion.corrupt import Noised as Noised
    from unmask.diffusion.corrupt import corrupt as corrupt
    from unmask.diffusion.corrupt import transition as transition
    from unmask.diffusion.likelihood import Likelihood as Likelihood
    from unmask.diffusion.likelihood import likelihood as likelihood
    from unmask.diffusion.objective import Curriculum as Curriculum
    from unmask.diffusion.objective import Objective as Objective
    from unmask.errors import UnmaskError as UnmaskError
    from unmask.generation.config import DiffusionGenerationConfig as DiffusionGenerationConfig
    from unmask.generation.text import Completion as Completion
    from unmask.generation.text import complete as complete
    from unmask.model.checkpoint import convert as convert
    from unmask.model.checkpoint import load_model as load_model
    from unmask.model.config import LlamaDiffusionConfig as LlamaDiffusionConfig
    from unmask.model.config import Qwen2DiffusionConfig as Qwen2DiffusionConfig
    from unmask.model.config import Qwen3DiffusionConfig as Qwen3DiffusionConfig
    from unmask.model.denoiser import LlamaForCausalLM as LlamaForCausalLM
    from unmask.model.denoiser import Qwen2ForCausalLM as Qwen2ForCausalLM
    from unmask.model.denoiser import Qwen3ForCausalLM as Qwen3ForCausalLM
    from unmask.training.train import train as train

__version__ = "0.1.0"

# Module -> its public names.
_NAMES = {
    "config": "Recipe load_recipe",
    "data.collate": "SFTDataCollator",
    "data.encode": "Encoder Example",
    "data.tokenizer": "byte_tokenizer load_tokenizer",
    "diffusion.corrupt": "Noised corrupt transition",
    "diffusion.likelihood": "Likelihood likelihood",
    "diffusion.objective": "Curriculum Objective",
    "errors": "UnmaskError",
    "generation.config": "DiffusionGenerationConfig",
    "generation.text": "Completion complete",
    "model.checkpoint": "convert load_model",
    "model.config": "LlamaDiffusionConfig Qwen2DiffusionConfig Qwen3DiffusionConfig",
    "model.denoiser": "LlamaForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM",
    "training.train": "train",
}
_MODULE_OF = {name: f"unmask.{module}" for module, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", *_MODULE_OF]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'unmask' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
