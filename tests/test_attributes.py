"""The attribute classifier: its loss is calibrated, its file whole or refused, its training learns and resumes."""

from __future__ import annotations

import json
import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from small_runs import Record
from small_runs import train as run_small

from data.labels import ATTRIBUTES
from data.operator import Downscale
from losses.attributes import attribute_loss, positive_weights
from models.attributes import AttributeClassifier, load_attributes, save_attributes
from models.checkpoints import write_safetensors
from training.attributes import measure_attributes, table_of

TINY = {"backbone": "test_resnet", "resolution": 32}


def tiny(names=("a", "b", "c")) -> AttributeClassifier:
    torch.manual_seed(0)
    return AttributeClassifier(names, **TINY).eval()


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_the_loss_has_its_minimum_at_the_calibrated_logit(power, p) -> None:
    rates = torch.tensor([0.1])
    weights = positive_weights(rates, power)
    logits = torch.linspace(-8, 8, 16001)[:, None]
    yes, no = (attribute_loss(logits, torch.full_like(logits, y), weights, rates) for y in (1, 0))
    best = logits[(p * yes + (1 - p) * no).argmin()] - weights.log()
    assert float(best.sigmoid()) == pytest.approx(p, abs=1e-3)


def test_full_weights_count_both_kinds_the_same() -> None:
    rates = torch.tensor([0.01, 0.5, 0.99])
    weights = positive_weights(rates, 1.0)
    assert torch.allclose(weights * rates, 1 - rates)
    assert torch.allclose(positive_weights(rates, 0.0), torch.ones(3))
    assert positive_weights(torch.tensor([0.0, 1.0])).isfinite().all()


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        attribute_loss(torch.zeros(4, 3), torch.zeros(3), torch.ones(3), torch.full((3,), 0.5))


# ---------------------------------------------------------------- model


def test_larger_and_smaller_faces_are_resized() -> None:
    classifier = tiny()
    images = torch.randn(2, 3, 64, 64).clamp(-1, 1)
    assert torch.allclose(classifier(images), classifier(Downscale(32)(images)), atol=1e-6)
    assert classifier(images[..., :16, :16]).shape == (2, 3)
    with pytest.raises(ValueError, match="square"):
        classifier(images[..., :16])


def test_scores_leave_the_weights_out_and_balance_the_rates_out() -> None:
    classifier = tiny()
    images = torch.randn(2, 3, 32, 32)
    classifier.rates.copy_(torch.tensor([0.1, 0.5, 0.9]))
    classifier.log_weights.copy_(positive_weights(classifier.rates).log())
    logits = classifier(images)
    assert torch.allclose(logits, classifier.weighted(images) - classifier.log_weights)
    assert torch.allclose(classifier.balanced(classifier.rates.logit()), torch.zeros(3))
    assert torch.allclose(classifier.score(images), logits, atol=1e-6)


