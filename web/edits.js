// Edits of attributes: a direction d in the space of style codes, added to the styles of a range of layers.

/**
 * Reads what python -m export.page made of a bundle's boundaries.
 * @param {object} content Of boundaries.json.
 * @param {number} layers Styles L of the generator.
 * @param {number} width Width D of a style.
 * @returns {{name: string, direction: Float32Array, layers: [number, number]}[]} One entry per edit.
 * @throws {Error} If it is for another generator, or something else.
 */
export function readEdits(content, layers, width) {
  if (content.format !== "amortized-pulse/page-boundaries/1") throw new Error("its format is unknown");
  return content.boundaries.map(({ name, direction, layers: [first, end] }) => {
    if (direction.length !== width || !(first >= 0 && first < end && end <= layers)) {
      throw new Error(`“${name}” is for another generator`);
    }
    return { name, direction: Float32Array.from(direction), layers: [first, end] };
  });
}

/**
 * Edits codes: w_l + sum of strength * d over the edits whose layers include l.
 * @param {Float32Array} ws Codes of one face, L * D values; left as they are.
 * @param {number} width Width D of a style.
 * @param {{direction: Float32Array, layers: [number, number]}[]} edits The edits.
 * @param {number[]} strengths One for each, in standard deviations.
 * @returns {Float32Array} The edited codes.
 */
export function applyEdits(ws, width, edits, strengths) {
  const edited = ws.slice();
  edits.forEach(({ direction, layers: [first, end] }, i) => {
    if (strengths[i] === 0) return;
    for (let layer = first; layer < end; layer++) {
      for (let j = 0; j < width; j++) edited[layer * width + j] += strengths[i] * direction[j];
    }
  });
  return edited;
}
