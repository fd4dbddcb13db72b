"""Foreign layouts: files as their programs write them draw the pictures of the generator they were made from."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoints import load_generator, read_checkpoint
from models.checkpoints.generators import make_generator
from models.checkpoints.layouts import find_generator
from models.generator import Generator
from models.layers import upsampling_filter

# Written down from the reference programs by hand: their layers and colour outputs, and what these are in ours.
LAYERS = [
    ("", "b4.conv1"),
    ("0", "b8.conv0"),
    ("1", "b8.conv1"),
    ("2", "b16.conv0"),
    ("3", "b16.conv1"),
    ("4", "b32.conv0"),
    ("5", "b32.conv1"),
    ("6", "b64.conv0"),
    ("7", "b64.conv1"),
]
COLOURS = [("to_rgb1", "b4"), ("to_rgbs.0", "b8"), ("to_rgbs.1", "b16"), ("to_rgbs.2", "b32"), ("to_rgbs.3", "b64")]
SHAPES = {
    "32 px": {"resolution": 32, "channels": [8, 6, 6, 4], "z_dim": 10, "w_dim": 10, "mapping_layers": 2},
    "64 px": {"resolution": 64, "channels": [8, 8, 6, 4, 4], "z_dim": 12, "w_dim": 12, "mapping_layers": 8},
}
HERE = Path("network.pt")
CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the example files are not on this machine")


def make(shape: str = "32 px") -> Generator:
    """A generator in which no two tensors of one shape are the same."""
    torch.manual_seed(0)
    generator = Generator(**SHAPES[shape]).eval().requires_grad_(False)
    for tensor in generator.state_dict().values():
        tensor += torch.randn_like(tensor) * 0.3
    return generator


def rosinality(generator: Generator) -> dict[str, Tensor]:
    own, file = generator.state_dict(), {}
    for i in range(generator.mapping.num_layers):
        for part in ("weight", "bias"):
            file[f"style.{i + 1}.{part}"] = own[f"mapping.fc{i}.{part}"]
    file["input.input"] = own["synthesis.b4.const"][None]
    for number, (index, layer) in enumerate(LAYERS[: 2 * len(generator.channels) - 1]):
        name, layer = f"convs.{index}" if index else "conv1", f"synthesis.{layer}"
        file[f"{name}.conv.weight"] = own[f"{layer}.weight"][None]
        file[f"{name}.conv.modulation.weight"] = own[f"{layer}.affine.weight"]
        file[f"{name}.conv.modulation.bias"] = own[f"{layer}.affine.bias"]
        file[f"{name}.noise.weight"] = own[f"{layer}.noise_strength"][None]
        file[f"{name}.activate.bias"] = own[f"{layer}.bias"]
        file[f"noises.noise_{number}"] = own[f"{layer}.noise_const"][None, None]
        if layer.endswith("conv0"):
            file[f"{name}.conv.blur.kernel"] = upsampling_filter()
    for name, block in COLOURS[: len(generator.channels)]:
        file[f"{name}.conv.weight"] = own[f"synthesis.{block}.torgb.weight"][None]
        file[f"{name}.conv.modulation.weight"] = own[f"synthesis.{block}.torgb.affine.weight"]
        file[f"{name}.conv.modulation.bias"] = own[f"synthesis.{block}.torgb.affine.bias"]
        file[f"{name}.bias"] = own[f"synthesis.{block}.torgb.bias"].view(1, 3, 1, 1)
        if name != "to_rgb1":
            file[f"{name}.upsample.kernel"] = upsampling_filter()
    return file


def basicsr(generator: Generator) -> dict[str, Tensor]:
    own, file = generator.state_dict(), {}
    for i in range(generator.mapping.num_layers):
        for part in ("weight", "bias"):
            file[f"style_mlp.{i + 1}.{part}"] = own[f"mapping.fc{i}.{part}"]
    file["constant_input.weight"] = own["synthesis.b4.const"][None]
    for number, (index, layer) in enumerate(LAYERS[: 2 * len(generator.channels) - 1]):
        name, layer = f"style_convs.{index}" if index else "style_conv1", f"synthesis.{layer}"
        file[f"{name}.weight"] = own[f"{layer}.noise_strength"][None]
        file[f"{name}.modulated_conv.weight"] = own[f"{layer}.weight"][None]
        file[f"{name}.modulated_conv.modulation.weight"] = own[f"{layer}.affine.weight"]
        file[f"{name}.modulated_conv.modulation.bias"] = own[f"{layer}.affine.bias"]
        file[f"{name}.activate.bias"] = own[f"{layer}.bias"]
        file[f"noises.noise{number}"] = own[f"{layer}.noise_const"][None, None]
    for name, block in COLOURS[: len(generator.channels)]:
        file[f"{name}.bias"] = own[f"synthesis.{block}.torgb.bias"].view(1, 3, 1, 1)
        file[f"{name}.modulated_conv.weight"] = own[f"synthesis.{block}.torgb.weight"][None]
        file[f"{name}.modulated_conv.modulation.weight"] = own[f"synthesis.{block}.torgb.affine.weight"]
        file[f"{name}.modulated_conv.modulation.bias"] = own[f"synthesis.{block}.torgb.affine.bias"]
    return file


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def psp(generator: Generator) -> dict:
    state = {"encoder.input_layer.0.weight": torch.zeros(64, 3, 3, 3), **under("decoder.", rosinality(generator))}
    rows = generator.w_avg.repeat(generator.num_ws, 1)  # (L, D)
    return {"state_dict": state, "latent_avg": rows, "opts": {"encoder_type": "GradualStyleEncoder", "device": "cuda"}}


def gfpgan(generator: Generator) -> dict:
    rest = {"conv_body_first.0.weight": torch.zeros(8, 3, 1, 1), "final_linear.weight": torch.zeros(4, 4)}
    return {"params_ema": rest | under("stylegan_decoder.", basicsr(generator)), "latent_avg": generator.w_avg}


def lightning(generator: Generator) -> dict:
    state = {
        **under("generator.", make("64 px").state_dict()),
        **under("discriminator.b4.", {"fromrgb.weight": torch.zeros(1)}),
        **under("generator_ema.", generator.state_dict()),
    }
    hyper = {"seed": np.int64(3), ("a", "tuple"): torch.device("cpu"), "when": datetime.datetime(2026, 1, 1)}
    return {"epoch": 3, "state_dict": state, "callbacks": {"Timer": {"start": {1, 2}}}, "hyper_parameters": hyper}


NUMPY = {"fid": np.float64(3.5), "history": np.arange(10), "rng": np.random.default_rng(0).bit_generator.state}
ADAM = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))]).state_dict()
FILES: dict[str, tuple[str, Callable[[Generator], dict]]] = {
    "rosinality": ("rosinality", lambda g: {"g_ema": rosinality(g), "g": {}, "d": {}, "latent_avg": g.w_avg}),
    "rosinality bare": ("rosinality", lambda g: {**rosinality(g), "latent_avg": g.w_avg[None]}),
    "BasicSR": ("BasicSR", lambda g: {"params": {"x": 1}, "params_ema": basicsr(g), "latent_avg": g.w_avg}),
    "BasicSR bare": ("BasicSR", lambda g: {**basicsr(g), "latent_avg": g.w_avg}),
    "GFPGAN": ("BasicSR", gfpgan),
    "pSp": ("rosinality", psp),
    "ADA bare": ("StyleGAN2-ADA", lambda g: dict(g.state_dict())),
    "DataParallel": ("rosinality", lambda g: {"g_ema": under("module.", rosinality(g)), "latent_avg": g.w_avg}),
    "compiled": ("StyleGAN2-ADA", lambda g: {"G_ema": under("module._orig_mod.", dict(g.state_dict()))}),
    "another key": ("rosinality", lambda g: {"generator_ema": rosinality(g), "latent_avg": g.w_avg}),
    "two keys": ("BasicSR", lambda g: {"models": {"ema": basicsr(g), "latent_avg": g.w_avg}, "epoch": 3}),
    "our last.ckpt": ("StyleGAN2-ADA", lightning),
    "pickled": ("StyleGAN2-ADA", lambda g: g),
    "pickled in DataParallel": ("StyleGAN2-ADA", lambda g: {"G": torch.nn.DataParallel(g), "args": Path("x")}),
    "numpy beside": ("rosinality", lambda g: {"g_ema": rosinality(g), "latent_avg": g.w_avg, **NUMPY}),
    "optimizer beside": ("rosinality", lambda g: {"g_optim": ADAM, "g_ema": rosinality(g), "latent_avg": g.w_avg}),
}


def read(content: dict) -> Generator:
    return make_generator(find_generator(content, HERE), HERE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("legacy", [False, True])
def test_every_layout_makes_the_same_pictures(tmp_path, kind, shape, legacy) -> None:
    generator, (layout, content) = make(shape), FILES[kind]
    torch.save(content(generator), tmp_path / "network.pt", _use_new_zipfile_serialization=not legacy)
    loaded = load_generator(tmp_path / "network.pt")
    assert loaded.config == generator.config
    for name, tensor in generator.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    z = torch.randn(2, generator.z_dim)
    torch.testing.assert_close(loaded(z, 0.7), generator(z, 0.7))
    assert read_checkpoint(tmp_path / "network.pt").layout == layout


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("layout", [rosinality, basicsr])
def test_other_peoples_safetensors_are_read(tmp_path, layout, metadata) -> None:
    generator = make()
    tensors = {**under("g_ema.", layout(generator)), "latent_avg": generator.w_avg.clone()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "other.safetensors", metadata)
    loaded = load_generator(tmp_path / "other.safetensors")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in generator.state_dict().items())


@needs_cases
@pytest.mark.parametrize("name", ["data_parallel.pt", "other_key.pt"])
def test_wrappings_of_the_cases_are_read(name) -> None:
    assert load_generator(CASES / name).resolution == 32


@needs_cases
def test_another_filter_under_names_of_ada_is_refused() -> None:
    with pytest.raises(ValueError, match=r"synthesis\.b8\.conv0\.resample_filter is another filter"):
        load_generator(CASES / "other_filter.pt")


def test_nothing_is_copied() -> None:
    file = rosinality(make())
    tensors = find_generator({"g_ema": file}, HERE).tensors
    assert tensors["synthesis.b8.conv0.weight"].data_ptr() == file["convs.0.conv.weight"].data_ptr()
    assert tensors["synthesis.b8.torgb.bias"].data_ptr() == file["to_rgbs.0.bias"].data_ptr()


@pytest.mark.parametrize("keys", [["g"], ["params"], ["models", "generator"]])
def test_weights_that_are_not_averaged_are_read_with_a_warning(keys, caplog) -> None:
    generator = make()
    content = {"latent_avg": generator.w_avg, **rosinality(generator)}
    for key in reversed(keys):
        content = {key: content}
    assert torch.equal(read(content).synthesis.b8.conv0.weight, generator.synthesis.b8.conv0.weight)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and f"'{'.'.join(keys)}'" in record.message


@pytest.mark.parametrize("first", [False, True])
def test_averaged_weights_are_preferred_and_named(first, caplog) -> None:
    caplog.set_level(logging.INFO)
    content = {"g": rosinality(make("64 px")), "g_ema": rosinality(make()), "latent_avg": make().w_avg}
    content = dict(reversed(content.items())) if first else content
    assert read(content).resolution == 32
    assert [r.message for r in caplog.records] == [f"{HERE}: took the averaged weights under 'g_ema'."]


def test_a_part_of_a_larger_network_says_so() -> None:
    checkpoint = find_generator(gfpgan(make()), HERE)
    assert "stylegan_decoder alone" in checkpoint.notes["part"] and "final_linear" in checkpoint.notes["part"]
    assert not any("conv_body" in name for name in checkpoint.tensors)


# --- what files may lack ---


def test_a_missing_mean_latent_is_computed() -> None:
    loaded = read({"g_ema": rosinality(make())})
    rng = torch.Generator().manual_seed(1)
    wanted = loaded.mapping(torch.randn(100_000, loaded.z_dim, generator=rng))[:, 0]
    error = wanted.std(dim=0) / 100_000**0.5  # of a mean
    assert ((loaded.w_avg - wanted.mean(dim=0)).abs() < 6 * error).all() and (loaded.w_avg.abs() > 20 * error).any()


def test_rows_that_differ_are_no_mean_latent(caplog) -> None:
    content = psp(make())
    content["latent_avg"][3] += 1
    assert "mapping.w_avg" not in find_generator(content, HERE).tensors
    assert "differs between styles" in caplog.text


@pytest.mark.parametrize("average", [3.0, torch.tensor(1.0), torch.zeros(0, 10), torch.zeros(10).to_sparse()])
def test_a_mean_latent_that_is_none_is_refused(average) -> None:
    with pytest.raises(ValueError, match=r"expected the mean latent .* under 'latent_avg'"):
        read({"g_ema": rosinality(make()), "latent_avg": average})


def test_a_mean_latent_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mapping\.w_avg"):
        read({"g_ema": rosinality(make()), "latent_avg": torch.zeros(11)})


def test_missing_noise_is_the_same_every_time(caplog) -> None:
    generator = make("64 px")
    file = {name: tensor for name, tensor in rosinality(generator).items() if not name.startswith("noises.")}
    content = {"g_ema": file, "latent_avg": generator.w_avg}
    first, second = read(content), read(content)
    assert "no noise maps for 9 of 9 layers" in caplog.text
    maps = torch.cat([layer.noise_const.flatten() for layer in first.synthesis.layers])
    assert abs(maps.mean()) < 0.05 and abs(maps.std() - 1) < 0.05
    z = torch.randn(1, generator.z_dim)
    assert torch.equal(first(z), second(z))
    torch.testing.assert_close(first(z, noise_mode="none"), generator(z, noise_mode="none"))


# --- refusals ---


@pytest.mark.parametrize("name", ["convs.2.conv.blur.kernel", "to_rgbs.1.upsample.kernel"])
@pytest.mark.parametrize("taps", [[1, 2, 1], [1, 1, 1, 1], [1, 3, 3, 2]])
def test_another_filter_is_refused(name, taps) -> None:
    kernel = torch.outer(torch.tensor(taps), torch.tensor(taps)).float()
    file = {**rosinality(make()), name: kernel / kernel.sum() * 4}
    with pytest.raises(ValueError, match=f"{name} is another filter"):
        read({"g_ema": file})


STRANGERS = {
    "StyleGAN1": ("g_running", ["generator.progression.0.conv1.conv.weight_orig", "style.1.linear.weight_orig"]),
    "StyleGAN1 generator": ("g_ema", ["g_mapping.dense0.weight", "g_synthesis.blocks.4x4.const"]),
    "StyleGAN3": ("G_ema", ["mapping.fc0.weight", "synthesis.input.freqs", "synthesis.L0_36_512.weight"]),
    "StyleGAN3 generator": (None, ["mapping.fc0.weight", "synthesis.L14_256_3.weight"]),
    "conditional": ("G_ema", ["mapping.embed.weight", "mapping.fc0.weight", "synthesis.b4.conv1.weight"]),
    "SWAGAN": ("g_ema", ["input.input", "conv1.conv.weight", "to_rgbs.0.iwt.ll"]),
    "'clean'": ("params_ema", ["stylegan_decoder.constant_input.weight", "stylegan_decoder.style_conv1.bias"]),
    "bilinearly": ("params_ema", ["constant_input.weight", "style_convs.3.bias"]),
    "discriminator": ("params", ["conv_body.0.0.weight", "final_linear.0.weight"]),
    "a discriminator": (None, ["b64.fromrgb.weight", "b4.conv.weight"]),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_networks_of_other_kinds_are_refused_by_name(kind) -> None:
    key, names = STRANGERS[kind]
    tensors = {name: torch.zeros(1) for name in names}
    with pytest.raises(ValueError, match=f"{HERE}.*{kind}.*Supported are"):
        find_generator({key: tensors} if key else tensors, HERE)


def test_unknown_networks_are_refused_with_the_names_found() -> None:
    tensors = {"layer1.0.weight": torch.zeros(3), "layer1.0.bias": torch.zeros(3)}
    with pytest.raises(
        ValueError, match=r"no tensors with the names.*state_dict holds layer1\.0\.bias, layer1\.0\.weight"
    ):
        find_generator({"state_dict": tensors, "epoch": 3}, HERE)


@pytest.mark.parametrize("name", ["convs.17.conv.weight", "convs.17.noise.weight", "noises.noise_99"])
def test_tensors_beyond_the_layout_are_named_and_cost_no_memory(name) -> None:
    # Noise maps of layer 17 would be 2048 px, those of layer 99 more than there is memory on earth.
    with pytest.raises(ValueError, match=f"surplus.*{name}"):
        read({"g_ema": {**rosinality(make()), name: torch.zeros(1)}})


@pytest.mark.parametrize("change", ["missing", "misshaped"])
def test_wrong_tensors_are_named_as_in_ada(change) -> None:
    file = rosinality(make())
    if change == "missing":
        del file["convs.3.conv.modulation.weight"]
    else:
        file["convs.3.conv.modulation.weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"synthesis\.b16\.conv1\.affine\.weight"):
        read({"g_ema": file})
