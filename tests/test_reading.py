"""Reading every kind of picture file, refusing the rest, and writing."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.reading import UnreadableImage, find_images, from_uint8, read_image, square, to_uint8, write_png

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 8), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (6, 8), dtype=np.uint8)
LOSSLESS: dict[str, dict[str, Any]] = {"webp": {"lossless": True}}
DEEP = RNG.integers(0, 65536, (6, 8), dtype=np.uint16)


def unit(path: Path) -> np.ndarray:
    """Reads a picture as (H, W, 3) in [0, 1], after checking the promised form."""
    image = read_image(path)
    assert image.dtype == torch.float32 and image.ndim == 3 and image.shape[0] == 3
    assert image.min() >= -1 and image.max() <= 1
    return ((image + 1) / 2).permute(1, 2, 0).numpy()


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


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "webp"])
def test_lossless_rgb(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RGB).save(path, **LOSSLESS.get(suffix, {}))
    np.testing.assert_allclose(unit(path), RGB / 255, atol=1e-6)
    assert torch.equal(to_uint8(read_image(path)), torch.from_numpy(RGB).permute(2, 0, 1))


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
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


def test_32_bit_integers_are_clamped(tmp_path: Path) -> None:
    values = DEEP.astype(np.int32)
    values[0, 0], values[0, 1] = -5, 70000
    Image.fromarray(values).save(tmp_path / "a.tif")
    np.testing.assert_allclose(unit(tmp_path / "a.tif"), grey3(np.clip(values / 65535, 0, 1)), atol=1e-5)


@pytest.mark.parametrize("scale", [1, 255])
def test_floats(tmp_path: Path, scale: int) -> None:
    values = (GREY / 255).astype(np.float32)
    Image.fromarray(values * scale).save(tmp_path / "a.tif")
    np.testing.assert_allclose(unit(tmp_path / "a.tif"), grey3(values), atol=1e-6)
    values[2, 2] = np.nan
    Image.fromarray(values).save(tmp_path / "nan.tif")
    with pytest.raises(UnreadableImage, match="NaN"):
        read_image(tmp_path / "nan.tif")


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
    image = torch.arange(3 * 6 * 9.0).reshape(3, 6, 9)
    cropped, was_cropped = square(image)
    assert was_cropped and torch.equal(cropped, image[:, :, 1:7])
    cropped, was_cropped = square(image.transpose(1, 2))
    assert was_cropped and torch.equal(cropped, image.transpose(1, 2)[:, 1:7])
    cropped, was_cropped = square(image[:, :, :6])
    assert not was_cropped and torch.equal(cropped, image[:, :, :6])
    with pytest.raises(ValueError, match="one image"):
        square(image[None])


def test_find_images(tmp_path: Path) -> None:
    folder, empty = tmp_path / "faces", tmp_path / "empty"
    (folder / "deeper.png").mkdir(parents=True)
    empty.mkdir()
    for name in ("b.PNG", "a.jpeg", "c.tiff", "notes.txt", "._a.jpeg", "deeper.png/x.png"):
        (folder / name).touch()
    odd = tmp_path / "odd.dat"
    odd.touch()
    again = [folder / "a.jpeg", folder / ".." / "odd.dat"]
    found = find_images([odd, folder, *again, tmp_path / "gone.png", str(empty)])
    assert found.images == [odd, folder / "a.jpeg", folder / "b.PNG", folder / "c.tiff"]
    assert [path for path, _ in found.problems] == [tmp_path / "gone.png", empty]
    assert "no such" in found.problems[0][1] and "without images" in found.problems[1][1]
    assert found.skipped == [(folder, "1 other file skipped (.txt)")]


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "jfif", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm"])
def test_suffixes_in_folders(tmp_path: Path, suffix: str) -> None:
    image = Image.fromarray(GREY if suffix == "pgm" else RGB)
    image.save(tmp_path / f"a.{suffix}", format="JPEG" if suffix == "jfif" else None)
    (path,) = find_images([tmp_path]).images
    assert read_image(path).shape == (3, 6, 8)


@pytest.mark.parametrize(
    ("files", "remark"),
    [
        (["b.heic", "c.HEIC"], "2 other files skipped (.heic)"),
        (["b.heic", "c", ".hidden"], "2 other files skipped (.heic, no suffix)"),
        ([f"b.{letter}" for letter in "abcdef"], "6 other files skipped (.a, .b, .c, .d, .e, …)"),
    ],
)
def test_other_files_are_counted(tmp_path: Path, files: list[str], remark: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    ((_, reason),) = find_images([tmp_path]).problems
    assert reason.endswith(remark)
    (tmp_path / "a.png").touch()
    found = find_images([tmp_path])
    assert found.skipped == [(tmp_path, remark)] and not found.problems


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").touch()
    monkeypatch.chdir(tmp_path)
    found = find_images([""])
    assert not found.images and "empty name" in found.problems[0][1]
    assert find_images(["."]).images == [Path("a.png")]


def test_links_that_go_round_in_circles(tmp_path: Path) -> None:
    try:
        (tmp_path / "a.png").symlink_to("b.png")
        (tmp_path / "b.png").symlink_to("a.png")
    except OSError:
        pytest.skip("no symbolic links here")
    found = find_images([tmp_path, tmp_path / "a.png"])
    assert set(found.images) == {tmp_path / "a.png", tmp_path / "b.png"} and not found.problems
    for path in found.images:
        with pytest.raises(UnreadableImage, match="a.png|b.png"):
            read_image(path)


def test_bytes_round_trip() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    images = from_uint8(every)
    assert images.min() == -1 and images.max() == 1
    assert torch.equal(to_uint8(images), every)


def test_bytes_are_clamped_and_rounded() -> None:
    images = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0, 10.4 / 127.5 - 1, 10.6 / 127.5 - 1])
    assert to_uint8(images).tolist() == [0, 0, 128, 255, 255, 10, 11]  # 0 is 127.5, whose even neighbour is 128
    with pytest.raises(ValueError, match="floating-point"):
        to_uint8(torch.zeros(3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8"):
        from_uint8(torch.zeros(3, 4, 4))


def test_write_png(tmp_path: Path) -> None:
    image = torch.rand(3, 6, 8) * 3 - 1.5
    write_png(image, tmp_path / "a.png")
    write_png(image, tmp_path / "b.png")
    assert torch.equal(read_image(tmp_path / "a.png"), from_uint8(to_uint8(image)))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    image[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        write_png(image, tmp_path / "c.png")
    with pytest.raises(ValueError, match="one image"):
        write_png(image[None], tmp_path / "c.png")
