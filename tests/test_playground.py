"""The playground in headless Chromium: `make test-page`; skipped where there is no browser or no playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import FakeModel, Running, served_by
from tiny import byte_model

sync_api = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served_by(byte_model().eval()) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Running, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, which asks nobody but the server and writes no error; its settings are the test's parameter."""
    context = browser.new_context(**getattr(request, "param", {}))
    page, faults = context.new_page(), []
    page.set_default_timeout(15_000)
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda one: faults.append(one.url) if not one.url.startswith(server.url) else None)
    page.goto(server.url)
    page.wait_for_selector("#model option", state="attached")
    yield page
    if folder := os.environ.get("SCREENSHOTS"):  # to look at
        page.screenshot(path=Path(folder) / f"{request.node.name}.png", full_page=True)
    context.close()
    assert [fault for fault in faults if "favicon" not in fault and "400 (Bad Request)" not in fault] == []


def done(page: Any) -> None:
    sync_api.expect(page.locator("#status")).to_have_text("done", timeout=20_000)


def texts(page: Any, answer: int = 0) -> list[str]:
    return page.locator(".answer").nth(answer).locator(".canvas span").all_text_contents()


def test_a_conversation(page: Any) -> None:
    page.fill("#max_tokensA", "20")  # both turns fit the model's positions
    for number, said in enumerate(("Hello", "And now?")):
        page.fill("#prompt", said)
        page.press("#prompt", "Enter")
        done(page)
        figures = page.locator(".figures").nth(number).text_content()
        assert "forward passes" in figures and "tokens/s" in figures
    assert page.locator(".said").all_text_contents() == ["Hello", "And now?"]


def test_a_done_answer_is_text_to_read_and_copy(browser: Any) -> None:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    with served_by(FakeModel(max_new_tokens=8)) as server:  # answers in capital letters
        page.goto(server.url)
        page.fill("#prompt", "né o")
        assert not page.locator("#follows").is_visible()
        page.press("#prompt", "Enter")
        done(page)
        # The first of the two bytes of é shows as part of it; two masks behind the end are not shown.
        assert texts(page) == ["N", "·", "é", " ", "O", "▪", "", ""]
        assert page.locator(".canvas .part").count() == 1 == page.locator("#legend .part").count()
        assert page.locator(".figures").text_content().endswith("; 2 places behind the end left masked")
        assert page.locator(".result p").text_content() == "Né O"
        page.get_by_role("button", name="Copy").click()
        page.get_by_role("button", name="Copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == "Né O"
        assert page.locator("#follows").is_visible()
        page.get_by_role("button", name="New conversation").click()
        assert page.locator(".turn").count() == 0 and not page.locator("#follows").is_visible()
    context.close()


def test_tokens_are_masked_again_by_keyboard(page: Any) -> None:
    page.fill("#prompt", "Hello")
    page.press("#prompt", "Enter")
    done(page)
    before = texts(page)
    page.locator(".canvas [role=button]").first.focus()
    for key in ("ArrowRight", "Enter", "ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert page.locator(".chosen").count() == 2
    page.get_by_role("button", name="Denoise 2 masked tokens again").click()
    done(page)
    after = texts(page)
    assert len(after) == len(before)
    assert [text for n, text in enumerate(after) if n not in (1, 3)] == [
        text for n, text in enumerate(before) if n not in (1, 3)
    ]
    assert "2 tokens" in page.locator(".figures").text_content()


def test_two_settings_side_by_side(page: Any) -> None:
    page.get_by_role("button", name="Two settings side by side").click()
    page.fill("#prompt", "Hello")
    page.locator("#thresholdA").fill("0.01")
    page.get_by_role("button", name="Send").click()
    done(page)
    first, second = page.locator(".figures").all_text_contents()
    assert first.startswith("1 forward pass,") and not second.startswith(
        "1 forward"
    )  # all at once, one a step
    assert page.locator(".canvas").count() == 2


@pytest.mark.parametrize(
    "page",
    [
        {"viewport": {"width": 360, "height": 720}, "has_touch": True, "is_mobile": True},
        {"viewport": {"width": 1100, "height": 800}, "color_scheme": "dark"},
    ],
    indirect=True,
)
def test_gaps_on_a_phone_and_in_dark_mode(page: Any) -> None:
    page.get_by_role("tab", name="Text with gaps").click()
    page.fill("#text", "a [[gap:2]] b [[gap:3]] and a longer text without any place to break_" + "x" * 80)
    page.get_by_role("button", name="Fill the gaps").click()
    done(page)
    assert "░" not in "".join(texts(page)) and "".join(texts(page)).startswith("a ")
    assert "5 tokens" in page.locator(".figures").text_content()
    assert page.locator(".result p").text_content().startswith("a ")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_an_error_is_shown_and_an_answer_can_be_stopped(page: Any) -> None:
    page.fill("#max_tokensA", "9999")
    page.fill("#prompt", "Hello")
    page.press("#prompt", "Enter")
    done(page)
    assert "more than the model's 256 positions" in page.locator(".figures.error").text_content()
    page.fill("#max_tokensA", "200")
    page.locator("#thresholdA").fill("0")
    page.fill("#prompt", "Again")
    page.press("#prompt", "Enter")
    page.locator(".canvas span.new").first.wait_for()
    page.get_by_role("button", name="Stop").first.click()
    done(page)
    assert "(stopped)" in page.locator(".figures").nth(1).text_content()
