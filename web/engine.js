// The networks as the page sees them: fetched side by side, then run in a worker.

import { fetchFile } from "./files.js";

const NETWORKS = ["downscale.onnx", "detector.onnx", "upsampler.onnx"];
const RUNTIME = "ort-wasm-simd-threaded.wasm";

/** What one bundle's networks can do. Dispatches "progress" while `load` fetches them. */
export class Engine extends EventTarget {
  /** @param {string} folder With model.json, edits.json, and the packed files that the former names. */
  constructor(folder) {
    super();
    Object.assign(this, { folder, about: null, worker: null, opening: {}, arrived: {}, waiting: new Map(), next: 0 });
  }

  /** Reads model.json: sizes, licence, files. */
  async describe() {
    this.about ??= await this.#json("model.json");
    if (this.about.format !== "amortized-pulse/onnx/2") {
      throw new Error("the models are of another version than this page; run make web again");
    }
    return this.about;
  }

  /** Reads edits.json. */
  edits() {
    return this.#json("edits.json");
  }

  async #json(name) {
    const response = await fetch(`${this.folder}/${name}`, { cache: "no-cache" });
    if (!response.ok) throw new Error(`the models are not where they should be (${response.status} for ${name})`);
    return response.json();
  }

  /** Bytes that `load` fetches, and how many are there. */
  get progress() {
    const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
    return {
      done: sum(Object.values(this.arrived)),
      whole: sum(Object.values(this.about.files).map(({ bytes }) => bytes)),
    };
  }

  /** Fetches and opens all networks, once however often it is called. */
  load() {
    return Promise.all(NETWORKS.map((name) => this.#open(name)));
  }

  /**
   * Downscales one plane by the operator of the project, in steps of 8 bit.
   * @param {Float32Array} plane n * n values in [-1, 1].
   * @param {number} n Its size in pixels.
   * @param {number} size The size wanted, from 4 to n.
   * @returns {Promise<Float32Array>} size * size values.
   */
  async downscale(plane, n, size) {
    await this.#open("downscale.onnx");
    return this.#call("downscale", { plane, n, size }, [plane.buffer]);
  }

  /**
   * Finds faces.
   * @param {Float32Array} planes A square picture, 3 * n * n values in [-1, 1].
   * @returns {Promise<{scores: Float32Array, squares: Float32Array}>} Probabilities; four numbers for each: the centre of
   *     its square, and the vector from there to the middle of the right side.
   */
  async detect(planes) {
    await this.#open("detector.onnx");
    return this.#call("detect", { planes }, [planes.buffer]);
  }

  /**
   * Samples faces of one input.
   * @param {{lr: Float32Array, size: number}} input The low-resolution face, 3 * s * s values in [-1, 1].
   * @param {Float32Array} noise A row for each sample, see noise.js.
   * @param {number} count How many samples.
   * @param {number} fidelity 0 to 1.
   * @param {Float32Array} edit L * D values that are added to the styles.
   * @returns {Promise<{faces: {planes: Float32Array, psnr: number, residual: number}[], sigma: number}>} Faces of
   *     3 * R * R values in [-1, 1], how well each downscales to the input in dB, what the generator could not explain
   *     of the input (mean square on [0, 1]), and the noise found in the input in grey levels.
   */
  async sample({ lr, size }, noise, count, fidelity, edit) {
    await this.#open("upsampler.onnx");
    const args = { lr, size, noise, count, fidelity, edit, layers: this.about.num_ws };
    const { images, psnr, residual, sigma } = await this.#call("sample", args);
    if (!images.every(Number.isFinite)) throw new Error("the networks give no picture; their weights are broken");
    const step = images.length / count;
    const faces = Array.from(psnr, (db, i) => (
      { planes: images.slice(i * step, (i + 1) * step), psnr: db, residual: residual[i] }));
    return { faces, sigma };
  }

  #open(name) {
    return this.#once(name, async () => {
      await this.describe();
      const [wasm, model] = await Promise.all([this.#once(RUNTIME, () => this.#fetch(RUNTIME)), this.#fetch(name)]);
      this.worker ??= this.#start(wasm);
      await this.#call("open", { name, model }, [model]);
    });
  }

  /** Does something once, unless it failed. */
  #once(name, work) {
    this.opening[name] ??= work().catch((error) => {
      delete this.opening[name];
      throw error;
    });
    return this.opening[name];
  }

  #fetch(name) {
    return fetchFile(this.folder, name, this.about.files[name], (bytes) => {
      this.arrived[name] = bytes;
      this.dispatchEvent(new Event("progress"));
    });
  }

  #start(wasm) {
    const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
    worker.onmessage = ({ data }) => this.#answer(data);
    worker.onerror = (event) => this.#fail(event.message || "this browser cannot start the networks");
    worker.postMessage({ wasm }, [wasm]);
    return worker;
  }

  #call(call, args, transfer = []) {
    return new Promise((resolve, reject) => {
      const id = this.next++;
      this.waiting.set(id, { resolve, reject });
      this.worker.postMessage({ id, call, args }, transfer);
    });
  }

  #answer({ id, result, error }) {
    const { resolve, reject } = this.waiting.get(id);
    this.waiting.delete(id);
    if (error === undefined) resolve(result);
    else reject(new Error(error));
  }

  #fail(reason) {
    for (const { reject } of this.waiting.values()) reject(new Error(reason));
    this.waiting.clear();
    this.worker.terminate();
    Object.assign(this, { worker: null, opening: {} });
  }
}
