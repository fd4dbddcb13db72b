// When not to believe a face: limits from held-out photos, see pipeline/familiarity.py.

/**
 * Says whether the generator explains a face worse than photos of its size.
 * @param {number} residual Mean square of what it cannot explain of the input, on [0, 1].
 * @param {number} sigma Noise of the input in grey levels, which explains some of it.
 * @param {number} size Of the input in pixels.
 * @param {{sizes: number[], residuals: number[]} | null} limits By rising sizes; null where none were measured.
 */
export function isUnexplained(residual, sigma, size, limits) {
  if (!limits) return false;
  const sizes = limits.sizes.map(Math.log);
  const values = limits.residuals.map(Math.log);
  const place = Math.min(Math.max(Math.log(size), sizes[0]), sizes.at(-1));
  const i = Math.max(sizes.findIndex((value) => value >= place), 1);
  const share = (place - sizes[i - 1]) / (sizes[i] - sizes[i - 1]);
  const limit = values[i - 1] + share * (values[i] - values[i - 1]);
  return Math.log(Math.max(residual - (sigma / 255) ** 2, 1e-9)) > limit;
}
