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

from unmask.config import Recipe, load_recipe, recipe_fields, recipe_from_dict
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


def test_defaults(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.seed == 0 and recipe.max_steps == 1000 and recipe.global_batch_size == 32
    assert recipe.optimizer.learning_rate == 1e-4
    assert recipe.data.sft.instruction_response_separator == "\n\n### Response:\n"
    assert recipe.data.sft.custom_format.response_field == "response"
    assert recipe.report_to == ["tensorboard"]
    assert recipe.evaluation.prompts is None


def test_overrides_apply_in_order(recipe_file: Path) -> None:
    recipe = load_recipe(
        str(recipe_file),
        [
            "max_steps=5",
            "max_steps=7",
            "optimizer.learning_rate=1e-3",
            "data.dataset_name=[a.json,b.json]",
            "data.sft.include_system_prompt=false",
            'data.sft.instruction_response_separator="\\n## Answer:\\n"',
            "report_to=[]",
            "micro_batch_size=null",
            "checkpoint_save_dir=out/a=b",
        ],
    )
    assert recipe.max_steps == 7
    assert recipe.optimizer.learning_rate == 1e-3
    assert recipe.data.dataset_name == ["a.json", "b.json"]
    assert recipe.data.sft.include_system_prompt is False
    assert recipe.data.sft.instruction_response_separator == "\n## Answer:\n"
    assert recipe.report_to == []
    assert recipe.checkpoint_save_dir == "out/a=b"


def test_override_from_random_weights(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        ["model.name_or_path=null", "model.tokenizer=bytes", "model.config.hidden_size=64"],
    )
    assert recipe.model.config == {"model_type": "qwen3", "hidden_size": 64}


def test_numbers_that_yaml_reads_as_texts(recipe_file: Path) -> None:
    recipe_file.write_text(BASE + "optimizer: {learning_rate: '2e-4', epsilon: 1e-6}\n")
    recipe = load_recipe(recipe_file, ["max_steps=1e3"])
    assert recipe.optimizer.learning_rate == 2e-4
    assert recipe.optimizer.epsilon == 1e-6
    assert recipe.max_steps == 1000 and isinstance(recipe.max_steps, int)
    assert recipe_from_dict(small(optimizer={"learning_rate": "1e-4"})) == recipe_from_dict(small())


def test_interpolation_resolves(recipe_file: Path) -> None:
    recipe_file.write_text(BASE + "seed: 3\ncheckpoint_save_dir: outputs/seed${seed}\n")
    assert load_recipe(recipe_file, ["seed=4"]).checkpoint_save_dir == "outputs/seed4"


def test_empty_group_has_its_defaults(recipe_file: Path) -> None:
    recipe_file.write_text(BASE + "  sft:\noptimizer:\n")
    assert load_recipe(recipe_file).optimizer == load_recipe(recipe_file).optimizer
    assert load_recipe(recipe_file).data.sft.end_fill == 1


def test_yaml_is_complete_and_round_trips(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["optimizer.learning_rate=3e-5", "data.sft.layout=separator"])
    text = recipe.to_yaml()
    for field in recipe_fields():
        assert f"{field.key.rsplit('.', 1)[-1]}:" in text or "[]" in field.key
    copy = tmp_path / "copy.yaml"
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
    assert isinstance(tree, dict)
    assert tree["checkpoint_save_dir"] == text + tail


def test_missing_file() -> None:
    assert failure("nowhere.yaml") == "nowhere.yaml: no such recipe file"


def test_folder_and_binary_file(tmp_path: Path) -> None:
    assert "cannot be read as a recipe: Is a directory" in failure(tmp_path)
    binary = tmp_path / "x.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert failure(binary).count("x.yaml: cannot be read as a recipe: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nmodel: [a\nb: 2\n", r"line 3: "),
        ("seed: 1\nseed: 2\n", r"line 2: cannot be read as a recipe: found duplicate key seed"),
        ("- a\n- b\n", r"expected keys such as 'max_steps: 1000'; got a list"),
        ("3\n", r"cannot be read as a recipe: "),
        ("seed: ${nope}\n", r"run.yaml: seed: Interpolation key 'nope' not found"),
        ("seed: ${\n", r"broken \$\{...\} in a value; write a literal one as \\\$\{"),
        ("hello\n", r"unknown key 'hello'"),
        ("1: 2\n", r"unknown key '1'"),
        ("x: !!python/object:os.x {}\n", r"line 1: cannot be read as a recipe: could not determine"),
        ("", "run.yaml: give exactly one of model.name_or_path"),
    ],
)
def test_broken_file(recipe_file: Path, text: str, message: str) -> None:
    recipe_file.write_text(text)
    assert re.search(message, failure(recipe_file))


