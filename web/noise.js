// Random numbers by a seed: the same page gives the same candidates. (They are not numpy's, so they differ from those of
// export.run; the best guess needs none.)

/** Mulberry32: a small generator of numbers in [0, 1), good enough for pictures, from a 32-bit seed. */
function mulberry32(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/**
 * Draws standard normal numbers (Box and Muller 1958).
 * @param {number} count How many.
 * @param {number} seed A whole number; other seeds give other numbers.
 * @returns {Float32Array} The numbers.
 */
export function standardNormal(count, seed) {
  const uniform = mulberry32(Math.imul(seed + 1, 0x9e3779b1));
  return Float32Array.from({ length: count }, () => {
    const radius = Math.sqrt(-2 * Math.log(1 - uniform()));
    return radius * Math.cos(2 * Math.PI * uniform());
  });
}
