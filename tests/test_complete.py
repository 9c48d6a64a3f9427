"""Shell completion: what a shell asks for, and a bash on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny import run_cli

from unmask import cli_options
from unmask.shipped import shipped_recipes

SECONDS = 60.0  # that a busy machine may take for one answer


def completed(words: Sequence[str], shell: str = "bash") -> list[str]:
    """What a shell is told for the last of some words."""
    asked = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    asked |= {"_TYPER_COMPLETE_ARGS": " ".join(words), "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    environment = {**os.environ, **asked, "_UNMASK_COMPLETE": f"complete_{shell}"}
    command = [sys.executable, "-m", "unmask"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], {"train"}),
        (["--debug", "tr"], {"train"}),
        (["train", "train_q"], {name for name in shipped_recipes() if name.startswith("train_q")}),
        (["recipe", "show", "train_t"], {"train_tiny_sft"}),
        (["train", "x", "data.pack"], {"data.packing=true", "data.packing=false"}),
        (["train", "x", "data.block_s"], {"data.block_size=1024"}),
        (["data", "x", "seed=1", "model.name_"], {"model.name_or_path="}),
        (["train", "x", "data.packing", "=", "t"], {"true"}),  # as bash splits words
        (["train", "x", "model.attention", "="], {"bidirectional", "block_causal"}),
        (["train", "x", "data.packing", "=", "true", "max_st"], {"max_steps=1000"}),
        (
            ["train", "x", "model.attention=b"],
            {f"model.attention=b{x}" for x in ("idirectional", "lock_causal")},
        ),
        (["generate", "m", "--preset", "dr"], {"dream"}),
        (["generate", "m", "--trace", "--policy", "left"], {"left_to_right"}),
        (
            ["eval", "m", "--tasks", "unmask_mbpp,unmask_mb"],
            {f"unmask_mbpp,unmask_mbpp{x}" for x in ("", "_plus")},
        ),
        (["generate", "some/fol"], set()),  # a shell completes files
    ],
)
def test_bash_is_told_what_fits(words: list[str], expected: set[str]) -> None:
    assert set(completed(["unmask", *words])) - {""} == expected


def test_zsh_and_fish_are_told_too() -> None:
    assert '"train_tiny_sft":"The demo' in "".join(completed(["unmask", "train", "train_t"], "zsh"))
    [line] = completed(["unmask", "train", "train_t"], "fish")
    assert line.startswith("train_tiny_sft\tThe demo")
    lines = completed(["unmask", "train", "train_tiny_sft", ""], "fish")
    assert len(lines) > 90 and all(re.match(r"[a-z_0-9.]+=[^\t]*\t", line) for line in lines)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_is_shown(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    said = run_cli("--show-completion", shell)
    assert (said.code, said.err) == (0, "") and "_UNMASK_COMPLETE=complete_" in said.out


def test_choices_of_options_are_those_of_generation() -> None:
    from unmask.generation.config import PRESETS
    from unmask.generation.policy import POLICIES

    assert set(cli_options.PRESETS) == set(PRESETS) and set(cli_options.POLICIES) == set(POLICIES)


def test_completion_imports_neither_torch_nor_transformers() -> None:
    code = """
import os, sys
os.environ |= {"_UNMASK_COMPLETE": "complete_bash", "COMP_WORDS": "unmask train x data.p", "COMP_CWORD": "3"}
sys.argv = ["unmask"]
from unmask.cli import main
try:
    main()
except SystemExit:
    pass
print(sorted({"torch", "transformers", "datasets", "numpy", "tokenizers", "accelerate"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_a_bash_on_a_terminal_completes(tmp_path: Path) -> None:
    command = tmp_path / "unmask"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m unmask "$@"\n')
    command.chmod(0o755)
    (tmp_path / "my.yaml").write_text("max_steps: 1\n")
    script = subprocess.run(
        [command],
        env={**os.environ, "_UNMASK_COMPLETE": "source_bash"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (tmp_path / "rc").write_text(f"{script}\nPS1='ready> '\nbind 'set bell-style none'\n")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TERM": "dumb"}
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execvpe("bash", ["bash", "--noprofile", "--rcfile", "rc", "-i"], environment)

    def until(pattern: str) -> str:
        """Read what the terminal shows until it has a text."""
        shown, end = "", time.monotonic() + SECONDS
        while not re.search(pattern, shown):
            assert time.monotonic() < end, shown
            if select.select([terminal], [], [], 0.1)[0]:
                shown += os.read(terminal, 4096).decode()
        return shown

    try:
        until("ready> ")
        for typed, shown in (
            ("unmask tra\t", r"unmask train "),
            ("train_ti\t", r"train_tiny_sft "),
            ("data.pac\t", r"data\.packing="),
            ("t\t", r"true "),
            ("max_st\t", r"max_steps=1000"),
        ):
            os.write(terminal, typed.encode())
            until(shown)
        os.write(terminal, b"\x15unmask train my.y\t")  # a file where no recipe has the name
        until(r"my\.yaml ")
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)
