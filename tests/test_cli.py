"""The `unmask` command in this process, and by a shell where imports and exit codes are the point."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import Said, autoregressive_folder, run_cli

import unmask
from unmask import cli, cli_generate, load_model, load_tokenizer
from unmask.data.encode import Example
from unmask.data.inspect import visible
from unmask.errors import UnmaskError

COMMANDS = ("convert", "data", "prepare", "train", "merge", "generate", "chat", "infill", "score")


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
    assert f"page: {page} (all 8 rows)" in " ".join(said.out.split())
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


def test_generate_writes_a_page_and_a_picture(chain: Chain, tmp_path: Path) -> None:
    arguments = ("generate", chain.final, "--prompt", "Say 3", "--max-new-tokens", "6")
    more = ("--samples", "2", "--policy", "random", "--seed", "3")
    for file in (tmp_path / "t.html", tmp_path / "t.png"):
        said = run_cli(*arguments, *more, "--trace", file)
        assert (said.code, said.err) == (0, "") and "--- seed 3\n" in said.out and "--- seed 4\n" in said.out
        assert file.stat().st_size > 5000


def test_generate_answers_a_file(chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Say 3\nSay 4\n")
    out = tmp_path / "a.jsonl"
    more = ("--max-new-tokens", "6", "--prefix", "We", "--stop", "zz")
    arguments = ("generate", chain.final, "--prompts", tmp_path / "p.txt", "--out", out, *more)
    said = run_cli(*arguments)
    assert said.code == 0 and said.out.startswith(f"{out}: 2 answers to 2 prompts, ")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    alone = run_cli("generate", chain.final, "--prompt", "Say 4", *more)
    assert lines[1]["response"] == alone.out.removesuffix("\n") and alone.out.startswith("We")
    assert lines[1]["settings"] == {
        "model": str(chain.final),
        "prefix": "We",
        "stop": ["zz"],
        "max_new_tokens": 6,
    }
    again = run_cli(*arguments)
    assert again.code == 2 and "exists already; --resume continues it" in again.err
    assert run_cli(*arguments, "--resume", "--batch-size", "1") == said


def test_generate_chooses(chain: Chain, tmp_path: Path) -> None:
    choices = ("--choice", "3!", "--choice", "no")
    said = run_cli("generate", chain.final, "--prompt", "Say 3", *choices)
    assert said.code == 0 and said.out in ("3!\n", "no\n")
    assert said.err.splitlines()[0].endswith(f"nats  {said.out.strip()}")
    (tmp_path / "p.jsonl").write_text('{"prompt": "Say 3"}')
    out = tmp_path / "a.jsonl"
    run_cli("generate", chain.final, "--prompts", tmp_path / "p.jsonl", "--out", out, *choices)
    line = json.loads(out.read_text())
    assert line["response"] + "\n" == said.out and set(line["choices"]) == {"3!", "no"}


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_refused_but_a_raw_one_is_a_beginning(chain: Chain, prompt: str) -> None:
    said = run_cli("generate", chain.final, "--prompt", prompt)
    assert (said.code, said.out) == (2, "") and said.err.startswith(
        "error: the prompt is empty; say something"
    )
    assert run_cli("generate", chain.final, "--raw", "--prompt", prompt, "--max-new-tokens", "2").code == 0


def test_an_autoregressive_folder_says_how_to_convert(chain: Chain) -> None:
    base = chain.folder / "base"
    for command in (
        ("generate", base, "--prompt", "a"),
        ("chat", base),
        ("infill", base, "--text", "[[gap:1]]"),
    ):
        said = run_cli(*command)
        assert (said.code, said.out) == (2, "")
        assert f"`unmask convert {base} OUT`" in said.err


def test_a_block_length_that_was_not_trained_is_warned_of(chain: Chain, tmp_path: Path) -> None:
    model = load_model(str(chain.final), attention="block_causal", block_length=4)
    model.save_pretrained(tmp_path)
    load_tokenizer(str(chain.final)).save_pretrained(tmp_path)
    said = run_cli("generate", tmp_path, "--prompt", "a", "--max-new-tokens", "4", "--block-length", "2")
    expected = "warning: the model was trained on blocks of 4 tokens; generating in blocks of 2.\n"
    assert (said.code, said.err) == (0, expected)


def test_infill_fills_gaps(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run_cli("infill", chain.final, "--text", "ab[[gap:2]]c")
    assert said.code == 0 and said.out.startswith("ab") and said.out.endswith("c\n")
    assert said.err.startswith("gaps of 2 tokens, log-probability ")
    assert run_cli("infill", chain.final, "--prefix", "ab", "--suffix", "c", "--length", "2") == said
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab[[gap:2]]c"))
    assert run_cli("infill", chain.final, "--text", "-") == said
    answered = run_cli("infill", chain.final, "--prompt", "Say 3", "--text", "[[gap:1-2]]", "--end-fill", "4")
    assert answered.code == 0 and "lengths tried: 2" in answered.err


def test_chat_reads_lines(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say 3\n/quit\n"))
    said = run_cli("chat", chain.final, "--max-new-tokens", "6")
    expected = run_cli("generate", chain.final, "--prompt", "Say 3", "--max-new-tokens", "6")
    assert (said.code, said.err) == (0, "")
    assert visible(expected.out.split("\n")[0]) in said.out


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the latter in the locale C
@pytest.mark.parametrize("arguments", [("generate", "--prompt"), ("infill", "--text")])
def test_standard_input_must_be_text(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, str], errors: str
) -> None:
    given = io.TextIOWrapper(io.BytesIO(b"a\nb\xff"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", given)
    command, option = arguments
    said = run_cli(command, chain.final, option, "-")
    assert (said.code, said.err) == (2, "error: standard input: not UTF-8 text (line 2); save it as UTF-8.\n")


def test_generate_reads_the_standard_input(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_cli("generate", chain.final, "--prompt", "Say 3", "--max-new-tokens", "6")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say 3"))
    assert run_cli("generate", chain.final, "--prompt", "-", "--max-new-tokens", "6") == expected


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (b"a", "a"),
        (b"a\n", "a"),
        (b"a\r\n", "a"),
        (b"\xc3\xa9\n\n", "é\n"),
        (b"a\r", "a\r"),
        (b"\n", ""),
        (b"", ""),
    ],
)
def test_standard_input_is_read_without_its_last_line_end(
    monkeypatch: pytest.MonkeyPatch, given: bytes, read: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="ascii"))
    assert cli_generate.read_stdin() == read


@pytest.mark.parametrize(
    ("arguments", "placed"),
    [
        ("--trace", "--trace -"),
        ("--trace out.html --raw", "--trace out.html --raw"),
        ("--trace three.txt", "--trace three.txt"),
        ("--trace --seed 1", "--trace - --seed 1"),
        ("--trace org/Qwen3-0.6B", "--trace - org/Qwen3-0.6B"),
    ],
)
def test_a_trace_takes_a_file_or_nothing(arguments: str, placed: str) -> None:
    assert cli_generate.insert_trace_value(arguments.split()) == placed.split()


def test_raw_prompts_and_system_prompts_change_the_prompt(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def complete(model: object, tokenizer: object, prompts: list[Example], **settings: object) -> object:
        from unmask.generation.text import Completion

        seen.extend(prompt.input_ids for prompt in prompts)
        return [Completion("", [], [])]

    monkeypatch.setattr("unmask.generation.text.complete", complete)
    for more in ((), ("--system", "Be short."), ("--raw",)):
        assert run_cli("generate", chain.final, "--prompt", "Say <|mask|>", *more).code == 0
    tokenizer = load_tokenizer(str(chain.final))
    texts = [str(tokenizer.decode(ids)) for ids in seen]
    user = "<|im_start|>user\nSay <|mask|><|im_end|>\n<|im_start|>assistant\n"
    assert texts == [user, f"<|im_start|>system\nBe short.<|im_end|>\n{user}", "Say <|mask|>"]
    assert all(259 not in ids for ids in seen)  # the string of the mask token is text


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
        (["generate", "x"], "give --prompt TEXT or --prompts FILE, one of them"),
        (["infill", "x"], "give --text with gaps in it, or --prefix and --suffix with --length"),
        (["infill", "x", "--prefix", "a"], "need --length, the tokens between them"),
        (["infill", "x", "--text", "a", "--length", "2"], "--length has no effect with --text"),
        (["infill", "x", "--text", "[[gap]]"], "is not a gap"),
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
        (["--max-new-tokens", "4", "--steps", "5"], "steps must be at most max_new_tokens = 4"),
        (["--max-new-tokens", "500"], "max_new_tokens = 500 need more than the model's 256 positions"),
        (["--temperature", "inf"], "temperature must be a finite number; got inf"),
        (["--seed", str(2**70)], "error: seed must be "),
        (["--policy", "maskgit_pls"], "unknown policy 'maskgit_pls'; did you mean 'maskgit_plus'?"),
        (["--threshold", "1.5"], "threshold must be less than or equal to 1; got 1.5"),
        (["--policy", "entropy", "--factor", "1"], "factor has no effect with policy 'entropy'"),
        (["--top-p", "0.9"], "top_p has no effect without a temperature above 0"),
        (["--samples", "2"], "--samples: without randomness all are the same"),
        (["--stop", ""], "stop: a stop string must not be empty"),
        (["--system", "\udcff"], "--system: not UTF-8 text (character 1)"),
        (["--prompts", "x.txt"], "give --prompt TEXT or --prompts FILE, one of them"),
        (["--out", "x.jsonl"], "--out has an effect with --prompts alone"),
        (["--end-fill", "2"], "--end-fill has an effect with --choice alone"),
        (["--choice", "a"], "give two choices or more"),
        (["--choice", "a", "--choice", "b", "--steps", "2"], "--steps has no effect with --choice"),
        (["--trace", "three.txt"], "--trace: expected a file .html or .png, or nothing; got 'three.txt'"),
        (["--canvas", "growing"], "canvas = growing has no effect without block_length"),
        (["--trace=x.pdf"], "--trace: expected a file .html or .png, or nothing; got 'x.pdf'"),
        (["--trace", "no/where.html"], "there is no folder"),
        (["--raw", "--system", "b"], "--system has no effect with --raw"),
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
