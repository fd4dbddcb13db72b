// The networks, in a thread of their own: the page stays responsive while they work. Nothing here touches the network
// but for onnxruntime's own files, which lie beside the page.

import * as ort from "./ort/ort.wasm.min.mjs";

ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
// Threads need shared memory, which browsers give only to pages whose server sends two headers; see docs/deploy.md.
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
ort.env.logLevel = "error";

const sessions = {};
const floats = (values, ...shape) => new ort.Tensor("float32", values, shape);

const calls = {
  /** Opens a model. */
  async open({ name, model }) {
    const options = { executionProviders: ["wasm"], logSeverityLevel: 3 };
    sessions[name] = await ort.InferenceSession.create(new Uint8Array(model), options);
  },

  /** Downscales a plane (n, n) to (size, size), in steps of 8 bit. */
  async downscale({ plane, n, size }) {
    const inputs = { planes: floats(plane, 1, n, n), pixels: floats(new Float32Array(size), size) };
    const { lr } = await sessions["downscale.onnx"].run(inputs);
    return lr.data;
  },

  /** Finds faces of a picture (3, n, n) -> probabilities (m), squares (m, 4). */
  async detect({ planes }) {
    const side = Math.sqrt(planes.length / 3);
    const { scores, squares } = await sessions["detector.onnx"].run({ planes: floats(planes, 3, side, side) });
    return { scores: scores.data, squares: squares.data };
  },

  /** Samples faces of one input: lr (3, s, s), noise (k, E), edit (L, D) -> images (k, 3, R, R), and what is said of them. */
  async sample({ lr, size, noise, count, fidelity, edit, layers }) {
    const { images, lr_psnr: psnr, residual, sigma_used: sigma } = await sessions["upsampler.onnx"].run({
      lr: floats(lr, 1, 3, size, size),
      noise: floats(noise, 1, count, noise.length / count),
      fidelity: floats(Float32Array.of(fidelity), 1),
      sigma: floats(Float32Array.of(-1), 1), // estimated
      edit: floats(edit, 1, layers, edit.length / layers),
      preserve_lr: new ort.Tensor("bool", Uint8Array.of(0), [1]),
    });
    return { images: images.data, psnr: psnr.data, residual: residual.data, sigma: sigma.data[0] };
  },
};

async function answer({ data: { id, call, args, wasm } }) {
  if (wasm) {
    ort.env.wasm.wasmBinary = wasm;
    return;
  }
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
