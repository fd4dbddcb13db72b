// What is shown: pictures on canvases, cards of samples, sliders of edits, messages.

import { disagreement, heatOf, imageOf, rampGradient } from "./pixels.js";

const EDIT_RANGE = 3; // standard deviations

export const $ = (id) => document.getElementById(id);

const titleOf = (i) => (i === 0 ? "Point estimate" : `Sample ${i + 1}`);
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

/** Puts an ImageData on a canvas, which takes its size. */
export function paint(canvas, image) {
  canvas.width = image.width;
  canvas.height = image.height;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/**
 * Shows so many cards, empty ones where there were none.
 * @param {number} count Samples.
 * @param {number} chosen The one that is shown large.
 * @param {(i: number) => void} choose Called when another is chosen.
 */
export function showCards(count, chosen, choose) {
  const list = $("faces");
  while (list.children.length > count) list.lastChild.remove();
  for (let i = list.children.length; i < count; i++) {
    const item = document.createElement("li");
    const button = Object.assign(document.createElement("button"), { type: "button" });
    const canvas = document.createElement("canvas");
    canvas.dataset.sample = i;
    button.append(canvas, i === 0 ? titleOf(i) : String(i + 1), document.createElement("small"));
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
  button.querySelector("small").textContent = psnrText(psnr);
}

/** Shows sample i large. */
export function showFace(i, { planes, psnr }, size) {
  paint($("face"), imageOf(planes, size));
  $("face-title").textContent = titleOf(i);
  $("face-text").textContent = psnrText(psnr);
}

/** Shows where samples disagree, the largest difference at the light end of the ramp. */
export function showMap(faces, size) {
  const map = disagreement(faces.map(({ planes }) => planes));
  const most = map.reduce((a, b) => Math.max(a, b), 0);
  paint($("map"), heatOf(map, size, Math.max(most, 1 / 255)));
  const ramp = Object.assign(document.createElement("i"), { className: "ramp" });
  ramp.style.background = rampGradient();
  $("map-text").replaceChildren("0", ramp, most.toFixed(2));
}

/** Takes away what belongs to an older picture. */
export function clear() {
  showCards(0);
  for (const id of ["face", "map"]) paint($(id), new ImageData(1, 1));
  for (const id of ["face-text", "map-text", "status"]) $(id).textContent = "";
  $("face-title").textContent = titleOf(0);
  for (const id of ["more", "save", "save-all"]) $(id).disabled = true;
}

/**
 * Shows one slider per edit, all at 0.
 * @param {{name: string}[]} edits The edits.
 * @param {(i: number, strength: number) => void} set Called when one is moved.
 */
export function showEdits(edits, set) {
  $("edits").hidden = edits.length === 0;
  $("reset").disabled = true;
  $("sliders").replaceChildren(...edits.map(({ name }, i) => {
    const label = Object.assign(document.createElement("label"), { className: "slider" });
    const text = Object.assign(document.createElement("span"), { textContent: sentence(name.replaceAll("-", " ")) });
    const range = { type: "range", min: -EDIT_RANGE, max: EDIT_RANGE, step: 0.25, value: 0, name };
    const slider = Object.assign(document.createElement("input"), range);
    const output = Object.assign(document.createElement("output"), { value: "0" });
    slider.addEventListener("input", () => {
      output.value = signed(Number(slider.value));
      set(i, Number(slider.value));
    });
    label.append(text, slider, output);
    return label;
  }));
}
