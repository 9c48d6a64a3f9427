"""The training loop: what a run leaves, and two routes that must agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    assert_same_run,
    autoregressive_folder,
    run_recipe,
    run_state,
    run_weights,
    train_run,
    two_sources,
)

from unmask import load_model, load_tokenizer
from unmask.errors import UnmaskError
from unmask.model.checkpoint import is_adapter
from unmask.training.optim import learning_rate


def losses(folder: Path) -> list[float]:
    return [log["loss"] for log in run_state(folder)["history"] if "loss" in log]


def test_what_a_run_leaves(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"instruction": "Count 3.", "output": "++++"}) + "\n")
    changes: dict[str, Any] = {"eval_steps": 3, "save_steps": 3, "report_to": ["tensorboard"]}
    evaluation = {"prompts": str(prompts), "max_new_tokens": 4, "show": 1}
    result, printed = train_run(tmp_path, evaluation=evaluation, **changes)
    out = tmp_path / "run"
    assert result.checkpoint == out / "final"
    assert result.exact_match is not None and result.held_out_loss is not None
    model, tokenizer = load_model(str(out / "final")), load_tokenizer(str(out / "final"))
    ids = torch.tensor([tokenizer("Count")["input_ids"]])
    generate: Any = model.generate
    assert generate(ids, max_new_tokens=4).sequences.shape == (1, ids.shape[1] + 4)
    assert load_model(str(out / "checkpoint-3")).config.mask_token_id == model.config.mask_token_id
    card = (out / "final" / "README.md").read_text()
    for part in ("unmask generate", "held-out loss", "exact match", "model FLOP utilisation", "max_steps: 6"):
        assert part in card, part
    for name in ("loss.png", "loss_by_t.png", "recipe.yaml", "tensorboard", "checkpoint-3", "checkpoint-6"):
        assert (out / name).exists(), name
    for folder in ("final", "checkpoint-6"):
        origin = json.loads((out / folder / "provenance.json").read_text())
        assert origin["recipe"]["seed"] == 3 and origin["data"] and origin["versions"]["torch"]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 3, 6]
    history = run_state(out)["history"]
    assert [log["step"] for log in history if "eval_loss" in log] == [0, 3, 6]
    assert any(name.startswith("eval_by_t/") for name in history[0])
    assert "step 6/6  loss" in printed and "supervised tokens/s" in printed
    assert not any(path.suffix in (".bin", ".pt", ".pkl", ".pth") for path in out.rglob("*"))


def test_the_loss_falls_and_is_in_nats_per_supervised_token(tmp_path: Path) -> None:
    result, _ = train_run(tmp_path, max_steps=40, save_steps=40, data__eval_size=6)
    first = losses(tmp_path / "run")[0]
    assert first == pytest.approx(torch.tensor(260.0).log().item(), rel=0.35)  # near uniform at the start
    assert result.held_out_loss is not None and result.held_out_loss < 0.7 * first


# What both runs have, and what the second one has in addition.
ROUTES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "accumulated = one batch": ({}, {"micro_batch_size": 1}),
    "recomputed": ({}, {"micro_batch_size": 2, "gradient_checkpointing": True}),
    "low discrepancy": ({"model__time_sampling": "low_discrepancy"}, {"micro_batch_size": 1}),
    "packed": ({"data__packing": True, "global_batch_size": 2}, {"micro_batch_size": 1}),
    "block-causal, complementary": (
        {"model__attention": "block_causal", "model__block_length": 4, "model__complementary_masks": True},
        {"micro_batch_size": 1},
    ),
    "every corruption": (
        {"model__prefix_probability": 0.3, "model__truncate_probability": 0.3, "model__loss": "llada"},
        {"micro_batch_size": 2},
    ),
    "attention kernels": ({}, {"model__attn_implementation": "eager"}),
}


@pytest.mark.parametrize("route", ROUTES)
def test_two_routes_of_one_run_agree(route: str, tmp_path: Path) -> None:
    shared, changes = ROUTES[route]
    shared = {"save_steps": 6, "eval_steps": 3, **shared}
    train_run(tmp_path, "a", **shared)
    train_run(tmp_path, "b", **shared, **changes)
    assert_same_run(tmp_path / "a", tmp_path / "b", 1e-5)


def test_a_mixture_is_trained_on_by_weight(tmp_path: Path) -> None:
    _, printed = train_run(tmp_path, data=two_sources(tmp_path), max_steps=10, save_steps=10)
    assert run_state(tmp_path / "run")["history"][-1]["share/a.jsonl"] == pytest.approx(0.75, abs=0.06)
    assert "tokens of each source" in printed


def test_early_stopping_leaves_the_best_weights(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "eval_steps": 1,
        "save_steps": 1,
        "early_stopping_patience": 2,
        "max_steps": 30,
    }
    result, printed = train_run(
        tmp_path, **changes, optimizer__learning_rate=0.3, lr_scheduler__type="constant"
    )
    state = run_state(tmp_path / "run")
    assert state["step"] < 30 and "stopped early" in printed
    assert (
        result.held_out_loss
        == state["best_loss"]
        == min(log["eval_loss"] for log in state["history"] if "eval_loss" in log and log["step"])
    )
    best = load_model(str(tmp_path / "run" / f"checkpoint-{state['best_step']}")).state_dict()
    final = load_model(str(tmp_path / "run" / "final")).state_dict()
    assert all(torch.equal(best[name], final[name]) for name in best)


def test_the_average_is_evaluated_and_left(tmp_path: Path) -> None:
    train_run(tmp_path, "ema", ema__decay=0.5, save_steps=6, eval_steps=6)
    train_run(tmp_path, "plain", save_steps=1, save_total_limit=None)
    average: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for step in range(1, 7):  # the averaged run has the same raw weights
        weights = load_model(str(tmp_path / "plain" / f"checkpoint-{step}")).state_dict()
        average = {name: 0.5 * average.get(name, w) + 0.5 * w for name, w in weights.items()}
    final = load_model(str(tmp_path / "ema" / "final")).state_dict()
    raw = load_model(str(tmp_path / "ema" / "checkpoint-6")).state_dict()
    for name, value in average.items():
        # The first weights, which count 2^-6, are not among the checkpoints: step 1 stands for them.
        torch.testing.assert_close(final[name], value, rtol=0, atol=5e-3)
        assert torch.equal(raw[name], weights[name])
    assert any(not torch.equal(final[name], raw[name]) for name in raw)


@pytest.mark.parametrize("kind", ["muon", "adafactor"])  # adamw: above
def test_every_optimizer_learns(kind: str, tmp_path: Path) -> None:
    train_run(tmp_path, optimizer__type=kind, max_steps=25, save_steps=25, global_batch_size=8)
    found = losses(tmp_path / "run")
    assert sum(found[-5:]) < 0.8 * sum(found[:5])


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters(dora: bool, tmp_path: Path) -> None:
    base = autoregressive_folder(tmp_path / "base")
    model: dict[str, Any] = {"name_or_path": str(base)}
    _, printed = train_run(tmp_path, model=model, lora={"r": 4, "use_dora": dora}, save_steps=6, max_steps=6)
    final = str(tmp_path / "run" / "final")
    assert is_adapter(final) and ("DoRA" if dora else "LoRA") in printed
    assert f"from {base} (an autoregressive checkpoint, converted): " in printed
    weights = run_weights(tmp_path / "run")
    assert all("lora" in name or "token_adapter" in name or "embed" in name for name in weights)
    assert load_model(final)(torch.tensor([[1, 2, 3]])).logits.shape[:2] == (1, 3)


def test_a_warmup_longer_than_the_run_is_half_of_it(tmp_path: Path) -> None:
    recipe = run_recipe(tmp_path, max_steps=4, lr_scheduler__warmup_steps=100)
    assert [learning_rate(recipe, step) for step in range(4)] == pytest.approx([0, 0.005, 0.01, 0.005])


def test_a_step_that_is_not_finite_stops_or_is_left_out(tmp_path: Path) -> None:
    base = autoregressive_folder(tmp_path / "base")
    file = base / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    model = {"name_or_path": str(base)}
    with pytest.raises(UnmaskError, match=r"step 1: the loss is nan.*on_non_finite=skip"):
        train_run(tmp_path, model=model)
    entry = json.loads((tmp_path / "run" / "non_finite.jsonl").read_text().splitlines()[0])
    assert entry["step"] == 1 and len(entry["micro_batches"][0]["records"]) == 4
    with pytest.raises(UnmaskError, match="10 steps in a row"):
        train_run(tmp_path, "b", model=model, on_non_finite="skip", max_steps=20)
    assert len((tmp_path / "b" / "non_finite.jsonl").read_text().splitlines()) == 10


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"report_to": ["nothing"]}, "report_to"),
        ({"data__block_size": 500}, "data.block_size"),
        ({"model__config__hidden_sizes": 3}, "model.config.hidden_sizes"),
        ({"model__config__vocab_size": 10}, "model.config"),
        ({"distributed__type": "fsdp"}, "distributed.type"),
        ({"data__eval_size": 24}, "data.eval_size"),
        ({"data__dataset_name": "nowhere.jsonl"}, "nowhere.jsonl"),
        (
            {"model__block_masking_probability": 1.0, "model__mask_block_sizes": [40]},
            "model.mask_block_sizes",
        ),
        ({"model__attn_implementation": "flex_attention"}, "model.attn_implementation"),
    ],
)
def test_bad_input_is_found_before_the_first_step(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    with pytest.raises(UnmaskError) as caught:
        train_run(tmp_path, **changes)
    assert key in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
