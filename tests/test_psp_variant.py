"""pSp as an encoder of this project: called like ours, it does what pSp's own network does, and takes its weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import NOTES, PixelDistance, Record, train, write_faces
from test_psp_encoder import WIDTHS, checkpoint, tensors_of

from models.bundle import load_bundle, save_bundle
from models.encoder import create_encoder, make_encoder
from models.generator import Generator
from models.psp_encoder import load_psp_encoder
from models.psp_variant import PspVariant

D = 16


@pytest.fixture(scope="module")
def encoder() -> PspVariant:
    torch.manual_seed(0)
    made = create_encoder(32, "psp", D, widths=WIDTHS).eval()
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


def test_the_best_guess_comes_first_and_candidates_mix_fine_styles_only() -> None:
    torch.manual_seed(1)
    encoder = create_encoder(64, "psp", D, widths=WIDTHS).eval()
    lr = torch.rand(2, 3, 8, 8) * 2 - 1
    one, same, other = (encoder(lr, 3, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.shape == (2, 3, 10, D)
    assert torch.equal(one[:, 0], encoder(lr)[:, 0]) and torch.equal(one, same)
    assert torch.equal(one[:, 1:, :7], one[:, :1, :7].expand(-1, 2, -1, -1))
    # The fine styles are those of a random face, one w for all of them: nothing of the best guess is left.
    noise = np.random.default_rng(1).standard_normal((2, 2, D), dtype=np.float32)
    random = encoder.latents.sample(torch.from_numpy(noise))[:, :, None].expand(-1, -1, 3, -1)
    torch.testing.assert_close(one[:, 1:, 7:], random, atol=1e-5, rtol=1e-4)
    assert not torch.equal(one[:, 1:], other[:, 1:])
    encoder.spread.zero_()
    assert torch.equal(encoder(lr, 2)[:, 1], one[:, 0])


def test_styles_of_another_width_are_narrowed() -> None:
    assert create_encoder(32, "psp", 8, widths=WIDTHS).eval()(torch.zeros(1, 3, 8, 8)).shape == (1, 1, 8, 8)


def test_full_size_has_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        encoder = create_encoder(1024, "psp")
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6) == 267


# --- weights of others ---


def test_codes_of_official_weights_are_exactly_theirs(encoder, tmp_path) -> None:
    torch.save(checkpoint(8, "psp"), tmp_path / "psp.pt")
    theirs = load_psp_encoder(tmp_path / "psp.pt")
    encoder.load_psp(tmp_path / "psp.pt")
    lr = torch.rand(2, 3, 8, 8) * 2 - 1
    assert not torch.allclose(theirs.latent_avg[0], encoder.latents.w_avg)
    torch.testing.assert_close(encoder(lr)[:, 0], theirs(resized_by_pillow(lr)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "num_ws", "w_dim"), [("e4e", 8, D), ("psp", 10, D), ("psp", 8, 8)])
def test_official_weights_of_another_shape_are_refused(tmp_path, kind, num_ws, w_dim) -> None:
    torch.save(checkpoint(num_ws, kind), tmp_path / "psp.pt")
    with pytest.raises(ValueError, match="expected a pSp encoder with"):
        create_encoder(32, "psp", w_dim, widths=WIDTHS).load_psp(tmp_path / "psp.pt")


def test_backbone_comes_from_face_recognition_and_heads_stay(tmp_path, monkeypatch) -> None:
    body = {n: t for n, t in tensors_of(8).items() if n.startswith(("input_layer.", "body."))}
    torch.save({**body, "output_layer.3.weight": torch.zeros(4, 4)}, tmp_path / "model_ir_se50.pth")
    monkeypatch.setattr("models.pretrained.weight_folders", lambda: [tmp_path])
    encoder = create_encoder(32, "psp", D, widths=WIDTHS)
    before = {n: t.clone() for n, t in encoder.network.state_dict().items()}
    encoder.load_backbone("model_ir_se50.pth")
    for name, tensor in encoder.network.state_dict().items():
        assert torch.equal(tensor, body.get(name, before[name])), name
    assert any(not torch.equal(body[n], before[n]) for n in body)


def test_missing_backbone_says_which_file_to_put_where(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("models.pretrained.weight_folders", lambda: [tmp_path / "here"])
    with pytest.raises(FileNotFoundError, match=r"model_ir_se50\.pth.*here.*TreB1eN"):
        create_encoder(32, "psp", D, widths=WIDTHS).load_backbone()


def test_backbone_of_another_network_is_refused(tmp_path) -> None:
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth.*IR-SE50"):
        create_encoder(32, "psp", D, widths=WIDTHS).load_backbone(tmp_path / "other.pth")


# --- bundles and training ---


@pytest.mark.parametrize(
    ("config", "words"),
    [({"variant": "pspp"}, "'base' or 'psp'"), ({"variant": "psp", "posterior": "flow"}, "posterior"),
     ({"bass": True}, "bass")],
)  # fmt: skip
def test_wrong_settings_are_refused(config, words) -> None:
    with pytest.raises(ValueError, match=words):
        make_encoder({"resolution": 32, "num_ws": 8, "w_dim": D, **config})


def test_training_makes_a_bundle(tmp_path, monkeypatch) -> None:
    write_faces(tmp_path / "faces.zip")
    torch.manual_seed(1)
    generator = Generator(32, (8, 8, 6, 4), z_dim=8, w_dim=8, mapping_layers=2)
    save_bundle(tmp_path / "old", generator, create_encoder(32, "psp", 8, widths=WIDTHS), NOTES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.encoder.LPIPS", PixelDistance)
    monkeypatch.setattr("training.spread.calibrate_spread", lambda *args: None)
    monkeypatch.setattr("sys.argv", ["train.py"])
    settings = {
        "generator": str(tmp_path / "old" / "generator.safetensors"), "variant": "psp", "sizes_per_batch": 2,
        "architecture": {"widths": list(WIDTHS)}, "compile": False, "weight_identity": 0.0, "val_lr": [8],
        "optimiser": "ranger", "decay": "none", "warmup_steps": 0, "loss_size": 16, "learning_rate": 1e-4,
        "init_encoder": str(tmp_path / "old"), "smallest_lr": 8, "largest_lr": 16,
        "export_to": str(tmp_path / "new"), "bundle_info": NOTES,
    }  # fmt: skip
    network = {"class_path": "training.encoder.EncoderTraining", "init_args": settings}
    seldom = {"val_check_interval": 100, "check_val_every_n_epoch": None}
    record = Record()
    train(tmp_path, monkeypatch, record, "run", 3, network, trainer=seldom, save_every=2)
    assert len(record.losses) == 3 and np.isfinite(record.losses).all()
    old, new = load_bundle(tmp_path / "old"), load_bundle(tmp_path / "new")
    assert new.encoder.config == old.encoder.config and new.encoder.config["variant"] == "psp"
    assert isinstance(new.encoder, PspVariant) and new.lr_sizes == (8, 16)
    lr = torch.zeros(1, 3, 8, 8)
    assert new.encode(lr, 3).shape == (1, 3, 8, 8) and not torch.equal(new.encode(lr), old.encode(lr))
