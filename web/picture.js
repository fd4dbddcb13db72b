// A file as a picture, or the reason why not.

const MOST_PIXELS = 64e6;

/**
 * Reads a picture.
 * @param {File} file What was chosen, dropped or pasted.
 * @param {number} smallest Pixels that its shorter side needs.
 * @returns {Promise<ImageBitmap>} The picture.
 * @throws {Error} If it is none that can be used.
 */
export async function readPicture(file, smallest) {
  if (file.size === 0) throw new Error("the file is empty; copy or download it again");
  let picture;
  try {
    picture = await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    throw new Error((await isHeic(file))
      ? "a HEIC photo, which this browser cannot read; save it as JPEG, or open this page in Safari"
      : "not a picture that this browser can read, or a damaged one; save it anew as PNG or JPEG");
  }
  const { width, height } = picture;
  if (Math.min(width, height) < smallest) {
    throw new Error(`${width} × ${height} px is less than the ${smallest} px that are needed; use a larger picture`);
  }
  if (width * height > MOST_PIXELS) {
    throw new Error(`${width} × ${height} px is more than ${MOST_PIXELS / 1e6} megapixels; shrink it first`);
  }
  return picture;
}

/** HEIC names itself in its fifth to twelfth byte. */
async function isHeic(file) {
  const brand = new TextDecoder("latin1").decode(await file.slice(4, 12).arrayBuffer());
  return /^ftyp(hei|hev|mif1|msf1)/.test(brand);
}

/**
 * Gives the picture of a drop or a paste.
 * @param {DataTransfer} transfer What was dropped or pasted.
 * @returns {File | null} Its first file; null where it holds none, such as text.
 * @throws {Error} If it is a picture of another site, which this page may not fetch.
 */
export function fileOf(transfer) {
  const [file] = transfer.files;
  if (file) return file;
  if (/^https?:/.test(transfer.getData("text/uri-list"))) {
    throw new Error("That picture is on another site, and this page fetches nothing from elsewhere. Save it, then drop the file");
  }
  return null;
}
