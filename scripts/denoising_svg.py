"""Draw the README's moving picture, docs/assets/denoising.svg, from answers of the demo's model.

python scripts/denoising_svg.py outputs/demo/final recipes/tiny/heldout.jsonl docs/assets/denoising.svg

Every frame is a denoising step of a prompt of the file: nothing is drawn that the model did not write.
"""

from __future__ import annotations

import json
import random
import sys
from html import escape
from pathlib import Path

from unmask import complete, load_model, load_tokenizer
from unmask.generation.trace import token_texts
from unmask.io import atomic_write

SCREENS, ROWS, CANVAS = 2, 6, 16  # screens one after another; prompts on each; tokens of an answer
STEP, HOLD = 0.34, 2.6  # seconds of a denoising step, and of the finished screen
CELL, LINE, LEFT, TOP = 15, 34, 26, 84  # pixels
PROMPT = 38  # characters of the longest prompt
WIDTH = LEFT * 2 + round(PROMPT * 8.6) + CANVAS * CELL
HEIGHT = TOP + ROWS * LINE + 18

STYLE = """
svg { font: 14.5px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
.card { fill: #11151c } .bar { fill: #1b212b } .dot { fill: #3a4352 }
.said { fill: #9aa7b8 } .prompt { fill: #c3ccd8 } .mask { fill: #39424f } .end { fill: #566174 }
.token { fill: #f4f7fb; text-anchor: middle; font-weight: 600 }
.a { animation: var(--n) LOOPs linear infinite }
@media (prefers-reduced-motion: reduce) { .a { animation: none } .s0 { opacity: 1 } .mask { opacity: 0 } }
"""


def main(model_folder: str, prompts_file: str, out: str) -> None:
    """Answer prompts of the file, one token a step, and write the picture."""
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    lines = Path(prompts_file).read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if len(record["instruction"]) <= PROMPT]
    tasks = sorted({record["task"] for record in records})
    chosen = random.Random(0)
    kinds = [tasks[k % len(tasks)] for k in range(SCREENS * ROWS)]
    prompts = [
        chosen.choice([record["instruction"] for record in records if record["task"] == kind])
        for kind in kinds
    ]
    answers = complete(model, tokenizer, prompts, max_new_tokens=CANVAS, keep_states=True)
    length = SCREENS * (CANVAS * STEP + HOLD)
    keyframes: dict[str, str] = {}

    def shown(start: float, stop: float, *, flash: bool = False) -> str:
        """Name the animation of what is seen from one second of the loop to another."""
        name = f"k{round(start * 100)}_{round(stop * 100)}{'f' * flash}"
        a, b = 100 * start / length, 100 * min(stop, length) / length
        opaque = f"{a:.3f}%,{b:.3f}%{{opacity:1}}"
        if flash:
            end = 100 * (start + 2 * STEP) / length
            opaque = f"{a:.3f}%{{opacity:1;fill:#3ddc97}}{end:.3f}%,{b:.3f}%{{opacity:1;fill:#f4f7fb}}"
        before = f"0%,{max(0.0, a - 0.001):.3f}%{{opacity:0}}" if a > 0 else ""
        after = f"{min(100.0, b + 0.001):.3f}%,100%{{opacity:0}}" if b < 100 else ""
        keyframes[name] = f"@keyframes {name}{{{before}{opaque}{after}}}"
        return f'style="--n:{name}" opacity="0"'

    body: list[str] = []
    for screen in range(SCREENS):
        begin = screen * (CANVAS * STEP + HOLD)
        end = begin + CANVAS * STEP + HOLD
        seen = f"s{screen}"
        for step in range(CANVAS + 1):
            since = begin + step * STEP
            until = end if step == CANVAS else since + STEP
            kind = "said a" + f" {seen}" * (step == CANVAS)
            text = f"denoising step {step} of {CANVAS}"
            body.append(f'<text x="{LEFT}" y="62" class="{kind}" {shown(since, until)}>{text}</text>')
        for row in range(ROWS):
            prompt, answer = prompts[screen * ROWS + row], answers[screen * ROWS + row]
            y = TOP + row * LINE + 20
            body.append(
                f'<text x="{LEFT}" y="{y}" class="prompt a {seen}" {shown(begin, end)}>{escape(prompt)}</text>'
            )
            final = answer.states[-1]
            steps = [
                next(k for k, state in enumerate(answer.states) if state[place] == final[place])
                for place in range(CANVAS)
            ]
            for place, (text, step) in enumerate(zip(token_texts(final, tokenizer), steps, strict=True)):
                left = WIDTH - LEFT - (CANVAS - place) * CELL
                # what comes after the end token may stay masked: the answer is complete without it
                since = begin + (step + 1) * STEP if final[place] != tokenizer.mask_token_id else end
                box = f'x="{left + 1}" y="{y - 14}" width="{CELL - 2}" height="19" rx="3"'
                body.append(f'<rect {box} class="mask a" {shown(begin, since)}/>')
                if since == end:
                    continue
                if text == "⏹":
                    box = f'x="{left + 5}" y="{y - 7}" width="5" height="5" rx="1"'
                    body.append(f'<rect {box} class="end a {seen}" {shown(since, end)}/>')
                else:
                    look = shown(since, end, flash=True)
                    body.append(
                        f'<text x="{left + CELL / 2:g}" y="{y}" class="token a {seen}" {look}>{escape(text)}</text>'
                    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" aria-label="Answers appear out of masks, token by token.">'
    )
    style = STYLE.replace("LOOP", f"{length:.2f}") + "".join(keyframes.values())
    frame = (
        f'<rect class="card" width="{WIDTH}" height="{HEIGHT}" rx="9"/>'
        f'<path class="bar" d="M0 36V9a9 9 0 0 1 9-9H{WIDTH - 9}a9 9 0 0 1 9 9v27z"/>'
        + "".join(f'<circle class="dot" cx="{x}" cy="18" r="5.5"/>' for x in (20, 38, 56))
        + f'<text x="{WIDTH / 2:g}" y="23" class="said" text-anchor="middle">unmask: text out of masks</text>'
    )
    picture = f"{head}<style>{style}</style>{frame}{''.join(body)}</svg>\n"
    atomic_write(Path(out), picture)
    print(f"{out}: {len(picture) / 1024:.0f} kB")
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"  {prompt} {answer.text}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
