"""Draw the pictures of docs/concepts/ into docs/assets/, by the functions that they are about.

python scripts/concept_pictures.py outputs/demo/final docs/assets

The model writes the answers of policies.svg; the other pictures need none of its weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unmask import (
    Qwen3DiffusionConfig,
    Qwen3ForCausalLM,
    byte_tokenizer,
    complete,
    load_model,
    load_tokenizer,
)
from unmask.diffusion.attention import (
    attend_annealed,
    attend_block_causal,
    attend_two_copies,
    attend_within_documents,
    block_index,
    row_layout,
)
from unmask.diffusion.corrupt import transition
from unmask.generation.table import DenoiserInput
from unmask.generation.trace import token_texts
from unmask.io import atomic_write

INK, QUIET, CARD = "#c3ccd8", "#9aa7b8", "#11151c"
MASK, CONTEXT, NEW, OTHER, HIDDEN = "#39424f", "#2f6f8f", "#3ddc97", "#c58af9", "#191f28"
PROMPT, CANVAS = "Sort the letters of cable.", 16
POLICIES: dict[str, dict[str, Any]] = {
    "left_to_right": {"policy": "left_to_right"},
    "maskgit_plus": {},
    "threshold 0.9": {"threshold": 0.9},
    "entropy_bound 0.5": {"entropy_bound": 0.5},
}


class Cell(NamedTuple):
    """A square of a grid; its text in the colour that is read on it."""

    fill: str
    text: str = ""


class Panel(NamedTuple):
    """A titled grid, with words to the left of its rows."""

    title: str
    rows: Sequence[Sequence[Cell]]
    labels: Sequence[str] = ()


def picture(panels: Sequence[Panel], keys: Iterable[tuple[str, str]], *, across: int, size: int) -> str:
    """Lay panels out on a card, so many in a row, and explain the colours below them."""
    margin, title, gap = 22, 26, 24
    left = 8 * max((len(label) for panel in panels for label in panel.labels), default=0)
    left += 10 * bool(left)
    body: list[str] = []
    lines = [panels[start : start + across] for start in range(0, len(panels), across)]
    columns = [
        max(max(7 * len(panel.title), left + size * len(panel.rows[0])) for panel in panels[k::across])
        for k in range(across)
    ]
    y = margin
    for line in lines:
        for number, panel in enumerate(line):
            x = margin + sum(columns[:number]) + gap * number
            body.append(f'<text x="{x}" y="{y + 12}" class="title">{escape(panel.title)}</text>')
            for row, cells in enumerate(panel.rows):
                top = y + title + row * size
                if panel.labels:
                    label = escape(panel.labels[row])
                    body.append(f'<text x="{x}" y="{top + size / 2 + 4:g}" class="label">{label}</text>')
                for column, cell in enumerate(cells):
                    corner = f'x="{x + left + column * size + 0.5:g}" y="{top + 0.5:g}"'
                    body.append(f'<rect {corner} width="{size - 1}" height="{size - 1}" fill="{cell.fill}"/>')
                    if cell.text.strip():
                        place = f'x="{x + left + column * size + size / 2:g}" y="{top + size * 0.72:g}"'
                        dark = ' class="dark"' if cell.fill == NEW else ""
                        body.append(f"<text {place}{dark}>{escape(cell.text)}</text>")
        y += title + size * max(len(panel.rows) for panel in line) + gap
    width = margin * 2 + sum(columns) + gap * (across - 1)
    x = margin
    for fill, words in keys:
        needed = 18 + 7 * len(words)
        if x > margin and x + needed > width - margin:
            x, y = margin, y + 18
        body.append(f'<rect x="{x}" y="{y - 10}" width="11" height="11" fill="{fill}"/>')
        body.append(f'<text x="{x + 17}" y="{y}" class="label">{escape(words)}</text>')
        x += needed + 14
    y += margin - 6
    style = (
        f"text {{ font: 600 {size * 0.68:g}px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;"
        " fill: #f4f7fb; text-anchor: middle } .dark { fill: #11151c }"
        f" .title, .label {{ text-anchor: start; font-weight: 400; font-size: 11.5px; fill: {QUIET} }}"
        f" .title {{ fill: {INK} }}"
    )
    names = escape("; ".join(panel.title for panel in panels), quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}" role="img" '
        f'aria-label="{names}"><style>{style}</style>'
        f'<rect width="{width}" height="{y}" rx="9" fill="{CARD}"/>{"".join(body)}</svg>\n'
    )


def noise() -> str:
    """The forward process at four rates, by `transition` with one noise seed."""
    mask_token_id: Any = byte_tokenizer().mask_token_id
    prompt, response = "Say it twice: wool. ", "wool wool"
    x_0 = torch.tensor([list((prompt + response).encode())])
    maskable = torch.arange(x_0.shape[1])[None] >= len(prompt)
    rates, rows = (0.1, 0.4, 0.7, 1.0), []
    for t in rates:
        noised = transition(x_0, t, maskable, mask_token_id, noise_seed=torch.tensor([3]))
        rows.append(
            [
                Cell(MASK) if hidden else Cell(NEW if free else CONTEXT, chr(byte))
                for byte, hidden, free in zip(
                    x_0[0].tolist(), noised.is_masked[0].tolist(), maskable[0].tolist(), strict=True
                )
            ]
        )
    labels = [f"t = {t}   1/t = {1 / t:.2f}" for t in rates]
    keys = (
        (CONTEXT, "prompt: never masked"),
        (NEW, "response: seen"),
        (MASK, "masked: predicted, weight 1/t"),
    )
    return picture([Panel("x_t at four rates", rows, labels)], keys, across=1, size=15)


def attention() -> str:
    """Who attends to whom in a row of 3 prompt tokens and 8 response tokens, in blocks of 4."""
    maskable = torch.tensor([[False] * 3 + [True] * 8])
    layout = row_layout(torch.ones_like(maskable))
    block = block_index(layout, maskable, 4)
    length, noised = maskable.shape[1], maskable[0].nonzero()[:, 0]
    seed = torch.zeros_like(maskable, dtype=torch.long)

    def grid(attend: torch.Tensor) -> list[list[Cell]]:
        return [
            [Cell((NEW if key >= length else CONTEXT) if seen else HIDDEN) for key, seen in enumerate(line)]
            for line in attend[0].tolist()
        ]

    panels = [
        Panel("causal", grid(attend_annealed(layout, 0.0, seed))),
        Panel("bidirectional", grid(attend_within_documents(layout))),
        Panel("block-causal", grid(attend_block_causal(layout, block))),
        Panel("clean and noised copy: training", grid(attend_two_copies(layout, block, noised))),
    ]
    keys = ((CONTEXT, "may attend"), (NEW, "to the noised copy"), (HIDDEN, "may not"))
    return picture(panels, keys, across=2, size=12)


def policies(model: Any, tokenizer: Any, prompt: str = PROMPT) -> str:
    """The canvas after each denoising step of an answer, under four policies."""
    panels = []
    for name, settings in POLICIES.items():
        [answer] = complete(model, tokenizer, [prompt], max_new_tokens=CANVAS, keep_states=True, **settings)
        before, rows = [tokenizer.mask_token_id] * len(answer.states[0]), []
        for state in answer.states:
            texts = [text.replace("⏹", "■") for text in token_texts(state, tokenizer)]
            rows.append(
                [
                    Cell(MASK)
                    if now == tokenizer.mask_token_id
                    else Cell(NEW if now != was else CONTEXT, text)
                    for now, was, text in zip(state, before, texts, strict=True)
                ]
            )
            before = state
        panels.append(Panel(f"{name}: {answer.num_forwards} step{'s' * (answer.num_forwards != 1)}", rows))
    keys = ((MASK, "mask"), (NEW, "committed in this step"), (CONTEXT, "before"))
    return picture(panels, keys, across=2, size=16)


class Recorder:
    """A denoiser that remembers which positions of the one row each forward pass computed."""

    def __init__(self, denoiser: Any):
        self.denoiser, self.passes = denoiser, list[list[tuple[bool, bool, bool]]]()

    def __call__(self, inputs: DenoiserInput) -> Any:
        """Remember (shown, computed, asked for logits) of each position, and denoise."""
        flags = (inputs.is_token[0], inputs.is_computed[0], inputs.needs_logits[0])
        self.passes.append(list(zip(*(flag.tolist() for flag in flags), strict=True)))
        return self.denoiser(inputs)

    def copy_keys(self, source: int, target: int, count: int) -> None:
        """Copy keys as the denoiser does."""
        self.denoiser.copy_keys(source, target, count)


def computed_positions(**settings: Any) -> list[list[tuple[bool, bool, bool]]]:
    """Answer a prompt of 6 tokens with 12, two a step, and list what each forward pass was given."""
    fields = {"attention": "block_causal", "block_length": 4} if settings.pop("causal", False) else {}
    config = Qwen3DiffusionConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        mask_token_id=31,
        **fields,
    )
    engine = Qwen3ForCausalLM(config).eval().make_engine(max_rows=1)
    recorder = engine.denoiser = Recorder(engine.denoiser)
    with torch.no_grad():
        engine.add([1, 2, 3, 4, 5, 6], max_new_tokens=12, steps=6, policy="left_to_right", **settings)
        for _ in engine.steps():
            pass
    return recorder.passes


CACHES: dict[str, dict[str, Any]] = {
    "bidirectional, no cache": {"block_length": 4},
    "approximate_cache=prefix": {"block_length": 4, "approximate_cache": "prefix"},
    "approximate_cache=dual": {"block_length": 4, "approximate_cache": "dual"},
    "block-causal, exact cache": {"causal": True},
}


def caches() -> str:
    """What each forward pass computes, under four kinds of cache."""
    panels = []
    for name, settings in CACHES.items():
        passes, rows = computed_positions(**settings), []
        width = max(map(len, passes))
        for given in passes:
            cells = [
                Cell(HIDDEN if not shown else (NEW if asked else OTHER) if computed else CONTEXT)
                for shown, computed, asked in given
            ]
            rows.append(cells + [Cell(HIDDEN)] * (width - len(cells)))
        count = sum(computed for given in passes for _, computed, _ in given)
        panels.append(Panel(f"{name}: {count} positions", rows))
    keys = (
        (OTHER, "computed"),
        (NEW, "computed, a mask of the current block"),
        (CONTEXT, "keys and values from the cache"),
        (HIDDEN, "not shown to the model"),
    )
    return picture(panels, keys, across=2, size=14)


def main(model_folder: str, out: str) -> None:
    """Write the four pictures."""
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    pictures: dict[str, Callable[[], str]] = {
        "noise": noise,
        "attention": attention,
        "policies": lambda: policies(model, tokenizer),
        "caches": caches,
    }
    for name, draw in pictures.items():
        svg = draw()
        atomic_write(Path(out) / f"{name}.svg", svg)
        print(f"{out}/{name}.svg: {len(svg) / 1024:.0f} kB")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
