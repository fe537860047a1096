// Small helpers to build elements.

export const $ = (id) => document.getElementById(id);

/** Make an element: `on…` properties are listeners, true sets an empty attribute, false and undefined none. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== undefined && child !== null && child !== false));
  return node;
}

/** One of the symbols in index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon, named for screen readers and as a tooltip. */
export const iconButton = (name, label, onclick) =>
  el("button", { type: "button", class: "iconed", "aria-label": label, title: label, onclick }, icon(name));

export const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/** A dialog that closes by its close button and by a click beside it. */
export function closable(dialog) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
  });
  return dialog;
}
