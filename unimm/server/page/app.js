// The page as a whole: which view is shown, the state of the server, images that are dropped or pasted.

import { check, getJSON, server, useKey } from "./api.js";
import { showCard } from "./card.js";
import { Chat } from "./chat.js";
import { Drawing, Editing } from "./draw.js";
import { Gallery } from "./gallery.js";
import { find, imageFiles, toast } from "./ui.js";
import { Voting } from "./vote.js";

const VIEWS = ["draw", "chat", "edit", "vote", "gallery", "model"];
const WORDS = { ready: "ready", loading: "loading the model", away: "not there" };

let card = null;
let studio = null, chat = null, editing = null, voting = null;
let allowed = new Set(["gallery", "model"]);

const pages = {
  looks: false,
  view: (entry) => gallery.view(entry),
  pick: () => gallery.pick(),
  toChat(blob) { go("chat"); chat.attach(blob); },
  toEdit(blob) { go("edit"); editing.set(blob); find("edit-prompt").focus(); },
  again(entry) {
    if (entry.source && editing) { go("edit"); editing.set(entry.source); editing.again(entry); }
    else if (studio) { go("draw"); studio.again(entry); }
  },
};
const gallery = new Gallery(pages);

// --- views ---

const current = () => location.hash.slice(1);

function go(view) {
  location.hash = view;
  show();
}

function show() {
  let view = VIEWS.includes(current()) ? current() : "draw";
  if (card && !allowed.has(view)) view = allowed.has("chat") ? "chat" : "model";
  for (const name of VIEWS) find(name).hidden = name !== view || (!card && name !== "gallery");
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
    link.hidden = card !== null && !allowed.has(link.dataset.view);
  }
  document.body.dataset.view = view;
  if (view === "gallery") gallery.show();
  document.title = `${view[0].toUpperCase()}${view.slice(1)} · unimm`;
}

// --- the server ---

async function meet() {
  let found;
  try {
    found = (await getJSON("/v1/models")).data[0];
  } catch (error) {
    if (error.status !== 401) setTimeout(check, 1000);
    return;
  }
  if (JSON.stringify(found) !== JSON.stringify(card)) {
    const draws = found.output_modalities.includes("image");
    pages.looks = found.input_modalities.includes("image");
    const first = card === null;
    card = found;
    allowed = new Set(["gallery", "model", "chat", ...(draws ? ["draw", "vote"] : []), ...(draws && pages.looks ? ["edit"] : [])]);
    showCard(card);
    if (first || chat === null) chat = new Chat(card, pages);
    else chat.card = card;
    studio = draws ? new Drawing(card, pages) : null;
    editing = draws && pages.looks ? new Editing(card, pages) : null;
    voting = draws ? new Voting(card) : null;
    show();
  } else {
    voting?.refresh();
  }
  state();
}

let wasAway = false;

function state() {
  const { state: now } = server;
  find("state").dataset.state = now;
  const name = card?.id ?? server.model;
  find("state-words").textContent = now === "ready" && name ? `${name}, ready` : WORDS[now];
  const away = find("away");
  away.hidden = now !== "away";
  if (now === "away" && !wasAway) away.textContent = "The server does not answer. This page tries again by itself; what is here stays here.";
  if (now === "ready" && wasAway) toast("The server is back.");
  wasAway = now === "away" || (wasAway && now !== "ready");
  for (const id of ["draw-go", "edit-go", "vote-go", "chat-send"]) find(id).disabled = now !== "ready";
}

server.addEventListener("change", () => {
  state();
  if (server.state === "ready") meet();
});

server.addEventListener("key", () => {
  const dialog = find("key");
  if (!dialog.open) dialog.showModal();
});
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(find("key-value").value.trim());
  find("key").close();
  meet();
});

// --- images from elsewhere, and keys ---

function take(files) {
  if (!files.length || !pages.looks) return;
  if (current() === "edit") {
    editing.take(files);
  } else {
    if (current() !== "chat") go("chat");
    chat.add(files);
  }
}

const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  if (!holdsFiles(event)) return;
  event.preventDefault();
  const files = imageFiles(event.dataTransfer);
  if (!files.length) toast("That is no image.", true);
  take(files);
});
document.addEventListener("paste", (event) => {
  const files = imageFiles(event.clipboardData);
  if (!files.length) return;
  event.preventDefault();
  take(files);
});
document.addEventListener("keydown", (event) => {
  if (document.body.dataset.view === "vote" && !document.querySelector("dialog[open]")) voting?.key(event);
});

window.addEventListener("hashchange", () => { show(); window.scrollTo(0, 0); });
show();
check();
