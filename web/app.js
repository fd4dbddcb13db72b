// The page: a picture and a few settings in, samples out. Everything is computed here.

import { makeCompare, zoomNext } from "./compare.js";
import { Crop } from "./crop.js";
import { isUnexplained } from "./doubts.js";
import { offsetOf, readEdits } from "./edits.js";
import { Engine } from "./engine.js";
import { findFaces } from "./faces.js";
import { lowResolution } from "./input.js";
import { Loader } from "./loading.js";
import { faceNoise } from "./noise.js";
import { fileOf, readPicture } from "./picture.js";
import { bytesOf, imageOf, toEightBit } from "./pixels.js";
import { showSamples } from "./samples.js";
import { saveAll, savePicture } from "./saving.js";
import {
  $, hideFace, hideFaces, note, paint, say, showBoxes, showCard, showCards, showEdits, showFace, showMap, tell, titleOf,
} from "./view.js";
import { between } from "./walk.js";

const SAMPLES = 4; // at first, and how many more come at a time
const MOST = 64;
const SEED = 0; // as infer.py's default
const STEP = 40; // ms from picture to picture when the walk plays

const engine = new Engine("models");
const loader = new Loader(engine);
const crop = new Crop($("stage"), $("box"), $("zoom"));

let edits = []; // the directions that there are
let asked = null; // what the visitor wants: picture, name, size, squares of faces, samples, edits, fidelity
let input = null; // the low-resolution face of that; null while it is being made
let done = null; // the last complete result with all that made it, what "Save all" saves and Escape returns to
let shown = null; // the face that stands large, and the name of its file
let latest = 0; // number of the newest piece of work
let running = Promise.resolve(); // the work that was begun last
let playing = false;

const STOPPED = new Error("something newer was asked for");

/**
 * Does a piece of work once the one before has stopped; a newer one stops it.
 * @param {(current: () => void) => Promise<void>} job Calls `current` whenever it has waited, which ends it if it is not
 *     the newest any more.
 * @param {boolean} quiet Whether it leaves the faces as they are.
 */
function work(job, quiet = false) {
  const run = ++latest;
  const current = () => {
    if (run !== latest) throw STOPPED;
  };
  if (!quiet) setBusy(true);
  running = running.then(async () => {
    let reason = "";
    try {
      current();
      await job(current);
    } catch (error) {
      if (error !== STOPPED) reason = `The faces could not be made: ${error.message}.`;
    }
    if (run !== latest) return;
    tell(reason);
    setBusy(false);
    document.body.dataset.done = run;
  });
  return running;
}

function setBusy(busy) {
  if (!busy) $("work").removeAttribute("aria-busy");
  else {
    playing = false;
    $("work").setAttribute("aria-busy", "true");
  }
  const usable = !busy && isComplete();
  for (const id of ["save", "save-all", "walk", "play"]) $(id).disabled = !usable;
  $("more").disabled = !usable || asked.count >= MOST;
  $("play").textContent = playing ? "Stop" : "Play";
  $("play").setAttribute("aria-pressed", playing);
}

/** Whether the faces that are there are those of what is asked. */
function isComplete() {
  return done !== null && done.input === input && done.asked === asked;
}

/** Asks for something else; results of what was asked before do not count as its. */
function ask(change) {
  asked = { ...asked, ...change };
}

// ---------------------------------------------------------------- pictures

let choices = 0;

/**
 * Takes a picture, or tells why not; the last one that was chosen wins.
 * @param {string} name The file's name.
 * @param {() => File | Promise<File>} open Gives the file.
 */
async function take(name, open) {
  const choice = ++choices;
  tell("");
  try {
    const [smallest] = (await engine.describe()).lr_sizes;
    const picture = await readPicture(await open(), smallest);
    if (choice === choices) begin(picture, name.replace(/\.[^.]*$/, ""));
  } catch (error) {
    if (choice === choices) tell(`${name}: ${error.message}.`);
  }
}

function begin(picture, name) {
  const fidelity = Number($("fidelity").value);
  const strengths = edits.map(() => 0);
  asked = { picture, name, size: null, squares: null, count: SAMPLES, chosen: 0, strengths, fidelity };
  $("start").hidden = true;
  $("work").hidden = false;
  crop.show(picture, engine.about.lr_sizes[0]);
  note("");
  showBoxes([], picture);
  showEdits(edits, strengths, setEdit);
  paint($("lr"), new ImageData(1, 1));
  $("work").focus({ preventScroll: true });
  upsample();
}

/** Looks for faces in a new photo, and frames the largest. */
async function frame(current) {
  const { picture } = asked;
  const isPhoto = Math.min(picture.width, picture.height) > engine.about.lr_sizes[1];
  const squares = isPhoto ? await findFaces(picture, engine) : [];
  current();
  ask({ squares, isFaceless: isPhoto && !squares.length });
  if (squares.length) crop.square = squares[0];
  offerFaces();
  if (asked.isFaceless) note("No face was found here. Bring one to the marks, or the results will be odd.");
}

