// Edits of attributes: directions in the space of style codes.

/**
 * Reads what python -m export.page made of a bundle's edit directions.
 * @param {object} content Of edits.json.
 * @param {number} layers Styles L of the generator.
 * @param {number} width Width D of a style.
 * @returns {{name: string, steps: number[]}[]} One entry per edit, L * D numbers each.
 * @throws {Error} If it is for another generator, or something else.
 */
export function readEdits(content, layers, width) {
  if (content.format !== "amortized-pulse/page-edits/1") throw new Error("its format is unknown");
  return content.edits.map(({ name, steps }) => {
    const fits = steps.length === layers && steps.every((step) => step.length === width);
    if (!fits) throw new Error(`“${name}” is for another generator`);
    return { name, steps: steps.flat() };
  });
}

/**
 * Adds up what edits change: strength * steps.
 * @param {{steps: number[]}[]} edits The edits.
 * @param {number[]} strengths One for each, in standard deviations.
 * @param {number} length L * D.
 * @returns {Float32Array} L * D values.
 */
export function offsetOf(edits, strengths, length) {
  return Float32Array.from({ length }, (_, i) => edits.reduce((sum, { steps }, e) => sum + strengths[e] * steps[i], 0));
}
