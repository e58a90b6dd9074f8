"""Voting in a browser, from the command to the file: keys, reload, tabs, a kill; nothing lost, nothing twice."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.browser import PATIENCE, needs_browser, start_chromium, wait_in
from tests.preferences.ballots import captions, write
from unimm.preferences.data import read_preferences
from unimm.preferences.vote.pairs import read_ballot

pytestmark = needs_browser


class Voting:
    """A run of `unimm preferences vote` on its own."""

    def __init__(self, candidates: Path, output: Path, port: int = 0) -> None:
        command = ["preferences", "vote", candidates, "-o", output, "--port", port, "--voter", "ann"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "unimm", *map(str, command)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # a suite that runs in the background would hand down that interrupts are ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        while (
            found := re.search(r"(\d+) of (\d+) pairs voted on; vote at (http://127.0.0.1:(\d+)/)", line)
        ) is None:
            assert line, "voting did not start"
            line = self.process.stderr.readline()
        self.done, self.total, self.url, self.port = int(found[1]), int(found[2]), found[3], int(found[4])

    def end(self, number: int) -> str:
        """Send a signal; return what was printed in the end."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=PATIENCE)[0]


@pytest.fixture
def voting() -> Iterator[Callable[..., Voting]]:
    """Start voting; what still runs at the end is killed."""
    with contextlib.ExitStack() as started:

        def start(*arguments: object) -> Voting:
            run = Voting(*arguments)
            started.callback(run.end, signal.SIGKILL)
            return run

        yield start


