"""Load what a name says: a folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unmask.errors import UnmaskError
from unmask.formats import read_format

HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
OF_RECORDS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")  # often in the place of MODEL
PROBE_SECONDS = 10.0


def load_named(name: str, what: str, load: Callable[[str], Any]) -> Any:
    """Return `load(name)`, where the name is a folder or one on the hub.

    The hub libraries try again for half a minute before they admit that there is no network: one short
    question first turns that wait into one line, unless they are set offline and read their cache alone.

    Args:
        what: "checkpoint", "tokenizer" or "data set".

    Raises:
        UnmaskError: Not a folder, and the hub has no such repository or cannot be reached; or `load` fails.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    folder = Path(name).expanduser()
    if folder.is_file() and folder.suffix.lower() in OF_RECORDS and what != "data set":
        raise UnmaskError(
            f"{name}: a checkpoint is a folder; this is a file of records: MODEL comes before it."
        )
    if folder.is_file():
        raise UnmaskError(f"{name}: a {what} is a folder; this is a file.")
    if not folder.is_dir() and not HUB_NAME.fullmatch(name):
        raise UnmaskError(f"{name}: no such {what} folder, nor a name on the hub.")
    if not folder.is_dir() and not constants.HF_HUB_OFFLINE:
        repo_type = "dataset" if what == "data set" else "model"
        try:
            HfApi().repo_info(name, repo_type=repo_type, timeout=PROBE_SECONDS)
        except RepositoryNotFoundError as error:
            raise UnmaskError(
                f"{name}: neither a local file or folder nor a {repo_type} on the hub that you may read"
                " (a gated or private one needs access and `hf auth login`)."
            ) from error
        except Exception as error:
            # By name, as the hub client has changed its HTTP library. Other errors are left to the download.
            names = {cls.__name__ for cls in type(error).__mro__}
            if names & {"TransportError", "ConnectionError", "ProxyError", "Timeout"}:
                raise UnmaskError(
                    f"{name}: no such local file or folder, and the hub cannot be reached; "
                    "give a local path, or set HF_HUB_OFFLINE=1 if it is in the hub cache."
                ) from error
    try:
        return load(str(folder) if folder.is_dir() else name)
    except UnmaskError:
        raise
    except Exception as error:  # transformers, datasets and the hub client each have their own families
        if folder.is_dir():
            raise UnmaskError(f"{name}: this folder has no usable {what}: {first_line(error)}.") from error
        hint = " HF_HUB_OFFLINE is set: unset it, or give a local path." if constants.HF_HUB_OFFLINE else ""
        raise UnmaskError(
            f"{name}: no such local file or folder, and no {what} could be loaded: {first_line(error)}.{hint}"
        ) from error


def model_folder(name: str) -> Path:
    """Return a folder as it is, of a model on the hub that with its config in the cache.

    If that is another system's, the folder has all but its code; what transformers knows it downloads itself.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    if (folder := Path(name)).is_dir():
        return folder
    folder = Path(hf_hub_download(name, "config.json")).parent
    if read_format(folder) is None:
        return folder
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
    return Path(snapshot_download(name, allow_patterns=patterns))


def first_line(error: BaseException, limit: int = 160) -> str:
    """The first line of an error's message, for quoting inside our own one-line error."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0].strip().rstrip(".: ") or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
