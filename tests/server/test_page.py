"""The page of `unimm serve` in a browser: what people do with it, on desk and phone, and when the server goes."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import axe_core_python
import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import unimm
from tests.browser import needs_browser, start_chromium, wait_in
from tests.server.serving import Client, Process, image_of, serving, shows
from unimm.pipeline import UniMM
from unimm.preferences.data import read_preferences
from unimm.preferences.vote.duels import Duels, add_votes
from unimm.preferences.vote.votes import Votes

pytestmark = needs_browser
VIEWS = "draw", "chat", "edit", "vote", "gallery", "model"
AXE = Path(axe_core_python.__file__).with_name("axe.min.js")
PIXELS = """
const [selector, done] = arguments, image = document.querySelector(selector);
image.decode().then(() => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  canvas.getContext("2d").drawImage(image, 0, 0);
  done(canvas.toDataURL("image/png").split(",")[1]);
});"""
OFFER = """
const [kind, base64] = arguments, transfer = new DataTransfer();
const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
transfer.items.add(new File([bytes], "scene.png", { type: "image/png" }));
const event = kind === "drop" ? new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true })
  : new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true });
document.getElementById("main").dispatchEvent(event);"""
WATCH = """
window.seen = [];
new MutationObserver((changes) => changes.forEach((change) => window.seen.push([
  [...document.querySelectorAll(".tile")].indexOf(change.target), +change.target.dataset.rows,
]))).observe(document.getElementById("draw-results"), { subtree: true, attributeFilter: ["data-rows"] });"""


class Page:
    """The page in a browser."""

    def __init__(self, driver: Any, port: int) -> None:
        self.driver, self.port = driver, port

    def open(self) -> None:
        self.driver.get(f"http://127.0.0.1:{self.port}/")
        self.wait(lambda: self.js("document.getElementById('state').dataset.state") == "ready")
        self.wait(lambda: self.count(".view:not([hidden])") == 1)

    def js(self, expression: str, *arguments: Any) -> Any:
        return self.driver.execute_script(f"return {expression}", *arguments)

    def wait(self, until: Callable[[], bool]) -> None:
        wait_in(self.driver, until)

    def count(self, selector: str) -> int:
        return int(self.js("document.querySelectorAll(arguments[0]).length", selector))

    def text(self, selector: str) -> str:
        return str(self.js("document.querySelector(arguments[0])?.innerText ?? ''", selector)).strip()

    def click(self, selector: str) -> None:
        self.driver.find_element(By.CSS_SELECTOR, selector).click()

    def write(self, selector: str, words: str) -> None:
        field = self.driver.find_element(By.CSS_SELECTOR, selector)
        field.clear()
        field.send_keys(words)

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def go(self, view: str) -> None:
        self.click(f"nav a[data-view={view}]")
        self.wait(lambda: bool(self.js("document.body.dataset.view === arguments[0]", view)))

    def choose(self, name: str, number: int) -> None:
        self.click(f"label:has(> input[name={name}-count][value='{number}'])")

    def draw(self, prompt: str, count: int = 1, seed: int | None = None) -> None:
        """Draw and wait until all is there."""
        before = self.count("#draw-results .tile.done")
        self.go("draw")
        self.write("#draw-prompt", prompt)
        self.choose("draw", count)
        self.write("#draw-seed", "" if seed is None else str(seed))
        self.click("#draw-go")
        self.wait(lambda: self.count("#draw-results .tile.done") == before + count)

    def image(self, selector: str) -> Image.Image:
        """What an image shows, in its own pixels."""
        return image_of(self.driver.execute_async_script(PIXELS, selector))

    def offer(self, kind: str, image: Image.Image) -> None:
        """Drop or paste an image."""
        buffer = io.BytesIO()
        image.save(buffer, "png")
        self.driver.execute_script(OFFER, kind, base64.b64encode(buffer.getvalue()).decode())

    def ask(self, words: str) -> str:
        """Ask in the chat; the answer."""
        before = self.count(".turn.assistant")
        self.write("#chat-text", words)
        self.press(Keys.ENTER)
        self.wait(lambda: self.count(".turn.assistant:not(.coming)") == before + 1)
        self.wait(lambda: bool(self.js("!document.getElementById('chat-send').hidden")))
        return str(self.js("[...document.querySelectorAll('.turn.assistant .said')].at(-1).textContent"))

    def emulate(self, width: int, height: int, dark: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})

    def faults(self) -> list[str]:
        """Serious faults of accessibility."""
        script = "const done = arguments[0]; axe.run().then(done, (error) => done({error: String(error)}));"
        found = self.driver.execute_async_script(script)
        assert found["passes"], found
        serious = [one for one in found["violations"] if one["impact"] in ("serious", "critical")]
        return [f"{one['id']}: {node['html'][:200]}" for one in serious for node in one["nodes"]]

    def errors(self) -> list[str]:
        return [one["message"] for one in self.driver.get_log("browser") if one["level"] == "SEVERE"]

    def requests(self) -> set[str]:
        """Where requests went since this was asked last: host and port, or the scheme of what is no request."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [one["params"] for one in messages if one["method"] == "Network.requestWillBeSent"]
        urls = [one["request"]["url"] for one in sent if one["documentURL"].startswith("http")]
        return {url.split("/")[2] if url.startswith("http") else url.partition(":")[0] for url in urls}


