"""Chatting on the page: conversations, keys, phones, colours, errors."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

from playwright.sync_api import Browser, Page, expect

from ..conftest import Running
from .driving import MARKDOWN, ask, finished, held, watched
from .scripted_server import ScriptedServer, delta, event, pieces, refusal, stream


def test_stop(page: Page, scripted: ScriptedServer) -> None:
    gate = held(scripted, "The first words")
    ask(page)
    expect(page.locator(".answer")).to_have_text("The first words")
    page.locator("#send").click()
    finished(page)
    expect(page.locator(".assistant .note")).to_contain_text("Stopped")
    expect(page.locator(".error")).to_have_count(0)
    scripted.until(lambda: scripted.closed_early == 1)
    gate.opened.set()
    scripted.say = "Another answer."
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".answer")).to_have_text("Another answer.")
    assert [message["role"] for message in scripted.bodies[-1]["messages"]] == ["user"]


def test_conversations_survive_a_reload(page: Page, scripted: ScriptedServer) -> None:
    ask(page, "First question")
    finished(page)
    page.locator("#new").click()
    gate = held(scripted, "Half an answer")
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


def test_two_tabs(page: Page, scripted: ScriptedServer) -> None:
    other = page.context.new_page()
    other.goto(scripted.url)
    ask(page, "From the first tab")
    finished(page)
    expect(other.locator("#chats .title")).to_have_text(["From the first tab"])
    other.locator("#chats .title").click()
    ask(other, "From the second")
    finished(other)
    expect(page.locator(".answer")).to_have_count(2)


def test_damaged_full_and_missing_storage(browser: Browser, page: Page, scripted: ScriptedServer) -> None:
    half = {"messages": [{"role": "system"}, 7, {"role": "user", "content": "kept"}], "title": {}, "updated": "x"}
    stored = {"a": "{", "b": "null", "c": "[]", "d": '{"messages": 3}', "e": json.dumps(half)}
    for name, text in stored.items():
        page.evaluate("([name, text]) => localStorage.setItem('fastllm.chat.' + name, text)", [name, text])
    page.evaluate("localStorage.setItem('fastllm.settings', '{\"theme\": 3}')")
    page.reload()
    expect(page.locator("#toast")).to_contain_text("4 saved conversations are damaged")
    expect(page.locator("#chats .title")).to_have_count(1)
    page.evaluate("for (let n = 1 << 22; n; n >>= 1) try { localStorage.setItem('x' + n, 'x'.repeat(n)); } catch {}")
    ask(page, "No room " + "for this " * 50)
    finished(page)
    expect(page.locator("#toast")).to_contain_text("storage is full")
    expect(page.locator(".answer")).to_have_text("Hello.")
    with watched(browser, scripted) as other:
        other.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new Error('off'); } })")
        other.reload()
        ask(other)
        expect(other.locator(".answer")).to_have_text("Hello.")


def test_by_keyboard_alone(page: Page, scripted: ScriptedServer) -> None:
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
    assert scripted.bodies == []
    gate = held(scripted, "Some words")
    keys.press("Enter")
    expect(page.locator(".answer")).to_have_text("Some words")
    assert scripted.bodies[0]["messages"] == [{"role": "user", "content": "One\ntwo"}]
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
              const pastTheLast = node === document.body;
              return [node.getAttribute("aria-label") || node.textContent, shown || pastTheLast];
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
    sent = scripted.bodies[-1]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    wanted = {"model": "other-chat", "temperature": 0.5, "top_p": 0.9, "max_tokens": 12, "seed": 7}
    assert {name: sent[name] for name in wanted} == wanted


def test_on_a_phone(browser: Browser, scripted: ScriptedServer) -> None:
    code, row = "```\n" + "wide " * 60 + "\n```", "|" + "wide word |" * 30
    scripted.say = "\n\n".join([MARKDOWN, code, row + "\n|" + "--|" * 30, "x" * 400])
    phone = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    with watched(browser, scripted, **phone) as page:
        page.locator("#input").fill("y" * 300)
        page.locator("#send").tap()
        finished(page)
        for node in ("document.documentElement", "document.getElementById('scroll')"):
            assert page.evaluate(f"{node}.scrollWidth <= {node}.clientWidth"), node
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
        small = page.evaluate(
            """[...document.querySelectorAll("input, textarea, select")].filter((n) => !/check|radio/.test(n.type))
              .filter((n) => parseFloat(getComputedStyle(n).fontSize) < 16).map((n) => n.name || n.id)"""
        )
        assert small == []  # iOS zooms in on the focus of smaller text


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


def test_dark_and_light(browser: Browser, scripted: ScriptedServer) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    colors = {}
    for scheme in ("light", "dark"):
        scripted.say = MARKDOWN
        with watched(browser, scripted, color_scheme=scheme) as page:
            colors[scheme] = page.evaluate(paper)
            ask(page)
            finished(page)
            scripted.say = lambda body: refusal(429, "queue", Retry_After="3")
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


def test_a_key_is_asked_for(browser: Browser, scripted: ScriptedServer) -> None:
    scripted.key = "secret"
    context = browser.new_context()
    page = context.new_page()
    page.goto(scripted.url)
    dialog, field, go = (
        page.locator("#settings"),
        page.get_by_label("API key", exact=True),
        page.get_by_role("button", name="Save"),
    )
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
    other.goto(scripted.url)
    expect(other.locator("#settings")).to_be_visible()
    other.get_by_label("API key", exact=True).fill("secret")
    other.get_by_label("Remember").check()
    other.get_by_role("button", name="Save").click()
    expect(other.locator("#model")).to_have_text("tiny-chat")
    assert "secret" in other.evaluate("JSON.stringify(localStorage)")
    context.close()


def test_errors(page: Page, scripted: ScriptedServer) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield delta("So far ") + delta("so good")
        yield event(error={"message": "the numbers ran out", "type": "server_error"})

    async def cut() -> AsyncIterator[bytes]:
        yield delta("So far")

    error, again = page.locator(".error"), page.get_by_role("button", name="Try again")
    scripted.say = lambda body: stream(broken())
    ask(page)
    expect(error).to_contain_text("stopped in the middle of the answer. the numbers ran out")
    expect(page.locator(".answer")).to_have_text("So far so good")
    scripted.say = lambda body: stream(cut())
    again.click()
    expect(error).to_contain_text("The connection was lost")
    scripted.say = lambda body: refusal(400, "too long", "context_length_exceeded")
    again.click()
    expect(error).to_contain_text("longer than the model can read")
    scripted.say = lambda body: refusal(500, "it broke")
    again.click()
    expect(error).to_contain_text("The server failed. it broke")
    scripted.models_named = ["new-chat"]  # the server was started again
    scripted.say = lambda body: refusal(404, "the model tiny-chat is not here", "model_not_found")
    again.click()
    expect(error).to_contain_text("no such model. the model tiny-chat is not here")
    expect(page.locator("#model")).to_have_text("new-chat")
    scripted.say = ""
    again.click()
    expect(page.locator(".note")).to_contain_text("An empty answer")
    scripted.say = lambda body: refusal(500, "it broke")
    page.get_by_role("button", name="Regenerate").click()
    expect(error).to_contain_text("it broke")
    page.context.set_offline(True)
    again.click()
    expect(error).to_contain_text("can't be reached")
    page.context.set_offline(False)
    scripted.say = "Well again."
    again.click()
    expect(page.locator(".answer")).to_have_text("Well again.")
    expect(error).to_have_count(0)
    assert [message["role"] for message in scripted.bodies[-1]["messages"]] == ["user"]


def test_edit_and_copy(page: Page, scripted: ScriptedServer) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    scripted.say = "```c\nint x;\n```"
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
    scripted.say = "Changed."
    editor.fill("Three")
    editor.press("Enter")
    expect(page.locator(".answer")).to_have_text(["Changed."])
    assert scripted.bodies[-1]["messages"] == [{"role": "user", "content": "Three"}]
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".user .body")).to_have_text(["One", "Two"])


def test_a_long_answer_stays_responsive(page: Page, scripted: ScriptedServer) -> None:
    """What is parsed again at each painting doesn't grow with the answer, and the page takes input meanwhile."""
    text = "\n\n".join(f"Paragraph {i} with **some** words, `code` and more of them to read." for i in range(160))
    scripted.say = lambda body: stream(pieces(text, pause=20))
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


