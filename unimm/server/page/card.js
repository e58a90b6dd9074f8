// The model's card: what it is made of, what it takes and gives, and how programs use it.

import { el, find, toast } from "./ui.js";

const number = new Intl.NumberFormat("en");

function short(count) {
  for (const [size, unit] of [[1e9, "billion"], [1e6, "million"], [1e3, "thousand"]]) {
    if (count >= size) return `${(count / size).toFixed(count / size < 10 ? 1 : 0)} ${unit}`;
  }
  return String(count);
}

export function showCard(card) {
  const { info } = card;
  const parts = Object.entries(info.parameters).sort((one, other) => other[1] - one[1]);
  const most = Math.max(...parts.map(([, count]) => count));
  const facts = [
    ["Decoder", info.decoder], ["Context", `${number.format(card.context)} tokens`], ["Looks at", info.understands ?? "no images"],
    ["Draws", info.draws ?? "nothing"], ["Can", info.can.join(", ")], ["Weights", info.quantization ?? "not quantised"], ["Runs on", info.device],
    ["Cache", `${number.format(info.engine.max_rows)} rows, ${number.format(info.engine.max_tokens)} tokens`], ["Version", `unimm ${info.version}`],
  ];
  find("card").replaceChildren(
    el("div", { class: "card-head" }, el("h1", { id: "model-title" }, card.id),
      el("p", { class: "total" }, `${short(info.parameters_total)} parameters`)),
    el("div", { class: "columns" },
      el("section", { class: "panel", "aria-labelledby": "card-facts" }, el("h2", { id: "card-facts" }, "What it is"),
        el("dl", {}, ...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]))),
      el("section", { class: "panel", "aria-labelledby": "card-parts" }, el("h2", { id: "card-parts" }, "Its parts"),
        el("ul", { class: "bars" }, ...parts.map(([name, count]) => {
          const bar = el("span", { class: "bar" });
          bar.style.setProperty("--share", `${(100 * count) / most}%`);
          return el("li", {}, el("span", { class: "split" }, el("span", {}, name.replaceAll("_", " ")), el("span", { class: "soft" }, number.format(count))), bar);
        })))),
    el("section", { class: "panel", "aria-labelledby": "card-api" }, el("h2", { id: "card-api" }, "Use it from a program"),
      el("p", {}, "OpenAI's clients speak to this server. ", el("a", { href: "/docs" }, "The API, route by route"), " · ",
        el("a", { href: "/openapi.json" }, "openapi.json"), " · ", el("a", { href: "/v1/models" }, "/v1/models"), " · ", el("a", { href: "/metrics" }, "/metrics")),
      snippet("Python", python(card)), snippet("Shell", shell(card))));
}

function snippet(name, text) {
  const copy = () => navigator.clipboard.writeText(text).then(() => toast("Copied."), () => toast("The browser does not let the page copy.", true));
  return el("div", { class: "snippet" }, el("div", { class: "split" }, el("h3", {}, name), el("button", { type: "button", class: "link", onclick: copy, "aria-label": `Copy ${name}` }, "Copy")),
    el("pre", { tabindex: 0, "aria-label": `${name} example` }, text));
}

function python(card) {
  const lines = ["import openai", "", `client = openai.OpenAI(base_url="${location.origin}/v1", api_key="none")`];
  if (card.output_modalities.includes("image")) lines.push(`drawn = client.images.generate(model="${card.id}", prompt="a rocket", extra_body={"seed": 7})`);
  else lines.push(`answer = client.chat.completions.create(model="${card.id}", messages=[{"role": "user", "content": "hello"}])`);
  return lines.join("\n");
}

function shell(card) {
  const draws = card.output_modalities.includes("image");
  const body = draws ? '{"prompt": "a rocket", "seed": 7}' : '{"messages": [{"role": "user", "content": "hello"}]}';
  return `curl ${location.origin}/v1/${draws ? "images/generations" : "chat/completions"} \\\n  -H 'Content-Type: application/json' -d '${body}'`;
}
