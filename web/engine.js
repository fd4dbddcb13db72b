// The models as the page sees them: fetched once, then run in a worker.

/** What one bundle's models can do. Call `load` first; the other methods wait for it. */
export class Engine {
  /**
   * @param {string} folder With export.json, encoder.onnx and generator.onnx, and boundaries.json where there are edits.
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
    return this.about.files["encoder.onnx"].bytes + this.about.files["generator.onnx"].bytes;
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
    const [encoder, generator] = await Promise.all([this.#fetch("encoder.onnx", more), this.#fetch("generator.onnx", more)]);
    if (!this.worker) {
      this.worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
      this.worker.onmessage = ({ data }) => this.#answer(data);
      this.worker.onerror = (event) => this.#fail(event.message || "this browser cannot start the networks");
    }
    return this.#call("open", { encoder, generator }, [encoder, generator]);
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
   * @param {Float32Array} noise n * D standard normal numbers, n at least 1.
   * @returns {Promise<Float32Array[]>} n + 1 codes of L * D values, the best guess first.
   */
  async encode(canvas, size, noise) {
    const { canvas: side, w_dim: width, num_ws: layers } = this.about;
    const { ws } = await this.#call("encode", { canvas, side, size, noise, count: noise.length / width, width });
    const step = layers * width;
    return Array.from({ length: ws.length / step }, (_, i) => ws.slice(i * step, (i + 1) * step));
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
