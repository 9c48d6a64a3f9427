"""Models in the format of other systems: what is written is what was there, and needs no unmask."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import BY_NAME, foreign_folder
from tiny import byte_model, byte_tokenizer, ragged, run_cli

from unmask.errors import UnmaskError
from unmask.formats import EXPORTS
from unmask.model.checkpoint import load_model, save_checkpoint
from unmask.model.export import export

pytestmark = pytest.mark.filterwarnings("ignore::unmask.errors.UnmaskNote")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", [name for name, one in BY_NAME.items() if one.name in EXPORTS])
def test_load_export_load_gives_equal_weights(name: str, tied: bool, tmp_path: Path) -> None:
    format = BY_NAME[name]
    folder = foreign_folder(tmp_path / "theirs", format, tied=tied)
    said = run_cli("export", folder, tmp_path / "again", "--as", format.name)
    assert said.code == 0, said.err
    first, again = load_model(str(folder)), load_model(str(tmp_path / "again"))
    for (key, one), (_, other) in zip(first.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), key
    assert first.config.to_diff_dict() == again.config.to_diff_dict()
    # What was in the config is there again, under the same names.
    told, written = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    other = {"tie_word_embeddings", "weight_tying", "auto_map"} | ({"vocab_size"} if format.keys else set())
    assert {k: v for k, v in told.items() if k not in other and written.get(k) != v} == {}


@pytest.mark.parametrize(
    ("fields", "name", "named"),
    [
        ({}, "dream", "qwen3 decoder"),
        ({}, "sdar", "block_causal"),
        ({"attention": "block_causal", "block_length": 4}, "sdar", "block_anchor=document"),
        ({"logit_shift": True}, "a2d", "shifted"),
        ({"attention": "block_causal", "block_length": 4}, "a2d", "4 tokens from the response"),
        (
            {"attention": "block_causal", "block_length": 32, "block_anchor": "prompt_end"},
            "a2d",
            "put bd3lm into it",
        ),
        ({"family": "mistral", "sliding_window": 3}, "hub", "sliding_window"),
        (
            {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True, "sliding_window": 3},
            "a2d",
            "sliding_window",
        ),
        ({"family": "llama", "head_dim": 6}, "llada", "dimensions"),
        ({"family": "llama", "hidden_act": "gelu"}, "llada", "silu"),
        ({}, "gguf", "unknown format"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    fields: dict[str, Any], name: str, named: str, tmp_path: Path
) -> None:
    save_checkpoint(byte_model(**fields), byte_tokenizer(), tmp_path / "model")
    with pytest.raises(UnmaskError, match=named):
        export(str(tmp_path / "model"), tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}

# `unmask` cannot be imported there.
PLAIN = """
import sys
sys.modules["unmask"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, file = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
ids, mask, source, prompt, prompt_mask, steps = torch.load(file)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
logits = model(ids, mask, src_mask=source).logits
written = model.generate(prompt, prompt_mask, max_new_tokens=10, steps=steps)
torch.save((logits, written), file)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("qwen3", {"logit_shift": True}),
        ("llama", {}),
        ("qwen3_moe", {"logit_shift": True, **MOE}),
        ("qwen2", {"attention": "block_causal", "block_length": 4, "logit_shift": True}),
        ("qwen3", {"attention": "block_causal", "block_length": 4, "block_anchor": "document"}),
        ("qwen3", {"attention": "block_causal", "block_length": 4, "block_anchor": "prompt_end"}),
    ],
)
def test_plain_transformers_computes_and_writes_the_same(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = byte_model(family, **fields).eval()
    save_checkpoint(model, byte_tokenizer(), tmp_path / "model")
    assert run_cli("export", tmp_path / "model", tmp_path / "hub").code == 0
    loaded: Any = load_model(str(tmp_path / "hub"), dtype=torch.float64)  # it is still one of ours
    ids, mask = ragged([11, 7, 13])
    source = torch.arange(ids.shape[1])[None].expand_as(ids) < 9
    prompt, prompt_mask = ragged([6, 3, 5])
    steps = 5 if loaded.config.attention == "bidirectional" else None
    torch.save((ids, mask, source, prompt, prompt_mask, steps), tmp_path / "file")
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "hub"), str(tmp_path / "file")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits, written = torch.load(tmp_path / "file")
    expected, _ = loaded.eval()(ids, attention_mask=mask, src_mask=source, training_mode="sft")
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
    ours = loaded.generate(prompt, prompt_mask, max_new_tokens=10, steps=steps).sequences
    assert torch.equal(written, ours)
