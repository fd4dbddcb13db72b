"""The encoder's options: coordinates for the heads, coarse to fine, side outputs, LR faces at their own size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_runs import NOTES, PixelDistance, Record, train, write_faces

from data.operator import Downscale
from models.bundle import load_bundle, save_bundle
from models.checkpoints import load_generator, save_generator
from models.curvature import Curvature
from models.encoder import Encoder, create_encoder, make_encoder
from models.generator import Generator
from training.coordinates import measure_coordinates
from training.encoder import EncoderTraining
from training.side_outputs import SideOutputs
from training.starting import start_from

D, SMALL = 8, {"backbone": "test_resnet", "width": 8}


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(3)
    return Generator(32, (8, 8, 6, 4), z_dim=D, w_dim=D, mapping_layers=2).eval().requires_grad_(False)


def small(**options) -> Encoder:
    torch.manual_seed(4)
    return Encoder(32, 8, D, **SMALL, **options).eval()


def features_of(encoder: Encoder, faces: int = 2) -> list[torch.Tensor]:
    lr = torch.rand(faces, 3, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return encoder.read(encoder.on_canvas(lr), torch.full((faces,), 8))


def test_without_options_the_settings_are_those_of_older_bundles() -> None:
    expected = {"resolution": 64, "num_ws": 10, "w_dim": 256, "backbone": "resnet18", "width": 160, "canvas": 64}
    assert create_encoder(64, w_dim=256).config == expected


@pytest.mark.parametrize(
    "options",
    [{"rank": 5}, {"base": True}, {"stem_stride": 1}, {"rank": 5, "feedback": 2},
     {"base": True, "posterior": "gaussian"},
     {"rank": 5, "feedback": 2, "scaled_heads": True, "base": True, "stem_stride": 1}],
)  # fmt: skip
def test_bundles_keep_every_option(generator, tmp_path, options) -> None:
    encoder = small(**options)
    encoder.latents.fit(generator, 1000)
    if "rank" in options:
        encoder.latents.set_curvature(Curvature(torch.randn(8 * D, 5), torch.rand(5)))
    encoder = make_encoder(encoder.config).eval().requires_grad_(False)
    save_bundle(tmp_path / "bundle", generator, encoder, NOTES)
    loaded = load_bundle(tmp_path / "bundle").encoder
    assert loaded.config == encoder.config
    lr = torch.zeros(1, 3, 8, 8)
    torch.testing.assert_close(loaded(lr), encoder(lr), atol=1e-2, rtol=1e-2)  # of float16


# --- coordinates for the heads ---


def test_heads_speak_in_coordinates_of_their_own() -> None:
    """w = w̄ + σ P x, with x what the heads of the same encoder without coordinates add to w̄."""
    scaled, plain = small(rank=5), small()
    directions = torch.linalg.qr(torch.randn(8 * D, 5)).Q
    gains = torch.tensor([0.1, 0.2, 0.4, 0.6, 0.9])
    scaled.latents.set_curvature(Curvature(directions, gains))
    scaled.latents.sigma.fill_(0.5)
    features = features_of(plain)
    x = (plain.codes(features) - plain.latents.w_avg).flatten(1)
    matrix = torch.eye(8 * D) + directions @ torch.diag(gains - 1) @ directions.T  # P, which is symmetric
    torch.testing.assert_close(scaled.codes(features_of(scaled)).flatten(1), 0.5 * x @ matrix, atol=1e-6, rtol=1e-5)


def test_coordinates_of_feedback_leave_the_heads_alone() -> None:
    assert small(rank=5).scaled_heads and not small(rank=5, feedback=1).scaled_heads
    assert small(rank=5, feedback=1, scaled_heads=True).scaled_heads
    with pytest.raises(ValueError, match="rank for scaled heads"):
        small(scaled_heads=True)


def test_coordinates_even_out_the_lr_picture(generator) -> None:
    """Along the measured directions the LR picture changes more than along others, and P makes up for it."""
    curvature = measure_coordinates(generator, 5, seed=0)
    assert torch.equal(curvature.directions, measure_coordinates(generator, 5, seed=0).directions)
    z = torch.randn(8, D, generator=torch.Generator().manual_seed(6))
    ws, operator = generator.mapping(z), Downscale(8)

    def change(direction: torch.Tensor) -> float:
        step = 1e-3 * direction.view(8, D) / direction.norm()
        return float((operator(generator.synthesis(ws + step)) - operator(generator.synthesis(ws))).square().mean())

    others = [change(torch.randn(8 * D, generator=torch.Generator().manual_seed(i))) for i in range(5)]
    assert change(curvature.directions[:, 0]) > 3 * max(others)
    assert (curvature.gains.diff() >= 0).all() and curvature.gains[0] < 0.1


# --- coarse to fine ---


def test_base_code_is_replaced_layer_by_layer() -> None:
    encoder = small(base=True)
    features = features_of(encoder)
    codes, base = encoder.codes(features), encoder.partial(features, 0)
    assert torch.equal(base, base[:, :1].expand(-1, 8, -1)) and not torch.allclose(base[0], base[1])
    assert encoder.levels == 4
    for level in range(5):
        mixed = encoder.partial(features, level)
        torch.testing.assert_close(mixed[:, : 2 * level], codes[:, : 2 * level])
        assert torch.equal(mixed[:, 2 * level :], base[:, 2 * level :])


def test_partial_faces_are_the_final_ones_at_their_resolution(generator) -> None:
    """A level has all styles that the generator's picture of that resolution depends on."""
    encoder = small(base=True)
    features = features_of(encoder)
    final = generator.synthesis.partial_sums(encoder.codes(features))
    for level in range(1, 5):
        found = generator.synthesis.partial_sums(encoder.partial(features, level))
        torch.testing.assert_close(found[level - 1], final[level - 1])


