"""What the tests of the page share: a page that is watched, and how to chat on it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, expect

from ..conftest import Running
from .scripted_server import ScriptedServer, delta, ending, stream

expect.set_options(timeout=20_000)  # on a busy machine too

WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""


@contextmanager
def watched(browser: Browser, server: ScriptedServer | Running, **options: Any) -> Iterator[Page]:
    """A page that may talk to its server only, run nothing but its own script and raise no error."""
    context = browser.new_context(reduced_motion="reduce", **options)
    context.set_default_timeout(20_000)
    context.add_init_script(WATCH)
    page, wrong = context.new_page(), []
    page.on("popup", lambda opened: wrong.append("opened a page"))
    own = (server.url, "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(own) else wrong.append(request.url))
    page.on("dialog", lambda dialog: wrong.append(f"dialog {dialog.message}") or dialog.dismiss())
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(server.url)
    expect(page.locator("#model")).not_to_have_text("")
    yield page
    assert page.evaluate("violations") == []
    assert wrong == []
    context.close()


def ask(page: Page, text: str = "Tell me.") -> None:
    page.locator("#input").fill(text)
    page.locator("#input").press("Enter")


def finished(page: Page) -> Page:
    expect(page.locator("#send")).to_have_attribute("aria-label", "Send")
    return page


class Gate:
    """Lets an answer go on when the test says so."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    async def __call__(self) -> None:
        while not self.opened.is_set():
            await asyncio.sleep(0.01)


def held(scripted: ScriptedServer, before: str, after: str = "") -> Gate:
    """The next answer stops between two texts until the gate is opened."""
    gate = Gate()

    async def chunks() -> AsyncIterator[bytes]:
        yield delta(before)
        await gate()
        yield delta(after)
        yield ending(2)

    scripted.say = lambda body: stream(scripted.watched(chunks()))
    return gate


MARKDOWN = """\
## A *short* tour

One **bold** word, `code <b>`, ~~gone~~ and [a link](https://example.org/a_(b)?c=1 "title").
A second line.

1. first
   - inner
   - other
2. second

> quoted
> twice

```python
if a < b:
    print("<script>")
```

| Name | Cost |
|:-----|-----:|
| a \\| b | `1` |
"""
