"""Faces from zips and folders, and the order in which training sees them."""

from __future__ import annotations

import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data.contents import find_data
from data.datamodule import FaceData, ResumableSampler
from data.faces import Faces
from data.pack import main as pack_main
from data.shared_memory import affordable_workers

COUNT = 7
CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the example files are not on this machine")


def picture(seed: int, width: int = 20, height: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image) -> bytes:
    with BytesIO() as buffer:
        image.save(buffer, "png")
        return buffer.getvalue()


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def members() -> dict[str, bytes]:
    """Pictures by name, deliberately not in order, and a file that is none."""
    names = [f"{'ab'[i % 2]}/{i:02d}.png" for i in reversed(range(COUNT))]
    return {"readme.txt": b"no picture", **{name: encoded(picture(int(name[2:4]))) for name in names}}


@pytest.fixture
def archive(tmp_path, members) -> Path:
    return write_zip(tmp_path / "faces.zip", members)


@pytest.fixture
def folder(tmp_path, members) -> Path:
    root = tmp_path / "faces"
    for name, content in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


# --- pictures ---


def test_zip_and_folder_hold_the_same_pictures_in_sorted_order(archive, folder) -> None:
    from_zip, from_folder = Faces(archive, 20), Faces(folder, 20)
    assert from_zip.names == from_folder.names == sorted(from_zip.names)
    assert len(from_zip) == COUNT
    for i, name in enumerate(from_zip.names):
        expected = torch.from_numpy(np.array(picture(int(name[2:4])))).permute(2, 0, 1)
        assert torch.equal(from_zip[i], expected) and torch.equal(from_folder[i], expected)
        assert from_zip[i].dtype == torch.uint8


