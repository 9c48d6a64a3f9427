"""Print the lower bounds in pyproject.toml as exact versions, for `make test-oldest`."""

import re
import tomllib
from pathlib import Path

pyproject = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
project = pyproject["project"]
for requirement in (
    *pyproject["build-system"]["requires"],
    *project["dependencies"],
    *project["optional-dependencies"]["dev"],
    *project["optional-dependencies"]["docs"],
):
    found = re.match(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)", requirement)
    assert found, f"pyproject.toml: {requirement!r} has no lower bound"
    if found[1] != "torch":  # other builds of it than the pinned one are several GB
        print(f"{found[1]}=={found[2]}")
