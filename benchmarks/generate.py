"""What do the fast paths of generation save, and what do policies and approximate caches cost in quality?

The reference is written here, as the published samplers are: the whole canvas, full logits at every step, no
cache, one token a step. Exact paths must give its tokens; they run on random weights. Policies and
approximate caches are measured on a trained model.

    python benchmarks/generate.py                      # exact paths; a few minutes
    python benchmarks/generate.py --large              # the 1.7B geometry, 8 layers: 3 GB, minutes
    python benchmarks/generate.py --model outputs/demo/final --plot policies.png   # after `make demo`
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from unmask import Qwen3DiffusionConfig, Qwen3ForCausalLM, load_model, load_tokenizer
from unmask.data.encode import Encoder
from unmask.data.files import read_records
from unmask.evaluation.exact_match import exact_share
from unmask.generation.text import complete, make_prompts

SMALL: dict[str, Any] = {
    "vocab_size": 16384,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
LARGE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def make(sizes: dict[str, Any], dtype: torch.dtype, **fields: Any) -> Any:
    """Make a model of random weights that does not settle on one token."""
    torch.manual_seed(0)
    config = Qwen3DiffusionConfig(
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        mask_token_id=sizes["vocab_size"] - 1,
        initializer_range=0.05,
        **sizes,
        **fields,
    )
    return cast(Any, Qwen3ForCausalLM(config)).to(dtype).eval()


def random_prompts(model: Any, *lengths: int) -> list[Tensor]:
    """One row of random ids for each length."""
    make = torch.Generator().manual_seed(1)
    return [torch.randint(0, model.config.vocab_size - 1, (1, n), generator=make) for n in lengths]


@torch.no_grad()
def reference(model: Any, prompt: Tensor, new: int) -> Tensor:
    """Write one token a forward: the whole canvas and all its logits, each time."""
    mask, length = model.config.mask_token_id, prompt.shape[1]
    block = model.config.block_length or new
    ids = torch.cat([prompt, torch.full((1, new), mask)], dim=1)
    source = torch.arange(ids.shape[1])[None] < length
    for start in range(length, length + new, block):
        for _ in range(min(block, length + new - start)):
            logits = model(ids, src_mask=source, training_mode="sft").logits.float()
            logits[..., mask] = -torch.inf
            p, best = torch.softmax(logits, dim=-1).max(dim=-1)
            p[ids != mask] = -1
            p[:, start + block :] = -1
            place = int(p.argmax())
            ids[0, place] = best[0, place]
    return ids


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Run and say how many seconds of the processor it took, which other programs do not add to."""
    start = time.process_time()
    result = run()
    return result, time.process_time() - start


def compare(name: str, model: Any, prompt: Tensor, new: int, floor: float, **settings: Any) -> None:
    """Time one exact path against the reference, and compare their tokens."""
    generate = {"max_new_tokens": new, "eos_token_id": [], "return_dict_in_generate": False, **settings}
    model.generate(prompt, **{**generate, "max_new_tokens": 2})  # warm
    expected, slow = timed(lambda: reference(model, prompt, new))
    found, fast = timed(lambda: model.generate(prompt, **generate))
    same = (found == expected)[:, prompt.shape[1] :].float().mean().item()
    print(
        f"{name}: reference {slow:.1f} s, generate {fast:.2f} s, {slow / fast:.1f} times faster (the floor by"
        f" operations: {floor:.1f}); {same:.1%} of the tokens the same",
        flush=True,
    )


def operations(model: Any, rows: float, columns: int, masked: float, last: float | None = None) -> float:
    """Multiplications of one forward: rows computed against columns, of which some pass the head.

    `last` is the number of rows whose queries and MLP the last layer computes; all by default.
    """
    c = model.config
    keys = 2 * c.hidden_size * c.num_key_value_heads * c.head_dim
    width = c.num_attention_heads * c.head_dim
    rest = 2 * c.hidden_size * width + 3 * c.hidden_size * c.intermediate_size + 2 * width * columns
    narrow = rows if last is None else last
    layers = (c.num_hidden_layers - 1) * rows * (keys + rest) + rows * keys + narrow * rest
    return layers + masked * c.hidden_size * c.vocab_size


def exact(large: bool) -> None:
    """The paths that give the reference's tokens."""
    if large:
        model = make(LARGE, torch.bfloat16)
        old, new = 96, 32
        slow = operations(model, old + new, old + new, old + new) * new
        fast = sum(operations(model, old + new, old + new, k, k) for k in range(1, new + 1))
        compare(
            f"full attention, 1.7B geometry of 8 layers, bf16, prompt {old}, {new} new tokens, one a step",
            model,
            random_prompts(model, old)[0],
            new,
            slow / fast,
        )
        return
    model = make(SMALL, torch.float32, attention="block_causal", block_length=32)
    old, new, block = 512, 256, 32
    whole = old + new
    slow = operations(model, whole, whole, whole) * new
    fast = operations(model, old, old, 0, 0)
    for start in range(old, whole, block):
        fast += sum(operations(model, block, start + block, k, k) for k in range(1, block + 1))
        fast += operations(model, block, start + block, 0, 0)
    compare(
        f"block-causal, blocks of {block}, fp32, prompt {old}, {new} new tokens, one a step",
        model,
        random_prompts(model, old)[0],
        new,
        slow / fast,
    )
    model = make(SMALL, torch.float32)
    old, new = 256, 64
    slow = operations(model, old + new, old + new, old + new) * new
    fast = sum(operations(model, old + new, old + new, k, k) for k in range(1, new + 1))
    compare(
        f"full attention, fp32, prompt {old}, {new} new tokens, one a step",
        model,
        random_prompts(model, old)[0],
        new,
        slow / fast,
    )
    batched()


