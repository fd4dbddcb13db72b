// From a square of the picture to the low-resolution face, in steps of 8 bit as a file would hold it.

import { fromByte, planesOf } from "./pixels.js";

const FIRST_SIZE = 16; // px, for squares larger than what the encoder takes
const BAND = 256; // rows that are read at a time, since a canvas has a largest size

/**
 * Makes the low-resolution face.
 * @param {ImageBitmap} picture The picture.
 * @param {{x: number, y: number, n: number, angle: number}} square What is cut from it.
 * @param {number | null} wanted Its size in pixels; null for the square's own, or 16 px if that is too much.
 * @param {Engine} engine Downscales it.
 * @returns {Promise<{lr: Float32Array, size: number, most: number}>} 3 * size * size values in [-1, 1], and the largest
 *     size that could be wanted.
 */
export async function lowResolution(picture, square, wanted, engine) {
  const [smallest, largest] = engine.about.lr_sizes;
  const { n } = square;
  const most = Math.min(n, largest);
  const size = Math.max(smallest, Math.min(wanted ?? (n <= largest ? n : FIRST_SIZE), most));
  if (size === n) return { lr: planesOf(read(picture, square, 0, n), n), size, most };
  const lr = new Float32Array(3 * size * size);
  for (let channel = 0; channel < 3; channel++) {
    const plane = new Float32Array(n * n);
    for (let top = 0; top < n; top += BAND) {
      const bytes = read(picture, square, top, Math.min(BAND, n - top));
      for (let i = 0; 4 * i < bytes.length; i++) plane[top * n + i] = fromByte(bytes[4 * i + channel]);
    }
    lr.set(await engine.downscale(plane, n, size), channel * size * size);
  }
  return { lr, size, most };
}

/** Reads full rows of the square as RGBA bytes, transparent parts over white. */
function read(picture, { x, y, n, angle }, top, rows) {
  const pen = new OffscreenCanvas(n, rows).getContext("2d", { willReadFrequently: true });
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, n, rows);
  pen.imageSmoothingEnabled = angle !== 0;
  pen.translate(0, -top);
  if (angle) {
    pen.translate(n / 2, n / 2);
    pen.rotate(-angle);
    pen.translate(-n / 2, -n / 2);
  }
  pen.translate(-x, -y);
  drawMirrored(pen, picture, { x, y, n, angle });
  return pen.getImageData(0, 0, n, rows).data;
}

/** Draws the picture, and where the square leaves it, its mirror images, as training faces continue. */
function drawMirrored(pen, picture, { x, y, n, angle }) {
  const { width, height } = picture;
  const reach = angle ? n / 4 : 0; // a turned square is wider
  const within = x >= reach && y >= reach && x + n + reach <= width && y + n + reach <= height;
  for (const i of within ? [0] : [0, -1, 1]) {
    for (const j of within ? [0] : [0, -1, 1]) {
      pen.save();
      pen.translate(i > 0 ? 2 * width : 0, j > 0 ? 2 * height : 0);
      pen.scale(i ? -1 : 1, j ? -1 : 1);
      pen.drawImage(picture, 0, 0);
      pen.restore();
    }
  }
}
