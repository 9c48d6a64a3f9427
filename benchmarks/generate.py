"""What do the fast paths of generation save, and what do policies and approximate caches cost in quality?

The reference is written here, as the published samplers are: the whole canvas, full logits at every step, no
cache, one token a step. Exact paths must give its tokens; they run on random weights. Policies and
approximate caches are measured on a trained model.

    python benchmarks/generate.py                      # exact paths; a few minutes
    python benchmarks/generate.py --large              # the 1.7B geometry, 8 layers: 3 GB, minutes
    python benchmarks/generate.py --vocabulary         # where the time of a step goes at Qwen3's vocabulary
    python benchmarks/generate.py --ragged             # answers of unlike lengths: fixed batches or none
    python benchmarks/generate.py --model outputs/demo/final --plot policies.png   # after `make demo`
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3Config
from transformers import Qwen3ForCausalLM as StockQwen3

from unmask import Qwen3DiffusionConfig, Qwen3ForCausalLM, load_model, load_tokenizer
from unmask.data.encode import Encoder
from unmask.data.files import read_records
from unmask.data.tokenizer import byte_tokenizer
from unmask.evaluation.exact_match import exact_share
from unmask.generation.prompts import make_prompts
from unmask.generation.text import complete

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
# Qwen3's vocabulary under a small backbone: here a sampler shows what it costs.
VOCABULARY: dict[str, Any] = {**SMALL, "vocab_size": 151936, "num_hidden_layers": 4}


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


class StockSampler:
    """One token a step for each row, as published samplers do it, on the stock model with its own cache.

    At each step all logits of the block's positions, their softmax and its maximum; keys and values of
    everything outside the block are kept. It shares no code with `generate`.
    """

    def __init__(self, model: Any):
        self.mask, sizes = model.config.mask_token_id, model.config.to_dict()
        names = [*VOCABULARY, "max_position_embeddings", "tie_word_embeddings"]
        self.model = StockQwen3(Qwen3Config(**{name: sizes[name] for name in names})).eval()
        self.model.load_state_dict(model.state_dict())
        self.model.config.is_causal = False

    def commit(self, block: Tensor, hidden: Tensor) -> None:
        """Write the most confident token of each row."""
        logits = self.model.lm_head(hidden).float()
        logits[..., self.mask] = -torch.inf
        confidence, token = torch.softmax(logits, dim=-1).max(dim=-1)
        row = torch.arange(len(block))
        place = confidence.masked_fill(block != self.mask, -1).argmax(dim=1)
        block[row, place] = token[row, place]

    def hidden(self, ids: Tensor, start: int, cache: DynamicCache, mask: Tensor | None = None) -> Tensor:
        """Run the backbone on ids (B, n) whose first position is `start`, next to what is in the cache."""
        positions = torch.arange(start, start + ids.shape[1])[None]
        if mask is None:
            mask = torch.ones(1, 1, ids.shape[1], cache.get_seq_length() + ids.shape[1], dtype=torch.bool)
        # By position: transformers renames the cache's argument.
        return self.model.model(ids, mask, positions, cache, use_cache=True).last_hidden_state

    @torch.no_grad()
    def block_causal(self, prompts: Tensor, new: int, length: int) -> Tensor:
        """Fill a canvas block by block; the keys of the prompt and of complete blocks are kept."""
        ids, cache = torch.nn.functional.pad(prompts, (0, new), value=self.mask), DynamicCache()
        block = torch.arange(prompts.shape[1]) // length
        self.hidden(prompts, 0, cache, (block[:, None] >= block)[None, None])
        for start in range(prompts.shape[1], ids.shape[1], length):
            current = ids[:, start : start + length]
            for _ in range(length):
                self.commit(current, self.hidden(current, start, cache))
                cache.crop(-length)
            self.hidden(current, start, cache)
        return ids

    @torch.no_grad()
    def dual(self, prompts: Tensor, new: int, length: int) -> Tensor:
        """Fast-dLLM's dual cache: a block's first step computes all tokens, the others those of the block."""
        ids = torch.nn.functional.pad(prompts, (0, new), value=self.mask)
        for start in range(prompts.shape[1], ids.shape[1], length):
            current, cache = ids[:, start : start + length], DynamicCache()
            self.commit(current, self.hidden(ids, 0, cache)[:, start : start + length])
            outside = torch.cat([torch.arange(start), torch.arange(start + length, ids.shape[1])])
            kept = DynamicCache()  # keys have their positions: their order does not matter
            for number, layer in enumerate(cast(Any, cache.layers)):
                kept.update(layer.keys[:, :, outside], layer.values[:, :, outside], number)
            for _ in range(length - 1):
                self.commit(current, self.hidden(current, start, kept))
                kept.crop(-length)
        return ids


@contextmanager
def timer(module: torch.nn.Module) -> Iterator[list[float]]:
    """Collect the seconds of each call of a module."""
    seconds: list[float] = []

    def start(*_: Any) -> None:
        seconds.append(-time.process_time())

    def stop(*_: Any) -> None:
        seconds[-1] += time.process_time()

    hooks = [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def head_seconds(model: Any, rows: int) -> float:
    """Seconds of the head's product for so many positions, by pieces of its weight that stay in a cache."""
    hidden, weight = torch.randn(rows, model.config.hidden_size), model.lm_head.weight
    out = torch.empty(4096 * rows)

    def product() -> None:
        for piece in weight.split(4096):
            torch.mm(hidden, piece.t(), out=out[: rows * len(piece)].view(rows, -1))

    return sorted(timed(product)[1] for _ in range(3))[1]


