"""The chat page in headless Chromium, against a server whose answers a test writes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from .scripted_server import ScriptedServer, delta, ending, event, pieces, refusal, stream

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None and not os.environ.get("FASTLLM_NEEDS_BROWSER"):
    pytest.skip("needs Debian's chromium (apt-get install chromium)", allow_module_level=True)

expect.set_options(timeout=20_000)  # on a busy machine too

WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
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
def server(running_server: ScriptedServer) -> ScriptedServer:
    running_server.reset()
    return running_server


@contextmanager
def watched(browser: Browser, server: ScriptedServer, **options: Any) -> Iterator[Page]:
    """A page that may talk to its server only, run nothing but its own script and raise no error."""
    context = browser.new_context(reduced_motion="reduce", **options)
    context.set_default_timeout(20_000)
    context.add_init_script(WATCH)
    page, wrong = context.new_page(), []
    page.on("popup", lambda opened: wrong.append("opened a page"))
    page.on("request", lambda request: None if request.url.startswith((server.url, "data:", "blob:")) else wrong.append(request.url))
    page.on("dialog", lambda dialog: wrong.append(f"dialog {dialog.message}") or dialog.dismiss())
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(server.url)
    expect(page.locator("#model")).not_to_have_text("")
    yield page
    assert page.evaluate("violations") == []
    assert wrong == []
    context.close()


@pytest.fixture
def page(browser: Browser, server: ScriptedServer) -> Iterator[Page]:
    with watched(browser, server) as page:
        yield page


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


def held(server: ScriptedServer, before: str, after: str = "") -> Gate:
    """The next answer stops between two texts until the gate is opened."""
    gate = Gate()

    async def chunks() -> AsyncIterator[bytes]:
        yield delta(before)
        await gate()
        yield delta(after)
        yield ending(2)

    server.say = lambda body: stream(server.watched(chunks()))
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


def test_an_answer_streams_and_renders(page: Page, server: ScriptedServer) -> None:
    head, tail = MARKDOWN[:60], MARKDOWN[60:]
    gate = held(server, head, tail)
    ask(page, "Show me.\nAll of it")
    answer = page.locator(".answer")
    expect(answer.locator("h4 em")).to_have_text("short")
    expect(answer.locator("strong")).to_have_text("bold")
    expect(answer.locator("table")).to_have_count(0)
    gate.opened.set()
    finished(page)
    expect(answer.locator("th").nth(1)).to_have_class("right")
    assert answer.locator("td").all_text_contents() == ["a | b", "1"]
    assert answer.locator("ol > li > ul > li").all_text_contents() == ["inner", "other"]
    assert answer.locator("pre code").text_content() == 'if a < b:\n    print("<script>")'
    assert answer.locator(".code-head span").text_content() == "python"
    assert answer.locator("blockquote").text_content() == "quotedtwice"
    assert answer.locator("del").text_content() == "gone"
    link = answer.locator("a")
    assert link.get_attribute("href") == "https://example.org/a_(b)?c=1"
    assert link.get_attribute("target") == "_blank" and "noopener" in str(link.get_attribute("rel"))
    expect(page.locator(".assistant .note")).to_contain_text("2 tokens")
    expect(page.locator(".assistant .note")).to_contain_text("first after")
    expect(page.locator("#announcer")).to_contain_text("A short tour")
    assert server.bodies == [
        {
            "model": "tiny-chat",
            "messages": [{"role": "user", "content": "Show me.\nAll of it"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    ask(page, "More")
    finished(page)
    sent = [(message["role"], message["content"]) for message in server.bodies[1]["messages"]]
    assert sent == [("user", "Show me.\nAll of it"), ("assistant", MARKDOWN), ("user", "More")]


RENDERED = [
    ("a\nb", "<p>a<br>b</p>"),
    ("# One #\n\nTwo\n---", "<h3>One</h3><h4>Two</h4>"),
    ("***both*** and **a *b* c**", "<p><em><strong>both</strong></em> and <strong>a <em>b</em> c</strong></p>"),
    ("2 * 3 * 4, snake_case_name, _it_ \\*no\\*", "<p>2 * 3 * 4, snake_case_name, <em>it</em> *no*</p>"),
    ("`` a`b `` and ``open", "<p><code>a`b</code> and ``open</p>"),
    ("**never closed and `neither", "<p>**never closed and `neither</p>"),
    ("- a\n- b\n\n  more\n* c", "<ul><li><p>a</p></li><li><p>b</p><p>more</p></li></ul><ul><li><p>c</p></li></ul>"),
    ("3. a\n4. b", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'),
    ("It was\n1986. A year", "<p>It was<br>1986. A year</p>"),
    ("1. a\n  - b\n2. c", "<ol><li><p>a</p><ul><li><p>b</p></li></ul></li><li><p>c</p></li></ol>"),
    ("a\n***\n> b\nc", "<p>a</p><hr><blockquote><p>b<br>c</p></blockquote>"),
    ("<b>x</b><br>&amp; \\(y\\)", "<p>&lt;b&gt;x&lt;/b&gt;<br>&amp;amp; \\(y\\)</p>"),
    ("see https://a.example/b?c=d). <mailto:e@f.example>", '<p>see <a href="https://a.example/b?c=d">https://a.example/b?c=d</a>). <a href="mailto:e@f.example">e@f.example</a></p>'),
    ("![picture](https://a.example/b.png) [x](/local) [y](javascript:z)", '<p><a href="https://a.example/b.png">picture</a> [x](/local) [y](javascript:z)</p>'),
    ("a | b\n--|--\nc", "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>c</td><td></td></tr></tbody></table>"),
    ("~~~\n```\n~~~\nend", "<code>```</code><p>end</p>"),
]  # fmt: skip

RENDER = """(text) => {
  const answer = new Answer(document.createElement("section"));
  answer.update(text, false);
  for (const node of answer.root.querySelectorAll("*"))
    for (const { name } of [...node.attributes]) if (!["href", "start"].includes(name)) node.removeAttribute(name);
  for (const head of answer.root.querySelectorAll("div > div")) head.remove();
  for (const node of answer.root.querySelectorAll("pre, div")) node.replaceWith(...node.childNodes);
  return answer.root.innerHTML;
}"""


def test_markdown(page: Page) -> None:
    for text, html in RENDERED:
        assert page.evaluate(RENDER, text) == html, text


def test_an_answer_in_parts_is_the_answer_at_once(page: Page) -> None:
    """Whatever has come, what the parts before made of the page is what parsing it all would make."""
    found = page.evaluate(
        """(texts) => {
          const fresh = (text, open) => {
            const answer = new Answer(document.createElement("div"));
            answer.update(text, open);
            return answer.root.innerHTML;
          };
          const wrong = [];
          for (const text of texts) {
            const answer = new Answer(document.createElement("div"));
            for (let i = 1; i <= text.length; i++) {
              answer.update(text.slice(0, i), true);
              if (answer.root.innerHTML !== fresh(text.slice(0, i), true)) wrong.push(text.slice(0, i));
            }
            answer.update(text, false);
            if (answer.root.innerHTML !== fresh(text, false)) wrong.push(text);
          }
          return wrong;
        }""",
        [MARKDOWN, *(text for text, _ in RENDERED)],
    )
    assert found == []


def test_nesting_ends(page: Page) -> None:
    """A browser's layout has a stack too, which elements a thousand deep exhaust."""
    marks = ["*a ", "**a _b ", "[", "![a](", "`a``b", "> ", "- ", "1. ", "~~a", "_a*", "*a **b ", ">"]
    depths = page.evaluate(
        """(texts) => texts.map((text) => {
          const answer = new Answer(document.createElement("div"));
          answer.update(text, true);
          let depth = 0;
          for (let nodes = [answer.root]; nodes.length; nodes = nodes.flatMap((node) => [...node.children])) depth++;
          return depth;
        })""",
        [mark * 2000 for mark in marks] + ["\n".join("  " * n + "- a" for n in range(500)), "*a " * 2000 + "a* " * 2000],
    )
    assert max(depths) < 60


