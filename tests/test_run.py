"""`unmask.train(recipe)` on recipes of a second: by two routes that must agree."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_held_out import plain_held_out
from test_trainer import plain_loss
from tiny import autoregressive_folder
from torch import Tensor

import unmask
from unmask import byte_tokenizer, load_model, load_recipe, load_tokenizer
from unmask.data.conversation import Turn
from unmask.data.encode import Encoder
from unmask.errors import UnmaskError
from unmask.generation.text import chat_example, chat_turns, complete
from unmask.model.checkpoint import read_config
from unmask.recipe import recipe_from_dict
from unmask.training import run
from unmask.training.dataset import load_data, run_tokenizer
from unmask.training.run import TrainResult
from unmask.training.trainer import DiffusionTrainer

ANIMALS = "ant bee cat dog eel fox gnu hen ibis jay koi lark mole newt owl pig quail ram seal toad"
WORDS = ANIMALS.split()
MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}


# Everything that a curriculum can change, in runs of at least four steps of the data below.
EVERYTHING: dict[str, Any] = {
    "model__noise_eps": [0.2, 0.05],
    "model__time_sampling": "low_discrepancy",
    "model__prefix_probability": [0.2, 0.5],
    "model__truncate_probability": [0.4],
    "model__block_masking_probability": 0.5,
    "model__mask_block_sizes": [[2], [2, 4]],
    "model__loss": "coda",
    "model__masking_scheduler__source_steps": 3,
    "model__attention_annealing_steps": 4,
}


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Trainer collects garbage as it starts, which takes 0.4 s for all that the libraries hold."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file of 25 records and one of text."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    return tmp_path


def write_data(folder: Path) -> None:
    records = [{"instruction": f"Say {word}", "output": f"{word}!"} for word in WORDS]
    records += [{"instruction": "Twice, please.", "input": w, "output": f"{w} {w}"} for w in WORDS[:5]]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "data.jsonl").write_text(lines, encoding="utf-8")
    (folder / "text.txt").write_text(" ".join(WORDS * 6), encoding="utf-8")


def settings(out: str = "out", **changes: Any) -> dict[str, Any]:
    """A recipe as a dict; `model__x=1` sets model.x."""
    tree: dict[str, Any] = {
        "training_mode": "sft",
        "seed": 5,
        "model": {"config": dict(MODEL), "tokenizer": "bytes"},
        "data": {"dataset_name": "data.jsonl", "block_size": 96, "eval_size": 5},
        "global_batch_size": 8,
        "max_steps": 5,
        "precision": "fp32",
        # Adam's epsilon is larger than the rounding of gradients that are zero but for it.
        "optimizer": {"learning_rate": 5e-3, "epsilon": 1e-4},
        "log_steps": 1,
        "report_to": [],
        "checkpoint_save_dir": out,
    }
    for name, value in changes.items():
        *groups, last = name.split("__")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[last] = value
        if name == "model__name_or_path":
            tree["model"].pop("config")
            tree["model"].pop("tokenizer")
    return tree


def train(out: str = "out", **changes: Any) -> tuple[TrainResult, str]:
    """Run a recipe; also returns what it printed."""
    console = Console(file=io.StringIO(), width=200, highlight=False)
    result = unmask.train(recipe_from_dict(settings(out, **changes)), console)
    return result, console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[DiffusionTrainer]:
    """The trainers that runs make, for a look inside."""
    made: list[DiffusionTrainer] = []

    class Kept(DiffusionTrainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(run, "DiffusionTrainer", Kept)
    return made


def losses(history: list[dict[str, float]], key: str = "loss") -> list[float]:
    return [log[key] for log in history if key in log]


def saved(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], atol: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=0, atol=atol), name


# What a run leaves.


def test_a_run_leaves_everything_it_promises(place: Path) -> None:
    result, said = train(report_to=["tensorboard"], save_steps=2)
    final = place / "out" / "final"
    assert result.checkpoint.resolve() == final
    assert {p.name for p in (place / "out").iterdir()} == {
        "checkpoint-4",  # save_total_limit=2: the newest two
        "checkpoint-5",
        "final",
        "loss.png",
        "loss_by_t.png",
        "recipe.yaml",
        "tensorboard",
    }
    assert {p.name for p in final.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "provenance.json",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (place / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    recipe = recipe_from_dict(settings(report_to=["tensorboard"], save_steps=2))
    assert load_recipe(place / "out/recipe.yaml") == load_recipe(final / "recipe.yaml") == recipe
    card = (final / "README.md").read_text(encoding="utf-8")
    assert f"| held-out loss (nats per token) | {result.held_out_loss:.4f} |" in card
    assert f"| mean training loss (nats per token) | {result.train_loss:.4f} |" in card
    assert "Qwen3ForCausalLM from random weights" in said and "20 examples" in said and "5 held out" in said
    assert "20 records" not in said and "alpaca (25)" in said
    assert f"held-out loss {result.held_out_loss:.4f} nats per token" in said
    assert f"checkpoint: {Path('out') / 'final'}" in said


def test_a_run_with_evaluations_and_without_checkpoints_ends_well() -> None:
    """Trainer then has a lowest held-out loss, but not the step of it."""
    result, _ = train(eval_steps=2)
    assert "| lowest held-out loss | " in (result.checkpoint / "README.md").read_text()


def test_two_runs_in_one_folder_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a process of its own, since a process does not keep out itself."""
    started = run.build_model
    other: list[str] = []

    def build(*args: Any) -> Any:
        program = (
            "import sys; from unmask.recipe import recipe_from_dict; import json\n"
            "from unmask.training.run import train\n"
            "train(recipe_from_dict(json.loads(sys.argv[1])))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps(settings())], capture_output=True, text=True
        )
        other.append(done.stderr)
        return started(*args)

    monkeypatch.setattr(run, "build_model", build)
    train()
    assert f"out: process {os.getpid()} on " in other[0] and "is training here at this moment" in other[0]
    monkeypatch.setattr(run, "build_model", started)
    assert "holds no checkpoint yet: a new run" in train("fresh", resume_from_checkpoint="auto")[1]