class Browser:
    """Headless Chromium; every step waits until the page has shown its effect."""

    def __init__(self) -> None:
        self.driver = start_chromium()

    def open(self, url: str) -> None:
        """Load the page."""
        self.driver.get(url)
        self.wait(lambda: self.pair is not None)

    @property
    def pair(self) -> str | None:
        """The key of the pair that is shown; empty when all are done; None while the page loads."""
        return self.read("document.body?.getAttribute('data-pair') ?? null")

    @property
    def says(self) -> str:
        """The line for the person."""
        return self.text("status")

    def text(self, name: str) -> str:
        """What an element shows."""
        return self.read("document.getElementById(arguments[0])?.innerText ?? ''", name).strip()

    def sides(self) -> list[str]:
        """Both captions."""
        return self.read("[...document.querySelectorAll('.side p')].map((one) => one.innerText)")

    def read(self, expression: str, *arguments: str) -> Any:
        """A value of the page, in one step: between two, the page may load anew."""
        return self.driver.execute_script(f"return {expression}", *arguments)

    def press(self, key: str) -> None:
        """Press a key and wait for another pair."""
        before = self.pair
        ActionChains(self.driver).send_keys(key).perform()
        self.wait(lambda: self.pair != before)

    def wait(self, until: Callable[[], bool]) -> None:
        """Wait until something is so."""
        wait_in(self.driver, until)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The browser with one empty tab."""
    yield chromium
    first, *others = chromium.driver.window_handles
    for handle in others:
        chromium.driver.switch_to.window(handle)
        chromium.driver.close()
    chromium.driver.switch_to.window(first)
    chromium.driver.get("about:blank")


def test_keys_clicks_reload_and_the_end(
    voting: Callable[..., Voting], browser: Browser, tmp_path: Path
) -> None:
    output = tmp_path / "votes.jsonl"
    run = voting(captions(tmp_path, prompts=8), output)
    browser.open(run.url)
    expected: list[tuple[str, str]] = []

    def chosen() -> list[tuple[str | None, str | None]]:
        return [(one.chosen.text, one.rejected.text) for one in read_preferences(output)]

    for key, side in [
        (Keys.ARROW_LEFT, 0), ("1", 0), ("f", 0), (Keys.ARROW_RIGHT, 1), ("2", 1), ("j", 1), ("J", 1),
    ]:  # fmt: skip
        shown = browser.sides()
        expected.append((shown[side], shown[1 - side]))
        browser.press(key)
        assert chosen() == expected
    for key in (Keys.ARROW_DOWN, Keys.SPACE):  # ties
        browser.press(key)
        assert chosen() == expected and browser.says == "Neither, kept."
    assert browser.text("count") == "9 of 16"
    here = browser.pair
    browser.driver.refresh()
    browser.wait(lambda: browser.pair == here)
    browser.press("z")  # a tie
    browser.press(Keys.BACKSPACE)  # a tie
    assert chosen() == expected and browser.text("count") == "7 of 16"
    browser.press("z")
    assert chosen() == expected[:-1] and browser.says == "Taken back: vote again."
    expected[-1] = (expected[-1][1], expected[-1][0])
    browser.press("f")  # changed my mind
    assert chosen() == expected
    for name, side in (("left", 0), ("right", 1)):
        shown, before = browser.sides(), browser.pair
        expected.append((shown[side], shown[1 - side]))
        browser.driver.find_element(By.ID, name).click()
        browser.wait(lambda before=before: browser.pair != before)
        assert chosen() == expected
    ActionChains(browser.driver).send_keys("?").perform()
    assert browser.driver.find_element(By.ID, "keys").is_displayed()
    ActionChains(browser.driver).send_keys("1", Keys.ESCAPE).perform()  # no vote while the keys are shown
    browser.wait(lambda: not browser.driver.find_element(By.ID, "keys").is_displayed())
    assert chosen() == expected
    for _ in range(16 - 9):
        browser.press("1")
    assert browser.pair == "" and "Every pair has a vote" in browser.text("over")
    assert len(chosen()) == 16
    loaded = "return [...document.images].every((image) => image.complete && image.naturalWidth > 0)"
    assert browser.driver.execute_script(loaded)
    assert [entry for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    said = run.end(signal.SIGINT)
    assert run.process.returncode == 0
    assert f"16 votes are kept in {output} (0 ties, 0 pairs left)" in said
    assert f"unimm train training/dpo-embedded.yaml data.file={output}" in said


def test_two_tabs_vote_once(voting: Callable[..., Voting], browser: Browser, tmp_path: Path) -> None:
    output = tmp_path / "votes.jsonl"
    run = voting(captions(tmp_path), output)
    browser.open(run.url)
    first = browser.driver.current_window_handle
    browser.driver.switch_to.new_window("tab")
    browser.open(run.url)
    second = browser.driver.current_window_handle
    browser.press("1")
    ahead = browser.pair
    browser.driver.switch_to.window(first)
    assert browser.pair != ahead
    browser.press("2")  # the pair that the other tab has voted on
    assert browser.pair == ahead and "counts once" in browser.says and browser.text("count") == "1 of 6"
    assert len(read_preferences(output)) == 1
    browser.press("1")
    browser.driver.switch_to.window(second)
    ActionChains(browser.driver).send_keys("z").perform()  # its last vote is no longer the last
    browser.wait(lambda: "nothing was taken back" in browser.says)
    assert browser.text("count") == "2 of 6" and len(read_preferences(output)) == 2


def test_killed_and_started_again(voting: Callable[..., Voting], browser: Browser, tmp_path: Path) -> None:
    candidates, output = captions(tmp_path), tmp_path / "votes.jsonl"
    run = voting(candidates, output)
    browser.open(run.url)
    browser.press("1")
    browser.press(Keys.SPACE)
    here, port = browser.pair, run.port
    run.process.send_signal(signal.SIGSTOP)
    ActionChains(browser.driver).send_keys("1").perform()  # the vote is on its way
    run.end(signal.SIGKILL)
    browser.wait(lambda: "Not kept" in browser.says)
    assert browser.pair == here and len(read_preferences(output)) == 1
    with output.open("ab") as file:  # as if the next line had been cut off
        file.truncate(output.stat().st_size - 7)
    again = voting(candidates, output, port)
    assert (again.done, again.total, again.port) == (2, 6, port)
    ActionChains(browser.driver).send_keys(
        "1"
    ).perform()  # the page of the first run loads that of the second
    browser.wait(lambda: "vote on this pair once more" in browser.says)
    assert browser.pair == here and browser.text("count") == "2 of 6"
    browser.press("z")  # the tie of before the kill
    for _ in range(5):
        browser.press("2")
    assert browser.pair == ""
    pairs = {frozenset((pair.left.text, pair.right.text)) for pair in read_ballot(candidates).pairs}
    voted = [frozenset((one.chosen.text, one.rejected.text)) for one in read_preferences(output)]
    assert len(voted) == len(set(voted)) == 6 and set(voted) == pairs


def test_killed_again_and_again_while_votes_pour_in(
    voting: Callable[..., Voting], browser: Browser, tmp_path: Path
) -> None:
    candidates, output = captions(tmp_path, prompts=30, each=8), tmp_path / "votes.jsonl"
    seen = 0
    for _ in range(3):
        run = voting(candidates, output)
        assert run.done >= seen
        browser.open(run.url)
        pour = """
            window.kept = 0;
            (async () => {
              for (;;) {
                const state = await send("/vote", {pair: shown.pair.key, choice: "left"});
                window.kept += state.result === "kept";
                show(state);
              }
            })().catch(() => {});
        """
        browser.driver.execute_script(pour)
        browser.wait(lambda: browser.driver.execute_script("return window.kept") >= 8)
        os.kill(run.process.pid, signal.SIGKILL)
        run.process.wait()
        acknowledged = run.done + browser.driver.execute_script("return window.kept")
        assert len(output.read_bytes().splitlines()) >= acknowledged  # what the page was told is on disk
        seen = acknowledged
    last = voting(candidates, output)
    voted = [frozenset((one.chosen.text, one.rejected.text)) for one in read_preferences(output)]
    assert len(voted) == len(set(voted)) == last.done >= seen


def test_words_from_the_data_are_shown_and_never_run(
    voting: Callable[..., Voting], browser: Browser, tmp_path: Path
) -> None:
    attack = "<img src=x onerror=document.title='run'><script>document.title='run'</script>"
    rows = [{"prompt": f"{attack} {{token}}", "candidates": [attack, "</button><b>b</b> \u2028 é 好"]}]
    run = voting(write(tmp_path / "c.jsonl", *rows), tmp_path / "votes.jsonl")
    browser.open(run.url)
    assert browser.text("prompt") == f"{attack} {{token}}"
    assert attack in browser.sides()
    assert browser.driver.title == "Which is better?"
    assert not browser.driver.find_elements(By.CSS_SELECTOR, "main img, main script, main b")