@pytest.mark.parametrize(
    ("override", "known"),
    [
        ("optimizer.learnin_rate=1", "optimizer.learning_rate"),
        ("optimiser.learning_rate=1", "optimizer.learning_rate"),
        ("learning_rate=1", "optimizer.learning_rate"),
        ("model.block_size=8", "data.block_size"),
        ("sft.layout=chat", "data.sft.layout"),
        ("data.instruction_field=q", "data.sft.custom_format.instruction_field"),
        ("sft=3", "data.sft"),
        ("--max_steps=3", "max_steps"),
        ("max_step=3", "max_steps"),
    ],
)
def test_unknown_key_names_the_nearest(recipe_file: Path, override: str, known: str) -> None:
    key = override.split("=")[0]
    expected = f"unknown key '{key}'; did you mean '{known}'?"
    assert failure(recipe_file, override) == f"override '{override}': {expected}"


def test_unknown_key_in_the_file(recipe_file: Path) -> None:
    recipe_file.write_text(BASE + "optimizer: {learnin_rate: 1e-4}\n")
    assert failure(recipe_file) == (
        "run.yaml: unknown key 'optimizer.learnin_rate'; did you mean 'optimizer.learning_rate'?"
    )
    recipe_file.write_text(BASE + "zzz: 1\n")
    assert failure(recipe_file) == ("run.yaml: unknown key 'zzz'; docs/recipes.md lists the known ones")


@pytest.mark.parametrize(
    "override",
    [
        "max_steps=abc",
        "max_steps=0",
        "max_steps=1.5",
        "max_steps=",
        "model.attn_implementation=flash_attention_2",
        "seed=true",
        "seed=-1",
        "micro_batch_size=x",
        "data.block_size=1",
        "data.dataset_name=[]",
        "data.dataset_name=[1]",
        "model.noise_eps=1",
        "model.noise_eps=0",
        "model.noise_eps=[0.1,0]",
        "model.prefix_probability=1.5",
        "model.truncate_probability=[0.1,-0.1]",
        "model.block_masking_probability=[]",
        "model.block_masking_probability=true",
        "model.mask_block_sizes=[1]",
        "model.mask_block_sizes=[]",
        "model.mask_block_sizes=[[2],[]]",
        "model.mask_block_sizes=[2,[4]]",
        "model.mask_block_sizes=4",
        "model.loss=elbow",
        "model.masking_scheduler.source_steps=-1",
        "model.masking_scheduler=linear",
        "optimizer.learning_rate=.nan",
        "optimizer=adamw",
        "precision=fp16",
        "gradient_checkpointing=3",
        "report_to=none",
        "model.config=3",
    ],
)
def test_wrong_value(recipe_file: Path, override: str) -> None:
    key = override.partition("=")[0]
    assert failure(recipe_file, override).startswith(f"override '{override}': {key}: expected ")


@pytest.mark.parametrize("override", ["foo", "=3", "a..b=3", "a[0]=3", "", "max_steps 3"])
def test_malformed_override(recipe_file: Path, override: str) -> None:
    assert failure(recipe_file, override).startswith(f"'{override}' is not key=value; ")


def test_override_that_cannot_be_applied(recipe_file: Path) -> None:
    assert failure(recipe_file, "seed=[1").startswith("override 'seed=[1': ")
    assert failure(recipe_file, "seed=${").startswith("override 'seed=${': ")
    assert failure(recipe_file, "data=[1]").startswith("override 'data=[1]': ")


def test_several_errors_show_the_first_and_count() -> None:
    with pytest.raises(UnmaskError) as caught:
        recipe_from_dict(small(seed="x", max_steps="y", data={"dataset_nme": "a"}), where="here")
    assert str(caught.value) == (
        "here: unknown key 'data.dataset_nme'; did you mean 'data.dataset_name'? (and 2 more)"
    )


