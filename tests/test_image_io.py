"""Reading every kind of picture file, refusing the rest, and writing."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from data.align import Task, align
from data.faces import Faces
from data.image_io import (
    UnreadableImage,
    centre_square,
    from_uint8,
    read_bytes,
    read_image,
    to_uint8,
    write_image,
)

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 8), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (6, 8), dtype=np.uint8)
CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the example files are not on this machine")
LOSSLESS: dict[str, dict[str, Any]] = {"webp": {"lossless": True}, "jp2": {"irreversible": False}}
DEEP = RNG.integers(0, 65536, (6, 8), dtype=np.uint16)


def unit(path: Path) -> np.ndarray:
    """Reads a picture as (H, W, 3) in [0, 1], after checking the promised form."""
    image = read_image(path)
    assert image.dtype == np.float32 and image.ndim == 3 and image.shape[0] == 3
    assert image.min() >= -1 and image.max() <= 1
    assert (to_uint8(image).transpose(1, 2, 0) == read_bytes(path)).all()
    return ((image + 1) / 2).transpose(1, 2, 0)


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    a = alpha[..., None] / 255
    return rgb / 255 * a + 1 - a


def grey3(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def png(width: int, height: int, depth: int, color: int, data: bytes) -> bytes:
    """A PNG with these header fields and image bytes (each row with its filter byte)."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "webp", "jp2"])
def test_lossless_rgb(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RGB).save(path, **LOSSLESS.get(suffix, {}))
    np.testing.assert_allclose(unit(path), RGB / 255, atol=1e-6)
    assert np.array_equal(read_bytes(path), RGB)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "avif"])
def test_lossy_rgb(tmp_path: Path, suffix: str) -> None:
    smooth = np.stack(np.broadcast_arrays(*np.ogrid[0:128:4, 0:192:4], 90), axis=-1).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / f"a.{suffix}", quality=95)
    np.testing.assert_allclose(unit(tmp_path / f"a.{suffix}"), smooth / 255, atol=0.06)


def test_grey_and_one_bit(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "l.png")
    np.testing.assert_allclose(unit(tmp_path / "l.png"), grey3(GREY / 255), atol=1e-6)
    bits = GREY > 127
    Image.fromarray(bits).save(tmp_path / "1.png")
    np.testing.assert_allclose(unit(tmp_path / "1.png"), grey3(bits.astype(float)), atol=1e-6)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(DEEP).save(tmp_path / f"a.{suffix}")
    with Image.open(tmp_path / f"a.{suffix}") as written:
        assert written.mode.startswith("I")
    np.testing.assert_allclose(unit(tmp_path / f"a.{suffix}"), grey3(DEEP / 65535), atol=1e-5)


def tiff(path: Path, values: np.ndarray, **tags: Any) -> Path:
    """Writes a TIFF by hand: little-endian, one strip, with these fields beside what the values tell."""
    kinds = {"u": 1, "i": 2, "f": 3}
    height, width = values.shape[:2]
    bits = int(tags.pop("bits", values.itemsize * 8))
    data = tags.pop("data", values.astype(values.dtype.newbyteorder("<")).tobytes())
    fields = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: tags.pop("photometric", 1),
        277: values[0, 0].size,
        278: height,
    }
    fields |= {279: len(data), 339: kinds[values.dtype.kind]}
    fields |= {{"smin": 340, "smax": 341}[name]: value for name, value in tags.items()}
    start = 8 + 2 + 12 * (len(fields) + 1) + 4
    entries = b"".join(
        struct.pack(
            "<HHIf" if isinstance(value, float) else "<HHII", tag, 11 if isinstance(value, float) else 4, 1, value
        )
        for tag, value in sorted({**fields, 273: start}.items())
    )
    header = b"II*\0" + struct.pack("<IH", 8, len(fields) + 1)
    path.write_bytes(header + entries + bytes(4) + data)
    return path


