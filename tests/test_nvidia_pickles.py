"""NVIDIA's network pickles: the same pictures, all settings honoured or refused by name."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from nvidia_files import EasyDict, Network, network, write

from models.checkpoints import load_generator
from models.generator import Generator
from models.layers import upsampling_filter


def make(depth: int = 2, clamp: float | None = None) -> Generator:
    torch.manual_seed(0)
    generator = Generator(32, [8, 6, 6, 4], 10, 12, depth, conv_clamp=clamp).eval().requires_grad_(False)
    generator.w_avg.normal_()
    for name, parameter in generator.named_parameters():
        if name.endswith((".bias", "noise_strength")):
            parameter.add_(torch.randn_like(parameter) * (10 if "mapping" in name else 0.3))
    return generator


def draw(generator: Generator) -> torch.Tensor:
    z = torch.randn(3, generator.z_dim, generator=torch.Generator().manual_seed(1))
    return generator(z, truncation_psi=0.7)


def snapshot(net: Network) -> dict:
    other = Network("Discriminator", {"weight": torch.ones(3)}, modules={"fc": torch.nn.Linear(2, 2)})
    kwargs = EasyDict(class_name="training.dataset.ImageFolderDataset", path="x.zip", xflip=False)
    return {"G": net, "D": other, "G_ema": net, "augment_pipe": None, "training_set_kwargs": kwargs}


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("repository", ["ada", "sg3"])
@pytest.mark.parametrize("depth", [2, 8])
@pytest.mark.parametrize("clamp", [None, 256])
def test_same_pictures(tmp_path, protocol, repository, depth, clamp) -> None:
    generator = make(depth, clamp)
    path = write(snapshot(network(generator, clamp, repository=repository)), tmp_path / "network.pkl", protocol)
    loaded = load_generator(path)
    assert loaded.config == generator.config
    for name, tensor in generator.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    torch.testing.assert_close(draw(loaded), draw(generator))


def reference(generator: Generator, ws: torch.Tensor, clamp: float | None) -> torch.Tensor:
    """Draws one picture in float64 from the definition: kernels per sample, zeros between pixels, every step apart."""
    t = {name: tensor.double() for name, tensor in generator.state_dict().items()}
    limit = math.inf if clamp is None else clamp
    kernel = upsampling_filter().double()[None, None]

    def styles(name, w):
        weight = t[f"{name}.affine.weight"]
        return w @ weight.T / math.sqrt(weight.shape[1]) + t[f"{name}.affine.bias"]

    def spread(x):
        result = x.new_zeros(*x.shape[:2], 2 * x.shape[2] - 1, 2 * x.shape[3] - 1)
        result[:, :, ::2, ::2] = x
        return result

    def layer(name, x, w, up):
        weight = t[f"{name}.weight"] * styles(name, w)[0][:, None, None]
        weight = weight / (weight.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up:
            x = F.conv2d(spread(x), weight.flip(2, 3), padding=2)
            x = F.conv2d(x, kernel.expand(x.shape[1], 1, 4, 4), padding=1, groups=x.shape[1])
        else:
            x = F.conv2d(x, weight, padding=1)
        x = x + t[f"{name}.noise_const"] * t[f"{name}.noise_strength"] + t[f"{name}.bias"][:, None, None]
        return (F.leaky_relu(x, 0.2) * math.sqrt(2)).clamp(-limit, limit)

    x, rgb, index, codes = t["synthesis.b4.const"][None], None, 0, ws.double()
    for size in generator.synthesis.resolutions:
        for name in ("conv0", "conv1") if size > 4 else ("conv1",):
            x = layer(f"synthesis.b{size}.{name}", x, codes[:, index], name == "conv0")
            index += 1
        name = f"synthesis.b{size}.torgb"
        weight = t[f"{name}.weight"] * (styles(name, codes[:, index])[0] / math.sqrt(x.shape[1]))[:, None, None]
        y = (F.conv2d(x, weight) + t[f"{name}.bias"][:, None, None]).clamp(-limit, limit)
        if rgb is not None:
            rgb = F.conv2d(F.pad(spread(rgb), (2, 2, 2, 2)), kernel.expand(3, 1, 4, 4), groups=3)
        rgb = y if rgb is None else rgb + y
    return rgb


@pytest.mark.parametrize("clamp", [None, 0.4])
def test_conv_clamp_is_honoured(tmp_path, clamp) -> None:
    generator = make()
    path = write(snapshot(network(generator, clamp)), tmp_path / "network.pkl")
    loaded = load_generator(path)
    ws = loaded.mapping(torch.randn(1, 10))
    free = reference(generator, ws, None)
    expected = reference(generator, ws, clamp)
    assert clamp is None or (free - expected).abs().max() > 0.3  # features exceed the limit
    torch.testing.assert_close(loaded.synthesis(ws).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("multiplier", [0.1, 1.0, 0.002])
def test_other_learning_rates_of_the_mapping_give_the_same_function(tmp_path, multiplier) -> None:
    generator = make()
    path = write(snapshot(network(generator, multiplier=multiplier)), tmp_path / "network.pkl")
    torch.testing.assert_close(draw(load_generator(path)), draw(generator), atol=1e-5, rtol=1e-4)


def test_network_without_noise(tmp_path) -> None:
    generator = make()
    loaded = load_generator(write(snapshot(network(generator, noise=False)), tmp_path / "network.pkl"))
    ws = generator.mapping(torch.randn(2, 10))
    torch.testing.assert_close(loaded.synthesis(ws), generator.synthesis(ws, "none"))


def test_missing_mean_is_computed(tmp_path) -> None:
    net = network(make())
    net.at("mapping").state["_buffers"] = {}
    loaded = load_generator(write(snapshot(net), tmp_path / "network.pkl"))
    assert (loaded.w_avg - loaded.mapping(torch.randn(5000, 10))[:, 0].mean(dim=0)).abs().max() < 0.1


def test_float16_is_read(tmp_path) -> None:
    generator, net = make(), network(make())
    for name in ("synthesis.b32.conv0", "synthesis.b4.conv1"):
        own = net.at(name).state["_parameters"]
        own["weight"] = torch.nn.Parameter(own["weight"].half(), requires_grad=False)
    loaded = load_generator(write(snapshot(net), tmp_path / "network.pkl"))
    assert torch.equal(loaded.synthesis.b4.conv1.weight, generator.synthesis.b4.conv1.weight.half().float())


def test_network_under_g_alone_is_taken_with_a_warning(tmp_path, caplog) -> None:
    path = write({"G": network(make()), "D": None}, tmp_path / "network.pkl")
    loaded = load_generator(path)
    assert "no averaged weights" in caplog.text
    torch.testing.assert_close(draw(loaded), draw(make()))


def test_network_alone_is_taken(tmp_path) -> None:
    loaded = load_generator(write(network(make()), tmp_path / "network.pkl"))
    torch.testing.assert_close(draw(loaded), draw(make()))


# --- refusals ---

CHANGES = {
    "conditional": ("", "c_dim", 10, "the generator has c_dim 10"),
    "conditional mapping": ("mapping", "c_dim", 3, "mapping has c_dim 3"),
    "grey": ("", "img_channels", 1, "the generator has img_channels 1"),
    "residual": ("synthesis.b16", "architecture", "resnet", r"synthesis\.b16 has architecture 'resnet'"),
    "one clamp differs": ("synthesis.b16.conv0", "conv_clamp", 100, "conv_clamp differs from layer to layer"),
    "clamp is no number": ("synthesis.b16.conv0", "conv_clamp", "256", "expected conv_clamp to be a number"),
    "other activation": ("synthesis.b8.conv1", "activation", "relu", r"b8\.conv1 has activation 'relu'"),
    "other mapping": ("mapping.fc1", "activation", "swish", r"mapping\.fc1 has activation 'swish'"),
    "activated style": ("synthesis.b8.conv1.affine", "activation", "lrelu", "affine has activation 'lrelu'"),
    "no upsampling": ("synthesis.b8.conv0", "up", 1, r"b8\.conv0 has up 1"),
    "padding": ("synthesis.b8.conv0", "padding", 0, r"b8\.conv0 has padding 0"),
    "gain": ("synthesis.b8.conv0", "act_gain", 1.0, r"b8\.conv0 has act_gain 1\.0"),
    "weight gain": ("synthesis.b8.torgb", "weight_gain", 1.0, r"b8\.torgb has weight_gain 1\.0"),
    "no gain": ("mapping.fc0", "bias_gain", None, r"mapping\.fc0 has bias_gain None"),
    "endless gain": ("mapping.fc0", "bias_gain", 10**400, "int too large"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_are_refused_by_name(tmp_path, change) -> None:
    where, name, value, message = CHANGES[change]
    net = network(make())
    (net.at(where) if where else net).state[name] = value
    path = write(snapshot(net), tmp_path / "network.pkl")
    with pytest.raises(ValueError, match=rf"network\.pkl.*{message}.*Supported"):
        load_generator(path)


def test_other_filters_are_refused(tmp_path) -> None:
    net = network(make())
    net.at("synthesis.b8.conv0").state["_buffers"]["resample_filter"] = torch.full((4, 4), 1 / 16)
    with pytest.raises(ValueError, match=r"b8\.conv0\.resample_filter is another filter"):
        load_generator(write(snapshot(net), tmp_path / "network.pkl"))


def test_missing_tensor_is_named(tmp_path) -> None:
    net = network(make())
    net.at("synthesis.b8.conv0").state["_parameters"]["bias"] = None
    with pytest.raises(ValueError, match=r"synthesis\.b8\.conv0\.bias"):
        load_generator(write(snapshot(net), tmp_path / "network.pkl"))


def test_stylegan3_is_refused_by_name(tmp_path) -> None:
    layers = {
        "input": Network("SynthesisInput", buffers={"freqs": torch.ones(3)}),
        "L0_36_512": Network("SynthesisLayer"),
    }
    synthesis = Network("SynthesisNetwork", modules=layers)
    net = Network("Generator", modules={"synthesis": synthesis, "mapping": Network("MappingNetwork")}, c_dim=0)
    with pytest.raises(ValueError, match="a StyleGAN3 generator"):
        load_generator(write(snapshot(net), tmp_path / "network.pkl"))


def test_discriminators_are_refused_by_name(tmp_path) -> None:
    colours = Network("Conv2dLayer", {"weight": torch.ones(3)})
    critic = Network("Discriminator", modules={"b4": Network("Block", modules={"fromrgb": colours})})
    for content in ({"D": critic}, {"G_ema": critic}):
        with pytest.raises(ValueError, match="a discriminator"):
            load_generator(write(content, tmp_path / "network.pkl"))


def test_other_content_is_refused(tmp_path) -> None:
    for content in ([1, 2], {"x": 1}, {"G_ema": {"a": 1}}, {"G_ema": Network("Encoder")}, None):
        with pytest.raises(ValueError, match=r"network\.pkl.*Supported are"):
            load_generator(write(content, tmp_path / "network.pkl"))


class TensorFlowNetwork:
    def __init__(self, variables) -> None:
        self.state = {"version": 4, "name": "G", "static_kwargs": EasyDict(), "components": {}, "variables": variables}

    def __getstate__(self):
        return self.state


TensorFlowNetwork.__module__, TensorFlowNetwork.__qualname__ = "dnnlib.tflib.network", "Network"
TensorFlowNetwork.__name__ = "Network"


@pytest.mark.parametrize(
    "name, message",
    [("4x4/ToRGB/weight", r"TensorFlow.*legacy\.py"), ("ToRGB_lod0/weight", "StyleGAN1")],
)
def test_tensorflow_is_refused_by_name(tmp_path, monkeypatch, name, message) -> None:
    module = types.ModuleType("dnnlib.tflib.network")
    module.Network = TensorFlowNetwork
    fakes = {"dnnlib.tflib": types.ModuleType("dnnlib.tflib"), "dnnlib.tflib.network": module}
    for key, fake in fakes.items():
        monkeypatch.setitem(sys.modules, key, fake)
    part = TensorFlowNetwork([(name, torch.zeros(3).numpy())])
    whole = TensorFlowNetwork([("lod", torch.zeros(1).numpy())])
    whole.state["components"] = EasyDict(synthesis=part)
    path = write((whole, whole, whole), tmp_path / "network.pkl")
    with pytest.raises(ValueError, match=message):
        load_generator(path)
