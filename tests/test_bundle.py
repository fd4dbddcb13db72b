"""The bundle: what is saved comes back, and what does not fit together is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import CHANNELS, NOTES, SMALL, D, tiny_networks, write_bundle

import models
from models.bundle import ENCODER, FORMAT, GENERATOR, INFO, LATENTS, Bundle, load_bundle, make_encoder, save_bundle
from models.checkpoints import sha256_of
from models.encoder import Encoder
from models.encoder_base import face_noise

SETTINGS = {"resolution": 32, "num_ws": 8, "w_dim": D, "channels": list(CHANNELS), **SMALL}


def lr_faces(batch: int, size: int) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def edit(path: Path, **changes: Any) -> None:
    info = json.loads((path / INFO).read_text())
    info.update(changes)
    (path / INFO).write_text(json.dumps(info))


def test_round_trip(bundle: Bundle, tiny_bundle: Path, networks) -> None:
    generator, encoder = networks
    lr = lr_faces(2, 8)
    with torch.inference_mode():
        ws, details = encoder(lr, face_noise(lr, 3, encoder.noise_dim, seed=5))
        rows = {size: d.flatten(0, 1) for size, d in details.items()}
        images = generator.synthesis(ws.flatten(0, 1), details=rows).unflatten(0, (2, 3))
    found = bundle.encode(lr, 3, seed=5)
    assert (found.ws - ws).abs().max() < 0.01 * ws.abs().max()  # float16
    faces = bundle.generate(found)
    assert (faces - images).abs().max() < 0.02 * images.abs().max()
    assert (faces - bundle.generate(found.ws)).abs().max() > 0.04 * images.abs().max()  # the details count
    assert (bundle.name, bundle.resolution, bundle.lr_sizes, bundle.info["licence"]) == ("tiny", 32, (4, 32), "none")
    assert bundle.hash == sha256_of(tiny_bundle / INFO)
    assert not any(p.requires_grad for p in (*bundle.generator.parameters(), *bundle.encoder.parameters()))
    assert not bundle.encoder.training and not bundle.generator.training


@pytest.mark.parametrize(
    "config",
    [{"variant": "psp", "widths": [16] * 5}, {"variant": "propulse", "backbone": "test_resnet", "width": 8, "rank": 3}],
    ids=lambda config: config["variant"],
)
def test_other_encoders_come_back(tmp_path: Path, networks, config: dict[str, Any]) -> None:
    encoder = make_encoder({"resolution": 32, "num_ws": 8, "w_dim": D, **config}).eval().requires_grad_(False)
    save_bundle(tmp_path / "b", networks[0], encoder, {**NOTES, "lr_sizes": [8, 16]})
    loaded, lr = load_bundle(tmp_path / "b"), lr_faces(1, 8)
    assert loaded.encoder.config == encoder.config and loaded.lr_sizes == (8, 16)
    torch.testing.assert_close(loaded.encode(lr).ws, encoder(lr).ws, atol=1e-2, rtol=1e-2)
    assert loaded.noise_ratio(torch.tensor([25.0])) > 0


def test_statistics_stay_float32_and_apart(tiny_bundle: Path, networks) -> None:
    statistics = networks[1].latents.state_dict()
    stored = load_file(tiny_bundle / LATENTS)
    assert stored.keys() == statistics.keys()
    assert all(torch.equal(stored[name].float(), tensor) for name, tensor in statistics.items())
    assert {name for name in stored if stored[name].dtype == torch.float16} == {"directions"}
    network = load_file(tiny_bundle / ENCODER)
    assert not any(name.startswith("latents.") for name in network)
    assert {t.dtype for t in network.values() if t.is_floating_point()} == {torch.float16}
    for part in (ENCODER, LATENTS):
        with safe_open(tiny_bundle / part, framework="pt") as file:
            assert file.metadata()["generator_sha256"] == sha256_of(tiny_bundle / GENERATOR)


def test_shapes(bundle: Bundle) -> None:
    ws, details = encoding = bundle.encode(lr_faces(2, 4), k=3)
    assert ws.shape == (2, 3, 8, D) and {size: d.shape[:2] for size, d in details.items()} == {8: (2, 3), 16: (2, 3)}
    assert bundle.generate(encoding).shape == (2, 3, 3, 32, 32)
    assert bundle.generate(ws[:, 0]).shape == (2, 3, 32, 32)
    torch.testing.assert_close(bundle.generate(ws)[:, 0], bundle.generate(ws[:, 0]), rtol=1e-4, atol=1e-4)


def test_noise_is_weighed_against_what_the_generator_lacks(bundle: Bundle) -> None:
    """The ratio is σ²/τ², with σ in units of [-1, 1]."""
    assert bundle.noise_ratio(torch.zeros(2)) is None
    ratio = bundle.noise_ratio(torch.tensor([0.0, 25.0]))
    expected = torch.tensor([0.0, (25 / 127.5) ** 2 / float(bundle.encoder.lacking)])
    torch.testing.assert_close(ratio, expected)


@pytest.mark.parametrize(
    ("shape", "k"), [((1, 3, 33, 33), 1), ((1, 3, 3, 3), 1), ((1, 3, 8, 9), 1), ((3, 8, 8), 1), ((1, 3, 8, 8), 0)]
)
def test_encode_refuses(bundle: Bundle, shape: tuple[int, ...], k: int) -> None:
    with pytest.raises(ValueError, match="Expected"):
        bundle.encode(torch.zeros(shape), k)


@pytest.mark.parametrize("shape", [(1, 7, D), (1, 8, D - 1), (8, D), (1, 1, 1, 8, D)])
def test_generate_refuses(bundle: Bundle, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Expected codes"):
        bundle.generate(torch.zeros(shape))


@pytest.mark.parametrize("part", [GENERATOR, ENCODER, LATENTS])
def test_damaged_part_is_refused(bundle_copy: Path, part: str) -> None:
    data = bytearray((bundle_copy / part).read_bytes())
    data[-1] ^= 1
    (bundle_copy / part).write_bytes(data)
    with pytest.raises(ValueError, match=f"{part}: expected the sha256"):
        load_bundle(bundle_copy)


@pytest.mark.parametrize("part", [GENERATOR, ENCODER, LATENTS, INFO])
def test_missing_part_is_named(bundle_copy: Path, part: str) -> None:
    (bundle_copy / part).unlink()
    with pytest.raises(FileNotFoundError, match=part):
        load_bundle(bundle_copy)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Expected a bundle at"):
        load_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize("part", [ENCODER, LATENTS])
def test_part_of_another_generator_is_refused(bundle_copy: Path, tmp_path: Path, part: str) -> None:
    write_bundle(tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / part, bundle_copy / part)
    parts = json.loads((bundle_copy / INFO).read_text())["parts"] | {part: sha256_of(bundle_copy / part)}
    edit(bundle_copy, parts=parts)  # every checksum is right, and yet they do not belong together
    with pytest.raises(ValueError, match=f"{part}: expected a part made for the generator"):
        load_bundle(bundle_copy)


def test_other_tensors_are_refused(bundle_copy: Path) -> None:
    tensors = load_file(bundle_copy / ENCODER)
    tensors.pop("lacking")
    save_file(tensors, bundle_copy / ENCODER, {"generator_sha256": sha256_of(bundle_copy / GENERATOR)})
    edit(
        bundle_copy,
        parts=json.loads((bundle_copy / INFO).read_text())["parts"] | {ENCODER: sha256_of(bundle_copy / ENCODER)},
    )
    with pytest.raises(ValueError, match="lacking"):
        load_bundle(bundle_copy)


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
        ({"encoder": {**SETTINGS, "w_dim": 8}}, "w_dim"),
        ({"encoder": {**SETTINGS, "surplus": 1}}, "surplus"),
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
    bundle_copy: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *arguments: pytest.fail("it went to the network"))
    edit(bundle_copy, **changes)
    with pytest.raises(ValueError, match=message):
        load_bundle(bundle_copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_no_json_is_refused(bundle_copy: Path, content: bytes) -> None:
    (bundle_copy / INFO).write_bytes(content)
    with pytest.raises(ValueError, match=INFO):
        load_bundle(bundle_copy)


def test_saving_again_replaces_the_parts_and_keeps_the_rest(bundle_copy: Path) -> None:
    (bundle_copy / "directions").mkdir()
    (bundle_copy / "directions" / "smile.npz").write_bytes(b"x")
    before = load_bundle(bundle_copy).hash
    write_bundle(bundle_copy, seed=1)
    assert load_bundle(bundle_copy).hash != before
    assert (bundle_copy / "directions" / "smile.npz").read_bytes() == b"x"
    assert [path.name for path in bundle_copy.parent.iterdir()] == [bundle_copy.name]


def test_failed_saving_leaves_the_old_one(bundle_copy: Path) -> None:
    before = load_bundle(bundle_copy).hash
    generator, encoder = tiny_networks(seed=1)
    encoder.w_std.fill_(1e9)
    with pytest.raises(ValueError, match="float16"):
        save_bundle(bundle_copy, generator, encoder, NOTES)
    assert load_bundle(bundle_copy).hash == before
    assert [path.name for path in bundle_copy.parent.iterdir()] == [bundle_copy.name]


def test_failed_swap_leaves_the_old_one(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = load_bundle(bundle_copy).hash, Path.rename

    def stops(path: Path, target: Path) -> Path:
        if path.parent != bundle_copy.parent and target == bundle_copy:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr("data.files.ctypes.CDLL", lambda name: None)  # no exchange in one step
    monkeypatch.setattr(Path, "rename", stops)
    with pytest.raises(OSError, match="Input/output"):
        write_bundle(bundle_copy, seed=1)
    assert load_bundle(bundle_copy).hash == before
    assert [path.name for path in bundle_copy.parent.iterdir()] == [bundle_copy.name]


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_others_may_read_what_the_umask_lets_them(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        write_bundle(tmp_path / "a")
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {0o666 & ~umask}
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("network", ["generator", "encoder"])
def test_broken_weights_are_named(bundle_copy: Path, network: str, value: float) -> None:
    bundle = load_bundle(bundle_copy)
    parameters = getattr(bundle, network).state_dict()
    parameters["synthesis.b32.torgb.bias" if network == "generator" else "sampler.out.bias"].fill_(value)
    with pytest.raises(ValueError, match=f"bundle's weights are broken: its {network}"):
        bundle.generate(bundle.encode(lr_faces(1, 8)))


def test_what_goes_in_must_be_finite(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="Expected faces .* NaN"):
        bundle.encode(torch.full((1, 3, 8, 8), torch.nan))
    with pytest.raises(ValueError, match="Expected finite codes"):
        bundle.generate(torch.full((1, 8, D), torch.inf))


def test_saving_refuses_strangers(tmp_path: Path, networks) -> None:
    generator, encoder = networks
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(ValueError, match="something else"):
        save_bundle(tmp_path, generator, encoder, NOTES)
    with pytest.raises(ValueError, match="licence"):
        save_bundle(tmp_path / "a", generator, encoder, {"name": "tiny", "training_data": "none"})
    other = Encoder(64, 10, D, (*CHANNELS, 4), **SMALL)
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


def test_bfloat16_gives_nearly_the_same_codes(bundle: Bundle, tiny_bundle: Path) -> None:
    fast, lr = load_bundle(tiny_bundle, precision="bf16"), lr_faces(2, 8)
    wanted, found = (b.encode(lr, 2) for b in (bundle, fast))
    for a, b in zip((wanted.ws, *wanted.details.values()), (found.ws, *found.details.values()), strict=True):
        assert b.dtype == torch.float32 and not torch.equal(a, b) and (a - b).abs().max() < 0.05 * a.abs().max()
    assert torch.equal(fast.generate(wanted), bundle.generate(wanted))  # the generator is the same
    with pytest.raises(ValueError, match="float32, bf16"):
        load_bundle(tiny_bundle, precision="fp16")
