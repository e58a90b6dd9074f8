// Voting: two drawings of a prompt, one key for the better. The next two are drawn while the person looks.

import { getJSON, postJSON, server } from "./api.js";
import { startDrawings } from "./tiles.js";
import { find, typing } from "./ui.js";

const KEYS = {
  ArrowLeft: "left", 1: "left", f: "left", ArrowRight: "right", 2: "right", j: "right",
  ArrowDown: "tie", " ": "tie", z: "undo", Backspace: "undo",
};
const SAID = { left: "Left, kept.", right: "Right, kept.", tie: "Neither, kept." };

export class Voting {
  constructor(card) {
    this.card = card;
    this.state = null; // what the server says of votes
    this.pair = null; // what is voted on: a run of two drawings
    this.next = null;
    this.busy = false; // one vote at a time: a key held down votes once
    find("vote-form").onsubmit = (event) => { event.preventDefault(); this.begin(); };
    for (const what of ["left", "right", "tie", "undo"]) find(`vote-${what}`).onclick = () => this.act(what);
    this.refresh();
  }

  say(words, bad = false) {
    find("vote-says").textContent = words;
    find("vote-says").classList.toggle("bad", bad);
  }

  /** Ask whether the server keeps votes. */
  async refresh() {
    if (!this.card.votes) this.state = null;
    else {
      try {
        this.show(await getJSON("/votes"));
      } catch {
        return; // it is asked again when the server is there
      }
    }
    find("vote-closed").hidden = this.state !== null;
    find("vote-open").hidden = this.state === null;
  }

  show(state) {
    this.state = state;
    find("vote-undo").disabled = state.last === null;
    find("vote-file").textContent = `${state.votes} ${state.votes === 1 ? "vote" : "votes"} in ${state.file}`;
  }

  begin() {
    const prompt = find("vote-prompt").value.trim();
    if (!prompt) {
      this.say("Say what shall be drawn.", true);
      return;
    }
    if (server.state !== "ready") {
      this.say("The server is not there; wait until it is.", true);
      return;
    }
    this.next?.stop();
    this.pair?.stop();
    this.next = null;
    this.say("");
    this.set(this.draw(prompt));
    document.activeElement?.blur(); // so that keys vote
  }

  draw(prompt) {
    const job = { prompt, settings: { n: 2 }, size: this.card.size, model: this.card.id };
    job.settings.guidance_scale = this.card.sampling.guidance_scale;
    job.settings.temperature = this.card.sampling.temperature;
    const run = startDrawings(job, () => {}, null);
    run.prompt = prompt;
    run.ready = false;
    run.ended.then((all) => {
      run.ready = all;
      if (run !== this.pair) return;
      if (all) this.ready();
      else this.say("The drawings did not come; draw two again.", true);
    }, (error) => run === this.pair && this.say(error.message, true));
    return run;
  }

  set(run) {
    this.pair = run;
    find("vote-sides").hidden = false;
    for (const [at, side] of ["left", "right"].entries()) {
      find(`vote-${side}`).querySelector(".frame, .tile").replaceWith(run.tiles[at].figure);
      find(`vote-${side}`).classList.remove("picked");
      find(`vote-${side}`).disabled = true;
    }
    find("vote-tie").disabled = true;
    find("vote").dataset.pair = "";
    if (run.ready) this.ready();
  }

  ready() {
    for (const what of ["left", "right", "tie"]) find(`vote-${what}`).disabled = false;
    find("vote").dataset.pair = this.pair.tiles.map((tile) => tile.entry.seed).join("-");
    this.next ??= this.draw(this.pair.prompt);
  }

  async act(what) {
    if (this.busy || this.state === null) return;
    if (what === "undo" ? this.state.last === null : !this.pair?.ready) return;
    this.busy = true;
    try {
      if (what === "undo") {
        const found = await this.post("/votes/undo", { pair: this.state.last });
        this.say(found.result === "undone" ? "The last vote is taken back." : "Another tab has voted since; nothing was taken back.");
      } else {
        if (what !== "tie") find(`vote-${what}`).classList.add("picked");
        const [left, right] = this.pair.tiles.map((tile) => tile.entry.remembered);
        const { result } = await this.post("/votes", { left, right, choice: what });
        this.say({ kept: SAID[what], already: "That pair already had a vote; it counts once.", equal: "Both are the same drawing; nothing was kept." }[result]);
        this.further();
      }
    } catch (error) {
      this.refused(error);
    }
    this.busy = false;
  }

  async post(path, body) {
    const found = await postJSON(path, body, { "X-Token": this.state.token });
    this.show(found);
    return found;
  }

  further() {
    const next = this.next?.tiles.every((tile) => !tile.figure.classList.contains("failed")) ? this.next : null;
    const { prompt } = this.pair;
    this.next = null;
    this.set(next ?? this.draw(prompt));
  }

  async refused(error) {
    for (const side of ["left", "right"]) find(`vote-${side}`).classList.remove("picked");
    if (error.status === 403 || error.status === 404) { // the server was started again and knows none of the drawings
      await this.refresh();
      this.say("The server was started again: vote on these two instead.");
      this.next?.stop();
      this.next = null;
      if (this.pair) this.further();
      return;
    }
    this.say(`Not kept: ${error.message}`, true);
  }

  /** A key, while this page is shown. */
  key(event) {
    const what = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!what || event.ctrlKey || event.metaKey || event.altKey || typing(event)) return;
    if (event.key === " " && document.activeElement?.tagName === "BUTTON") return; // it presses that button
    event.preventDefault();
    if (!event.repeat) this.act(what);
  }
}