RAMP = np.linspace(0, 1, 48).reshape(6, 8)
RANGES: dict[str, tuple[str, float, float, dict[str, object]]] = {
    "16 bit": ("u2", 0, 65535, {}),
    "12 in 16 bit": ("u2", 0, 4095, {"smax": 4095}),
    "8 in 16 bit": ("u2", 0, 255, {"smax": 255}),
    "10 to 20 in 16 bit": ("u2", 10, 1000, {"smin": 10, "smax": 1000}),
    "32 bit": ("u4", 0, 2**32 - 1, {}),
    "8 in 32 bit": ("u4", 0, 255, {"smax": 255}),
    "signed 8 bit": ("i1", -128, 127, {}),
    "signed 16 bit": ("i2", -(2**15), 2**15 - 1, {}),
    "signed 16 bit, positive": ("i2", 0, 4095, {"smax": 4095}),
    "signed 32 bit": ("i4", -(2**31), 2**31 - 1, {}),
    "floats to 1": ("f4", 0, 1, {}),
    "floats from -1": ("f4", -1, 1, {}),
    "floats to 255": ("f4", 0, 255, {}),
    "floats to 65535": ("f4", 0, 65535, {}),
    "floats with a range": ("f4", 0, 7, {"smin": 0.0, "smax": 7.0}),
}
INVERTED = ["16 bit", "12 in 16 bit", "10 to 20 in 16 bit", "floats to 1", "floats with a range"]


@pytest.mark.parametrize(("kind", "white_is_zero"), [*((k, False) for k in RANGES), *((k, True) for k in INVERTED)])
def test_the_range_is_what_the_file_says(tmp_path: Path, kind: str, white_is_zero: bool, caplog) -> None:
    dtype, low, high, tags = RANGES[kind]
    shares = RAMP[:, ::-1] if white_is_zero else RAMP
    values = low + shares * (high - low)
    values = (values if dtype[0] == "f" else np.rint(values).clip(low, high)).astype(dtype)
    path = tiff(tmp_path / "a.tif", values, photometric=0 if white_is_zero else 1, **tags)
    expected = 1 - shares if white_is_zero else shares
    step = 1 if dtype[0] == "f" else high - low
    np.testing.assert_allclose(unit(path), grey3(expected), atol=0.51 / step + 1e-5)
    assert not caplog.records


def test_other_tiffs_are_refused_by_name(tmp_path: Path) -> None:
    for values, photometric in ((RAMP.astype(np.float64), 1), ((RAMP * 255).astype(np.int16), 0)):
        with pytest.raises(UnreadableImage, match="a TIFF of a kind that is not read.*8-bit RGB"):
            read_image(tiff(tmp_path / "a.tif", values, photometric=photometric))


def test_packed_12_bit(tmp_path: Path) -> None:
    values = np.rint(RAMP * 4095).astype(np.uint16)
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = ((pairs[:, 0] << 12) | pairs[:, 1])[:, None] >> np.array([16, 8, 0]) & 255
    path = tiff(tmp_path / "a.tif", values, bits=12, data=packed.astype(np.uint8).tobytes())
    np.testing.assert_allclose(unit(path), grey3(values / 4095), atol=1e-5)


@pytest.mark.parametrize("high", [4095, 255])
def test_a_picture_that_uses_little_of_its_range_is_reported(tmp_path: Path, high: int, caplog) -> None:
    path = tiff(tmp_path / "a.tif", np.rint(RAMP * high).astype(np.uint16))
    np.testing.assert_allclose(unit(path), grey3(np.rint(RAMP * high) / 65535), atol=1e-5)
    assert str(path) in caplog.text and "SMaxSampleValue" in caplog.text


def test_floats_of_an_unknown_range_are_refused(tmp_path: Path) -> None:
    values = RAMP.astype(np.float32)
    for broken, reason in ((np.nan, "NaN"), (-7, "from -7 to 1"), (1e6, "SMaxSampleValue")):
        values[2, 2] = broken
        with pytest.raises(UnreadableImage, match=reason):
            read_image(tiff(tmp_path / "a.tif", values))