def test_parquet_holds_the_same_pictures(archive, members, tmp_path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = [{"bytes": content, "path": name} for name, content in members.items()]
    parquet.write_table(arrow.table({"image": column}), tmp_path / "faces.parquet", row_group_size=3)
    faces, expected = Faces(tmp_path / "faces.parquet", 20, replace_broken=True), Faces(archive, 20)
    loader = DataLoader(faces, 1, num_workers=1)  # every worker opens the file anew
    found = {name: face[0] for name, face in zip(faces.names, loader, strict=True)}
    assert all(torch.equal(found[name], expected[i]) for i, name in enumerate(expected.names))


def test_limit_takes_the_first(archive) -> None:
    assert Faces(archive, 20, limit=3).names == Faces(archive, 20).names[:3]
    assert len(Faces(archive, 20, limit=100)) == COUNT


@pytest.mark.parametrize("resolution", [8, 32])
def test_resizing_is_pil_bicubic(archive, resolution) -> None:
    faces = Faces(archive, resolution)
    expected = picture(int(faces.names[2][2:4])).resize((resolution, resolution), Image.Resampling.BICUBIC)
    assert np.array_equal(faces[2].permute(1, 2, 0).numpy(), np.array(expected))


def test_images_are_the_first_pictures_at_once(archive) -> None:
    faces = Faces(archive, 16)
    images = faces.images(2)
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.float32
    assert torch.equal(((images + 1) * 127.5).round().byte(), torch.stack([faces[0], faces[1]]))
    assert torch.equal(faces.images(99), faces.images()) and len(faces.images()) == COUNT


def test_cache_gives_the_same_without_reading_again(archive) -> None:
    cached, uncached = Faces(archive, 16), Faces(archive, 16, cache_bytes=0)
    first = cached[3].clone()
    cached._decode = None  # a second read would fail
    assert torch.equal(cached[3], first) and torch.equal(uncached[3], first)
    assert torch.equal(uncached[3], first)


def test_cache_is_used_only_where_all_pictures_fit(archive) -> None:
    needed = COUNT * 3 * 16 * 16
    assert Faces(archive, 16, cache_bytes=needed)._cache is not None
    assert Faces(archive, 16, cache_bytes=needed - 1)._cache is None


@pytest.mark.parametrize("shared", [False, True])
def test_memory_is_shared_only_where_asked(archive, shared) -> None:
    assert Faces(archive, 16, shared=shared)._cache.is_shared() == shared


@pytest.mark.parametrize("hidden", ["__MACOSX/b/._00.png", "b/.trash/00.png", "b/._00.png", ".hidden.png"])
@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_hidden_files_are_passed_by(archive, folder, kind, hidden) -> None:
    if kind == "zip":
        with zipfile.ZipFile(archive, "a") as file:
            file.writestr(hidden, b"resource fork")
    else:
        (folder / hidden).parent.mkdir(parents=True, exist_ok=True)
        (folder / hidden).write_bytes(b"resource fork")
    assert len(Faces(archive if kind == "zip" else folder, 20)) == COUNT


def test_grey_and_transparent_pictures_become_rgb(tmp_path) -> None:
    faces = Faces(write_zip(tmp_path / "f.zip", {
        "a.png": encoded(picture(0).convert("L")), "b.png": encoded(picture(0).convert("RGBA")),
    }), 20)  # fmt: skip
    assert torch.equal(faces[0][0], faces[0][2])
    assert np.array_equal(faces[1].permute(1, 2, 0).numpy(), np.array(picture(0)))


MASKS = ["CelebAMask-HQ-mask-anno/0/00000_hair.png", "masks/00012_l_brow.png", "00003_eye_g.png"]


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_masks_of_celebamask_hq_are_no_faces(archive, folder, kind) -> None:
    for name in (*MASKS, "12345_portrait.png"):
        if kind == "zip":
            with zipfile.ZipFile(archive, "a") as file:
                file.writestr(name, encoded(picture(0)))
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(encoded(picture(0)))
    faces = Faces(archive if kind == "zip" else folder, 20)
    assert len(faces) == COUNT + 1 and "12345_portrait.png" in faces.names


def test_processes_read_one_zip_at_once_whose_directory_was_read_before(archive, monkeypatch) -> None:
    faces, expected = Faces(archive, 20, cache_bytes=0), Faces(archive, 20)
    faces[0]  # the zip is open when the workers are forked
    monkeypatch.setattr(zipfile, "ZipFile", None)  # nobody reads it again
    loader = DataLoader(faces, 1, num_workers=2, sampler=[*range(COUNT)] * 3)
    for i, batch in enumerate(loader):
        assert torch.equal(batch[0], expected[i % COUNT])


# --- shared memory ---


def test_small_shared_memory_is_told_and_survived(archive, monkeypatch) -> None:
    monkeypatch.setattr("data.faces.free_shared_memory", lambda: 1000)
    monkeypatch.setattr("data.shared_memory.free_shared_memory", lambda: 20_000)
    data = FaceData(str(archive), str(archive), 16, batch_size=2, num_workers=4)
    with pytest.warns(UserWarning, match="no room to keep 7 decoded faces.*data.pack"):
        data.setup("validate")
    with pytest.warns(UserWarning, match="room for 4 of 5 data workers"):
        assert affordable_workers(5, 1536) == 4
    assert affordable_workers(4, 1536) == 4
    assert data.val_faces._cache is None and len(next(iter(data.val_dataloader()))) == 2


# --- packed faces ---


def test_packed_faces_are_the_same_and_packed_once(archive, tmp_path, capsys) -> None:
    out = tmp_path / "packed"
    options = ["--resolution", "16", "--out", str(out), "--workers", "0", "--limit", "5"]
    assert pack_main([str(archive), *options]) == 0
    written = (out / "faces.npy").stat().st_mtime_ns
    faces, packed = Faces(archive, 16, limit=5), Faces(out, 16)
    assert packed.names == faces.names and packed._cache is None
    for batch in DataLoader(packed, 5, num_workers=1):
        assert torch.equal(batch, torch.stack([faces[i] for i in range(5)]))
    assert pack_main([str(archive), *options]) == 0 and "already" in capsys.readouterr().out
    assert (out / "faces.npy").stat().st_mtime_ns == written
    with pytest.raises(SystemExit, match="2"):
        pack_main([str(archive), *options[:-1], "4"])
    assert "--out: " in (error := capsys.readouterr().err) and "other faces" in error
    with pytest.raises(ValueError, match="packed at 16 px; pack it at 32 px"):
        Faces(out, 32)


def test_a_pack_that_fails_leaves_nothing(tmp_path) -> None:
    path = write_zip(tmp_path / "f.zip", {"a.png": encoded(picture(0)), "b.png": b"damaged"})
    assert pack_main([str(path), "--resolution", "16", "--out", str(tmp_path / "packed"), "--workers", "0"]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["f.zip"]


# --- refusals ---


def test_picture_that_is_not_square_is_named(tmp_path) -> None:
    faces = Faces(write_zip(tmp_path / "f.zip", {"wide.png": encoded(picture(0, 30, 20))}), 16)
    with pytest.raises(ValueError, match=r"square.*wide\.png has 30x20"):
        faces[0]


@pytest.mark.parametrize("content", [b"garbage", encoded(picture(1))[:200]])
def test_corrupt_picture_is_named(tmp_path, content) -> None:
    path = write_zip(tmp_path / "f.zip", {"good.png": encoded(picture(0)), "zz_bad.png": content})
    with pytest.raises(ValueError, match=r"zz_bad\.png: (not a picture|truncated)"):
        Faces(path, 20)[1]
    assert Faces(path, 20)[0].shape == (3, 20, 20)


@needs_cases
def test_one_broken_picture_never_ends_a_training(caplog) -> None:
    source = CASES / "one_cut_off.zip"
    faces, strict = Faces(source, 16, replace_broken=True, shared=True), Faces(source, 16)
    with pytest.raises(ValueError, match=r"one_cut_off\.zip: 06\.png: truncated"):
        strict[6]
    given = torch.cat([*DataLoader(faces, 5), *DataLoader(faces, 5)])
    others = [i if i != 6 else 7 for i in range(12)] * 2
    assert torch.equal(given, torch.stack([strict[i] for i in others]))
    assert caplog.text.count("06.png") == 1 and "1 of 12 so far" in caplog.text and faces.load(6)[0] == 7


def test_a_data_set_of_broken_pictures_is_refused(tmp_path, caplog) -> None:
    members = {f"{i}.png": encoded(picture(i)) if i < 2 else b"broken" for i in range(5)}
    faces = Faces(write_zip(tmp_path / "f.zip", members), 20, replace_broken=True)
    with pytest.raises(ValueError, match="3 of 5 pictures cannot be read, which are most"):
        faces[2]
    assert len(caplog.records) == 2


def test_damaged_zip_member_is_named(tmp_path) -> None:
    path = write_zip(tmp_path / "f.zip", {"face.png": encoded(picture(0))})
    content = bytearray(path.read_bytes())
    content[200] ^= 0xFF  # the checksum no longer fits
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"face\.png: cannot be read"):
        Faces(path, 20)[0]


def test_encrypted_zip_member_is_named(tmp_path) -> None:
    path = write_zip(tmp_path / "f.zip", {"face.png": encoded(picture(0))})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag in the directory, which zipfile goes by
    content[6] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"face\.png: cannot be read.*encrypted"):
        Faces(path, 20)[0]


