// Talks to the server: its routes, streams of events, and whether it is there at all.

export class ServerError extends Error {
  constructor(message, status, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The server could not be reached, or went away in the middle. */
export class AwayError extends Error {}

const KEY = "unimm-key";
export const server = new EventTarget(); // `change`: state is another; `key`: it asks for a key
server.state = "loading"; // ready, loading, stopping, away
server.model = null;

function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function send(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    check();
    throw new AwayError("The server does not answer.");
  }
  if (answer.ok) return answer;
  const document = await answer.json().catch(() => null);
  if (answer.status === 401) server.dispatchEvent(new Event("key"));
  let line = document?.error?.message ?? `The server answered ${answer.status}.`;
  const wait = answer.headers.get("Retry-After");
  if (wait && answer.status === 429) line = `The server is busy; try again in ${wait} s.`;
  throw new ServerError(line, answer.status, document?.error?.code);
}

export async function getJSON(path) {
  return (await send(path)).json();
}

export async function postJSON(path, body, more = {}) {
  const options = { method: "POST", headers: { "Content-Type": "application/json", ...more }, body: JSON.stringify(body) };
  return (await send(path, options)).json();
}

/** The events of a stream, as objects; ends with the stream, or with an error if it breaks off. */
export async function* events(path, body, signal) {
  const form = body instanceof FormData;
  const answer = await send(path, {
    method: "POST", signal, body: form ? body : JSON.stringify(body),
    headers: form ? {} : { "Content-Type": "application/json" },
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      const blocks = text.split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const fields = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
        if (fields.length === 0) continue; // a sign of life
        const data = fields.join("\n");
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ServerError(event.error.message, 500, event.error.code);
        yield event;
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    check();
    throw new AwayError("The server went away.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

// --- whether it is there ---------------------------------------------------------------------------------

const CALM = 5000, HASTY = 1000; // milliseconds between looks
let timer = null;
let looking = false;

/** Look at once whether the server is there; then again and again. */
export async function check() {
  if (looking) return;
  looking = true;
  clearTimeout(timer);
  let state = "away";
  try {
    const answer = await fetch("/health", { cache: "no-store", signal: AbortSignal.timeout(4000) });
    const found = await answer.json();
    state = found.status === "ok" ? "ready" : found.status === "stopping" ? "away" : "loading";
    server.model = found.model;
  } catch {
    state = "away";
  }
  looking = false;
  timer = setTimeout(check, state === "ready" ? CALM : HASTY);
  if (state !== server.state) {
    server.state = state;
    server.dispatchEvent(new Event("change"));
  }
}

document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && check());
window.addEventListener("online", check);