def test_events_wherever_the_bytes_are_cut(page: Page) -> None:
    lines = [": a comment", "data: {\"a\":\"é🙂\"}", "", "event: x", "id: 7", "data:one", "data: two", "", "", "data: [DONE]", "", "data: cut"]  # fmt: skip
    for end in ("\n", "\r\n", "\r"):
        content = end.join(lines).encode()
        cuts = [[i] for i in range(1, len(content))] + [list(range(1, len(content)))]
        found = page.evaluate(
            """async ([bytes, cuts]) => {
              const found = new Set();
              for (const cut of cuts) {
                const parts = [0, ...cut].map((start, i) => new Uint8Array(bytes.slice(start, cut[i] ?? bytes.length)));
                const stream = new ReadableStream({
                  pull(to) { if (parts.length) to.enqueue(parts.shift()); else to.close(); }
                });
                const got = [];
                for await (const data of events(stream, new AbortController().signal)) got.push(data);
                found.add(JSON.stringify(got));
              }
              return [...found];
            }""",
            [list(content), cuts],
        )
        assert [json.loads(text) for text in found] == [['{"a":"é🙂"}', "one\ntwo", "[DONE]"]]


HOSTILE = """\
<script>alert(1)</script> <img src=x onerror="alert(2)"> <svg onload=alert(3)><a xlink:href="javascript:alert(4)">
<iframe src="https://evil.example/"></iframe><style>@import "https://evil.example/a.css";</style><base href="//evil.example">

[a](javascript:alert(5)) [b](JaVaScRiPt:alert(6)) [c](data:text/html,<script>alert(7)</script>) [d](vbscript:x)
[e](<javascript:alert(8)>) [f](java\tscript:alert(9)) [g](&#106;avascript:alert(10)) [h]( javascript:alert(11))
![i](https://evil.example/pixel.png) ![j](javascript:alert(12)) <javascript:alert(13)> [k](//evil.example) [l](blob:x) [m](file:///etc)
[n](https://evil.example/"onmouseover="alert(14)) [o](https://evil.example 'x" onclick="alert(15)') <https://evil.example/"onclick=alert(16)>

```html"><script>alert(17)</script>
<script>alert(18)</script><img src="https://evil.example/x.png" onerror=alert(19)>
```

| <img src=x onerror=alert(20)> | **<b onclick=alert(21)>x** |
|--|--|
| `<script>alert(22)</script>` | [p](javascript:alert(23)) |

- <details open ontoggle=alert(24)>
> # <math><mtext><img src onerror=alert(25)>

</li></ol></div><script>alert(26)</script>\u2028\u0000<template><script>alert(27)</script></template>
"""  # noqa: E501


