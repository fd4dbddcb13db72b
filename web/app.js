// The page: a picture and a few settings in, candidates out. Everything is computed here.

import { Crop } from "./crop.js";
import { applyEdits, readEdits } from "./edits.js";
import { Engine } from "./engine.js";
import { standardNormal } from "./noise.js";
import { imageOf, planesOf, toEightBit } from "./pixels.js";
import { saveAll, savePicture } from "./saving.js";
import { downscalingError, resize, resizeBytes } from "./taps.js";
import { $, clear, EPSILON, paint, say, showCard, showCards, showEdits, showFace, showMap, tell } from "./view.js";

const CANDIDATES = 4; // at first, and how many more come at a time
const MOST = 64;
const FIRST_SIZE = 16; // px, for pictures larger than what the encoder takes
const MOST_PIXELS = 64e6;

const engine = new Engine("models");
const crop = new Crop($("stage"), $("box"), $("zoom"));

/**
 * The picture, and what became of it. `run` counts changes, so that work on older ones stops; `stale` says that the
 * codes are those of an older input, `partial` that some faces are those of older codes or edits. `corrected` holds for
 * each code that went through feedback the error that it had before, null where there is no feedback.
 */
const state = {
  picture: null, name: "face", wanted: null, size: 0, lr: null, codes: [], corrected: [], faces: [], chosen: 0,
  count: CANDIDATES, edits: [], strengths: [], run: 0, stale: false, partial: false, failed: false,
};

// ---------------------------------------------------------------- pictures

/** Takes a file, or tells why not. */
async function take(file) {
  const name = file.name || "the picture";
  try {
    if (file.size === 0) throw new Error("the file is empty; copy or download it again");
    let picture;
    try {
      picture = await createImageBitmap(file, { colorSpaceConversion: "none" });
    } catch {
      throw new Error("not a picture that this browser can read, or a damaged one; save it anew as PNG or JPEG");
    }
    await begin(picture, name.replace(/\.[^.]*$/, ""));
  } catch (error) {
    tell(`${name}: ${error.message}.`);
  }
}

async function begin(picture, name) {
  const { width, height } = picture;
  const about = await engine.describe();
  const [smallest] = about.lr_sizes;
  if (Math.min(width, height) < smallest) {
    throw new Error(`${width} × ${height} px is less than the ${smallest} px that are needed; use a larger picture`);
  }
  if (width * height > MOST_PIXELS) {
    throw new Error(`${width} × ${height} px is more than ${MOST_PIXELS / 1e6} megapixels; shrink it first`);
  }
  state.picture?.close();
  Object.assign(state, { picture, name, wanted: null, count: CANDIDATES, chosen: 0, codes: [], faces: [] });
  state.strengths = state.edits.map(() => 0);
  tell("");
  clear();
  $("start").hidden = true;
  $("work").hidden = false;
  crop.show(picture, smallest);
  showEdits(state.edits, setEdit);
  await upsample();
}

/** Reads full rows of the square as RGBA bytes, transparent parts over white. */
function read(top, rows) {
  const { x, y, n } = crop.square;
  const pen = new OffscreenCanvas(n, rows).getContext("2d", { willReadFrequently: true });
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, n, rows);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(state.picture, x, y + top, n, rows, 0, 0, n, rows);
  return pen.getImageData(0, 0, n, rows).data;
}

/** Cuts the square out and makes it the low-resolution face, in steps of 8 bit as a file would hold it. */
function lowResolution() {
  const { n } = crop.square;
  const [smallest, largest] = engine.about.lr_sizes;
  const most = Math.min(n, largest);
  const size = Math.max(smallest, Math.min(state.wanted ?? (n <= largest ? n : FIRST_SIZE), most));
  Object.assign($("size"), { min: smallest, max: most, value: size, disabled: most === smallest });
  state.size = size;
  state.lr = size === n ? planesOf(read(0, n), n) : toEightBit(resizeBytes(read, n, size));
  $("size-text").value = `${size} px`;
  $("size-help").textContent = size === n
    ? "The square is used as it is."
    : `The square of ${n} px is downscaled to ${size} px first: all that the networks see.`;
  paint($("lr"), imageOf(state.lr, size));
  $("lr-text").textContent = `${size} × ${size} px`;
}

