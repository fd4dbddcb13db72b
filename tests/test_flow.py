"""The flow over W: its density by closed forms and autograd, its files, and its training."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import SMALL

import models.flow
from models.bundle import load_bundle, save_bundle
from models.checkpoints import save_generator, sha256_of
from models.encoder import Encoder
from models.flow import FlowPrior, flow_of, gaussian_of, load_flow, save_flow
from models.generator import Generator
from models.latents import LatentStatistics
from train import main as train
from training.batches import BatchRandom
from training.flow import FlowTraining, log_density_of_gaussian

D = 8


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(0)
    return Generator(32, channels=(8, 8, 6, 4), z_dim=D, w_dim=D, mapping_layers=2).eval()


def make(generator: Generator, whiten: bool, seed: int = 0) -> FlowPrior:
    torch.manual_seed(seed)
    flow = FlowPrior(D, blocks=3, hidden=16, whiten=whiten)
    flow.fit_scale(codes(generator, 4000, seed=8))
    return flow


@pytest.fixture(params=[True, False], ids=["whitened", "plain"])
def flow(request, generator) -> FlowPrior:
    return make(generator, request.param)


def codes(generator: Generator, count: int, seed: int = 0) -> torch.Tensor:
    z = torch.randn(count, D, generator=torch.Generator().manual_seed(seed))
    return generator.mapping(z)[:, 0].detach()


def test_density_is_that_of_the_change_of_variables(flow, generator) -> None:
    w = codes(generator, 3)
    u, log_density = (value.detach() for value in flow(w))
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda x: flow(x[None])[0][0], w[i])
        log_normal = -0.5 * (u[i].square().sum() + D * math.log(2 * math.pi))
        assert float(log_density[i]) == pytest.approx(float(log_normal + torch.linalg.slogdet(jacobian)[1]), abs=1e-3)


def test_rows_and_styles_are_alike(flow, generator) -> None:
    w = codes(generator, 6)
    u, log_density = flow(w.view(2, 3, D))
    assert u.shape == (2, 3, D) and log_density.shape == (2, 3)
    assert torch.allclose(u.view(6, D), flow(w)[0], atol=1e-5)


def test_sample_is_the_inverse(flow, generator) -> None:
    w = codes(generator, 4)
    assert torch.allclose(flow.sample(flow(w)[0].detach()), w, atol=1e-3)


def test_whitened_codes_are_nearly_normal(generator) -> None:
    flow = make(generator, True)
    for parameter in flow.transforms.parameters():
        parameter.data.zero_()  # the affine map alone
    u, log_density = flow(codes(generator, 5000, seed=3))
    assert torch.allclose(torch.cov(u.T), torch.eye(D), atol=0.15) and u.mean(dim=0).abs().max() < 0.1
    gaussian = gaussian_of(codes(generator, 4000, seed=8))
    again = log_density_of_gaussian(*gaussian, codes(generator, 5000, seed=3)).float()
    assert torch.allclose(log_density, again, atol=0.05)  # the same Gaussian, written twice


def test_gaussian_is_that_of_the_latents(generator) -> None:
    latents = LatentStatistics(D)
    latents.fit(generator, samples=4000)
    mean, factor = gaussian_of(codes(generator, 4000, seed=8))
    assert torch.allclose(mean.float(), latents.mean, atol=0.1 * float(latents.factor.diagonal().max()))
    covariance, other = factor @ factor.T, latents.factor @ latents.factor.T
    assert (covariance.float() - other).norm() < 0.15 * other.norm()


def test_codes_are_blurred(generator, tmp_path) -> None:
    save_generator(generator, tmp_path / "g.safetensors")
    path = str(tmp_path / "g.safetensors")
    sharp, blurred = (FlowTraining(path, blocks=1, hidden=8, noise=noise) for noise in (0.0, 0.5))
    w, again, noisy = (
        training.sample_codes(3000, BatchRandom(torch.Generator().manual_seed(1)))
        for training in (sharp, sharp, blurred)
    )
    assert torch.equal(w, again)
    spread = (w - w.mean(dim=0)).square().mean().sqrt()
    assert float((noisy - w).std() / spread) == pytest.approx(0.5, rel=0.05)
    _, density = blurred.flow(w[:50] + 3 * spread)
    _, steep = sharp.flow(w[:50] + 3 * spread)
    assert density.mean() > steep.mean()  # what is far from all codes is not as unlikely


def test_files(flow, generator, tmp_path) -> None:
    save_flow(flow, tmp_path / "flow.safetensors", "abc")
    read = load_flow(tmp_path / "flow.safetensors", "abc")
    w = codes(generator, 4)
    assert torch.allclose(read(w)[0], flow(w)[0], atol=0.02) and read.config == flow.config
    assert not any(parameter.requires_grad for parameter in read.parameters())
    save_flow(flow, tmp_path / "again.safetensors", "abc")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "flow.safetensors").read_bytes()
    with pytest.raises(ValueError, match="another|train one for this"):
        load_flow(tmp_path / "flow.safetensors", "other")
    with pytest.raises(FileNotFoundError, match="flow_64"):
        load_flow(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="complete"):
        load_flow(tmp_path / "bad.safetensors")


def test_files_whose_header_does_not_fit(generator, tmp_path) -> None:
    flow = make(generator, True)
    for config in ({**flow.config, "blocks": 2}, {**flow.config, "hidden": 8}, {"depth": 3}):
        flow.config = config
        save_flow(flow, tmp_path / "flow.safetensors", "abc")
        with pytest.raises(ValueError, match="expected a flow"):
            load_flow(tmp_path / "flow.safetensors")


@pytest.fixture
def bundle(generator, tmp_path) -> Path:
    encoder = Encoder(32, generator.num_ws, D, (8, 8, 6, 4), **SMALL).eval()
    encoder.latents.fit(generator, samples=500)
    info = {"name": "tiny", "licence": "none", "training_data": "none"}
    save_bundle(tmp_path / "tiny", generator, encoder, info)
    return tmp_path / "tiny"


def test_a_bundle_takes_a_flow_and_keeps_it(generator, bundle, tmp_path, capsys) -> None:
    before = load_bundle(bundle)
    with pytest.raises(ValueError, match="models.flow --bundle"):
        flow_of(before)
    flow = make(generator, True)
    save_flow(flow, tmp_path / "flow.safetensors", sha256_of(bundle / "generator.safetensors"))
    command = ["--bundle", str(bundle), "--flow", str(tmp_path / "flow.safetensors")]
    assert models.flow.main(command) == 0
    after = load_bundle(bundle)
    assert after.hash != before.hash and torch.equal(after.encoder.latents.factor, before.encoder.latents.factor)
    w = codes(generator, 2)
    assert torch.allclose(flow_of(after)(w)[0], flow(w)[0], atol=0.02) and flow_of(after) is flow_of(after)
    info = {name: after.info[name] for name in ("name", "licence", "training_data")}
    save_bundle(bundle, after.generator, after.encoder, info)  # another encoder for the same generator
    assert flow_of(load_bundle(bundle)).config == flow.config
    changed = Generator(32, channels=(8, 8, 6, 4), z_dim=D, w_dim=D, mapping_layers=2)
    save_bundle(bundle, changed, after.encoder, info)
    with pytest.raises(ValueError, match="found none"):
        flow_of(load_bundle(bundle))
    assert models.flow.main(command) == 2 and "train one for this generator" in capsys.readouterr().err
    assert not list(tmp_path.glob(".partial-*"))


def test_a_damaged_bundle_takes_no_flow(generator, bundle, tmp_path, capsys) -> None:
    save_flow(make(generator, True), tmp_path / "f.safetensors", sha256_of(bundle / "generator.safetensors"))
    shutil.copy(bundle / "bundle.json", tmp_path / "kept.json")
    (bundle / "encoder.safetensors").write_bytes(b"x")
    assert models.flow.main(["--bundle", str(bundle), "--flow", str(tmp_path / "f.safetensors")]) == 1
    assert "damaged" in capsys.readouterr().err
    assert (bundle / "bundle.json").read_bytes() == (tmp_path / "kept.json").read_bytes()


@pytest.fixture
def recipe(generator, tmp_path, monkeypatch) -> list[str]:
    save_generator(generator, tmp_path / "generator.safetensors")
    config = Path(__file__).resolve().parents[1] / "configs" / "flow_64.yaml"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    options = {
        "model.generator": tmp_path / "generator.safetensors", "model.blocks": 2, "model.hidden": 16,
        "model.learning_rate": 0.01, "data.batch_size": 64, "data.val_batches": 2, "trainer.accelerator": "cpu",
        "trainer.val_check_interval": 20, "trainer.enable_progress_bar": False, "trainer.log_every_n_steps": 5,
        "trainer.enable_model_summary": False,
    }  # fmt: skip
    return ["fit", "--config", str(config), *(f"--{name}={value}" for name, value in options.items())]


def test_training_learns_and_exports(recipe, generator, tmp_path) -> None:
    often = ["--checkpoint.every_n_steps=20", "--trainer.max_steps=40"]
    train([*recipe, *often])
    path = tmp_path / "runs" / "flow_64" / "flow.safetensors"
    flow = load_flow(path, sha256_of(tmp_path / "generator.safetensors"))
    w = codes(generator, 2000, seed=9)
    untrained = FlowTraining(str(tmp_path / "generator.safetensors"), blocks=2, hidden=16).flow
    learnt, before = (float(f(w)[1].detach().mean()) for f in (flow, untrained))
    assert learnt > before + 0.3
    save_generator(Generator(32, (8, 8, 6, 4), z_dim=D, w_dim=D, mapping_layers=2), tmp_path / "generator.safetensors")
    with pytest.raises(ValueError, match="has changed since"):
        train([*recipe, *often])


def test_an_interrupted_training_goes_on_exactly(recipe, tmp_path) -> None:
    """Killed at step 20 of 40: the second call does what is left, and ends with the bytes of an undisturbed run."""
    often = ["--checkpoint.every_n_steps=20", "--trainer.max_steps=40"]

    def kill(self: FlowTraining, batch: list, batch_idx: int) -> torch.Tensor:
        if self.global_step == 20:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    step = FlowTraining.training_step
    train([*recipe, *often, "--trainer.logger.init_args.name=whole"])
    FlowTraining.training_step = kill
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train([*recipe, *often, "--trainer.logger.init_args.name=parts"])
    finally:
        FlowTraining.training_step = step
    train([*recipe, *often, "--trainer.logger.init_args.name=parts"])
    first, second = (tmp_path / "runs" / name / "flow.safetensors" for name in ("whole", "parts"))
    assert first.read_bytes() == second.read_bytes()


def test_config_in_the_header_is_json(generator, tmp_path) -> None:
    from safetensors import safe_open

    save_flow(make(generator, True), tmp_path / "flow.safetensors", "abc")
    with safe_open(tmp_path / "flow.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["flow"])["w_dim"] == D
        assert file.get_tensor("scale").dtype == torch.float32  # small numbers count
        assert not any("mask" in name for name in file.keys())
