"""The start on generated faces: mixed codes, the loss, and that no photo is looked at."""

from __future__ import annotations

import pytest
import torch
from small_runs import Record
from test_encoder_training import folder, train  # noqa: F401

from models.encoder import create_encoder
from models.generator import Generator
from training.encoder import EncoderTraining
from training.synthetic import mixed_codes, synthetic_loss


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(0)
    return Generator(32, (8, 8, 6, 4), z_dim=8, w_dim=8, mapping_layers=2)


def test_half_of_the_codes_mix_two_faces(generator: Generator) -> None:
    ws = mixed_codes(generator, 400, torch.Generator().manual_seed(0))
    kinds = torch.tensor([len(torch.unique(code, dim=0)) for code in ws])
    assert ws.shape == (400, 8, 8) and set(kinds.tolist()) == {1, 2}
    assert abs(float((kinds == 2).float().mean()) - 7 / 15) < 0.08
    changes = (ws[:, 1:] != ws[:, :-1]).any(dim=2).sum(dim=0)  # where the other face begins
    assert (changes > 10).all()


def test_the_loss_is_the_share_that_is_missed(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = create_encoder(32, w_dim=8, backbone="test_resnet", width=8)
    encoder.latents.fit(generator, 2000)
    mean = encoder.latents.w_avg.expand(16, 8, 8)
    for share, wanted in ((0.0, 1.0), (0.5, 0.25), (1.0, 0.0)):
        truth = mixed_codes(generator, 16, torch.Generator().manual_seed(3))
        monkeypatch.setattr(encoder, "codes", lambda _, truth=truth, share=share: torch.lerp(mean, truth, share))
        loss = synthetic_loss(encoder, generator, 16, [8, 16], torch.Generator().manual_seed(3))
        assert float(loss) == pytest.approx(wanted, abs=1e-5)


def test_it_learns_codes_and_then_photos(folder, monkeypatch) -> None:  # noqa: F811
    looked: list[int] = []
    plain = EncoderTraining._pixel_losses

    def counted(self, *args):
        looked.append(self.global_step)
        return plain(self, *args)

    monkeypatch.setattr(EncoderTraining, "_pixel_losses", counted)
    record = Record()
    options = {"learning_rate": 4e-3, "often": [8], "often_share": 1.0, "synthetic_steps": 40}
    train(folder, monkeypatch, record, "run", 42, save_every=100, **options)
    assert looked == [40, 41]
    assert sum(record.losses[34:40]) < 0.9 * sum(record.losses[:6])
