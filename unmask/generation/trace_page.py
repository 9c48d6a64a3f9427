"""How an answer appeared out of masks, as one page for a browser that plays it step by step.

The page needs nothing but itself and is forbidden to load anything. Whatever stands in prompts and answers is
shown as text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from unmask.data.inspect import visible
from unmask.errors import UnmaskError
from unmask.generation.complete import Completion
from unmask.generation.trace import MASK_GLYPH, token_texts

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --dim: #5c6370; --paper: #fff; --line: #d5d9e0;
  --mask: #e3e6eb; --mask-ink: #a7aebb; --bar: #9aa7b8; --now: #1f6feb; --gone: #c93c37; --panel: #f5f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --dim: #9aa3b2; --paper: #16181d;
  --line: #3a3f4b; --mask: #2a2e37; --mask-ink: #5b6373; --bar: #5d6878; --now: #6aa8ff; --gone: #ff7b72;
  --panel: #1e2128; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 0 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.25rem; margin: 1.1rem 0 .1rem; overflow-wrap: anywhere; }
.dim { color: var(--dim); }
pre, #text, #token b { font-family: ui-monospace, monospace; }
pre { margin: .8rem 0; padding: .5rem .8rem; border-left: 4px solid var(--line); white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 12rem; overflow-y: auto; font-size: 13px; }
#answers { display: flex; gap: .4rem; flex-wrap: wrap; margin-top: .4rem; }
#controls { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: .8rem 0 .3rem; }
button { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--line);
  border-radius: 6px; padding: .25rem .7rem; min-width: 2.6rem; cursor: pointer; }
button[aria-pressed=true] { border-color: var(--now); color: var(--now); font-weight: 600; }
#step { flex: 1 1 14rem; accent-color: var(--now); }
#bars { display: flex; align-items: stretch; gap: 1px; height: 4.5rem; border-bottom: 1px solid var(--line); }
#bars > div { flex: 1 1 0; min-width: 0; display: flex; flex-direction: column; justify-content: flex-end;
  cursor: pointer; }
#bars i { display: block; background: var(--bar); } #bars i.gone { background: var(--gone); }
#bars .now i:not(.gone) { background: var(--now); } #bars .now { background: var(--panel); }
#text { font-size: 17px; line-height: 1.9; padding: .8rem; margin: .8rem 0; min-height: 5rem;
  background: var(--panel); border-radius: 8px; white-space: pre-wrap; overflow-wrap: anywhere; }
#text span { unicode-bidi: isolate; border-radius: 3px; padding: 1px 0; color: #15181c; cursor: default; }
#text .mask { background: var(--mask); color: var(--mask-ink); }
#text .plain { background: var(--line); color: var(--ink); }
#text .new { outline: 2px solid var(--now); outline-offset: -1px; }
#text .gone { outline: 2px solid var(--gone); outline-offset: -1px; }
#text .beyond { background: none; color: var(--mask-ink); opacity: .55; }
#scale { display: inline-block; width: 9rem; height: .75rem; border-radius: 3px; vertical-align: -1px; }
#legend { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; font-size: 13px; }
#legend .new, #legend .gone { border-radius: 3px; padding: 0 .35rem; }
#legend .new { outline: 2px solid var(--now); } #legend .gone { outline: 2px solid var(--gone); }
#token { min-height: 1.5rem; font-variant-numeric: tabular-nums; }
"""

