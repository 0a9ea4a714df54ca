const views = new WeakMap(); // message -> what shows it
let following = true;        // the newest text is kept in sight, until the user scrolls up

function addMessage(message) {
  const mine = message.role === "user";
  const body = el("div", { className: mine ? "body" : "answer" }, mine ? message.content : "");
  const foot = el("div", { className: "foot" });
  const heading = el("h2", { className: "unseen" }, mine ? "You" : "Answer");
  const node = el("li", { className: "message " + message.role }, heading, body, foot);
  views.set(message, { node, body, foot, answer: mine ? null : new Answer(body) });
  views.set(node, message);
  $("log").append(node);
  $("empty").hidden = true;
  paint(message);
  return node;
}

/** Puts on the screen what a message holds now. */
function paint(message) {
  const view = views.get(message);
  if (!view?.node.isConnected) return;
  if (message.role === "user") view.foot.replaceChildren(iconButton("pencil", "Edit", "edit-message"), iconButton("copy", "Copy", "copy"));
  else paintAnswer(message, view);
  if (following) $("scroll").scrollTop = $("scroll").scrollHeight;
}

const NOTES = { stopped: "Stopped", length: "Cut at the token limit", cut: "Not finished: the page was closed meanwhile" };

function paintAnswer(message, { body, foot, answer }) {
  const { content, state, stats, problem } = message;
  if (state === "writing" && !content) {
    const wait = { className: "wait", role: "img", "aria-label": "Waiting for the first word" };
    return body.replaceChildren(el("div", wait, el("i"), el("i"), el("i")));
  }
  body.querySelector(":scope > .wait")?.remove();
  answer.update(content, state === "writing");
  if (state === "writing") return;
  if (problem) {
    const again = el("button", { type: "button", className: "redo" }, problem.kind === "key" ? "Enter a key" : "Try again");
    foot.replaceChildren(el("div", { className: "error", role: "alert" }, el("p", {}, problem.text), again));
  } else foot.replaceChildren(iconButton("copy", "Copy", "copy"), iconButton("redo", "Regenerate", "redo"));
  const note = [content || problem || state ? NOTES[state] : "An empty answer", stats].filter(Boolean).join(" · ");
  if (note) foot.append(el("span", { className: "note" }, note));
}

/** Paints once a frame at most, and rests four times as long as a painting takes: the page stays responsive. */
function schedulePaint(run) {
  if (run.painting) return;
  run.painting = true;
  setTimeout(() => requestAnimationFrame(() => {
    const start = performance.now();
    run.painting = false;
    if (run.message.state === "writing") paint(run.message);
    run.cost = performance.now() - start;
  }), Math.min(1000, 4 * run.cost));
}

function removeMessages(chat, from) {
  for (const message of chat.messages.splice(from)) views.get(message)?.node.remove();
}

function announce(message) {
  $("announcer").textContent = message.problem ? "" : "Answer: " + views.get(message)?.body.textContent;
}

/** A conversation changed: save it, and show it so. */
function touched(chat) {
  save(chat);
  showChats();
  showState();
}

function open(chat, focus = true) {
  current = chat;
  write("sessionStorage", "current", chat.id);
  $("log").replaceChildren();
  $("empty").hidden = chat.messages.length > 0;
  following = true;
  chat.messages.forEach(addMessage);
  showChats();
  showState();
  drawer(false);
  if (focus) focusInput();
}

function newChat() {
  const id = [...crypto.getRandomValues(new Uint8Array(8))].map((b) => b.toString(16).padStart(2, "0")).join("");
  open({ id, title: "", updated: Date.now(), messages: [] });
}

function showChats() {
  if ($("chats").querySelector("input")) return; // a name is being written
  const focused = document.activeElement?.id;
  chats.sort((a, b) => b.updated - a.updated);
  $("chats").replaceChildren(...chats.map((chat) => {
    const name = titleOf(chat), className = "title" + (runs.has(chat) ? " live" : "");
    const title = el("button", { type: "button", className, title: name }, name);
    if (chat === current) title.setAttribute("aria-current", "true");
    const buttons = [title, iconButton("pencil", "Rename: " + name, "rename"), iconButton("trash", "Delete: " + name, "delete")];
    const item = el("li", { className: chat === current ? "current" : "" }, ...buttons);
    [() => open(chat), () => rename(chat, item), () => remove(chat)].forEach((action, i) => (buttons[i].onclick = action));
    buttons.forEach((button, i) => (button.id = `chat-${chat.id}-${i}`));
    return item;
  }));
  if (focused?.startsWith("chat-")) $(focused)?.focus();
}

