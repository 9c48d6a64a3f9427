"""`unmask doctor`: a checkpoint that is right has nothing off, and a wrong assumption shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import BY_NAME, foreign_folder
from tiny import byte_model, byte_tokenizer, run_cli

from unmask.evaluation.doctor import EVERY, TEXT
from unmask.model.checkpoint import load_model, save_checkpoint


def fitted_model(**fields: Any) -> Any:
    """A model whose head knows TEXT: row v is the mean output of the backbone where token v is masked."""
    model = byte_model(tie_word_embeddings=False, hidden_size=128, max_position_embeddings=512, **fields)
    ids = torch.tensor([*TEXT.encode()])[None].expand(EVERY, -1)
    is_masked = torch.arange(ids.shape[1]) % EVERY == torch.arange(EVERY)[:, None]
    with torch.no_grad():
        inputs = model.prepare(ids)
        hidden = model.eval().shifted_hidden(inputs, ids.masked_fill(is_masked, 259))[is_masked]
        targets = torch.nn.functional.one_hot(ids[is_masked], 260).float()
        model.lm_head.weight.copy_(torch.linalg.lstsq(hidden, 8 * targets).solution.T)
    return model


@pytest.mark.parametrize("shift", [False, True])
def test_nothing_is_off_until_the_shift_is_wrong(shift: bool, tmp_path: Path) -> None:
    model = fitted_model(logit_shift=shift)
    save_checkpoint(model, byte_tokenizer(), tmp_path / "model")
    right = run_cli("doctor", tmp_path / "model", "--json")
    findings = {one["name"]: one for one in json.loads(right.out)}
    assert right.code == 0 and not any(one["is_off"] for one in findings.values()), right.out
    assert "259 <|mask|>" in findings["mask token"]["value"]
    model.config.logit_shift = not shift
    save_checkpoint(model, byte_tokenizer(), tmp_path / "model")
    wrong = run_cli("doctor", tmp_path / "model")
    assert wrong.code == 1 and "is its config right?" in " ".join(wrong.out.split())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"vocab_size": 259, "mask_token_id": 200}, "tokenizer"),
        ({"mask_token_id": 12}, "tokenizer"),
        ({"eos_token_id": 7}, "chat template"),
    ],
)
def test_what_is_off_is_named(fields: dict[str, Any], named: str, tmp_path: Path) -> None:
    model = byte_model(max_position_embeddings=512, **fields)
    model.generation_config.eos_token_id = fields.get("eos_token_id", 258)
    save_checkpoint(model, byte_tokenizer(), tmp_path)
    said = run_cli("doctor", tmp_path, "--json")
    assert said.code == 1
    assert named in {one["name"] for one in json.loads(said.out) if one["is_off"]}


@pytest.mark.filterwarnings("ignore::unmask.errors.UnmaskNote")
def test_a_checkpoint_of_another_system(tmp_path: Path) -> None:
    folder = foreign_folder(tmp_path / "model", BY_NAME["fast-dllm-v2"])
    said = run_cli("doctor", folder, "--json")
    findings = {one["name"]: one["value"] for one in json.loads(said.out)}
    assert (
        "Fast-dLLM v2" in findings["opened as"]
        and "blocks of 4 tokens from the document" in findings["opened as"]
    )
    assert load_model(str(folder)).config.mask_token_id == 259
    shutil.rmtree(folder)
    assert run_cli("doctor", folder).code == 2
