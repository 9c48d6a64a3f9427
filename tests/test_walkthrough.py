"""What README.md and the pages of docs/ show is run: commands and Python, each page in its order, and the scripts."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import httpx
import pytest
from foreign import BY_NAME, foreign_folder
from tiny import autoregressive_folder, run_cli

from unmask import load_model

ROOT = Path(__file__).resolve().parent.parent
HUB = {"Qwen/Qwen3-0.6B": "base", "Salesforce/CoDA-v0-Instruct": "coda", "JetLM/SDAR-1.7B-Chat": "sdar"}
SHORT = [
    "max_steps=2",
    "evaluation.limit=3",
    "global_batch_size=4",
    "data.max_records=64",
    "data.eval_size=8",
]
SERVED = "127.0.0.1:8000"  # as the pages write it
TUTORIALS = "docs/tutorials/"
FINETUNE = f"{TUTORIALS}finetune.md"  # whose files other tutorials use
# What tutorials show of outputs, as far as it is the same for any model.
STABLE = re.compile(
    r"step +\d+(/\d+)?  |exact match: |records +\d|gaps of |(ok|off)  |task  +|\w+: [\d,]+ forward passes|results: "
)
# Pages with a test of their own: test_eval_docs.py, test_serve_clients.py.
ELSEWHERE = {"docs/evaluation.md", "docs/serving.md"}
# Pages whose commands have capital letters for what the reader has.
PATTERNS = {
    "docs/data.md",
    "docs/training.md",
    "docs/log.md",
    "docs/cli.md",
    "docs/recipes.md",
}
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page not in ELSEWHERE | PATTERNS]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page in their order, (language, text); indented ones, as in a list or a tab, too."""
    found = re.findall(r"^( *)```(\w+)[^\n]*\n(.*?)^ *```", read(page), flags=re.MULTILINE | re.DOTALL)
    return [
        (language, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)) for indent, language, text in found
    ]


def commands(page: str) -> list[str]:
    """Those of the bash blocks, and what the last column of a table shows."""
    text = "".join(text for language, text in blocks(page) if language == "bash")
    return _lines(text) + re.findall(r"\| `(unmask [^`]*)` \|$", read(page), flags=re.MULTILINE)


def saved(page: str) -> dict[str, str]:
    """The files that a page says to save, by name."""
    text = read(page)
    pattern = r"Save this as\s+`([^`]+)`:\n\n```\w+\n(.*?)^```"
    found = dict(re.findall(pattern, text, flags=re.MULTILINE | re.DOTALL))
    assert len(found) == text.count("Save this")
    return found


