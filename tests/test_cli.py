"""The `unmask` command in this process, and by a shell where imports and exit codes are the point."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import Said, autoregressive_folder, run_cli

import unmask
from unmask import cli, cli_generate, load_model, load_recipe, load_tokenizer
from unmask.data.inspect import visible

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

    def generate(self, *arguments: str | Path, prompt: str = "Say 3") -> Said:
        """A prompt answered in six tokens, in the end of the arguments."""
        return run_cli("generate", self.final, "--prompt", prompt, "--max-new-tokens", "6", *arguments)


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


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Set what the next command reads."""

    def give(data: bytes) -> None:
        # In the locale C Python passes on bytes that are not text.
        text = io.TextIOWrapper(io.BytesIO(data), encoding="ascii", errors="surrogateescape")
        monkeypatch.setattr(sys, "stdin", text)

    return give


@pytest.mark.parametrize("command", ["convert", "data", "train"])
def test_commands_say_what_they_did(chain: Chain, command: str) -> None:
    said = chain.said[command]
    model = load_model(str(chain.folder / "diffusion"))
    words = {
        "convert": (
            f"{chain.folder / 'diffusion'}: Qwen3ForCausalLM, {model.num_parameters():,} parameters,"
            " mask token <|mask|> = id 259, embedding of 272 rows\n",
        ),
        "data": (
            *("example 1 of 8", "Say 0", "format: alpaca (11)", "block_size 64", "held out: 2 sequences"),
            "the prompt alone fills block_size; first: data.json record 11",
            *("tokens per source: data.json ", "padded to block_size 64 ", "packed into rows of 64 "),
            "padded to the longest of 4 in random order ",
            "held-out prompt that is trained on, too 0",
        ),
        "train": ("step 1/2 loss ", "held-out loss", "checkpoint: "),
    }[command]
    assert (said.code, said.err) == (0, "")
    text = " ".join(said.out.split())
    assert all(" ".join(one.split()) in text for one in words)
    assert (chain.final / "model.safetensors").exists()


