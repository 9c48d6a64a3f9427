"""The same run on one process and on several, whole and divided: torchrun's beside `unmask.train`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from test_run import MODEL, WORDS, settings
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import TrainingArguments

import unmask
from unmask.errors import UnmaskError
from unmask.config import recipe_from_dict
from unmask.training import parallel
from unmask.training.arguments import training_arguments
from unmask.training.parallel import batch_plan, check_enough, parallel_settings, read_deepspeed, settle

ROOT = Path(__file__).parent.parent
STEPS, HALF = 6, 3
NORM = 0.3  # far below the gradients of this run, so that clipping acts at every step


def recipe(folder: Path, out: str, **changes: Any) -> dict[str, Any]:
    """20 records to train on and 4 held out, 8 sequences a step, tied embeddings, gradients clipped."""
    changes = {
        "model__config": {**MODEL, "num_hidden_layers": 2, "tie_word_embeddings": True},
        "data__dataset_name": str(folder / "data.jsonl"),
        "data__eval_size": 4,
        "max_steps": STEPS,
        "eval_steps": HALF,
        "save_steps": HALF,
        "optimizer__max_grad_norm": NORM,
        **changes,
    }
    return settings(str(folder / out), **changes)


def history(out: Path) -> list[dict[str, float]]:
    return json.loads((out / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]


def losses(out: Path) -> list[float]:
    """The logged losses of a run, then its held-out losses."""
    return [log[key] for key in ("loss", "eval_loss") for log in history(out) if key in log]


def torchrun(folder: Path, processes: int, out: str, **changes: Any) -> subprocess.CompletedProcess[str]:
    """Run the real command on several processes; FSDP divides the model, which it does not by itself here."""
    file = folder / f"{out}_{processes}.yaml"
    file.write_text(yaml.safe_dump(recipe(folder, out, **changes)))
    paths = [os.environ.get("PYTHONPATH", "")]
    if "distributed__type" in changes:
        paths.append(str(ROOT / "tests" / "fsdp_on_cpu"))
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"),
            *("--standalone", "-m", "unmask", "train", str(file)),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data, and the run that all others are compared with: one process, whole batches."""
    place = tmp_path_factory.mktemp("parallel")
    records = [{"instruction": f"Say {word}", "output": f"{word}!"} for word in WORDS]
    records += [{"instruction": "Twice, please.", "input": w, "output": f"{w} {w}"} for w in WORDS[:4]]
    (place / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    train(place, "alone")
    assert all(log["grad_norm"] > NORM for log in history(place / "alone") if "grad_norm" in log)
    return place


def train(place: Path, out: str, **changes: Any) -> Path:
    from rich.console import Console

    unmask.train(recipe_from_dict(recipe(place, out, **changes)), Console(quiet=True))
    return place / out


@pytest.fixture(scope="module")
def fsdp(folder: Path) -> Iterator[Path]:
    """The run on two processes with the model divided, activations computed again, and prompts answered."""
    result = torchrun(
        folder,
        2,
        "fsdp",
        distributed__type="fsdp",
        micro_batch_size=2,
        gradient_checkpointing=True,
        evaluation__prompts=str(folder / "data.jsonl"),
        evaluation__limit=2,
        evaluation__max_new_tokens=4,
    )
    assert result.returncode == 0, result.stderr
    assert "exact match: before 0.0%" in result.stdout
    yield folder / "fsdp"


def assert_same(one: Path, other: Path) -> None:
    """Losses to 5 digits, weights of about 0.3 to 1e-5: sums in float32 that are in another order."""
    assert losses(other) == pytest.approx(losses(one), rel=1e-5)
    weights, others = (load_file(out / "final" / "model.safetensors") for out in (one, other))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=1e-5)


def test_one_sequence_at_a_time_with_activations_computed_again(folder: Path) -> None:
    assert_same(
        folder / "alone", train(folder, "accumulated", micro_batch_size=1, gradient_checkpointing=True)
    )


def test_two_processes(folder: Path) -> None:
    result = torchrun(folder, 2, "ddp", micro_batch_size=2)
    assert result.returncode == 0, result.stderr
    assert_same(folder / "alone", folder / "ddp")


def test_two_processes_that_divide_the_model(folder: Path, fsdp: Path) -> None:
    assert_same(folder / "alone", fsdp)
    saved = FileSystemReader(fsdp / f"checkpoint-{STEPS}" / "pytorch_model_fsdp_0").read_metadata()
    # Really divided: under DDP the numbers would be as right.
    for name, tensor in cast(dict[str, Any], saved.state_dict_metadata).items():
        assert [chunk.sizes[0] * 2 for chunk in tensor.chunks] == [tensor.size[0]] * 2, name


@pytest.mark.parametrize(("processes", "micro", "rounding"), [(2, 2, 0.0), (4, 1, 1e-5)])
def test_a_divided_run_goes_on(folder: Path, fsdp: Path, processes: int, micro: int, rounding: float) -> None:
    """On as many processes bit for bit, on others to rounding."""
    out = f"resumed_{processes}"
    shutil.copytree(fsdp, folder / out, ignore=shutil.ignore_patterns("final", f"checkpoint-{STEPS}"))
    result = torchrun(
        folder,
        processes,
        out,
        distributed__type="fsdp",
        micro_batch_size=micro,
        gradient_checkpointing=True,
        resume_from_checkpoint="auto",
    )
    assert result.returncode == 0, result.stderr
    assert losses(folder / out) == pytest.approx(losses(fsdp), rel=rounding, abs=0)


