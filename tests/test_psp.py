"""The encoders of pSp and e4e: their files are read, and their arithmetic is that of the papers, written out here."""

from __future__ import annotations

import argparse

import pytest
import torch
import torch.nn.functional as F
from psp_files import WIDTHS, checkpoint, irse50_units, tensors_of
from torch import Tensor

from models.checkpoints import load_generator
from models.generator import Generator
from models.psp import PspEncoder, load_psp_encoder


def oracle(t: dict[str, Tensor], images: Tensor, num_ws: int, kind: str) -> Tensor:
    """The codes (B, L, 16) before the mean latent is added."""
    units = irse50_units(t, images)
    fine, medium, coarse = units[6], units[20], units[23]

    def add(above: Tensor, below: Tensor, name: str) -> Tensor:
        merged = F.conv2d(below, t[f"{name}.weight"], t[f"{name}.bias"])
        return merged + F.interpolate(above, size=merged.shape[2:], mode="bilinear", align_corners=True)

    medium = add(coarse, medium, "latlayer1")
    fine = add(medium, fine, "latlayer2")
    styles = []
    for i in range(num_ws):
        y = coarse if i < 3 else medium if i < 7 else fine
        j = 0
        while f"styles.{i}.convs.{j}.weight" in t:
            name = f"styles.{i}.convs.{j}"
            y = F.leaky_relu(F.conv2d(y, t[f"{name}.weight"], t[f"{name}.bias"], stride=2, padding=1), 0.01)
            j += 2
        styles.append(y[:, :, 0, 0] @ t[f"styles.{i}.linear.weight"].T / 4 + t[f"styles.{i}.linear.bias"])  # 4 = √16
    if kind == "e4e":
        styles = [styles[0], *(styles[0] + delta for delta in styles[1:])]
    return torch.stack(styles, dim=1)


def load(folder, content: object, **arguments: object) -> PspEncoder:
    torch.save(content, folder / "encoder.pt")
    return load_psp_encoder(folder / "encoder.pt", **arguments)


@pytest.mark.parametrize(("kind", "num_ws"), [("psp", 9), ("e4e", 14)])
def test_encoder_does_the_arithmetic_of_its_paper(tmp_path, kind, num_ws) -> None:
    content = checkpoint(num_ws, kind)
    encoder = load(tmp_path, content)
    assert (encoder.kind, encoder.num_ws, encoder.w_dim) == (kind, num_ws, 16)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    images = torch.rand(2, 3, 256, 256) * 2 - 1
    found = encoder(images)
    assert found.shape == (2, num_ws, 16)
    wanted = oracle(tensors_of(num_ws), images, num_ws, kind)
    torch.testing.assert_close(found - content["latent_avg"], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", ["row", "single row", "without", "not used", "namespace"])
def test_mean_latent_is_added_as_the_file_says(tmp_path, change) -> None:
    content = checkpoint(8, "psp")
    wanted = content["latent_avg"].clone()
    if change == "row":
        content["latent_avg"] = wanted[0]
    elif change == "single row":
        content["latent_avg"] = wanted[:1]
    elif change == "without":
        del content["latent_avg"], content["opts"]["start_from_latent_avg"]
        wanted = torch.zeros_like(wanted)
    elif change == "not used":
        content["opts"]["start_from_latent_avg"] = False
        wanted = torch.zeros_like(wanted)
    else:
        content["opts"] = argparse.Namespace(**content["opts"])
    assert torch.equal(load(tmp_path, content).latent_avg, wanted)


def test_missing_mean_latent_is_that_of_the_decoder(tmp_path) -> None:
    torch.manual_seed(1)
    generator = Generator(32, [8, 6, 6, 4], z_dim=16, w_dim=16, mapping_layers=2)
    content = checkpoint(8, "e4e")
    # In our names: the layout of decoders is the subject of test_layouts.py.
    content["state_dict"] |= {f"decoder.{n}": t for n, t in generator.state_dict().items() if n != "mapping.w_avg"}
    del content["latent_avg"]
    encoder = load(tmp_path, content)
    decoder = load_generator(tmp_path / "encoder.pt")
    assert decoder.w_avg.abs().max() > 1e-3
    assert torch.equal(encoder.latent_avg, decoder.w_avg.expand(8, -1))


def test_type_can_be_told_for_files_that_do_not_say(tmp_path) -> None:
    content = checkpoint(8, "e4e")
    del content["opts"]
    with pytest.raises(ValueError, match=r"encoder\.pt.*same tensors; pass kind='psp' or kind='e4e'"):
        load(tmp_path, content)
    assert load(tmp_path, content, kind="e4e").kind == "e4e"
    with pytest.raises(ValueError, match="'psp' or 'e4e', got 'ours'"):
        load(tmp_path, content, kind="ours")


# --- refusals ---


@pytest.mark.parametrize("channels", [1, 6, 19])
def test_encoders_of_sketches_and_label_maps_are_refused(tmp_path, channels) -> None:
    content = checkpoint(8, "psp")
    content["state_dict"]["encoder.input_layer.0.weight"] = torch.zeros(16, channels, 3, 3)
    with pytest.raises(ValueError, match=rf"reads {channels} channels.*label_nc"):
        load(tmp_path, content)


def test_encoders_of_other_types_are_refused(tmp_path) -> None:
    content = checkpoint(8, "psp")
    content["opts"]["encoder_type"] = "BackboneEncoderUsingLastLayerIntoW"
    with pytest.raises(ValueError, match="GradualStyleEncoder or Encoder4Editing, got BackboneEncoderUsing"):
        load(tmp_path, content)


@pytest.mark.parametrize("change", ["missing", "surplus", "misshaped"])
def test_wrong_tensors_are_named(tmp_path, change) -> None:
    content, name = checkpoint(8, "psp"), "body.5.res_layer.4.running_var"
    if change == "missing":
        del content["state_dict"][f"encoder.{name}"]
    elif change == "surplus":
        name = "body.24.res_layer.0.weight"
        content["state_dict"][f"encoder.{name}"] = torch.zeros(3)
    else:
        content["state_dict"][f"encoder.{name}"] = torch.zeros(3)
    with pytest.raises(ValueError, match=name):
        load(tmp_path, content)


@pytest.mark.parametrize("content", [[1], {"g_ema": {}}, {"state_dict": 3}])
def test_files_of_other_kinds_are_refused(tmp_path, content) -> None:
    with pytest.raises(ValueError, match="expected a pSp or e4e checkpoint"):
        load(tmp_path, content)


def test_checkpoints_without_an_encoder_are_refused(tmp_path) -> None:
    content = checkpoint(8, "psp", state_dict={"decoder.input.input": torch.zeros(1, 8, 4, 4)})
    with pytest.raises(ValueError, match="IR-SE50.*under 'encoder.'"):
        load(tmp_path, content)


@pytest.mark.parametrize("average", [3.0, torch.zeros(15), torch.zeros(7, 16), torch.zeros(())])
def test_offsets_of_another_shape_are_refused(tmp_path, average) -> None:
    with pytest.raises(ValueError, match=r"expected the mean latent \(16,\) or \(8, 16\)"):
        load(tmp_path, checkpoint(8, "psp", latent_avg=average))


def test_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        load_psp_encoder(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("shape", [(3, 256, 256), (1, 3, 128, 128), (1, 1, 256, 256), (1, 3, 256, 192)])
def test_images_of_another_shape_are_refused(shape) -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, 256, 256\).*resize"):
        PspEncoder(8, widths=WIDTHS)(torch.zeros(shape))
