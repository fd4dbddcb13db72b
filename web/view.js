// What is shown: pictures on canvases, cards of samples, sliders of edits, messages.

import { disagreement, heatOf, imageOf, MAP_MAXIMUM, rampGradient } from "./pixels.js";

const EDIT_RANGE = 3; // standard deviations

export const $ = (id) => document.getElementById(id);

export const titleOf = (i) => (i === 0 ? "Point estimate" : `Sample ${i + 1}`);
const psnrText = (psnr) => `LR-PSNR ${psnr.toFixed(1)} dB`;
const signed = (value) => (value > 0 ? `+${value}` : String(value).replace("-", "−"));
const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

/** Shows what went wrong; nothing for "". */
export function tell(text) {
  $("message").hidden = !text;
  $("message").textContent = text;
  if (text) $("message").scrollIntoView({ block: "nearest" });
}

/** Shows how it went, and lets screen readers say it. */
export function say(text) {
  $("status").textContent = text;
}

/** Shows what was found in the picture; nothing for "". */
export function note(text) {
  $("found").hidden = !text;
  $("found").textContent = text;
}

/** Puts an ImageData on a canvas, which takes its size. */
export function paint(canvas, image) {
  canvas.width = image.width;
  canvas.height = image.height;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/**
 * Shows so many cards.
 * @param {number} count Samples.
 * @param {number} chosen The one that is shown large.
 * @param {(i: number) => void} choose Called when another is chosen.
 */
export function showCards(count, chosen, choose) {
  const list = $("faces");
  while (list.children.length > count) list.lastChild.remove();
  for (let i = list.children.length; i < count; i++) {
    const item = document.createElement("li");
    const button = Object.assign(document.createElement("button"), { type: "button", className: "waiting" });
    const canvas = document.createElement("canvas");
    canvas.dataset.sample = i;
    button.append(canvas, String(i + 1));
    button.setAttribute("aria-label", titleOf(i));
    button.addEventListener("click", () => choose(i));
    item.append(button);
    list.append(item);
  }
  [...list.querySelectorAll("button")].forEach((button, i) => button.setAttribute("aria-pressed", i === chosen));
}

/** Fills the card of sample i. */
export function showCard(i, { planes, psnr }, size) {
  const button = $("faces").children[i].firstChild;
  paint(button.querySelector("canvas"), imageOf(planes, size));
  button.title = psnrText(psnr);
  button.classList.remove("waiting");
}

/** Shows a face large. */
export function showFace({ planes, psnr }, title, size) {
  paint($("face"), imageOf(planes, size));
  $("face-title").textContent = title;
  $("face-text").textContent = psnrText(psnr);
  $("compare").classList.remove("waiting");
}

/** Hides faces from number `first` on, since they are not of what is asked now; the map, too. */
export function hideFaces(first = 0) {
  for (const item of [...$("faces").children].slice(first)) item.firstChild.classList.add("waiting");
  $("map").classList.add("waiting");
  $("map-text").textContent = "";
}

/** Shows the input alone, until its faces are there. */
export function hideFace() {
  $("compare").classList.add("waiting");
  $("face-title").textContent = "The input";
  $("face-text").textContent = "";
  say("");
}

/** Shows where samples disagree, on a scale that is the same for all inputs. */
export function showMap(faces, size) {
  const map = disagreement(faces.map(({ planes }) => planes));
  const greys = (share) => Math.round(255 * share);
  paint($("map"), heatOf(map, size));
  $("map").classList.remove("waiting");
  document.querySelector(".ramp").style.background = rampGradient();
  $("map-most").textContent = greys(MAP_MAXIMUM);
  const mean = map.reduce((a, b) => a + b, 0) / map.length;
  const most = map.reduce((a, b) => Math.max(a, b), 0);
  $("map-text").textContent = `Dark is where all samples agree, bright is where the input does not say. They differ by ` +
    `${greys(mean)} of 255 grey levels on average, ${greys(most)} at most.`;
}

/**
 * Shows squares of faces to choose from, if there are several.
 * @param {{x: number, y: number, n: number, angle: number}[]} squares In pixels of the picture.
 * @param {ImageBitmap} picture The picture.
 * @param {(i: number) => void} choose Called when one is chosen.
 */
export function showBoxes(squares, { width, height }, choose) {
  $("boxes").replaceChildren(...(squares.length < 2 ? [] : squares.map(({ x, y, n, angle }, i) => {
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.setAttribute("aria-label", `Face ${i + 1} of ${squares.length}`);
    const percent = (value, whole) => `${(100 * value) / whole}%`;
    const places = { left: percent(x, width), top: percent(y, height), width: percent(n, width), height: percent(n, height) };
    Object.assign(button.style, places, { rotate: `${angle}rad` });
    button.addEventListener("click", () => choose(i));
    return button;
  })));
}

/**
 * Shows one slider per edit.
 * @param {{name: string}[]} edits The edits.
 * @param {number[]} strengths Where they stand.
 * @param {(i: number, strength: number) => void} set Called when one is moved.
 */
export function showEdits(edits, strengths, set) {
  $("edits").hidden = edits.length === 0;
  $("reset").disabled = strengths.every((value) => value === 0);
  $("sliders").replaceChildren(...edits.map(({ name }, i) => {
    const label = Object.assign(document.createElement("label"), { className: "slider" });
    const text = Object.assign(document.createElement("span"), { textContent: sentence(name.replaceAll("-", " ")) });
    const range = { type: "range", min: -EDIT_RANGE, max: EDIT_RANGE, step: 0.25, value: strengths[i], name };
    const slider = Object.assign(document.createElement("input"), range);
    const output = Object.assign(document.createElement("output"), { value: signed(strengths[i]) });
    slider.addEventListener("input", () => {
      output.value = signed(Number(slider.value));
      set(i, Number(slider.value));
    });
    label.append(text, slider, output);
    return label;
  }));
}
