"""Growing: the first pictures are the old ones, enlarged, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoints import save_generator
from models.discriminator import Discriminator, PooledFeatureDiscriminator
from models.generator import Generator
from models.layers import upsample_2x, upsampling_filter
from training.start import main, start_discriminator, start_generator
from training.stylegan2 import StyleGAN2Training

SHAPE = {"z_dim": 8, "w_dim": 8, "mapping_layers": 2}
CHANNELS = (8, 8, 6, 4)


@pytest.fixture
def small(tmp_path) -> tuple[Generator, str]:
    """A 32 px generator whose noise shows, and its file."""
    generator = Generator(32, CHANNELS, **SHAPE)
    with torch.no_grad():
        for layer in generator.synthesis.layers:
            layer.noise_strength.fill_(0.5)
    path = tmp_path / "generator.safetensors"
    save_generator(generator, path, dtype=torch.float32)
    return generator, str(path)


def test_grown_generator_starts_with_the_old_pictures_enlarged(small) -> None:
    generator, path = small
    grown = Generator(64, (*CHANNELS, 4), **SHAPE)
    assert start_generator(grown, path) is True
    z = torch.randn(3, 8)
    with torch.no_grad():
        expected = upsample_2x(generator(z), upsampling_filter())
        torch.testing.assert_close(grown(z), expected, rtol=1e-5, atol=1e-5)


def test_generator_of_the_same_size_is_taken_over(small) -> None:
    generator, path = small
    same = Generator(32, CHANNELS, **SHAPE)
    assert start_generator(same, path) is False
    for name, tensor in generator.state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor)


@pytest.mark.parametrize("channels", [(8, 8, 6, 6, 4), (8, 8, 6, 4, 4, 4)], ids=["width", "a quarter of the size"])
def test_generator_of_another_shape_is_refused(small, channels) -> None:
    other = Generator(2 ** (len(channels) + 1), channels, **SHAPE)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match="channels"):
        start_generator(other, small[1])
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in before.items())


def test_discriminator_starts_from_float16(tmp_path: Path) -> None:
    theirs, mine = Discriminator(32, CHANNELS), Discriminator(32, CHANNELS)
    path = tmp_path / "discriminator.safetensors"
    save_file({name: tensor.half() for name, tensor in theirs.state_dict().items()}, path)
    start_discriminator(mine, str(path))
    for name, tensor in theirs.state_dict().items():
        assert mine.state_dict()[name].dtype == torch.float32
        assert torch.equal(mine.state_dict()[name], tensor.half().float())
    with pytest.raises(ValueError, match="blocks.0.conv1.weight"):
        start_discriminator(Discriminator(32, (8, 8, 8, 4)), str(path))


def test_training_starts_where_another_one_stopped(tmp_path) -> None:
    arguments = {"resolution": 32, "channels": CHANNELS, **SHAPE}
    theirs = StyleGAN2Training(**arguments)
    with torch.no_grad():
        for network in (theirs.generator_ema, theirs.generator_ema_short):
            network.synthesis.b4.const.normal_()
    theirs.feature_discriminator = PooledFeatureDiscriminator((6,))
    torch.save({"state_dict": theirs.state_dict(), "loops": {}}, tmp_path / "last.ckpt")
    main(["--checkpoint", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "start")])
    files = {f"init_{name}": str(tmp_path / "start" / f"{name}.safetensors") for name in ("generator", "discriminator")}
    ours = StyleGAN2Training(**arguments, **files)
    for mine, average in ((ours.generator, theirs.generator_ema), (ours.discriminator, theirs.discriminator)):
        for name, tensor in average.state_dict().items():
            assert torch.equal(mine.state_dict()[name], tensor.half().float()), name
    features = PooledFeatureDiscriminator((6,))
    start_discriminator(ours.discriminator, files["init_discriminator"], features)
    for name, tensor in theirs.feature_discriminator.state_dict().items():
        assert torch.equal(features.state_dict()[name], tensor.half().float()), name