def test_data_writes_a_page(chain: Chain, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    arguments = ("data", chain.folder / "recipe.yaml", "--show", "0", "--html", page)
    said = run_cli(*arguments, "data.max_records=5")
    assert (said.code, said.err) == (0, "") and "example 1 of" not in said.out
    assert "alpaca (5)" in said.out and f"page: {page} (all 3 rows)" in " ".join(said.out.split())
    assert page.read_text(encoding="utf-8").count("<article>") == 3
    assert run_cli(*arguments, "data.packing=true").code == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("<article>") == 4 and text.count("<section") == 8 and "padding ×" in text


def test_generate_answers(chain: Chain) -> None:
    plain = chain.generate()
    assert (plain.code, plain.err) == (0, "") and plain.out.endswith("\n")
    assert chain.generate("--temperature", "0", "--steps", "6", "--seed", "0") == plain
    sampled = [chain.generate("--temperature", "1", "--seed", str(seed)).out for seed in (1, 1, 2, 3)]
    assert sampled[0] == sampled[1] and len(set(sampled)) > 1


def test_generate_traces_its_steps(chain: Chain, tmp_path: Path) -> None:
    said = chain.generate("--trace")
    assert said.out == chain.generate().out
    assert "░" in said.err.splitlines()[0] and "░" not in said.err.splitlines()[-1]
    for file in (tmp_path / "t.html", tmp_path / "t.png"):
        said = chain.generate("--samples", "2", "--policy", "random", "--seed", "3", "--trace", file)
        assert (said.code, said.err) == (0, "") and "--- seed 3\n" in said.out and "--- seed 4\n" in said.out
        assert file.stat().st_size > 5000


def test_generate_answers_a_file(chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Say 3\nSay 4\n")
    out, more = tmp_path / "a.jsonl", ("--max-new-tokens", "6", "--prefix", "We", "--stop", "zz")
    arguments = ("generate", chain.final, "--prompts", tmp_path / "p.txt", "--out", out, *more)
    said = run_cli(*arguments)
    assert said.code == 0 and said.out.startswith(f"{out}: 2 answers to 2 prompts, ")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    alone = chain.generate(*more, prompt="Say 4")
    assert lines[1]["response"] == alone.out.removesuffix("\n") and alone.out.startswith("We")
    settings = {"prefix": "We", "stop": ["zz"], "max_new_tokens": 6}
    assert lines[1]["settings"] == {"model": str(chain.final), **settings}
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
    said = chain.generate(prompt=prompt)
    assert (said.code, said.out) == (2, "") and "prompt is empty" in said.err
    assert chain.generate("--raw", prompt=prompt).code == 0


def test_raw_and_system_prompts_change_the_answer(chain: Chain) -> None:
    ways = ((), ("--system", "Be short."), ("--raw",))
    said = [chain.generate("--temperature", "1", *more, prompt="Say <|mask|>") for more in ways]
    assert len({one.out for one in said}) == 3 and all(one.code == 0 for one in said)


def test_an_autoregressive_folder_says_how_to_convert(chain: Chain) -> None:
    base = chain.folder / "base"
    for command in (("generate", base, "--prompt", "a"), ("chat", base)):
        said = run_cli(*command)
        assert (said.code, said.out) == (2, "")
        assert f"`unmask convert {base} OUT`" in said.err


def test_a_block_length_that_was_not_trained_is_warned_of(chain: Chain, tmp_path: Path) -> None:
    model = load_model(str(chain.final), attention="block_causal", block_length=4)
    model.save_pretrained(tmp_path)
    load_tokenizer(str(chain.final)).save_pretrained(tmp_path)
    said = run_cli("generate", tmp_path, "--prompt", "a", "--max-new-tokens", "4", "--block-length", "2")
    assert said.code == 0 and said.err.startswith("warning: ") and said.err.count("\n") == 1
    assert "blocks of 4" in said.err and "blocks of 2" in said.err


def test_infill_fills_gaps(chain: Chain, stdin: Callable[[bytes], None]) -> None:
    said = run_cli("infill", chain.final, "--text", "ab[[gap:2]]c")
    assert said.code == 0 and said.out.startswith("ab") and said.out.endswith("c\n")
    assert said.err.startswith("gaps of 2 tokens, log-probability ")
    assert run_cli("infill", chain.final, "--prefix", "ab", "--suffix", "c", "--length", "2") == said
    stdin(b"ab[[gap:2]]c")
    assert run_cli("infill", chain.final, "--text", "-") == said
    answered = run_cli("infill", chain.final, "--prompt", "Say 3", "--text", "[[gap:1-2]]", "--end-fill", "4")
    assert answered.code == 0 and "lengths tried: 2" in answered.err


def test_chat_and_generate_read_the_standard_input(chain: Chain, stdin: Callable[[bytes], None]) -> None:
    expected = chain.generate()
    stdin(b"Say 3\n")
    assert chain.generate(prompt="-") == expected
    stdin(b"Say 3\n/quit\n")
    said = run_cli("chat", chain.final, "--max-new-tokens", "6")
    assert (said.code, said.err) == (0, "") and visible(expected.out.split("\n")[0]) in said.out


@pytest.mark.parametrize(
    ("given", "read"),
    [(b"a", "a"), (b"a\r\n", "a"), (b"\xc3\xa9\n\n", "é\n"), (b"a\r", "a\r"), (b"\n", ""), (b"", "")],
)
def test_standard_input_is_read_without_its_last_line_end(
    stdin: Callable[[bytes], None], given: bytes, read: str
) -> None:
    stdin(given)
    assert cli_generate.read_stdin() == read


@pytest.mark.parametrize("arguments", [("generate", "--prompt"), ("infill", "--text")])
def test_standard_input_must_be_text(
    chain: Chain, stdin: Callable[[bytes], None], arguments: tuple[str, str]
) -> None:
    stdin(b"a\nb\xff")
    said = run_cli(arguments[0], chain.final, arguments[1], "-")
    assert said.code == 2 and said.err.startswith("error: standard input: not UTF-8 text (line 2)")


# Terminals.

COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-7]|4[0-7]|9[0-7])(?:;[0-9;]*)?m")
SHOWN = (
    "data {recipe}",
    "generate {final} --prompt a --max-new-tokens 6 --trace",
    "score {final} {data} --samples 2 --show 1",
    "train {recipe} --dry-run",
    "recipe list",
)


def shown(command: str, chain: Chain, columns: int = 110) -> str:
    names = {"recipe": chain.folder / "recipe.yaml", "final": chain.final, "data": chain.folder / "data.json"}
    said = run_cli(*command.format(**names).split(), columns=columns)
    assert said.code == 0
    return said.out + said.err


