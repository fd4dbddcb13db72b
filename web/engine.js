// The models as the page sees them: fetched once, then run in a worker.

/** What one bundle's models can do; they are fetched when they are first needed. */
export class Engine {
  /** @param {string} folder With model.json, upsampler.onnx, downscale.onnx and edits.json. */
  constructor(folder) {
    this.folder = folder;
    this.about = null;
    this.worker = null;
    this.opening = {};
    this.waiting = new Map();
    this.next = 0;
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

  /** Bytes that `load` will fetch. */
  get bytes() {
    return this.about.files["upsampler.onnx"].bytes;
  }

  /**
   * Fetches and opens the networks, once however often it is called.
   * @param {(done: number) => void} progress Told the bytes that have come.
   */
  load(progress) {
    return this.#open("upsampler", progress);
  }

  /**
   * Downscales one plane by the operator of the project, in steps of 8 bit.
   * @param {Float32Array} plane n * n values in [-1, 1].
   * @param {number} n Its size in pixels.
   * @param {number} size The size wanted, from 4 to n.
   * @returns {Promise<Float32Array>} size * size values.
   */
  async downscale(plane, n, size) {
    await this.#open("downscale");
    return this.#call("downscale", { plane, n, size }, [plane.buffer]);
  }

  /**
   * Samples faces of one input.
   * @param {Float32Array} lr The low-resolution face, 3 * s * s values in [-1, 1].
   * @param {number} size Its size s in pixels.
   * @param {Float32Array} noise A row for each sample, see noise.js.
   * @param {number} count How many samples.
   * @param {number} fidelity 0 to 1.
   * @param {Float32Array} edit L * D values that are added to the styles.
   * @returns {Promise<{faces: Float32Array[], psnr: number[], sigma: number}>} Faces of 3 * R * R values in [-1, 1],
   *     how well each downscales to the input in dB, and the noise found in the input in grey levels.
   */
  async sample(lr, size, noise, count, fidelity, edit) {
    await this.load();
    const args = { lr, size, noise, count, fidelity, edit, layers: this.about.num_ws };
    const { images, psnr, sigma } = await this.#call("sample", args);
    if (!images.every(Number.isFinite)) throw new Error("the networks give no picture; their weights are broken");
    const step = images.length / count;
    return { faces: psnr.map((_, i) => images.slice(i * step, (i + 1) * step)), psnr, sigma };
  }

  #open(name, progress = () => {}) {
    this.opening[name] ??= this.#fetchAndOpen(name, progress).catch((error) => {
      delete this.opening[name]; // so that another try is possible
      throw error;
    });
    return this.opening[name];
  }

  async #fetchAndOpen(name, progress) {
    await this.describe();
    const model = await this.#fetch(`${name}.onnx`, progress);
    if (!this.worker) {
      this.worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
      this.worker.onmessage = ({ data }) => this.#answer(data);
      this.worker.onerror = (event) => this.#fail(event.message || "this browser cannot start the networks");
    }
    return this.#call("open", { name, model }, [model]);
  }

  async #fetch(name, progress) {
    const { bytes, sha256 } = this.about.files[name];
    // The hash in the address keeps a browser from using an old model from its cache.
    const response = await fetch(`${this.folder}/${name}?${sha256.slice(0, 16)}`);
    if (!response.ok) throw new Error(`${name} could not be fetched (${response.status})`);
    const whole = new Uint8Array(bytes);
    let place = 0;
    for (const reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      if (place + value.length <= bytes) whole.set(value, place);
      progress((place += value.length));
    }
    if (place !== bytes) throw new Error(`${name} did not arrive whole; reload the page`);
    return whole.buffer;
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
    this.opening = {};
  }
}
