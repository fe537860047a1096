// Completion: a picture under its grid of codes, where the parts to paint anew are marked by brush, keys or presets.

import { $, closable, el, plural } from "./dom.js";

const LARGEST = 512; // pixels of an uploaded picture's side that are sent, at most, or the model's where that is larger
const PRESETS = {
  "Lower half": (row, column, grid) => row >= grid / 2,
  "Lower quarter": (row, column, grid) => row >= (3 * grid) / 4,
  "Right half": (row, column, grid) => column >= grid / 2,
  "Upper half": (row, column, grid) => row < grid / 2,
  "Everything": () => true,
};
const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

/** The centre square of a picture file as a PNG's data URL, a multiple of the model's size. Rejects what is none. */
export async function squared(file, imageSize) {
  const bitmap = await createImageBitmap(file);
  const side = Math.min(bitmap.width, bitmap.height);
  const size = imageSize * Math.max(1, Math.floor(Math.min(side, LARGEST) / imageSize));
  const canvas = el("canvas", { width: size, height: size }), pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, size, size);
  pen.drawImage(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side, 0, 0, size, size);
  return canvas.toDataURL("image/png");
}

/** What is sent to complete a picture: itself and its mask, transparent where the model paints. */
export async function completion({ url, marked }) {
  const picture = toBlob(url), { width: size } = await createImageBitmap(picture);
  const canvas = el("canvas", { width: size, height: size }), pen = canvas.getContext("2d");
  const grid = Math.sqrt(marked.length), side = size / grid;
  pen.fillRect(0, 0, size, size);
  marked.forEach((on, cell) => {
    if (on) pen.clearRect((cell % grid) * side, Math.floor(cell / grid) * side, side, side);
  });
  return { picture, mask: toBlob(canvas.toDataURL("image/png")) };
}

function toBlob(url) {
  const bytes = Uint8Array.from(atob(url.slice(url.indexOf(",") + 1)), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: "image/png" });
}

export const lowerHalf = (grid) => preset("Lower half", grid);

function preset(name, grid) {
  return Array.from({ length: grid * grid }, (_, cell) => PRESETS[name](Math.floor(cell / grid), cell % grid, grid));
}

export class Editor {
  /** submit(prompt, source) is called with what to complete. */
  constructor(dialog, submit) {
    Object.assign(this, { dialog: closable(dialog), submit, past: [], active: 0, brush: 1 });
    this.board = $("cells");
    this.board.addEventListener("pointerdown", (event) => this.press(event));
    this.board.addEventListener("pointermove", (event) => this.drag(event));
    for (const kind of ["pointerup", "pointercancel"]) this.board.addEventListener(kind, () => { this.last = null; });
    this.board.addEventListener("pointerleave", () => this.hover([]));
    this.board.addEventListener("keydown", (event) => this.key(event));
    $("undo").addEventListener("click", () => this.undo());
    $("clear").addEventListener("click", () => this.change(() => this.marked.fill(false)));
    $("presets").replaceChildren(...Object.keys(PRESETS).map((name) => el("button", {
      type: "button", onclick: () => this.change(() => { this.marked = preset(name, this.grid); }) }, name)),
    el("button", { type: "button", onclick: () => this.change(() => { this.marked = this.marked.map((on) => !on); }) }, "Invert"));
    this.dialog.addEventListener("keydown", (event) => {
      if (event.key === "z" && (event.ctrlKey || event.metaKey) && event.target.tagName !== "TEXTAREA") this.undo();
    });
    this.dialog.querySelector("form").addEventListener("submit", (event) => this.send(event));
  }

