// Edits of attributes: steps d_l in the space of style codes, added to the styles of a range of layers.

/**
 * Reads what python -m export.page made of a bundle's boundaries.
 * @param {object} content Of boundaries.json.
 * @param {number} layers Styles L of the generator.
 * @param {number} width Width D of a style.
 * @returns {{name: string, steps: Float32Array[], layers: [number, number]}[]} One entry per edit, one step per layer.
 * @throws {Error} If it is for another generator, or something else.
 */
export function readEdits(content, layers, width) {
  if (content.format !== "amortized-pulse/page-boundaries/2") throw new Error("its format is unknown");
  return content.boundaries.map(({ name, steps, layers: [first, end] }) => {
    const count = end - first;
    const fits = steps.every((step) => step.length === width) && (steps.length === 1 || steps.length === count);
    if (!fits || !(first >= 0 && count > 0 && end <= layers)) throw new Error(`“${name}” is for another generator`);
    const rows = steps.map((step) => Float32Array.from(step));
    return { name, steps: Array.from({ length: count }, (_, i) => rows[i % rows.length]), layers: [first, end] };
  });
}

/**
 * Edits codes: w_l + sum of strength * d_l over the edits whose layers include l.
 * @param {Float32Array} ws Codes of one face, L * D values; left as they are.
 * @param {number} width Width D of a style.
 * @param {{steps: Float32Array[], layers: [number, number]}[]} edits The edits.
 * @param {number[]} strengths One for each, in standard deviations.
 * @returns {Float32Array} The edited codes.
 */
export function applyEdits(ws, width, edits, strengths) {
  const edited = ws.slice();
  edits.forEach(({ steps, layers: [first] }, i) => {
    if (strengths[i] === 0) return;
    steps.forEach((step, row) => {
      for (let j = 0; j < width; j++) edited[(first + row) * width + j] += strengths[i] * step[j];
    });
  });
  return edited;
}
