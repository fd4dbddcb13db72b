// The passes of learned feedback: export/passes.py for one face, which explains them; tests/test_web_modules.py holds
// the two together.

import { downscalingError, resize } from "./taps.js";

/**
 * Makes the inputs of feedback.onnx.
 * @param {Float32Array} lr The low-resolution face, 3 * s * s values.
 * @param {number} size Its size s in pixels.
 * @param {Float32Array} face What the codes draw, 3 * r * r values, not clamped.
 * @param {number} resolution Its size r in pixels.
 * @param {number} canvas Size c in pixels that the feedback sees low-resolution faces at.
 * @returns {{lr: Float32Array, residual: Float32Array, images: Float32Array}} Of 3 * c * c, as many, and 12 * c * c values.
 */
export function feedbackInputs(lr, size, face, resolution, canvas) {
  const small = resize(face, resolution, size);
  return {
    lr: resize(lr, size, canvas),
    residual: resize(lr.map((value, i) => value - small[i]), size, canvas),
    images: resolution === 2 * canvas ? face : resize(face, resolution, 2 * canvas),
  };
}

const clamped = (face) => face.map((value) => Math.min(Math.max(value, -1), 1));

/**
 * Corrects codes several times; a correction that makes things worse is taken back and halved.
 * @param {(face: Float32Array, ws: Float32Array) => Promise<Float32Array>} correct One pass: better codes.
 * @param {(ws: Float32Array) => Promise<Float32Array>} draw The face of codes, 3 * r * r values.
 * @param {Float32Array} lr The low-resolution face, 3 * s * s values in [-1, 1].
 * @param {number} size Its size s in pixels.
 * @param {Float32Array} ws Codes.
 * @param {number} resolution Size r of the faces in pixels.
 * @param {number} passes How often.
 * @returns {Promise<{ws: Float32Array, before: number, after: number}>} The codes, and the downscaling error of their
 *     face before and after.
 */
export async function takePasses(correct, draw, lr, size, ws, resolution, passes) {
  let face = await draw(ws);
  let error = downscalingError(clamped(face), resolution, lr, size);
  const before = error;
  let length = 1;
  for (let pass = 0; pass < passes; pass++) {
    const better = await correct(face, ws);
    const moved = ws.map((value, i) => value + length * (better[i] - value));
    const drawn = await draw(moved);
    const found = downscalingError(clamped(drawn), resolution, lr, size);
    if (found < error) [ws, face, error] = [moved, drawn, found];
    else length /= 2;
  }
  return { ws, before, after: error };
}
