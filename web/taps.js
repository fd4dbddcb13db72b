// The downscaling operator: separable bicubic, a = -0.5, antialiased, reflected borders.
// The same arithmetic as data/taps.py, which explains it; tests/test_web_modules.py holds the two together.

const A = -0.5;

/** Cubic convolution kernel of Keys (1981), zero for |x| >= 2. */
function cubic(x) {
  x = Math.abs(x);
  if (x <= 1) return ((A + 2) * x - (A + 3)) * x * x + 1;
  return x < 2 ? A * (((x - 5) * x + 8) * x - 4) : 0;
}

/** Folds a position into 0 … size-1 by a triangle wave: mirrors at the edge pixels without repeating them. */
function reflect(position, size) {
  if (size === 1) return 0;
  const period = 2 * (size - 1);
  const folded = ((position % period) + period) % period;
  return Math.min(folded, period - folded);
}

/**
 * The weights that resize a row of pixels, y = A x.
 * @param {number} sizeIn Pixels in a row, at least 1.
 * @param {number} sizeOut Pixels wanted, at least 1.
 * @returns {{start: Int32Array, weights: Float32Array[]}} For every output the first pixel that counts, and the weights
 *     of it and its neighbours: the rows of the matrix without the zeros at their ends.
 */
export function resizeWeights(sizeIn, sizeOut) {
  const factor = sizeIn / sizeOut;
  const stretch = Math.max(factor, 1);
  // An odd whole factor: PULSE's taps lie half a pixel further on.
  const shift = sizeIn > sizeOut && sizeIn % (2 * sizeOut) === sizeOut ? 0.5 : 0;
  const taps = Math.ceil(4 * stretch) + 1;
  const start = new Int32Array(sizeOut);
  const weights = [];
  for (let o = 0; o < sizeOut; o++) {
    const centre = (o + 0.5) * factor - 0.5 + shift;
    const first = Math.ceil(centre - 2 * stretch);
    const row = new Float64Array(sizeIn);
    let sum = 0;
    for (let i = first; i < first + taps; i++) {
      const weight = cubic((i - centre) / stretch);
      row[reflect(i, sizeIn)] += weight;
      sum += weight;
    }
    const from = row.findIndex((weight) => weight !== 0);
    let to = sizeIn;
    while (row[to - 1] === 0) to--;
    start[o] = from;
    weights.push(Float32Array.from(row.subarray(from, to), (weight) => weight / sum));
  }
  return { start, weights };
}

/**
 * Resizes a square picture of three planes.
 * @param {Float32Array} planes 3 * n * n values of any range.
 * @param {number} n Its size in pixels.
 * @param {number} size The size wanted.
 * @returns {Float32Array} 3 * size * size values, not clamped.
 */
export function resize(planes, n, size) {
  const rows = resizeWeights(n, size);
  const narrow = new Float64Array(3 * n * size);
  for (let i = 0; i < 3 * n; i++) narrowRow(planes, i * n, 1, rows, narrow, i * size);
  return resizeColumns(narrow, n, size, rows);
}

/**
 * Resizes a square picture of bytes, which may be larger than what one canvas holds.
 * @param {(top: number, rows: number) => Uint8ClampedArray} read Gives RGBA bytes of full rows, opaque.
 * @param {number} n Size of the picture in pixels.
 * @param {number} size The size wanted.
 * @param {number} [band] Rows that are read at a time.
 * @returns {Float32Array} 3 * size * size values, about [-1, 1].
 */
export function resizeBytes(read, n, size, band = 256) {
  const values = Float32Array.from({ length: 256 }, (_, byte) => Math.fround(byte / 127.5) - 1);
  const rows = resizeWeights(n, size);
  const narrow = new Float64Array(3 * n * size);
  for (let top = 0; top < n; top += band) {
    const height = Math.min(band, n - top);
    const floats = Float32Array.from(read(top, height), (byte) => values[byte]);
    for (let row = 0; row < height; row++) {
      for (let channel = 0; channel < 3; channel++) {
        narrowRow(floats, 4 * row * n + channel, 4, rows, narrow, (channel * n + top + row) * size);
      }
    }
  }
  return resizeColumns(narrow, n, size, rows);
}

/** Resizes one row, whose pixels lie `step` apart from `place` on. */
function narrowRow(values, place, step, { start, weights }, narrow, out) {
  for (let o = 0; o < weights.length; o++) {
    const taps = weights[o];
    let at = place + start[o] * step;
    let sum = 0;
    for (let i = 0; i < taps.length; i++, at += step) sum += taps[i] * values[at];
    narrow[out + o] = sum;
  }
}

/** Resizes the columns of planes whose rows are resized already: (3, n, size) -> (3, size, size). */
function resizeColumns(narrow, n, size, { start, weights }) {
  const out = new Float32Array(3 * size * size);
  for (let channel = 0; channel < 3; channel++) {
    for (let o = 0; o < size; o++) {
      const taps = weights[o];
      for (let column = 0; column < size; column++) {
        let at = (channel * n + start[o]) * size + column;
        let sum = 0;
        for (let i = 0; i < taps.length; i++, at += size) sum += taps[i] * narrow[at];
        out[(channel * size + o) * size + column] = sum;
      }
    }
  }
  return out;
}

/**
 * How far a face is from explaining the low-resolution picture: the mean of ((D(x) - lr) / 2)^2.
 * @param {Float32Array} face 3 * r * r values in [-1, 1].
 * @param {number} r Its size in pixels.
 * @param {Float32Array} lr 3 * s * s values in [-1, 1].
 * @param {number} s Its size in pixels.
 * @returns {number} Mean squared error in units of [0, 1] pictures.
 */
export function downscalingError(face, r, lr, s) {
  const small = resize(face, r, s);
  return small.reduce((sum, value, i) => sum + ((value - lr[i]) / 2) ** 2, 0) / small.length;
}