function offerFaces() {
  const { squares, picture } = asked;
  if (squares?.length) note(squares.length > 1 ? `${squares.length} faces: choose another by its square in the picture.` : "");
  showBoxes(squares ?? [], picture, (i) => {
    crop.square = squares[i];
    upsample();
  });
}

function showInput({ lr, size, most, square }) {
  const [smallest] = engine.about.lr_sizes;
  Object.assign($("size"), { min: smallest, max: most, value: size, disabled: most === smallest });
  $("size-text").value = `${size} px`;
  $("size-help").textContent = size === square.n
    ? "The square is used as it is."
    : `The square of ${square.n} px is downscaled to ${size} px first: all that the networks see.`;
  paint($("lr"), imageOf(lr, size));
}

// ---------------------------------------------------------------- faces

/** Samples anew: the picture, its crop or its size have changed. */
function upsample() {
  input = null;
  hideFaces();
  hideFace();
  return work(async (current) => {
    if (!asked.squares) await frame(current);
    const { square } = crop;
    const found = await lowResolution(asked.picture, square, asked.size, engine);
    current();
    showInput({ ...found, square });
    await draw(current, { ...found, square }, 0);
  });
}

/** Samples with other edits or another fidelity. */
function redraw() {
  if (!input) return upsample();
  return work((current) => draw(current, input, 0));
}

/** Adds samples to those that are there. */
function addMore() {
  const first = done.faces.length;
  ask({ count: Math.min(first + SAMPLES, MOST) });
  return work((current) => draw(current, input, first));
}

/** Samples faces from number `first` on; if that is 0, the chosen one before the others. */
async function draw(current, face, first) {
  input = face;
  const wish = asked;
  const { count, chosen, fidelity } = wish;
  const { noise_dim: width, resolution } = engine.about;
  const wanted = Array.from({ length: count - first }, (_, i) => first + i);
  const groups = first ? [wanted] : [[chosen], wanted.filter((i) => i !== chosen)];
  const faces = first ? [...done.faces] : [];
  let sigma = 0;
  showCards(count, chosen, choose);
  hideFaces(first);
  await loader.load();
  current();
  const start = performance.now();
  for (const group of groups) {
    const noise = faceNoise(bytesOf(face.lr), group, width, SEED);
    const found = await engine.sample(face, noise, group.length, fidelity, editOf(wish));
    current();
    ({ sigma } = found);
    group.forEach((i, row) => {
      faces[i] = { ...found.faces[row], planes: toEightBit(found.faces[row].planes) };
      showCard(i, faces[i], resolution);
      if (i === chosen) show(faces[i], titleOf(i), i + 1);
    });
  }
  done = { asked: wish, input, faces, sigma };
  showResult();
  const seconds = ((performance.now() - start) / 1000).toFixed(1);
  const noisy = sigma > 0 ? ` The input has noise of ${Math.round(sigma)} grey levels.` : "";
  say(`${wanted.length} faces in ${seconds} s on this device.${noisy}`);
}

/** Shows all that belongs to the last result but its cards. */
function showResult() {
  const { faces, sigma, input: { size } } = done;
  showMap(faces, engine.about.resolution);
  Object.assign($("walk"), { max: faces.length - 1, value: asked.chosen });
  $("walk-text").value = String(asked.chosen + 1);
  if (!asked.isFaceless && isUnexplained(faces[0].residual, sigma, size, engine.about.limits)) {
    note("The generator hardly explains what is in the square. Bring a face to the marks, or distrust the results.");
  }
}

function editOf({ strengths }) {
  return offsetOf(edits, strengths, engine.about.num_ws * engine.about.w_dim);
}

function show(face, title, file) {
  shown = { planes: face.planes, file };
  showFace(face, title, engine.about.resolution);
}

function choose(i) {
  if (!isComplete()) return;
  asked.chosen = i; // nothing else becomes of it, so the result stays that of what is asked
  showCards(done.faces.length, i, choose);
  show(done.faces[i], titleOf(i), i + 1);
  $("walk").value = i;
  $("walk-text").value = String(i + 1);
}

function setEdit(i, strength) {
  ask({ strengths: asked.strengths.with(i, strength) });
  $("reset").disabled = asked.strengths.every((value) => value === 0);
  soon(redraw);
}

/** Shows the face at a place between the samples, which are at 0, 1, … */
function walk(place) {
  const i = Math.floor(place);
  return work(async (current) => {
    if (i === place) return choose(i);
    const rows = faceNoise(bytesOf(input.lr), [i, i + 1], engine.about.noise_dim, SEED);
    const found = await engine.sample(input, between(rows, place - i), 1, asked.fidelity, editOf(asked));
    current();
    const [face] = found.faces;
    $("walk-text").value = (place + 1).toFixed(1);
    show({ ...face, planes: toEightBit(face.planes) }, `Between ${i + 1} and ${i + 2}`, (place + 1).toFixed(2));
  }, true);
}

async function play() {
  playing = !playing;
  setBusy(false);
  const slider = $("walk");
  while (playing) {
    const place = Number(slider.value) + Number(slider.step);
    slider.value = place > Number(slider.max) ? 0 : place;
    await Promise.all([walk(Number(slider.value)), new Promise((go) => setTimeout(go, STEP))]);
  }
}

