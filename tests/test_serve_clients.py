"""What runs against the server: lm-evaluation-harness, the command itself, Ray Serve."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import served_by
from tiny import byte_model, run_cli

from unmask.data.tokenizer import byte_tokenizer
from unmask.generation.prompts import prompt_example
from unmask.generation.text import complete
from unmask.model.checkpoint import save_checkpoint
from unmask.serving.protocol import GenerationExtra
from unmask.serving.scoring import left_to_right

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{q}}}}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "model"
    model = byte_model()
    model.generation_config.max_new_tokens = 12
    save_checkpoint(model, byte_tokenizer(), folder)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_evaluation_harness_runs_against_it(folder: Path, tmp_path: Path) -> None:
    """Its clients for chats and for completions: the answers, and the likelihoods of what is to be chosen."""
    evaluator = pytest.importorskip("lm_eval.evaluator")
    pytest.importorskip("tenacity")
    from lm_eval.tasks import TaskManager

    model, tokenizer = byte_model().eval(), byte_tokenizer()
    model.generation_config.max_new_tokens = 12
    items = [{"q": f"question {n}"} for n in range(3)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    generate = (
        "output_type: generate_until\ndoc_to_target: x\ngeneration_kwargs: {until: [e], max_gen_toks: 12}\n"
    )
    choose = 'output_type: multiple_choice\ndoc_to_choice: ["yes", "no"]\ndoc_to_target: 0\n'
    for name, rest in (("written", generate), ("chosen", choose)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + rest)
    with served_by(model) as server:

        def run(client: str, task: str, path: str, **more: Any) -> list[Any]:
            found = evaluator.simple_evaluate(
                model=client,
                model_args={"model": "m", "base_url": server.url + path, "num_concurrent": 2, **more},
                tasks=[task],
                task_manager=TaskManager(include_path=str(tmp_path)),
                apply_chat_template=client == "local-chat-completions",
                bootstrap_iters=0,
            )
            return sorted(found["samples"][task], key=lambda sample: sample["doc_id"])

        written = run("local-chat-completions", "written", "/v1/chat/completions")
        chosen = run("local-completions", "chosen", "/v1/completions", tokenizer=str(folder))
    for sample, item in zip(written, items, strict=True):
        prompt = prompt_example(tokenizer, item["q"])
        [done] = complete(model, tokenizer, [prompt], max_new_tokens=12, stop=["e"], temperature=0)
        assert sample["resps"] == [[done.text]]
    for sample, item in zip(chosen, items, strict=True):
        for answer, [(logprob, _)] in zip(("yes", "no"), sample["resps"], strict=True):
            ids = list(f"{item['q']} {answer}".encode())
            scores = left_to_right(model, ids, lambda: None)[len(item["q"]) :]
            assert float(logprob) == pytest.approx(sum(one.logprob for one in scores), abs=1e-4)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.mark.slow
def test_the_command_serves_and_drains(folder: Path) -> None:
    command = [sys.executable, "-m", "unmask", "serve", str(folder), "--port", "0", "--api-key", "k"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = process.stderr.readline()
            found = re.fullmatch(r"serving (.+) at (http://127\.0\.0\.1:[1-9]\d+) \(Ctrl-C ends it\)\n", said)
            assert found is not None and found[1] == str(folder), said
            url, key = found[2], {"authorization": "Bearer k"}
            assert httpx.get(f"{url}/health").json() == {"status": "ok"}  # it listens when it says so
            body = {"prompt": "a", "max_tokens": 200, "stream": True, "unmask": {"block_length": 1}}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=key, timeout=60) as stream:
                lines = stream.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                assert list(lines)[-2:] == ["data: [DONE]", ""]  # it was finished
            assert process.wait(30) == 0
        finally:
            process.kill()
        assert process.stderr.read() == ""


def test_what_the_page_of_the_docs_shows(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    with served_by(byte_model().eval(), name="outputs/demo/final") as server:
        [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        exec(code.replace("http://127.0.0.1:8000", server.url), {})
        assert "forward_passes=" in capsys.readouterr().out
        bodies = re.findall(r"localhost:8000(\S+) .*?-d '(.*?)'", page, re.DOTALL)
        assert [path for path, _ in bodies] == ["/v1/score", "/v1/infill"]
        for path, body in bodies:
            headers = {"content-type": "application/json"}
            assert httpx.post(server.url + path, content=body, headers=headers, timeout=60).status_code == 200
    named = set(re.findall(r"`(\w+)`", page[page.index("Under `unmask`") : page.index("## Streams")]))
    assert named - {"unmask", "stream"} == set(GenerationExtra.model_fields)


def test_what_the_command_refuses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        (["--adapter", "x"], "--adapter: expected NAME=FOLDER"),
        (["--adapter", "x=a", "--adapter", "x=b"], "each NAME once"),
        (["--adapter", f"x={folder}"], "is not a folder of LoRA adapters"),
        (["--api-key", ""], "must not be empty"),
    ):
        said = run_cli("serve", folder, *arguments)
        assert said.code == 2 and message in said.error
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    monkeypatch.delitem(sys.modules, "unmask.serving.app", raising=False)
    said = run_cli("serve", folder)
    assert said.code == 2 and "pip install 'unmask[serve]'" in said.err


def test_listening_elsewhere_without_a_key_is_warned_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import uvicorn

    ran: list[Any] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: ran.append(self.config.host))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        open_to_all = run_cli("serve", folder, "--host", "0.0.0.0")
        with_key = run_cli("serve", folder, "--host", "0.0.0.0", "--api-key", "k")
        local = run_cli("serve", folder)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert "anybody who reaches 0.0.0.0:8000" in open_to_all.err
    assert "anybody" not in with_key.err + local.err
    assert ran == ["0.0.0.0", "0.0.0.0", "127.0.0.1"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_replica_of_ray_serve(folder: Path) -> None:
    """`examples/ray_serve.py`, where Ray is installed."""
    pytest.importorskip("ray.serve", exc_type=ImportError)
    script = f"""
import httpx, ray
from ray import serve
from examples.ray_serve import deploy

ray.init(num_cpus=2, include_dashboard=False)
serve.start(http_options={{"port": {(port := free_port())}}})
serve.run(deploy({str(folder)!r}, most=1))
url = "http://127.0.0.1:{port}"
print("ANSWER", httpx.post(url + "/v1/completions", json={{"prompt": "ab"}}, timeout=60).json()["choices"][0]["text"])
with httpx.stream("POST", url + "/v1/completions", json={{"prompt": "ab", "stream": True}}, timeout=60) as stream:
    print("ENDS", [line for line in stream.iter_lines() if line][-1])
serve.shutdown()
"""
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        timeout=150,
        check=False,
    )
    out = run.stdout.decode(errors="replace")
    [done] = complete(byte_model().eval(), byte_tokenizer(), [list(b"ab")], max_new_tokens=12)
    assert f"ANSWER {done.text}" in out and "ENDS data: [DONE]" in out, run.stderr.decode()[-2000:]
