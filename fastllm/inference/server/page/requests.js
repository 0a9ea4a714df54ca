class Problem extends Error {
  constructor(text, kind = "") { super(text); this.kind = kind; }
}

const UNREACHABLE = "The server can't be reached. Is it running, and is the network up?";
const LOST = "The connection was lost in the middle of the answer.";
const TOO_LONG = "This conversation is longer than the model can read. Start a new one, or edit an earlier message.";

async function refused(response) {
  const error = record(record(await response.json().catch(() => null)).error), { status } = response;
  const said = typeof error.message === "string" ? error.message.slice(0, 600) : `Status ${status}.`;
  const wait = parseInt(response.headers.get("Retry-After"));
  if (status === 401) return new Problem(`The server ${key ? "refuses this" : "asks for an"} API key.`, "key");
  if (status === 404) return new Problem(`The server has no such model. ${said}`, "model");
  if (status === 413 || error.code === "context_length_exceeded") return new Problem(TOO_LONG);
  if (status === 429 || status === 503) return new Problem(`The server is busy. Try again in ${wait > 0 ? wait + " s" : "a moment"}.`);
  return new Problem((status >= 500 ? "The server failed. " : "The server refused the request. ") + said);
}

async function call(path, { body, signal } = {}) {
  const headers = { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: "Bearer " + key }) };
  const options = { method: body ? "POST" : "GET", body: body && JSON.stringify(body), headers, signal, cache: "no-store" };
  const response = await fetch(path, options).catch((error) => { throw signal?.aborted ? error : new Problem(UNREACHABLE); });
  if (!response.ok) throw await refused(response);
  return response;
}

/** The data of each server-sent event in a stream of bytes, wherever its chunks are cut. */
async function* events(stream, signal) {
  const reader = stream.getReader(), decoder = new TextDecoder();
  let buffer = "", data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return; // an event without its blank line is not whole
      buffer += decoder.decode(value, { stream: true });
      const lines = buffer.split(/\r\n|\n|\r(?!$)/); // a CR at the end may be half of a CRLF
      buffer = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (!line && data.length) { yield data.join("\n"); data = []; }
      }
    }
  } catch (error) {
    throw signal.aborted ? error : new Problem(LOST);
  } finally { reader.cancel().catch(() => {}); }
}

async function loadModels() {
  const { data } = await (await call("v1/models")).json();
  models = data.map((model) => String(model.id));
  showModel();
}

/** Asks for the key where the server wants one; `then` is for when it is content. */
function greet(then) {
  loadModels().then(then, (error) => { if (error.kind === "key") openSettings("key", error.message, then); });
}

const chosenModel = () => (models.includes(settings.model) ? settings.model : models[0] ?? settings.model);

function requestBody(chat) {
  const messages = settings.system ? [{ role: "system", content: settings.system }] : [];
  for (const { role, content } of chat.messages) {
    if (!content) continue; // an answer that failed before its first word
    if (messages.at(-1)?.role === role) messages.at(-1).content += "\n\n" + content;
    else messages.push({ role, content });
  }
  const body = { model: chosenModel(), messages, stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) if (settings[name] !== "") body[name] = Number(settings[name]);
  return body;
}

/** Asks for the next answer of a conversation and writes it down as it comes. */
async function answer(chat) {
  const message = { role: "assistant", content: "", state: "writing" };
  const run = { message, abort: new AbortController(), cost: 0, painting: false };
  const times = { start: performance.now(), first: 0, last: 0, saved: 0 };
  let body = null, pieces = 0, usage = null, finish = "";
  chat.messages.push(message);
  chat.updated = Date.now();
  runs.set(chat, run);
  touched(chat);
  if (chat === current) addMessage(message);
  try {
    if (!models.length) await loadModels().catch(() => {}); // the call below says what is wrong
    body = requestBody(chat);
    const response = await call("v1/chat/completions", { body, signal: run.abort.signal });
    for await (const data of events(response.body, run.abort.signal)) {
      if (data === "[DONE]") { finish ||= "stop"; break; }
      let chunk;
      try { chunk = record(JSON.parse(data)); } catch { throw new Problem("The server sent something that this page can't read."); }
      if (chunk.error) throw new Problem(`The server stopped in the middle of the answer. ${record(chunk.error).message ?? ""}`);
      usage = chunk.usage ?? usage;
      const choice = record(chunk.choices?.[0]), text = record(choice.delta).content;
      finish = choice.finish_reason || finish;
      if (typeof text !== "string" || !text) continue;
      times.last = performance.now();
      times.first ||= times.last;
      pieces++;
      message.content += text;
      schedulePaint(run);
      if (times.last - times.saved > 1000) { save(chat); times.saved = times.last; }
    }
    if (!finish) throw new Problem(LOST);
    message.state = finish === "length" ? "length" : "";
  } catch (error) {
    if (leaving) return;
    message.state = run.abort.signal.aborted ? "stopped" : "";
    if (!message.state) message.problem = { text: error.message, kind: error.kind ?? "" };
  }
  runs.delete(chat);
  if (times.first) message.stats = statistics(times, usage?.completion_tokens, pieces);
  chat.updated = Date.now();
  paint(message);
  touched(chat);
  if (chat === current) announce(message);
  if (message.problem?.kind === "key") openSettings("key", message.problem.text, () => retry(chat));
  if (message.problem?.kind === "model") loadModels().catch(() => {}); // the server was started again with another
}

function statistics({ start, first, last }, counted, pieces) {
  const tokens = counted ?? pieces, seconds = (last - first) / 1000;
  const parts = [`${counted ? "" : "about "}${tokens} token${tokens === 1 ? "" : "s"}`];
  if (tokens > 1 && seconds > 0.01) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  return [...parts, `first after ${((first - start) / 1000).toFixed(2)} s`].join(" · ");
}

const stop = (chat) => runs.get(chat)?.abort.abort();

function retry(chat) {
  if (runs.has(chat)) return;
  if (chat.messages.at(-1)?.role === "assistant") removeMessages(chat, chat.messages.length - 1);
  answer(chat);
}

/* ---- The screen ---- */
