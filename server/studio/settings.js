// The form: its limits and defaults are the model's; its values are those of a request.

import { $, el } from "./dom.js";

const NUMBERS = ["n", "seed", "cond_scale", "temperature", "top_p", "top_k", "num_candidates"];
const FOLDED = ["temperature", "top_p", "top_k", "num_candidates", "rank"];
const SEEDS = 2 ** 31;

const form = $("composer");
const field = (name) => form.elements.namedItem(name);
let defaults = {};

/** Follow what a model can do: its capabilities are the server's. */
export function follow(capabilities) {
  const rank = capabilities.clip ? "clip" : "likelihood", { top_k: topK } = capabilities.defaults;
  defaults = { n: Math.min(4, capabilities.max_n), seed: "", num_candidates: "", rank, ...capabilities.defaults };
  // Below 1 it is the share of codes that is not taken: shown as the number that is.
  if (topK > 0 && topK < 1) defaults.top_k = Math.max(1, Math.floor((1 - topK) * capabilities.num_codes));
  $("guidance-field").hidden = !capabilities.guidance;
  $("rank-field").hidden = !capabilities.clip;
  // Pixels of small pictures are shown as such where these are large.
  document.documentElement.toggleAttribute("data-fine", capabilities.image_size >= 128);
  field("n").max = field("num_candidates").max = capabilities.max_n;
  field("top_k").max = capabilities.num_codes;
  const examples = (capabilities.examples ?? []).slice(0, 6).map((text) =>
    el("button", { type: "button", onclick: () => { field("prompt").value = text; field("prompt").focus(); } }, text));
  $("examples").replaceChildren(...examples);
  write(defaults);
}

/** Show settings in the form. What they do not say stays. */
export function write(settings) {
  for (const [name, value] of Object.entries(settings)) {
    if (field(name)) field(name).value = value ?? "";
  }
  show();
}

/** The form's values as a request without a prompt of its own: empty fields are left to the server. */
export function read() {
  const settings = { prompt: field("prompt").value.trim() };
  for (const name of NUMBERS) {
    if (field(name).value !== "" && !field(name).closest("[hidden]")) settings[name] = Number(field(name).value);
  }
  if (!$("rank-field").hidden) settings.rank = field("rank").value;
  return settings;
}

/** A seed for a run that was not given one, so that it can be repeated. */
export const newSeed = () => Math.floor(Math.random() * SEEDS);

/** Mark the field that an error is about, if it is one of the form; show it. */
export function blame(name) {
  for (const each of form.elements) each.removeAttribute("aria-invalid");
  const wrong = name && field(name);
  if (!wrong) return;
  wrong.setAttribute("aria-invalid", "true");
  if (FOLDED.includes(name)) $("more").open = true;
}

function show() {
  for (const output of form.querySelectorAll("output")) output.value = Number(field(output.htmlFor.value).value).toString();
  const changed = FOLDED.filter((name) => field(name).value !== String(defaults[name] ?? "")).length;
  $("changed").textContent = changed ? `${changed} changed` : "";
}

form.addEventListener("input", (event) => {
  event.target.removeAttribute("aria-invalid");
  show();
});
// A folded field cannot say what is wrong with it.
form.addEventListener("invalid", (event) => { if (event.target.closest("details")) $("more").open = true; }, true);
form.addEventListener("click", (event) => {
  const step = event.target.closest("[data-step]")?.dataset.step;
  if (!step) return;
  const n = field("n");
  n.value = Math.min(Math.max(Number(n.value) + Number(step), n.min), n.max);
});
$("defaults").addEventListener("click", () => {
  write(Object.fromEntries(FOLDED.map((name) => [name, defaults[name]])));
});
field("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