def test_broken_compression_is_named(tmp_path) -> None:
    path = tmp_path / "f.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("face.png", bytes(range(256)) * 20)
    content = bytearray(path.read_bytes())
    content[38] = 0xFF  # the first byte of the deflated stream: a block of a kind that does not exist
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"face\.png: cannot be read.*decompressing"):
        Faces(path, 20)[0]


def test_giant_picture_is_named(archive, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"a/00\.png.*megapixels"):
        Faces(archive, 20)[0]


def test_file_that_is_no_zip_is_named(tmp_path) -> None:
    (tmp_path / "faces.zip").write_bytes(b"half a download")
    with pytest.raises(ValueError, match=r"faces\.zip"):
        Faces(tmp_path / "faces.zip", 20)


def test_source_without_pictures_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="found none"):
        Faces(write_zip(tmp_path / "empty.zip", {"a.txt": b""}), 20)


def test_missing_source_says_what_to_put_where() -> None:
    with pytest.raises(FileNotFoundError, match="no_such_faces.zip.*AMORTIZED_PULSE_DATA"):
        find_data("no_such_faces.zip")


def test_data_folder_comes_from_the_environment(archive, monkeypatch, tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("AMORTIZED_PULSE_DATA", str(archive.parent))
    assert find_data("faces.zip") == archive
    assert find_data(archive) == archive


def test_path_itself_wins_then_the_environment_then_the_repository(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("data.contents.ROOT", tmp_path / "repository")
    monkeypatch.setenv("AMORTIZED_PULSE_DATA", str(tmp_path / "own"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    places = [tmp_path / p / "faces.zip" for p in ("here", "own", "repository/datasets", "shared/data")]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    for place in places:
        assert find_data("faces.zip") == place
        place.unlink()


# --- order ---


def order(epoch: int = 0, length: int = 20, **kwargs) -> list[int]:
    sampler = ResumableSampler(range(length), **kwargs)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("skip", [0, 1, 8, 20])
def test_skipping_gives_exactly_the_rest(skip) -> None:
    sampler = ResumableSampler(range(20), seed=3, skip=skip)
    assert list(sampler) == order(seed=3)[skip:]
    assert list(sampler) == order(seed=3)  # only the first epoch is cut


def test_epochs_and_seeds_differ_and_each_holds_everything() -> None:
    orders = [order(0), order(1), order(0, seed=100)]
    assert all(sorted(o) == list(range(20)) for o in orders)
    assert len({tuple(o) for o in orders}) == 3
    assert order(1) == order(1)


@pytest.mark.parametrize("length", [20, 21])
def test_ranks_share_an_epoch(length) -> None:
    shares = [order(2, length, rank=rank, world_size=4) for rank in range(4)]
    assert [len(share) for share in shares] == [length // 4] * 4
    assert len(set().union(*shares)) == 20  # disjoint, and all but the remainder


def test_workers_keep_the_order(archive) -> None:
    faces = Faces(archive, 16, shared=True)
    orders = [
        torch.cat(list(DataLoader(faces, 2, sampler=ResumableSampler(faces, skip=1), num_workers=workers)))
        for workers in (0, 2)
    ]
    assert torch.equal(*orders) and len(orders[0]) == COUNT - 1
    assert faces._cached.sum() == COUNT - 1  # the workers fill one cache


def test_validation_faces_come_in_order(archive) -> None:
    data = FaceData(str(archive), str(archive), resolution=16, batch_size=3, val_limit=5)
    data.setup("validate")
    batches = list(data.val_dataloader())
    assert [len(b) for b in batches] == [3, 2]
    expected = Faces(archive, 16)
    assert torch.equal(torch.cat(batches), torch.stack([expected[i] for i in range(5)]))
