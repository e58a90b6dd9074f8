// The conversation: words and images, answered piece by piece; kept in the browser until a new one begins.

import { events, server } from "./api.js";
import { conversation, keepConversation } from "./store.js";
import { dataUrl, el, find, icon, imageFiles, readImage, shown, toast, urlOf } from "./ui.js";

const QUESTIONS = ["what is in the picture?", "how many are there?", "describe the picture"];

export class Chat {
  constructor(card, pages) {
    this.card = card;
    this.pages = pages;
    this.turns = [];
    this.shots = []; // images that go with the next message
    this.control = null;
    this.text = find("chat-text");
    this.file = find("chat-file");
    this.list = find("turns");
    this.file.onchange = () => { this.add(imageFiles(this.file)); this.file.value = ""; };
    find("chat-attach").onclick = () => this.file.click();
    find("chat-pick").onclick = async () => {
      const entry = await pages.pick();
      if (entry) this.attach(entry.blob);
    };
    find("chat-form").onsubmit = (event) => { event.preventDefault(); this.send(); };
    find("chat-stop").onclick = () => this.control?.abort();
    find("chat-new").onclick = () => this.begin();
    const temperature = find("chat-temperature");
    temperature.oninput = () => { temperature.nextElementSibling.textContent = temperature.value; };
    this.text.oninput = () => this.fit();
    this.text.onkeydown = (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.send(); }
    };
    for (const id of ["chat-attach", "chat-pick"]) find(id).hidden = !pages.looks;
    this.restore();
  }

  async restore() {
    this.turns = await conversation().catch(() => []);
    this.show();
  }

  begin() {
    this.control?.abort();
    this.turns = [];
    keepConversation([]).catch(() => {});
    this.show();
    this.text.focus();
  }

  fit() {
    this.text.style.height = "auto";
    this.text.style.height = `${Math.min(this.text.scrollHeight, 180)}px`;
  }

  // --- images of the next message ---

  async add(files) {
    for (const file of files) {
      try {
        this.attach(await readImage(file));
      } catch (error) {
        toast(error.message, true);
      }
    }
  }

  attach(blob) {
    if (this.shots.length >= this.card.max_images) {
      toast(`A message may have ${this.card.max_images} images.`, true);
      return;
    }
    this.shots.push(blob);
    this.showShots();
    this.text.focus();
  }

  showShots() {
    find("shots").hidden = this.shots.length === 0;
    find("shots").replaceChildren(...this.shots.map((blob, at) => el("span", { class: "shot" },
      shown(el("img", { src: urlOf(blob), alt: `image ${at + 1} to send` })),
      el("button", { type: "button", class: "icon small", "aria-label": `Remove image ${at + 1}`, onclick: () => { this.shots.splice(at, 1); this.showShots(); this.text.focus(); } }, icon("close")))));
  }

  // --- turns ---

  show() {
    if (this.turns.length === 0) {
      const ask = (words) => () => { this.text.value = words; this.fit(); this.text.focus(); };
      this.list.replaceChildren(el("div", { class: "empty" },
        el("p", { class: "big" }, this.pages.looks ? "Drop an image and ask about it." : "Ask something."),
        this.pages.looks ? el("div", { class: "chips" }, ...QUESTIONS.map((words) => el("button", { type: "button", class: "chip", onclick: ask(words) }, words))) : null));
    } else {
      this.list.replaceChildren(...this.turns.map((turn) => bubble(turn)));
    }
    this.list.scrollTop = this.list.scrollHeight;
  }

  async send() {
    const text = this.text.value.trim();
    if (this.control || (!text && this.shots.length === 0)) return;
    if (server.state !== "ready") {
      toast("The server is not there; what you wrote stays here.", true);
      return;
    }
    this.turns.push({ role: "user", text, images: this.shots });
    this.shots = [];
    this.text.value = "";
    this.fit();
    this.showShots();
    this.show();
    await this.answer();
  }

  /** Have the last message answered. */
  async answer() {
    const control = this.control = new AbortController();
    this.busy(true);
    const turn = { role: "assistant", text: "", images: [] };
    const place = bubble(turn);
    place.classList.add("coming");
    this.list.append(place);
    const words = place.querySelector(".said");
    try {
      const body = { model: server.model, messages: await messages(this.turns), stream: true, temperature: Number(find("chat-temperature").value) };
      for await (const event of events("/v1/chat/completions", body, control.signal)) {
        turn.text += event.choices[0]?.delta.content ?? "";
        words.textContent = turn.text;
        this.list.scrollTop = this.list.scrollHeight;
      }
    } catch (error) {
      if (this.control === control && error.name !== "AbortError") this.failed(place, error);
      else place.remove();
      if (error.name !== "AbortError") turn.text = "";
    }
    place.classList.remove("coming");
    if (this.control !== control) return; // a new chat has begun
    this.control = null;
    this.busy(false);
    if (turn.text) {
      this.turns.push(turn);
      if (!place.isConnected) this.list.append(bubble(turn));
    }
    keepConversation(this.turns).catch(() => toast("This browser has no room to keep the conversation.", true));
  }

  failed(place, error) {
    place.classList.add("failed");
    const retry = () => { if (!this.control) { place.remove(); this.answer(); } };
    place.replaceChildren(el("p", { class: "said bad" }, error.message), el("button", { type: "button", class: "plain small", onclick: retry }, "Try again"));
  }

  busy(running) {
    const held = document.activeElement === find("chat-send") || document.activeElement === find("chat-stop");
    find("chat-send").hidden = running;
    find("chat-stop").hidden = !running;
    if (held) this.text.focus();
  }
}

function bubble(turn) {
  const images = turn.images.map((blob, at) => shown(el("img", { src: urlOf(blob), alt: `image ${at + 1} of the message` })));
  return el("article", { class: `turn ${turn.role}`, "aria-label": turn.role === "user" ? "You" : "The model" },
    images.length ? el("div", { class: "seen" }, ...images) : null,
    el("p", { class: "said", dir: "auto" }, turn.text));
}

/** The turns as OpenAI's routes take them; a message that has had no answer is joined to the next. */
async function messages(turns) {
  const sent = [];
  for (const turn of turns) {
    const content = turn.role === "assistant" ? turn.text : [
      ...await Promise.all(turn.images.map(async (blob) => ({ type: "image_url", image_url: { url: await dataUrl(blob) } }))),
      ...(turn.text ? [{ type: "text", text: turn.text }] : []),
    ];
    const last = sent.at(-1);
    if (last?.role === "user" && turn.role === "user") last.content.push(...content);
    else sent.push({ role: turn.role, content });
  }
  return sent;
}
