// Large files: fetched once, checked by their sha256, kept for the next visit, unpacked.

const KEPT = "amortized-pulse"; // in the browser's cache storage

/**
 * Gives a file, from an earlier visit where it was kept.
 * @param {string} folder Where it lies, as NAME.gzip.
 * @param {string} name Its name.
 * @param {{bytes: number, sha256: string}} expected Of the packed file.
 * @param {(bytes: number) => void} progress Told how many bytes are there.
 * @returns {Promise<ArrayBuffer>} The unpacked content.
 * @throws {Error} If it cannot be fetched, or is not what was expected.
 */
export async function fetchFile(folder, name, { bytes, sha256 }, progress) {
  const address = `${folder}/${name}.gzip?${sha256.slice(0, 16)}`; // so that no cache gives an older one
  const kept = await globalThis.caches?.open(KEPT).catch(() => undefined); // only with https, and not in private windows
  const before = await (await kept?.match(address))?.arrayBuffer();
  let packed = before;
  if (!before || !(await isIntact(before, sha256))) {
    const cache = kept ? "no-store" : "default"; // kept once is enough, and what is damaged not at all
    packed = await download(address, name, bytes, cache, progress);
    if (!(await isIntact(packed, sha256))) throw new Error(`${name} arrived damaged; reload the page`);
    await keep(kept, address, packed);
  }
  progress(bytes);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

async function download(address, name, bytes, cache, progress) {
  const response = await fetch(address, { cache });
  if (!response.ok) throw new Error(`${name} could not be fetched (${response.status})`);
  const whole = new Uint8Array(bytes);
  let place = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (place + value.length <= bytes) whole.set(value, place);
    progress((place += value.length));
  }
  if (place !== bytes) throw new Error(`${name} did not arrive whole; reload the page`);
  return whole.buffer;
}

/** Browsers compute hashes for pages from https and localhost alone; elsewhere the length has to do. */
async function isIntact(content, sha256) {
  if (!globalThis.crypto?.subtle) return true;
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  return [...hash].map((byte) => byte.toString(16).padStart(2, "0")).join("") === sha256;
}

/** Keeps a file in place of its older versions; where there is no room, it is fetched again next time. */
async function keep(cache, address, content) {
  try {
    const path = address.split("?")[0];
    for (const { url } of (await cache?.keys()) ?? []) {
      if (new URL(url).pathname.endsWith(`/${path}`)) await cache.delete(url);
    }
    await cache?.put(address, new Response(content));
  } catch { /* the browser's limit */ }
}
