"""What `import unmask` brings along, and what the Auto classes make of a checkpoint with and without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, STOCK, autoregressive_folder, random_ids, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import unmask
from unmask import _register
from unmask.data.tokenizer import byte_tokenizer
from unmask.model.families import MODEL_CLASSES


def python(code: str, *arguments: str) -> str:
    """Run code in a new interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A diffusion checkpoint of each family, and an autoregressive Qwen3."""
    top = tmp_path_factory.mktemp("folders")
    for family in FAMILIES:
        tiny_model(family, dtype=torch.float32).save_pretrained(top / family)
        byte_tokenizer().save_pretrained(top / family)
    autoregressive_folder(top / "stock")
    return [str(top / name) for name in (*FAMILIES, "stock")]


def test_import_brings_nothing_heavy() -> None:
    # What takes seconds is importing these; without them the import is a matter of milliseconds.
    code = """
import sys
import unmask
unmask.__version__, unmask.UnmaskError, dir(unmask)
heavy = "torch transformers datasets numpy safetensors tokenizers huggingface_hub jaxtyping pydantic typer"
print([name for name in heavy.split() if name in sys.modules])
"""
    assert python(code) == "[]\n"


def test_every_public_name_is_there() -> None:
    for name in unmask.__all__:
        assert getattr(unmask, name) is not None
    assert dir(unmask) == sorted(unmask.__all__)
    with pytest.raises(AttributeError, match="module 'unmask' has no attribute 'nothing'"):
        unmask.nothing  # noqa: B018


LOAD_ALL = """
assert AutoTokenizer.from_pretrained(sys.argv[1]).mask_token_id == 259
for folder, family in zip(sys.argv[1:4], ("Qwen3", "Qwen2", "Llama")):
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__module__ == "unmask.model.families", type(model)
    assert type(model).__name__ == family + "ForCausalLM"
    assert type(config).__name__ == family + "DiffusionConfig", type(config)
    assert config.is_causal is False and config.mask_token_id == 31
    assert model.generation_config.mask_token_id == 31
    assert model(torch.zeros(1, 3, dtype=torch.int64)).loss is None
    assert type(AutoModelForCausalLM.from_config(config)) is type(model)
# A plain checkpoint stays what it is.
stock = AutoModelForCausalLM.from_pretrained(sys.argv[4])
assert type(stock) is transformers.Qwen3ForCausalLM, type(stock)
print("loaded")
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import unmask, transformers",
        "import transformers.models.auto.modeling_auto, unmask",
    ],
)
def test_with_unmask_imported_the_auto_classes_load_them(imports: str, folders: list[str]) -> None:
    names = "AutoConfig, AutoModelForCausalLM, AutoTokenizer"
    code = f"import sys, torch\n{imports}\nfrom transformers import {names}\n{LOAD_ALL}"
    assert python(code, *folders) == "loaded\n"


def test_without_unmask_stock_transformers_refuses_them(folders: list[str]) -> None:
    code = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
for folder in sys.argv[1:4]:
    for auto in (AutoConfig, AutoModelForCausalLM):
        try:
            auto.from_pretrained(folder)
        except ValueError as error:
            print(str(error).splitlines()[0])
assert "unmask" not in sys.modules
"""
    lines = python(code, *folders).splitlines()
    assert len(lines) == 6
    for line, family in zip(lines, [family for family in FAMILIES for _ in range(2)], strict=True):
        assert f"has model type `unmask_{family}` but Transformers does not recognize this" in line


# In this process


@pytest.mark.parametrize("family", FAMILIES)
def test_the_auto_classes_know_the_real_classes(family: str) -> None:
    model_class = MODEL_CLASSES[f"unmask_{family}"]
    config = AutoConfig.for_model(f"unmask_{family}", vocab_size=40)
    assert type(config) is model_class.config_class
    assert type(AutoModelForCausalLM.from_config(tiny_config(family))) is model_class
    # The stock entries are untouched.
    assert AutoConfig.for_model(family).__class__ is STOCK[family][0]
    assert type(AutoModelForCausalLM.from_config(STOCK[family][0](vocab_size=40, hidden_size=8,
        intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))) is STOCK[family][1]  # fmt: skip


def test_the_stand_ins_cover_every_family() -> None:
    assert set(_register.MODEL_TYPES) == set(MODEL_CLASSES)


def test_a_stand_in_gives_the_real_thing(folders: list[str]) -> None:
    for model_type, folder in zip(_register.MODEL_TYPES, folders[:3], strict=True):
        stand_in: Any = _register._stand_in(model_type)
        real = MODEL_CLASSES[model_type].config_class
        assert stand_in.model_type == model_type
        assert type(stand_in(vocab_size=40)) is real
        made = stand_in.from_dict({"vocab_size": 40})
        assert (type(made), made.vocab_size) == (real, 40)
        assert type(stand_in.from_pretrained(folder)) is real


def test_autoregressive_and_diffusion_side_by_side(folders: list[str], tmp_path: Path) -> None:
    # Converting in memory leaves stock loading of the same folder as it was.
    diffusion = unmask.Qwen3ForCausalLM.from_pretrained(folders[3])
    stock = AutoModelForCausalLM.from_pretrained(folders[3])
    ids = random_ids(1, 5)
    assert stock.config.model_type == "qwen3"
    assert getattr(stock.config, "is_causal", True) is True
    causal = stock(input_ids=ids).logits
    other = ids.clone()
    other[0, -1] += 1
    assert torch.equal(stock(input_ids=other).logits[0, :-1], causal[0, :-1])
    assert not torch.equal(diffusion(other).logits[0, 1:-1], diffusion(ids).logits[0, 1:-1])
