// The studio: a form, the pictures it asks the server for, and what was made in this session.

import { ApiError, chooses, models, sample, setKey } from "./api.js";
import { $, el, plural } from "./dom.js";
import { completion, Editor, lowerHalf, squared } from "./editor.js";
import { dataUrl, Gallery } from "./gallery.js";
import { History } from "./history.js";
import { blame, follow, newSeed, read, write } from "./settings.js";

let offered = [];
let running = null; // {run, controller}

const model = () => offered.find(({ id }) => id === $("model").value);
const gallery = new Gallery($("shown"), {
  variations: (run) => start(run.settings.prompt, { ...run.settings, seed: newSeed() }, run.source),
  reuse: (run) => { write(run.settings); $("prompt").focus(); say("The form has this run's settings."); },
  paint: (run, picture) => editor.open(dataUrl(picture), run.settings.prompt, (model()?.capabilities ?? run).grid),
  lowerHalf: (run, picture) =>
    start(run.settings.prompt, { ...run.settings, seed: newSeed() }, { url: dataUrl(picture), marked: lowerHalf(run.grid) }),
});
const history = new History((run) => gallery.show(run));
const editor = new Editor($("editor"), (prompt, source) => start(prompt, withSeed(read()), source));

const say = (text) => { $("status").textContent = text; };
const withSeed = (settings) => ({ ...settings, seed: settings.seed ?? newSeed() });

// ---- a run, from the request to its pictures

async function start(prompt, settings, source) {
  if (running) return say("Pictures are being made already: wait, or cancel.");
  if (!model()) return connect();
  const { grid } = model().capabilities;
  const known = !chooses(settings);
  const pictures = Array.from({ length: settings.n }, (_, place) => ({ place, number: known ? place : null, state: "waiting" }));
  const run = {
    time: Date.now(), state: "running", settings: { ...settings, prompt }, source, pictures, grid,
    sampledCodes: source ? source.marked.filter(Boolean).length : grid * grid,
  };
  running = { run, controller: new AbortController() };
  busy(true);
  notice(null);
  blame(null);
  history.add(run);
  history.select(run);
  const { top } = $("shown").getBoundingClientRect();
  if (top < 0 || top > innerHeight / 2) $("shown").scrollIntoView();
  say(`Sampling ${plural(settings.n, "picture")} …`);
  const begin = performance.now();
  try {
    await receive(run, running.controller.signal);
    run.state = "done";
    run.seconds = (performance.now() - begin) / 1000;
    say(`${plural(settings.n, "picture")} in ${run.seconds.toFixed(1)} seconds.`);
  } catch (error) {
    run.state = error.name === "AbortError" ? "cancelled" : "failed";
    if (run.state === "cancelled") say("Cancelled.");
    else report(error, () => start(prompt, settings, source));
  } finally {
    running = null;
    busy(false);
    settle(run);
  }
}

async function receive(run, signal) {
  const source = run.source && (await completion(run.source));
  const done = ({ state }) => state === "done";
  for await (const event of sample({ model: $("model").value, ...run.settings }, source, signal)) {
    const completed = event.type.endsWith(".completed");
    const own = run.pictures.find(({ number }) => number === event.image_index);
    const picture = own ?? run.pictures.find(({ number }) => number === null);
    if (!picture) continue;
    Object.assign(picture, {
      b64_json: event.b64_json, state: completed ? "done" : "partial", number: event.image_index,
      log_likelihood: event.log_likelihood, clip_score: event.clip_score,
    });
    if (completed) say(`${run.pictures.filter(done).length} of ${plural(run.pictures.length, "picture")} …`);
    gallery.update(run, picture);
  }
  if (!run.pictures.every(done)) throw new ApiError("The connection ended before all pictures were there.");
}

/** Keep a run's finished pictures; forget it where there are none. */
function settle(run) {
  if (run.pictures.some(({ state }) => state === "done")) {
    history.save();
    if (history.shown === run) history.select(run);
    return;
  }
  history.drop(run);
  if (history.shown === run) history.select(history.runs[0] ?? null);
}

function busy(is) {
  $("generate").textContent = is ? "Generating …" : "Generate";
  $("generate").setAttribute("aria-disabled", String(is));
  const focused = document.activeElement === $("cancel");
  $("cancel").hidden = !is;
  if (focused && !is) $("generate").focus();
}

// ---- errors

let countdown = null;

function notice(content) {
  clearInterval(countdown);
  $("notice").hidden = !content;
  $("notice").replaceChildren(...(content ?? []));
  if (content) $("notice").scrollIntoView({ block: "nearest" });
}

/** Say what went wrong, with a way to try again; a busy server is tried again by itself. */
function report(error, again) {
  say("");
  if (!(error instanceof ApiError)) console.error(error);
  if (error.status === 401) return askForKey(error.message, again);
  blame(error.param);
  const retry = el("button", { type: "button", onclick: () => { notice(null); again(); } }, "Try again");
  const close = el("button", { type: "button", onclick: () => notice(null) }, "Dismiss");
  if (error.status !== 429) return notice([el("p", {}, error.message), retry, close]);
  let seconds = Math.ceil(error.retryAfter ?? 5);
  // Read out once: the seconds are for the eye.
  const timer = el("span", { "aria-hidden": "true" });
  close.textContent = "Give up";
  retry.textContent = "Try now";
  notice([el("p", {}, `${error.message}. Trying again by itself `, timer), retry, close]);
  const tick = () => {
    timer.textContent = `in ${seconds} s`;
    if (seconds-- <= 0) retry.click();
  };
  tick();
  countdown = setInterval(tick, 1000);
}

function askForKey(problem, again) {
  const dialog = $("key");
  $("key-problem").textContent = problem;
  $("key-value").value = "";
  dialog.querySelector("form").onsubmit = () => { setKey($("key-value").value); notice(null); again(); };
  notice([el("p", {}, problem), el("button", { type: "button", onclick: () => dialog.showModal() }, "Enter a key")]);
  dialog.showModal();
}

// ---- what the person does

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const settings = withSeed(read());
  start(settings.prompt, settings);
});
$("cancel").addEventListener("click", () => running?.controller.abort());

async function open(file) {
  if (!file || !model()) return;
  try {
    const { image_size: size, grid } = model().capabilities;
    editor.open(await squared(file, size), $("prompt").value, grid);
  } catch {
    notice([el("p", {}, `${file.name} is not a picture that this browser can read.`), el("button", { type: "button", onclick: () => notice(null) }, "Dismiss")]);
  }
}

$("upload").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => { open($("file").files[0]); $("file").value = ""; });
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => { event.preventDefault(); open(event.dataTransfer.files[0]); });

async function connect() {
  try {
    offered = await models();
  } catch (error) {
    return report(error, connect);
  }
  $("generate").disabled = false;
  $("model").replaceChildren(...offered.map(({ id }) => el("option", { value: id }, id)));
  $("model").disabled = offered.length < 2;
  follow(model().capabilities);
}

$("model").addEventListener("change", () => follow(model().capabilities));
history.select(history.runs[0] ?? null);
connect();