SCRIPT = """
"use strict";
const answers = JSON.parse(document.getElementById("data").textContent);
const by = id => document.getElementById(id);
let answer, states, step = 0, timer = null;
const dark = matchMedia("(prefers-color-scheme: dark)");
const scale = [[240, 138, 75], [246, 232, 196], [124, 190, 240]];  // of probability 0, 1/2, 1
function colour(p) {
  const at = Math.min(1, Math.floor(2 * p)), share = 2 * p - at;
  return `rgb(${scale[at].map((low, k) => Math.round(low + share * (scale[at + 1][k] - low))).join(" ")})`;
}

// Each frame lists what changed: [position, text], text null = masked again; a third entry: only redrawn.
function replay(frames, length) {
  let now = Array(length).fill(null), since = Array(length).fill(-1);
  return frames.map((frame, index) => {
    now = now.slice(); since = since.slice();
    for (const [place, text, same] of frame) {
      now[place] = text;
      if (same === undefined) since[place] = index;
    }
    return { now, since };
  });
}
function element(name, kind, text) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}
function open(index) {
  answer = answers[index];
  states = replay(answer.frames, answer.length);
  by("prompt").textContent = answer.prompt;
  by("prompt").hidden = !answer.prompt;
  by("figures").textContent = answer.figures;
  by("step").max = states.length;
  for (const button of by("answers").children)
    button.setAttribute("aria-pressed", button.dataset.index == index);
  const most = Math.max(1, ...answer.bars.map(([written, masked]) => written + masked));
  by("bars").replaceChildren(...answer.bars.map(([written, masked], index) => {
    const bar = element("div"), parts = [[written, ""], [masked, "gone"]];
    bar.title = `step ${index + 1}: ${written} committed` + (masked ? `, ${masked} masked again` : "");
    for (const [count, kind] of parts) {
      const part = element("i", kind);
      part.style.height = `${100 * count / most}%`;
      bar.append(part);
    }
    bar.onclick = () => { stop(); show(index + 1); };
    return bar;
  }));
  show(states.length);
}
function show(to) {
  step = Math.max(0, Math.min(states.length, to));
  by("step").value = step;
  const [written, masked] = step ? answer.bars[step - 1] : [0, 0];
  by("where").textContent = `step ${step} of ${states.length}` +
    (step ? `: ${written} committed` + (masked ? `, ${masked} masked again` : "") : ": all masked");
  [...by("bars").children].forEach((bar, index) => bar.classList.toggle("now", index === step - 1));
  const spans = [];
  for (let place = 0; place < answer.length; place++) {
    const text = step ? states[step - 1].now[place] : null, since = step ? states[step - 1].since[place] : -1;
    const span = element("span");
    span.dataset.place = place;
    if (text === null) {
      span.textContent = "MASK";
      span.className = step && place >= answer.kept && step === states.length ? "beyond" : "mask";
      if (step && since === step - 1) span.classList.add("gone");
    } else {
      span.textContent = text || "·";
      if (since === answer.committed[place]) span.style.background = colour(answer.confidence[place]);
      else span.className = "plain";
      if (since === step - 1) span.classList.add("new");
    }
    spans.push(span);
    if (text !== null && text.includes("⏎")) spans.push(element("br"));
  }
  by("text").replaceChildren(...spans);
  tell(null);
}
function tell(place) {
  if (place === null) { by("token").textContent = "Point at a token to see how it was committed."; return; }
  const text = step ? states[step - 1].now[place] : null, since = step ? states[step - 1].since[place] : -1;
  const parts = [`token ${place + 1} of ${answer.length}`];
  if (text === null) parts.push(since >= 0 ? `masked again at step ${since + 1}` : "masked");
  else {
    parts.push(`committed at step ${since + 1}`);
    if (since === answer.committed[place])
      parts.push(`probability ${answer.confidence[place].toFixed(3)}`,
        `entropy ${answer.entropy[place].toFixed(3)} nats`);
    else parts.push("not part of the answer, or masked again later");
  }
  const name = element("b", "", text === null ? "MASK" : text || "·");
  by("token").replaceChildren(name, "  " + parts.join(", "));
}
function stop() {
  clearInterval(timer); timer = null;
  by("play").textContent = "▶"; by("play").setAttribute("aria-label", "play");
}
function play() {
  if (timer) { stop(); return; }
  if (step === states.length) show(0);
  const wait = Math.max(60, Math.min(500, 12000 / states.length));
  timer = setInterval(() => { show(step + 1); if (step === states.length) stop(); }, wait);
  by("play").textContent = "⏸"; by("play").setAttribute("aria-label", "pause");
}
by("play").onclick = play;
by("back").onclick = () => { stop(); show(step - 1); };
by("on").onclick = () => { stop(); show(step + 1); };
by("step").oninput = event => { stop(); show(+event.target.value); };
by("text").onmouseover = event => {
  if (event.target.dataset.place !== undefined) tell(+event.target.dataset.place);
};
document.onkeydown = event => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const keys = { ArrowLeft: () => show(step - 1), ArrowRight: () => show(step + 1),
    Home: () => show(0), End: () => show(states.length) };
  if (event.key === " ") play();
  else if (keys[event.key]) { stop(); keys[event.key](); }
  else return;
  event.preventDefault();
};
function paint() {
  const stops = [0, .5, 1].map(p => `${colour(p)} ${100 * p}%`).join(", ");
  by("scale").style.background = `linear-gradient(90deg, ${stops})`;
}
dark.onchange = () => { paint(); show(step); };
if (answers.length > 1)
  by("answers").replaceChildren(...answers.map((one, index) => {
    const button = element("button", "", one.name);
    button.dataset.index = index;
    button.onclick = () => { stop(); open(index); };
    return button;
  }));
paint();
open(0);
const at = new URLSearchParams(location.hash.slice(1)).get("step");
if (at !== null) show(+at);
"""

