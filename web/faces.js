// Faces in a photo, framed as in FFHQ, as the networks expect them.

import { planesOf } from "./pixels.js";

const SIDE = 480; // px that the detector looks at, as in export/detector.py
const LEAST = 0.9; // probability

/**
 * Finds the faces of a photo.
 * @param {ImageBitmap} picture The photo.
 * @param {Engine} engine Has the detector.
 * @returns {Promise<{x: number, y: number, n: number, angle: number}[]>} A square for each, the largest first, in pixels
 *     of the photo: left, top and side before it is turned about its centre by the angle in radians.
 */
export async function findFaces(picture, engine) {
  const scale = SIDE / Math.max(picture.width, picture.height);
  const pen = new OffscreenCanvas(SIDE, SIDE).getContext("2d", { willReadFrequently: true });
  pen.fillStyle = "#808080";
  pen.fillRect(0, 0, SIDE, SIDE);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(picture, 0, 0, picture.width * scale, picture.height * scale);
  const { scores, squares } = await engine.detect(planesOf(pen.getImageData(0, 0, SIDE, SIDE).data, SIDE));
  return squaresOf(scores, squares, scale);
}

/** Turns what the detector found, in pixels of a picture `scale` times as large, into squares of the photo. */
export function squaresOf(scores, squares, scale) {
  const found = [];
  scores.forEach((score, i) => {
    const [x, y, right, down] = squares.slice(4 * i, 4 * i + 4).map((value) => value / scale);
    const n = Math.round(2 * Math.hypot(right, down));
    if (score >= LEAST) {
      found.push({ x: Math.round(x - n / 2), y: Math.round(y - n / 2), n, angle: Math.atan2(down, right) });
    }
  });
  return found.sort((a, b) => b.n - a.n);
}
