// What stays in this browser: drawings, at most so many, and the conversation. Without IndexedDB, until the page goes.

const MAX_DRAWINGS = 300;
const MAX_BYTES = 96 * 2 ** 20;

export const gallery = new EventTarget(); // `change`: drawings came or went, in this tab or another
const channel = "BroadcastChannel" in window ? new BroadcastChannel("unimm") : null;
channel?.addEventListener("message", () => gallery.dispatchEvent(new Event("change")));

let opened = null;
const memory = { drawings: new Map(), conversation: null, next: 1 };

function open() {
  opened ??= new Promise((resolve) => {
    let request;
    try {
      request = indexedDB.open("unimm", 1);
    } catch {
      resolve(null);
      return;
    }
    request.onupgradeneeded = () => {
      request.result.createObjectStore("drawings", { keyPath: "id", autoIncrement: true });
      request.result.createObjectStore("conversation");
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = request.onblocked = () => resolve(null);
  });
  return opened;
}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function ended(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

function tell() {
  gallery.dispatchEvent(new Event("change"));
  channel?.postMessage("change");
}

/** Keep a drawing {blob, prompt, seed, kind, settings, model, source?}; the oldest go where there are too many. */
export async function addDrawing(drawing) {
  const database = await open();
  const entry = { ...drawing, made: Date.now() };
  if (database === null) {
    entry.id = memory.next++;
    memory.drawings.set(entry.id, entry);
    if (memory.drawings.size > MAX_DRAWINGS) memory.drawings.delete(memory.drawings.keys().next().value);
  } else {
    const transaction = database.transaction("drawings", "readwrite");
    const finished = ended(transaction);
    const store = transaction.objectStore("drawings");
    entry.id = await done(store.add(entry));
    await trim(store);
    await finished;
  }
  tell();
  return entry;
}

const sizeOf = (entry) => entry.blob.size + (entry.source?.size ?? 0);

async function trim(store) {
  const all = await done(store.getAll());
  let bytes = all.reduce((sum, entry) => sum + sizeOf(entry), 0);
  let count = all.length;
  for (const entry of all) {
    if (count <= 1 || (count <= MAX_DRAWINGS && bytes <= MAX_BYTES)) return;
    store.delete(entry.id);
    bytes -= sizeOf(entry);
    count -= 1;
  }
}

/** All drawings, the newest first. */
export async function drawings() {
  const database = await open();
  const all = database === null ? [...memory.drawings.values()]
    : await done(database.transaction("drawings").objectStore("drawings").getAll());
  return all.reverse();
}

export async function removeDrawing(id) {
  const database = await open();
  if (database === null) memory.drawings.delete(id);
  else await done(database.transaction("drawings", "readwrite").objectStore("drawings").delete(id));
  tell();
}

export async function removeDrawings() {
  const database = await open();
  if (database === null) memory.drawings.clear();
  else await done(database.transaction("drawings", "readwrite").objectStore("drawings").clear());
  tell();
}

/** The turns of the conversation [{role, text, images}]. */
export async function conversation() {
  const database = await open();
  if (database === null) return memory.conversation ?? [];
  return (await done(database.transaction("conversation").objectStore("conversation").get("turns"))) ?? [];
}

export async function keepConversation(turns) {
  const database = await open();
  if (database === null) memory.conversation = turns;
  else await done(database.transaction("conversation", "readwrite").objectStore("conversation").put(turns, "turns"));
}