def vocabulary() -> None:
    """The divided step at Qwen3's vocabulary, block-causal and with an approximate cache."""
    rows, block = 8, 32
    print(f"vocabulary {VOCABULARY['vocab_size']}, fp32, batch {rows}, blocks of {block}, one token a step")
    model = make(VOCABULARY, torch.float32, attention="block_causal", block_length=block)
    # A step of a block has rows * n positions, n the tokens still masked.
    head = sum(head_seconds(model, rows * masked) for masked in range(1, block + 1)) / block
    prompts = torch.cat(random_prompts(model, *[512] * rows))
    sampler = StockSampler(model)
    divided("block-causal", model, prompts, 128, head, lambda: sampler.block_causal(prompts, 128, block))
    model = make(VOCABULARY, torch.float32)
    shorter, other = torch.cat(random_prompts(model, *[128] * rows)), StockSampler(model)
    settings = {"approximate_cache": "dual", "block_length": block}
    divided("dual cache", model, shorter, 64, head, lambda: other.dual(shorter, 64, block), **settings)


def divided(
    name: str,
    model: Any,
    prompts: Tensor,
    new: int,
    head: float,
    run: Callable[[], Tensor],
    **settings: Any,
) -> None:
    """Divide the time of a step into the head's product, the backbone and the rest; time `run` too."""
    generate = {"max_new_tokens": new, "eos_token_id": [], "return_dict_in_generate": False, **settings}
    model.generate(prompts[:, :8], **{**generate, "steps": 4})  # warm
    with timer(model.model) as backbone:
        found, total = timed(lambda: model.generate(prompts, **generate))
    expected, slow = timed(run)
    same = (found == expected)[:, prompts.shape[1] :].float().mean().item()
    step, in_backbone = total / new, sum(backbone) / new
    print(
        f"{name}, prompt {prompts.shape[1]}, {new} new tokens: all logits and their softmax {slow:.1f} s, generate"
        f" {total:.1f} s, {slow / total:.2f} times faster; {same:.1%} of the tokens the same. A step of"
        f" {1000 * step:.0f} ms: head {head / step:.0%}, backbone {in_backbone / step:.0%}, rest"
        f" {1 - (head + in_backbone) / step:.0%}",
        flush=True,
    )


def ragged() -> None:
    """Answers of unlike lengths, eight at a time: batches that wait for their slowest row, or none."""
    rows, tokenizer = 8, byte_tokenizer()
    lengths = torch.randint(8, 64, (64,), generator=torch.Generator().manual_seed(2)).tolist()
    for sizes, new, block in ((SMALL, 256, 4), (VOCABULARY, 128, 16)):
        model = make(sizes, torch.float32, attention="block_causal", block_length=block)
        prompts = [prompt[0].tolist() for prompt in random_prompts(model, *lengths)]
        # One id in 40 ends an answer, which may so be of any length.
        ends = list(range(0, sizes["vocab_size"] - 1, 40))
        generate = partial(
            complete,
            model,
            tokenizer,
            batch_size=rows,
            max_new_tokens=new,
            eos_token_id=ends,
            unused_tokens=None,
        )
        batches = [prompts[start : start + rows] for start in range(0, len(prompts), rows)]
        with timer(model.model) as passes:
            answers, slow = timed(
                lambda run=generate, parts=batches: [one for part in parts for one in run(part)]
            )
        with timer(model.model) as fewer:
            others, fast = timed(lambda run=generate, every=prompts: run(every))
        counts = sorted(len(answer.ids) for answer in answers)
        same = sum(one.ids == other.ids for one, other in zip(answers, others, strict=True))
        print(
            f"{len(prompts)} prompts, {rows} at a time, blocks of {block}, vocabulary {sizes['vocab_size']}, answers"
            f" of {counts[0]} to {counts[-1]} tokens, median {counts[len(counts) // 2]}: in batches"
            f" {sum(counts) / slow:.0f} tokens/s and {len(passes)} forward passes, without {sum(counts) / fast:.0f}"
            f" and {len(fewer)}, {slow / fast:.2f} times faster; {same} of {len(answers)} answers the same",
            flush=True,
        )


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
    parser.add_argument("--vocabulary", action="store_true", help="where a step's time goes at 151,936 ids")
    parser.add_argument("--ragged", action="store_true", help="answers of unlike lengths")
    parser.add_argument("--model", help="a trained checkpoint: measure policies and approximate caches")
    parser.add_argument("--prompts", default="recipes/tiny/heldout.jsonl", help="held-out records")
    parser.add_argument("--limit", type=int, default=300, help="records")
    parser.add_argument("--plot", type=Path, help="draw quality against tokens a forward")
    args = parser.parse_args()
    if args.model is not None:
        quality(args.model, args.prompts, args.limit, args.plot)
    elif args.vocabulary:
        vocabulary()
    elif args.ragged:
        ragged()
    else:
        exact(args.large)


if __name__ == "__main__":
    main()
