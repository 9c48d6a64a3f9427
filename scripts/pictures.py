"""Make the tutorials' pictures: `python scripts/pictures.py outputs/demo/final docs/assets`.

Terminals are SVG: a command's coloured output, drawn by rich. Pages are PNG: headless Chromium by playwright
(`pip install playwright`). The files that the commands read are those that docs/tutorials/finetune.md tells its
reader to make, and the model fine-tuned on them is trained here: nothing is drawn that was not run.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
TASK = "--tasks tiny_words --include-path recipes/tiny --chat"
TERMINALS = {  # file -> command line and its width in columns
    "generate.svg": ('unmask generate outputs/demo/final --prompt "Reverse the word monk." --trace', 72),
    "data.svg": ("unmask data mine.yaml --show 2", 88),
    "score.svg": (
        "unmask score outputs/mine/final recipes/tiny/heldout.jsonl --end-fill 16 --limit 50 --samples 16 --show 2",
        96,
    ),
    "dry-run.svg": ("unmask train train_tiny_sft --dry-run --devices 1", 96),
}
COLOURS = 64  # of a PNG

# Of `Console.export_svg(code_format=...)`, without the fonts that rich's own format loads from the network.
SVG = """\
<svg viewBox="0 0 {width} {height}" width="{width}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix, .{unique_id}-title {{
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width;
}}
.{unique_id}-title {{ font-size: 16px }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def run(command: str, folder: Path, columns: int = 96) -> str:
    """What a command writes on a terminal of this width, with its colours."""
    name, *arguments = shlex.split(command)
    program = [sys.executable, *(["-m", "unmask"] if name == "unmask" else []), *arguments]
    done = subprocess.run(
        program,
        cwd=folder,
        env=environment() | {"COLUMNS": str(columns), "FORCE_COLOR": "1", "TERM": "xterm-256color"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    if done.returncode:
        raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def environment() -> dict[str, str]:
    """That of this process; its programs find this clone's unmask."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def draw_terminal(command: str, output: str, columns: int, file: Path) -> None:
    """Draw a prompt with a command and what it wrote."""
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
    console.print(Text.from_ansi(output.rstrip()))
    svg = console.export_svg(title="unmask", theme=SVG_EXPORT_THEME, code_format=SVG, unique_id=file.stem)
    file.write_text(svg, encoding="utf-8")


def files_of(page: Path) -> dict[str, str]:
    """The files that a tutorial tells its reader to save, by name."""
    pattern = r"Save this as\s+`([^`]+)`:\n\n```\w+\n(.*?)^```"
    return dict(re.findall(pattern, page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL))


@contextmanager
def served(model: str, folder: Path) -> Iterator[str]:
    """The address of a server with this model."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [sys.executable, "-m", "unmask", "serve", model, "--port", str(port)]
    with subprocess.Popen(arguments, cwd=folder, env=environment()) as process:
        try:
            while process.poll() is None:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                    break
                except OSError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def ask(page: Any, prompt: str) -> None:
    """Ask in the playground, and wait for the answer."""
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    from playwright.sync_api import expect  # pyright: ignore[reportMissingImports]  # `make test-page` installs it

    expect(page.locator("#status")).to_have_text("done", timeout=60_000)


def shot(page: Any, file: Path, height: int | None = None) -> None:
    """Save what a page shows as a PNG of few colours."""
    whole = page.evaluate("document.documentElement.scrollHeight")
    width = page.viewport_size["width"]
    clip = {"x": 0, "y": 0, "width": width, "height": min(whole, height or whole)}
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip))).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)


def draw_pages(folder: Path, out: Path) -> None:
    """Draw the pages that commands write, and the playground."""
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]  # `make test-page` installs it

    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_context(viewport={"width": 900, "height": 640}, color_scheme="light").new_page()
        page.goto((folder / "monk.html").as_uri())
        page.locator("#step").fill("8")
        shot(page, out / "trace.png")
        page.goto((folder / "data.html").as_uri())
        shot(page, out / "data.png", 1000)
        page.goto((folder / "outputs/eval/report.html").as_uri())
        shot(page, out / "report.png", 760)
        with served("outputs/mine/final", folder) as url:
            page.goto(url)
            page.wait_for_selector("#model option", state="attached")
            ask(page, "Say it in Pig Latin: tiger.")
            shot(page, out / "playground-mine.png")
        with served("outputs/demo/final", folder) as url:
            page.goto(url)
            page.wait_for_selector("#model option", state="attached")
            page.get_by_role("button", name="Two settings side by side").click()
            ask(page, "Spell out the word wool.")
            shot(page, out / "playground.png")
        browser.close()


def main(demo: str, assets: str) -> None:
    out = Path(assets).resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "outputs/demo").mkdir(parents=True)
        (folder / "outputs/demo/final").symlink_to(Path(demo).resolve())
        for file, text in files_of(ROOT / "docs/tutorials/finetune.md").items():
            (folder / file).write_text(text, encoding="utf-8")
        run("python make_data.py", folder)
        run("unmask train mine.yaml", folder)
        run("unmask data mine.yaml --html data.html", folder)
        run('unmask generate outputs/demo/final --prompt "Reverse the word monk." --trace monk.html', folder)
        run(f"unmask eval outputs/mine/final {TASK} --out outputs/eval", folder)
        run(
            f"unmask eval outputs/demo/final outputs/mine/final {TASK}"
            " --sweep threshold=0.3,0.6,0.9,0.99 --out outputs/sweep",
            folder,
        )
        picture = Image.open(folder / "outputs/sweep/sweep.png").convert("RGB")
        picture.quantize(COLOURS).save(out / "sweep.png", optimize=True)
        for file, (command, columns) in TERMINALS.items():
            draw_terminal(command, run(command, folder, columns), columns, out / file)
        draw_pages(folder, out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
