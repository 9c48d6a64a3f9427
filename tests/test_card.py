from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import byte_model
from transformers import TrainerState

from unmask.data.encode import Example
from unmask.config import Recipe, load_recipe, recipe_from_dict
from unmask.training.accounting import PARTS, Usage
from unmask.training.card import write_card
from unmask.training.dataset import RunData


def card(tmp_path: Path, **given: Any) -> tuple[str, Recipe]:
    recipe = recipe_from_dict(
        {
            "training_mode": "sft",
            "model": {"name_or_path": "some/base"},
            "data": {"dataset_name": given.pop("dataset_name", "train.jsonl")},
            "global_batch_size": 6,
        }
    )
    values: dict[str, Any] = {
        "model": byte_model(logit_shift=True),
        "state": TrainerState(global_step=1200),
        "metrics": {"train_loss": 1.23456, "train_runtime": 61.7},
        "data": RunData([Example([1, 2], [True, False])] * 1500, []),
        "held_out_loss": None,
        "exact_match": None,
        **given,
    }
    write_card(aside=tmp_path, folder=Path("runs/a b/final"), recipe=recipe, **values)
    return (tmp_path / "README.md").read_text(encoding="utf-8"), recipe


def rows(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, flags=re.MULTILINE))


def test_the_card_says_how_the_checkpoint_was_made(tmp_path: Path) -> None:
    text, recipe = card(tmp_path)
    table = rows(text)
    model = byte_model()
    assert table["training mode"] == "sft"
    assert table["started from"] == "some/base"
    assert table["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    assert table["logit shift"] == "on"
    assert table["attention"] == "bidirectional"
    assert table["data"] == "train.jsonl"
    assert table["training examples"] == "1,500"
    assert table["optimizer steps"] == "1,200"
    assert table["sequences per step"] == "6"
    assert table["mean training loss (nats per token)"] == "1.2346"
    assert table["training time (s)"] == "62"
    assert "held-out" not in text and "exact match" not in text
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_its_front_matter_and_its_recipe_can_be_read(tmp_path: Path) -> None:
    text, recipe = card(tmp_path)
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "unmask",
        "pipeline_tag": "text-generation",
        "tags": ["masked-diffusion", "unmask_qwen3"],
    }
    [inside] = re.findall(r"```yaml\n(.*?)```", body, flags=re.DOTALL)
    (tmp_path / "again.yaml").write_text(inside, encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_measurements_are_listed_where_there_are_any(tmp_path: Path) -> None:
    text, _ = card(tmp_path, held_out_loss=0.5, exact_match=(0.0125, 0.9))
    table = rows(text)
    assert table["held-out loss (nats per token)"] == "0.5000"
    assert table["exact match on held-out prompts"] == "1.2% before, 90.0% after"


def test_work_and_origin_are_listed_where_they_are_known(tmp_path: Path) -> None:
    seconds = {**dict.fromkeys(PARTS, 0.0), "forward": 6.0, "data": 2.0, "evaluation": 5.0}
    usage = Usage(4000, 900, 1000, 2e10, seconds, peak_flops=1e10, peak_memory=3 << 29)
    text, _ = card(tmp_path, usage=usage, origin={"made with": "torch 9|x", "devices": "2 x TPU"})
    table = rows(text)
    assert table["supervised tokens per second"] == "500"
    assert table["useful positions per computed position"] == "90.0%"
    assert table["model FLOP utilisation"] == "25.0% of the measured peak (10 GFLOP/s)"
    assert table["peak memory of a process"] == "1.50 GiB"
    assert table["made with"] == "torch 9\\|x" and table["devices"] == "2 x TPU"
    text, _ = card(tmp_path, usage=Usage())  # nothing was trained in this session
    assert "utilisation" not in text


def test_the_best_evaluation_is_listed(tmp_path: Path) -> None:
    state = TrainerState(global_step=1200, best_metric=0.25, best_global_step=1000)
    assert rows(card(tmp_path, state=state)[0])["lowest held-out loss"] == "0.2500 at step 1,000"


def test_several_data_sets_are_listed(tmp_path: Path) -> None:
    assert rows(card(tmp_path, dataset_name=["a.jsonl", "b.jsonl"])[0])["data"] == "a.jsonl, b.jsonl"


def test_a_mixture_is_listed_with_its_weights(tmp_path: Path) -> None:
    sources = [{"dataset_name": "a|b.jsonl", "weight": 3}, {"dataset_name": "c.jsonl", "weight": 0.5}]
    recipe = recipe_from_dict({"model": {"name_or_path": "base"}, "data": {"sources": sources}})
    values = (byte_model(), TrainerState(), {}, RunData([], []), None, None)
    write_card(tmp_path, Path("out/final"), recipe, *values)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| data | a\\|b.jsonl (weight 3), c.jsonl (weight 0.5) |" in text


def test_records_left_out_are_listed_where_there_are_any(tmp_path: Path) -> None:
    assert "records left out" not in card(tmp_path)[0]
    text, _ = card(
        tmp_path, left_out=["2 skipped: not valid JSON (first: a|b.jsonl line 4)", "1 dropped: long"]
    )
    assert (
        "| records left out | 2 skipped: not valid JSON (first: a\\|b.jsonl line 4); 1 dropped: long |"
        in text
    )


def test_the_commands_shown_name_the_folder(tmp_path: Path) -> None:
    text, _ = card(tmp_path)
    assert "unmask generate 'runs/a b/final' --prompt" in text
    assert 'unmask.load_model("runs/a b/final")' in text


@pytest.mark.parametrize("missing", [{}, {"train_loss": float("nan")}])
def test_a_card_is_written_also_without_a_loss(tmp_path: Path, missing: dict[str, float]) -> None:
    text, _ = card(tmp_path, metrics=missing)
    assert rows(text)["mean training loss (nats per token)"] == "nan"
    assert "training time" not in text


def test_the_card_names_block_causal_attention_and_the_preset_of_the_loss(tmp_path: Path) -> None:
    recipe = recipe_from_dict(
        {"model": {"name_or_path": "base", "loss": "coda"}, "data": {"dataset_name": "a.txt"}}
    )
    write_card(
        tmp_path,
        Path("out/final"),
        recipe,
        byte_model(attention="block_causal", block_length=4),
        TrainerState(global_step=1),
        {"train_loss": 1.0},
        RunData([], []),
        None,
        None,
    )
    table = rows((tmp_path / "README.md").read_text(encoding="utf-8"))
    assert table["attention"] == "block-causal (blocks of 4 tokens)"
    assert table["mean training loss (by preset coda)"] == "1.0000"