BODY = """
<div id="answers"></div>
<pre id="prompt"></pre>
<div id="controls"><button id="back" aria-label="one step back">◀</button
><button id="play" aria-label="play">▶</button
><button id="on" aria-label="one step on">▶|</button
><input id="step" type="range" min="0" aria-label="step"><span id="where"></span></div>
<div id="bars" title="tokens committed at each step"></div>
<div id="text"></div>
<div id="token" class="dim"></div>
<div id="legend" class="dim"><span>probability when committed: 0 <span id="scale"></span> 1</span>
<span><span class="new">committed at this step</span></span>
<span><span class="gone">masked again</span></span>
<span>▪ end or another special token</span><span>⏎ line break</span><span>· part of a character</span></div>
<p id="figures" class="dim"></p>
<p class="dim">Keys: ← → one step, space plays, Home and End. Bars: tokens committed at each step.</p>
"""


def write_trace_page(
    file: Path,
    answers: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
    *,
    title: str,
    prompt: str = "",
    names: Sequence[str] = (),
) -> None:
    """Write the page; the answers need their `states`.

    Args:
        title: heading of the page.
        prompt: what was asked, shown above the answer.
        names: of the answers, where there are several.

    Raises:
        UnmaskError: the file cannot be written.
    """
    names = names or [f"answer {index + 1}" for index in range(len(answers))]
    data = [
        {"name": name, "prompt": visible(prompt), **trace_data(answer, tokenizer)}
        for name, answer in zip(names, answers, strict=True)
    ]
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>{BODY}"
        f'<script type="application/json" id="data">{text}</script>'
        f"<script>{SCRIPT.replace('MASK', MASK_GLYPH)}</script></body></html>\n"
    )
    try:
        file.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UnmaskError(f"--trace: {file} cannot be written: {error.strerror}.") from error


def trace_data(answer: Completion, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the page plays: what each step changed, and how the tokens of the answer were committed.

    Returns:
        length: tokens of the canvas; kept: those of the answer.
        frames: for each step [position, text] of what it changed; text None = masked again; a third entry 0
            = the same token, drawn otherwise beside its new neighbours.
        bars: for each step the tokens that it committed and masked again.
        committed: for each token of the answer the step that committed it for good.
        confidence, entropy: there and then.
    """
    mask, length = tokenizer.mask_token_id, len(answer.states[0]) if answer.states else 0
    frames: list[list[list[Any]]] = []
    bars: list[list[int]] = []
    before: list[Any] = [mask] * length
    shown: list[str | None] = [None] * length
    committed = [-1] * length
    for number, state in enumerate(answer.states):
        texts = [
            None if one == mask else text.replace("⏹", "▪")  # which more fonts have
            for one, text in zip(state, token_texts(state, tokenizer), strict=True)
        ]
        changed = {place: None for place in range(length) if state[place] != before[place]}
        # A token's text may also change with its neighbours, where they make a character together.
        redrawn = [place for place in range(length) if texts[place] != shown[place]]
        frames.append(
            [[place, texts[place]] for place in changed]
            + [[place, texts[place], 0] for place in redrawn if place not in changed]
        )
        masked = sum(state[place] == mask for place in changed)
        bars.append([len(changed) - masked, masked])
        for place in changed:
            committed[place] = number
        before, shown = list(state), texts
    kept = len(answer.ids)
    figures = (
        f"{answer.figures}: {answer.tokens_per_forward:.2f} tokens a forward. Canvas of {length} tokens."
    )
    return {
        "length": length,
        "kept": kept,
        "frames": frames,
        "bars": bars,
        "committed": committed[:kept],
        "confidence": [round(value, 4) for value in answer.confidence],
        "entropy": [round(value, 4) for value in answer.entropy],
        "figures": figures,
    }
