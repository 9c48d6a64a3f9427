from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator

# Before any hub library is imported: the tests reach no network, and each process of them (pytest-xdist) has a
# cache of encoded data to itself, which goes with it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="unmask-tests-")

import hypothesis
import jaxtyping
import pytest

# Before unmask.diffusion is imported: the shapes in its annotations are checked at every call. An int
# passes for a float, as it does for type checkers.
jaxtyping.install_import_hook(
    "unmask.diffusion", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

import torch  # noqa: E402
from transformers import PreTrainedTokenizerBase  # noqa: E402

from unmask.data.tokenizer import byte_tokenizer  # noqa: E402
from unmask.model import bf16  # noqa: E402

# The same cases at every run, and no deadline: these machines are shared.
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None)
hypothesis.settings.load_profile("steady")

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
torch.set_num_threads(1)  # on tensors this small threads only cost


ENVIRONMENT = os.environ


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_environment() -> None:
    """`Dataset.map` with several processes puts a copy in the place of os.environ; rich keeps the first."""
    os.environ = ENVIRONMENT  # noqa: B003 (the same object again, nothing is to be cleared)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@pytest.fixture(autouse=True, scope="session")
def _bf16_is_fast() -> Iterator[None]:
    """What tests of bf16 do and say is the same on a CPU that has none: it counts as twice as fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bf16, "seconds_of_product", lambda dtype: float(dtype.itemsize))
        yield


@pytest.fixture
def bf16_takes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Set how many times as long as in float32 a matrix product in 16 bits takes on this CPU."""

    def takes(times: float) -> None:
        bf16.slowdown.cache_clear()
        monkeypatch.setattr(bf16, "seconds_of_product", lambda dtype: times if dtype.itemsize < 4 else 1.0)

    yield takes
    bf16.slowdown.cache_clear()
