"""How much of a GPU do training and generation use at the geometry of Qwen3-1.7B, with random weights?

Training: model FLOP utilisation of SFT steps (bf16, AdamW) on padded and on packed rows, the operations that the
model needs over the measured peak of a matrix product. Generation: new tokens a second, of a bidirectional model
on a fixed canvas and of a block-causal one with cached keys, for 1 to 32 prompts together.

    python benchmarks/gpu.py            # skipped without a GPU
    python benchmarks/gpu.py --tiny     # the same on any device with two small layers: shows that it runs, no figure
"""

from __future__ import annotations

import argparse
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from unmask import Qwen3DiffusionConfig, Qwen3ForCausalLM
from unmask.diffusion.corrupt import corrupt
from unmask.diffusion.objective import Objective
from unmask.training.metrics import COUNTS, Accounting, peak_memory
from unmask.training.parallel import Processes

QWEN3_1_7B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
ROWS, LENGTH, PROMPT = 8, 1024, 256  # of a training step; tokens of a row, and of its prompt
STEPS = 10


def make_model(sizes: dict[str, Any], device: torch.device, dtype: torch.dtype, **fields: Any) -> Any:
    """Make a model of random weights on the device."""
    torch.manual_seed(0)
    config = Qwen3DiffusionConfig(
        **sizes,
        **fields,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        mask_token_id=sizes["vocab_size"] - 1,
    )
    with device:
        return cast(Any, Qwen3ForCausalLM(config)).to(dtype)


def random_batch(vocab: int, rows: int, length: int, packed: bool, device: torch.device) -> dict[str, Any]:
    """Rows of one conversation each, half of the columns padding at worst, or packed with four documents."""
    make = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab - 1, (rows, length), generator=make)
    column = torch.arange(length).expand(rows, length)
    batch: dict[str, Any] = {"input_ids": ids, "training_mode": "sft"}
    if packed:
        batch["segment_ids"] = column * 4 // length
        batch["src_mask"] = column % (length // 4) < length // 16
    else:
        lengths = torch.linspace(length // 2, length, rows).long()
        batch["attention_mask"] = column < lengths[:, None]
        batch["src_mask"] = column < length // 4
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def training(sizes: dict[str, Any], rows: int, length: int, device: torch.device) -> None:
    """Print tokens a second and utilisation of SFT steps: float32 weights, bf16 products."""
    model = make_model(sizes, device, torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    accounting = Accounting(model, torch.bfloat16, Processes(0, 1, device))
    for packed in (False, True):
        batch = random_batch(sizes["vocab_size"], rows, length, packed, device)
        seeds = torch.arange(rows * 4, device=device).view(rows, 4)  # of each document
        seeds = seeds if packed else seeds[:, 0]
        for step in range(STEPS + 3):
            if step == 3:  # warm
                accounting.counts.zero_()
                _wait(device)
                start = time.perf_counter()
            inputs, objective = model.prepare(**batch), Objective()
            noised = corrupt(inputs, objective, seeds + step * seeds.numel())
            accounting.count(noised, objective)
            with _autocast(device):
                loss = model.diffusion_loss(inputs, noised, objective)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _wait(device)
        seconds = time.perf_counter() - start
        done = dict(zip(COUNTS, accounting.counts.tolist(), strict=True))
        print(
            f"training, {'packed' if packed else 'padded'} {rows} x {length}:"
            f" {done['supervised'] / seconds:,.0f} supervised tokens/s,"
            f" {done['flops'] / seconds / accounting.peak:.1%} of the measured peak"
            f" ({accounting.peak / 1e12:,.1f} TFLOP/s), {(peak_memory(device) or 0) / 2**30:.1f} GiB",
            flush=True,
        )


def generation(sizes: dict[str, Any], prompt: int, new: int, most: int, device: torch.device) -> None:
    """Print new tokens a second, one denoising step a token."""
    ways: dict[str, dict[str, Any]] = {
        "fixed canvas": {},
        "block-causal, cached": {"attention": "block_causal", "block_length": 32},
    }
    for name, fields in ways.items():
        model = make_model(sizes, device, torch.bfloat16, **fields).eval()
        rates, rows = [], 1
        while rows <= most:
            ids = random_batch(sizes["vocab_size"], rows, prompt, False, device)["input_ids"]
            model.generate(ids, max_new_tokens=32, steps=2, eos_token_id=[])  # warm
            _wait(device)
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=new, eos_token_id=[])
            _wait(device)
            rates.append(f"{rows}: {rows * new / (time.perf_counter() - start):,.0f}")
            rows *= 2
        print(
            f"generation, {name}, {prompt} + {new} tokens: tokens/s by prompts {', '.join(rates)}", flush=True
        )


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "cpu" else torch.autocast(device.type, torch.bfloat16)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description="How much of a GPU do training and generation use?")
    parser.add_argument("--tiny", action="store_true", help="two small layers, on any device")
    tiny = parser.parse_args().tiny
    if not (tiny or torch.cuda.is_available()):
        print("skipped: there is no GPU")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {name}{', tiny: no figure' if tiny else ''}", flush=True)
    if tiny:
        training({**TINY, "num_attention_heads": 4, "num_key_value_heads": 2}, 4, 64, device)
        generation({**TINY, "num_attention_heads": 4, "num_key_value_heads": 2}, 16, 32, 4, device)
    else:
        training(QWEN3_1_7B, ROWS, LENGTH, device)
        generation(QWEN3_1_7B, PROMPT, 256, 32, device)


if __name__ == "__main__":
    main()