def test_a_file_holds_all(tmp_path) -> None:
    classifier = AttributeClassifier(("x", "y"), 32, "resnet10t", {"channels": [8, 8, 8, 16]}, stem_pool=False).eval()
    classifier.rates.copy_(torch.tensor([0.123456, 0.9]))
    save_attributes(classifier, tmp_path / "a.safetensors", {"licence": "none"})
    save_attributes(classifier, tmp_path / "b.safetensors", {"licence": "none"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded = load_attributes(tmp_path / "a.safetensors")
    images = torch.randn(3, 3, 32, 32)
    assert loaded.names == ("x", "y") and not loaded.training and torch.equal(loaded.rates, classifier.rates)
    assert torch.allclose(loaded(images), classifier(images), atol=0.02)  # float16


def test_other_files_are_refused(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="train.py"):
        load_attributes(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="complete"):
        load_attributes(path)
    write_safetensors({"x": torch.zeros(1)}, path, {"format": "another"})
    with pytest.raises(ValueError, match="another"):
        load_attributes(path)
    notes = {"format": "amortized-pulse/attributes/1", "config": json.dumps({"names": ["x"], **TINY})}
    write_safetensors({"x": torch.zeros(1)}, path, notes)
    with pytest.raises(ValueError, match="do not fit"):
        load_attributes(path)


@pytest.mark.parametrize("backbone", ["hf-hub:someone/something", "no_such_net"])
def test_backbones_from_elsewhere_are_refused(backbone) -> None:
    with pytest.raises(ValueError, match="by name"):
        AttributeClassifier(("x",), 32, backbone)


# ---------------------------------------------------------------- measures


def test_measures_agree_with_their_definitions() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(size=(4000, 2))
    labels = (rng.uniform(size=p.shape) < p).astype(int)
    logits = torch.from_numpy(p).logit().float()
    found = measure_attributes(logits, torch.from_numpy(labels), logits)
    for i in range(2):
        predicted = p[:, i] > 0.5
        sensitivity, specificity = predicted[labels[:, i] == 1].mean(), (~predicted)[labels[:, i] == 0].mean()
        assert float(found["auc"][i]) == pytest.approx(roc_auc_score(labels[:, i], p[:, i]), abs=1e-4)
        assert float(found["accuracy"][i]) == pytest.approx((predicted == labels[:, i]).mean(), abs=1e-6)
        assert float(found["balanced_accuracy"][i]) == pytest.approx((sensitivity + specificity) / 2, abs=1e-5)
        assert float(found["ece"][i]) < 0.04  # calibrated by construction
    sure = measure_attributes(logits * 5, torch.from_numpy(labels), logits)
    assert float(sure["ece"].min()) > 0.1
    assert table_of(found, ("x", "y")).count("\n") == 5


def test_an_attribute_that_no_face_has_counts_for_nothing() -> None:
    labels = torch.tensor([[0, 1], [0, 0], [0, 1]])
    found = measure_attributes(torch.randn(3, 2), labels, torch.randn(3, 2))
    assert found["auc"][0].isnan() and found["auc"][1].isfinite() and found["auc"].nanmean().isfinite()


# ---------------------------------------------------------------- training


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Bright and dark faces; every attribute says which is which, so that there is something to learn."""
    rng = np.random.default_rng(0)
    rows = ["file," + ",".join(ATTRIBUTES)]
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for i in range(24):
            pixels = rng.integers(0, 128, (32, 32, 3), np.uint8) + np.uint8(127 * (i % 2))
            with BytesIO() as buffer:
                Image.fromarray(pixels).save(buffer, "png")
                archive.writestr(f"{i:02}.png", buffer.getvalue())
            rows.append(f"{i:02}.jpg," + ",".join(["1" if i % 2 else "-1"] * len(ATTRIBUTES)))
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    return tmp_path


def train(folder, monkeypatch, record: Record, run: str, steps: int, **options) -> None:
    """Runs the command line on a small recipe."""
    model = {**TINY, "warmup_steps": 1, "export_to": f"../{run}.safetensors", **options}
    faces = {name: str(folder / "faces.zip") for name in ("train", "val")}
    data = {**faces, "labels": str(folder / "labels.csv"), "resolution": 32, "batch_size": 8}
    run_small(
        folder, monkeypatch, record, run, steps,
        {"class_path": "training.attributes.AttributeTraining", "init_args": model},
        {"class_path": "data.labels.LabelledFaceData", "init_args": data},
        {"gradient_clip_val": 1.0, "val_check_interval": 4, "check_val_every_n_epoch": None},
    )  # fmt: skip


def test_it_learns_and_exports(folder, monkeypatch) -> None:
    record = Record()
    train(folder, monkeypatch, record, "whole", 24, optimiser="adamax", learning_rate=1e-2, ema_steps=4)
    assert np.mean(record.losses[-4:]) < 0.5 * np.mean(record.losses[:4])
    classifier = load_attributes(folder / "whole.safetensors")
    assert classifier.names == ATTRIBUTES and torch.allclose(classifier.rates, torch.full((40,), 0.5))
    assert "| Smiling |" in (folder / "whole.md").read_text()


def test_a_killed_run_goes_on_exactly(folder, monkeypatch) -> None:
    whole, killed, resumed = Record(), Record(stop_after=5), Record()
    train(folder, monkeypatch, whole, "whole", 8)
    with pytest.raises(RuntimeError, match="killed"):
        train(folder, monkeypatch, killed, "parts", 8)
    train(folder, monkeypatch, resumed, "parts", 8)
    assert whole.losses == killed.losses[:4] + resumed.losses
    assert (folder / "whole.safetensors").read_bytes() == (folder / "parts.safetensors").read_bytes()


def test_other_labels_are_refused(folder, monkeypatch) -> None:
    (folder / "labels.csv").write_text("file,Smiling\n" + "\n".join(f"{i:02}.jpg,1" for i in range(24)))
    with pytest.raises(ValueError, match="forty|40"):
        train(folder, monkeypatch, Record(), "whole", 2)
