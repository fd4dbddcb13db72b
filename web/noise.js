// The noise of samples: data/noise.py, which explains it, in JavaScript. Equal seed and face give equal samples.

const WORD = 2 ** 32;

/** Low and high word of the product of two words. */
function product(a, b) {
  const low = Math.imul(a, b) >>> 0;
  const [a0, a1, b0, b1] = [a & 0xffff, a >>> 16, b & 0xffff, b >>> 16];
  const middle = a1 * b0 + Math.floor((a0 * b0) / 65536);
  const other = a0 * b1 + (middle % 65536);
  return [low, (a1 * b1 + Math.floor(middle / 65536) + Math.floor(other / 65536)) >>> 0];
}

/** Maps a counter of four words and a key of two to four random words: Philox4x32-10 (Salmon et al. 2011). */
export function philox([a, b, c, d], [first, second]) {
  for (let round = 0; round < 10; round++) {
    const [low0, high0] = product(a, 0xd2511f53);
    const [low1, high1] = product(c, 0xcd9e8d57);
    [a, b, c, d] = [(high1 ^ b ^ first) >>> 0, low1, (high0 ^ d ^ second) >>> 0, low0];
    first = (first + 0x9e3779b9) >>> 0;
    second = (second + 0xbb67ae85) >>> 0;
  }
  return [a, b, c, d];
}

/**
 * Samples standard normal numbers (Box and Muller 1958).
 * @param {number} count How many.
 * @param {number} stream Other streams are independent.
 * @param {number[]} key Two words.
 * @returns {Float32Array} The numbers.
 */
export function standardNormal(count, stream, key) {
  const numbers = new Float32Array(count); // what lies beyond its end is dropped
  for (let block = 0; 4 * block < count; block++) {
    const words = philox([block, stream, 0, 0], key);
    for (const i of [0, 2]) {
      const radius = Math.sqrt(-2 * Math.log((words[i] + 1) / WORD));
      const angle = 2 * Math.PI * (words[i + 1] / WORD);
      numbers[4 * block + i] = radius * Math.cos(angle);
      numbers[4 * block + i + 1] = radius * Math.sin(angle);
    }
  }
  return numbers;
}

/**
 * Hashes a face.
 * @param {Uint8Array} face Bytes of its three planes.
 * @param {number} seed A whole number from 0.
 * @returns {number[]} Two words, the key of its noise.
 */
export function faceKey(face, seed) {
  const words = new Uint32Array(3 * Math.ceil(face.length / 12));
  new Uint8Array(words.buffer).set(face); // on machines whose words begin with the low byte, as all browsers' do
  const key = [0, 0];
  for (let block = 0; 3 * block < words.length; block++) {
    const hash = philox([block, ...words.subarray(3 * block, 3 * block + 3)], [seed % WORD, Math.floor(seed / WORD)]);
    key.forEach((word, i) => (key[i] = (word ^ hash[i]) >>> 0));
  }
  return key;
}

/**
 * Gives the noise of some samples of a face.
 * @param {Uint8Array} face Bytes of its three planes.
 * @param {number[]} samples Their numbers; 0 is the point estimate, whose noise is 0.
 * @param {number} width Width E of the noise of one.
 * @param {number} seed A whole number from 0.
 * @returns {Float32Array} Noise, a row for each.
 */
export function faceNoise(face, samples, width, seed) {
  const key = faceKey(face, seed);
  const noise = new Float32Array(samples.length * width);
  samples.forEach((sample, row) => sample && noise.set(standardNormal(width, sample, key), row * width));
  return noise;
}