def test_missing_key() -> None:
    with pytest.raises(UnmaskError, match=r"^recipe: data.dataset_name: missing; give it, or data.sources"):
        recipe_from_dict({"model": {"name_or_path": "x"}})
    with pytest.raises(UnmaskError, match=r"recipe: recipe: expected a group of keys; got 'x'"):
        recipe_from_dict("x")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ("global_batch_size=10 micro_batch_size=3", "micro_batch_size"),
        ("lr_scheduler.type=constant lr_scheduler.warmup_steps=1", "lr_scheduler.warmup_steps"),
        ("optimizer.type=adafactor optimizer.beta1=0.5", "optimizer.beta1"),
        ("optimizer.type=adafactor distributed.type=fsdp", "optimizer.type"),
        ("lora.r=4 optimizer.type=muon", "optimizer.type"),
        ("lora.r=4 model.freeze_embeddings=true", "model.freeze_embeddings"),
        (f"lora.r=4 {SCRATCH}", "lora.r"),
        ("lora.alpha=4", "lora.alpha"),
        ("resume.allow=[seed]", "resume.allow"),
        ("resume_from_checkpoint=auto resume.allow=[sed]", "resume.allow"),
        ("eval_steps=5", "eval_steps"),
        ("early_stopping_patience=2", "early_stopping_patience"),
        (
            "model.prefix_probability=[0,0.6] model.truncate_probability=[0.1,0.2,0.5]",
            "model.prefix_probability + model.truncate_probability must be at most 1, since a sequence takes"
            " at most one of them; got 0.6 + 0.5 in epoch 3",
        ),
        ("model.block_masking_probability=1 model.mask_block_sizes=[[2],[8],[4]]", "model.mask_block_sizes"),
        ("model.mask_block_sizes=[2]", "model.mask_block_sizes"),
        (
            "model.prefix_probability=[0.1] model.masking_scheduler.schedule_type=linear",
            "model.prefix_probability",
        ),
        ("model.masking_scheduler.schedule_type=linear", "model.masking_scheduler.schedule_type"),
        ("model.masking_scheduler.max_schedule_steps=9", "model.masking_scheduler.max_schedule_steps"),
        ("training_mode=pretrain model.masking_scheduler.source_steps=2", "masking_scheduler.source_steps"),
        ("global_batch_size=1 model.time_sampling=low_discrepancy", "model.time_sampling"),
        ("model.noise_schedule=cosine model.complementary_masks=true", "model.noise_schedule"),
        ("model.loss=diffullama model.complementary_masks=true", "model.loss"),
        ("model.noise_eps=[0.5,0.1] model.complementary_masks=true", "model.noise_eps"),
        ("model.noise_eps=[0.5,0.1] data.streaming=true", "model.noise_eps"),
        ("model.attention=bidirectional model.block_length=4", "model.block_length"),
        (f"{SCRATCH} model.block_length=4", "model.block_length"),
        (f"{SCRATCH} model.attention=block_causal", "model.block_length"),
        ("model.attention=block_causal model.attention_annealing_steps=3", "model.attention_annealing_steps"),
        ("model.attention=block_causal model.loss=cart", "model.loss"),
        ("data.block_size=64 model.attention=block_causal model.block_length=65", "model.block_length = 65"),
        (
            "training_mode=pretrain data.block_size=64 model.attention=block_causal model.block_length=24",
            "data.block_size must be a multiple of model.block_length = 24",
        ),
        ("data.eval_size=5 data.eval_dataset_name=x", "data.eval_size"),
        ("training_mode=pretrain data.sft.layout=chat", "data.sft.layout"),
        ("training_mode=pretrain evaluation.prompts=x", "evaluation.prompts"),
        ("data.text_field=body", "data.text_field"),
        ("training_mode=pretrain data.long_documents=cut", "data.long_documents"),
        ("data.packing=true data.long_documents=cut", "data.long_documents"),
        (
            "data.sft.layout=chat data.sft.instruction_response_separator=x",
            "data.sft.instruction_response_separator",
        ),
        ("data.sft.custom_format.input_field=x", "data.sft.custom_format"),
        ("data.shuffle_buffer=5", "data.shuffle_buffer"),
        ("data.streaming=true data.max_records=5", "data.max_records"),
        ("data.on_source_end=stop", "data.on_source_end"),
        ("data.dataset_name=null", "data.dataset_name: missing"),
        ("model.config.hidden_size=8", "model.config (start from random weights); got both"),
        ("model.name_or_path=null", "got neither"),
        ("model.name_or_path=null model.config.hidden_size=8", "model.tokenizer: missing"),
        (
            "model.name_or_path=null model.tokenizer=bytes model.config.model_type=gpt2",
            "model.config.model_type: expected qwen3, qwen2 or llama; got 'gpt2'",
        ),
    ],
)
def test_settings_that_contradict(recipe_file: Path, overrides: str, key: str) -> None:
    got = failure(recipe_file, *overrides.split())
    assert got.startswith(("run.yaml: ", "override '")) and key in got


