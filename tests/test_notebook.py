"""examples/tour.ipynb shows what its text says: as it is in the repository, and executed again."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "tour.ipynb"
# An absolute path, a date or a time of day: of the machine that executed it.
OF_A_MACHINE = re.compile(r"(?<![\w.:/<])/\w[\w.-]*/\w|\d{4}-\d\d-\d\d|\b\d\d:\d\d:\d\d\b")


def outputs_of(notebook: nbformat.NotebookNode, name: str) -> list[nbformat.NotebookNode]:
    [cell] = [cell for cell in notebook.cells if cell.id == name]
    return cell.outputs


def plain(text: str) -> str:
    """A text without its colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def text_of(notebook: nbformat.NotebookNode, name: str) -> str:
    """What a cell prints."""
    return plain("".join(output["text"] for output in outputs_of(notebook, name)))


def check(notebook: nbformat.NotebookNode) -> None:
    """What the text claims is in the outputs, and nothing that is wrong or of one machine."""
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for output in (output for cell in code for output in cell.outputs):
        assert output.output_type in ("stream", "display_data"), output
        shown = output.get("text") or output["data"].get("text/html", "")
        assert not OF_A_MACHINE.search(shown), shown
        assert output.get("name") != "stderr" or re.fullmatch(r"(training: .*left\n)+", shown), shown

    clean, *_, masked = text_of(notebook, "transition").splitlines()
    assert clean.endswith("wool wool⏹") and masked.endswith("wool.⏎" + "░" * 10)
    trained = text_of(notebook, "run")
    losses = [float(loss) for loss in re.findall(r"held-out loss ([\d.]+)", trained)]
    assert len(losses) == 3 and losses[-1] < losses[0] / 50
    [after] = re.findall(r"before 0.0%, after ([\d.]+)%", trained)
    assert float(after) >= 90
    for picture in outputs_of(notebook, "pictures"):
        assert base64.b64decode(picture["data"]["image/png"]).startswith(b"\x89PNG")
    assert len(outputs_of(notebook, "pictures")) == 2
    traces = outputs_of(notebook, "trace")
    for trace, answer in zip(traces, ("whale whale", "f-o-l-k", "ALIVE"), strict=True):
        _, first, *_, last = plain(trace["data"]["text/plain"]).splitlines()
        assert last.endswith(f" {answer}⏹") and "░" in first
        assert "color:" in trace["data"]["text/html"]
    shares = re.findall(r"steps: (\d+)% of the answers right, ([\d.]+) steps", text_of(notebook, "speed"))
    assert len(shares) == 3 and min(int(share) for share, _ in shares) >= 85 and shares[-1][1] == "1.0"
    assert text_of(notebook, "gap").startswith("likeliest: w-o-o-l\n  a gap of 4:")
    right, wrong = (float(nats) for nats in re.findall(r": ([\d.]+) ±", text_of(notebook, "nats")))
    assert right < wrong / 3


def test_what_the_notebook_shows_is_what_its_text_says() -> None:
    assert NOTEBOOK.stat().st_size < 100_000
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    check(notebook)
    for cell in notebook.cells:
        for link in re.findall(r"\]\(([^)]+)\)", cell.source if cell.cell_type == "markdown" else ""):
            assert (NOTEBOOK.parent / link).exists(), link


@pytest.mark.slow
def test_the_notebook_runs_and_shows_the_same(tmp_path: Path) -> None:
    out = tmp_path / "tour.ipynb"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "notebook.py"), str(NOTEBOOK), str(out)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    executed, committed = (nbformat.read(file, as_version=4) for file in (out, NOTEBOOK))
    check(executed)
    assert [cell.source for cell in executed.cells] == [cell.source for cell in committed.cells]
    assert {file.name for file in tmp_path.iterdir()} == {"tour.ipynb"}