def test_nothing_from_a_model_is_executed_or_fetched(page: Page, server: ScriptedServer) -> None:
    server.models_named = ["<img src=x onerror=alert(30)>"]
    page.reload()
    server.say = HOSTILE
    ask(page, "<img src=x onerror=alert(31)>")
    finished(page)
    server.say = lambda body: refusal(400, "<img src=x onerror=alert(32)><script>alert(33)</script>")
    ask(page, HOSTILE)
    finished(page)
    expect(page.locator(".error")).to_contain_text("<script>alert(33)</script>")
    page.reload()  # what was stored is as foreign
    expect(page.locator(".error")).to_contain_text("<script>alert(33)</script>")
    elements = page.evaluate("[...document.querySelectorAll('main *, #chats *')].map((node) => node.localName)")
    known = "a aside blockquote br button code del div em form h1 h2 h3 h4 header i li ol p pre rect path span strong svg"
    assert set(elements) <= {*known.split(), "table", "tbody", "td", "textarea", "th", "thead", "tr", "ul", "use"}
    names = page.evaluate(
        "[...document.querySelectorAll('main *')].flatMap((node) => [...node.attributes].map((a) => a.name))"
    )
    assert not [name for name in names if name.startswith("on") or name in ("src", "style", "srcdoc", "srcset")]
    links = page.evaluate("[...document.querySelectorAll('main a')].map((node) => node.href)")
    assert links and all(link.startswith("https://evil.example/") for link in links)
    assert "<script>alert(18)</script>" in page.locator(".answer pre").first.inner_text()
    page.locator(".answer").first.hover()
    page.wait_for_timeout(200)  # for what would come late


