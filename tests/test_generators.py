"""Files of generators: what is written is read again, and what is no generator is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from models.checkpoints import load_generator, save_generator, sha256_of
from models.checkpoints.generators import FORMAT, infer_config
from models.generator import Generator
from models.layers import upsampling_filter

SHAPES = {
    "32 px": {"resolution": 32, "channels": [8, 6, 6, 4], "z_dim": 10, "w_dim": 12, "mapping_layers": 2},
    "64 px": {"resolution": 64, "channels": [8, 8, 8, 4, 4], "z_dim": 12, "w_dim": 10, "mapping_layers": 4},
    "128 px": {"resolution": 128, "channels": [4, 6, 8, 4, 4, 2], "z_dim": 8, "w_dim": 8, "mapping_layers": 8},
}


def make(shape: str = "32 px") -> Generator:
    torch.manual_seed(0)
    generator = Generator(**SHAPES[shape])
    generator.w_avg.normal_()
    return generator


def ada_tensors(generator: Generator) -> dict[str, torch.Tensor]:
    """The tensors as StyleGAN2-ADA stores them: with the filters that every network repeats."""
    tensors = dict(generator.state_dict())
    for size in generator.synthesis.resolutions[1:]:
        tensors[f"synthesis.b{size}.resample_filter"] = upsampling_filter() / 4
        tensors[f"synthesis.b{size}.conv0.resample_filter"] = upsampling_filter() / 4
    return tensors


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_is_exact_to_float16(tmp_path, shape) -> None:
    generator, path = make(shape), tmp_path / "new" / "generator.safetensors"
    save_generator(generator, path, {"note": "for the test"})
    loaded = load_generator(path)
    assert loaded.config == {**SHAPES[shape], "conv_clamp": None}
    assert loaded.state_dict().keys() == generator.state_dict().keys()
    for name, tensor in generator.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    with safe_open(path, framework="pt") as file:
        notes = file.metadata()
    assert notes["format"] == FORMAT and notes["note"] == "for the test"
    assert json.loads(notes["config"]) == generator.config
    assert [p.name for p in path.parent.iterdir()] == ["generator.safetensors"]


def test_same_weights_same_bytes(tmp_path) -> None:
    # The safetensors library alone orders three notes at random, one time in six as the time before.
    notes = {"z": "größer", "a": 'quotes " and \\', "m": "1"}
    for i in range(6):
        save_generator(make(), tmp_path / f"{i}.safetensors", notes)
    assert len({sha256_of(path) for path in tmp_path.iterdir()}) == 1
    with safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        assert notes.items() <= file.metadata().items()


def test_overflow_is_refused_and_the_old_file_stays(tmp_path) -> None:
    generator, path = make(), tmp_path / "generator.safetensors"
    save_generator(generator, path)
    before = path.read_bytes()
    with torch.no_grad():
        generator.synthesis.b8.conv0.weight[0] = 1e6
    with pytest.raises(ValueError, match="synthesis.b8.conv0.weight"):
        save_generator(generator, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_refused(tmp_path, value) -> None:
    generator = make()
    generator.w_avg[0] = value
    with pytest.raises(ValueError, match=r"not finite.*mapping\.w_avg"):
        save_generator(generator, tmp_path / "generator.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["generator.pt", "generator", "generator.safetensors.bak"])
def test_another_suffix_is_refused(tmp_path, name) -> None:
    with pytest.raises(ValueError, match=rf"\.safetensors.*{name}"):
        save_generator(make(), tmp_path / "new" / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", SHAPES)
def test_ada_layout_draws_the_same_pictures(tmp_path, shape) -> None:
    generator, path = make(shape), tmp_path / "network.pt"
    torch.save({"G_ema": ada_tensors(generator), "D": {}}, path)
    loaded = load_generator(path)
    assert infer_config(ada_tensors(generator), path) == SHAPES[shape]
    assert loaded.config == generator.config
    z = torch.randn(2, generator.z_dim)
    torch.testing.assert_close(loaded(z), generator(z))


# --- refusals ---


def test_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        load_generator(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("length", [4, 100, -10])
def test_truncated_safetensors_is_refused(tmp_path, length) -> None:
    path = tmp_path / "generator.safetensors"
    save_generator(make(), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"generator\.safetensors.*not a complete"):
        load_generator(path)


def test_safetensors_of_another_kind_is_refused(tmp_path) -> None:
    path = tmp_path / "other.safetensors"
    save_file(make().state_dict(), path, {"format": "amortized-pulse/encoder/1"})
    with pytest.raises(ValueError, match="expected a generator"):
        load_generator(path)


@pytest.mark.parametrize("content", [[1, 2], {"G": {}}, {"G_ema": 3}, torch.zeros(3)])
def test_pt_without_a_generator_is_refused(tmp_path, content) -> None:
    torch.save(content, tmp_path / "network.pt")
    with pytest.raises(ValueError, match=r"network\.pt.*Supported are.*torch\.save"):
        load_generator(tmp_path / "network.pt")


SEEMS = {
    "a web page": b"<!DOCTYPE html><html><body>Sign in</body></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n",
    "an empty file": b"",
    "a JSON text": b'{"message": "Not Found"}',
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "a gzip archive": b"\x1f\x8b\x08" + bytes(100),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
}


@pytest.mark.parametrize("name", ["network.pt", "network.pkl", "network.safetensors"])
@pytest.mark.parametrize("kind", SEEMS)
def test_what_is_no_weights_is_named(tmp_path, kind, name) -> None:
    (tmp_path / name).write_bytes(SEEMS[kind])
    with pytest.raises(ValueError, match=f"{name}: {kind}"):
        load_generator(tmp_path / name)


STRANGE = {
    "number": 3.0,
    "list": [1.0],
    "none": None,
    "sparse": torch.zeros(3, 3).to_sparse(),
    "complex": torch.zeros(3, dtype=torch.complex64),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_values_that_are_no_tensors_are_named(tmp_path, kind) -> None:
    tensors = {**ada_tensors(make()), "synthesis.b8.torgb.bias": STRANGE[kind]}
    torch.save({"G_ema": tensors}, tmp_path / "network.pt")
    with pytest.raises(ValueError, match=r"expected tensors of real numbers.*synthesis\.b8\.torgb\.bias"):
        load_generator(tmp_path / "network.pt")


@pytest.mark.parametrize("name", ["mapping.fc0.weight", "synthesis.b4.conv1.weight"])
@pytest.mark.parametrize("shape", [(), (12,), (2, 3, 4), (0, 3, 3, 3), (12, 0)])
def test_tensors_of_other_dimensions_are_named(tmp_path, name, shape) -> None:
    torch.save({"G_ema": {**ada_tensors(make()), name: torch.zeros(shape)}}, tmp_path / "network.pt")
    with pytest.raises(ValueError, match=f"{name} with"):
        load_generator(tmp_path / "network.pt")


@pytest.mark.parametrize("change", ["missing", "surplus", "misshaped"])
def test_wrong_tensors_are_named(tmp_path, change) -> None:
    tensors, name = ada_tensors(make()), "synthesis.b16.conv0.affine.weight"
    if change == "missing":
        del tensors[name]
    elif change == "surplus":
        name = "synthesis.b16.conv7.weight"
        tensors[name] = torch.zeros(3)
    else:
        tensors[name] = torch.zeros(3, 3)
    torch.save({"G_ema": tensors}, tmp_path / "network.pt")
    with pytest.raises(ValueError, match=name):
        load_generator(tmp_path / "network.pt")


@pytest.mark.parametrize("gone", ["mapping.fc0.weight", "synthesis"])
def test_other_networks_are_refused(tmp_path, gone) -> None:
    tensors = {name: t for name, t in ada_tensors(make()).items() if not name.startswith(gone)}
    torch.save({"G_ema": tensors}, tmp_path / "network.pt")
    with pytest.raises(ValueError, match="names of a StyleGAN2 generator|named as in StyleGAN2-ADA"):
        load_generator(tmp_path / "network.pt")


def test_impossible_resolution_is_refused(tmp_path) -> None:
    tensors = {n.replace("b32", "b48"): t for n, t in ada_tensors(make()).items()}
    torch.save({"G_ema": tensors}, tmp_path / "network.pt")
    with pytest.raises(ValueError, match="48"):
        load_generator(tmp_path / "network.pt")