def test_scrolling_up_is_respected(page: Page, scripted: ScriptedServer) -> None:
    lines = "\n\n".join(f"Line {i}" for i in range(80))
    gate = held(scripted, lines, "\n\n" + lines)
    ask(page)
    bottom = "(s => s.scrollHeight - s.clientHeight - s.scrollTop < 5)(document.getElementById('scroll'))"
    expect(page.locator(".answer p")).to_have_count(80)
    page.wait_for_function(bottom)
    page.locator("#log").hover()
    page.mouse.wheel(0, -600)
    expect(page.locator("#latest")).to_be_visible()
    top = page.evaluate(  # when the wheel's motion has ended
        """new Promise((done) => {
            let last = -1;
            const look = () => {
                const now = document.getElementById("scroll").scrollTop;
                if (now === last) return done(now);
                last = now;
                setTimeout(look, 100);
            };
            look();
        })"""
    )
    gate.opened.set()
    finished(page)
    assert page.locator(".answer p").count() == 160
    assert page.evaluate("document.getElementById('scroll').scrollTop") == top
    page.locator("#latest").click()
    page.wait_for_function(bottom)
    expect(page.locator("#latest")).to_be_hidden()


def test_with_the_server_itself(browser: Browser, server: Running) -> None:
    with watched(browser, server) as page:
        expect(page.locator("#model")).to_have_text("tiny")
        page.locator("#open-settings").click()
        page.get_by_label("Max tokens").fill("600")  # in less than 10 ms the page gives no rate
        page.get_by_label("Temperature").fill("0")
        page.get_by_role("button", name="Save").click()
        for count in (1, 2):
            ask(page, "the quick brown fox")
            finished(page)
            expect(page.locator(".assistant .note")).to_have_count(count)
        expect(page.locator(".assistant .note").last).to_contain_text("tokens/s")
        assert page.locator(".answer").first.inner_text()
        server.wait_for("fastllm_requests_running", 0)
        ask(page, "refuse this")
        expect(page.locator(".error")).to_contain_text("the template refuses this")
