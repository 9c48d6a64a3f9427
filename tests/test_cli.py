"""The `unmask` command in this process, and by a shell where imports and exit codes are the point."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import autoregressive_folder
from transformers.utils import logging as transformers_logging

import unmask
from unmask import cli, load_model, load_tokenizer
from unmask.errors import UnmaskError

COMMANDS = ("convert", "data", "prepare", "train", "merge", "generate", "score")


@dataclass
class Said:
    code: int
    out: str
    err: str


def run_cli(*arguments: str | Path) -> Said:
    """Run `unmask ARGUMENTS` in this process, and leave the libraries' loggers as they were."""
    verbosity, level = transformers_logging.get_verbosity(), logging.getLogger("torch").level
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["unmask", *map(str, arguments)])
        patch.setenv("COLUMNS", "110")
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main()
        finally:
            transformers_logging.set_verbosity(verbosity)
            transformers_logging.enable_progress_bar()
            logging.getLogger("torch").setLevel(level)
    code = ended.value.code
    return Said(code if isinstance(code, int) else 1, out.getvalue(), err.getvalue())


RECIPE = """\
training_mode: sft
model: {{name_or_path: {base}}}
data: {{dataset_name: {data}, block_size: 64, eval_size: 2}}
global_batch_size: 4
max_steps: 2
log_steps: 1
precision: fp32
report_to: []
checkpoint_save_dir: {out}
"""


@dataclass
class Chain:
    """Folders and what each command said, from an autoregressive base to a trained checkpoint."""

    folder: Path
    said: dict[str, Said]

    @property
    def final(self) -> Path:
        return self.folder / "run" / "final"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    folder = tmp_path_factory.mktemp("chain")
    base = autoregressive_folder(folder / "base")
    records = [{"instruction": f"Say {n}", "output": f"{n}!"} for n in range(10)]
    records.append({"instruction": "x" * 100, "output": "gone"})
    (folder / "data.json").write_text(json.dumps(records))
    recipe = RECIPE.format(base=folder / "diffusion", data=folder / "data.json", out=folder / "run")
    (folder / "recipe.yaml").write_text(recipe)
    said = {
        "convert": run_cli("convert", base, folder / "diffusion"),
        "data": run_cli("data", folder / "recipe.yaml"),
        "train": run_cli("train", folder / "recipe.yaml"),
    }
    yield Chain(folder, said)


def test_convert_says_what_it_made(chain: Chain) -> None:
    said = chain.said["convert"]
    assert (said.code, said.err) == (0, "")
    model = load_model(str(chain.folder / "diffusion"))
    assert said.out == (
        f"{chain.folder / 'diffusion'}: Qwen3ForCausalLM, {model.num_parameters():,} parameters,"
        " mask token <|mask|> = id 259, embedding of 272 rows\n"
    )


def test_data_shows_what_training_will_see(chain: Chain) -> None:
    said = chain.said["data"]
    assert (said.code, said.err) == (0, "")
    for words in ("example 1 of 8", "Say 0", "format: alpaca (11)", "block_size 64", "held out: 2 sequences"):
        assert words in said.out
    assert "the prompt alone fills block_size; first: data.json record 11" in " ".join(said.out.split())
    fewer = run_cli("data", chain.folder / "recipe.yaml", "data.max_records=5", "--show", "0")
    assert "example 1 of" not in fewer.out and "alpaca (5)" in fewer.out
    assert not (chain.folder / "other").exists()  # it looks and leaves nothing


def test_data_says_how_full_batches_are_and_what_is_there_twice(chain: Chain) -> None:
    said = " ".join(chain.said["data"].out.split())
    for words in (
        "tokens per source: data.json ",
        "padded to block_size 64 ",
        "padded to the longest of 4 in random order ",
        "packed into rows of 64 ",
        "whole sequence 0",
        "prompt (all before the first response) 0",
        "held-out prompt that is trained on, too 0",
    ):
        assert words in said


