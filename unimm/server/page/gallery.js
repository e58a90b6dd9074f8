// The drawings that this browser keeps: a shelf of them, one looked at closely, one picked for something else.

import { drawings, gallery, removeDrawing, removeDrawings } from "./store.js";
import { action, comparison, download, el, fileName, find, icon, shown, toast, urlOf } from "./ui.js";

const urls = new Map(); // id -> address of its image, as long as it is kept: each reading makes other Blobs

function addressOf(entry) {
  if (entry.id === null) return urlOf(entry.blob);
  if (!urls.has(entry.id)) urls.set(entry.id, URL.createObjectURL(entry.blob));
  return urls.get(entry.id);
}

function thumbnail(entry, onclick, words) {
  const image = shown(el("img", { src: addressOf(entry), alt: entry.prompt, loading: "lazy" }));
  return el("button", { type: "button", class: "thumb", "aria-label": `${words} ${entry.prompt}, seed ${entry.seed}`, onclick, dataset: { seed: entry.seed } }, image, entry.kind === "edit" ? el("span", { class: "tag left" }, "edit") : null);
}

export class Gallery {
  constructor(pages) {
    this.pages = pages;
    this.all = [];
    this.looks = 0; // at what is kept; only the last one counts
    gallery.addEventListener("change", () => this.show());
    find("gallery-clear").onclick = () => this.clear();
    this.show();
  }

  async show() {
    const look = ++this.looks;
    const all = await drawings().catch(() => []);
    if (look !== this.looks) return;
    this.all = all;
    const kept = new Set(all.map((entry) => entry.id));
    for (const [id, url] of urls) {
      if (!kept.has(id)) { URL.revokeObjectURL(url); urls.delete(id); }
    }
    if (document.body.dataset.view !== "gallery") return;
    const bytes = all.reduce((sum, entry) => sum + entry.blob.size, 0);
    find("gallery-count").textContent = all.length ? `${all.length} ${all.length === 1 ? "drawing" : "drawings"}, ${(bytes / 2 ** 20).toFixed(1)} MiB, kept in this browser` : "";
    find("gallery-clear").hidden = all.length === 0;
    find("shelf").replaceChildren(...(all.length ? all.map((entry) => thumbnail(entry, () => this.view(entry), "Look at"))
      : [el("p", { class: "empty" }, "What you draw is kept here, in this browser alone: the last 300 drawings.")]));
  }

  clear() {
    const button = find("gallery-clear");
    if (button.dataset.sure !== "yes") {
      button.dataset.sure = "yes";
      button.textContent = "Really remove all?";
      setTimeout(() => { delete button.dataset.sure; button.textContent = "Remove all"; }, 4000);
      return;
    }
    delete button.dataset.sure;
    button.textContent = "Remove all";
    removeDrawings().then(() => toast("The gallery is empty."), (error) => toast(error.message, true));
  }

  /** Look at a drawing closely; arrow keys go to its neighbours. */
  view(entry, other = null) {
    const dialog = find("viewer");
    const { pages } = this;
    const leave = (then) => () => { dialog.close(); then(); };
    const { settings } = entry;
    const facts = [`seed ${entry.seed}`, entry.size?.replace("x", " × "), `guidance ${settings.guidance_scale}`, `temperature ${settings.temperature}`, entry.model, new Date(entry.made ?? Date.now()).toLocaleString()];
    const before = other?.blob ?? entry.source;
    const names = other ? [`seed ${other.seed}`, `seed ${entry.seed}`] : ["before", "after"];
    const large = before ? comparison(urlOf(before), addressOf(entry), names)
      : shown(el("img", { src: addressOf(entry), alt: entry.prompt, class: "large" }));
    const remove = async () => {
      await removeDrawing(entry.id).catch((error) => toast(error.message, true));
      dialog.close();
      await this.show();
      find("shelf").querySelector("button")?.focus();
    };
    dialog.replaceChildren(
      el("div", { class: "viewer-head" }, el("h2", { id: "viewer-title", tabindex: -1 }, entry.prompt),
        el("button", { type: "button", class: "icon", "aria-label": "Close", onclick: () => dialog.close() }, icon("close"))),
      el("div", { class: "viewer-image" }, large),
      el("p", { class: "facts" }, ...facts.filter(Boolean).map((fact) => el("span", {}, fact))),
      el("div", { class: "row wrap" },
        action("again", "Same seed again", leave(() => pages.again(entry))),
        action("compare", "Compare", async () => {
          const found = await this.pick(entry);
          if (found) this.view(entry, found);
        }),
        pages.looks ? action("chat", "Send to chat", leave(() => pages.toChat(entry.blob))) : null,
        pages.looks ? action("edit", "Edit", leave(() => pages.toEdit(entry.blob))) : null,
        action("download", "Download", () => download(entry.blob, fileName(entry))),
        entry.id === null ? null : action("trash", "Remove", remove)));
    dialog.onkeydown = (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || event.target.type === "range") return;
      const next = this.all[this.all.findIndex((one) => one.id === entry.id) + step];
      if (next) { event.preventDefault(); this.view(next); }
    };
    dialog.onclick = (event) => { if (event.target === dialog) dialog.close(); };
    if (!dialog.open) dialog.showModal();
    find("viewer-title").focus();
  }

  /** Have a drawing picked; a promise of it, or of null. */
  pick(but = null) {
    const dialog = find("picker");
    const others = this.all.filter((entry) => entry.id !== but?.id);
    return new Promise((resolve) => {
      let picked = null;
      const choose = (entry) => () => { picked = entry; dialog.close(); };
      dialog.replaceChildren(
        el("div", { class: "viewer-head" }, el("h2", { id: "picker-title" }, "Pick a drawing"),
          el("button", { type: "button", class: "icon", "aria-label": "Close", onclick: () => dialog.close() }, icon("close"))),
        others.length ? el("div", { class: "shelf" }, ...others.map((entry) => thumbnail(entry, choose(entry), "Pick")))
          : el("p", { class: "hint" }, "There is no drawing in the gallery yet."));
      dialog.onclose = () => resolve(picked);
      dialog.showModal();
    });
  }
}
