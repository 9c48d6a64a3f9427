"""Execute a notebook in an empty folder and write it with its outputs: `make notebook`.

python scripts/notebook.py examples/tour.ipynb         writes it again
python scripts/notebook.py examples/tour.ipynb OUT     writes OUT instead
"""

from __future__ import annotations

import base64
import io
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

SECONDS = 900  # of a cell, at most
COLOURS = 32  # of a picture


def execute(file: Path) -> nbformat.NotebookNode:
    """Run all cells with the Python of this process; an error in one of them is raised."""
    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        client = NotebookClient(
            notebook,
            timeout=SECONDS,
            startup_timeout=SECONDS,
            kernel_name="python3",
            resources=resources,
            record_timing=False,
            extra_arguments=["--log-level=ERROR"],  # else the kernel warns that it listens on a local port
        )
        client.execute()
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = _together(cell.outputs)
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = _small(output.data["image/png"])
    notebook.metadata.language_info = {"name": "python"}  # not the version that it ran in
    return notebook


def _together(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Join the pieces in which a stream arrived."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        before = joined[-1] if joined else None
        if before and output.output_type == before.output_type == "stream" and output.name == before.name:
            before.text += output.text
        else:
            joined.append(output)
    return joined


def _small(png: str) -> str:
    """A picture with few colours."""
    out = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(COLOURS).save(
        out, "PNG", optimize=True
    )
    return base64.b64encode(out.getvalue()).decode()


def main(arguments: list[str]) -> None:
    """Execute and write."""
    file, out = Path(arguments[0]), Path(arguments[-1])
    started = time.monotonic()
    notebook = execute(file)
    nbformat.write(notebook, out)
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB, executed in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
