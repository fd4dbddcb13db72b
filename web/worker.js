// The networks, in a thread of their own: the page stays responsive while they work. Nothing here touches the network
// but for onnxruntime's own files, which lie beside the page.

import * as ort from "./ort/ort.wasm.min.mjs";
import { feedbackInputs, takePasses } from "./passes.js";

ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
// Threads need shared memory, which browsers give only to pages whose server sends two headers; see docs/deploy.md.
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
ort.env.logLevel = "error"; // the default warns that the noise maps, being inputs, cannot be folded

let encoder = null;
let generator = null;
let feedback = null; // stays null where the bundle has none

const calls = {
  /** Opens the models: {encoder, generator}, and feedback where there is one, an ArrayBuffer each. */
  async open(models) {
    const options = { executionProviders: ["wasm"], logSeverityLevel: 3 };
    encoder = await ort.InferenceSession.create(new Uint8Array(models.encoder), options);
    generator = await ort.InferenceSession.create(new Uint8Array(models.generator), options);
    if (models.feedback) feedback = await ort.InferenceSession.create(new Uint8Array(models.feedback), options);
    return { threads: ort.env.wasm.numThreads };
  },

  /** Encodes one face: canvas (3, C, C), its size, noise (n, E) -> codes (n + 1, L, D). */
  async encode({ canvas, side, size, noise, count, width }) {
    const inputs = {
      canvas: new ort.Tensor("float32", canvas, [1, 3, side, side]),
      lr_size: new ort.Tensor("float32", Float32Array.of(size), [1]),
      noise: new ort.Tensor("float32", noise, [1, count, width]),
    };
    const { ws } = await encoder.run(inputs, ["ws"]);
    return { ws: ws.data, shape: ws.dims };
  },

  /** Draws one face: codes (L, D) -> planes (3, R, R). */
  async generate({ ws, layers, width }) {
    return { planes: await draw(ws, layers, width) };
  },

  /** Takes passes of feedback: lr (3, s, s), codes (L, D) -> codes, and the downscaling errors before and after. */
  correct({ lr, size, ws, layers, width, resolution, canvas, passes }) {
    const once = async (face, codes) => {
      const inputs = feedbackInputs(lr, size, face, resolution, canvas);
      const { moved } = await feedback.run({
        lr: new ort.Tensor("float32", inputs.lr, [1, 3, canvas, canvas]),
        residual: new ort.Tensor("float32", inputs.residual, [1, 3, canvas, canvas]),
        images: new ort.Tensor("float32", inputs.images, [1, 3, 2 * canvas, 2 * canvas]),
        lr_size: new ort.Tensor("float32", Float32Array.of(size), [1]),
        ws: new ort.Tensor("float32", codes, [1, layers, width]),
      }, ["moved"]);
      return moved.data;
    };
    return takePasses(once, (codes) => draw(codes, layers, width), lr, size, ws, resolution, passes);
  },
};

async function draw(ws, layers, width) {
  const { images } = await generator.run({ ws: new ort.Tensor("float32", ws, [1, layers, width]) }, ["images"]);
  return images.data;
}

async function answer({ data: { id, call, args } }) {
  try {
    self.postMessage({ id, result: await calls[call](args) });
  } catch (error) {
    self.postMessage({ id, error: String(error?.message ?? error) });
  }
}

// One after the other: a session takes one call at a time.
let last = Promise.resolve();
self.onmessage = (event) => {
  last = last.then(() => answer(event));
};