/** Stops what runs, and goes back to the last result with the settings that it was made with. */
function cancel() {
  playing = false;
  choices++;
  const busy = $("work").hasAttribute("aria-busy");
  latest++;
  if (!$("start").hidden && done) $("start").hidden = true;
  else if (busy && done) restore();
  else if (busy) {
    [$("start").hidden, $("work").hidden] = [false, true];
    asked = null;
  }
  setBusy(false);
}

function restore() {
  ({ asked, input } = done);
  crop.show(asked.picture, engine.about.lr_sizes[0]);
  crop.square = input.square;
  note("");
  offerFaces();
  showEdits(edits, asked.strengths, setEdit);
  setFidelity(asked.fidelity);
  showInput(input);
  showCards(done.faces.length, asked.chosen, choose);
  done.faces.forEach((face, i) => showCard(i, face, engine.about.resolution));
  choose(asked.chosen);
  showResult();
}

let pending = 0;

/** Calls a function after the screen was drawn, once for many changes. */
function soon(work) {
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(() => work());
}

// ---------------------------------------------------------------- files

function saveEverything() {
  const { name: bundle, bundle_sha256, licence, resolution } = engine.about;
  const { asked: { name, strengths, fidelity }, input: { lr, size, square }, faces, sigma } = done;
  const set = edits.map((edit, i) => [edit.name, strengths[i]]).filter(([, strength]) => strength !== 0);
  const notes = {
    bundle, bundle_sha256, licence, crop: square, seed: SEED, fidelity, noise_sigma: sigma, edits: Object.fromEntries(set),
  };
  return saveAll(faces, resolution, lr, size, notes, name);
}

// ---------------------------------------------------------------- start

function setFidelity(fidelity) {
  $("fidelity").value = fidelity;
  $("fidelity-text").value = fidelity.toFixed(2);
}

/** Takes what was dropped or pasted. */
function takeFrom(transfer) {
  try {
    const file = fileOf(transfer);
    if (file) take(file.name || "the picture", () => file);
  } catch (error) {
    tell(`${error.message}.`);
  }
}

function listenToSettings() {
  crop.addEventListener("input", () => {
    input = null;
    latest++;
    setBusy(true);
    hideFaces();
    hideFace();
  });
  crop.addEventListener("change", upsample);
  $("size").addEventListener("input", (event) => {
    ask({ size: Number(event.target.value) });
    soon(upsample);
  });
  $("fidelity").addEventListener("input", (event) => {
    ask({ fidelity: Number(event.target.value) });
    setFidelity(asked.fidelity);
    soon(redraw);
  });
  $("reset").addEventListener("click", () => {
    ask({ strengths: edits.map(() => 0) });
    showEdits(edits, asked.strengths, setEdit);
    redraw();
  });
  $("walk").addEventListener("input", (event) => {
    playing = false;
    walk(Number(event.target.value));
  });
}

function listen() {
  document.querySelectorAll(".compare").forEach(makeCompare);
  $("file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    event.target.value = ""; // so that the same file may be chosen again
    if (file) take(file.name, () => file);
  });
  $("another").addEventListener("click", () => {
    $("start").hidden = false; // above the faces, which stay until another picture is there
    $("file").focus();
    $("start").scrollIntoView({ block: "nearest" });
  });
  $("more").addEventListener("click", addMore);
  $("play").addEventListener("click", play);
  $("enlarge").addEventListener("click", (event) => zoomNext($("compare"), event.target));
  $("save").addEventListener("click", () => savePicture(shown.planes, engine.about.resolution, `${asked.name}-${shown.file}`));
  $("save-all").addEventListener("click", saveEverything);
  document.addEventListener("keydown", (event) => event.key === "Escape" && asked && cancel());
  document.addEventListener("paste", (event) => takeFrom(event.clipboardData));
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      document.body.classList.toggle("dragging", kind === "dragenter" || kind === "dragover");
      if (kind === "drop") takeFrom(event.dataTransfer);
    });
  }
}

async function start() {
  listen();
  listenToSettings();
  setFidelity(1);
  navigator.serviceWorker?.register("service.js").catch(() => {}); // then there is no page offline, and all else works
  try {
    const about = await engine.describe();
    const [smallest, largest] = about.lr_sizes;
    $("about").textContent =
      `Networks: ${about.name} (${about.bundle_sha256.slice(0, 12)}), ${about.resolution} px from ${smallest} to ` +
      `${largest} px; ${(engine.progress.whole / 1e6).toFixed(0)} MB. Trained on ${about.training_data}. ` +
      `Licence: ${about.licence}.`;
    Object.assign($("code"), { href: about.code ?? "", hidden: !about.code });
    $("card").hidden = !about.card;
    edits = readEdits(await engine.edits(), about.num_ws, about.w_dim);
    await showSamples(take);
    document.body.dataset.ready = "";
    const reason = await loader.prefetch();
    if (reason && !asked) tell(reason);
  } catch (error) {
    tell(`The page cannot start: ${error.message}.`);
  }
}

start();