def test_every_run_logs_to_its_own_tensorboard(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        train(name, report_to=["tensorboard"], max_steps=1)
        events = list((place / name / "tensorboard").rglob("events*"))
        assert events and sum(file.stat().st_size for file in events) > 500
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(place / "mine"))
    train("c", report_to=["tensorboard"], max_steps=1)
    assert list((place / "mine").rglob("events*")) and not (place / "c" / "tensorboard").exists()
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(place / "mine")


def test_the_final_folder_is_the_model_in_memory(trainers: list[DiffusionTrainer]) -> None:
    result, _ = train()
    model: Any = trainers[0].model
    loaded: Any = load_model(str(result.checkpoint))
    tokenizer = load_tokenizer(str(result.checkpoint))
    assert model is not None and loaded is not model
    for (name, one), (_, other) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert loaded.config.logit_shift is False and loaded.config.noise_eps == 1e-3
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    prompt = chat_example(tokenizer, chat_turns("Say owl")).input_ids
    assert prompt == Encoder(byte_tokenizer()).encode_prompt([Turn("user", "Say owl")])
    for temperature in (0.0, 1.0):
        answers = [
            complete(one, tokenizer, [prompt], max_new_tokens=8, temperature=temperature)
            for one in (model.eval(), loaded.eval())
        ]
        assert answers[0] == answers[1]


def test_the_layout_travels_with_the_checkpoint() -> None:
    result, _ = train(data__sft__layout="separator", max_steps=1)
    tokenizer = load_tokenizer(str(result.checkpoint))
    prompt = str(tokenizer.decode(chat_example(tokenizer, chat_turns("Say owl")).input_ids))
    assert prompt.endswith("Say owl\n\n### Response:\n")
    model: Any = load_model(str(result.checkpoint))
    assert model.generation_config.eos_token_ids == [tokenizer.eos_token_id]


