"""Build the wheel and the sdist into dist/, check them, and try the wheel alone outside the clone: `make package`.

It needs a package index, a few minutes and 2 GB in the temporary folder, which it removes. Everything is tried in a
folder that has nothing of the clone: the command, the recipes, a short run of the demo from its edited recipe, and
a server with its playground.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("build>=1.2,<2", "twine>=6.1,<8")
SHORT = ("max_steps=20", "data.eval_size=32", "evaluation.limit=8", "checkpoint_save_dir=run")
# The same versions as in `.venv`: of the packages, and of those that build (in pip before 25.3 the first does both).
LIMITS = {
    "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
    "PIP_BUILD_CONSTRAINT": str(ROOT / "constraints.txt"),
}
# Nothing of the clone, nor of another environment.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def run(*command: str | Path, cwd: Path, quiet: bool = False) -> str:
    """Run a command, print what it says, and return it; its failure ends the script."""
    print(
        "$",
        " ".join(Path(command[0]).name if part is command[0] else str(part) for part in command),
        flush=True,
    )
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**ENVIRONMENT, **LIMITS},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode or not quiet:
        print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"failed with exit code {done.returncode}")
    return done.stdout


def environment(folder: Path) -> Path:
    """Make an empty environment; returns its bin."""
    venv.create(folder, with_pip=True)
    return folder / "bin"


def build(folder: Path) -> Path:
    """Build both into dist/ and check their metadata; returns the wheel."""
    tools = environment(folder / "tools")
    run(tools / "pip", "install", "-q", *TOOLS, cwd=ROOT, quiet=True)
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    run(tools / "python", "-m", "build", "--outdir", "dist", cwd=ROOT, quiet=True)
    made = sorted((ROOT / "dist").iterdir())
    run(tools / "twine", "check", "--strict", *made, cwd=ROOT)
    [wheel] = [file for file in made if file.suffix == ".whl"]
    return wheel


def try_alone(wheel: Path, folder: Path) -> None:
    """Install the wheel into an empty environment and use it in an empty folder."""
    tools, empty = environment(folder / "alone"), folder / "empty"
    empty.mkdir()
    [torch] = [
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")
    ]
    run(tools / "pip", "install", "-q", torch, wheel, cwd=empty, quiet=True)
    unmask = tools / "unmask"
    version = wheel.name.split("-")[1]
    expect(run(unmask, "--version", cwd=empty) == f"unmask {version}\n", "the version of the wheel")
    expect("train_tiny_sft" in run(unmask, "recipe", "list", cwd=empty), "the demo in the list")
    (empty / "my.yaml").write_text(run(unmask, "recipe", "show", "train_tiny_sft", cwd=empty, quiet=True))
    said = run(unmask, "train", "my.yaml", *SHORT, cwd=empty)
    expect("on 8 held-out prompts" in said, "the demo's exact match")
    run(unmask, "generate", "run/final", "--prompt", "Say it twice: wool.", "--trace", cwd=empty)
    run(tools / "pip", "install", "-q", f"{wheel}[serve]", cwd=empty, quiet=True)
    with server(unmask, empty) as address:
        [served] = json.loads(ask(f"{address}/v1/models"))["data"]
        question = {"role": "user", "content": "Spell out the word wool."}
        body = {
            "model": served["id"],
            "messages": [question],
            "unmask": {"min_new_tokens": 4},
        }  # it has learnt little
        answer = json.loads(ask(f"{address}/v1/chat/completions", json.dumps(body).encode()))
        print("answer:", answer["choices"][0]["message"], answer["usage"])
        expect(answer["choices"][0]["message"]["content"] != "", "an answer")
        expect("<title>" in ask(f"{address}/"), "the playground")
    left = sorted(path.name for path in empty.iterdir())
    expect(left == ["my.yaml", "run", "server.log"], f"nothing else in the folder; it has {left}")


@contextmanager
def server(unmask: Path, folder: Path) -> Iterator[str]:
    """Serve the checkpoint of the run on a free port, yield the address, and stop it as a service manager does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, address = folder / "server.log", f"http://127.0.0.1:{port}"
    command: Sequence[str | Path] = [unmask, "serve", "run/final", "--port", str(port)]
    print("$ unmask", *command[1:])
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while not answers(f"{address}/health"):
            expect(
                process.poll() is None and time.monotonic() < deadline, f"a server; it says {log.read_text()}"
            )
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        code = process.wait(60)
    expect(code == 0, f"a server that ends with exit code 0 on SIGTERM, not {code}")


def answers(url: str) -> bool:
    """Whether a server answers there."""
    try:
        return bool(ask(url))
    except OSError:
        return False


def ask(url: str, body: bytes | None = None) -> str:
    """The answer to a request: GET, or with a body POST."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"} if body else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


def expect(holds: bool, what: str) -> None:
    """End the script if it does not hold."""
    if not holds:
        sys.exit(f"expected {what}")


def main() -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="unmask-package-") as name:
        wheel = build(Path(name))
        try_alone(wheel, Path(name))
    print(f"{wheel.relative_to(ROOT)} works alone ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    main()
