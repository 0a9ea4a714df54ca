"use strict";
const PREFIX = "fastllm.";
const $ = (id) => document.getElementById(id);

function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = svg.appendChild(document.createElementNS(svg.namespaceURI, "use"));
  use.setAttribute("href", "#i-" + name);
  return svg;
}

const iconButton = (name, label, className = "") =>
  el("button", { type: "button", className: "only-icon " + className, title: label, "aria-label": label }, icon(name));

/* ---- What the browser keeps. Access may be refused, full or damaged: the page then works from memory. ---- */

function read(kind, name) {
  try { return JSON.parse(window[kind].getItem(PREFIX + name)); } catch { return null; }
}

function write(kind, name, value) {
  try {
    if (value === null) window[kind].removeItem(PREFIX + name);
    else window[kind].setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch { return false; }
}

const DEFAULTS = { model: "", system: "", temperature: "", top_p: "", max_tokens: "", seed: "", theme: "auto" };
const saved = read("localStorage", "settings");
const settings = { ...DEFAULTS };
for (const name in DEFAULTS) if (typeof saved?.[name] === "string") settings[name] = saved[name];
let key = String(read("sessionStorage", "key") ?? read("localStorage", "key") ?? "");
document.documentElement.dataset.theme = settings.theme; // before anything is painted

let chats = [];           // newest first
let current = null;       // the conversation on the screen
let models = [];
let leaving = false;      // the page is being closed: its requests end, which is no error
const runs = new Map();   // conversation -> the answer that is being written

const record = (value) => (value && typeof value === "object" ? value : {});

/** A conversation out of what was stored, or null: only what has the right form is believed. */
function restored(id, value) {
  const from = record(value);
  if (!Array.isArray(from.messages)) return null;
  const messages = from.messages
    .filter((m) => ["user", "assistant"].includes(m?.role) && typeof m.content === "string")
    .map(({ role, content, state, stats, problem }) => ({
      role, content, state: state === "writing" ? "cut" : String(state ?? ""), stats: String(stats ?? ""),
      problem: record(problem).text ? { text: String(problem.text), kind: String(problem.kind) } : null,
    }));
  return { id, title: String(from.title ?? ""), updated: Number(from.updated) || 0, messages };
}

function load() {
  const found = [];
  let damaged = 0;
  try {
    for (const name of Object.keys(localStorage).filter((n) => n.startsWith(PREFIX + "chat."))) {
      const id = name.slice((PREFIX + "chat.").length);
      const chat = restored(id, read("localStorage", "chat." + id));
      if (chat) found.push(chat);
      else { // kept aside, so that it is said once
        damaged++;
        localStorage.setItem(PREFIX + "damaged." + id, localStorage.getItem(name));
        localStorage.removeItem(name);
      }
    }
  } catch { /* no storage here */ }
  if (damaged) toast(`${damaged} saved conversation${damaged > 1 ? "s are" : " is"} damaged and left out.`);
  chats = found.sort((a, b) => b.updated - a.updated);
}

function save(chat) {
  if (!chats.includes(chat) || !chat.messages.length) return;
  if (write("localStorage", "chat." + chat.id, chat)) save.failed = false;
  else if (!save.failed) {
    save.failed = true;
    toast("The browser's storage is full or switched off: this conversation stays only until the page closes.");
  }
}

const titleOf = (chat) => chat.title || chat.messages[0]?.content.trim().split("\n")[0].slice(0, 200) || "New conversation";

/* ---- Markdown to DOM nodes. Text from a model only ever becomes text nodes; HTML in it shows as it was written. ---- */