// ---------------------------------------------------------------- faces

/** Noise of candidate i; the same for every picture, so that candidates keep their character while you crop. */
function noiseFor(first, end) {
  const width = engine.noiseWidth;
  const rows = new Float32Array(Math.max(1, end - first) * width); // not every runtime takes empty arrays
  const variety = Number($("variety").value);
  for (let i = first; i < end; i++) {
    rows.set(standardNormal(width, i).map((value) => value * variety), (i - first) * width);
  }
  return rows;
}

/** Encodes and draws anew: the picture, its crop, its size or the variety have changed. */
async function upsample() {
  const run = ++state.run;
  state.stale = true;
  lowResolution();
  await working(run, async () => {
    await load();
    if (run !== state.run) return;
    const canvas = resize(state.lr, state.size, engine.about.canvas);
    const codes = await engine.encode(canvas, state.size, noiseFor(1, state.count));
    if (run !== state.run) return;
    state.codes = codes.slice(0, state.count);
    state.corrected = [];
    state.stale = false;
    await draw(run, 0);
  });
}

/** Adds candidates to those that are there. */
async function addMore() {
  const first = state.codes.length;
  state.count = Math.min(first + CANDIDATES, MOST);
  if (state.stale) return upsample();
  const run = ++state.run;
  await working(run, async () => {
    const canvas = resize(state.lr, state.size, engine.about.canvas);
    const codes = await engine.encode(canvas, state.size, noiseFor(first, state.count));
    if (run !== state.run) return;
    state.codes = state.codes.concat(codes.slice(1));
    await draw(run, state.partial ? 0 : state.faces.length);
  });
}

/** Draws the faces of the codes, edited, from number `first` on; the chosen one before the others. */
async function draw(run, first) {
  const { w_dim: width, resolution } = engine.about;
  const start = performance.now();
  const order = state.codes.map((_, i) => i).filter((i) => i >= first);
  if (order.includes(state.chosen)) order.sort((a, b) => (b === state.chosen) - (a === state.chosen) || a - b);
  else if (state.chosen >= state.codes.length) state.chosen = 0;
  const faces = state.faces.slice(0, first);
  state.partial = true;
  showCards(state.codes.length, state.chosen, choose);
  for (const i of order) {
    if (state.corrected[i] === undefined) {
      const { ws, before } = await engine.correct(state.lr, state.size, state.codes[i]);
      if (run !== state.run) return;
      state.codes[i] = ws;
      state.corrected[i] = before;
    }
    const planes = await engine.generate(applyEdits(state.codes[i], width, state.edits, state.strengths));
    if (run !== state.run) return;
    const face = toEightBit(planes);
    const error = downscalingError(face, resolution, state.lr, state.size);
    faces[i] = { planes: face, error, before: state.corrected[i] };
    showCard(i, faces[i], resolution);
    if (i === state.chosen) showFace(i, faces[i], resolution);
  }
  state.faces = faces;
  state.partial = false;
  showFace(state.chosen, faces[state.chosen], resolution);
  showMap(faces, resolution);
  const seconds = (performance.now() - start) / 1000;
  say(`${order.length} ${order.length === 1 ? "face" : "faces"} in ${seconds.toFixed(1)} s on this device.`);
  document.body.dataset.done = run;
}

/** Draws with other edits; the codes stay. */
async function redraw() {
  if (state.stale) return upsample();
  const run = ++state.run;
  await working(run, () => draw(run, 0));
}

/** Runs one piece of work, shows that it runs, and tells what went wrong. */
async function working(run, work) {
  $("work").setAttribute("aria-busy", "true");
  let reason = "";
  try {
    await work();
  } catch (error) {
    reason = `The faces could not be drawn: ${error.message}.`;
  }
  if (run !== state.run) return;
  if (reason || state.failed) tell(reason); // a later success takes it away
  state.failed = reason !== "";
  $("work").removeAttribute("aria-busy");
  $("loading").hidden = true;
  const none = state.faces.length === 0;
  for (const id of ["save", "save-all"]) $(id).disabled = none;
  $("more").disabled = none || state.count >= MOST;
}

