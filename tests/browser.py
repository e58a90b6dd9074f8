"""Headless Chromium for the tests of pages; they are skipped where it is missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
needs_browser = pytest.mark.skipif(
    bool(MISSING),
    reason=f"{' and '.join(MISSING)} not found (Debian: apt-get install chromium chromium-driver)",
)
PATIENCE = 60  # seconds until a page that does not answer fails the test
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
)  # fmt: skip


def start_chromium() -> webdriver.Chrome:
    """A browser whose logs hold what the console says and which requests pages make."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, Service(shutil.which("chromedriver")))


def wait_in(driver: webdriver.Chrome, until: Callable[[], bool]) -> None:
    """Wait until something is so."""
    WebDriverWait(driver, PATIENCE, poll_frequency=0.05).until(lambda _: until())
