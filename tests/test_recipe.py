"""The recipe: files, overrides, defaults, and every kind of mistake named by its key."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from unmask.config import load_recipe, recipe_fields, recipe_from_dict
from unmask.data.records import FORMATS
from unmask.errors import UnmaskError

BASE = """\
training_mode: sft
model:
  name_or_path: base
data:
  dataset_name: train.jsonl
"""
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SCRATCH = "model.name_or_path=null model.tokenizer=bytes model.config.hidden_size=8"


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = Path("run.yaml")
    file.write_text(BASE, encoding="utf-8")
    return file


def failure(path: Path | str, *overrides: str) -> str:
    """The message, which must be one line."""
    with pytest.raises(UnmaskError) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def small(**changes: Any) -> dict[str, Any]:
    return {"model": {"name_or_path": "base"}, "data": {"dataset_name": "a.txt"}, **changes}


def test_defaults_and_overrides_in_order(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert (recipe.seed, recipe.max_steps, recipe.global_batch_size) == (0, 1000, 32)
    assert recipe.optimizer.learning_rate == 1e-4 and recipe.report_to == ["tensorboard"]
    assert recipe.data.sft.instruction_response_separator == "\n\n### Response:\n"
    recipe = load_recipe(
        str(recipe_file),
        [
            "max_steps=5",
            "max_steps=1e3",
            "optimizer.learning_rate=1e-3",
            "data.dataset_name=[a.json,b.json]",
            'data.sft.instruction_response_separator="\\n## Answer:\\n"',
            "report_to=[]",
            "micro_batch_size=null",
            "checkpoint_save_dir=out/a=b${seed}",
            *SCRATCH.split(),
            "seed=4",
        ],
    )
    assert recipe.max_steps == 1000 and isinstance(recipe.max_steps, int)
    assert recipe.optimizer.learning_rate == 1e-3
    assert recipe.data.dataset_name == ["a.json", "b.json"] and recipe.report_to == []
    assert recipe.data.sft.instruction_response_separator == "\n## Answer:\n"
    assert recipe.checkpoint_save_dir == "out/a=b4"
    assert recipe.model.config == {"model_type": "qwen3", "hidden_size": 8}
    assert recipe_from_dict(small(optimizer={"learning_rate": "1e-4"})) == recipe_from_dict(small())
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_empty_group_has_its_defaults(recipe_file: Path) -> None:
    recipe_file.write_text(BASE + "  sft:\noptimizer:\n")
    assert load_recipe(recipe_file, ["data.sft.end_fill=2"]).data.sft.end_fill == 2
    assert load_recipe(recipe_file).optimizer.beta1 == 0.9


@pytest.mark.parametrize(
    "overrides",
    [
        "optimizer.learning_rate=3e-5 data.sft.layout=separator",
        "training_mode=pretrain",  # the defaults of what is for SFT alone are written out, too
        "model.prefix_probability=[0.5,0] model.truncate_probability=[0.5,1]",
        "model.prefix_probability=0.5 model.truncate_probability=0.5",
        "model.block_masking_probability=[0,0.1] model.mask_block_sizes=[[2],[2],[4,2]]",
        "model.block_masking_probability=0.1 model.mask_block_sizes=[[2],[4]]"
        " model.masking_scheduler.max_schedule_steps=1000",
        "model.prefix_probability=0.2 model.masking_scheduler.schedule_type=linear"
        " model.noise_eps=[0.1,0.01]",
        "model.attention=block_causal model.block_length=24 data.block_size=64",  # "sft"
        "model.attention=block_causal",  # of the length that the checkpoint says
        "model.block_length=8",  # for a checkpoint that is block-causal
    ],
)
def test_yaml_is_complete_and_round_trips(recipe_file: Path, overrides: str) -> None:
    recipe = load_recipe(recipe_file, overrides.split())
    text = recipe.to_yaml()
    assert all(f"{key.rsplit('.', 1)[-1]}:" in text for key in recipe_fields() if "[]" not in key)
    copy = Path("copy.yaml")
    copy.write_text(text, encoding="utf-8")
    assert load_recipe(copy) == recipe


@settings(deadline=None, max_examples=50)
@given(
    st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=20),
    st.sampled_from(["", "${x}", "\\${x}", "\\\\${x}", "\n", "1e-4", "yes", "# a", "a: b", " "]),
)
def test_any_text_round_trips(text: str, tail: str) -> None:
    recipe = recipe_from_dict(small(checkpoint_save_dir=text + tail))
    tree = OmegaConf.to_container(OmegaConf.load(io.StringIO(recipe.to_yaml())), resolve=True)
    assert isinstance(tree, dict) and tree["checkpoint_save_dir"] == text + tail


def test_a_key_of_one_source_can_be_overridden(tmp_path: Path) -> None:
    data = {"sources": [SOURCE, {"dataset_name": "b"}]}
    recipe = recipe_from_dict({"model": {"config": {}, "tokenizer": "bytes"}, "data": data})
    file = tmp_path / "r.yaml"
    file.write_text(recipe.to_yaml())
    assert load_recipe(file) == recipe
    changed = load_recipe(file, ["data.sources.1.weight=3"]).data.sources
    assert changed is not None and [source.weight for source in changed] == [1.0, 3.0]
    assert failure(file, "data.sources.2.weight=3").startswith("override 'data.sources.2.weight=3'")


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_three_steps_of_every_shipped_recipe(file: Path) -> None:
    from unmask.training.build import make_curriculum, schedule_notes
    from unmask.training.optim import warmup_steps

    recipe = load_recipe(file, ["max_steps=3"])
    assert warmup_steps(recipe) == 1 and make_curriculum(recipe)
    [note] = [note for note in schedule_notes(recipe, rows=1000) if "warmup" in note]
    assert "lr_scheduler.warmup_steps" in note and "max_steps = 3" in note


def test_every_key_is_documented() -> None:
    fields = recipe_fields()
    assert len(fields) > 50 and all(field["description"] for field in fields.values())
    assert [key for key, field in fields.items() if "default" not in field] == ["data.sources[].dataset_name"]
    assert fields["data.sft.format"]["enum"] == list(FORMATS)


def test_import_stays_light() -> None:
    code = "import sys, unmask.config; print({'torch', 'transformers', 'datasets'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Mistakes.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"seed: 1\nmodel: [a\nb: 2\n", r"line 3: "),
        (b"seed: 1\nseed: 2\n", r"line 2: .*seed"),
        (b"- a\n- b\n", r"got a list"),
        (b"3\n", r"cannot be read as a recipe: "),
        (b"\xff\xfe\x00", r"cannot be read as a recipe: "),
        (b"seed: ${nope}\n", r"run.yaml: seed: Interpolation key 'nope' not found"),
        (b"seed: ${\n", r"write a literal one as \\\$\{"),
        (b"hello\n", r"unknown key 'hello'"),
        (b"1: 2\n", r"unknown key '1'"),
        (b"x: !!python/object:os.x {}\n", r"line 1: could not determine"),
        (b"", "run.yaml: model.name_or_path: give exactly one"),
    ],
)
def test_broken_file(recipe_file: Path, text: bytes, message: str) -> None:
    recipe_file.write_bytes(text)
    assert re.search(message, failure(recipe_file))


def test_no_file(tmp_path: Path) -> None:
    shown = "`unmask recipe list` lists those that come with unmask."
    assert failure("nowhere.yaml") == f"nowhere.yaml: no such recipe file; {shown}"
    assert failure("train_tiny.yaml").endswith("no such recipe file; did you mean train_tiny_sft?")
    assert "cannot be read as a recipe: a folder; name a .yaml file." in failure(tmp_path)


@pytest.mark.parametrize(
    ("override", "unknown", "known"),
    [
        ("optimizer.learnin_rate=1", "optimizer.learnin_rate", "optimizer.learning_rate"),
        ("optimiser.learning_rate=1", "optimiser", "optimizer"),
        ("learning_rate=1", "learning_rate", "optimizer.learning_rate"),
        ("model.block_size=8", "model.block_size", "data.block_size"),
        ("sft.layout=chat", "sft", "data.sft"),
        ("data.instruction_field=q", "data.instruction_field", "data.sft.custom_format.instruction_field"),
        ("--max_steps=3", "--max_steps", "max_steps"),
    ],
)
def test_unknown_key_names_the_nearest(recipe_file: Path, override: str, unknown: str, known: str) -> None:
    expected = f"override '{override}': unknown key '{unknown}'; did you mean '{known}'?"
    assert failure(recipe_file, override) == expected


def test_several_mistakes_show_one_and_a_count(recipe_file: Path) -> None:
    recipe_file.write_text("seed: x\nmax_steps: y\ndata: {dataset_nme: a}\n")
    expected = "run.yaml: unknown key 'data.dataset_nme'; did you mean 'data.dataset_name'? (and 2 more)"
    assert failure(recipe_file) == expected
    assert failure(recipe_file, "zzz=1").endswith("(and 3 more)")


WRONG = """
    max_steps=abc max_steps=0 max_steps=1.5 max_steps= model.attn_implementation=flash_attention_2 seed=true
    seed=-1 micro_batch_size=x data.block_size=1 data.dataset_name=[] data.dataset_name=[1] model.noise_eps=1
    model.noise_eps=[0.1,0] model.prefix_probability=1.5 model.truncate_probability=[0.1,-0.1]
    model.block_masking_probability=[] model.block_masking_probability=true model.mask_block_sizes=[1]
    model.mask_block_sizes=[] model.mask_block_sizes=[[2],[]] model.mask_block_sizes=[2,[4]]
    model.mask_block_sizes=4 model.masking_scheduler=linear optimizer.learning_rate=.nan optimizer=adamw
    gradient_checkpointing=3 report_to=none model.config=3 seed=[1 seed=${ data=[1]
"""


@pytest.mark.parametrize("override", WRONG.split())
def test_wrong_value(recipe_file: Path, override: str) -> None:
    assert failure(recipe_file, override).startswith(f"override '{override}': ")


@pytest.mark.parametrize("override", ["foo", "=3", "a..b=3", "a[0]=3", "", "max_steps 3"])
def test_malformed_override(recipe_file: Path, override: str) -> None:
    assert failure(recipe_file, override).startswith(f"'{override}' is not key=value; ")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ("global_batch_size=10 micro_batch_size=3", "global_batch_size"),
        ("lr_scheduler.type=constant lr_scheduler.warmup_steps=1", "lr_scheduler.warmup_steps"),
        ("optimizer.type=adafactor optimizer.beta1=0.5", "optimizer.beta1"),
        ("optimizer.type=adafactor distributed.type=fsdp", "optimizer.type"),
        ("lora.r=4 optimizer.type=muon", "optimizer.type"),
        (f"lora.r=4 {SCRATCH}", "lora.r"),
        ("lora.alpha=4", "lora.alpha"),
        ("resume.allow=[seed]", "resume.allow"),
        ("resume_from_checkpoint=auto resume.allow=[sed]", "resume.allow: unknown key 'sed'"),
        ("eval_steps=5", "eval_steps"),
        ("early_stopping_patience=2", "early_stopping_patience"),
        ("model.mask_block_sizes=[2]", "model.mask_block_sizes"),
        ("model.prefix_probability=[0.1] model.masking_scheduler.schedule_type=linear", "prefix_probability"),
        ("model.masking_scheduler.schedule_type=linear", "model.masking_scheduler.schedule_type"),
        ("model.masking_scheduler.max_schedule_steps=9", "model.masking_scheduler.max_schedule_steps"),
        ("training_mode=pretrain model.masking_scheduler.source_steps=2", "masking_scheduler.source_steps"),
        ("global_batch_size=1 model.time_sampling=low_discrepancy", "model.time_sampling"),
        ("model.noise_eps=[0.5,0.1] data.streaming=true", "model.noise_eps"),
        ("model.attention=bidirectional model.block_length=4", "model.block_length"),
        ("model.attention=block_causal model.attention_annealing_steps=3", "model.attention_annealing_steps"),
        ("model.attention=block_causal model.loss=cart", "model.loss"),
        ("data.eval_size=5 data.eval_dataset_name=x", "data.eval_size"),
        ("training_mode=pretrain data.sft.layout=chat", "data.sft.layout"),
        ("data.text_field=body", "data.text_field"),
        ("training_mode=pretrain data.long_documents=cut", "data.long_documents"),
        ("data.packing=true data.long_documents=cut", "data.long_documents"),
        ("data.sft.custom_format.input_field=x", "data.sft.custom_format"),
        ("data.shuffle_buffer=5", "data.shuffle_buffer"),
        ("data.streaming=true data.max_records=5", "data.max_records"),
        ("data.dataset_name=null", "data.dataset_name: give exactly one"),
        ("model.config.hidden_size=8", "model.name_or_path: give exactly one"),
        ("model.name_or_path=null model.config.hidden_size=8", "model.tokenizer"),
        (f"{SCRATCH} model.config.model_type=gpt2", "model.config.model_type"),
    ],
)
def test_settings_that_contradict(recipe_file: Path, overrides: str, key: str) -> None:
    got = failure(recipe_file, *overrides.split())
    assert got.startswith(("run.yaml: ", "override '")) and key in got


SOURCE = {"dataset_name": "a.jsonl"}


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"sources": [{**SOURCE, "weight": 0}]}, "data.sources.0.weight"),
        ({"sources": [{"weight": 1}]}, "data.sources.0.dataset_name: Field required"),
        ({"sources": []}, "data.sources"),
        ({"sources": ["a"]}, "data.sources.0"),
        ({"sources": [SOURCE, {**SOURCE, "weight": 2}]}, "data.sources.1: a.jsonl is a source already"),
        ({"sources": [SOURCE], "dataset_name": "a"}, "data.dataset_name"),
        ({"sources": [SOURCE], "split": "x"}, "data.split"),
        ({"sources": [SOURCE], "eval_size": 3}, "data.eval_size has no effect with data.sources; remove"),
        ({"sources": [{**SOURCE, "epochs": 1}], "on_source_end": "stop"}, "data.on_source_end"),
        ({"sources": [{**SOURCE, "format": "alpaca"}]}, "data.sources.0.format"),
        ({"sources": [{**SOURCE, "custom_format": {"input_field": "x"}}]}, "data.sources.0.custom_format"),
    ],
)
def test_sources_that_cannot_be(data: dict[str, Any], key: str) -> None:
    with pytest.raises(UnmaskError, match=r"^recipe: ") as caught:
        recipe_from_dict({"model": {"config": {}, "tokenizer": "bytes"}, "data": data})
    assert key in str(caught.value) and "\n" not in str(caught.value)