@pytest.fixture(scope="module")
def votes_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("votes") / "votes.jsonl"


@pytest.fixture(scope="module")
def served() -> UniMM:
    """What servers here have, one after the other."""
    return unimm.load(device="cpu")


@pytest.fixture(scope="module")
def server(served: UniMM, votes_file: Path) -> Iterator[Client]:
    with Votes(votes_file, {"model": "embedded"}) as votes:
        duels = Duels(votes, "ann")
        with serving(served, lambda server: add_votes(server.app, server.service, duels)) as client:
            yield client


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    found = start_chromium()
    yield found
    found.quit()


@pytest.fixture
def page(server: Client, driver: Any) -> Iterator[Page]:
    """The page as someone meets it first; at the end nothing was asked of others, and nothing went wrong."""
    driver.get("about:blank")
    origin = f"http://127.0.0.1:{server.port}"
    driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": origin, "storageTypes": "all"})
    page = Page(driver, server.port)
    page.emulate(1280, 800)
    page.errors(), page.requests()
    page.open()
    yield page
    assert page.errors() == []
    assert page.requests() <= {f"127.0.0.1:{server.port}", "data", "blob"}


def same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_rows_come_and_drawings_stay(page: Page, um: UniMM, tmp_path: Path) -> None:
    page.driver.execute_script(WATCH)
    page.draw("a rocket", count=2, seed=7)
    rows = [[row for number, row in page.js("window.seen") if number == tile] for tile in (0, 1)]
    assert rows == [[1, 2, 3, 4, 5, 6, 7]] * 2
    expected = um.draw("a rocket", n=2, seed=[7, 8])
    for number in (0, 1):
        assert same(page.image(f".tile[data-seed='{7 + number}'] img"), expected[number])
    page.driver.refresh()
    page.wait(lambda: page.count("nav a[aria-current]") == 1)
    page.go("gallery")
    page.wait(lambda: page.count(".thumb") == 2)
    assert same(page.image(".thumb[data-seed='8'] img"), expected[1])
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    page.click(".thumb[data-seed='8']")
    page.click("#viewer button:has(use[href='#i-download'])")
    page.wait(lambda: (tmp_path / "a-rocket-8.png").exists())
    assert same(Image.open(tmp_path / "a-rocket-8.png").convert("RGB"), expected[1])
    page.click("#viewer button:has(use[href='#i-again'])")  # the same seed again
    page.wait(lambda: page.count("#draw-results .tile.done") == 1)
    assert same(page.image("#draw-results .tile img"), expected[1])
    assert page.js("document.getElementById('draw-seed').value") == "8"
    page.write("#draw-seed", "eight")
    page.click("#draw-go")
    assert "whole number" in page.text("#toasts") and page.count("#draw-results .tile") == 1


