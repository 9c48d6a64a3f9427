"""Files that come with unmask: the recipes and the demo's data, found in a clone and in an installed package.

They are named as in a clone, such as recipes/tiny/train.jsonl, in recipes, on the command line and in what a run
saves; only what opens them asks where they are.
"""

from __future__ import annotations

import difflib
import glob
import re
from pathlib import Path, PurePath

from unmask.errors import UnmaskError

FOLDER = "recipes"


def shipped_folder(name: str = FOLDER) -> Path:
    """A folder that comes with unmask: inside the package where a wheel put it, next to the package in a clone."""
    package = Path(__file__).resolve().parent
    return package / name if (package / name).is_dir() else package.parent / name


def find_shipped(name: str | Path) -> str:
    """Return where a path or glob is: one that begins with recipes/ and does not exist here may come with unmask;
    any other stays as it is."""
    path = PurePath(name)
    if path.parts[:1] == (FOLDER,) and not glob.glob(str(path)):
        shipped = shipped_folder().joinpath(*path.parts[1:])
        if glob.glob(str(shipped)):
            return str(shipped)
    return str(name)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with unmask, by name."""
    return {file.stem: file for file in sorted(shipped_folder().glob("*.yaml"))}


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: the one named or, where there is none, the one of that name that comes with unmask."""
    path = Path(find_shipped(name))
    return path if path.exists() else shipped_recipes().get(str(name), path)


def recipe_text(name: str) -> str:
    """The YAML of a recipe that comes with unmask.

    Raises:
        UnmaskError: there is none of this name (names the nearest).
    """
    if name not in (known := shipped_recipes()):
        nearest = nearest_recipe(name, cutoff=0.4)
        near = f"the nearest is {nearest}: " if nearest else ""
        raise UnmaskError(f"no recipe {name!r} comes with unmask; {near}`unmask recipe list` shows all.")
    return known[name].read_text(encoding="utf-8")


def nearest_recipe(name: str | Path, cutoff: float = 0.6) -> str | None:
    """The recipe that comes with unmask and whose name is most like another, if it is at all."""
    bare = PurePath(name).name.removesuffix(".yaml")
    return next(iter(difflib.get_close_matches(bare, shipped_recipes(), 1, cutoff)), None)


def purpose(text: str) -> str:
    """The first sentence of a recipe's first comment, without the full stop."""
    comment = " ".join(line.lstrip("# ") for line in re.findall(r"\A(?:#.*\n)+", text)[0].splitlines())
    return re.split(r"\.(?=\s|$)", comment)[0]
