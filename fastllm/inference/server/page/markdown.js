const FENCE = /^( {0,3})(`{3,}(?=[^`]*$)|~{3,})\s*(\S*)/;
const HEADING = /^ {0,3}(#{1,6})(?= |$)/;
const RULE = /^ {0,3}(?:(?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;
const DELIMITERS = /^ *\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;
const HELD = /(^|\n)(?:[-*_`~#>|=+: \t]+|[ \t]*\d{1,9}[.)]?)$/; // a last line of marks alone: what follows decides what it is
const DEEPEST = 12;

const startsBlock = (line) =>
  FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || /^ *(?:[-*+]|1[.)]) +\S/.test(line);

const cells = (line) =>
  line.trim().replace(/^\|/, "").replace(/\|$/, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));

function startsTable(lines, at, open) {
  if (!lines[at].includes("|")) return false;
  if (at + 1 === lines.length) return open && lines[at].trimStart()[0] === "|"; // its second line is still to come
  return lines[at + 1].includes("-") && DELIMITERS.test(lines[at + 1]) && cells(lines[at]).length === cells(lines[at + 1]).length;
}

/** The blocks of `lines`: [node, first line] each. `open`: more text is to come after the last line. */
function blocks(lines, open, depth = 0) {
  const found = [];
  const inner = (parent, body, more) => parent.append(...blocks(body, more, depth + 1).map(([node]) => node));
  let i = 0;
  while (i < lines.length) {
    const start = i, line = lines[i];
    let node, match;
    if (!line.trim()) { i++; continue; }
    if (depth > DEEPEST) {
      node = el("p", {}, lines.slice(i).join("\n"));
      i = lines.length;
    } else if ((match = FENCE.exec(line))) {
      const [, indent, marks, language] = match, body = [];
      const closes = (text) => text.length >= marks.length && text === marks[0].repeat(text.length);
      while (++i < lines.length && !closes(lines[i].trim())) body.push(lines[i].replace(new RegExp(`^ {0,${indent.length}}`), ""));
      i++;
      node = codeBlock(body.join("\n"), language);
    } else if ((match = HEADING.exec(line))) {
      const title = line.slice(match[0].length).trim().replace(/(^| )#+$/, "");
      node = inline(el("h" + Math.min(match[1].length + 2, 6)), title, open && start + 1 === lines.length);
      i++;
    } else if (RULE.test(line)) {
      node = el("hr");
      i++;
    } else if (QUOTE.test(line)) {
      const body = [], belongs = (text) => QUOTE.test(text) || (text.trim() && !startsBlock(text));
      while (i < lines.length && belongs(lines[i])) body.push(lines[i++].replace(QUOTE, ""));
      inner((node = el("blockquote")), body, open && i === lines.length);
    } else if ((match = ITEM.exec(line))) {
      [node, i] = list(lines, i, match, open, inner);
    } else if (/^ {4}/.test(line)) {
      const body = [];
      while (i < lines.length && (/^ {4}/.test(lines[i]) || !lines[i].trim())) body.push(lines[i++].slice(4));
      node = codeBlock(body.join("\n").trimEnd(), "");
    } else if (startsTable(lines, i, open)) {
      [node, i] = table(lines, i, open);
    } else {
      let tag = "p";
      const body = [line.trim()];
      for (i++; i < lines.length && lines[i].trim(); i++) {
        if (/^ {0,3}(=+|-+) *$/.test(lines[i])) { tag = lines[i++].includes("=") ? "h3" : "h4"; break; }
        if (startsBlock(lines[i]) || startsTable(lines, i, open)) break;
        body.push(lines[i].trim());
      }
      node = inline(el(tag), body.join("\n"), open && i === lines.length);
    }
    found.push([node, start]);
  }
  return found;
}

function codeBlock(text, language) {
  const label = language.replace(/[^\w+#.-]/g, "").slice(0, 30);
  const copy = el("button", { type: "button", "data-do": "copy-code" }, "Copy");
  return el("div", { className: "code" }, el("div", { className: "code-head" }, el("span", {}, label || "text"), copy),
    el("pre", { tabIndex: 0, role: "group", "aria-label": (label || "text") + " code" }, el("code", {}, text)));
}

function list(lines, i, first, open, inner) {
  const kind = first[2].slice(-1), ordered = /\d/.test(first[2]);
  const node = el(ordered ? "ol" : "ul");
  if (ordered && parseInt(first[2]) !== 1) node.start = parseInt(first[2]);
  for (let match; i < lines.length && (match = ITEM.exec(lines[i])) && match[2].slice(-1) === kind && !RULE.test(lines[i]); ) {
    const body = [lines[i].slice(match[0].length)];
    const inside = Math.min(match[0].length, match[1].length + 2); // models indent by two, whatever the mark's width
    for (i++; i < lines.length; i++) {
      const indent = lines[i].search(/\S/);
      if (indent < 0) body.push("");
      else if (indent >= inside) body.push(lines[i].slice(Math.min(indent, match[0].length)));
      else if (body.at(-1) && !startsBlock(lines[i]) && !ITEM.test(lines[i])) body.push(lines[i]);
      else break;
    }
    inner(node.appendChild(el("li")), body, open && i === lines.length);
  }
  return [node, i];
}

function table(lines, i, open) {
  const sides = cells(lines[i + 1] ?? "").map((c) => (c.endsWith(":") ? (c.startsWith(":") ? "center" : "right") : ""));
  const head = cells(lines[i]);
  const cell = (tag, text, k) => inline(el(tag, { className: sides[k] ?? "" }), text, false);
  const row = (tag, texts) => el("tr", {}, ...head.map((_, k) => cell(tag, texts[k] ?? "", k)));
  const body = el("tbody");
  const node = el("table", {}, el("thead", {}, row("th", head)), body);
  for (i += 2; i < lines.length && lines[i].trim() && !startsBlock(lines[i]); i++) body.append(row("td", cells(lines[i])));
  return [el("div", { className: "table", tabIndex: 0, role: "group", "aria-label": "Table" }, node), Math.min(i, lines.length)];
}

const INLINE = new RegExp([
  /\\[\\`*_~<>|#+.!-]/, /\\[[\](){}]/, /`+/, /\*+/, /_+/, /~~/, /!?\[/, /\n/, /<br ?\/?>/,
  /<(?:https?:\/\/|mailto:)[^\s<>]*>/, /https?:\/\/[^\s<>]+/,
].map((token) => token.source).join("|"), "gi");
const LABEL = /!?\[((?:[^[\]\\\n]|\\.|\[[^[\]\n]*\])*)\]/, TARGET = /<?([^\s<>()]*(?:\([^\s()]*\)[^\s<>()]*)*)>?/;
const LINK = new RegExp(`${LABEL.source}\\(\\s*${TARGET.source}(?:\\s+(?:"[^"]*"|'[^']*'))?\\s*\\)`, "y");
const HALF_LINK = /!?\[([^[\]\n]*)\]\([^()\s]*$/y;

function address(text) {
  try {
    const url = new URL(text);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch { return null; }
}

const anchor = (href) => el("a", { href, title: href, target: "_blank", rel: "noopener noreferrer nofollow" });

/** Appends `text` to `parent`, with elements for its marks. `open`: what isn't closed yet is taken as closed at the end. */
function inline(parent, text, open, links = true) {
  const scan = new RegExp(INLINE), marks = [], missing = new Set();
  const add = (...nodes) => parent.append(...nodes.filter((n) => n !== ""));
  let at = 0;
  for (let match; (match = scan.exec(text)); at = scan.lastIndex) {
    const [token] = match, after = scan.lastIndex;
    add(text.slice(at, match.index));
    if (token === "\n" || /^<br/i.test(token)) add(el("br"));
    else if (token[0] === "\\") add(/[[\](){}]/.test(token) ? token : token[1]); // \( and \[ are more often TeX than escapes
    else if (token[0] === "`") {
      const ticks = /`+/g;
      ticks.lastIndex = after;
      let close = null;
      if (!missing.has(token.length)) while ((close = ticks.exec(text)) && close[0].length !== token.length);
      if (!close) missing.add(token.length);
      if (close || (open && token.length < 3)) {
        const code = text.slice(after, close?.index).replaceAll("\n", " ");
        add(el("code", {}, /^ .*\S.* $/.test(code) ? code.slice(1, -1) : code));
        scan.lastIndex = close ? ticks.lastIndex : text.length;
      } else add(token);
    } else if (token.endsWith("[")) {
      LINK.lastIndex = HALF_LINK.lastIndex = match.index;
      const link = links && LINK.exec(text), half = open && links && HALF_LINK.exec(text), href = link && address(link[2]);
      if (href) {
        add(inline(anchor(href), link[1] || href, false, false));
        scan.lastIndex = LINK.lastIndex;
      } else if (half) {
        inline(parent, half[1], false, false);
        scan.lastIndex = text.length;
      } else add(token);
    } else if (/^[<h]/i.test(token)) {
      let url = token.replace(/^<|>$/g, ""), end = url.length;
      if (token[0] !== "<") while (".,;:!?'\"*_~]".includes(url[end - 1]) || (url[end - 1] === ")" && !url.includes("("))) end--;
      url = url.slice(0, end);
      const href = links && address(url);
      if (href) {
        add(Object.assign(anchor(href), { textContent: url.replace(/^mailto:/i, "") }));
        scan.lastIndex = token[0] === "<" ? after : match.index + end;
      } else add(token);
    } else emphasis(parent, marks, token, text[match.index - 1] ?? " ", text[after] ?? " ");
  }
  add(text.slice(at));
  if (open) for (const mark of marks.reverse()) if (mark.count === 2 && mark.sign === "*") wrap(mark, null, 2);
  parent.normalize();
  return parent;
}

function emphasis(parent, marks, token, before, after) {
  const sign = token[0], word = /[\p{L}\p{N}]/u, run = { sign, count: token.length, node: document.createTextNode(token) };
  parent.append(run.node);
  if (token.length > 3) return;
  run.opens = /\S/.test(after) && !(sign === "_" && word.test(before));
  run.closes = /\S/.test(before) && !(sign === "_" && word.test(after));
  for (let k = marks.length - 1; run.closes && run.count && k >= 0; k--) {
    const mark = marks[k], sum = mark.count + run.count;
    if (mark.sign !== sign || ((mark.closes || run.opens) && sum % 3 === 0 && run.count % 3)) continue;
    while (mark.count && run.count) wrap(mark, run, sign === "~" ? 2 : Math.min(mark.count, run.count, 2));
    marks.length = k + (mark.count ? 1 : 0);
  }
  if (run.count && run.opens) marks.push(run);
  if (marks.length > 24) marks.shift(); // so nothing nests deeper
}

/** Puts what stands between two runs of marks (or after the one) into an element; takes `size` marks from each. */
function wrap(mark, run, size) {
  const node = el(mark.sign === "~" ? "del" : size === 2 ? "strong" : "em");
  while (mark.node.nextSibling && mark.node.nextSibling !== run?.node) node.append(mark.node.nextSibling);
  mark.node.after(node);
  for (const side of run ? [mark, run] : [mark]) {
    side.count -= size;
    side.node.data = side.node.data.slice(size);
  }
}

/** Makes `old` equal to `fresh` and leaves alone what is equal already: no flicker, and a selection lives on. */
function patch(old, fresh) {
  if (old.nodeType === Node.TEXT_NODE && fresh.nodeType === Node.TEXT_NODE) {
    if (fresh.data.startsWith(old.data)) old.appendData(fresh.data.slice(old.length));
    else old.data = fresh.data;
  } else if (old.cloneNode(false).isEqualNode(fresh.cloneNode(false))) patchChildren(old, [...fresh.childNodes], 0);
  else old.replaceWith(fresh);
}

function patchChildren(parent, nodes, from) {
  nodes.forEach((node, i) => (parent.childNodes[from + i] ? patch(parent.childNodes[from + i], node) : parent.append(node)));
  while (parent.childNodes.length > from + nodes.length) parent.lastChild.remove();
}

/** An answer on the screen. While it is written, only its last block is parsed again. */
class Answer {
  constructor(root) { Object.assign(this, { root, length: 0, nodes: 0 }); } // of what can't change any more

  update(text, open) {
    if (!open) this.length = this.nodes = 0;
    const rest = text.slice(this.length), lines = (open ? rest.replace(HELD, "") : rest).split("\n");
    const found = blocks(lines.map((line) => line.replace(/^[ \t]+/, (s) => s.replaceAll("\t", "    ")).replace(/\r$/, "")), open);
    patchChildren(this.root, found.map(([node]) => node), this.nodes);
    if (!open || found.length < 2) return;
    this.length += lines.slice(0, found.at(-1)[1]).reduce((sum, line) => sum + line.length + 1, 0);
    this.nodes += found.length - 1;
  }
}

/* ---- The server ---- */