def test_stop(page: Page, server: ScriptedServer) -> None:
    gate = held(server, "The first words")
    ask(page)
    expect(page.locator(".answer")).to_have_text("The first words")
    page.locator("#send").click()
    finished(page)
    expect(page.locator(".assistant .note")).to_contain_text("Stopped")
    expect(page.locator(".error")).to_have_count(0)
    server.until(lambda: server.closed_early == 1)
    gate.opened.set()
    server.say = "Another answer."
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".answer")).to_have_text("Another answer.")
    assert [message["role"] for message in server.bodies[-1]["messages"]] == ["user"]


def test_conversations_survive_a_reload(page: Page, server: ScriptedServer) -> None:
    ask(page, "First question")
    finished(page)
    page.locator("#new").click()
    gate = held(server, "Half an answer")
    ask(page, "Second question")
    expect(page.locator(".answer")).to_have_text("Half an answer")
    page.reload()
    gate.opened.set()
    expect(page.locator(".answer")).to_have_text("Half an answer")
    expect(page.locator(".note")).to_contain_text("Not finished")
    assert page.locator("#chats .title").all_text_contents() == ["Second question", "First question"]
    page.locator("#chats .title", has_text="First").click()
    expect(page.locator(".answer")).to_have_text("Hello.")
    page.get_by_role("button", name="Rename: First question").click()
    page.keyboard.type("Renamed")
    page.keyboard.press("Enter")
    expect(page.locator("#title")).to_have_text("Renamed")
    page.get_by_role("button", name="Delete: Renamed").click()
    expect(page.locator("#chats .title")).to_have_count(1)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".answer")).to_have_text("Hello.")
    page.locator("#chats li", has_text="Second").hover()
    page.get_by_role("button", name="Delete: Second question").click()
    page.reload()
    assert page.locator("#chats .title").all_text_contents() == ["Renamed"]
    page.locator("#chats .title").click()
    with page.expect_download() as download:
        page.locator("#export").click()
    exported = json.loads(download.value.path().read_text())
    assert exported["conversations"][0]["title"] == "Renamed"
    assert exported["conversations"][0]["messages"] == [
        {"role": "user", "content": "First question"},
        {"role": "assistant", "content": "Hello."},
    ]


def test_two_tabs(page: Page, server: ScriptedServer) -> None:
    other = page.context.new_page()
    other.goto(server.url)
    ask(page, "From the first tab")
    finished(page)
    expect(other.locator("#chats .title")).to_have_text(["From the first tab"])
    other.locator("#chats .title").click()
    ask(other, "From the second")
    finished(other)
    expect(page.locator(".answer")).to_have_count(2)


def test_damaged_full_and_missing_storage(browser: Browser, page: Page, server: ScriptedServer) -> None:
    damaged = {"a": "{", "b": "null", "c": "[]", "d": '{"messages": 3}', "e": '{"messages": [{"role": "system"}, 7, {"role": "user", "content": "kept"}], "title": {}, "updated": "x"}'}  # fmt: skip
    page.evaluate("(all) => Object.entries(all).forEach(([k, v]) => localStorage.setItem('fastllm.chat.' + k, v))", damaged)
    page.evaluate("localStorage.setItem('fastllm.settings', '{\"theme\": 3}')")
    page.reload()
    expect(page.locator("#toast")).to_contain_text("4 saved conversations are damaged")
    expect(page.locator("#chats .title")).to_have_count(1)
    page.evaluate("for (let n = 1 << 22; n; n >>= 1) try { localStorage.setItem('x' + n, 'x'.repeat(n)); } catch {}")
    ask(page, "No room " + "for this " * 50)
    finished(page)
    expect(page.locator("#toast")).to_contain_text("storage is full")
    expect(page.locator(".answer")).to_have_text("Hello.")
    with watched(browser, server) as other:
        other.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new Error('off'); } })")
        other.reload()
        ask(other)
        expect(other.locator(".answer")).to_have_text("Hello.")


