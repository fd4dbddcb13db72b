"""pSp as an encoder of this project: called like ours, it does what pSp's own network does, and takes its weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from psp_files import WIDTHS, checkpoint, tensors_of
from small_runs import PixelDistance, tiny_networks, write_faces

import evaluate
import evaluation.metrics
from cli.psp_bundle import main
from models.bundle import load_bundle
from models.encoder_base import face_noise
from models.psp import PspVariant, load_psp_encoder

D = 16


@pytest.fixture(scope="module")
def encoder() -> PspVariant:
    torch.manual_seed(0)
    made = PspVariant(32, 8, D, widths=WIDTHS).eval()
    made.latents.w_avg.copy_(torch.randn(D))
    return made


def resized_by_pillow(faces: torch.Tensor) -> torch.Tensor:
    planes = [
        Image.fromarray(plane.numpy(), "F").resize((256, 256), Image.Resampling.BILINEAR)
        for plane in faces.flatten(0, 1)
    ]
    return torch.from_numpy(np.stack(planes)).unflatten(0, faces.shape[:2])


@pytest.mark.parametrize("size", [4, 11, 32])
def test_faces_are_blown_up_as_psp_does(encoder, size) -> None:
    faces = torch.rand(2, 3, size, size) * 2 - 1
    torch.testing.assert_close(encoder.on_canvas(faces), resized_by_pillow(faces), atol=1e-5, rtol=0)


def test_samples_have_the_fine_styles_of_random_faces() -> None:
    torch.manual_seed(1)
    encoder = PspVariant(64, 10, D, widths=WIDTHS).eval()
    lr = torch.rand(2, 3, 8, 8) * 2 - 1
    noise = face_noise(lr, 3, encoder.noise_dim, seed=1)
    ws = encoder(lr, noise).ws
    assert torch.equal(ws[:, 1:, :7], ws[:, :1, :7].expand(-1, 2, -1, -1))
    # One w for all of them: nothing of the point estimate is left.
    random = encoder.latents.sample(noise[:, 1:])[:, :, None].expand(-1, -1, 3, -1)
    torch.testing.assert_close(ws[:, 1:, 7:], random, atol=1e-5, rtol=1e-4)


def test_styles_of_another_width_are_narrowed() -> None:
    assert PspVariant(32, 8, 8, widths=WIDTHS).eval()(torch.zeros(1, 3, 8, 8)).ws.shape == (1, 1, 8, 8)


def test_full_size_has_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        encoder = PspVariant(1024, 18, 512)
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6) == 267


# --- weights of others ---


@pytest.mark.parametrize("kind", ["psp", "e4e"])
def test_official_weights_become_a_bundle_and_a_row(tmp_path, tiny_bundle, monkeypatch, kind) -> None:
    """Its codes are exactly theirs."""
    torch.save(checkpoint(8, kind), tmp_path / "psp.pt")
    monkeypatch.setattr("cli.psp_bundle.load_generator", lambda path: tiny_networks()[0])
    monkeypatch.setattr("sys.argv", ["psp_bundle", str(tmp_path / "psp.pt"), "--out", str(tmp_path / "bundle")])
    assert main() == 0
    theirs, ours = load_psp_encoder(tmp_path / "psp.pt"), load_bundle(tmp_path / "bundle").encoder
    lr = torch.rand(2, 3, 8, 8) * 2 - 1
    assert not torch.allclose(theirs.latent_avg[0], ours.latents.w_avg)
    found, expected = ours(lr).ws[:, 0], theirs(resized_by_pillow(lr))
    assert (found - expected).abs().max() < 5e-3 * expected.abs().max()  # the bundle is in float16

    write_faces(tmp_path / "faces.zip", 2)
    monkeypatch.setitem(evaluation.metrics.NETWORKS, "lpips", PixelDistance)
    command = (
        f"--bundle {tiny_bundle} --bundle {kind}={tmp_path / 'bundle'} --data {tmp_path / 'faces.zip'} --lr 8 --k 2"
    )
    more = ["--methods", "bicubic", "--networks", "lpips", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert evaluate.main([*command.split(), *more]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["8"]
    assert rows[kind]["psnr"] > 0 and rows[f"{kind}+projection"]["lr_psnr"] > rows[kind]["lr_psnr"]


@pytest.mark.parametrize(("kind", "num_ws", "w_dim"), [("e4e", 8, D), ("psp", 10, D), ("psp", 8, 8)])
def test_official_weights_of_another_shape_are_refused(tmp_path, kind, num_ws, w_dim) -> None:
    torch.save(checkpoint(num_ws, kind), tmp_path / "psp.pt")
    with pytest.raises(ValueError, match="expected an encoder with"):
        PspVariant(32, 8, w_dim, widths=WIDTHS).load_psp(tmp_path / "psp.pt")


def test_backbone_comes_from_face_recognition_and_heads_stay(tmp_path, monkeypatch) -> None:
    body = {n: t for n, t in tensors_of(8).items() if n.startswith(("input_layer.", "body."))}
    torch.save({**body, "output_layer.3.weight": torch.zeros(4, 4)}, tmp_path / "model_ir_se50.pth")
    monkeypatch.setattr("models.pretrained.weight_folders", lambda: [tmp_path])
    encoder = PspVariant(32, 8, D, widths=WIDTHS)
    before = {n: t.clone() for n, t in encoder.network.state_dict().items()}
    encoder.load_backbone("model_ir_se50.pth")
    for name, tensor in encoder.network.state_dict().items():
        assert torch.equal(tensor, body.get(name, before[name])), name
    assert any(not torch.equal(body[n], before[n]) for n in body)


def test_missing_backbone_says_which_file_to_put_where(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("models.pretrained.weight_folders", lambda: [tmp_path / "here"])
    with pytest.raises(FileNotFoundError, match=r"model_ir_se50\.pth.*here.*TreB1eN"):
        PspVariant(32, 8, D, widths=WIDTHS).load_backbone()


def test_backbone_of_another_network_is_refused(tmp_path) -> None:
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth.*IR-SE50"):
        PspVariant(32, 8, D, widths=WIDTHS).load_backbone(tmp_path / "other.pth")
