"""Whether a hub name can be fetched, asked once and quickly.

The hub libraries try again for half a minute before they admit that there is no network. One
short question first turns that wait into one line.
"""

from __future__ import annotations

import re
from pathlib import Path

from unmask.errors import UnmaskError
from unmask.formats import read_format

HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
PROBE_SECONDS = 10.0


def require_hub(name: str, repo_type: str) -> None:
    """Check that the hub answers for `name`, a "model" or a "dataset".

    Does nothing when the hub libraries are set offline (`HF_HUB_OFFLINE=1`): they then read their
    cache and fail at once by themselves.

    Raises:
        UnmaskError: No connection, or no such repository.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().repo_info(name, repo_type=repo_type, timeout=PROBE_SECONDS)
    except GatedRepoError as error:
        raise UnmaskError(
            f"{name}: this {repo_type} is gated; ask for access on its hub page and log in "
            "with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise UnmaskError(
            f"{name}: neither a local file or folder nor a {repo_type} on the hub "
            "(a private one needs `hf auth login`)."
        ) from error
    except Exception as error:
        # Anything else (a busy server, an odd mirror) is left to the real download to report.
        if _is_connection_failure(error):
            raise UnmaskError(
                f"{name}: no such local file or folder, and the hub cannot be reached; "
                "give a local path, or set HF_HUB_OFFLINE=1 if it is in the hub cache."
            ) from error


def model_on_hub(name: str) -> Path:
    """Folder in the hub's cache with the config of a model; with all but its code if it is another system's.

    Whatever transformers knows it downloads by itself.

    Raises:
        UnmaskError: The hub gives no `config.json` of that name.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        folder = Path(hf_hub_download(name, "config.json")).parent
        if read_format(folder) is not None:
            patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
            return Path(snapshot_download(name, allow_patterns=patterns))
    except OSError as error:  # of which the hub's own errors are
        raise UnmaskError(
            f"{name}: no model could be loaded: {first_line(error)}.{offline_hint()}"
        ) from error
    return folder


def offline_hint() -> str:
    """What to do about a name that the hub cannot give because it is not asked."""
    from huggingface_hub import constants

    return " HF_HUB_OFFLINE is set: unset it, or give a local path." if constants.HF_HUB_OFFLINE else ""


def first_line(error: BaseException, limit: int = 160) -> str:
    """The first line of an error's message, for quoting inside our own one-line error."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0].strip().rstrip(".: ") or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _is_connection_failure(error: BaseException) -> bool:
    # By name: the hub client has changed its HTTP library more than once.
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"TransportError", "ConnectionError", "ProxyError", "Timeout"})