@pytest.mark.parametrize(
    ("base", "level", "words"), [(False, 1, "base=True"), (True, 5, "0 to 4"), (True, -1, "0 to 4")]
)
def test_partial_codes_are_refused(base, level, words) -> None:
    encoder = small(base=base)
    with pytest.raises(ValueError, match=words):
        encoder.partial(features_of(encoder), level)


# --- side outputs ---


def test_partial_sums_end_in_the_face(generator) -> None:
    ws = generator.mapping(torch.randn(2, D))
    sums = generator.synthesis.partial_sums(ws)
    assert [rgb.shape for rgb in sums] == [(2, 3, size, size) for size in (4, 8, 16, 32)]
    assert torch.equal(sums[-1], generator.synthesis(ws))
    other = ws.clone()
    other[:, 4:] += 1
    changed = [not torch.equal(a, b) for a, b in zip(sums, generator.synthesis.partial_sums(other), strict=True)]
    assert changed == [False, False, True, True]


def test_colour_maps_are_the_least_squares_solution(generator) -> None:
    sides = SideOutputs(generator, samples=40, seed=1)
    z = np.random.default_rng((1, 40)).standard_normal((40, D), dtype=np.float32)
    sums = generator.synthesis.partial_sums(generator.mapping(torch.from_numpy(z)))
    for i, size in enumerate((4, 8, 16)):
        x = sums[i].movedim(1, 3).reshape(-1, 3).double().numpy()
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        y = Downscale(size)(sums[-1].clamp(-1, 1)).movedim(1, 3).reshape(-1, 3).double().numpy()
        solution, residual, *_ = np.linalg.lstsq(x, y, rcond=None)
        np.testing.assert_allclose(sides.get_buffer(f"map{size}").numpy(), solution.T, atol=1e-4)
        total = ((y - y.mean(axis=0)) ** 2).sum()
        assert math.isclose(sides.r_squared[size], 1 - residual.sum() / total, abs_tol=1e-6)
        drawn = sides(generator.mapping(torch.from_numpy(z)))[i].movedim(1, 3).reshape(-1, 3)
        np.testing.assert_allclose(drawn.numpy(), x @ solution, atol=1e-4)


# --- LR faces at their own size ---


def test_a_small_canvas_gives_levels_of_the_same_sizes() -> None:
    """At half the canvas, a stem of stride 1 makes up for it: all the other layers see features of the same sizes."""
    large, own = small(), small(stem_stride=1)
    assert (large.canvas, own.canvas) == (32, 16)
    assert own.config["canvas"] == 16 and own.config["stem_stride"] == 1
    sizes = [[f.shape for f in e.backbone(torch.zeros(1, 4, e.canvas, e.canvas))] for e in (large, own)]
    assert sizes[0] == sizes[1]
    assert {n: t.shape for n, t in large.state_dict().items()} == {n: t.shape for n, t in own.state_dict().items()}
    assert own(torch.zeros(1, 3, 32, 32), 2).shape == (1, 2, 8, D)
    with pytest.raises(ValueError, match="stem_stride"):
        small(stem_stride=3)
    with pytest.raises(ValueError, match="from 16 px"):
        small(stem_stride=1, canvas=8)


