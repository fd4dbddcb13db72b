// Files for the user: one picture, or all of a face in a zip, named as infer.py names them.

import { zip } from "./archive.js";
import { disagreement, heatOf, imageOf } from "./pixels.js";

async function pngOf(image) {
  const canvas = new OffscreenCanvas(image.width, image.height);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return new Uint8Array(await (await canvas.convertToBlob({ type: "image/png" })).arrayBuffer());
}

function download(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** Saves planes (3, size, size) as NAME.png. */
export async function savePicture(planes, size, name) {
  download(new Blob([await pngOf(imageOf(planes, size))], { type: "image/png" }), `${name}.png`);
}

/**
 * Saves the input, all samples, the map of their disagreement and a report as NAME.zip.
 * @param {{planes: Float32Array, psnr: number}[]} faces The samples, of `resolution` pixels.
 * @param {number} resolution Their size in pixels.
 * @param {Float32Array} lr The input, of `size` pixels.
 * @param {number} size Its size in pixels.
 * @param {object} notes What made them, for the report.
 * @param {string} name The file's name.
 */
export async function saveAll(faces, resolution, lr, size, notes, name) {
  const files = [{ name: "input.png", bytes: await pngOf(imageOf(lr, size)) }];
  for (const [i, { planes }] of faces.entries()) {
    files.push({ name: `${i + 1}.png`, bytes: await pngOf(imageOf(planes, resolution)) });
  }
  const map = disagreement(faces.map(({ planes }) => planes));
  files.push({ name: "disagreement.png", bytes: await pngOf(heatOf(map, resolution)) });
  const report = {
    made_by: "the page of amortized-pulse",
    note: "The details are invented; no evidence of who somebody is.",
    lr_size: size,
    resolution,
    ...notes,
    samples: faces.map(({ psnr }, i) => ({ file: `${i + 1}.png`, lr_psnr: Number(psnr.toFixed(2)) })),
  };
  files.push({ name: "report.json", bytes: new TextEncoder().encode(`${JSON.stringify(report, null, 2)}\n`) });
  download(zip(files), `${name}.zip`);
}