def test_exact_match_is_measured_before_and_after(place: Path) -> None:
    prompts = [{"instruction": f"Say {word}", "output": "no"} for word in WORDS[:3]]
    (place / "prompts.json").write_text(json.dumps(prompts))
    result, said = train(
        evaluation__prompts="prompts.json", evaluation__max_new_tokens=4, evaluation__limit=2, max_steps=1
    )
    assert result.exact_match == (0.0, 0.0)
    lines = said.strip().splitlines()
    assert lines[-1] == "exact match: before 0.0%, after 0.0% on 2 held-out prompts"
    assert "Say ant  expected 'no'" in said
    assert "| exact match on held-out prompts | 0.0% before, 0.0% after |" in (
        result.checkpoint / "README.md"
    ).read_text(encoding="utf-8")


def test_an_answer_that_was_learnt_is_exact(place: Path) -> None:
    """One answer for every question is quickly learnt, its end token included."""
    lines = [json.dumps({"instruction": f"Say {word}", "output": "ok"}) for word in WORDS]
    (place / "same.jsonl").write_text("\n".join(lines))
    (place / "prompts.json").write_text(json.dumps([{"instruction": "Say yak", "output": "ok"}] * 2))
    result, said = train(
        data__dataset_name="same.jsonl",
        data__eval_size=0,
        data__sft__end_fill=4,
        optimizer__learning_rate=2e-2,
        max_steps=60,
        evaluation__prompts="prompts.json",
        evaluation__max_new_tokens=8,
    )
    assert result.exact_match == (0.0, 1.0)
    assert said.strip().splitlines()[-1] == "exact match: before 0.0%, after 100.0% on 2 held-out prompts"
    assert "Say yak  correct" in said


# The loss, and every way to the same step.