# --- training with them ---


@pytest.fixture
def folder(generator, tmp_path, monkeypatch):
    write_faces(tmp_path / "faces.zip")
    save_generator(generator, tmp_path / "generator.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.encoder.LPIPS", PixelDistance)
    monkeypatch.setattr("sys.argv", ["train.py"])
    return tmp_path


def test_all_options_train_together_and_resume_exactly(folder, monkeypatch) -> None:
    def run(record: Record, name: str) -> None:
        settings = {
            "generator": str(folder / "generator.safetensors"), "sizes_per_batch": 2, "compile": False,
            "architecture": {**SMALL, "rank": 5, "base": True, "stem_stride": 1}, "weight_identity": 0.0,
            "weight_partial": 0.5, "weight_side": 1.0, "warmup_steps": 1, "val_lr": [8],
        }  # fmt: skip
        network = {"class_path": "training.encoder.EncoderTraining", "init_args": settings}
        often = {"val_check_interval": 4, "check_val_every_n_epoch": None}
        train(folder, monkeypatch, record, name, 6, network, trainer=often, save_every=2)

    whole, before, after = Record(), Record(stop_after=3), Record()
    run(whole, "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(before, "killed")
    run(after, "killed")
    assert before.losses == whole.losses[:3] and after.losses == whole.losses[2:]
    state = torch.load(folder / "whole" / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    measured = measure_coordinates(load_generator(folder / "generator.safetensors"), 5, seed=0)
    for encoder in ("encoder", "encoder_ema"):
        torch.testing.assert_close(state[f"{encoder}.latents.gains"], measured.gains)


def keep_metric(record: Record, trainer, *args) -> None:
    record.losses.append(float(trainer.logged_metrics[record.metric]))


@pytest.mark.parametrize("name", ["partial", "side"])
def test_each_supervision_improves_what_it_measures(folder, monkeypatch, name) -> None:
    record = Record(metric=f"loss/{name}")
    record.on_train_batch_end = lambda trainer, *args: record.losses.append(
        float(trainer.logged_metrics[record.metric])
    )
    others = dict.fromkeys(("weight_latent", "weight_downscaling", "weight_identity"), 0.0)
    settings = {
        "generator": str(folder / "generator.safetensors"), "sizes_per_batch": 1, "compile": False, **others,
        "architecture": {**SMALL, "base": True}, f"weight_{name}": 1.0, "warmup_steps": 1, "val_lr": [8],
        "learning_rate": 2e-3, "weight_l2": float(name == "partial"), "weight_lpips": 0.0,
    }  # fmt: skip
    network = {"class_path": "training.encoder.EncoderTraining", "init_args": settings}
    often = {"val_check_interval": 100, "check_val_every_n_epoch": None}
    train(folder, monkeypatch, record, "run", 25, network, trainer=often, save_every=1000)
    assert np.mean(record.losses[-5:]) < 0.8 * np.mean(record.losses[:2])


def test_weight_partial_wants_a_base_head(folder) -> None:
    with pytest.raises(ValueError, match="base: true"):
        EncoderTraining(str(folder / "generator.safetensors"), weight_partial=1.0, weight_identity=0)


def test_training_starts_from_an_encoder_that_has_feedback_and_a_posterior(generator, tmp_path) -> None:
    finished = small(feedback=2, rank=5, posterior="gaussian")
    save_bundle(tmp_path / "bundle", generator, finished, NOTES)
    fresh = Encoder(32, 8, D, **SMALL)
    start_from(fresh, str(tmp_path / "bundle"))
    state = fresh.state_dict()
    for name, tensor in finished.state_dict().items():
        if name in state and not name.startswith("latents."):
            torch.testing.assert_close(state[name], tensor, atol=1e-3, rtol=1e-2)  # of float16
    with pytest.raises(ValueError, match="init_encoder"):
        start_from(small(base=True), str(tmp_path / "bundle"))