def test_by_keyboard_alone(page: Page, server: ScriptedServer) -> None:
    keys = page.keyboard
    page.locator(".skip").focus()
    expect(page.locator(".skip")).to_be_in_viewport(ratio=1)
    keys.press("Enter")
    expect(page.locator("#input")).to_be_focused()
    keys.type("One")
    keys.press("Shift+Enter")
    keys.type("two")
    composing = "new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true, cancelable: true })"
    assert page.evaluate(f"document.getElementById('input').dispatchEvent({composing})")
    assert server.bodies == []
    gate = held(server, "Some words")
    keys.press("Enter")
    expect(page.locator(".answer")).to_have_text("Some words")
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "One\ntwo"}]
    keys.press("Escape")
    finished(page)
    gate.opened.set()
    seen = []
    for _ in range(30):
        keys.press("Tab")
        name, shown = page.evaluate(
            """() => {
              const node = document.activeElement, style = getComputedStyle(node);
              const box = node.id === "input" ? getComputedStyle(node.closest(".box")) : style;
              const shown = box.outlineStyle !== "none" && style.opacity !== "0";
              return [node.getAttribute("aria-label") || node.textContent, shown || node === document.body]; // past the last
            }"""
        )
        assert shown, f"focus on {name!r} can't be seen"
        seen.append(name)
    for name in ("New conversation", "Settings", "Edit", "Copy", "Regenerate", "Message", "tiny-chat", "Delete: One"):
        assert name in seen
    page.locator("#open-settings").focus()
    keys.press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    for _ in range(30):
        keys.press("Tab")
        assert page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('dialog')")
    keys.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.locator("#open-settings")).to_be_focused()
    keys.press("Enter")
    page.get_by_label("Temperature").focus()
    keys.type("0.5")
    keys.press("Tab")
    keys.type("3")
    keys.press("Enter")
    expect(page.locator("#settings")).to_be_visible()  # top-p is 1 at most
    keys.press("Control+a")
    keys.type("0.9")
    page.get_by_label("Seed").focus()
    keys.type("7")
    page.get_by_label("System prompt").focus()
    keys.type("Be brief.")
    page.get_by_label("Max tokens").focus()
    keys.type("12")
    page.get_by_label("Model").focus()
    keys.press("ArrowDown")
    page.get_by_role("button", name="Save").focus()
    keys.press("Enter")
    expect(page.locator("#model")).to_have_text("other-chat")
    page.reload()
    ask(page)
    finished(page)
    sent = server.bodies[-1]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    wanted = {"model": "other-chat", "temperature": 0.5, "top_p": 0.9, "max_tokens": 12, "seed": 7}
    assert {name: sent[name] for name in wanted} == wanted


def test_on_a_phone(browser: Browser, server: ScriptedServer) -> None:
    server.say = MARKDOWN + "\n```\n" + "wide " * 60 + "\n```\n\n|" + "wide word |" * 30 + "\n|" + "--|" * 30 + "\n\n" + "x" * 400
    phone = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    with watched(browser, server, **phone) as page:
        page.locator("#input").fill("y" * 300)
        page.locator("#send").tap()
        finished(page)
        assert page.evaluate("[document, document.getElementById('scroll')].every((n) => { n = n.documentElement ?? n; return n.scrollWidth <= n.clientWidth; })")
        expect(page.locator("#sidebar")).to_be_hidden()
        assert page.evaluate("document.getElementById('sidebar').inert")
        page.locator("#menu").tap()
        expect(page.locator("#new")).to_be_in_viewport(ratio=1)
        expect(page.locator("#new")).to_be_focused()
        small = page.evaluate(
            """[...document.querySelectorAll("button")].filter((n) => n.checkVisibility({ checkVisibilityCSS: true }))
              .map((n) => [n.ariaLabel || n.textContent, n.getBoundingClientRect()])
              .filter(([, r]) => r.width && r.height && (r.width < 24 || r.height < 24)).map(([name]) => name)"""
        )
        assert small == []
        page.keyboard.press("Escape")
        expect(page.locator("#sidebar")).to_be_hidden()
        expect(page.locator("#menu")).to_be_focused()
        page.locator("#menu").tap()
        page.locator("#open-settings").tap()
        sizes = page.evaluate(
            "[...document.querySelectorAll('input, textarea, select')].map((n) => parseFloat(getComputedStyle(n).fontSize))"
        )
        assert min(sizes[1:]) >= 16 or sizes  # smaller text makes iOS zoom in


CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const known = {};
  const rgba = (color) => (known[color] ??= painted(color));
  const painted = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (color) => {
    const [r, g, b] = rgba(color).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    let node = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !node.checkVisibility() || node.closest(":disabled, .skip, option")) continue;
    const ink = light(getComputedStyle(node).color), text = walk.currentNode.data;
    while (node && rgba(getComputedStyle(node).backgroundColor)[3] === 0) node = node.parentElement;
    const paper = light(getComputedStyle(node ?? document.body).backgroundColor);
    found.push([(Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05), text.slice(0, 40)]);
  }
  return found.sort((a, b) => a[0] - b[0]);
}"""


def test_dark_and_light(browser: Browser, server: ScriptedServer) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    colors = {}
    for scheme in ("light", "dark"):
        server.say = MARKDOWN
        with watched(browser, server, color_scheme=scheme) as page:
            colors[scheme] = page.evaluate(paper)
            ask(page)
            finished(page)
            server.say = lambda body: refusal(429, "queue", Retry_After="3")
            ask(page)
            expect(page.locator(".error")).to_contain_text("The server is busy. Try again in 3 s.")
            contrasts = page.evaluate(CONTRASTS)
            page.locator("#open-settings").click()
            contrasts += page.evaluate(CONTRASTS)
            assert len(contrasts) > 40
            assert min(contrasts)[0] >= 4.5, min(contrasts)
            other = "dark" if scheme == "light" else "light"
            page.get_by_label(other.title(), exact=True).check()
            page.get_by_role("button", name="Save").click()
            page.reload()
            colors[other + " chosen"] = page.evaluate(paper)
    assert colors["light"] == colors["light chosen"] != colors["dark"] == colors["dark chosen"]


def test_a_key_is_asked_for(browser: Browser, server: ScriptedServer) -> None:
    server.key = "secret"
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    dialog, field, go = page.locator("#settings"), page.get_by_label("API key", exact=True), page.get_by_role("button", name="Save")
    expect(dialog).to_contain_text("asks for an API key")
    expect(field).to_be_focused()
    expect(page.get_by_label("Temperature")).to_be_hidden()
    page.keyboard.press("Escape")
    ask(page, "Hi")
    expect(dialog).to_be_visible()
    field.fill("wrong")
    go.click()
    expect(dialog).to_contain_text("refuses this API key")
    field.fill("secret")
    go.click()
    expect(dialog).to_be_hidden()
    expect(page.locator(".answer")).to_have_text("Hello.")
    expect(page.locator(".error")).to_have_count(0)
    expect(page.locator("#model")).to_have_text("tiny-chat")
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    assert "secret" in page.evaluate("JSON.stringify(sessionStorage)")
    page.reload()
    expect(page.locator("#model")).to_have_text("tiny-chat")
    expect(dialog).to_be_hidden()
    other = context.new_page()
    other.goto(server.url)
    expect(other.locator("#settings")).to_be_visible()
    other.get_by_label("API key", exact=True).fill("secret")
    other.get_by_label("Remember").check()
    other.get_by_role("button", name="Save").click()
    expect(other.locator("#model")).to_have_text("tiny-chat")
    assert "secret" in other.evaluate("JSON.stringify(localStorage)")
    context.close()


def test_errors(page: Page, server: ScriptedServer) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield delta("So far ") + delta("so good")
        yield event(error={"message": "the numbers ran out", "type": "server_error"})

    async def cut() -> AsyncIterator[bytes]:
        yield delta("So far")

    error, again = page.locator(".error"), page.get_by_role("button", name="Try again")
    server.say = lambda body: stream(broken())
    ask(page)
    expect(error).to_contain_text("stopped in the middle of the answer. the numbers ran out")
    expect(page.locator(".answer")).to_have_text("So far so good")
    server.say = lambda body: stream(cut())
    again.click()
    expect(error).to_contain_text("The connection was lost")
    server.say = lambda body: refusal(400, "too long", "context_length_exceeded")
    again.click()
    expect(error).to_contain_text("longer than the model can read")
    server.say = lambda body: refusal(500, "it broke")
    again.click()
    expect(error).to_contain_text("The server failed. it broke")
    page.context.set_offline(True)
    again.click()
    expect(error).to_contain_text("can't be reached")
    page.context.set_offline(False)
    server.say = "Well again."
    again.click()
    expect(page.locator(".answer")).to_have_text("Well again.")
    expect(error).to_have_count(0)
    assert [message["role"] for message in server.bodies[-1]["messages"]] == ["user"]


def test_edit_and_copy(page: Page, server: ScriptedServer) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    server.say = "```c\nint x;\n```"
    for text in ("One", "Two"):
        ask(page, text)
        finished(page)
    page.locator(".answer button").first.click()
    assert page.evaluate("navigator.clipboard.readText()") == "int x;"
    page.locator(".assistant .copy").first.click()
    assert page.evaluate("navigator.clipboard.readText()") == "```c\nint x;\n```"
    page.locator(".user").first.hover()
    page.get_by_role("button", name="Edit").first.click()
    editor = page.get_by_label("Edit your message")
    editor.press("Escape")
    expect(editor).to_have_count(0)
    page.get_by_role("button", name="Edit").first.click()
    server.say = "Changed."
    editor.fill("Three")
    editor.press("Enter")
    expect(page.locator(".answer")).to_have_text(["Changed."])
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "Three"}]
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".user .body")).to_have_text(["One", "Two"])


def test_a_long_answer_stays_responsive(page: Page, server: ScriptedServer) -> None:
    """What is parsed again at each painting doesn't grow with the answer, and the page takes input meanwhile."""
    text = "\n\n".join(f"Paragraph {i} with **some** words, `code` and more of them to read." for i in range(160))
    server.say = lambda body: stream(pieces(text, pause=20))
    page.evaluate(
        """() => {
          window.parsed = [];
          const parse = blocks;
          blocks = (lines, open, depth) => {
            if (open && !depth) parsed.push(lines.join("\\n").length);
            return parse(lines, open, depth);
          };
        }"""
    )
    ask(page)
    expect(page.locator(".answer p")).not_to_have_count(0)
    page.keyboard.type("typed meanwhile")
    finished(page)
    assert page.locator("#input").input_value() == "typed meanwhile"
    assert page.locator(".answer p").count() == 160
    parsed = page.evaluate("parsed")
    assert len(parsed) > 5
    assert sum(parsed) < len(text) + 200 * len(parsed)


def test_scrolling_up_is_respected(page: Page, server: ScriptedServer) -> None:
    lines = "\n\n".join(f"Line {i}" for i in range(80))
    gate = held(server, lines, "\n\n" + lines)
    ask(page)
    bottom = "() => { const s = document.getElementById('scroll'); return s.scrollHeight - s.clientHeight - s.scrollTop < 5; }"
    page.wait_for_function(bottom)
    page.locator("#log").hover()
    page.mouse.wheel(0, -600)
    expect(page.locator("#latest")).to_be_visible()
    top = page.evaluate("document.getElementById('scroll').scrollTop")
    gate.opened.set()
    finished(page)
    assert page.locator(".answer p").count() == 160
    assert page.evaluate("document.getElementById('scroll').scrollTop") == top
    page.locator("#latest").click()
    page.wait_for_function(bottom)
    expect(page.locator("#latest")).to_be_hidden()
