// The settings of drawings: how many, which size and seed, guidance, temperature, and the rest behind "More".

import { el } from "./ui.js";

const COUNTS = [1, 2, 4, 8];
const SHAPES = [[1, 1], [4, 3], [3, 4], [16, 9], [9, 16]];
const MAX_SEED = Number.MAX_SAFE_INTEGER;

/** Sizes of about the model's own area, in multiples of what a code covers. */
export function sizesOf(card) {
  const [width, height] = card.size.split("x").map(Number);
  const stride = height / card.rows;
  const own = `${width}x${height}`;
  if (!card.any_size) return [own];
  const round = (length) => Math.max(stride, Math.round(length / stride) * stride);
  const side = Math.sqrt(width * height);
  const sizes = SHAPES.map(([w, h]) => `${round(side * Math.sqrt(w / h))}x${round(side * Math.sqrt(h / w))}`);
  return [...new Set([own, ...sizes])];
}

export class DrawingOptions {
  /** Fills `root` with the settings that the model of `card` has; `name` keeps two sets of them apart. */
  constructor(root, card, name) {
    this.name = name;
    this.defaults = card.sampling;
    const counts = COUNTS.filter((count) => count <= card.max_n);
    const sizes = sizesOf(card);
    this.count = el("div", { class: "segments", role: "radiogroup", "aria-label": "How many" }, ...counts.map((count) =>
      el("label", {}, el("input", { type: "radio", name: `${name}-count`, value: count, checked: count === Math.min(4, counts.at(-1)) }), el("span", {}, String(count)))));
    this.size = el("select", { id: `${name}-size` }, ...sizes.map((size) => el("option", { value: size }, size.replace("x", " × "))));
    this.seed = el("input", { id: `${name}-seed`, type: "text", inputmode: "numeric", pattern: "[0-9]*", placeholder: "random", autocomplete: "off" });
    this.guidance = this.#slider("guidance", "Guidance", 1, 10, 0.5, card.sampling.guidance_scale, "how closely it follows the prompt");
    this.temperature = this.#slider("temperature", "Temperature", 0, 2, 0.05, card.sampling.temperature, "how freely it draws");
    this.away = el("input", { id: `${name}-away`, type: "text", maxlength: 2000, autocomplete: "off" });
    this.topK = el("input", { id: `${name}-top-k`, type: "number", min: 0, step: 1, placeholder: card.sampling.top_k ?? "all" });
    this.topP = el("input", { id: `${name}-top-p`, type: "number", min: 0.01, max: 1, step: 0.01, placeholder: card.sampling.top_p ?? "1" });
    const clear = el("button", { type: "button", class: "link", onclick: () => { this.seed.value = ""; this.seed.focus(); } }, "random");
    root.replaceChildren(
      el("div", { class: "field" }, el("span", {}, "How many"), this.count),
      el("div", { class: "pair" },
        sizes.length > 1 ? this.#field("Size", this.size) : null,
        el("div", { class: "field" }, el("span", { class: "split" }, el("label", { for: this.seed.id }, "Seed"), clear), this.seed)),
      this.guidance.field, this.temperature.field,
      el("details", {}, el("summary", {}, "More"),
        el("div", { class: "more" },
          this.#field("Leave out (negative prompt)", this.away),
          el("div", { class: "pair" }, this.#field("Top k", this.topK), this.#field("Top p", this.topP)))));
  }

  #field(words, input) {
    return el("label", { class: "field", for: input.id }, el("span", {}, words), input);
  }

  #slider(key, words, min, max, step, value, hint) {
    const input = el("input", { id: `${this.name}-${key}`, type: "range", min, max, step });
    input.value = value;
    const output = el("output", { for: input.id }, String(value));
    input.addEventListener("input", () => { output.textContent = input.value; });
    const field = el("label", { class: "field", for: input.id, title: hint }, el("span", { class: "split" }, words, output), input);
    return { field, input, get value() { return Number(input.value); }, set value(to) { input.value = to; output.textContent = input.value; } };
  }

  /** What a request says of them. Throws an Error with a line for the person. */
  read() {
    const found = {
      n: Number(this.count.querySelector("input:checked").value),
      guidance_scale: this.guidance.value,
      temperature: this.temperature.value,
    };
    if (this.size.options.length > 1) found.size = this.size.value;
    const seed = this.seed.value.trim();
    if (seed) {
      if (!/^\d+$/.test(seed) || Number(seed) > MAX_SEED) throw new Error("Seed: give a whole number, or leave it empty.");
      found.seed = Number(seed);
    }
    if (this.topK.value) found.top_k = Number(this.topK.value);
    if (this.topP.value) found.top_p = Number(this.topP.value);
    if (this.away.value.trim()) found.negative_prompt = this.away.value.trim();
    return found;
  }

  /** Show settings again, for one drawing with its own seed. */
  set(settings, seed) {
    this.seed.value = String(seed);
    this.count.querySelector("input").checked = true;
    this.guidance.value = settings.guidance_scale ?? this.defaults.guidance_scale;
    this.temperature.value = settings.temperature ?? this.defaults.temperature;
    this.topK.value = settings.top_k ?? "";
    this.topP.value = settings.top_p ?? "";
    this.away.value = settings.negative_prompt ?? "";
    if (settings.size && [...this.size.options].some((one) => one.value === settings.size)) this.size.value = settings.size;
  }
}
