"""Smaller encoders: the split of a matrix, and that a rank that is enough changes nothing."""

from __future__ import annotations

import pytest
import torch
from small_runs import write_bundle

from models.bundle import load_bundle, save_bundle
from models.compression import compress, main, split


def test_the_split_is_the_best_of_its_rank():
    """On inputs of any distribution, W x / |W x| loses what its smallest singular values over the samples say."""
    rng = torch.Generator().manual_seed(0)
    weight, mix = torch.randn(7, 9, generator=rng), torch.randn(9, 9, generator=rng) ** 3
    outputs = torch.randn(500, 9, generator=rng) @ mix.T @ weight.T
    a, b = split(weight, outputs, 4)
    assert a.shape == (7, 4) and b.shape == (4, 9)
    found = outputs @ torch.linalg.pinv(weight).T @ b.T @ a.T  # the inputs, as far as W sees them
    lengths = outputs.norm(dim=1, keepdim=True)
    values = torch.linalg.svdvals(outputs / lengths)
    assert float(((outputs - found) / lengths).norm()) == pytest.approx(float(values[4:].norm()), rel=1e-3)
    whole, same = split(weight, outputs[:3], 7)  # few samples, but all directions
    torch.testing.assert_close(whole @ same, weight)


@pytest.fixture
def bundle(tmp_path):
    write_bundle(tmp_path / "b", feedback=1, rank=5)
    bundle = load_bundle(tmp_path / "b")
    torch.nn.init.normal_(bundle.encoder.feedback.out.weight, std=0.1)
    return bundle


def test_enough_ranks_change_nothing(bundle):
    lr, images = torch.rand(2, 3, 8, 8) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    small = compress(bundle, images, 32, 64)  # at most so many numbers come out of a head, and of the feedback
    ws = bundle.encoder(lr)[:, 0]
    torch.testing.assert_close(small(lr)[:, 0], ws, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        small.correct(lr, images, ws), bundle.encoder.correct(lr, images, ws), rtol=1e-4, atol=1e-4
    )
    few = compress(bundle, images, 2, 0)
    assert not torch.allclose(few(lr)[:, 0], ws, atol=1e-4) and few.feedback.hidden.out_features == 512


@pytest.mark.parametrize("kind", ["gaussian", "flow"])
def test_the_distribution_sees_the_features_through_a_bottleneck(kind, tmp_path):
    write_bundle(tmp_path / "b", posterior=kind)
    bundle = load_bundle(tmp_path / "b")
    torch.nn.init.normal_(bundle.encoder.posterior.network.last.weight, std=0.1)
    lr, images = torch.rand(2, 3, 8, 8) * 2 - 1, torch.rand(64, 3, 32, 32) * 2 - 1
    bundle.encoder.spread.fill_(1.0)
    wanted, noise = bundle.encoder(lr, 3), bundle.encoder.noise_dim
    same, few = (compress(bundle, images, 32, 0, rank) for rank in (256, 2))
    assert same.noise_dim == noise and same.config["context_rank"] == 256
    torch.testing.assert_close(same(lr, 3), wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(few(lr, 3)[:, 1:], wanted[:, 1:], atol=1e-2)
    save_bundle(tmp_path / "s", bundle.generator, few, {"name": "s", "licence": "l", "training_data": "t"})
    torch.testing.assert_close(load_bundle(tmp_path / "s").encoder(lr, 3), few(lr, 3), rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("ranks", [(0, 8), (8, 513), (8, -1), (8, 8, -1)])
def test_ranks_out_of_range(bundle, ranks):
    with pytest.raises(ValueError, match="head rank"):
        compress(bundle, torch.zeros(2, 3, 32, 32), *ranks)


def test_additions_come_after_it(tmp_path):
    write_bundle(tmp_path / "b", feedback=1, rank=5, feedback_small_rank=2)
    with pytest.raises(ValueError, match="then train them"):
        compress(load_bundle(tmp_path / "b"), torch.zeros(2, 3, 32, 32), 4, 16)


def test_a_smaller_bundle_is_a_bundle(tmp_path, capsys):
    write_bundle(tmp_path / "b", feedback=1, rank=5)
    command = [
        "--bundle",
        str(tmp_path / "b"),
        "--out",
        str(tmp_path / "s"),
        "--head-rank",
        "4",
        "--feedback-hidden",
        "16",
    ]
    assert main(command) == 0
    small = load_bundle(tmp_path / "s")
    assert small.encoder.config["head_rank"] == 4 and small.encoder.config["feedback_hidden"] == 16
    assert small.encode(torch.zeros(1, 3, 8, 8), 2).isfinite().all()
    assert "MB" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--bundle", str(tmp_path / "s"), "--out", str(tmp_path / "t")])