async function load() {
  const whole = engine.bytes;
  const megabytes = (bytes) => (bytes / 1e6).toFixed(0);
  const timer = setTimeout(() => ($("loading").hidden = false), 200);
  try {
    await engine.load((done) => {
      $("progress").value = done / whole;
      $("progress-text").textContent = `${megabytes(done)} of ${megabytes(whole)} MB, once`;
    });
  } finally {
    clearTimeout(timer);
    $("loading").hidden = true;
  }
}

function choose(i) {
  if (!state.faces[i]) return;
  state.chosen = i;
  showCards(state.codes.length, i, choose);
  showFace(i, state.faces[i], engine.about.resolution);
}

function setEdit(i, strength) {
  state.strengths[i] = strength;
  $("reset").disabled = state.strengths.every((value) => value === 0);
  soon(redraw);
}

let pending = 0;

/** Calls a function after the screen was drawn, once for many changes. */
function soon(work) {
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(() => work());
}

// ---------------------------------------------------------------- files

function saveChosen() {
  const { name, chosen, faces } = state;
  return savePicture(faces[chosen].planes, engine.about.resolution, `${name}-${chosen + 1}`);
}

function saveEverything() {
  const { bundle, licence, resolution } = engine.about;
  const strengths = state.edits.map(({ name }, i) => [name, state.strengths[i]]).filter(([, strength]) => strength !== 0);
  const notes = {
    bundle, licence, crop: crop.square, variety: Number($("variety").value), edits: Object.fromEntries(strengths),
  };
  return saveAll(state.faces, resolution, state.lr, state.size, notes, EPSILON, state.name);
}

// ---------------------------------------------------------------- start

async function showSamples() {
  const response = await fetch("samples/index.json");
  if (!response.ok) return;
  const names = await response.json();
  $("samples").querySelector("ul").replaceChildren(...names.map((name) => {
    const item = document.createElement("li");
    const button = Object.assign(document.createElement("button"), { type: "button" });
    const picture = Object.assign(document.createElement("img"), { src: `samples/${name}`, alt: name.replace(/\.png$/, "") });
    button.append(picture);
    button.addEventListener("click", async () => {
      const sample = await fetch(picture.src);
      await take(new File([await sample.blob()], name));
    });
    item.append(button);
    return item;
  }));
  $("samples").hidden = names.length === 0;
}

function listen() {
  $("file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    event.target.value = ""; // so that the same file may be chosen again
    if (file) take(file);
  });
  $("another").addEventListener("click", () => {
    $("start").hidden = false; // above the faces, which stay until another picture is there
    $("file").focus();
    $("start").scrollIntoView({ block: "nearest" });
  });
  crop.addEventListener("change", upsample);
  $("size").addEventListener("input", (event) => {
    state.wanted = Number(event.target.value);
    state.stale = true;
    soon(upsample);
  });
  $("variety").addEventListener("input", (event) => {
    $("variety-text").value = `${Number(event.target.value).toFixed(2)} ×`;
    state.stale = true;
    soon(upsample);
  });
  $("variety-text").value = "1.00 ×";
  $("reset").addEventListener("click", () => {
    state.strengths = state.edits.map(() => 0);
    showEdits(state.edits, setEdit);
    redraw();
  });
  $("more").addEventListener("click", addMore);
  $("save").addEventListener("click", saveChosen);
  $("save-all").addEventListener("click", saveEverything);
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) take(file);
  });
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      document.body.classList.toggle("dragging", kind === "dragenter" || kind === "dragover");
      const file = kind === "drop" && event.dataTransfer.files[0];
      if (file) take(file);
    });
  }
}

async function start() {
  listen();
  try {
    const about = await engine.describe();
    const [smallest, largest] = about.lr_sizes;
    $("about").textContent =
      `Networks: ${about.bundle.name} (${about.bundle.hash.slice(0, 12)}), ${about.resolution} px from ${smallest} to ` +
      `${largest} px; ${(engine.bytes / 1e6).toFixed(0)} MB. Trained on ${about.training_data}. Licence: ${about.licence}.`;
    const boundaries = await engine.boundaries();
    if (boundaries) state.edits = readEdits(boundaries, about.num_ws, about.w_dim);
    await showSamples();
    document.body.dataset.ready = "";
  } catch (error) {
    tell(`The page cannot start: ${error.message}.`);
  }
}

start();
