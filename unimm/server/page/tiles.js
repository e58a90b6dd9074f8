// Drawings while they come: a frame each, that fills row by row, and then what can be done with the drawing.

import { AwayError, events, server } from "./api.js";
import { addDrawing } from "./store.js";
import { bytesOf, el, shown, urlOf } from "./ui.js";

export class Tile {
  constructor(prompt, size) {
    this.image = shown(el("img", { alt: prompt }));
    this.image.hidden = true;
    this.rest = el("span", { class: "rest" });
    this.progress = el("progress", { max: 1, value: 0, "aria-label": "rows drawn" });
    this.frame = el("div", { class: "frame" }, this.image, this.rest);
    this.caption = el("figcaption", {}, this.progress);
    this.figure = el("figure", { class: "tile waiting", dataset: { rows: 0 } }, this.frame, this.caption);
    const [width, height] = size.split("x");
    this.frame.style.setProperty("--shape", `${width} / ${height}`);
    this.seed = null;
  }

  /** The rows that have come so far; below them nothing is shown yet. */
  rows(event) {
    this.seed = event.seed;
    const drawn = event.rows_drawn / event.rows;
    this.image.src = `data:image/${event.output_format};base64,${event.b64_json}`;
    this.image.hidden = false;
    this.rest.style.setProperty("--drawn", `${drawn * 100}%`);
    this.progress.value = drawn;
    this.figure.dataset.rows = event.rows_drawn;
    this.figure.classList.replace("waiting", "drawing");
  }

  whole(entry) {
    this.entry = entry;
    this.image.src = urlOf(entry.blob);
    this.image.hidden = false;
    this.rest.remove();
    this.figure.classList.remove("waiting", "drawing");
    this.figure.classList.add("done");
    this.figure.dataset.seed = entry.seed;
  }

  failed(line, again) {
    this.figure.classList.remove("waiting", "drawing");
    this.figure.classList.add("failed");
    this.rest.remove();
    const retry = again && el("button", { type: "button", class: "plain small", onclick: again }, "Draw again");
    this.caption.replaceChildren(el("span", { class: "bad" }, line), ...(retry ? [retry] : []));
  }
}

/**
 * Have drawings made and shown as they come; each is kept in the gallery.
 *
 * `job` has `prompt`, `settings` (with `n`), `size`, `model`, and for an edit `source` (a Blob). `onWhole(tile)` is
 * called for each drawing. Returns the tiles, `stop()`, and `ended`, a promise of whether all came.
 */
export function startDrawings(job, onWhole, again) {
  const control = new AbortController();
  const tiles = Array.from({ length: job.settings.n }, () => new Tile(job.prompt, job.settings.size ?? job.size));
  const ended = follow(job, tiles, control, onWhole).then(() => true, (error) => {
    const line = error.name === "AbortError" ? "Stopped." : error.message;
    for (const tile of tiles.filter((one) => !one.entry)) tile.failed(line, again && (() => again(tile)));
    if (error.name !== "AbortError" && !(error instanceof AwayError) && !error.status) throw error;
    return false;
  });
  return { tiles, ended, stop: () => control.abort() };
}

async function follow(job, tiles, control, onWhole) {
  const path = job.source ? "/v1/images/edits" : "/v1/images/generations";
  for await (const event of events(path, bodyOf(job), control.signal)) {
    const tile = tiles[event.index];
    if (event.type.endsWith(".partial_image")) {
      tile.rows(event);
    } else if (event.type.endsWith(".completed")) {
      const blob = new Blob([bytesOf(event.b64_json)], { type: `image/${event.output_format}` });
      const settings = { ...job.settings, seed: event.seed, n: 1 };
      const fields = { blob, prompt: job.prompt, seed: event.seed, settings, model: job.model, size: event.size };
      const entry = { ...fields, kind: job.source ? "edit" : "drawing", source: job.source ?? null };
      const kept = await addDrawing(entry).catch(() => ({ ...entry, id: null })); // a full disk
      tile.whole({ ...kept, remembered: event.id });
      onWhole(tile);
    }
  }
  if (tiles.some((tile) => !tile.entry)) throw new AwayError("The server went away.");
}

function bodyOf(job) {
  const fields = { model: server.model, prompt: job.prompt, stream: true, ...job.settings };
  if (!job.source) return fields;
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, String(value));
  form.append("image", job.source, "image.png");
  return form;
}
