"""What a run will need, judged before it: against what autograd and the optimizers really keep."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_run import MODEL, settings
from tiny import random_ids
from torch import Tensor

from unmask.cli import main
from unmask.errors import UnmaskError
from unmask.model.families import MODEL_CLASSES
from unmask.config import Recipe, load_recipe, recipe_from_dict
from unmask.training import memory
from unmask.training.dry_run import dry_run
from unmask.training.memory import GIB, Memory, estimate, judge, memory_lines, sizes_of
from unmask.training.outline import model_config, outline, saved_bytes

RECIPES = Path(__file__).parent.parent / "recipes"
GEOMETRY: dict[str, dict[str, Any]] = {
    "0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "1.7b": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "4b": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}


def recipe(**changes: Any) -> Recipe:
    return recipe_from_dict(settings(**{"model__config": {**MODEL, "num_hidden_layers": 3}, **changes}))


def really_saved(model: Any, batch: int, length: int, autocast: bool) -> int:
    """Bytes that autograd keeps of a forward of the network, run on real tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model.model(input_ids=random_ids(batch, length), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_autograd_keeps(precision: str, kernel: str, frozen: bool) -> None:
    changes = {"model__attn_implementation": kernel, "model__freeze_embeddings": frozen}
    wanted = recipe(precision=precision, **changes)
    config = model_config(wanted)
    saved = saved_bytes(wanted, config, 2, 24)
    model = MODEL_CLASSES[config.model_type](config)
    model.set_attn_implementation(kernel)
    model.get_input_embeddings().requires_grad_(not frozen)
    assert saved.rest + 3 * saved.layer == really_saved(model, 2, 24, precision == "bf16")
    assert saved.layer_input == 2 * 24 * MODEL["hidden_size"] * 4


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
def test_what_the_optimizer_keeps(kind: str, tmp_path: Path) -> None:
    wanted = recipe(optimizer={"type": kind, "learning_rate": 1e-3})
    config = model_config(wanted)
    counted = sizes_of(outline(wanted, config), wanted).optimizer
    state = stepped(wanted, config, tmp_path).state
    kept = sum(
        t.nbytes for per in state.values() for t in per.values() if torch.is_tensor(t) and t.numel() > 1
    )
    assert kept == pytest.approx(counted, rel=0.01)


def stepped(wanted: Recipe, config: Any, folder: Path) -> torch.optim.Optimizer:
    """The optimizer of a run after one step of random gradients."""
    from unmask.training.arguments import training_arguments
    from unmask.training.trainer import DiffusionTrainer

    args = training_arguments(wanted.model_copy(update={"checkpoint_save_dir": str(folder)}))
    model = MODEL_CLASSES[config.model_type](config)
    trainer = DiffusionTrainer(model=model, args=args, muon=wanted.optimizer.type == "muon")
    optimizer = trainer.create_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def judged(wanted: Recipe, devices: int, device_type: str = "cpu") -> Memory:
    config = model_config(wanted)
    micro = wanted.micro_batch_size or wanted.global_batch_size // devices
    saved = saved_bytes(wanted, config, micro, wanted.data.block_size)
    sizes = sizes_of(outline(wanted, config), wanted)
    return estimate(wanted, config, sizes, saved, devices, wanted.data.block_size, device_type)


def test_what_is_divided_and_what_is_not() -> None:
    whole, divided = (judged(recipe(distributed__type=kind, ema__decay=0.9), 4) for kind in ("ddp", "fsdp"))
    for part in ("weights", "optimizer", "average"):
        assert getattr(divided, part) == -(-getattr(whole, part) // 4), part
    assert divided.gradients * 8 == whole.gradients  # of which DDP has a copy
    assert whole.gathered == 0 < divided.gathered
    assert divided.activations == whole.activations


def test_checkpointing_keeps_inputs_alone() -> None:
    plain, again = judged(recipe(), 1), judged(recipe(gradient_checkpointing=True), 1)
    assert again.activations < plain.activations / 5
    assert again.backward > plain.backward and again.static == plain.static


def test_a_step_holds_what_it_holds() -> None:
    """By hand: with accumulation, everything but the head is there as the last backward pass begins."""
    found = judged(recipe(micro_batch_size=1, data__block_size=2), 1)
    assert found.static == found.weights * 4  # gradient, and two of AdamW
    assert found.peak >= found.static + found.activations


@pytest.mark.parametrize("size", GEOMETRY)
def test_recipes(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every recipe of a size is sound, and its weights are counted right, from a config alone."""
    fields = {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": size != "8b",
    }
    transformers.Qwen3Config(**GEOMETRY[size], **fields, max_position_embeddings=40960).save_pretrained(
        tmp_path
    )
    for file in RECIPES.glob(f"train_qwen3_{size}*.yaml"):
        wanted = load_recipe(file, [f"model.name_or_path={tmp_path}"])
        found = dry_run(wanted)
        parameters = {"0.6b": 596_049_920, "1.7b": 1_720_574_976, "4b": 4_022_468_096, "8b": 8_190_735_360}[
            size
        ]
        for count, one in found.items():
            parted = 1 if wanted.distributed.type == "ddp" else count
            adapted = 0 if wanted.lora.r is None else one.weights * parted - 4 * parameters
            assert one.weights == -(-(4 * parameters + adapted) // parted)
            assert one.peak < 80 * 0.9e9  # an 80 GB device
        divided = "units of a block each" in capsys.readouterr().out
        assert divided == (wanted.distributed.type == "fsdp")


def test_one_number_of_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(dry_run(recipe())) == [1, 2, 4, 8]
    assert list(dry_run(recipe(distributed__type="fsdp"))) == [2, 4, 8]
    assert list(dry_run(recipe(), 4)) == [4]
    assert "2 x 1 x 4" in capsys.readouterr().out
    with pytest.raises(UnmaskError, match="cannot be divided evenly over 3 processes; set it to 9"):
        dry_run(recipe(), 3)


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs no data and leaves nothing."""
    file = tmp_path / "run.yaml"
    file.write_text(recipe().to_yaml())
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, "train", str(file), "--dry-run", "--devices", "8")
    assert "1 x 1 x 8" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    with pytest.raises(SystemExit):
        command(monkeypatch, "train", str(file), "--devices", "8")
    assert "--devices has no effect without --dry-run" in capsys.readouterr().err


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["unmask", *arguments])
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise


def test_a_run_that_cannot_fit_says_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe(micro_batch_size=4)
    found = judged(wanted, 1)
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "device_memory", lambda device: (found.peak, found.peak))
    assert judge(wanted, found, 4, cpu) is None
    monkeypatch.setattr(memory, "device_memory", lambda device: (found.peak - 1, found.peak))
    note = judge(wanted, found, 4, cpu)
    assert (
        note is not None and "if it does not fit, try gradient_checkpointing=true, micro_batch_size=2" in note
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two processes share a CPU's memory
    monkeypatch.setattr(memory, "device_memory", lambda device: (2 * found.peak - 1, 2 * found.peak))
    assert judge(wanted, found, 4, cpu) is not None
    monkeypatch.setattr(memory, "device_memory", lambda device: (0, 2 * found.static - 1))
    with pytest.raises(UnmaskError, match=r"memory: weights, gradients and optimizer need 0\.0 GiB.*; try"):
        judge(wanted, found, 4, cpu)


def test_what_a_run_says() -> None:
    wanted = recipe()
    model = outline(wanted, model_config(wanted))
    [line] = memory_lines(wanted, model, torch.device("cpu"), 1, wanted.data.block_size)
    assert line.startswith("memory: about ") and "optimizer" in line and "MiB" in line
    assert GIB == 2**30
