// The pages that draw: from words, and from an image and words.

import { server } from "./api.js";
import { DrawingOptions } from "./options.js";
import { startDrawings } from "./tiles.js";
import { action, comparison, download, el, fileName, find, icon, imageFiles, readImage, toast, urlOf } from "./ui.js";

const EXAMPLES = {
  embedded: ["a rocket", "a red apple on yellow", "four peaches on blue", "a strawberry", "a balloon on pink"],
  others: ["a lighthouse at dusk, oil painting", "a fox reading a book under a lamp", "a glass teapot on a mossy stone"],
};
const MOST_BATCHES = 12; // that stay on the page; the gallery has the others

/** What both pages share: a form, and batches of drawings beside it. */
class Studio {
  constructor(name, card, pages) {
    this.name = name;
    this.card = card;
    this.pages = pages;
    this.options = new DrawingOptions(find(`${name}-options`), card, name);
    this.results = find(`${name}-results`);
    this.running = new Set();
    this.prompt = find(`${name}-prompt`);
    const form = find(`${name}-form`);
    form.onsubmit = (event) => { event.preventDefault(); this.go(); };
    this.prompt.onkeydown = (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.go(); }
    };
    find(`${name}-stop`).onclick = () => { for (const run of this.running) run.stop(); };
    if (!this.results.children.length) this.results.replaceChildren(this.empty());
  }

  empty() {
    return el("div", { class: "empty" }, el("span", { class: "mosaic", "aria-hidden": "true" }, ...Array.from({ length: 16 }, () => el("i"))),
      el("p", {}, "Drawings appear here, row by row."));
  }

  source() {
    return null;
  }

  go() {
    const prompt = this.prompt.value.trim();
    if (!prompt) {
      toast("Say what shall be drawn.", true);
      this.prompt.focus();
      return;
    }
    let settings;
    try {
      settings = this.options.read();
    } catch (error) {
      toast(error.message, true);
      this.options.seed.focus();
      return;
    }
    this.start({ prompt, settings, source: this.source() });
  }

  start(asked) {
    if (server.state !== "ready") {
      toast("The server is not there; wait until it is.", true);
      return;
    }
    const job = { ...asked, size: this.card.size, model: this.card.id };
    const run = startDrawings(job, (tile) => this.whole(tile, job), (tile) => {
      const settings = { ...job.settings, n: 1 };
      if (tile.seed !== null) settings.seed = tile.seed;
      this.start({ ...job, settings });
    });
    const grid = el("div", { class: `tiles of-${Math.min(4, run.tiles.length)}` }, ...run.tiles.map((tile) => tile.figure));
    const batch = el("section", { class: "batch", "aria-label": job.prompt },
      el("h2", {}, job.prompt), grid);
    this.results.querySelector(".empty")?.remove();
    this.results.prepend(batch);
    while (this.results.children.length > MOST_BATCHES) this.results.lastChild.remove();
    if (window.matchMedia("(max-width: 52rem)").matches) batch.scrollIntoView({ behavior: "smooth", block: "start" });
    this.running.add(run);
    this.busy();
    run.ended.catch((error) => toast(error.message, true)).finally(() => { this.running.delete(run); this.busy(); });
  }

  busy() {
    find(`${this.name}-stop`).hidden = this.running.size === 0;
  }

  whole(tile, job) {
    const { entry } = tile;
    const look = el("button", { type: "button", class: "look", "aria-label": `Look at ${entry.prompt}, seed ${entry.seed}`, onclick: () => this.pages.view(entry) });
    tile.frame.append(look);
    tile.caption.replaceChildren(el("span", { class: "seed" }, `seed ${entry.seed}`), el("span", { class: "tools" },
      tool("again", "Draw with the same seed again", () => this.again(entry)),
      tool("download", "Download", () => download(entry.blob, fileName(entry))),
      this.pages.looks ? tool("chat", "Send to chat", () => this.pages.toChat(entry.blob)) : null,
      this.pages.looks ? tool("edit", "Edit", () => this.pages.toEdit(entry.blob)) : null));
    if (job.source) {
      const box = comparison(urlOf(job.source), urlOf(entry.blob));
      tile.frame.replaceWith(box);
    }
  }

  /** Draw once more from the seed of a drawing; the seed stays in the form, for other words with it. */
  again(entry) {
    this.prompt.value = entry.prompt;
    this.options.set(entry.settings, entry.seed);
    this.go();
  }
}

const tool = (name, words, onclick) =>
  el("button", { type: "button", class: "icon small", "aria-label": words, title: words, onclick }, icon(name));

export class Drawing extends Studio {
  constructor(card, pages) {
    super("draw", card, pages);
    const examples = EXAMPLES[card.id] ?? EXAMPLES.others;
    find("draw-examples").replaceChildren(...examples.map((words) =>
      el("button", { type: "button", class: "chip", onclick: () => { this.prompt.value = words; this.go(); } }, words)));
  }
}

export class Editing extends Studio {
  constructor(card, pages) {
    super("edit", card, pages);
    this.file = find("edit-file");
    this.file.onchange = () => this.take(imageFiles(this.file));
    this.set(null);
  }

  source() {
    return this.blob;
  }

  go() {
    if (this.blob) {
      super.go();
      return;
    }
    toast("Choose the image to start from.", true);
    find("edit-source").querySelector("button").focus();
  }

  async take([file]) {
    if (!file) return;
    try {
      this.set(await readImage(file));
    } catch (error) {
      toast(error.message, true);
    }
    this.file.value = "";
  }

  /** Start from an image, or from none. */
  set(blob) {
    this.blob = blob;
    const choose = action("image", blob ? "Another" : "Choose an image", () => this.file.click());
    const pick = action("gallery", "From the gallery", async () => {
      const entry = await this.pages.pick();
      if (entry) this.set(entry.blob);
    });
    const shownImage = blob ? el("img", { src: urlOf(blob), alt: "the image to start from" }) : el("p", {}, "Drop or paste an image here");
    find("edit-source").replaceChildren(shownImage, el("div", { class: "row center" }, choose, pick));
  }
}
