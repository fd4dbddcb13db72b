"""The bundle: what is saved comes back, and what does not fit together is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import models
from models.bundle import ENCODER, FORMAT, GENERATOR, INFO, LATENTS, Bundle, load_bundle, save_bundle
from models.checkpoints import sha256_of
from models.encoder import Encoder
from models.generator import Generator

NOTES = {"name": "tiny", "licence": "none", "training_data": "none", "lr_sizes": [4, 32]}
SETTINGS = {"resolution": 32, "num_ws": 8, "w_dim": 32}


def networks(seed: int = 0) -> tuple[Generator, Encoder]:
    torch.manual_seed(seed)
    generator = Generator(32, channels=(16, 16, 8, 8), z_dim=32, w_dim=32, mapping_layers=2).eval()
    encoder = Encoder(32, generator.num_ws, 32, backbone="test_resnet", width=8).eval()
    encoder.latents.fit(generator, samples=500)
    encoder.spread.fill_(0.5)
    return generator, encoder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    save_bundle(path, *networks(), {**NOTES, "images": 3})
    return path


@pytest.fixture(scope="module")
def bundle(saved: Path) -> Bundle:
    return load_bundle(saved)


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def lr_faces(batch: int, size: int) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def edit(path: Path, **changes: Any) -> None:
    info = json.loads((path / INFO).read_text())
    info.update(changes)
    (path / INFO).write_text(json.dumps(info))


def test_round_trip(bundle: Bundle, saved: Path) -> None:
    generator, encoder = networks()
    lr = lr_faces(2, 8)
    with torch.inference_mode():
        ws = encoder(lr, 3, np.random.default_rng(5))
        images = generator.synthesis(ws.flatten(0, 1)).unflatten(0, (2, 3))
    got_images, got_ws = bundle.upsample(lr, 3, rng=np.random.default_rng(5))
    assert (got_ws - ws).abs().max() < 0.01 * ws.abs().max()  # float16
    assert (got_images - images).abs().max() < 0.02 * images.abs().max()
    assert (bundle.name, bundle.resolution, bundle.lr_sizes, bundle.info["images"]) == ("tiny", 32, (4, 32), 3)
    assert bundle.hash == sha256_of(saved / INFO)
    assert not any(p.requires_grad for p in (*bundle.generator.parameters(), *bundle.encoder.parameters()))
    assert not bundle.encoder.training and not bundle.generator.training


def test_statistics_stay_float32_and_apart(bundle: Bundle, saved: Path) -> None:
    statistics = networks()[1].latents.state_dict()
    stored = load_file(saved / LATENTS)
    assert stored.keys() == statistics.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in statistics.items())
    network = load_file(saved / ENCODER)
    assert not any(name.startswith("latents.") for name in network)
    assert {t.dtype for t in network.values() if t.is_floating_point()} == {torch.float16}
    for part in (ENCODER, LATENTS):
        with safe_open(saved / part, framework="pt") as file:
            assert file.metadata()["generator_sha256"] == sha256_of(saved / GENERATOR)


def test_shapes(bundle: Bundle) -> None:
    ws = bundle.encode(lr_faces(2, 4), k=3)
    assert ws.shape == (2, 3, 8, 32)
    assert bundle.generate(ws).shape == (2, 3, 3, 32, 32)
    assert bundle.generate(ws[:, 0]).shape == (2, 3, 32, 32)
    torch.testing.assert_close(bundle.generate(ws)[:, 0], bundle.generate(ws[:, 0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "k"), [((1, 3, 33, 33), 1), ((1, 3, 3, 3), 1), ((1, 3, 8, 9), 1), ((3, 8, 8), 1), ((1, 3, 8, 8), 0)]
)
def test_encode_refuses(bundle: Bundle, shape: tuple[int, ...], k: int) -> None:
    with pytest.raises(ValueError, match="Expected"):
        bundle.encode(torch.zeros(shape), k)


@pytest.mark.parametrize("shape", [(1, 7, 32), (1, 8, 31), (8, 32), (1, 1, 1, 8, 32)])
def test_generate_refuses(bundle: Bundle, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Expected codes"):
        bundle.generate(torch.zeros(shape))


@pytest.mark.parametrize("part", [GENERATOR, ENCODER, LATENTS])
def test_damaged_part_is_refused(copy: Path, part: str) -> None:
    data = bytearray((copy / part).read_bytes())
    data[-1] ^= 1
    (copy / part).write_bytes(data)
    with pytest.raises(ValueError, match=f"{part}: expected the sha256"):
        load_bundle(copy)


@pytest.mark.parametrize("part", [GENERATOR, ENCODER, LATENTS, INFO])
def test_missing_part_is_named(copy: Path, part: str) -> None:
    (copy / part).unlink()
    with pytest.raises(FileNotFoundError, match=part):
        load_bundle(copy)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Expected a bundle at"):
        load_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize("part", [ENCODER, LATENTS])
def test_part_of_another_generator_is_refused(copy: Path, tmp_path: Path, part: str) -> None:
    save_bundle(tmp_path / "other", *networks(seed=1), NOTES)
    shutil.copy(tmp_path / "other" / part, copy / part)
    parts = json.loads((copy / INFO).read_text())["parts"] | {part: sha256_of(copy / part)}
    edit(copy, parts=parts)  # every checksum is right, and yet they do not belong together
    with pytest.raises(ValueError, match=f"{part}: expected a part made for the generator"):
        load_bundle(copy)


def test_other_tensors_are_refused(copy: Path) -> None:
    tensors = load_file(copy / ENCODER)
    tensors.pop("spread")
    save_file(tensors, copy / ENCODER, {"generator_sha256": sha256_of(copy / GENERATOR)})
    edit(copy, parts=json.loads((copy / INFO).read_text())["parts"] | {ENCODER: sha256_of(copy / ENCODER)})
    with pytest.raises(ValueError, match="spread"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "amortized-pulse/bundle/99"}, FORMAT),
        ({"name": 3}, "name"),
        ({"lr_sizes": [4, 64]}, "lr_sizes"),
        ({"lr_sizes": [8, 4]}, "lr_sizes"),
        ({"parts": None}, "parts"),
        ({"parts": {}}, "sha256"),
        ({"resolution": 64}, "resolution"),
        ({"encoder": {"resolution": 32, "num_ws": 8, "w_dim": 16}}, "w_dim"),
        ({"encoder": {"resolution": 32, "num_ws": 8, "w_dim": 32, "surplus": 1}}, "surplus"),
        ({"encoder": {**SETTINGS, "backbone": "hf-hub:timm/resnet18.a1_in1k"}}, "backbone that the installed timm"),
        ({"encoder": {**SETTINGS, "backbone": "local-dir:/tmp"}}, "backbone that the installed timm"),
        ({"encoder": {**SETTINGS, "backbone": "timm/resnet18"}}, "backbone that the installed timm"),
        ({"encoder": {**SETTINGS, "backbone": "resnet17"}}, "backbone that the installed timm"),
        ({"encoder": {**SETTINGS, "backbone": "vit_tiny_patch16_224"}}, "another version of this software"),
        ({"encoder": {**SETTINGS, "backbone": 18}}, r"backbone \(str\)"),
        ({"encoder": {**SETTINGS, "width": "8"}}, r"width \(int\)"),
        ({"encoder": {**SETTINGS, "width": 10**9}}, r"width \(int\)"),
        ({"encoder": {**SETTINGS, "canvas": 32.0}}, r"canvas \(int\)"),
        ({"encoder": {**SETTINGS, "canvas": True}}, r"canvas \(int\)"),
    ],
)
def test_wrong_info_is_refused(
    copy: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *arguments: pytest.fail("it went to the network"))
    edit(copy, **changes)
    with pytest.raises(ValueError, match=message):
        load_bundle(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_no_json_is_refused(copy: Path, content: bytes) -> None:
    (copy / INFO).write_bytes(content)
    with pytest.raises(ValueError, match=INFO):
        load_bundle(copy)


def test_saving_again_replaces_the_parts_and_keeps_the_rest(copy: Path) -> None:
    (copy / "boundaries").mkdir()
    (copy / "boundaries" / "smile.npz").write_bytes(b"x")
    before = load_bundle(copy).hash
    save_bundle(copy, *networks(seed=1), NOTES)
    assert load_bundle(copy).hash != before
    assert (copy / "boundaries" / "smile.npz").read_bytes() == b"x"
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_failed_saving_leaves_the_old_one(copy: Path) -> None:
    before = load_bundle(copy).hash
    generator, encoder = networks(seed=1)
    encoder.spread.fill_(1e9)
    with pytest.raises(ValueError, match="float16"):
        save_bundle(copy, generator, encoder, NOTES)
    assert load_bundle(copy).hash == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_failed_swap_leaves_the_old_one(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = load_bundle(copy).hash, Path.rename

    def stops(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stops)
    with pytest.raises(OSError, match="Input/output"):
        save_bundle(copy, *networks(seed=1), NOTES)
    assert load_bundle(copy).hash == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_others_may_read_what_the_umask_lets_them(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        save_bundle(tmp_path / "a", *networks(), NOTES)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {0o666 & ~umask}
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("network", ["generator", "encoder"])
def test_broken_weights_are_named(copy: Path, network: str, value: float) -> None:
    bundle = load_bundle(copy)
    parameters = getattr(bundle, network).state_dict()
    parameters["synthesis.b32.torgb.bias" if network == "generator" else "heads.0.linear.bias"].fill_(value)
    with pytest.raises(ValueError, match=f"bundle's weights are broken: its {network}"):
        bundle.upsample(lr_faces(1, 8))


def test_what_goes_in_must_be_finite(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="Expected faces .* NaN"):
        bundle.encode(torch.full((1, 3, 8, 8), torch.nan))
    with pytest.raises(ValueError, match="Expected finite codes"):
        bundle.generate(torch.full((1, 8, 32), torch.inf))


def test_saving_refuses_strangers(tmp_path: Path) -> None:
    generator, encoder = networks()
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(ValueError, match="something else"):
        save_bundle(tmp_path, generator, encoder, NOTES)
    with pytest.raises(ValueError, match="licence"):
        save_bundle(tmp_path / "a", generator, encoder, {"name": "tiny", "training_data": "none"})
    other = Encoder(64, 10, 32, backbone="test_resnet", width=8)
    with pytest.raises(ValueError, match="64"):
        save_bundle(tmp_path / "b", generator, other, NOTES)
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def test_names_of_the_package() -> None:
    assert models.load_bundle is load_bundle
    with pytest.raises(AttributeError, match="nothing"):
        models.nothing  # noqa: B018


def test_importing_models_leaves_heavy_libraries_alone() -> None:
    code = "import sys, models; sys.exit(any(m in sys.modules for m in ('timm', 'lightning', 'models.encoder')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(models.__file__).parent.parent).returncode == 0


def test_bfloat16_gives_nearly_the_same_codes(bundle: Bundle, saved: Path) -> None:
    fast, lr = load_bundle(saved, precision="bf16"), lr_faces(2, 8)
    wanted, found = (b.encode(lr, 2, np.random.default_rng(0)) for b in (bundle, fast))
    assert found.dtype == torch.float32 and not torch.equal(found, wanted)
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert torch.equal(fast.generate(wanted), bundle.generate(wanted))  # the generator draws as ever
    with pytest.raises(ValueError, match="float32, bf16"):
        load_bundle(saved, precision="fp16")