@pytest.mark.parametrize("mode", ["sft", "pretrain"])
def test_reported_losses_equal_a_recomputation(
    mode: str, trainers: list[DiffusionTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a learning rate of 0 the model stays, and every step sees all examples under new noise."""
    changes: dict[str, Any] = {"optimizer__learning_rate": 0.0, "data__eval_size": 2, "max_steps": 3}
    if mode == "pretrain":
        changes |= {"training_mode": "pretrain", "data__dataset_name": "text.txt", "data__block_size": 64}
    tree = settings(**changes)
    recipe = recipe_from_dict(tree)
    data = load_data(recipe, run_tokenizer(recipe))
    changes["global_batch_size"] = len(data.train)
    result, _ = train(**changes)
    [trainer] = trainers
    model: Any = trainer.model
    monkeypatch.setattr("test_trainer.SEED", recipe.seed)
    expected = [plain_loss(model, data.train, epoch, mode) for epoch in range(3)]
    assert losses(trainer.state.log_history) == pytest.approx(expected, rel=1e-5)
    assert result.train_loss == pytest.approx(sum(expected) / 3, rel=1e-5)
    held_out = plain_held_out(model, data.held_out, mode, recipe.seed)["loss"]
    assert result.held_out_loss == pytest.approx(held_out, rel=1e-5)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Tensor], TrainResult]:
    """Losses, final weights and result of the recipe as it is."""
    folder = tmp_path_factory.mktemp("plain")
    write_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result, _ = train(save_steps=5)
        return history(folder / "out"), saved(folder / "out/final"), result


def history(out: Path, key: str = "loss", step: int = 5) -> list[float]:
    state = json.loads((out / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return losses(state["log_history"], key)


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batch_size": 1},
        {"micro_batch_size": 4},
        {"gradient_checkpointing": True},
        {"model__attn_implementation": "eager"},
        {"data__num_workers": 1},
    ],
    ids=lambda change: "".join(change),
)
def test_a_run_is_the_same_however_it_is_computed(
    place: Path, plain: Any, change: dict[str, Any], trainers: list[DiffusionTrainer]
) -> None:
    result, _ = train(save_steps=5, **change)
    assert len(plain[0]) == 5
    assert history(place / "out") == pytest.approx(plain[0], rel=1e-5)
    assert_close(saved(result.checkpoint), plain[1], atol=2e-5)
    assert result.held_out_loss == pytest.approx(plain[2].held_out_loss, rel=1e-5)
    model: Any = trainers[0].model
    recomputed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert recomputed == ("gradient_checkpointing" in change)


def test_the_same_recipe_twice_is_the_same_to_the_bit_and_another_seed_is_not(
    place: Path, plain: Any
) -> None:
    torch.manual_seed(1234)
    result, _ = train("again", save_steps=5)
    assert history(place / "again") == plain[0]
    assert_close(saved(result.checkpoint), plain[1], atol=0)
    train("other", save_steps=5, seed=6)
    assert history(place / "other") != plain[0]


@pytest.mark.parametrize(
    ("changes", "points"),
    [
        ({}, [1, 3, 4]),  # 20 examples: three steps an epoch, the last one of four examples
        ({"micro_batch_size": 2}, [2, 3, 6]),
        ({"optimizer": {"type": "adafactor"}}, [3]),
        ({"optimizer": {"type": "muon"}, "ema__decay": 0.8}, [3]),
        ({"precision": "bf16", "lr_scheduler": {"type": "linear", "warmup_steps": 3}}, [2]),
        (EVERYTHING, [2, 3, 5]),
        ({"model__attention": "block_causal", "model__block_length": 4}, [3]),
        ({**EVERYTHING, "data__packing": True}, [2, 3]),
    ],
    ids=["adamw", "accumulated", "adafactor", "muon, average", "bf16", "curriculum", "blocks", "packed"],
)
def test_resumed_equals_uninterrupted(
    place: Path, changes: dict[str, Any], points: list[int], trainers: list[DiffusionTrainer]
) -> None:
    every = {"max_steps": 7, "save_steps": 1, "save_total_limit": None, **changes}
    whole, _ = train("whole", **every)
    for point in points:
        start = f"whole/checkpoint-{point}"
        resumed, _ = train(f"from-{point}", **every, resume_from_checkpoint=start)
        assert not (place / f"from-{point}" / f"checkpoint-{point}").exists()
        first, *_, last = (losses(trainer.state.log_history) for trainer in trainers)
        assert len(first) == 7 and last == first
        assert_close(saved(resumed.checkpoint), saved(whole.checkpoint), atol=0)
        assert resumed.held_out_loss == whole.held_out_loss
        assert resumed.train_loss == pytest.approx(whole.train_loss, rel=1e-6)


def test_auto_resumes_from_the_newest_and_starts_fresh_without(place: Path, plain: Any) -> None:
    fresh, said = train("auto", save_steps=5, resume_from_checkpoint="auto")
    assert history(place / "auto") == plain[0]
    # Cut back to how it was after three steps, with an older checkpoint beside.
    train("cut", save_steps=1, save_total_limit=None)
    for name in ("checkpoint-4", "checkpoint-5", "final"):
        (place / "cut" / name).rename(place / name)
    resumed, said = train("cut", save_steps=1, resume_from_checkpoint="auto", save_total_limit=None)
    assert "step 4/5" in said and "step 3/5" not in said
    assert_close(saved(resumed.checkpoint), plain[1], atol=0)
    assert resumed.held_out_loss == fresh.held_out_loss


def test_auto_passes_over_a_checkpoint_that_was_cut_off(place: Path, plain: Any) -> None:
    train(save_steps=1, save_total_limit=None)
    for name in ("checkpoint-4/trainer_state.json", "checkpoint-5/trainer_state.json"):
        (place / "out" / name).unlink()  # written last, so a killed save lacks it
    (place / "out/final").rename(place / "final")
    resumed, said = train(save_steps=1, save_total_limit=None, resume_from_checkpoint="auto")
    assert "step 4/5" in said and "step 3/5" not in said
    assert_close(saved(resumed.checkpoint), plain[1], atol=0)


def tree_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("save_steps", [None, 2])
def test_a_folder_with_a_run_is_refused(place: Path, save_steps: int | None) -> None:
    train(save_steps=save_steps, max_steps=2)
    before = tree_of(place)
    with pytest.raises(UnmaskError, match=r"out holds a run already; .*resume_from_checkpoint=auto"):
        train(save_steps=save_steps, max_steps=2, seed=6)
    assert tree_of(place) == before


def test_auto_does_not_train_over_a_finished_run_without_checkpoints(place: Path) -> None:
    train(max_steps=2)
    before = tree_of(place)
    with pytest.raises(UnmaskError, match=r"out/final is a finished run, .* before max_steps = 2"):
        train(max_steps=2, seed=6, resume_from_checkpoint="auto")
    assert tree_of(place) == before


def test_auto_on_a_finished_run_has_nothing_to_do(place: Path) -> None:
    train(save_steps=2, max_steps=2, lr_scheduler={"type": "constant"})
    (place / "out/checkpoint-best").mkdir()  # of the user's own, and no step
    (place / "out/checkpoint-best/trainer_state.json").touch()
    before = tree_of(place)
    with pytest.raises(UnmaskError, match=r"out/final is a finished run, .* before max_steps = 2"):
        train(save_steps=2, max_steps=2, resume_from_checkpoint="auto")
    assert tree_of(place) == before


def test_a_run_that_lacks_only_its_end_is_finished_without_a_further_step(
    place: Path, trainers: list[DiffusionTrainer]
) -> None:
    # With a constant learning rate a step too many would show.
    first, _ = train(save_steps=2, max_steps=2, lr_scheduler={"type": "constant"})
    weights = saved(first.checkpoint)
    (place / "out/final").rename(place / "final")
    again, said = train(
        save_steps=2, max_steps=2, lr_scheduler={"type": "constant"}, resume_from_checkpoint="auto"
    )
    assert_close(saved(again.checkpoint), weights, atol=0)
    assert again.held_out_loss == first.held_out_loss
    assert again.train_loss == pytest.approx(first.train_loss, rel=1e-6)
    assert "step 3/2" not in said and trainers[1].state.global_step == 2
    card = (again.checkpoint / "README.md").read_text(encoding="utf-8")
    assert "| optimizer steps | 2 |" in card and "nan" not in card


def test_the_mean_loss_weighs_each_entry_by_its_steps() -> None:
    history = [{"step": 0, "eval_loss": 9.0}, {"step": 1, "loss": 4.0}, {"step": 4, "loss": 2.0}]
    assert run._mean_loss(history) == pytest.approx((4 + 3 * 2) / 4)


def test_a_response_may_end_with_another_token_than_a_text(place: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"  # as a base model has it; the chat template ends with <|im_end|>
    tokenizer.save_pretrained(place / "tokenizer")
    result, _ = train(model__tokenizer="tokenizer", max_steps=1)
    model: Any = load_model(str(result.checkpoint))
    assert model.generation_config.eos_token_ids == [258, 256]
    assert not {256, 258} & set(model.generation_config.suppress_tokens or [])


def test_what_is_no_training_checkpoint_is_refused() -> None:
    first, _ = train(max_steps=1)
    for name in ("nowhere", str(first.checkpoint)):
        with pytest.raises(UnmaskError, match=f"{name}.*trainer_state.json"):
            train("other", resume_from_checkpoint=name)


def test_every_setting_of_the_optimizer_reaches_it(trainers: list[DiffusionTrainer]) -> None:
    optimizer = {"learning_rate": 0.003, "weight_decay": 0.2, "beta1": 0.7, "beta2": 0.8, "epsilon": 1e-5}
    train(
        optimizer={**optimizer, "max_grad_norm": 0.5},
        lr_scheduler={"type": "linear", "warmup_steps": 2},
        max_steps=4,
    )
    inner: Any = trainers[0].optimizer
    for group, decay in zip(inner.param_groups, (0.2, 0.0), strict=True):  # norms do not decay
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.7, 0.8), 1e-5, decay)
    rates = losses(trainers[0].state.log_history, "learning_rate")
    assert rates == pytest.approx([0.0, 0.0015, 0.003, 0.0015])
    assert trainers[0].args.max_grad_norm == 0.5


# Where a model starts from.


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_from_an_autoregressive_base(place: Path, family: str) -> None:
    base = autoregressive_folder(place / "base", family)
    result, said = train(model__name_or_path=str(base), optimizer__learning_rate=0.0, max_steps=1)
    config = read_config(str(result.checkpoint))
    assert (config["model_type"], config["logit_shift"]) == (f"unmask_{family}", True)
    assert config["mask_token_id"] == 259 and load_tokenizer(str(result.checkpoint)).mask_token_id == 259
    assert_close(saved(result.checkpoint), saved(base), atol=0)
    assert "logit shift on" in said
    trained, _ = train("trained", model__name_or_path=str(base))
    assert any(not torch.equal(w, saved(base)[n]) for n, w in saved(trained.checkpoint).items())


def test_from_a_diffusion_checkpoint(place: Path, plain: Any) -> None:
    first, _ = train()
    again, said = train(
        "again", model__name_or_path=str(first.checkpoint), optimizer__learning_rate=0.0, max_steps=1
    )
    assert again.held_out_loss == first.held_out_loss == plain[2].held_out_loss
    assert_close(saved(again.checkpoint), plain[1], atol=0)
    assert "logit shift off" in said
    shifted, _ = train("shifted", model__name_or_path="out/final", model__logit_shift=True, max_steps=1)
    assert read_config(str(shifted.checkpoint))["logit_shift"] is True


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"precision": "bf16", "model__dtype": "bfloat16"},
        {"optimizer": {"type": "adafactor", "learning_rate": 5e-3}},
        {"optimizer": {"type": "muon", "learning_rate": 5e-3}},
        {"ema__decay": 0.8},
        {"model__freeze_embeddings": True},
        {"training_mode": "pretrain", "data__dataset_name": "text.txt", "data__eval_size": 2},
        {"training_mode": "pretrain", "data__dataset_name": ["text.txt", "text.txt"], "data__eval_size": 1},
        {"data__eval_size": 0, "data__eval_dataset_name": "data.jsonl"},
        {"model__config": {**MODEL, "model_type": "llama"}},
        {"model__config": {**MODEL, "model_type": "qwen2", "tie_word_embeddings": True}},
    ],
    ids=[
        *("bf16", "bf16 weights", "adafactor", "muon", "average", "frozen", "pretrain", "two texts"),
        *("own eval data", "llama", "qwen2"),
    ],
)
def test_it_learns(changes: dict[str, Any], trainers: list[DiffusionTrainer]) -> None:
    result, _ = train(**{"max_steps": 30, **changes})
    before, after = losses(trainers[0].state.log_history, "eval_loss")
    assert after == result.held_out_loss and after < 0.8 * before
    model: Any = load_model(str(result.checkpoint))
    expected = torch.bfloat16 if changes.get("model__dtype") else torch.float32
    assert next(model.parameters()).dtype == expected


def test_bf16_is_near_fp32(place: Path, plain: Any) -> None:
    train(save_steps=5, precision="bf16")
    found = history(place / "out")
    assert found == pytest.approx(plain[0], rel=0.03) and found != pytest.approx(plain[0], rel=1e-5)


def test_without_held_out_data_there_is_no_held_out_loss() -> None:
    result, said = train(data__eval_size=0, max_steps=1)
    assert result.held_out_loss is None
    assert "held-out loss" not in said + (result.checkpoint / "README.md").read_text(encoding="utf-8")


# The curriculum and the attention of the recipe.


def test_the_curriculum_reaches_the_trainer_and_the_checkpoint(trainers: list[DiffusionTrainer]) -> None:
    result, said = train(**EVERYTHING, max_steps=4)
    [trainer] = trainers
    assert trainer.time_sampling == "low_discrepancy"
    first, last = trainer.curriculum.at(0, 0), trainer.curriculum.at(3, 1)
    assert (first.eps, first.prefix_probability, first.mask_block_sizes) == (0.2, 0.2, (2,))
    assert (first.source_share, first.future_share, first.loss) == (0.0, 0.0, "coda")
    assert (last.eps, last.prefix_probability, last.mask_block_sizes) == (0.05, 0.5, (2, 4))
    assert (last.source_share, last.future_share) == (1.0, 0.75)
    assert read_config(str(result.checkpoint))["noise_eps"] == 0.05
    assert said.count("loss coda is no bound on the likelihood") == 1


def test_the_held_out_loss_does_not_depend_on_what_is_trained(plain: Any) -> None:
    changes = {**EVERYTHING, "model__noise_eps": [0.2, 1e-3], "model__loss": "uniform"}
    still = {"optimizer__learning_rate": 0.0, "max_steps": 4}
    assert train("a", **still, **changes)[0].held_out_loss == train("b", **still)[0].held_out_loss


def test_attention_is_saved_and_taken_from_the_checkpoint(place: Path) -> None:
    blocks = {"model__attention": "block_causal", "model__block_length": 4}
    first, _ = train("first", **blocks, max_steps=2)
    config = read_config(str(first.checkpoint))
    assert (config["attention"], config["block_length"]) == ("block_causal", 4)
    start = {"model__name_or_path": str(first.checkpoint), "max_steps": 1}
    for name, changes, expected in (
        ("same", {}, ("block_causal", 4)),
        ("longer", {"model__block_length": 8}, ("block_causal", 8)),
        ("both", {"model__attention": "bidirectional"}, ("bidirectional", None)),
    ):
        config = read_config(str(train(name, **start, **changes)[0].checkpoint))
        assert (config["attention"], config.get("block_length")) == expected
    with pytest.raises(UnmaskError, match=r"^model.attention_annealing_steps contradicts .*first/final"):
        train("annealed", **start, model__attention_annealing_steps=1)
    base = autoregressive_folder(place / "base")
    from_base = {"model__name_or_path": str(base), "max_steps": 1}
    config = read_config(str(train("adapted", **from_base, **blocks)[0].checkpoint))
    assert (config["attention"], config["block_length"]) == ("block_causal", 4)
    with pytest.raises(UnmaskError, match=r"^model.block_length has no effect: .*base has bidirectional"):
        train("other", **from_base, model__block_length=4)


# What cannot be run is said before the first step.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__eval_size": 25}, "data.eval_size: 25 are to be held out, but there are only 25 examples"),
        ({"data__block_size": 200}, "data.block_size: 200 tokens exceed the model's 128 positions"),
        ({"model__config": {"hiden_size": 3}}, "model.config.hiden_size: .*did you mean 'hidden_size'"),
        ({"model__config": {**MODEL, "hidden_size": "big"}}, "model.config: no model can be built"),
        ({"model__config": {**MODEL, "num_attention_heads": 5, "head_dim": 7}}, "model.config: no model"),
        ({"model__config": {**MODEL, "vocab_size": 100}}, "vocab_size 100 is below the 260 ids"),
        ({"checkpoint_save_dir": "data.jsonl"}, "checkpoint_save_dir: data.jsonl cannot be made"),
        ({"data__dataset_name": "datta.jsonl"}, "datta.jsonl: no such file; did you mean data.jsonl"),
        ({"report_to": ["tensorbored"]}, "report_to: .*tensorbored"),
        (
            {"model__block_masking_probability": 0.1, "model__mask_block_sizes": [2, 16]},
            "model.mask_block_sizes: blocks of 16 tokens are longer than any response .* has 7;",
        ),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(place: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnmaskError, match=message) as caught:
        train(**changes)
    assert "\n" not in str(caught.value)


def test_the_batch_must_divide_over_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UnmaskError, match=r"cannot be divided evenly over 3 processes; set it to 9"):
        train()


# No room on the disk: a write beyond a size limit fails as it does on a full disk.


class Full:
    """Inside, no file of this process can grow beyond some bytes."""

    def __init__(self, size: int):
        self.size = size

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_full_disk_leaves_the_earlier_checkpoint(
    place: Path, part: str, monkeypatch: pytest.MonkeyPatch, plain: Any
) -> None:
    name = {"model": "save_model", "optimizer": "_save_optimizer_and_scheduler"}[part]
    real = getattr(DiffusionTrainer, name)
    seen: dict[str, bytes] = {}

    def full(self: DiffusionTrainer, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < 4:
            return real(self, *args, **kwargs)
        seen.update(tree_of(place / "out/checkpoint-2"))
        with Full(2000):
            return real(self, *args, **kwargs)

    monkeypatch.setattr(DiffusionTrainer, name, full)
    with pytest.raises(UnmaskError, match=r"out/checkpoint-4: could not be written: .*resume_from") as caught:
        train(save_steps=2, save_total_limit=1)
    assert "\n" not in str(caught.value)
    assert seen and tree_of(place / "out/checkpoint-2") == seen
    assert not (place / "out/checkpoint-4").exists() and not (place / "out/final").exists()
    monkeypatch.undo()
    # The remedy that the message names works.
    monkeypatch.chdir(place)
    resumed, _ = train(save_steps=2, save_total_limit=1, resume_from_checkpoint="auto")
    assert_close(saved(resumed.checkpoint), plain[1], atol=0)


def test_a_full_disk_at_the_end_leaves_no_half_a_checkpoint(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run.save_checkpoint

    def full(*args: Any) -> None:
        with Full(2000):
            real(*args)

    monkeypatch.setattr(run, "save_checkpoint", full)
    with pytest.raises(UnmaskError, match=r"out/final: could not be written: ") as caught:
        train(max_steps=1)
    assert "\n" not in str(caught.value)
    assert not [p.name for p in (place / "out").iterdir() if "final" in p.name]


# Packing.


def test_a_packed_run_trains_on_fuller_rows(place: Path, trainers: list[DiffusionTrainer]) -> None:
    """Its held-out loss before training is that of the run that does not pack."""
    _, plain = train("plain", max_steps=1)
    _, said = train("packed", max_steps=1, data__packing=True, data__block_size=90)
    separate, packed = ([*cast(Any, trainer.train_dataset)] for trainer in trainers)
    assert [example for row in packed for example in row] != separate  # in another order
    assert sorted(example.sample_id for row in packed for example in row) == [
        example.sample_id for example in separate
    ]
    assert len(packed) < 12 and max(map(len, packed)) == 2
    tokens = sum(len(example.input_ids) for example in separate)
    share = f"{tokens / (90 * len(packed)):.1%}"
    assert f"packing: {len(packed)} rows of at most 90 tokens, {share} of their positions filled" in said
    assert f"1 steps of 8 rows (8 x 1 x 1), {8 / len(packed):.3g} epochs" in said
    before = [re.search(r"step 0/1  held-out loss ([\d.]+)", text) for text in (plain, said)]
    assert before[0] and before[1] and before[0][1] == before[1][1]


def test_packed_text_is_cut_document_by_document(place: Path, trainers: list[DiffusionTrainer]) -> None:
    texts = [{"text": "ab" * number} for number in range(1, 40)]
    (place / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    changes = {
        "training_mode": "pretrain",
        "data__dataset_name": "texts.jsonl",
        "data__block_size": 50,
        "data__packing": True,
        "max_steps": 1,
    }
    train("split", **changes)
    _, said = train("cut", **changes, data__long_documents="cut")
    sizes = [
        sorted(len(example.input_ids) for row in cast(Any, trainer.train_dataset) for example in row)
        for trainer in trainers
    ]
    assert max(sizes[0]) == max(sizes[1]) == 50
    assert len(sizes[0]) == 34 + 15 and len(sizes[1]) == 34  # 39 documents, 15 of which are long
    assert "truncated 15" in said


# Two processes.


@pytest.mark.parametrize(
    "changes",
    [{}, EVERYTHING, {**EVERYTHING, "data__packing": True}],
    ids=["plain", "curriculum", "packed"],
)
def test_two_processes_equal_one(place: Path, changes: dict[str, Any]) -> None:
    """18 training and 7 held-out examples: the third step of an epoch has two examples, so that one process
    has only repetitions, and the last evaluation batch is short. Packed they are 9 and 4 rows."""
    changes = {"data__eval_size": 7, "save_steps": 5, **changes}
    one, _ = train("one", **changes)
    assert one.held_out_loss is not None
    two = settings("two", micro_batch_size=2, **changes)
    (place / "recipe.yaml").write_text(recipe_from_dict(two).to_yaml(), encoding="utf-8")
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2".split()
    done = subprocess.run(
        [*launch, "-m", "unmask", "train", "recipe.yaml"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "(2 x 2 x 2)" in done.stdout and done.stdout.count("step 5/5  loss") == 1
    assert done.stdout.count("is no bound on the likelihood") == ("model__loss" in changes)
    assert history(place / "two") == pytest.approx(history(place / "one"), rel=1e-5)
    assert_close(saved(place / "two/final"), saved(one.checkpoint), atol=2e-5)
    found = re.findall(r"held-out loss ([\d.]+)", done.stdout)
    before = history(place / "one", "eval_loss")[0]
    assert found == [f"{before:.4f}", f"{one.held_out_loss:.4f}"]
