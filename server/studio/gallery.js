// A run's pictures: while they are sampled, then in order, each with what can be done with it.

import { $, closable, el, icon, iconButton, plural } from "./dom.js";

const ORDERS = {
  sampled: ["as sampled", (picture) => -picture.number],
  likelihood: ["by likelihood", (picture) => picture.log_likelihood],
  clip: ["by CLIP similarity", (picture) => picture.clip_score],
};
let order = null; // as chosen; at first the best that there is

export const dataUrl = (picture) => `data:image/png;base64,${picture.b64_json}`;

const finished = (run) => run.pictures.filter((picture) => picture.state === "done");
const scored = (run, name) => finished(run).length > 0 && finished(run).every((picture) => ORDERS[name][1](picture) != null);

const orderOf = (run) => [order, "clip", "likelihood"].find((name) => name && scored(run, name)) ?? "sampled";

/** The pictures of a run, the best first once all are there. */
export function ordered(run) {
  if (run.state === "running") return run.pictures;
  const score = ORDERS[orderOf(run)][1];
  return finished(run).sort((a, b) => score(b) - score(a));
}

const number = (value, digits) => value.toFixed(digits).replace("-", "−");

function score(run, picture) {
  if (orderOf(run) === "clip") return [el("span", { class: "unit" }, "CLIP "), number(picture.clip_score, 3)];
  if (picture.log_likelihood == null) return [];
  // Per code, so that the number does not depend on the image size.
  return [number(picture.log_likelihood / run.sampledCodes, 2), " ", el("span", { class: "unit" }, "nats/code")];
}

export function slug(text) {
  return text.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60) || "picture";
}

function download(run, picture) {
  const name = `${slug(run.settings.prompt)}-${run.settings.seed}-${picture.number}.png`;
  el("a", { href: dataUrl(picture), download: name }).click();
}

/** What a run is, in a line. */
export function summary(run) {
  const { settings } = run;
  const parts = [plural(run.pictures.length, "picture"), `seed ${settings.seed}`];
  if (settings.cond_scale > 1) parts.push(`guidance ${settings.cond_scale}`);
  if (run.source) parts.push(`${plural(run.sampledCodes, "code")} painted anew`);
  if (run.state === "cancelled") parts.push("cancelled");
  if (run.seconds) parts.push(`${run.seconds.toFixed(1)} s`);
  return parts.join("  ·  ");
}

/** Shows one run in the stage. actions: variations(run), reuse(run), paint(run, picture), lowerHalf(run, picture). */
export class Gallery {
  constructor(root, actions) {
    Object.assign(this, { root, actions, run: null });
    this.viewer = new Viewer($("viewer"), actions);
  }

  show(run) {
    this.run = run;
    this.render();
  }

  /** Show a run as it is now, if it is the one shown. */
  update(run, picture) {
    if (run !== this.run) return;
    const tile = picture && this.root.querySelector(`[data-place="${picture.place}"]`);
    if (!tile || run.state !== "running") return this.render();
    this.fill(tile, picture);
  }

  render() {
    const focused = this.root.contains(document.activeElement);
    this.root.replaceChildren(...(this.run ? this.content() : this.welcome()));
    if (focused) $("shown-title").focus(); // what had the focus is gone
  }

  content() {
    const { run } = this, pictures = ordered(run);
    const tiles = el("ol", { class: "tiles", "data-count": pictures.length > 12 ? "many" : Math.min(pictures.length, 4) },
      ...pictures.map((picture) => this.tile(run, picture)));
    tiles.style.setProperty("--grid", run.grid);
    return [this.heading(run), tiles];
  }

  welcome() {
    const places = Array.from({ length: 4 }, () => el("li", {}, el("div", { class: "frame" })));
    return [
      el("header", { class: "title" }, el("div", {},
        el("h2", { id: "shown-title", tabindex: -1 }, "What should the pictures show?"),
        el("p", { class: "meta" }, "Write a prompt or choose an example. The pictures appear here, code by code."))),
      el("ol", { class: "tiles", "data-count": 4, "aria-hidden": "true" }, ...places)];
  }

  heading(run) {
    const names = Object.keys(ORDERS).filter((name) => scored(run, name));
    const options = names.map((name) => el("option", { value: name, selected: name === orderOf(run) }, ORDERS[name][0]));
    const choose = (event) => { order = event.target.value; this.render(); $("order").focus(); };
    const several = run.state !== "running" && names.length > 1 && run.pictures.length > 1;
    return el("header", { class: "title" },
      run.source && origin(run.source),
      el("div", { class: "name" }, el("h2", { id: "shown-title", tabindex: -1 }, run.settings.prompt), el("p", { class: "meta" }, summary(run))),
      run.state !== "running" && el("div", { class: "deeds" },
        several && el("label", {}, el("span", { class: "unseen" }, "Order"), el("select", { id: "order", onchange: choose }, ...options)),
        el("button", { type: "button", onclick: () => this.actions.reuse(run) }, "Use settings"),
        el("button", { type: "button", onclick: () => this.actions.variations(run) }, "Variations")));
  }

