// The page: a picture and a few settings in, samples out. Everything is computed here.

import { Crop } from "./crop.js";
import { offsetOf, readEdits } from "./edits.js";
import { Engine } from "./engine.js";
import { faceNoise } from "./noise.js";
import { bytesOf, fromByte, imageOf, planesOf, toEightBit } from "./pixels.js";
import { saveAll, savePicture } from "./saving.js";
import { $, clear, paint, say, showCard, showCards, showEdits, showFace, showMap, tell } from "./view.js";

const SAMPLES = 4; // at first, and how many more come at a time
const MOST = 64;
const SEED = 0; // as infer.py's default
const FIRST_SIZE = 16; // px, for pictures larger than what the encoder takes
const MOST_PIXELS = 64e6;
const BAND = 256; // rows that are read at a time, since a canvas has a largest size

const engine = new Engine("models");
const crop = new Crop($("stage"), $("box"), $("zoom"));

/**
 * The picture, and what became of it. `run` counts changes, so that work on older ones stops; `stale` says that the
 * faces are those of an older input, `partial` that some are those of other edits or another fidelity.
 */
const state = {
  picture: null, name: "face", wanted: null, size: 0, lr: null, sigma: 0, faces: [], chosen: 0, count: SAMPLES, edits: [],
  strengths: [], run: 0, stale: false, partial: false, failed: false,
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
  Object.assign(state, { picture, name, wanted: null, count: SAMPLES, chosen: 0, faces: [] });
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

/** Downscales the square of n px: each colour by itself, read in bands. */
async function downscaled(n, size) {
  const lr = new Float32Array(3 * size * size);
  for (let channel = 0; channel < 3; channel++) {
    const plane = new Float32Array(n * n);
    for (let top = 0; top < n; top += BAND) {
      const bytes = read(top, Math.min(BAND, n - top));
      for (let i = 0; 4 * i < bytes.length; i++) plane[top * n + i] = fromByte(bytes[4 * i + channel]);
    }
    lr.set(await engine.downscale(plane, n, size), channel * size * size);
  }
  return lr;
}

/** Cuts the square out and makes it the low-resolution face, in steps of 8 bit as a file would hold it. */
async function lowResolution(run) {
  const { n } = crop.square;
  const [smallest, largest] = engine.about.lr_sizes;
  const most = Math.min(n, largest);
  const size = Math.max(smallest, Math.min(state.wanted ?? (n <= largest ? n : FIRST_SIZE), most));
  Object.assign($("size"), { min: smallest, max: most, value: size, disabled: most === smallest });
  $("size-text").value = `${size} px`;
  $("size-help").textContent = size === n
    ? "The square is used as it is."
    : `The square of ${n} px is downscaled to ${size} px first: all that the networks see.`;
  const lr = size === n ? planesOf(read(0, n), n) : await downscaled(n, size);
  if (run !== state.run) return;
  Object.assign(state, { lr, size });
  paint($("lr"), imageOf(lr, size));
  $("lr-text").textContent = `${size} × ${size} px`;
}

// ---------------------------------------------------------------- faces

/** Samples anew: the picture, its crop or its size have changed. */
async function upsample() {
  const run = ++state.run;
  state.stale = true;
  await working(run, async () => {
    await lowResolution(run);
    if (run === state.run) await load();
    if (run !== state.run) return;
    state.stale = false;
    await draw(run, 0);
  });
}

/** Adds samples to those that are there. */
async function addMore() {
  const first = state.faces.length;
  state.count = Math.min(first + SAMPLES, MOST);
  if (state.stale) return upsample();
  const run = ++state.run;
  await working(run, () => draw(run, state.partial ? 0 : first));
}

/** Samples faces from number `first` on; the chosen one before the others, if all are redrawn. */
async function draw(run, first) {
  const { num_ws: layers, w_dim: width, noise_dim: noiseWidth, resolution } = engine.about;
  const start = performance.now();
  const wanted = Array.from({ length: state.count - first }, (_, i) => first + i);
  if (state.chosen >= state.count) state.chosen = 0;
  const others = wanted.filter((i) => i !== state.chosen);
  const groups = state.partial && others.length < wanted.length ? [[state.chosen], others] : [wanted];
  const edit = offsetOf(state.edits, state.strengths, layers * width);
  const faces = state.faces.slice(0, first);
  state.partial = true;
  showCards(state.count, state.chosen, choose);
  for (const group of groups.filter(({ length }) => length)) {
    const noise = faceNoise(bytesOf(state.lr), group, noiseWidth, SEED);
    const fidelity = Number($("fidelity").value);
    const found = await engine.sample(state.lr, state.size, noise, group.length, fidelity, edit);
    if (run !== state.run) return;
    state.sigma = found.sigma;
    group.forEach((i, row) => {
      faces[i] = { planes: toEightBit(found.faces[row]), psnr: found.psnr[row] };
      showCard(i, faces[i], resolution);
      if (i === state.chosen) showFace(i, faces[i], resolution);
    });
  }
  state.faces = faces;
  state.partial = false;
  showFace(state.chosen, faces[state.chosen], resolution);
  showMap(faces, resolution);
  const noisy = state.sigma > 0 ? `, noise of ${Math.round(state.sigma)} grey levels` : "";
  $("lr-text").textContent = `${state.size} × ${state.size} px${noisy}`;
  const seconds = (performance.now() - start) / 1000;
  say(`${wanted.length} ${wanted.length === 1 ? "face" : "faces"} in ${seconds.toFixed(1)} s on this device.`);
  document.body.dataset.done = run;
}

/** Samples with other edits or another fidelity. */
async function redraw() {
  if (state.stale) return upsample();
  const run = ++state.run;
  state.partial = true;
  await working(run, () => draw(run, 0));
}

/** Runs one piece of work, shows that it runs, and tells what went wrong. */
async function working(run, work) {
  $("work").setAttribute("aria-busy", "true");
  let reason = "";
  try {
    await work();
  } catch (error) {
    reason = `The faces could not be made: ${error.message}.`;
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
  showCards(state.faces.length, i, choose);
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
  const { name: bundle, bundle_sha256, licence, resolution } = engine.about;
  const strengths = state.edits.map(({ name }, i) => [name, state.strengths[i]]).filter(([, strength]) => strength !== 0);
  const notes = {
    bundle, bundle_sha256, licence, crop: crop.square, seed: SEED, fidelity: Number($("fidelity").value),
    noise_sigma: state.sigma, edits: Object.fromEntries(strengths),
  };
  return saveAll(state.faces, resolution, state.lr, state.size, notes, state.name);
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
  $("fidelity").addEventListener("input", (event) => {
    $("fidelity-text").value = Number(event.target.value).toFixed(2);
    soon(redraw);
  });
  $("fidelity-text").value = Number($("fidelity").value).toFixed(2);
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
      `Networks: ${about.name} (${about.bundle_sha256.slice(0, 12)}), ${about.resolution} px from ${smallest} to ` +
      `${largest} px; ${(engine.bytes / 1e6).toFixed(0)} MB. Trained on ${about.training_data}. Licence: ${about.licence}.`;
    state.edits = readEdits(await engine.edits(), about.num_ws, about.w_dim);
    await showSamples();
    document.body.dataset.ready = "";
  } catch (error) {
    tell(`The page cannot start: ${error.message}.`);
  }
}

start();
