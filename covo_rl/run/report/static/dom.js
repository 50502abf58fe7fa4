// Elements and text. Data reaches the page through textContent alone; what does not print is written as its escape.

const UNPRINTABLE = /(?![\n\t])[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/u;
const UNPRINTABLES = new RegExp(`(${UNPRINTABLE.source})`, "gu");

function escaped(character) {
  const code = character.codePointAt(0);
  if (code < 0x100) return "\\x" + code.toString(16).padStart(2, "0");
  return code < 0x10000 ? "\\u" + code.toString(16).padStart(4, "0") : "\\U" + code.toString(16).padStart(8, "0");
}

/** Text as a page may show it: controls, bidi marks, zero-width characters and lone surrogates escaped. */
const visible = (text) => String(text).replace(UNPRINTABLES, escaped);

/** el("button", {class: "x", on: {click: f}, "aria-label": "y"}, child, "text", null) */
function el(name, attributes = {}, ...children) {
  return dress(document.createElement(name), attributes, children);
}

/** The same for a drawing. */
const svg = (name, attributes = {}, ...children) =>
  dress(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

function dress(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || (value === false && !key.startsWith("aria-"))) continue;
    if (key === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else if (key === "style") for (const [rule, to] of Object.entries(value)) node.style.setProperty(rule, to);
    else node.setAttribute(key, value === true && !key.startsWith("aria-") ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** An element that holds what a model or a file wrote: isolated in direction, escapes set apart. */
function said(name, className, text) {
  const node = el(name, { class: className, dir: "auto" });
  String(text)
    .split(UNPRINTABLES)
    .forEach((part, i) => {
      if (i % 2) node.append(el("span", { class: "escape" }, escaped(part)));
      else if (part) node.append(part);
    });
  return node;
}

const button = (label, handler, attributes = {}) =>
  el("button", { type: "button", ...attributes, on: { click: handler } }, label);

/** A link that leaves the page; what is no http(s) address, as a page of the docs, stays text. */
function link(text, href) {
  if (!/^https?:\/\//i.test(href)) return said("span", "quiet", href);
  return el("a", { href, rel: "noopener noreferrer", target: "_blank" }, visible(text));
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** A number with about three significant digits; a dash where there is none. */
function number(value, digits = 3) {
  if (!isNumber(value)) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6))
    return value.toExponential(1).replace("-", "−");
  const text = Number.isInteger(value)
    ? value.toLocaleString("en")
    : value.toFixed(Math.abs(value) >= 100 ? 0 : digits - 1);
  return text.replace("-", "−");
}

const fixed = (value) =>
  isNumber(value)
    ? value
        .toFixed(2)
        .replace(/^-0\.00$/, "0.00")
        .replace("-", "−")
    : "–";

/** Two decimals with a sign; none for what rounds to zero. */
function signed(value) {
  if (!isNumber(value)) return "–";
  const text = Math.abs(value).toFixed(2);
  return (Number(text) === 0 ? "" : value > 0 ? "+" : "−") + text;
}
const percent = (value) => (isNumber(value) ? (100 * value).toFixed(1) : "–");
const plural = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
const clock = (seconds) => `${Math.floor(seconds / 60)}:${(seconds % 60).toFixed(1).padStart(4, "0")}`;
const cssColor = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const runLetter = (run) => String.fromCharCode(65 + (run % 26));
