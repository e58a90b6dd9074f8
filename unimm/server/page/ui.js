// Small helpers to build the page. Words are set as text, never as HTML: they come from people and models.

const SVG = "http://www.w3.org/2000/svg";

export const find = (id) => document.getElementById(id);

/** An element with properties (`class`, `dataset`, `on…`, attributes) and children; null children are left out. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "class") made.className = value;
    else if (name === "dataset") Object.assign(made.dataset, value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** A picture from the sprite in the page. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A button with a picture and words. */
export function action(name, words, onclick, properties = {}) {
  return el("button", { type: "button", class: "plain small", onclick, ...properties }, icon(name), el("span", {}, words));
}

/** Say something for some seconds. */
export function toast(words, bad = false) {
  const note = el("p", { class: bad ? "toast bad" : "toast" }, words);
  find("toasts").append(note);
  setTimeout(() => note.remove(), bad ? 8000 : 4000);
}

/** Small drawings are shown with their pixels, larger ones smoothly. */
export function shown(image) {
  const mark = () => image.classList.toggle("pixels", image.naturalWidth <= 128);
  if (image.complete && image.naturalWidth) mark();
  image.addEventListener("load", mark);
  return image;
}

/** Two images on one another, and a line between them that moves by hand, finger or arrow keys. */
export function comparison(before, after, words = ["before", "after"]) {
  const range = el("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": `${words[0]} left, ${words[1]} right` });
  const upper = shown(el("img", { src: after, alt: words[1], class: "after" }));
  const box = el("div", { class: "comparison" }, shown(el("img", { src: before, alt: words[0] })), upper,
    el("span", { class: "tag left" }, words[0]), el("span", { class: "tag right" }, words[1]), range);
  const move = () => box.style.setProperty("--at", `${range.value}%`);
  range.addEventListener("input", move);
  upper.addEventListener("load", () => box.style.setProperty("--shape", `${upper.naturalWidth} / ${upper.naturalHeight}`));
  move();
  return box;
}

const urls = new WeakMap();

/** The address of an image in this page; the same for the same Blob. */
export function urlOf(blob) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

export function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
  return bytes;
}

export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

const MAX_SIDE = 2048; // pixels of an image that is sent; models look at fewer
const MAX_FILE = 64 * 2 ** 20;

/** An image file as it is sent: what the browser can read, upright, made smaller where it is large. */
export async function readImage(file) {
  if (file.size > MAX_FILE) throw new Error(`${file.name || "The image"} is larger than 64 MiB.`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "What came"} is no image that this browser can read.`);
  }
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && /^image\/(png|webp)$/.test(file.type)) return file;
  const canvas = el("canvas", { width: Math.max(1, Math.round(bitmap.width * scale)), height: Math.max(1, Math.round(bitmap.height * scale)) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return new Promise((resolve, reject) => canvas.toBlob(
    (blob) => (blob ? resolve(blob) : reject(new Error("The image could not be made smaller."))), "image/png"));
}

/** Image files of a drop, a paste or a choice. */
export function imageFiles(transfer) {
  return [...(transfer?.files ?? [])].filter((file) => file.type.startsWith("image/"));
}

export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = el("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

export function fileName(entry) {
  const words = entry.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "drawing";
  return `${words}-${entry.seed}.png`;
}

export const typing = (event) => /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName ?? "");
