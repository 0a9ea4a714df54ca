from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from .driving import watched
from .scripted_server import ScriptedServer

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None and not os.environ.get("FASTLLM_NEEDS_BROWSER"):
        pytest.skip("needs Debian's chromium (apt-get install chromium)")
    assert CHROMIUM, "there is no chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def running_server() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.close()


@pytest.fixture
def scripted(running_server: ScriptedServer) -> ScriptedServer:
    running_server.reset()
    return running_server


@pytest.fixture
def page(browser: Browser, scripted: ScriptedServer) -> Iterator[Page]:
    with watched(browser, scripted) as page:
        yield page