  /** Open on a picture (a data URL). */
  open(url, prompt, grid) {
    Object.assign(this, { url, grid, past: [], active: 0, marked: new Array(grid * grid).fill(false) });
    $("editor-picture").src = url;
    $("editor-prompt").value = prompt;
    const sizes = [1, 2, 3, 4, 6].filter((size) => size <= grid / 2.5);
    this.brush = Math.max(1, ...sizes.filter((size) => size <= grid / 8));
    $("brush-size").replaceChildren(...sizes.map((size) => el("label", {},
      el("input", { type: "radio", name: "size", value: size, checked: size === this.brush, onchange: () => { this.brush = size; } }),
      el("span", {}, el("span", { class: "unseen" }, "Size "), `${size}×${size}`))));
    const cell = (row, column) => el("div", { role: "gridcell", tabindex: -1, "aria-label": `row ${row + 1}, column ${column + 1}` });
    const range = Array.from({ length: grid }, (_, index) => index);
    this.board.replaceChildren(...range.map((row) => el("div", { role: "row" }, ...range.map((column) => cell(row, column)))));
    this.board.style.setProperty("--grid", grid);
    this.cells = [...this.board.querySelectorAll("[role=gridcell]")];
    this.render();
    this.dialog.showModal();
    this.cells[0].focus({ focusVisible: false });
  }

  render() {
    this.cells.forEach((cell, index) => {
      cell.setAttribute("aria-selected", String(this.marked[index]));
      cell.tabIndex = index === this.active ? 0 : -1;
    });
    const count = this.marked.filter(Boolean).length;
    $("undo").disabled = !this.past.length;
    $("clear").disabled = !count;
    $("complete").disabled = !count;
    $("editor-status").textContent = count ? `${count} of ${plural(this.marked.length, "code")} marked` : "Nothing is marked yet.";
  }

  change(edit) {
    this.past.push([...this.marked]);
    edit();
    this.render();
  }

  undo() {
    if (this.past.length) this.marked = this.past.pop();
    this.render();
  }

  /** The cells under the brush at a pointer. */
  under(x, y) {
    const box = this.board.getBoundingClientRect(), { grid, brush } = this;
    const first = (position, start, length) =>
      Math.min(Math.max(Math.round(((position - start) / length) * grid - brush / 2), 0), grid - brush);
    const top = first(y, box.top, box.height), left = first(x, box.left, box.width);
    return Array.from({ length: brush * brush }, (_, index) => (top + Math.floor(index / brush)) * grid + left + (index % brush));
  }

  paint(from, to) {
    const on = this.dialog.querySelector("[name=brush]:checked").value === "mark";
    const steps = Math.ceil(Math.hypot(to[0] - from[0], to[1] - from[1]) / 4) + 1; // leave no gaps where the pointer is fast
    for (let step = 1; step <= steps; step++) {
      const [x, y] = [0, 1].map((axis) => from[axis] + ((to[axis] - from[axis]) * step) / steps);
      for (const cell of this.under(x, y)) this.marked[cell] = on;
    }
    this.render();
  }

  press(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.board.setPointerCapture(event.pointerId);
    this.past.push([...this.marked]);
    this.last = [event.clientX, event.clientY];
    [this.active] = this.under(...this.last);
    this.paint(this.last, this.last);
    this.cells[this.active].focus({ focusVisible: false });
  }

  drag(event) {
    const here = [event.clientX, event.clientY];
    this.hover(event.pointerType === "mouse" ? this.under(...here) : []);
    if (!this.last) return;
    this.paint(this.last, here);
    this.last = here;
  }

  hover(cells) {
    this.cells.forEach((cell, index) => cell.classList.toggle("under", cells.includes(index)));
  }

  key(event) {
    const { grid, active } = this, row = Math.floor(active / grid), column = active % grid;
    if (event.key === " " || event.key === "Enter") {
      this.change(() => { this.marked[active] = !this.marked[active]; });
    } else if (event.key in STEPS) {
      const [down, right] = STEPS[event.key], within = (position) => Math.min(Math.max(position, 0), grid - 1);
      this.active = within(row + down) * grid + within(column + right);
      if (event.shiftKey) this.change(() => { this.marked[active] = this.marked[this.active] = true; });
    } else if (event.key === "Home" || event.key === "End") {
      this.active = row * grid + (event.key === "Home" ? 0 : grid - 1);
    } else {
      return;
    }
    event.preventDefault();
    this.render();
    this.cells[this.active].focus();
  }

  send(event) {
    event.preventDefault();
    if (!this.marked.includes(true)) return;
    this.dialog.close();
    this.submit($("editor-prompt").value.trim(), { url: this.url, marked: this.marked });
  }
}