def test_turns_about_dropped_and_pasted_images(page: Page, server: Client, scenes: list[Image.Image]) -> None:
    page.go("chat")
    page.offer("drop", scenes[0])
    page.wait(lambda: page.count(".shot img") == 1)
    first = page.ask("what is in the picture?")
    second = page.ask("which background?")
    turns: list[dict[str, Any]] = [shows(scenes[0], "what is in the picture?")]
    for answer, following in ((first, "which background?"), (second, None)):
        found = server.post("/v1/chat/completions", messages=turns, temperature=0).document
        assert found["choices"][0]["message"]["content"] == answer != ""
        turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": following}]
    page.driver.refresh()
    page.wait(lambda: page.count(".turn") == 4)
    assert same(page.image(".turn.user img"), scenes[0])
    page.click("#chat-new")
    page.offer("paste", scenes[1])
    page.wait(lambda: page.count(".shot img") == 1)
    page.click("[aria-label='Remove image 1']")
    assert page.count(".shot") == page.count(".turn") == 0
    page.draw("a red apple", seed=3)
    page.click("#draw-results [aria-label='Send to chat']")
    page.wait(lambda: page.count(".shot img") == 1)
    assert "apple" in page.ask("what is in the picture?")


def test_edits_and_the_slider(page: Page, server: Client, scenes: list[Image.Image]) -> None:
    page.go("edit")
    page.click("#edit-go")
    assert "Choose the image" in page.text("#toasts")
    page.offer("drop", scenes[0])
    page.wait(lambda: page.count("#edit-source img") == 1)
    page.write("#edit-prompt", "two stars")
    page.choose("edit", 1)
    page.write("#edit-seed", "9")
    page.click("#edit-go")
    page.wait(lambda: page.count("#edit-results .tile.done .comparison") == 1)
    named = shows(scenes[0], "")["content"][0]["image_url"]["url"]
    edited = server.post(
        "/v1/images/edits", images=[{"image_url": named}], prompt="two stars", seed=9
    ).document
    assert same(page.image(".comparison .after"), image_of(edited["data"][0]["b64_json"]))
    assert same(page.image(".comparison img"), scenes[0])
    slider = page.driver.find_element(By.CSS_SELECTOR, ".comparison input")
    slider.send_keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.js("document.querySelector('.comparison').style.getPropertyValue('--at')") == "2%"


def test_votes_by_keys(page: Page, votes_file: Path, um: UniMM) -> None:
    page.go("vote")
    page.wait(lambda: page.count("#vote-open:not([hidden])") == 1)
    page.write("#vote-prompt", "a red apple 1")  # letters of keys are no votes while one writes
    page.press(Keys.ENTER)
    expected: list[tuple[int, int]] = []
    last = ""
    for key, side in (("1", 0), (Keys.ARROW_RIGHT, 1), (Keys.ARROW_DOWN, None), ("j", 1)):
        page.wait(
            lambda last=last: page.js("document.getElementById('vote').dataset.pair") not in ("", last, None)
        )
        last = page.js("document.getElementById('vote').dataset.pair")
        seeds = [int(seed) for seed in last.split("-")]
        page.press(key)
        if side is not None:
            expected.append((seeds[side], seeds[1 - side]))
        page.wait(lambda last=last: page.js("document.getElementById('vote').dataset.pair") != last)
        assert "kept" in page.text("#vote-says")
    assert page.text("#vote-file").startswith("4 votes")
    page.press("z")
    page.wait(lambda: page.text("#vote-file").startswith("3 votes"))
    kept = read_preferences(votes_file)
    assert len(kept) == len(expected) - 1 == 2
    for one, (better, worse) in zip(kept, expected, strict=False):
        _, codes = um.draw("a red apple 1", n=2, seed=[better, worse], return_codes=True)
        assert [one.chosen.codes, one.rejected.codes] == codes.tolist() and one.source == "ann"


