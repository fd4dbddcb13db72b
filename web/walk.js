// The way from sample to sample: noise between that of two neighbours, which is as likely as theirs.

/**
 * Interpolates noise along the arc between two rows: cos(πt/2) a + sin(πt/2) b, whose variance stays that of a and b.
 * @param {Float32Array} rows Noise of two samples, E numbers each.
 * @param {number} t 0 at the first, 1 at the second.
 * @returns {Float32Array} E numbers.
 */
export function between(rows, t) {
  const width = rows.length / 2;
  const [a, b] = [Math.cos((Math.PI / 2) * t), Math.sin((Math.PI / 2) * t)];
  return Float32Array.from({ length: width }, (_, i) => a * rows[i] + b * rows[width + i]);
}