function rename(chat, item) {
  const input = el("input", { value: titleOf(chat), maxLength: 80, "aria-label": "Name of the conversation" });
  let over = false;
  const finish = (keep) => {
    if (over) return;
    over = true;
    if (keep && input.value.trim() !== titleOf(chat)) chat.title = input.value.trim();
    input.remove();
    touched(chat);
    if (document.activeElement === document.body) $(`chat-${chat.id}-1`)?.focus();
  };
  input.onkeydown = (event) => {
    if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
    finish(event.key === "Enter");
  };
  input.onblur = () => finish(true);
  item.replaceChildren(input);
  input.select();
}

function remove(chat) {
  stop(chat);
  const at = chats.indexOf(chat), shown = chat === current;
  chats.splice(at, 1);
  write("localStorage", "chat." + chat.id, null);
  if (shown) newChat();
  else showChats();
  ($("chats").querySelectorAll(".title")[Math.min(at, chats.length - 1)] ?? $("new")).focus();
  toast("Conversation deleted.", () => { chats.push(chat); touched(chat); if (shown) open(chat); });
}

function download(list, name) {
  const plain = list.map((chat) => ({ title: titleOf(chat), updated: new Date(chat.updated).toISOString(),
    messages: chat.messages.map(({ role, content }) => ({ role, content })) }));
  const href = URL.createObjectURL(new Blob([JSON.stringify({ conversations: plain }, null, 2)], { type: "application/json" }));
  el("a", { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10000);
}

async function copy(text) {
  try { await navigator.clipboard.writeText(text); } catch { // not there without https
    const area = document.body.appendChild(el("textarea", { value: text, className: "unseen" })), before = document.activeElement;
    area.select();
    document.execCommand("copy");
    area.remove();
    before?.focus();
  }
}

let toastTimer;
function toast(text, undo) {
  clearTimeout(toastTimer);
  const hide = () => ($("toast").hidden = true);
  $("toast").replaceChildren(text);
  if (undo) $("toast").append(el("button", { type: "button", onclick() { hide(); undo(); focusInput(); } }, "Undo"));
  $("toast").hidden = false;
  toastTimer = setTimeout(function again() {
    if ($("toast").matches(":hover, :focus-within")) toastTimer = setTimeout(again, 2000);
    else hide();
  }, 8000);
}

function showModel() {
  $("model").textContent = chosenModel() || "No model";
  $("empty-model").textContent = chosenModel() ? `${chosenModel()} runs on this server.` : "";
}

function showState() {
  const writing = runs.has(current), button = $("send"), title = titleOf(current);
  $("title").textContent = title;
  document.title = current.messages.length ? `${title} · fastllm` : "fastllm";
  button.replaceChildren(icon(writing ? "stop" : "send"));
  button.title = writing ? "Stop" : "Send";
  button.setAttribute("aria-label", writing ? "Stop the answer" : "Send");
  button.disabled = !writing && !$("input").value.trim();
  $("keys").textContent = writing ? "Esc stops the answer" : "Enter sends, Shift+Enter starts a line";
  $("log").classList.toggle("writing", writing);
  $("export").disabled = !current.messages.length;
}

function drawer(show) {
  document.body.classList.toggle("drawer", show);
  $("sidebar").inert = !show && narrow.matches;
  document.querySelector("main").inert = show;
  $("menu").setAttribute("aria-expanded", String(show));
  if (show) $("new").focus();
}

function openSettings(purpose, text = "", then = null) {
  const dialog = $("settings"), form = dialog.querySelector("form");
  openSettings.then = then;
  if (dialog.open) return;
  dialog.dataset.for = purpose;
  $("settings-title").textContent = purpose === "key" ? text : "Settings";
  const names = models.includes(settings.model) || !settings.model ? models : [settings.model, ...models];
  form.model.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  for (const name in DEFAULTS) form[name].value = name === "model" ? chosenModel() : settings[name];
  form.key.value = key;
  form.remember.checked = read("localStorage", "key") !== null;
  dialog.showModal();
  (purpose === "key" ? form.key : form.model).focus();
}

function saveSettings(form) {
  for (const name in DEFAULTS) settings[name] = form[name].value;
  key = form.key.value.trim();
  document.documentElement.dataset.theme = settings.theme;
  write("localStorage", "settings", settings);
  write("sessionStorage", "key", key || null);
  write("localStorage", "key", key && form.remember.checked ? key : null);
  $("settings").close();
  showModel();
  greet(openSettings.then);
}

function send() {
  const text = $("input").value.trim();
  if (!text || runs.has(current)) return;
  $("input").value = "";
  fit();
  if (!chats.includes(current)) chats.push(current);
  current.messages.push({ role: "user", content: text });
  following = true;
  addMessage(current.messages.at(-1));
  answer(current);
}

function fit() { // for browsers without field-sizing
  if (CSS.supports("field-sizing", "content")) return;
  $("input").style.height = "auto";
  $("input").style.height = $("input").scrollHeight + "px";
}

const sends = (event) => // 229: an Enter that ends a composition, in Safari
  event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;

function edit(chat, message) {
  const { node, body, foot } = views.get(message);
  const area = el("textarea", { value: message.content, "aria-label": "Edit your message" });
  const cancel = el("button", { type: "button", className: "quiet" }, "Cancel");
  const row = el("div", { className: "row" }, cancel, el("button", { className: "main" }, "Send"));
  const form = el("form", { className: "edit" }, area, row);
  const close = () => { form.replaceWith(body, foot); foot.querySelector(".edit-message").focus(); };
  const submit = () => {
    const text = area.value.trim(), before = [...chat.messages], at = before.indexOf(message);
    if (!text || runs.has(chat)) return;
    removeMessages(chat, at);
    chat.messages.push({ role: "user", content: text });
    addMessage(chat.messages.at(-1));
    focusInput();
    following = true;
    answer(chat);
    if (before.length === at + 2) return;
    toast("What came after the message was replaced.", () => { stop(chat); chat.messages = before; touched(chat); open(chat); });
  };
  cancel.onclick = close;
  form.onsubmit = (event) => { event.preventDefault(); submit(); };
  area.onkeydown = (event) => {
    if (event.key === "Escape" && !event.isComposing) { event.stopPropagation(); close(); }
    if (sends(event)) { event.preventDefault(); submit(); }
  };
  body.remove();
  foot.replaceWith(form);
  area.focus();
}

const narrow = matchMedia("(max-width: 760px)");

const focusInput = () => matchMedia("(hover: none)").matches || $("input").focus(); // there it would call up the keyboard

addEventListener("DOMContentLoaded", () => {
  const scroll = $("scroll");
  let top = 0;
  scroll.addEventListener("scroll", () => {
    const left = scroll.scrollHeight - scroll.clientHeight - scroll.scrollTop;
    if (left < 32) following = true;
    else if (scroll.scrollTop < top) following = false;
    top = scroll.scrollTop;
    $("latest").hidden = left < 240;
  }, { passive: true });
  new ResizeObserver(() => { if (following) scroll.scrollTop = scroll.scrollHeight; }).observe(scroll);
  $("latest").onclick = () => { following = true; scroll.scrollTop = scroll.scrollHeight; $("input").focus(); };

  $("log").addEventListener("click", (event) => {
    const button = event.target.closest("button"), message = views.get(button?.closest(".message"));
    if (!message || button.closest("form")) return;
    if (button.dataset.do === "copy-code") {
      copy(button.closest(".code").querySelector("code").textContent);
      button.textContent = $("announcer").textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    } else if (button.classList.contains("copy")) copy(message.content).then(() => toast("Copied."));
    else if (button.classList.contains("edit-message") && !runs.has(current)) edit(current, message);
    else if (button.classList.contains("redo")) {
      if (message.problem?.kind === "key") openSettings("key", message.problem.text, () => retry(current));
      else { following = true; retry(current); focusInput(); }
    }
  });

  $("composer").onsubmit = (event) => { event.preventDefault(); if (runs.has(current)) stop(current); else send(); };
  $("input").oninput = () => { fit(); showState(); };
  $("input").onkeydown = (event) => { if (sends(event)) { event.preventDefault(); send(); } };
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing || $("settings").open) return;
    if (document.body.classList.contains("drawer")) { drawer(false); $("menu").focus(); }
    else stop(current);
  });

  $("new").onclick = newChat;
  $("menu").onclick = () => drawer(true);
  $("close-menu").onclick = $("shade").onclick = () => { drawer(false); $("menu").focus(); };
  narrow.onchange = () => drawer(false);
  $("export").onclick = () => download([current], "conversation.json");
  $("export-all").onclick = () => download(chats, "conversations.json");
  $("open-settings").onclick = $("model").onclick = () => openSettings("all");
  $("cancel").onclick = () => $("settings").close();
  $("settings").querySelector("form").onsubmit = (event) => { event.preventDefault(); saveSettings(event.target); };

  addEventListener("pagehide", () => { leaving = true; runs.forEach((_, chat) => save(chat)); });
  addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });
  addEventListener("storage", ({ key: name }) => { // another tab wrote
    if (!name?.startsWith(PREFIX + "chat.")) return;
    const id = name.slice((PREFIX + "chat.").length), old = chats.find((chat) => chat.id === id);
    const fresh = restored(id, read("localStorage", "chat." + id));
    if (runs.has(old)) return;
    chats = chats.filter((chat) => chat !== old).concat(fresh ?? []);
    if (!fresh || id !== current.id) return showChats();
    const before = following ? null : scroll.scrollTop;
    open(fresh, false);
    if (before !== null) { following = false; scroll.scrollTop = before; }
  });

  load();
  const last = chats.find((chat) => chat.id === read("sessionStorage", "current"));
  if (last) open(last);
  else newChat();
  showModel();
  greet();
});
