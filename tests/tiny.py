"""Models and folders small enough to enumerate, shared by the tests: `from tiny import tiny_model`."""

from __future__ import annotations

import io
import json
import logging
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unmask.data.tokenizer import byte_tokenizer
from unmask.model.config import diffusion_values
from unmask.model.denoiser import MODEL_CLASSES

FAMILIES = ("qwen3", "qwen2", "llama")
OTHER_FAMILIES = ("qwen3_moe", "mistral", "gemma")
STOCK: dict[str, tuple[Any, Any]] = {
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
}

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    # Wide enough that the logits are far from uniform and a misplaced position shows.
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}


OWN_SIZES: dict[str, Any] = {
    "qwen3": {"head_dim": 12},
    "gemma": {"head_dim": 12},
    "qwen3_moe": {"head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    "mistral": {"sliding_window": None},
}


def tiny_stock_config(family: str = "qwen3", **fields: Any) -> Any:
    """A stock config; Qwen3's has heads * head_dim = 24 != hidden_size = 16, as Qwen3-0.6B does."""
    own = OWN_SIZES.get(family, {})
    return STOCK[family][0](**{**SIZES, **own, **fields})


def tiny_config(family: str = "qwen3", **fields: Any) -> Any:
    """A diffusion config; the last id is the mask token unless `mask_token_id` says otherwise."""
    stock = tiny_stock_config(family)
    values = {**diffusion_values(stock.to_dict()), "logit_shift": False, **fields}
    values.setdefault("mask_token_id", values["vocab_size"] - 1)
    model_type = values.pop("model_type")
    return MODEL_CLASSES[model_type].config_class(**values)


def plain_experts(model: Any) -> Any:
    """Let a mixture of experts compute them one by one, which works in float64 too."""
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")
    return model


def tiny_stock_model(
    family: str = "qwen3", *, seed: int = 0, dtype: torch.dtype = torch.float64, **fields: Any
) -> PreTrainedModel:
    """An autoregressive model of transformers with random weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return STOCK[family][1](tiny_stock_config(family, **fields)).to(dtype).eval()


def tiny_model(
    family: str = "qwen3", *, seed: int = 0, dtype: torch.dtype = torch.float64, **fields: Any
) -> Any:
    """A diffusion model with random weights, in train mode; leaves torch's generator as it was."""
    config = tiny_config(family, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return plain_experts(MODEL_CLASSES[config.model_type](config)).to(dtype).train()


def random_ids(*shape: int, vocab: int = 31, seed: int = 0) -> torch.Tensor:
    """Ids in [0, vocab): by default every id of `tiny_config` but the mask token."""
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def byte_fields(vocab_size: int = 260) -> dict[str, Any]:
    """Config fields that go with `byte_tokenizer`."""
    return {
        "vocab_size": vocab_size,
        "eos_token_id": 258,
        "pad_token_id": 256,
        "max_position_embeddings": 256,
    }


def autoregressive_folder(
    path: Path,
    family: str = "qwen3",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> Path:
    """Save a stock model with a byte tokenizer that has no mask token: 259 ids in 272 rows by default."""
    fields = {**byte_fields(272), **fields}
    tiny_stock_model(family, dtype=dtype, **fields).save_pretrained(path)
    (tokenizer or byte_tokenizer_without_mask()).save_pretrained(path)
    return path


def byte_tokenizer_without_mask() -> PreTrainedTokenizerBase:
    """`byte_tokenizer` as an autoregressive checkpoint would have it: 259 ids, no mask token."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    stock = byte_tokenizer()
    vocab = {token: i for token, i in stock.get_vocab().items() if i < 256}
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(text, special=True) for text in specials])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = stock.chat_template
    return tokenizer


def byte_model(family: str = "qwen3", **fields: Any) -> Any:
    """A diffusion model that goes with `byte_tokenizer`, float32, with its generation config."""
    return tiny_model(family, dtype=torch.float32, **{**byte_fields(), "mask_token_id": 259, **fields})


class Watched:
    """A model that keeps the ids that it is asked about."""

    def __init__(self) -> None:
        self.model: Any = byte_model(max_position_embeddings=512).eval()
        self.asked: list[list[int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def infill(self, ids: torch.Tensor, *more: Any, **settings: Any) -> Any:
        self.asked += ids.tolist()
        return self.model.infill(ids, *more, **settings)

    def masked_nll(self, ids: torch.Tensor, *more: Any, **settings: Any) -> Any:
        self.asked += ids.tolist()
        return self.model.masked_nll(ids, *more, **settings)


def assert_uniform(cells: torch.Tensor, count: int) -> None:
    """Chi-square test that integers in [0, count) are equally frequent; false alarms: 1 in a million.

    On keyed draws, or with a seeded generator, the outcome is the same at every run.
    """
    observed = torch.bincount(cells.flatten(), minlength=count)
    assert len(observed) == count
    p = chi_square_p(observed, torch.full((count,), 1 / count, dtype=torch.float64))
    assert p > 1e-6, f"chi-square test: p = {p:.1e}"


def assert_rate(hits: torch.Tensor, probability: float | torch.Tensor) -> None:
    """Test that each column of `hits` (draws, columns) is True at the given rate.

    Five standard errors for each column: a false alarm in 1.7 million columns (normal approximation).
    """
    hits = hits.double().reshape(len(hits), -1)
    p = torch.as_tensor(probability, dtype=torch.float64)
    error = (hits.mean(dim=0) - p).abs() / (p * (1 - p) / len(hits)).sqrt()
    assert error.max() < 5, f"off by {error.max():.1f} standard errors"


def recompute_activations(model: Any, reentrant: bool = False) -> None:
    """Turn activation checkpointing on; transformers 5.24 renamed the method."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def chi_square_p(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """P-value of Pearson's test that the counts were drawn from the probabilities.

    Cells of fewer than five expected draws, for which the approximation is poor, count as one.
    """
    expected = counts.sum() * probabilities
    rare = expected < 5
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(float(len(counts) - 1), dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, statistic.double() / 2).item()


def ragged(lengths: list[int], side: str = "left", extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of random rows, padded "left", "right" or in the "middle" of each row.

    Row of length n is `random_ids(1, n, seed=n)`; `extra` columns are padding in every row.
    """
    width = max(lengths) + extra
    ids, mask = torch.full((len(lengths), width), 9), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        before = {"left": 0, "right": length, "middle": length // 2}[side]
        columns = [*range(before), *range(before + width - length, width)]
        ids[row, columns] = random_ids(1, length, seed=length)[0]
        mask[row, columns] = 1
    return ids, mask


@dataclass
class Said:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The line of an error; the one after it names the page that explains it."""
        line, page = self.err.splitlines()
        assert line.startswith("error: ") and page.startswith("help: "), self.err
        return line


def run_cli(*arguments: str | Path, columns: int = 110) -> Said:
    """Run `unmask ARGUMENTS` in this process, and leave the libraries' loggers as they were."""
    from transformers.utils import logging as transformers_logging

    from unmask import cli

    verbosity, level = transformers_logging.get_verbosity(), logging.getLogger("torch").level
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["unmask", *map(str, arguments)])
        patch.setenv("COLUMNS", str(columns))
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main()
        finally:
            transformers_logging.set_verbosity(verbosity)
            transformers_logging.enable_progress_bar()
            logging.getLogger("torch").setLevel(level)
    code = ended.value.code
    return Said(code if isinstance(code, int) else 1, out.getvalue(), err.getvalue())


RUN_MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}


def run_recipe(folder: Path, **changes: Any) -> Any:
    """A recipe of six short steps on 24 records in `folder`; `a__b=1` sets the key a.b."""
    from unmask.config import recipe_from_dict

    data = folder / "data.jsonl"
    if not data.exists():
        lines = [{"instruction": f"Count {n}.", "output": "+" * (n % 11 + 1)} for n in range(24)]
        data.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    tree: dict[str, Any] = {
        "training_mode": "sft",
        "seed": 3,
        "model": {"config": dict(RUN_MODEL), "tokenizer": "bytes"},
        "data": {"dataset_name": str(data), "block_size": 64, "eval_size": 6},
        "global_batch_size": 4,
        "max_steps": 6,
        "precision": "fp32",
        "optimizer": {"learning_rate": 1e-2},
        "log_steps": 1,
        "report_to": [],
        "checkpoint_save_dir": str(folder / "run"),
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        section = tree
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return recipe_from_dict(tree)


def two_sources(folder: Path, **changes: Any) -> dict[str, Any]:
    """The section `data` of a mixture of twelve records each of a.jsonl (weight 3) and b.jsonl (weight 1)."""
    sources = []
    for name, weight in (("a", 3.0), ("b", 1.0)):
        lines = [{"instruction": f"{name} {n}", "output": name * (n % 5 + 1)} for n in range(12)]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        sources.append({"dataset_name": str(folder / f"{name}.jsonl"), "weight": weight})
    return {"sources": sources, "block_size": 64, **changes}


def train_run(folder: Path, out: str = "run", **changes: Any) -> tuple[Any, str]:
    """Train `run_recipe` into `folder / out`; the result, and what was printed."""
    from rich.console import Console

    from unmask.training.train import train

    printed = io.StringIO()
    recipe = run_recipe(folder, checkpoint_save_dir=str(folder / out), **changes)
    return train(recipe, Console(file=printed, width=200)), printed.getvalue()


def assert_same_run(one: Path, other: Path, tolerance: float = 0.0) -> None:
    """Losses, held-out losses, gradient norms and final weights agree; without a tolerance all logs, to the bit."""
    histories = [run_state(folder)["history"] for folder in (one, other)]
    assert [log["step"] for log in histories[0]] == [log["step"] for log in histories[1]]
    if tolerance == 0:
        assert histories[0] == histories[1]
    for first, second in zip(*histories, strict=True):
        for name in ("loss", "eval_loss", "grad_norm"):
            assert (name in first) == (name in second)
            if name in first:
                assert first[name] == pytest.approx(second[name], rel=tolerance), (name, first["step"])
    weights, others = run_weights(one), run_weights(other)
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=10 * tolerance, msg=name)


def run_state(folder: Path) -> dict[str, Any]:
    """`state.json` of the newest checkpoint of a run, its history without what depends on time."""
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    timed = ("time/", "model_flops", "supervised_tokens_per", "peak_memory", "useful_positions")
    state["history"] = [
        {name: value for name, value in log.items() if not name.startswith(timed)} for log in state["history"]
    ]
    return state


def run_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the folder that a run leaves."""
    from safetensors.torch import load_file

    files = sorted((folder / "final").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def written(tmp_path: Path, name: str, data: bytes | str) -> Path:
    """A file with these bytes or text."""
    file = tmp_path / name
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return file