def batched() -> None:
    """Eight ragged prompts together against one by one."""
    model = make(SMALL, torch.float32, attention="block_causal", block_length=4)
    prompts = random_prompts(model, 40, 97, 64, 18, 130, 75, 52, 111)
    width = max(prompt.shape[1] for prompt in prompts)
    ids, mask = torch.zeros(8, width, dtype=torch.long), torch.zeros(8, width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - prompt.shape[1] :] = prompt
        mask[row, width - prompt.shape[1] :] = 1
    settings = {"max_new_tokens": 64, "eos_token_id": [], "return_dict_in_generate": False}
    model.generate(ids, mask, **{**settings, "max_new_tokens": 4})
    alone, slow = timed(lambda: [model.generate(prompt, **settings)[0, -64:] for prompt in prompts])
    together, fast = timed(lambda: model.generate(ids, mask, **settings)[:, -64:])
    same = (together == torch.stack(alone)).float().mean().item()
    print(
        f"8 ragged prompts, blocks of 4, fp32, 64 new tokens each: one by one {8 * 64 / slow:.0f} tokens/s,"
        f" together {8 * 64 / fast:.0f}, {slow / fast:.1f} times; {same:.1%} of the tokens the same",
        flush=True,
    )


def ways(canvas: int) -> list[tuple[str, dict[str, Any]]]:
    """Every policy, at several strengths, and every approximate cache."""
    listed: list[tuple[str, dict[str, Any]]] = []
    for policy in ("maskgit_plus", "topk_margin", "entropy", "left_to_right", "random", "origin"):
        listed += [(policy, {"policy": policy, "steps": canvas // k}) for k in (1, 2, 4, 8)]
    listed += [("threshold", {"threshold": value}) for value in (0.99, 0.95, 0.9, 0.8, 0.6)]
    listed += [("factor", {"factor": value}) for value in (0.05, 0.2, 0.5, 1.0)]
    listed += [("entropy_bound", {"entropy_bound": value}) for value in (0.01, 0.05, 0.1, 0.3, 1.0)]
    for kind in ("remdm_cap", "remdm_rescale", "remdm_confidence"):
        listed += [(kind, {"policy": kind, "eta": 0.1, "steps": canvas // k}) for k in (1, 2)]
    for kind in ("prefix", "dual"):
        cache = {"approximate_cache": kind, "block_length": max(1, canvas // 4)}
        listed += [(f"{kind} cache", cache), (f"{kind} cache", {**cache, "refresh_interval": 2})]
        listed += [(f"{kind} cache, threshold", {**cache, "threshold": 0.9})]
    return listed


def quality(folder: str, prompts_file: str, limit: int, plot: Path | None) -> None:
    """Exact match, tokens a forward and speed of every way on a trained model."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    canvas = model.generation_config.max_new_tokens  # type: ignore[union-attr]
    prompts = make_prompts(read_records(prompts_file, limit=limit), Encoder(tokenizer))
    blocks = getattr(model.config, "block_length", None) is not None
    found: list[tuple[str, float, float]] = []
    print(f"{folder}: {len(prompts)} prompts, canvas {canvas}; tokens are counted up to the end token")
    print("| way | settings | exact match | tokens a forward | tokens/s |\n|---|---|---|---|---|")
    for name, settings in ways(canvas):
        if blocks and "approximate_cache" in settings:
            continue
        answers, seconds = timed(
            lambda settings=settings: complete(
                model, tokenizer, [prompt.example for prompt in prompts], batch_size=64, **settings
            )
        )
        tokens = sum(len(answer.ids) for answer in answers)
        passes = sum(max(answer.commit_step) + 1 for answer in answers if answer.commit_step)
        share = exact_share(answers, prompts)
        found.append((name, tokens / passes, share))
        told = ", ".join(f"{key}={value}" for key, value in settings.items() if value != name)
        print(
            f"| {name} | {told} | {share:.1%} | {tokens / passes:.2f} | {tokens / seconds:.0f} |",
            flush=True,
        )
    if plot is not None:
        draw(found, plot)
        print(f"plot: {plot}")


def draw(found: list[tuple[str, float, float]], file: Path) -> None:
    """Plot exact match against tokens a forward, a line for each way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), dpi=120)
    names = list(dict.fromkeys(name for name, _, _ in found))
    colours = plt.colormaps["tab20"]
    for index, name in enumerate(names):
        points = sorted((speed, share) for other, speed, share in found if other == name)
        axes.plot(*zip(*points, strict=True), "o-", label=name, color=colours(index % 20), markersize=4)
    axes.set_xlabel("tokens a forward")
    axes.set_ylabel("exact match")
    shares = [share for _, _, share in found]
    axes.set_ylim(max(0.0, min(shares) - 0.02), min(1.0, max(shares)) + 0.01)  # the ways differ by little
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def main() -> None:
    """Measure exact paths, or policies on a trained model."""
    parser = argparse.ArgumentParser(description="What do the fast paths of generation save?")
    parser.add_argument("--large", action="store_true", help="the 1.7B geometry cut to 8 layers")
    parser.add_argument("--model", help="a trained checkpoint: measure policies and approximate caches")
    parser.add_argument("--prompts", default="recipes/tiny/heldout.jsonl", help="held-out records")
    parser.add_argument("--limit", type=int, default=300, help="records")
    parser.add_argument("--plot", type=Path, help="draw quality against tokens a forward")
    args = parser.parse_args()
    if args.model is not None:
        quality(args.model, args.prompts, args.limit, args.plot)
    else:
        exact(args.large)


if __name__ == "__main__":
    main()