def test_data_writes_a_page(chain: Chain, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    said = run_cli("data", chain.folder / "recipe.yaml", "--show", "0", "--html", page)
    assert (said.code, said.err) == (0, "")
    assert f"page: {page} (8 of 8 rows)" in said.out.replace("\n", " ")
    text = page.read_text(encoding="utf-8")
    assert text.count("<article>") == 8 and "data.json" in text
    packed = run_cli("data", chain.folder / "recipe.yaml", "data.packing=true", "--show", "0", "--html", page)
    assert packed.code == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("<article>") == 4 and text.count("<section") == 8 and "padding ×" in text


def test_train_shows_losses_and_leaves_a_checkpoint(chain: Chain) -> None:
    said = chain.said["train"]
    assert (said.code, said.err) == (0, "")
    assert "step 1/2  loss " in said.out and "held-out loss" in said.out
    assert "checkpoint: " in said.out
    assert (chain.final / "model.safetensors").exists()


def test_generate_answers(chain: Chain) -> None:
    arguments = ("generate", chain.final, "--prompt", "Say 3", "--max-new-tokens", "6")
    plain = run_cli(*arguments)
    assert (plain.code, plain.err) == (0, "") and plain.out.endswith("\n")
    assert run_cli(*arguments) == plain
    with_defaults = run_cli(*arguments, "--temperature", "0", "--steps", "6", "--seed", "0")
    assert with_defaults == plain
    sampled = [run_cli(*arguments, "--temperature", "1", "--seed", str(seed)).out for seed in (1, 1, 2, 3)]
    assert sampled[0] == sampled[1] and len(set(sampled)) > 1


def test_generate_traces_on_the_standard_error(chain: Chain) -> None:
    arguments = ("generate", chain.final, "--prompt", "Say 3", "--max-new-tokens", "6")
    said = run_cli(*arguments, "--trace")
    assert said.out == run_cli(*arguments).out
    assert "░" in said.err.splitlines()[0] and "░" not in said.err.splitlines()[-1]


def test_generate_reads_the_standard_input(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_cli("generate", chain.final, "--prompt", "Say 3", "--max-new-tokens", "6")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say 3"))
    assert run_cli("generate", chain.final, "--prompt", "-", "--max-new-tokens", "6") == expected


def test_raw_prompts_and_system_prompts_change_the_answer(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def complete(model: object, tokenizer: object, prompts: list[list[int]], **settings: object) -> object:
        from unmask.generation.complete import Completion

        seen.extend(prompts)
        return [Completion("", [], [])]

    monkeypatch.setattr("unmask.generation.complete.complete", complete)
    for more in ((), ("--system", "Be short."), ("--raw",)):
        assert run_cli("generate", chain.final, "--prompt", "Say 3", *more).code == 0
    tokenizer = load_tokenizer(str(chain.final))
    texts = [str(tokenizer.decode(ids)) for ids in seen]
    user = "<|im_start|>user\nSay 3<|im_end|>\n<|im_start|>assistant\n"
    assert texts == [user, f"<|im_start|>system\nBe short.<|im_end|>\n{user}", "Say 3"]


def test_a_system_prompt_has_no_place_in_a_raw_one(chain: Chain) -> None:
    said = run_cli("generate", chain.final, "--prompt", "a", "--raw", "--system", "b")
    assert (said.code, said.out) == (2, "")
    assert said.err == "error: --system has no effect with --raw; write it into the prompt.\n"


# Errors.


def test_an_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    said = run_cli("train", tmp_path / "nowhere.yaml")
    assert said == Said(2, "", f"error: {tmp_path / 'nowhere.yaml'}: no such recipe file\n")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_shows_the_traceback_wherever_it_stands(
    tmp_path: Path, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["train", str(tmp_path / "nowhere.yaml")]
    arguments.insert(place, "--debug")
    monkeypatch.setattr(sys, "argv", ["unmask", *arguments])
    with pytest.raises(UnmaskError, match="no such recipe file"):
        cli.main()


def test_a_shell_sees_the_same(tmp_path: Path) -> None:
    def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "unmask", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    plain = shell("data", "nowhere.yaml")
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr == "error: nowhere.yaml: no such recipe file\n"
    debug = shell("data", "nowhere.yaml", "--debug")
    assert debug.returncode != 0 and "Traceback" in debug.stderr
    assert debug.stderr.rstrip().endswith("UnmaskError: nowhere.yaml: no such recipe file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage: unmask"),
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument 'RECIPE'"),
        (["generate", "x"], "Missing option '--prompt'"),
        (["generate", "x", "--prompt", "a", "--temperature", "-1"], "--temperature"),
        (["generate", "x", "--prompt", "a", "--temperature", "nan"], "--temperature"),
        (["generate", "x", "--prompt", "a", "--steps", "0"], "--steps"),
        (["generate", "x", "--prompt", "a", "--seed", "1.5"], "--seed"),
        (["data", "x", "--show", "-1"], "--show"),
    ],
)
def test_wrong_usage_is_explained(arguments: list[str], message: str) -> None:
    said = run_cli(*arguments)
    assert said.code == 2 and message in said.out + said.err and "Traceback" not in said.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--max-new-tokens", "4", "--steps", "5"], "steps must be an integer from 1 to max_new_tokens = 4"),
        (["--max-new-tokens", "500"], "max_new_tokens = 500 need more than the model's 256 positions"),
        (["--temperature", "inf"], "temperature must be a number, 0 or more; got inf"),
        (["--seed", str(2**70)], "seed must be an integer of at most 64 bits"),
    ],
)
def test_settings_that_cannot_be_are_one_line(chain: Chain, settings: list[str], message: str) -> None:
    said = run_cli("generate", chain.final, "--prompt", "a", *settings)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: ") and message in said.err and said.err.count("\n") == 1


# Help.


def test_help_of_every_command() -> None:
    callbacks = [command.callback for command in cli.app.registered_commands]
    assert tuple(callback.__name__ for callback in callbacks if callback is not None) == COMMANDS
    whole = run_cli("--help")
    assert (whole.code, whole.err) == (0, "")
    assert all(command in whole.out for command in COMMANDS) and "--debug" in whole.out
    for command in COMMANDS:
        said = run_cli(command, "--help")
        assert (said.code, said.err) == (0, "")
        assert f"Usage: unmask {command}" in said.out


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = """
import sys
sys.argv = ["unmask", "train", "--help"]
from unmask.cli import main
try:
    main()
except SystemExit as ended:
    assert ended.code == 0
heavy = {"torch", "transformers", "datasets", "numpy", "tokenizers", "omegaconf", "accelerate"}
print("loaded:", sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_version_is_shown() -> None:
    shown = run_cli("--version")
    assert (shown.code, shown.out, shown.err) == (0, f"unmask {unmask.__version__}\n", "")