  tile(run, picture) {
    const tile = el("li", { "data-place": picture.place });
    this.fill(tile, picture);
    return tile;
  }

  fill(tile, picture) {
    const { run } = this;
    const name = `Picture ${picture.place + 1} of ${run.pictures.length}: ${run.settings.prompt}`;
    tile.dataset.state = picture.state;
    const image = picture.b64_json && el("img", { src: dataUrl(picture), alt: picture.state === "done" ? name : `${name}, unfinished` });
    if (picture.state !== "done") return tile.replaceChildren(el("div", { class: "frame" }, image));
    const open = () => this.viewer.open(run, picture);
    tile.replaceChildren(
      el("button", { type: "button", class: "frame", "aria-label": `Open ${name}`, onclick: open }, image),
      el("div", { class: "caption" }, el("span", { class: "score" }, ...score(run, picture)),
        iconButton("paint", "Paint a part anew", () => this.actions.paint(run, picture)),
        iconButton("download", "Download", () => download(run, picture))));
  }
}

/** The picture that a run completes, with what it paints anew. */
function origin({ url, marked }) {
  const cells = marked.map((on) => el("span", { class: on && "marked" }));
  const cover = el("span", { class: "cover" }, ...cells);
  cover.style.setProperty("--grid", Math.sqrt(marked.length));
  return el("span", { class: "origin" }, el("img", { src: url, alt: "The picture before" }), cover);
}

/** One picture, large, with its settings. */
class Viewer {
  constructor(dialog, actions) {
    Object.assign(this, { dialog: closable(dialog), actions });
    dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") this.step(-1);
      if (event.key === "ArrowRight") this.step(1);
    });
  }

  open(run, picture) {
    Object.assign(this, { run, picture });
    this.render();
    if (!this.dialog.open) this.dialog.showModal();
  }

  step(by) {
    const pictures = ordered(this.run), place = pictures.indexOf(this.picture) + by;
    const within = document.activeElement?.dataset.by;
    this.open(this.run, pictures[(place + pictures.length) % pictures.length]);
    if (within) this.dialog.querySelector(`[data-by="${within}"]`).focus();
  }

  render() {
    const { run, picture, actions } = this, { settings } = run, pictures = ordered(run);
    const act = (deed) => () => { this.dialog.close(); deed(run, picture); };
    const facts = [
      ["Seed", settings.seed], ["Picture", `number ${picture.number}`],
      ["Log-likelihood", picture.log_likelihood == null ? null : `${number(picture.log_likelihood, 2)} nats`], ["CLIP similarity", picture.clip_score?.toFixed(3)],
      ["Guidance", settings.cond_scale], ["Temperature", settings.temperature], ["Top-k", settings.top_k],
      ["Top-p", settings.top_p], ["Candidates", settings.num_candidates],
    ].filter(([, value]) => value != null);
    const step = (by, name, label) => {
      const button = iconButton(name, label, () => this.step(by));
      button.dataset.by = by;
      return button;
    };
    this.dialog.replaceChildren(el("article", {},
      el("header", {}, el("h2", { id: "viewer-title" }, settings.prompt), closeButton()),
      el("img", { src: dataUrl(picture), alt: settings.prompt }),
      el("div", { class: "beside" },
        el("dl", {}, ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value))))),
        el("div", { class: "deeds" },
          el("button", { type: "button", class: "primary", onclick: () => download(run, picture) }, icon("download"), "Download PNG"),
          el("button", { type: "button", onclick: act(actions.paint) }, icon("paint"), "Paint a part anew"),
          el("button", { type: "button", onclick: act(actions.lowerHalf) }, "Keep the upper half"),
          el("button", { type: "button", onclick: act(actions.variations) }, icon("variations"), "Variations"),
          el("button", { type: "button", onclick: act(actions.reuse) }, "Use settings")),
        pictures.length > 1 && el("nav", { "aria-label": "Pictures of this run" }, step(-1, "previous", "Previous picture"),
          el("span", {}, `${pictures.indexOf(picture) + 1} of ${pictures.length}`), step(1, "next", "Next picture")))));
  }
}

function closeButton() {
  const button = iconButton("close", "Close");
  button.dataset.close = "";
  return button;
}