def _lines(text: str) -> list[str]:
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages name: recipes, data, tiny models in place of the hub's, a demo of two steps."""
    made = tmp_path_factory.mktemp("made")
    for name in ("recipes", "docs"):
        (made / name).symlink_to(ROOT / name)
    autoregressive_folder(made / "base", max_position_embeddings=2048)
    for name in ("coda", "sdar"):
        foreign_folder(made / name, BY_NAME[name], max_position_embeddings=2048)
    for name in ("humaneval", "gsm8k"):
        (made / f"{name}.jsonl").write_text('{"prompt": "Say hello."}\n')
    (made / "my.jsonl").write_text('{"instruction": "Say hello.", "output": "Hello!"}\n' * 200)
    (made / "my.txt").write_text("To be, or not to be, that is the question. " * 400)
    plan = subprocess.run(["make", "-n", "demo"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "checkpoint_save_dir=outputs/demo" in plan.stdout
    folder = f"checkpoint_save_dir={made / 'outputs/demo'}"
    said = shell([str(ROOT / "recipes/train_tiny_sft.sh"), *SHORT, folder], made)
    pattern = r"exact match: before [\d.]+%, after [\d.]+% on 3 held-out prompts"
    assert re.fullmatch(pattern, said.strip().splitlines()[-1])
    assert (made / "outputs/demo/loss.png").stat().st_size > 0
    (made / "demo.txt").write_text(said)
    return made


class Walk:
    """A reader who does what a page says, in a folder of its own, only with shorter runs and tiny models."""

    def __init__(self, made: Path, place: Path):
        self.place, self.names = place, dict[str, Any]()
        shutil.copytree(made, place, symlinks=True, dirs_exist_ok=True)
        self.server: subprocess.Popen[str] | None = None
        self.address = SERVED
        self.said = (made / "demo.txt").read_text()  # all that was printed

    def save(self, page: str) -> None:
        for name, text in saved(page).items():
            text = text.replace("range(301)", "range(2)")  # steps of the stand-in for Qwen3
            (self.place / name).write_text(text, encoding="utf-8")

    def local(self, text: str) -> str:
        for on_the_hub, folder in HUB.items():
            text = text.replace(on_the_hub, str(self.place / folder))
        return text.replace(SERVED, self.address).replace(
            SERVED.replace("127.0.0.1", "localhost"), self.address
        )

    def python(self, page: str, code: str) -> None:
        exec(compile(self.local(code), page, "exec"), self.names)

    def run(self, command: str) -> None:
        name, *arguments = shlex.split(self.local(command), comments=True)
        if name in ("curl", "python") or {"|", "<", ">", "&", "&&"} & set(arguments):
            self.said += shell(["bash", "-o", "pipefail", "-ec", self.local(command)], self.place)
            return
        if name == "timeout":
            self.kill(arguments[arguments.index("unmask") :])
            return
        variables = dict[str, str]()
        while "=" in name and not name.startswith("-"):  # NPROC=2 ./recipes/...
            variables[name.partition("=")[0]] = name.partition("=")[2]
            name, *arguments = arguments
        if name.startswith("./recipes/"):
            local = [a.replace("dataset_name=", f"dataset_name={self.place}/") for a in arguments]
            base = (
                f"model.name_or_path={self.place / 'base'} checkpoint_save_dir={self.place / Path(name).stem}"
            )
            base = "" if any(argument.startswith("model.name_or_path=") for argument in local) else base
            sizes = "data.block_size=64 micro_batch_size=2"
            often = "eval_steps=2 data.eval_size=2 save_steps=2"
            shell([name, *local, *SHORT, *f"{base} {sizes} {often}".split()], self.place, **variables)
        elif name == "unmask" and arguments[0] == "serve":
            self.serve(arguments, **variables)
        elif name == "unmask":
            self.unmask(arguments)
        elif name == "torchrun":
            base, sizes = f"model.name_or_path={self.place / 'base'}", "data.block_size=64 micro_batch_size=2"
            more = [*SHORT, base, *sizes.split()]
            shell([sys.executable, "-m", "torch.distributed.run", *arguments, *more], self.place)
        elif name == "make":  # the environment exists, and so does the demo
            assert re.search(rf"^{arguments[0]}:|^{arguments[0]} ", read("Makefile"), flags=re.MULTILINE), (
                command
            )
        else:  # the tests run in that environment
            assert command == "source .venv/bin/activate" or command.startswith("pip install "), command

    def unmask(self, arguments: list[str]) -> None:
        recipe = arguments[1] if len(arguments) > 1 else ""
        if "qwen3" in recipe and not any(a.startswith("model.name_or_path=") for a in arguments):
            arguments.append(f"model.name_or_path={self.place / 'base'}")
        if "checkpoint_save_dir=outputs/demo" in arguments:
            shutil.rmtree("outputs/demo")  # that of `make demo`, in place of which this is
        if arguments[0] in ("train", "prepare") and "--dry-run" not in arguments:
            streamed = "data.streaming=true" in arguments  # has no first records
            unused = ["data.max_records"] if streamed else []
            if any(argument.startswith("data.sources=") for argument in arguments):
                unused += ["data.max_records", "data.eval_size"]
            arguments += [key for key in SHORT if key.partition("=")[0] not in unused]
            if "resume_from_checkpoint=auto" in arguments:
                arguments.append(f"max_steps={max(self.steps_saved(), default=0) + 2}")
        if arguments[0] == "eval" and not {"--limit", "--compare"} & set(arguments):
            arguments += ["--limit", "4"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO("Say it twice: wool.\n/quit\n"))
            said = run_cli(*arguments)
        self.said += said.out + said.err
        if arguments[0] == "doctor":  # random weights are off
            [shown] = [text for _, text in blocks("docs/checkpoints.md") if "ok  mask token" in text]
            names = [re.split(r"  +", line)[1] for line in shown.splitlines()]
            names = ["read" if name.startswith("read") else f"{name} " for name in names]  # as it is not
            assert [name for name in names if f"  {name} " not in said.out.replace("wrong", "ok")] == [], said
        else:
            assert said.code == 0, (arguments, said.err)

    def steps_saved(self) -> list[int]:
        return [int(folder.name.split("-")[1]) for folder in self.place.glob("outputs/*/checkpoint-*")]

    def kill(self, command: list[str]) -> None:
        """Kill a training as soon as it has a checkpoint, whatever its time."""
        more = [*SHORT, "max_steps=10000", "save_steps=2"]
        with subprocess.Popen(
            [sys.executable, "-m", *command, *more],
            cwd=self.place,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as run:
            while not self.steps_saved():
                assert run.poll() is None, run.stderr and run.stderr.read()
                time.sleep(0.05)
            run.kill()

    def serve(self, arguments: list[str], **variables: str) -> None:
        self.stop()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        if "--port" in arguments:
            del arguments[arguments.index("--port") : arguments.index("--port") + 2]
        command = [sys.executable, "-m", "unmask", *arguments, "--port", str(port)]
        self.server = subprocess.Popen(
            command, cwd=self.place, env=environment(**variables), stderr=subprocess.PIPE, text=True
        )
        self.address = f"127.0.0.1:{port}"
        for _ in range(600):
            assert self.server.poll() is None, self.server.stderr and self.server.stderr.read()
            try:
                httpx.get(f"http://{self.address}/health").raise_for_status()
                return
            except httpx.HTTPError:
                time.sleep(0.1)
        raise AssertionError("the server does not answer")

    def stop(self) -> None:
        if self.server is not None:
            with self.server as server:
                server.send_signal(signal.SIGTERM)
                assert server.wait(30) == 0
            self.server = None


def environment(**variables: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **variables}


def shell(arguments: list[str], place: Path, **variables: str) -> str:
    done = subprocess.run(arguments, cwd=place, env=environment(**variables), capture_output=True, text=True)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture
def walk(made: Path, tmp_path: Path) -> Iterator[Walk]:
    walk = Walk(made, tmp_path)
    with chdir(tmp_path):
        try:
            yield walk
        finally:
            walk.stop()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_runs(page: str, walk: Walk, capsys: pytest.CaptureFixture[str]) -> None:
    if page.startswith(TUTORIALS):
        walk.save(FINETUNE)
        walk.save(page)
    if page == f"{TUTORIALS}evaluate.md":  # the reader has done the tutorial before
        walk.run("python make_data.py")
        shutil.copytree("outputs/demo", "outputs/mine")
    for language, text in blocks(page):
        if language == "python" and text not in saved(page).values():
            walk.python(page, text)
        for command in _lines(text) if language == "bash" else []:
            walk.run(command)
    for command in set(commands(page)) - {line for _, text in blocks(page) for line in _lines(text)}:
        walk.run(command)
    if page == "README.md":
        assert load_model("outputs/qwen3-0.6b-diffusion").config.logit_shift
        assert load_model("train_qwen3_1.7b_sft/final").config.logit_shift
        assert Path("outputs/coda-sft/final/model.safetensors").exists()
    if page == "docs/checkpoints.md":
        assert Path("coda.jsonl").read_text() and Path("sdar.jsonl").read_text()
    if page == f"{TUTORIALS}serve.md":
        assert walk.said.count('"error"') == 1  # of the request without a key
    if page.startswith(TUTORIALS):
        said = {skeleton(line) for line in (walk.said + capsys.readouterr().out).splitlines()}
        texts = [text for language, text in blocks(page) if language == "text"]
        shown = {skeleton(line) for text in texts for line in text.splitlines() if STABLE.match(line)}
        assert shown - said == set() and bool(shown) == (page != f"{TUTORIALS}serve.md")


def skeleton(line: str) -> str:
    """A line of output without what differs between models: of a row of `unmask doctor` its label alone."""
    if row := re.match(r"(?:ok|off|wrong) +(\S+(?: \S+)*)  ", line):
        return row[1]
    return re.sub(r"[-+]?[\d,]*\.?\d+", "N", " ".join(line.split()).removesuffix("s"))


def test_pages_that_are_not_run_have_a_test_of_their_own_or_patterns() -> None:
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*docs.py"))
    tests += read("tests/test_serve_clients.py")
    assert all(Path(page).name in tests for page in ELSEWHERE)
    for page in PATTERNS:
        shown = [line for line in commands(page) if line.startswith("unmask ")]
        assert not shown or any(re.search(r"\b[A-Z]{3,}\b", line) for line in shown), page


def test_the_tree_names_files_that_exist() -> None:
    [tree] = [text for language, text in blocks("CONTRIBUTING.md") if language == "text"]
    folder = Path()
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = Path(name) if name.endswith("/") else Path()
            found = ROOT / name
        else:
            if line.startswith("  ") and not line.startswith("    ") and name.endswith("/"):
                folder = Path("unmask") / name
                found = ROOT / folder
            else:
                found = ROOT / ("unmask" if not line.startswith("    ") else folder) / name
        assert found.exists(), line


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_exist(page: str) -> None:  # those within docs/ are held by `make docs`
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", read(page)):
        assert link.startswith("https:") or (ROOT / link).exists(), link


@pytest.mark.slow
def test_example_of_the_contract_shows_both_modes() -> None:
    out = shell([sys.executable, str(ROOT / "sft_example.py")], ROOT)
    assert "1. pretrain" in out and "2. sft" in out and "ValueError: training_mode='sft'" in out
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", out)]
    assert losses[-1] < losses[0]
