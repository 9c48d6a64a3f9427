"""An error names the place that explains it; docs/troubleshooting.md explains what unmask says, and nothing else."""

from __future__ import annotations

import ast
import errno
import json
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import torch
from tiny import autoregressive_folder, run_cli

from unmask import cli
from unmask.errors import UnmaskError
from unmask.explain import TROUBLESHOOTING, docs_folder, headings, help_page, matches

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / TROUBLESHOOTING
HEADINGS = headings(PAGE.read_text(encoding="utf-8"))
# What pip and shells say.
FOREIGN = {
    "requires a different Python",
    "No matching distribution found for torch",
    "unmask: command not found",
}
RECORD = {"instruction": "Say a", "output": "a"}
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
RECORDS = {
    "blank.jsonl": json.dumps({**RECORD, "output": " "}),
    "surrogate.jsonl": json.dumps({**RECORD, "output": "\ud83d"}),
    "role.jsonl": json.dumps({"messages": [USER, {"role": "robot", "content": "a"}]}),
    "order.jsonl": json.dumps({"messages": [ANSWER, USER]}),
    "both.jsonl": json.dumps({**RECORD, "response": "b"}),
    "twice.jsonl": '{"instruction": "a", "instruction": "b", "output": "c"}',
    "ragged.csv": "instruction,output\na,b,c\n",
    "not.parquet": "words",
    "x.zip": "PK",
}
RECIPE = """\
training_mode: sft
model: {name_or_path: diffusion}
data: {dataset_name: good.jsonl, block_size: 64}
global_batch_size: 4
max_steps: 1
save_steps: 1
precision: fp32
report_to: []
checkpoint_save_dir: run
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a newcomer's folder may have: a base, what was made of it, a run, and files that are broken."""
    root = tmp_path_factory.mktemp("explain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        autoregressive_folder(root / "base")
        assert run_cli("convert", "base", "diffusion").code == 0
        Path("recipe.yaml").write_text(RECIPE)
        Path("good.jsonl").write_text((json.dumps(RECORD) + "\n") * 8)
        said = run_cli("train", "recipe.yaml").out
        assert "computed on: 1 x cpu, fp32" in said and "from diffusion: " in said
        Path("bad.yaml").write_text("a\n b: [")
        Path("broken.jsonl").write_text('{"instruction": "a", "output": }\n')
        Path("fields.jsonl").write_text('{"question": "a", "answer": "b"}\n')
        Path("empty.jsonl").write_text("\n")
        for name, text in RECORDS.items():
            Path(name).write_text(text)
        Path("gone.jsonl").symlink_to("nowhere.jsonl")
        Path("half.jsonl").write_text('{"instruction": "a"}\n')
        Path("number.jsonl").write_text('{"instruction": "a", "output": 7}\n')
        Path("nan.jsonl").write_text('{"instruction": "a", "output": NaN}\n')
        Path("array.jsonl").write_text(json.dumps([RECORD], indent=1))
        Path("object.json").write_text(json.dumps({"data": [RECORD]}, indent=1))
        Path("spread.jsonl").write_text(json.dumps(RECORD, indent=1) + "\n" + json.dumps(RECORD, indent=1))
        Path("mac.jsonl").write_bytes((json.dumps(RECORD) + "\r").encode() * 2)
        Path("utf16.jsonl").write_bytes(json.dumps(RECORD).encode("utf-16"))
        Path("json.csv").write_text(json.dumps(RECORD) + "\n")
        Path("table.jsonl").write_text("instruction,output\na,b\n")
        Path("semicolon.csv").write_text("instruction;output\na;b\n")
        Path("latin.jsonl").write_bytes(b'{"instruction": "caf\xe9", "output": "b"}\n')
        Path("long.jsonl").write_text(json.dumps({"instruction": "x" * 300, "output": "b"}) + "\n")
        Path("text.docx").write_text("words")
        Path("folder").mkdir()
        shutil.copytree("diffusion", "other")
        Path("other/config.json").write_text('{"model_type": "whale"}')
        shutil.copytree("diffusion", "quantised")
        config = json.loads(Path("diffusion/config.json").read_text())
        Path("quantised/config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
        shutil.copytree("diffusion", "plain")
        Path("plain/chat_template.jinja").unlink(missing_ok=True)
        shutil.copytree("diffusion", "cut")
        whole = Path("cut/model.safetensors").read_bytes()
        Path("cut/model.safetensors").write_bytes(whole[: len(whole) // 2])
        shutil.copytree("base", "no_end")
        told = json.loads(Path("no_end/tokenizer_config.json").read_text())
        Path("no_end/tokenizer_config.json").write_text(
            json.dumps({name: value for name, value in told.items() if name != "eos_token"})
        )
    return root


NEW = "checkpoint_save_dir=new"
PROVOKED = {
    "trian recipe.yaml": "No such command …",
    "generate diffusion --promt a": "No such option: …",
    "generate": "Missing argument …",
    "generate diffusion hello": "Got unexpected extra argument(s) (…)",
    "train max_steps=3 recipe.yaml": "the recipe comes first: …",
    "train nope.yaml": "…: no such recipe file",
    "train bad.yaml": "…: cannot be read as a recipe: …",
    "train folder": "…: cannot be read as a recipe: …",
    f"train recipe.yaml {NEW} max_step=3": "unknown key …",
    f"train recipe.yaml {NEW} max_steps 3": "… is not key=value; …",
    f"train recipe.yaml {NEW} max_steps = 3": "… is not key=value; …",
    f"train recipe.yaml {NEW} data=good.jsonl": "…: a group of keys; …",
    "recipe show nope": "no recipe … comes with unmask; …",
    "generate diffusion --prompts good.jsonl --out good.jsonl": "--out: … exists already; …",
    f"train recipe.yaml {NEW} max_steps=ten": "Input should be …",
    f"train recipe.yaml {NEW} eval_steps=1": "eval_steps: needs data.eval_size or data.eval_dataset_name",
    f"train recipe.yaml {NEW} micro_batch_size=3": "global_batch_size: must be a multiple of micro_batch_size",
    f"train recipe.yaml {NEW} data.dataset_name=god.jsonl": "…: no such file",
    f"train recipe.yaml {NEW} data.dataset_name=broken.jsonl": "not valid JSON",
    f"train recipe.yaml {NEW} data.dataset_name=fields.jsonl": "no known format has these fields: …",
    **{
        f"data recipe.yaml data.dataset_name={file}": heading
        for file, heading in {
            "blank.jsonl": "field '…' is empty; …",
            "surrogate.jsonl": "field '…' has an unpaired surrogate…",
            "role.jsonl": "unknown …; expected one of system, …",
            "order.jsonl": "turns out of order: …",
            "both.jsonl": "… contradict one another",
            "twice.jsonl": "… is given twice; …",
            "ragged.csv": "more cells than the header has names",
            "not.parquet": "not a readable … file",
            "x.zip": "…: an archive; unpack it and name the folder.",
            "gone.jsonl": "…: no such file: a link to …, which is not there.",
            "half.jsonl": "field '…' is missing…",
            "number.jsonl": "field '…' must be …",
            "nan.jsonl": "field '…' must be …",
            "array.jsonl": "the file is one JSON array; …",
            "object.json": "the file is one JSON object, not a list of records; …",
            "spread.jsonl": "a record is spread over several lines; …",
            "mac.jsonl": "the lines end in CR alone; …",
            "utf16.jsonl": "the file is UTF-16; …",
            "json.csv": "the file looks like JSON, not a table; …",
            "table.jsonl": "the file looks like a table, not JSON; …",
            "semicolon.csv": "the cells are separated by …, not as in a … file; …",
        }.items()
    },
    f"train recipe.yaml {NEW} data.dataset_name=empty.jsonl": "…: the file has no records.",
    f"train recipe.yaml {NEW} data.dataset_name=latin.jsonl": "not UTF-8 text",
    f"train recipe.yaml {NEW} data.dataset_name=long.jsonl": "no record can be used: …",
    f"train recipe.yaml {NEW} data.dataset_name=folder": "the folder has no file of a known kind",
    f"train recipe.yaml {NEW} data.dataset_name=text.docx": "…: not a file of records; expected …",
    f"train recipe.yaml {NEW} data.eval_size=9": (
        "data.eval_size: … are to be held out, but there are only …"
    ),
    f"train recipe.yaml {NEW} data.block_size=9999": (
        "data.block_size: … tokens exceed the model's … positions"
    ),
    "train recipe.yaml": "checkpoint_save_dir: … holds a run already; …",
    "train recipe.yaml resume_from_checkpoint=auto seed=5": "resume_from_checkpoint: …",
    f"train recipe.yaml {NEW} model.name_or_path=no_end": "the tokenizer has no … token (…); …",
    "generate some/name --prompt a": "…: no such local file or folder, and …",
    "generate base --prompt a": "…: this is an autoregressive checkpoint; …",
    "generate run --prompt a": "…: this folder is not a checkpoint: it has no config.json; …",
    "score good.jsonl diffusion": "…: a … is a folder; this is a file…",
    "generate other --prompt a": "…: model_type … is not supported…",
    "generate quantised --prompt a": "…: the weights are quantised; …",
    "generate plain --prompt a": "the tokenizer has no chat template; …",
    "generate cut --prompt a": "the file is damaged or incomplete, copy it again.",
    "convert diffusion out": "…: this is a diffusion checkpoint already; nothing to convert.",
    "convert base diffusion": "…: exists already; …",
    "merge diffusion out": "not a folder of LoRA adapters: it has no …",
    "generate diffusion": "give --prompt TEXT or --prompts FILE, one of them.",
    "generate diffusion --prompt=": "the prompt is empty; …",
    "generate diffusion --prompt a --preset codda": "unknown preset …",
    "generate diffusion --prompt a --max-new-tokens 9999": (
        "… tokens and max_new_tokens = … need more than the model's … positions; …"
    ),
    "eval diffusion --tasks gsm8k --out e": (
        "its data … must be downloaded, and the hub cannot be reached; …"
    ),
    "eval diffusion --tasks unmask_humaneval --out e": (
        "it runs code that the model writes; allow it: --allow-code-execution."
    ),
}


@pytest.mark.parametrize("command", PROVOKED)
def test_an_error_names_its_line_of_the_page(
    made: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    heading, said = PROVOKED[command], run_cli(*command.split())
    assert said.code == 2 and matches(heading, said.error), said.err
    page = said.err.splitlines()[1].removeprefix("help: ")
    if "argument" in heading or "No such" in heading:
        assert re.fullmatch(r"unmask( generate)? --help", page)
        return
    file, _, line = page.rpartition(":")
    assert Path(file).expanduser() == PAGE and int(line) == HEADINGS[heading]


def test_what_cannot_be_listened_on_is_refused_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = run_cli("serve", "no/model", "--port", str(taken.getsockname()[1]))
    assert said.code == 2 and matches("--port: …", said.error) and "in use" in said.error
    assert said.err.rstrip().endswith(f":{HEADINGS['--port: …']}")


def test_a_name_that_the_hub_does_not_know_or_show(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = httpx.Response(404, request=httpx.Request("GET", "http://hub"))

    def missing(*_: object, **__: object) -> None:
        raise huggingface_hub.errors.RepositoryNotFoundError("404", response=answer)

    monkeypatch.chdir(made)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", missing)
    said = run_cli("train", "recipe.yaml", NEW, "data.dataset_name=some/nmae")
    heading = "…: neither a local file or folder nor a … on the hub that you may read …"
    assert said.code == 2 and matches(heading, said.error) and f":{HEADINGS[heading]}" in said.err


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (MemoryError(), "machine"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            "machine",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), "GPU"),
    ],
)
def test_no_memory_is_one_line(error: Exception, place: str) -> None:
    message = cli.explained(error)
    assert message is not None and message.startswith(f"the {place} is out of memory; ")
    assert (help_page(message, error) or "").endswith(f":{HEADINGS['the … is out of memory; …']}")


def test_an_error_of_the_system_names_its_file() -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "a.jsonl")
    message = cli.explained(error)
    assert message == "a.jsonl: permission denied; `ls -l` shows who may use it."
    assert (help_page(message, error) or "").endswith(f":{HEADINGS['…: permission denied; …']}")
    error = IsADirectoryError(errno.EISDIR, "Is a directory", "data")
    assert cli.explained(error) == "data: is a directory."
    assert cli.explained(RuntimeError("a mistake of ours")) is None
    assert cli.explained(OSError("no file")) is None


def test_what_has_no_heading_has_the_page_of_its_part() -> None:
    from unmask.generation.config import DiffusionGenerationConfig

    with pytest.raises(UnmaskError) as raised:
        DiffusionGenerationConfig(temperature=-1.0)
    page = help_page("whatever it says", raised.value)
    assert page is not None and page.endswith("docs/generation.md")


def literals() -> Iterator[str]:
    """The texts of the source, … for what is put into them."""
    for file in ROOT.glob("unmask/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_heading_is_something_that_is_said() -> None:
    texts = list(literals())
    for heading in HEADINGS.keys() - FOREIGN - set(PROVOKED.values()):
        if heading == "computed on: 1 x cpu, …":  # what the fixture's run says
            continue
        fixed = [part for part in heading.split("…") if part.strip(" :;.,")]
        assert any(all(part in text for part in fixed) for text in texts), heading


def test_links_and_recipe_keys_of_the_page_are_there() -> None:
    from unmask.config import recipe_fields

    text = PAGE.read_text(encoding="utf-8")
    assert docs_folder() == PAGE.parent
    assert all((PAGE.parent / link).is_file() for link in re.findall(r"\]\(([\w.]+\.md)\)", text))
    keys = set(re.findall(r"\b((?:model|data|lora|optimizer|distributed)\.[a-z_.]+)=", text))
    assert keys and keys <= set(recipe_fields())