@pytest.mark.parametrize(
    "overrides",
    [
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
        "model.mask_block_sizes=[2,4,8]",
    ],
)
def test_curricula_that_make_sense_round_trip(recipe_file: Path, tmp_path: Path, overrides: str) -> None:
    recipe = load_recipe(recipe_file, overrides.split())
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(copy) == recipe


def test_sft_defaults_written_out_are_fine_when_pretraining(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(recipe_from_dict(small()).to_yaml(), encoding="utf-8")
    assert load_recipe(file).training_mode == "pretrain"


def test_recipe_is_frozen() -> None:
    recipe = recipe_from_dict(small())
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
    assert recipe.model_copy(update={"seed": 1}).seed == 1


def test_every_key_is_documented() -> None:
    fields = recipe_fields()
    assert len({field.key for field in fields}) == len(fields) > 50
    for field in fields:
        assert field.meaning and field.accepts and "\n" not in field.meaning, field
    assert [field.key for field in fields if field.default is ...] == ["data.sources[].dataset_name"]
    assert set(Recipe.model_fields) >= {"training_mode", "global_batch_size", "max_steps", "seed"}


def test_formats_are_those_of_the_data_stage() -> None:
    accepts = {field.key: field.accepts for field in recipe_fields()}["data.sft.format"]
    assert accepts.split(", ") == list(FORMATS)


def test_import_stays_light() -> None:
    code = "import sys, unmask.config; print({'torch', 'transformers', 'datasets'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


SOURCE = {"dataset_name": "a.jsonl"}


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"sources": [{**SOURCE, "weight": 0}]}, "data.sources.0.weight: expected number > 0; got 0"),
        ({"sources": [SOURCE, {**SOURCE, "epochs": 0}]}, "data.sources.1.epochs"),
        ({"sources": [{"weight": 1}]}, "data.sources.0.dataset_name: missing"),
        ({"sources": []}, "data.sources: expected list of group of keys or null; got []"),
        ({"sources": ["a"]}, "data.sources.0: expected a group of keys; got 'a'"),
        ({"sources": [SOURCE, {**SOURCE, "weight": 2}]}, "data.sources.1: a.jsonl is a source already"),
        ({"sources": [SOURCE], "dataset_name": "a"}, "data.dataset_name"),
        ({"sources": [SOURCE], "split": "x"}, "data.split"),
        ({"sources": [SOURCE], "eval_size": 3}, "data.eval_size"),
        ({"sources": [{**SOURCE, "epochs": 1}], "on_source_end": "stop"}, "data.on_source_end"),
        ({"sources": [{**SOURCE, "format": "alpaca"}]}, "data.sources.0.format"),
        ({"sources": [{**SOURCE, "custom_format": {"input_field": "x"}}]}, "data.sources.0.custom_format"),
    ],
)
def test_sources_that_cannot_be(data: dict[str, Any], key: str) -> None:
    with pytest.raises(UnmaskError, match=r"^recipe: ") as caught:
        recipe_from_dict({"model": {"config": {}, "tokenizer": "bytes"}, "data": data})
    assert key in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_of_one_source_can_be_overridden(tmp_path: Path) -> None:
    recipe = recipe_from_dict(
        {"model": {"config": {}, "tokenizer": "bytes"}, "data": {"sources": [SOURCE, {"dataset_name": "b"}]}}
    )
    file = tmp_path / "r.yaml"
    file.write_text(recipe.to_yaml())
    assert recipe.data.sources is not None and load_recipe(file) == recipe
    changed = load_recipe(file, ["data.sources.1.weight=3"]).data.sources
    assert changed is not None and [source.weight for source in changed] == [1.0, 3.0]
    with pytest.raises(UnmaskError, match=r"override 'data.sources.2.weight=3'"):
        load_recipe(file, ["data.sources.2.weight=3"])


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_three_steps_of_every_shipped_recipe(file: Path) -> None:
    from unmask.training.build import make_curriculum, schedule_notes
    from unmask.training.optim import warmup_steps

    recipe = load_recipe(file, ["max_steps=3"])
    assert warmup_steps(recipe) == 1 and make_curriculum(recipe)
    [note] = [note for note in schedule_notes(recipe, rows=1000) if "warmup" in note]
    assert "lr_scheduler.warmup_steps" in note and "max_steps = 3" in note
