// The models as the page sees them: fetched once, then run in a worker.

/** What one bundle's models can do. Call `load` first; the other methods wait for it. */
export class Engine {
  /**
   * @param {string} folder With export.json, encoder.onnx and generator.onnx; feedback.onnx where the bundle has it,
   *     boundaries.json where there are edits.
   */
  constructor(folder) {
    this.folder = folder;
    this.about = null;
    this.worker = null;
    this.waiting = new Map();
    this.next = 0;
  }

  /** Reads export.json: sizes, licence, files. */
  async describe() {
    if (this.about) return this.about;
    const response = await fetch(`${this.folder}/export.json`, { cache: "no-cache" });
    if (!response.ok) throw new Error(`the models are not where they should be (${response.status} for export.json)`);
    const about = await response.json();
    if (about.format !== "amortized-pulse/onnx/1" || !about.w_dim) {
      throw new Error("the models are of another version than this page; run make web again");
    }
    this.about = about;
    return about;
  }

  /** Reads boundaries.json; null where the bundle has none. */
  async boundaries() {
    const response = await fetch(`${this.folder}/boundaries.json`, { cache: "no-cache" });
    return response.ok ? response.json() : null;
  }

  /** Bytes that `load` will fetch. */
  get bytes() {
    return this.#names.reduce((sum, name) => sum + this.about.files[`${name}.onnx`].bytes, 0);
  }

  /** Width of the noise that a candidate is made from. */
  get noiseWidth() {
    return this.about.noise_dim ?? this.about.w_dim;
  }

  get #names() {
    return ["encoder", "generator", "feedback"].filter((name) => this.about.files[`${name}.onnx`]);
  }

  /**
   * Fetches and opens the models, once however often it is called.
   * @param {(done: number) => void} progress Told the bytes that have come.
   */
  load(progress = () => {}) {
    this.loading ??= this.#load(progress).catch((error) => {
      this.loading = null; // so that another try is possible
      throw error;
    });
    return this.loading;
  }

  async #load(progress) {
    await this.describe();
    let done = 0;
    const more = (bytes) => progress((done += bytes));
    const contents = await Promise.all(this.#names.map((name) => this.#fetch(`${name}.onnx`, more)));
    const models = Object.fromEntries(this.#names.map((name, i) => [name, contents[i]]));
    if (!this.worker) {
      this.worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
      this.worker.onmessage = ({ data }) => this.#answer(data);
      this.worker.onerror = (event) => this.#fail(event.message || "this browser cannot start the networks");
    }
    return this.#call("open", models, contents);
  }

  async #fetch(name, more) {
    const { bytes, sha256 } = this.about.files[name];
    // The hash in the address keeps a browser from joining a new encoder with an old generator from its cache.
    const response = await fetch(`${this.folder}/${name}?${sha256.slice(0, 16)}`);
    if (!response.ok) throw new Error(`${name} could not be fetched (${response.status})`);
    const whole = new Uint8Array(bytes);
    let place = 0;
    for (const reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      if (place + value.length <= bytes) whole.set(value, place);
      place += value.length;
      more(value.length);
    }
    if (place !== bytes) throw new Error(`${name} did not arrive whole; reload the page`);
    return whole.buffer;
  }

  /**
   * Encodes a face.
   * @param {Float32Array} canvas The low-resolution face on the canvas, 3 * C * C values.
   * @param {number} size Its size in pixels before.
   * @param {Float32Array} noise n * `noiseWidth` standard normal numbers, n at least 1.
   * @returns {Promise<Float32Array[]>} n + 1 codes of L * D values, the best guess first.
   */
  async encode(canvas, size, noise) {
    const { canvas: side, num_ws: layers } = this.about;
    const width = this.noiseWidth;
    const { ws } = await this.#call("encode", { canvas, side, size, noise, count: noise.length / width, width });
    const step = layers * this.about.w_dim;
    return Array.from({ length: ws.length / step }, (_, i) => ws.slice(i * step, (i + 1) * step));
  }

  /**
   * Corrects codes by learned feedback, where the bundle has it.
   * @param {Float32Array} lr The low-resolution face, 3 * s * s values.
   * @param {number} size Its size s in pixels.
   * @param {Float32Array} ws Codes of a face, L * D values.
   * @returns {Promise<{ws: Float32Array, before: ?number}>} Better codes, and the downscaling error that the given ones
   *     have; the given codes and null where there is no feedback.
   */
  async correct(lr, size, ws) {
    const { num_ws: layers, w_dim: width, resolution, feedback_canvas: canvas, passes } = this.about;
    if (!passes) return { ws, before: null };
    const found = await this.#call("correct", { lr, size, ws, layers, width, resolution, canvas, passes });
    if (!found.ws.every(Number.isFinite)) throw new Error("the feedback gives no codes; its weights are broken");
    return found;
  }

  /**
   * Draws a face.
   * @param {Float32Array} ws Its codes, L * D values.
   * @returns {Promise<Float32Array>} 3 * R * R values, about [-1, 1].
   */
  async generate(ws) {
    const { planes } = await this.#call("generate", { ws, layers: this.about.num_ws, width: this.about.w_dim });
    if (!planes.every(Number.isFinite)) throw new Error("the generator gives no picture; its weights are broken");
    return planes;
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
    this.worker = null;
    this.loading = null;
  }
}
