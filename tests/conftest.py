from __future__ import annotations

import os

# Before any hub library is imported: the tests reach no network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from unmask.data.tokenizer import byte_tokenizer

torch.set_num_threads(1)  # tiny tensors: threads only cost


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()