@pytest.mark.parametrize("command", SHOWN[:3])
def test_colours_are_there_when_forced_and_not_when_unwanted(
    chain: Chain, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = shown(command, chain)
    assert "\x1b" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert COLOUR.search(shown(command, chain))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not COLOUR.search(shown(command, chain))
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not COLOUR.search(shown(command, chain))


@pytest.mark.parametrize("command", SHOWN)
def test_60_columns_lose_no_word(chain: Chain, command: str) -> None:
    wide, narrow = (shown(command, chain, columns) for columns in (250, 60))
    if command.startswith("score"):  # what names a record is one long line, for the terminal to break
        narrow = "\n".join(line for line in narrow.splitlines() if "perplexity" not in line)
    assert "…" not in narrow and max(map(len, narrow.splitlines())) <= 60
    if not command.startswith("score"):
        words = {word for word in re.findall(r"[a-z_]{4,9}", wide)}
        assert words <= set(re.findall(r"[a-z_]{4,9}", narrow))


# Errors, warnings and help.


def test_a_shell_sees_one_line_or_with_debug_the_traceback(tmp_path: Path) -> None:
    expected = "nowhere.yaml: no such recipe file; `unmask recipe list` lists those that come with unmask.\n"
    said = run_cli("data", "nowhere.yaml")
    assert (said.code, said.out, f"{said.error}\n") == (2, "", f"error: {expected}")
    for arguments in (["--debug", "data", "nowhere.yaml"], ["data", "nowhere.yaml", "--debug"]):
        command = [sys.executable, "-m", "unmask", *arguments]
        debug = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert debug.returncode != 0 and "Traceback" in debug.stderr
        assert debug.stderr.endswith(f"UnmaskError: {expected}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument 'RECIPE'"),
        (["infill", "x"], "give --text with gaps in it, or --prefix and --suffix with --length"),
        (["infill", "x", "--prefix", "a"], "need --length, the tokens between them"),
        (["infill", "x", "--text", "a", "--length", "2"], "--length has no effect with --text"),
        (["infill", "x", "--text", "[[gap]]"], "is not a gap"),
        (["generate", "x", "--prompt", "a", "--temperature", "-1"], "--temperature"),
        (["generate", "x", "--prompt", "a", "--seed", "1.5"], "--seed"),
        (["generate", "x", "--prompt", "a", "--trace", "three.txt"], "(three.txt)"),
    ],
)
def test_wrong_usage_is_explained(arguments: list[str], message: str) -> None:
    said = run_cli(*arguments)
    assert said.code == 2 and message in said.out + said.err and "Traceback" not in said.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("--steps 7", "steps must be at most max_new_tokens = 6"),
        ("--temperature inf", "temperature must be a finite number; got inf"),
        ("--policy maskgit_pls", "unknown policy 'maskgit_pls'; did you mean 'maskgit_plus'?"),
        ("--samples 2", "--samples: without randomness all are the same"),
        ("--stop=", "stop: a stop string must not be empty"),
        ("--system \udcff", "--system: not UTF-8 text (character 1)"),
        ("--prompts x.txt", "give --prompt TEXT or --prompts FILE, one of them"),
        ("--out x.jsonl", "--out has no effect without --prompts"),
        ("--end-fill 2", "--end-fill has no effect without --choice"),
        ("--choice a --choice b", "--max-new-tokens has no effect with --choice"),
        ("--trace=x.pdf", "--trace: expected a file .html or .png, or nothing; got 'x.pdf'"),
        ("--trace no/where.html", "there is no folder"),
        ("--raw --system b", "--system has no effect with --raw"),
    ],
)
def test_settings_that_cannot_be_are_one_line(chain: Chain, settings: str, message: str) -> None:
    said = chain.generate(*settings.split())
    assert (said.code, said.out) == (2, "")
    assert message in said.error


def test_a_warning_is_one_line_once_or_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with cli.warnings_in_lines():
        for _ in range(2):
            warnings.warn("`past` is now\n  `future`", FutureWarning, stacklevel=1)
        warnings.warn("also this", DeprecationWarning, stacklevel=1)
        warnings.warn("`is_gradient_checkpointing` is deprecated, use another", FutureWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: `past` is now `future`\nwarning: also this\n"


def test_the_command_alone_shows_five_that_work_in_60_columns() -> None:
    said = run_cli()
    assert (said.code, said.err) == (0, "") and max(map(len, said.out.splitlines())) <= 60
    lines = said.out.replace("\\\n", " ").splitlines()
    commands = [line.split() for line in lines if line.startswith("  unmask ")]
    assert [words[1] for words in commands] == ["train", "train", "train", "score", "serve"]
    for _, command, first, *rest in commands:
        if command == "train":
            assert load_recipe(first, rest).checkpoint_save_dir.startswith("outputs/")
        else:
            assert first == f"{load_recipe('train_tiny_sft').checkpoint_save_dir}/final"
            text = " ".join(run_cli(command, "--help").out.split())
            assert all(word in text for word in rest if word.startswith("--"))


def test_help_and_version() -> None:
    whole = run_cli("--help")
    assert (whole.code, whole.err) == (0, "") and "--debug" in whole.out
    for command in COMMANDS:
        assert command in whole.out and f"Usage: unmask {command}" in run_cli(command, "--help").out
    assert run_cli("--version") == Said(0, f"unmask {unmask.__version__}\n", "")


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