@pytest.mark.parametrize(("tags", "high"), [({}, 65535), ({"smax": 4095}, 4095)])
def test_colours_of_16_bit(tmp_path: Path, tags: dict[str, object], high: int, caplog) -> None:
    shares = np.stack([RAMP, 1 - RAMP, RAMP[::-1]], axis=-1)
    values = np.rint(shares * high).astype(np.uint16)
    path = tiff(tmp_path / "a.tif", values, photometric=2, **tags)
    np.testing.assert_allclose(unit(path), shares, atol=257 / high)
    assert not caplog.records
    np.testing.assert_allclose(unit(tiff(path, values // 16, photometric=2)), values // 16 / 65535, atol=0.005)
    assert ("SMaxSampleValue" in caplog.text) == (high // 16 < 2**14)


@pytest.mark.parametrize(("color", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_16_bit_colour_and_alpha(tmp_path: Path, color: int, channels: int) -> None:
    deep = RNG.integers(0, 65536, (6, 8, channels), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    (tmp_path / "a.png").write_bytes(png(8, 6, 16, color, rows))
    values = deep / 65535 * 255
    colours = values[..., :3] if channels > 2 else grey3(values[..., 0])
    expected = colours / 255 if channels == 3 else over_white(colours, values[..., -1])
    np.testing.assert_allclose(unit(tmp_path / "a.png"), expected, atol=2.01 / 255)


def test_alpha_lies_over_white(tmp_path: Path) -> None:
    Image.fromarray(np.dstack([RGB, ALPHA])).save(tmp_path / "rgba.png")
    np.testing.assert_allclose(unit(tmp_path / "rgba.png"), over_white(RGB, ALPHA), atol=1e-6)
    Image.fromarray(np.dstack([GREY, ALPHA]), mode="LA").save(tmp_path / "la.png")
    np.testing.assert_allclose(unit(tmp_path / "la.png"), over_white(grey3(GREY), ALPHA), atol=1e-6)


def test_palette_and_colour_key(tmp_path: Path) -> None:
    indices = RNG.integers(0, 4, (6, 8), dtype=np.uint8)
    table = np.array([[255, 0, 0], [0, 255, 0], [10, 20, 30], [0, 0, 0]], dtype=np.uint8)
    image = Image.fromarray(indices, mode="P")
    image.putpalette(table.tobytes())
    image.save(tmp_path / "p.png")
    np.testing.assert_allclose(unit(tmp_path / "p.png"), table[indices] / 255, atol=1e-6)
    image.save(tmp_path / "t.png", transparency=bytes([255, 0, 128, 255]))
    alpha = np.array([255, 0, 128, 255])[indices]
    np.testing.assert_allclose(unit(tmp_path / "t.png"), over_white(table[indices], alpha), atol=1e-6)
    keyed = table[indices]
    Image.fromarray(keyed).save(tmp_path / "key.png", transparency=(10, 20, 30))
    alpha = np.where(indices == 2, 0, 255)
    np.testing.assert_allclose(unit(tmp_path / "key.png"), over_white(keyed, alpha), atol=1e-6)


def test_colours_of_another_profile_become_srgb(tmp_path: Path) -> None:
    """Of BT.709's primaries without a gamma: v becomes 1.055 v^(1/2.4) - 0.055."""
    linear = linear_profile()
    Image.fromarray(RGB).save(tmp_path / "a.png", icc_profile=linear)
    shares = RGB / 255
    expected = np.where(shares <= 0.0031308, 12.92 * shares, 1.055 * shares ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(unit(tmp_path / "a.png"), expected, atol=1.5 / 255)
    Image.fromarray(np.dstack([RGB, ALPHA])).save(tmp_path / "b.png", icc_profile=linear)
    np.testing.assert_allclose(unit(tmp_path / "b.png"), over_white(expected * 255, ALPHA), atol=1.5 / 255)
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"no profile"):
        Image.fromarray(RGB).save(tmp_path / "c.png", icc_profile=profile)
        np.testing.assert_allclose(unit(tmp_path / "c.png"), shares, atol=1e-6)


def linear_profile() -> bytes:
    """The sRGB profile with straight lines for its curves, and another name."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(struct.unpack(">I", content[128:132])[0]):
        kind, offset, _ = struct.unpack(">4sII", content[132 + 12 * i : 144 + 12 * i])
        if kind == b"desc":
            at = content.find("sRGB".encode("utf-16-be"), offset)
            content[at : at + 8] = "line".encode("utf-16-be")
        if kind.endswith(b"TRC"):
            content[offset : offset + 12] = b"curv" + bytes(8)  # a curve of no points
    return bytes(content)


def test_cmyk(tmp_path: Path) -> None:
    flat = np.full((16, 16, 4), (255, 0, 0, 0), dtype=np.uint8)  # pure cyan ink
    for name in ("a.tif", "a.jpg"):
        Image.fromarray(flat, mode="CMYK").save(tmp_path / name)
        np.testing.assert_allclose(unit(tmp_path / name).mean(axis=(0, 1)), [0, 1, 1], atol=0.02)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_exif_rotation(tmp_path: Path, orientation: int, suffix: str) -> None:
    """Each orientation names the sides of the upright picture on which row 0 and column 0 of the file lie."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / f"a.{suffix}", exif=exif, **LOSSLESS.get(suffix, {}))
    turned = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.swapaxes(0, 1),
        6: RGB[::-1].swapaxes(0, 1),
        7: RGB[::-1, ::-1].swapaxes(0, 1),
        8: RGB[:, ::-1].swapaxes(0, 1),
    }[orientation]
    np.testing.assert_allclose(unit(tmp_path / f"a.{suffix}"), turned / 255, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_no_reason_to_refuse(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f garbage")
    np.testing.assert_allclose(unit(tmp_path / "a.png"), RGB / 255, atol=1e-6)


def test_phone_jpeg_of_several_pictures(tmp_path: Path) -> None:
    """Phones append a preview to a JPEG, which makes it an MPO file under the same suffix."""
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    np.testing.assert_allclose(unit(tmp_path / "a.jpg").mean(axis=(0, 1)), [1, 0, 0], atol=0.02)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **LOSSLESS.get(suffix, {}))
    with Image.open(tmp_path / f"a.{suffix}") as written:
        assert getattr(written, "n_frames", 1) == 2
    np.testing.assert_allclose(unit(tmp_path / f"a.{suffix}"), np.broadcast_to([1.0, 0, 0], (6, 8, 3)), atol=1e-6)


def halved(suffix: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        whole = path.with_suffix(f".{suffix}")
        Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])

    return make


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda p: p.write_text("not a picture"), "not a picture"),
    "vector": (lambda p: p.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not a picture"),
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "zeros": (lambda p: p.write_bytes(bytes(5000)), "not a picture"),
    "HEIC": (lambda p: p.write_bytes(b"\0\0\0\x18ftypheic" + bytes(100)), "HEIC picture.*convert it"),
    "video": (lambda p: p.write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100)), "MP4 video"),
    "web page": (lambda p: p.write_bytes(b"<!doctype html><html>"), "web page"),
    "pointer": (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    "PDF": (lambda p: p.write_bytes(b"%PDF-1.7" + bytes(100)), "PDF"),
    "unknown TIFF": (lambda p: p.write_bytes(b"II*\0" + bytes(100)), "TIFF"),
    "half a JPEG": (halved("jpg"), "truncated"),
    "half a PNG": (halved("png"), "truncated"),
    "half a WebP": (halved("webp"), "damaged"),
    "half a TIFF": (halved("tif"), "damaged"),
    "half a BMP": (halved("bmp"), "truncated"),
    "65 megapixels": (lambda p: p.write_bytes(png(6500, 10001, 8, 2, b"")), "megapixels"),
    "120 megapixels": (lambda p: p.write_bytes(png(12000, 10000, 8, 2, b"")), "megapixels"),
    "bomb": (lambda p: p.write_bytes(png(2**31 - 1, 2**31 - 1, 8, 2, b"")), "megapixels"),
    "3 px": (lambda p: Image.new("RGB", (3, 64)).save(p, format="PNG"), "too small"),
    "missing": (lambda p: None, "no such file"),
    "folder": (lambda p: p.mkdir(), "folder"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_name_the_file_and_the_reason(tmp_path: Path, kind: str) -> None:
    make, reason = REFUSED[kind]
    path = tmp_path / "face"
    make(path)
    with pytest.raises(UnreadableImage, match=reason) as caught:
        read_image(path)
    assert str(path) in str(caught.value)


def test_4_px_is_enough(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").shape == (3, 4, 4)


def test_square() -> None:
    for height, width, rows, columns in ((6, 9, (0, 6), (1, 7)), (9, 6, (1, 7), (0, 6)), (6, 6, (0, 6), (0, 6))):
        assert centre_square(height, width) == (slice(*rows), slice(*columns))


# --- one reader ---

EVERY_KIND = [
    "grey16.png",
    "sideways.png",
    "transparent.png",
    "grey12_in_16.tif",
    "grey8_in_16.tif",
    "white_is_zero_16.tif",
]


@needs_cases
@pytest.mark.parametrize("name", EVERY_KIND)
def test_everyone_reads_the_same_pixels(tmp_path: Path, name: str) -> None:
    expected = read_bytes(CASES / name)
    (tmp_path / name).write_bytes((CASES / name).read_bytes())
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        archive.write(CASES / name, name)
    for source in (tmp_path, tmp_path / "faces.zip"):
        assert np.array_equal(Faces(source, 16)[0].permute(1, 2, 0), expected)
    task = Task(lambda path, picture: np.array([[[5, 6], [11, 6], [8, 8], [6, 11], [10, 11]]]), 16, 1, True, False)
    assert np.array_equal(align(CASES / name, task)[0], expected)


@needs_cases
def test_the_cases_are_read_as_they_should_be() -> None:
    for name, white in (("grey16.png", 0), ("white_is_zero_16.tif", 65535)):
        with Image.open(CASES / name) as image:
            values = np.asarray(image).astype(float)
        np.testing.assert_allclose(unit(CASES / name), grey3(abs(white - values) / 65535), atol=1e-5)
    assert np.array_equal(read_bytes(CASES / "transparent.png")[0, 0], [255, 255, 255])


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_bytes_round_trip(kind) -> None:
    every = kind(np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), (2, 3, 16, 16)))
    images = from_uint8(every)
    assert type(images) is type(every) and images.min() == -1 and images.max() == 1
    assert (to_uint8(images) == every).all() and to_uint8(images).dtype == every.dtype


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_bytes_are_clamped_and_rounded(kind) -> None:
    images = kind([-9.0, -1.0, 0.0, 1.0, 9.0, 10.4 / 127.5 - 1, 10.6 / 127.5 - 1])
    assert to_uint8(images).tolist() == [0, 0, 128, 255, 255, 10, 11]  # 0 is 127.5, whose even neighbour is 128
    with pytest.raises(ValueError, match="floating-point"):
        to_uint8(kind(np.zeros((3, 4, 4), np.uint8)))
    with pytest.raises(ValueError, match="uint8"):
        from_uint8(kind(np.zeros((3, 4, 4))))


def test_write_image(tmp_path: Path) -> None:
    image = torch.rand(3, 6, 8) * 3 - 1.5
    write_image(image, tmp_path / "a.png")
    write_image(image.numpy(), tmp_path / "b.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), from_uint8(to_uint8(image)))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    image[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        write_image(image, tmp_path / "c.png")
    with pytest.raises(ValueError, match="one image"):
        write_image(image[None], tmp_path / "c.png")
