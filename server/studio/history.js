// The runs of this session: kept in the tab, newest first, until it is closed.

import { $, el } from "./dom.js";
import { dataUrl, ordered, summary } from "./gallery.js";

const KEY = "studio.runs";
const MOST = 50;

export class History {
  constructor(show) {
    Object.assign(this, { show, runs: [], shown: null });
    try {
      this.runs = JSON.parse(sessionStorage.getItem(KEY)) ?? [];
    } catch {
      // Written by another version: begin anew.
    }
    $("forget").addEventListener("click", () => {
      if (!confirm("Forget all pictures of this session? What was not downloaded is lost.")) return;
      this.runs = this.runs.filter((run) => run.state === "running");
      this.save();
      this.select(this.runs[0] ?? null);
    });
  }

  add(run) {
    this.runs = [run, ...this.runs].slice(0, MOST);
  }

  drop(run) {
    this.runs = this.runs.filter((each) => each !== run);
    this.render();
  }

  /** Show a run, or the first impression where it is null. */
  select(run) {
    this.shown = run;
    this.show(run);
    this.render();
  }

  /** Keep what fits; the oldest runs go first. */
  save() {
    const kept = this.runs.filter((run) => run.state !== "running");
    for (let count = kept.length; count >= 0; count--) {
      try {
        return sessionStorage.setItem(KEY, JSON.stringify(kept.slice(0, count)));
      } catch {
        // Full: try with one run less.
      }
    }
  }

  render() {
    $("history").hidden = !this.runs.length;
    const list = $("history").querySelector("ol");
    const place = [...list.children].findIndex((entry) => entry.contains(document.activeElement));
    list.replaceChildren(...this.runs.map((run) => this.entry(run)));
    if (place >= 0) list.children[place]?.firstChild.focus();
  }

  entry(run) {
    const pictures = ordered(run).filter((picture) => picture.b64_json).slice(0, 4);
    const time = new Date(run.time).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    return el("li", {}, el("button", { type: "button", "aria-current": run === this.shown && "true", onclick: () => this.select(run) },
      el("span", { class: "thumbs" }, ...pictures.map((picture) => el("img", { src: dataUrl(picture), alt: "" }))),
      el("span", { class: "what" }, run.settings.prompt), el("span", { class: "meta" }, `${time}  ·  ${summary(run)}`)));
  }
}
