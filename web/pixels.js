// Bytes and floats, and pictures made from them. A picture inside the page is three planes of float32 in [-1, 1].

// As in data/figures.py: dark to light with nearly even steps of lightness, so that equal differences look equal.
const RAMP = [[0, 0, 0], [64, 16, 112], [172, 36, 120], [242, 104, 72], [253, 190, 100], [255, 255, 235]];

/** What the light end of a map means, in units of [0, 1] pictures: the same for all, so that maps compare. */
export const MAP_MAXIMUM = 0.16;

/** Rounds halves to even, as numpy does. */
function round(x) {
  const floor = Math.floor(x);
  const rest = x - floor;
  if (rest !== 0.5) return Math.round(x);
  return floor % 2 === 0 ? floor : floor + 1;
}

/** Turns values in [-1, 1] into bytes, round(127.5 (x + 1)), clamped. */
export function toByte(value) {
  const clamped = Math.min(Math.max(value, -1), 1);
  return round(Math.fround(Math.fround(clamped * 127.5) + 127.5));
}

/** Turns a byte into a value, x / 127.5 - 1. */
export function fromByte(byte) {
  return Math.fround(Math.fround(byte / 127.5) - 1);
}

/** Rounds planes to what an 8-bit file holds. */
export function toEightBit(planes) {
  return planes.map((value) => fromByte(toByte(value)));
}

/** Turns planes into bytes, plane by plane. */
export function bytesOf(planes) {
  return Uint8Array.from(planes, toByte);
}

/** Makes an ImageData of planes (3, size, size). */
export function imageOf(planes, size) {
  const image = new ImageData(size, size);
  const count = size * size;
  for (let i = 0; i < count; i++) {
    for (let channel = 0; channel < 3; channel++) image.data[4 * i + channel] = toByte(planes[channel * count + i]);
    image.data[4 * i + 3] = 255;
  }
  return image;
}

/** Makes planes (3, size, size) of opaque RGBA bytes. */
export function planesOf(bytes, size) {
  const count = size * size;
  const planes = new Float32Array(3 * count);
  for (let i = 0; i < count; i++) {
    for (let channel = 0; channel < 3; channel++) planes[channel * count + i] = fromByte(bytes[4 * i + channel]);
  }
  return planes;
}

/**
 * Where samples differ: the standard deviation over them of each pixel, mean over colours.
 * @param {Float32Array[]} faces Samples of 3 * size * size values in [-1, 1].
 * @returns {Float32Array} size * size values in units of [0, 1] pictures; 0 for a single sample.
 */
export function disagreement(faces) {
  const count = faces[0].length / 3;
  const map = new Float32Array(count);
  for (let i = 0; i < 3 * count; i++) {
    let sum = 0;
    let squares = 0;
    const first = faces[0][i] / 2; // sums of differences from it lose no digits
    for (const face of faces) {
      const value = face[i] / 2 - first;
      sum += value;
      squares += value * value;
    }
    const mean = sum / faces.length;
    map[i % count] += Math.sqrt(Math.max(squares / faces.length - mean * mean, 0)) / 3;
  }
  return map;
}

/** Colours a map from black (0) over purple, red and orange to nearly white (maximum and above). */
export function heatOf(map, size, maximum = MAP_MAXIMUM) {
  const image = new ImageData(size, size);
  map.forEach((value, i) => {
    const place = Math.min(value / maximum, 1) * (RAMP.length - 1);
    const left = Math.min(Math.floor(place), RAMP.length - 2);
    for (let channel = 0; channel < 3; channel++) {
      const [a, b] = [RAMP[left][channel], RAMP[left + 1][channel]];
      image.data[4 * i + channel] = Math.round(a + (b - a) * (place - left));
    }
    image.data[4 * i + 3] = 255;
  });
  return image;
}

/** The ramp as a CSS gradient, for the legend. */
export function rampGradient() {
  return `linear-gradient(to right, ${RAMP.map((colour) => `rgb(${colour.join(" ")})`).join(", ")})`;
}
