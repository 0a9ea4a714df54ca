"""What the page makes of an answer."""

from __future__ import annotations

import json

from playwright.sync_api import Page, expect

from .driving import MARKDOWN, ask, finished, held
from .scripted_server import ScriptedServer, refusal


def test_an_answer_streams_and_renders(page: Page, scripted: ScriptedServer) -> None:
    head, tail = MARKDOWN[:60], MARKDOWN[60:]
    gate = held(scripted, head, tail)
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
    assert scripted.bodies == [
        {
            "model": "tiny-chat",
            "messages": [{"role": "user", "content": "Show me.\nAll of it"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    ask(page, "More")
    finished(page)
    sent = [(message["role"], message["content"]) for message in scripted.bodies[1]["messages"]]
    assert sent == [("user", "Show me.\nAll of it"), ("assistant", MARKDOWN), ("user", "More")]


TABLE = "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>c</td><td></td></tr></tbody></table>"
LINK = '<a href="https://a.example/b?c=d">https://a.example/b?c=d</a>'
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
    ("see https://a.example/b?c=d). End", f"<p>see {LINK}). End</p>"),
    ("<mailto:e@f.example>", '<p><a href="mailto:e@f.example">e@f.example</a></p>'),
    ("![picture](https://a.example/b.png)", '<p><a href="https://a.example/b.png">picture</a></p>'),
    ("[x](/local) [y](javascript:z)", "<p>[x](/local) [y](javascript:z)</p>"),
    ("a | b\n--|--\nc", TABLE),
    ("~~~\n```\n~~~\nend", "<code>```</code><p>end</p>"),
]

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
        [mark * 2000 for mark in marks]
        + ["\n".join("  " * n + "- a" for n in range(500)), "*a " * 2000 + "a* " * 2000],
    )
    assert max(depths) < 60


def test_events_wherever_the_bytes_are_cut(page: Page) -> None:
    lines = [
        ": a comment", 'data: {"a":"é🙂"}', "", "event: x", "id: 7", "data:one", "data: two", "", "",
        "data: [DONE]", "", "data: cut",
    ]  # fmt: skip
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
"""  # noqa: E501 (a line of Markdown is one line)


def test_nothing_from_a_model_is_executed_or_fetched(page: Page, scripted: ScriptedServer) -> None:
    scripted.models_named = ["<img src=x onerror=alert(30)>"]
    page.reload()
    scripted.say = HOSTILE
    ask(page, "<img src=x onerror=alert(31)>")
    finished(page)
    scripted.say = lambda body: refusal(400, "<img src=x onerror=alert(32)><script>alert(33)</script>")
    ask(page, HOSTILE)
    finished(page)
    expect(page.locator(".error")).to_contain_text("<script>alert(33)</script>")
    page.reload()  # what was stored is as foreign
    expect(page.locator(".error")).to_contain_text("<script>alert(33)</script>")
    elements = page.evaluate("[...document.querySelectorAll('main *, #chats *')].map((node) => node.localName)")
    known = """a blockquote br button code div form h1 h2 h3 header i li ol p pre span strong svg
        table tbody td textarea th thead tr ul use"""
    assert set(elements) <= set(known.split())
    names = page.evaluate(
        "[...document.querySelectorAll('main *')].flatMap((node) => [...node.attributes].map((a) => a.name))"
    )
    assert not [name for name in names if name.startswith("on") or name in ("src", "style", "srcdoc", "srcset")]
    links = page.evaluate("[...document.querySelectorAll('main a')].map((node) => node.href)")
    assert links and all(link.startswith("https://evil.example/") for link in links)
    assert "<script>alert(18)</script>" in page.locator(".answer pre").first.inner_text()
    page.locator(".answer").first.hover()
    page.wait_for_timeout(200)  # for what would come late
