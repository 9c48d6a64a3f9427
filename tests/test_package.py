"""What a package has: of the wheel and the sdist built here, of CITATION.cff, the images and the workflows.

`make package` goes on from there: it installs the wheel alone and uses it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
import yaml

import unmask
from unmask.explain import PAGES, TROUBLESHOOTING

ROOT = Path(__file__).resolve().parent.parent
IMAGES = sorted(ROOT.glob("Dockerfile*"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
RELATIVE = re.compile(r"\]\((?!https?://|#)[^)]*\)|(?:src|srcset|href)=\"(?!https?://|#)")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both, built with the hatchling that is installed."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    """The wheel, unpacked as pip does."""
    [file] = dist.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(dist / "wheel")
    return dist / "wheel"


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    [file] = wheel.glob("*.dist-info/METADATA")
    return message_from_string(file.read_text(encoding="utf-8"))


def files_in(folder: Path) -> set[str]:
    """Relative paths of the files, without what Python writes next to them."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)) for path in files}


def test_the_wheel_has_the_package_and_its_recipes_and_pages_alone(wheel: Path) -> None:
    assert {path.name for path in wheel.iterdir()} == {"unmask", f"unmask-{unmask.__version__}.dist-info"}
    recipes = {f"recipes/{name}" for name in files_in(ROOT / "recipes") if not name.endswith(".sh")}
    of_the_site = {"changelog.md", "contributing.md", "index.md", "log.md"}
    pages = {f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")} - {
        f"docs/{x}" for x in of_the_site
    }
    assert files_in(wheel / "unmask") == files_in(ROOT / "unmask") | recipes | pages
    assert {f"docs/{page}" for page in (*PAGES.values(), TROUBLESHOOTING)} <= pages
    assert {"py.typed", "templates/playground.html", "evaluation/tasks/unmask_mbpp.yaml"} <= files_in(
        wheel / "unmask"
    )
    assert "recipes/tiny/train.jsonl" in recipes


def test_an_installed_wheel_finds_its_own_recipes(wheel: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    code = "import unmask, unmask.shipped as s; print(unmask.__file__); print(s.shipped_folder())"
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": True}
    printed = subprocess.run([sys.executable, "-c", code], **run).stdout.split()
    assert printed == [str(wheel / "unmask" / "__init__.py"), str(wheel / "unmask" / "recipes")]
    show = [sys.executable, "-m", "unmask", "recipe", "show", "train_tiny_sft"]
    assert subprocess.run(show, **run).stdout == (ROOT / "recipes" / "train_tiny_sft.yaml").read_text()
    wrong = subprocess.run([*show[:3], "train", "nope.yaml"], **{**run, "check": False}).stderr.splitlines()
    file, _, line = wrong[1].removeprefix("help: ").rpartition(":")
    page = wheel / "unmask" / "docs" / TROUBLESHOOTING
    assert Path(file).expanduser() == page
    assert "no such recipe file" in page.read_text(encoding="utf-8").splitlines()[int(line) - 1]


def test_the_sdist_has_what_make_needs(dist: Path) -> None:
    [file] = dist.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"Makefile", "constraints.txt", "pyproject.toml", "README.md", "CITATION.cff", "sft_example.py"}
    needed |= {
        ".ci/run",
        ".gitignore",
        ".pre-commit-config.yaml",
        "mkdocs.yml",
        *(one.name for one in IMAGES),
    }
    for folder in ("unmask", "tests", "recipes", "docs", "scripts", "benchmarks", "examples", ".github"):
        needed |= {f"{folder}/{name}" for name in files_in(ROOT / folder)}
    assert needed - names == set()
    assert {name for name in names if name.startswith((".venv", "outputs", "dist", "site"))} == set()


def test_metadata_is_complete_and_its_description_leads_nowhere_that_is_not_there(metadata: Message) -> None:
    assert metadata["Version"] == unmask.__version__
    for name in ("Summary", "Author", "License-Expression", "License-File", "Keywords", "Requires-Python"):
        assert metadata[name], name
    assert "Typing :: Typed" in (metadata.get_all("Classifier") or [])
    text, readme = metadata.get_payload(), (ROOT / "README.md").read_text(encoding="utf-8")
    assert metadata["Description-Content-Type"] == "text/markdown" and isinstance(text, str)
    assert RELATIVE.findall(readme) and RELATIVE.findall(text) == []
    blocks = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    assert blocks.findall(text) == blocks.findall(readme)


def test_the_citation_names_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"]
    assert (citation["version"], citation["license"]) == (unmask.__version__, project["license"])
    assert citation["authors"] == project["authors"]


@pytest.mark.parametrize("image", IMAGES, ids=lambda file: file.name)
def test_an_image_copies_what_exists_and_is_what_the_build_needs(image: Path, tmp_path: Path) -> None:
    text = image.read_text(encoding="utf-8")
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for line in re.findall(r"^COPY (.*)$", text, flags=re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            assert (ROOT / source).exists() and f"!{source}" in allowed, source
            copied = tmp_path / (
                target.rstrip("/") if (ROOT / source).is_dir() else f"{target}/{source.split('/')[-1]}"
            )
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.symlink_to(ROOT / source)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = (tmp_path / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"unmask/docs/troubleshooting.md", "unmask/recipes/train_tiny_sft.yaml"} <= names
    [torch] = re.findall(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"torch==[\d.]+", text)) <= {torch}
    assert "never built" in text


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_runs_what_exists(file: Path) -> None:
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    text = file.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    commands = []
    for job in workflow["jobs"].values():
        assert job["runs-on"] and 0 < job.get("timeout-minutes", 30) <= 90
        for step in job["steps"]:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]) if "uses" in step else step["run"]
            commands += [step["run"]] if "run" in step else []
    assert commands and "has never run" in text
    for command in commands:
        tool, argument = command.split()
        assert argument in targets if tool == "make" else (ROOT / argument).exists(), command