def test_a_phone_and_a_keyboard(page: Page) -> None:
    page.emulate(390, 844)
    page.open()
    for view in VIEWS:
        page.go(view)
        assert page.js("document.documentElement.scrollWidth") <= 390, view
        navigation = page.js("document.querySelector('nav').getBoundingClientRect().toJSON()")
        assert navigation["bottom"] == 844 and navigation["height"] < 80  # under the thumb
    page.emulate(1280, 800)
    page.go("draw")
    for _ in range(30):
        if page.js("document.activeElement.id") == "draw-prompt":
            break
        page.press(Keys.TAB)
    page.press("a strawberry", Keys.ENTER)  # four of them, as nothing else was said
    page.wait(lambda: page.count("#draw-results .tile.done") == 4)
    for _ in range(60):
        if page.js("document.activeElement.className") == "look":
            break
        page.press(Keys.TAB)
    page.press(Keys.ENTER)
    page.wait(lambda: page.count("#viewer[open]") == 1)
    page.press(Keys.ESCAPE)
    page.wait(lambda: page.count("#viewer[open]") == 0)
    assert page.js("document.activeElement.className") == "look"


@pytest.mark.parametrize("dark", [False, True])
def test_nothing_keeps_people_out(page: Page, dark: bool) -> None:
    page.emulate(1280, 800, dark)
    page.driver.execute_script(AXE.read_text("utf-8"))
    page.draw("a rocket", seed=1)
    for view in VIEWS:
        page.go(view)
        time.sleep(0.4)  # colours of links fade
        assert page.faults() == [], view
    page.go("gallery")
    page.click(".thumb")
    assert page.faults() == []
    page.press(Keys.ESCAPE)
    page.driver.execute_script("document.querySelector('.thumb img').removeAttribute('alt')")
    page.driver.execute_script("document.querySelector('.thumb').removeAttribute('aria-label')")
    assert page.faults() != []  # it does look


def test_a_key_is_asked_for(driver: Any) -> None:
    with serving(unimm.load(device="cpu", parts="draw"), api_key="s3cret") as client:
        page = Page(driver, client.port)
        driver.get(f"http://127.0.0.1:{page.port}/")
        for key in ("wrong", "s3cret"):
            page.wait(lambda: page.count("#key[open]") == 1)
            page.write("#key-value", key)
            page.press(Keys.ENTER)
        page.wait(lambda: page.count("#draw:not([hidden])") == 1)
        page.draw("a star")
        views = page.js(
            "[...document.querySelectorAll('nav a:not([hidden])')].map((one) => one.dataset.view)"
        )
        assert "edit" not in views  # this one does not look at images
        assert page.count("#draw-results [aria-label='Send to chat']") == 0


def test_the_server_goes_and_comes_back(driver: Any, tmp_path: Path, um: UniMM) -> None:
    page: Page
    with Process(tmp_path) as first:
        page = Page(driver, first.client.port)
        page.open()
        page.go("vote")
        assert "unimm serve --votes" in page.text("#vote-closed")
        page.go("draw")
        page.errors()
        page.write("#draw-prompt", "a rocket")
        page.choose("draw", 4)
        page.write("#draw-seed", "7")
        page.click("#draw-go")
        page.wait(lambda: page.count(".tile.drawing") > 0)
        first.process.kill()
        page.wait(lambda: page.count("#away:not([hidden])") == 1)
        assert "does not answer" in page.text("#away")
        page.wait(lambda: page.count(".tile.failed") > 0)
        assert not page.driver.find_element(By.ID, "draw-go").is_enabled()
    with serving(unimm.load(device="cpu"), port=page.port):
        page.wait(lambda: page.js("document.getElementById('state').dataset.state") == "ready")
        assert page.count("#away:not([hidden])") == 0
        prompt = page.js("document.getElementById('draw-prompt').value")
        assert prompt == "a rocket"  # nothing written is lost
        failed = page.js("[...document.querySelectorAll('.tile')].findIndex((one) => one.matches('.failed'))")
        page.click(".tile.failed figcaption button")
        page.wait(lambda: page.count("#draw-results .batch:first-child .tile.done") == 1)
        seed = int(page.js("document.querySelector('.batch:first-child .tile').dataset.seed"))
        assert seed == 7 + failed
        assert same(page.image(".batch:first-child .tile img"), um.draw("a rocket", seed=seed)[0])
    said = [line for line in page.errors() if "net::ERR" not in line and "503" not in line]
    assert said == []  # but for what the browser says of each request that fails
