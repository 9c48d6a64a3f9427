"""What does computing logits on masked tokens alone save? Time of loss and gradient, as a ratio.

The reference is the plain way: full logits in float32 and a cross-entropy over every position, of which
all but the masked ones are thrown away. Both run in turn on the same batch with the same noise.

    python benchmarks/loss.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from unmask import Qwen3DiffusionConfig, Qwen3ForCausalLM
from unmask.diffusion.noise import sample_t, transition

VOCABULARY, BATCH, LENGTH, PROMPT = 151936, 4, 256, 128
ROUNDS = 3


def build() -> Qwen3ForCausalLM:
    """Qwen3's vocabulary on a small body, in bfloat16."""
    config = Qwen3DiffusionConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        mask_token_id=151669,
    )
    return Qwen3ForCausalLM(config).bfloat16().train()


def main() -> None:
    """Print both times and their ratio."""
    torch.manual_seed(0)
    model = build()
    ids = torch.randint(0, 151000, (BATCH, LENGTH))
    source = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    source[:, :PROMPT] = True
    seeds = torch.arange(BATCH)

    def ours() -> torch.Tensor:
        loss = model(ids, src_mask=source, training_mode="sft", noise_seed=seeds, return_logits=False).loss
        assert loss is not None
        return loss

    def plain() -> torch.Tensor:
        t = sample_t(BATCH, noise_seed=seeds)
        x_t, is_masked, t = transition(ids, t, ~source, 151669, noise_seed=seeds)
        logits = model.lm_head(model.model(input_ids=x_t, use_cache=False).last_hidden_state).float()
        nll = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
        return (nll * is_masked / t).sum() / (~source).sum()

    def seconds(loss: Callable[[], torch.Tensor]) -> tuple[float, float]:
        start = time.perf_counter()
        value = loss()
        value.backward()
        model.zero_grad()
        return time.perf_counter() - start, value.item()

    seconds(ours), seconds(plain)  # warm up
    times = [(seconds(ours), seconds(plain)) for _ in range(ROUNDS)]
    for (_, a), (_, b) in times:
        assert abs(a - b) < 0.01 * b, (a, b)
    ours_s, plain_s = (statistics.median(pair[k][0] for pair in times) for k in (0, 1))
    print(f"loss and gradient, vocabulary {VOCABULARY}, batch {BATCH} x {LENGTH}, half of it prompt, bf16")
    print(
        f"plain full logits {plain_s:.2f} s, masked rows alone {ours_s:.2f} s: {plain_s / ours_s:.1f} times"
    )


if __name__ == "__main__":
    main()
