// A zip without compression, which PNG files would not gain from anyway.

const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? 0xedb88320 ^ (value >>> 1) : value >>> 1;
  return value;
});

/** CRC-32 of bytes, as zip files want it. */
function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = TABLE[(crc ^ byte) & 255] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

/** Writes numbers, little end first: [[bytes, value], …]. */
function record(fields) {
  const bytes = new Uint8Array(fields.reduce((sum, [size]) => sum + size, 0));
  let place = 0;
  for (const [size, value] of fields) {
    for (let i = 0; i < size; i++) bytes[place++] = (value / 2 ** (8 * i)) & 255;
  }
  return bytes;
}

/**
 * Packs files.
 * @param {{name: string, bytes: Uint8Array}[]} files Names in ASCII.
 * @returns {Blob} The zip.
 */
export function zip(files) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const { name, bytes } of files) {
    const title = new TextEncoder().encode(name);
    // version, flags, method (stored), time, date (1 January 1980: the same files give the same zip)
    const shared = [[2, 20], [2, 0], [2, 0], [2, 0], [2, 33], [4, crc32(bytes)], [4, bytes.length], [4, bytes.length]];
    const header = record([[4, 0x04034b50], ...shared, [2, title.length], [2, 0]]);
    const rest = [[2, title.length], [2, 0], [2, 0], [2, 0], [2, 0], [4, 0], [4, offset]];
    directory.push(record([[4, 0x02014b50], [2, 20], ...shared, ...rest]), title);
    parts.push(header, title, bytes);
    offset += header.length + title.length + bytes.length;
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0);
  const count = files.length;
  const end = record([[4, 0x06054b50], [2, 0], [2, 0], [2, count], [2, count], [4, size], [4, offset], [2, 0]]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}