def test_packed_is_padded(folder: Path) -> None:
    """Where a step takes all data, whichever way it is laid out."""
    padded = train(folder, "padded", global_batch_size=20, save_steps=STEPS)
    packed = train(folder, "packed", global_batch_size=8, data__packing=True, save_steps=STEPS)
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-5)


# What is found before anything starts.


@pytest.mark.parametrize(
    ("changes", "processes", "plan"),
    [
        ({}, 1, (8, 1)),
        ({}, 4, (2, 1)),
        ({"micro_batch_size": 1}, 4, (1, 2)),
        ({"micro_batch_size": 8}, 1, (8, 1)),
    ],
)
def test_the_global_batch_is_divided(changes: dict[str, Any], processes: int, plan: tuple[int, int]) -> None:
    assert batch_plan(recipe_from_dict(settings(**changes)), processes) == plan


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({}, 16, "8 sequences cannot be divided over 16 processes; start at most 8"),
        ({}, 3, "8 sequences cannot be divided evenly over 3 processes; set it to 9"),
        ({"micro_batch_size": 4}, 4, "4 times 4 processes = 16; set it to 16"),
    ],
)
def test_a_batch_that_does_not_divide(changes: dict[str, Any], processes: int, message: str) -> None:
    with pytest.raises(UnmaskError, match=message):
        batch_plan(recipe_from_dict(settings(**changes)), processes)


def test_more_processes_than_samples() -> None:
    check_enough(4, 4)
    with pytest.raises(UnmaskError, match="3 sequences for 4 processes; start at most 3"):
        check_enough(3, 4)


def test_one_process_has_nobody_to_share_with() -> None:
    with pytest.raises(UnmaskError, match="divides the model over several processes, and this is one"):
        parallel_settings(recipe_from_dict(settings(distributed__type="fsdp")), 1)


class FakeState:
    def __init__(self, distributed_type: DistributedType):
        self.distributed_type = distributed_type


def fsdp_arguments(folder: Path) -> TrainingArguments:
    wanted = parallel_settings(recipe_from_dict(settings(distributed__type="fsdp")), 2)
    return TrainingArguments(output_dir=str(folder), use_cpu=True, bf16=True, **wanted)


def test_fsdp_is_refused_where_accelerate_would_run_ddp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "PartialState", lambda: FakeState(DistributedType.MULTI_CPU))
    with pytest.raises(UnmaskError, match="there is no accelerator, and on CPUs the model is not divided"):
        settle(fsdp_arguments(tmp_path))


def test_fsdp_rounds_neither_the_loss_nor_what_masks_are_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "PartialState", lambda: FakeState(DistributedType.MULTI_GPU))
    args = fsdp_arguments(tmp_path)
    settle(args)
    plugin = cast(Any, args.fsdp_plugin_args)
    policy = plugin["mixed_precision_policy"]
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert policy.output_dtype is None and not policy.cast_forward_inputs
    assert plugin["fsdp_version"] == 2 and plugin["state_dict_type"] == "SHARDED_STATE_DICT"
    # Gradients of micro-batches are added up in parts: whole ones would be as large as the model.
    accumulation = cast(Any, args.accelerator_config).gradient_accumulation_kwargs
    assert accumulation == {"sync_each_batch": True}


def test_torch_compile_arrives(tmp_path: Path) -> None:
    args = training_arguments(recipe_from_dict(settings(str(tmp_path), torch_compile=True)))
    assert args.torch_compile
    assert not training_arguments(recipe_from_dict(settings(str(tmp_path)))).torch_compile


# DeepSpeed is not installed where the tests run: its files are checked, and that it is missed.


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_deepspeed_files(name: str, stage: int) -> None:
    config = read_deepspeed(ROOT / "recipes" / f"deepspeed_{name}.json")
    assert config["zero_optimization"]["stage"] == stage
    # What the recipe says and transformers fills in.
    for key in ("gradient_clipping", "train_micro_batch_size_per_gpu", "train_batch_size"):
        assert config[key] == "auto"
    assert config["bf16"] == {"enabled": "auto"}


def test_deepspeed_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "find_spec", lambda name: None)
    file = ROOT / "recipes" / "deepspeed_zero3.json"
    changes = {"distributed__type": "deepspeed", "distributed__deepspeed_config": str(file)}
    with pytest.raises(UnmaskError, match="DeepSpeed is not installed; pip install deepspeed"):
        parallel_settings(recipe_from_dict(settings(**changes)), 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "cannot be read: not valid JSON"),
        ("[]", "zero_optimization.stage must be 1, 2 or 3; got None"),
        ('{"zero_optimization": {"stage": 5}}', "stage must be 1, 2 or 3; got 5"),
        (
            '{"zero_optimization": {"stage": 2}, "optimizer": {}}',
            "remove 'optimizer': the recipe's optimizer",
        ),
        ('{"zero_optimization": {"stage": 2}, "fp16": {"enabled": true}}', "fp16 is not supported"),
    ],
)
def test_deepspeed_files_that_cannot_be_used(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "zero.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UnmaskError, match=message):
        read_deepspeed(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distributed__type": "deepspeed"}, "distributed.deepspeed_config: missing"),
        ({"distributed__deepspeed_config": "a.json"}, "deepspeed_config has no effect with .* ddp"),
        (
            {
                "distributed__type": "deepspeed",
                "distributed__deepspeed_config": "a.json",
                "evaluation__prompts": "p.jsonl",
            },
            "evaluation.prompts: prompts cannot be answered under distributed.type: deepspeed",
        ),
    ],
)
def test_recipes_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnmaskError, match=message):
        recipe_from_dict(settings(**changes))
