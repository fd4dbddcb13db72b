"""Distributions over codes: densities against closed forms, samples against densities, and honest regions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from models.encoder import Encoder
from models.generator import Generator
from models.posterior import GaussianPosterior, make_posterior
from training.coverage import calibrate, expected_coverage, ranks, region_levels, tarp

D, C = 6, 10


def untrained(kind: str):
    """A distribution that depends on its context, unlike before training."""
    torch.manual_seed(0)
    posterior = make_posterior(kind, C, D).eval().requires_grad_(False)
    torch.nn.init.normal_(posterior.network.last.weight, std=0.05)
    posterior.basis += 0.2 * torch.randn(D, D)
    return posterior


def test_the_gaussian_is_the_dense_gaussian():
    posterior, context, octave = untrained("gaussian"), torch.randn(3, C), torch.tensor([0.2, 0.5, 0.8])
    mean, scale, factor = posterior.parts(context, octave)
    inside = torch.diag_embed(scale.square()) + factor @ factor.transpose(1, 2)
    dense = MultivariateNormal(mean @ posterior.basis.T, posterior.basis @ inside @ posterior.basis.T)
    u = torch.randn(3, D)
    torch.testing.assert_close(posterior.log_prob(context, octave, u), dense.log_prob(u), rtol=1e-4, atol=1e-4)
    noise = torch.randn(3, 40_000, posterior.noise_dim, generator=torch.Generator().manual_seed(1))
    samples = posterior.sample(context, octave, noise)
    torch.testing.assert_close(samples.mean(dim=1), posterior.mean(context, octave), atol=0.03, rtol=0)
    for i in range(3):
        torch.testing.assert_close(torch.cov(samples[i].T), dense.covariance_matrix[i], atol=0.05, rtol=0.05)


def test_an_uncertain_width_is_a_mixture_of_gaussians():
    """Its density against the integral over the width on a fine grid, its samples against the mean of r²."""
    posterior, context, octave = untrained("gaussian"), torch.randn(2, C), torch.tensor([0.2, 0.8])
    posterior.width.fill_(0.7)
    posterior.wobble.fill_(0.3)
    mean, scale, factor = posterior.parts(context, octave)
    inside = torch.diag_embed(scale.square()) + factor @ factor.transpose(1, 2)
    places, centre = torch.linspace(-5, 5, 401), mean @ posterior.basis.T
    u, logs = torch.randn(2, D), []
    for place in places:
        width = 0.7 * math.exp(0.3 * float(place))
        covariance = width**2 * posterior.basis @ inside @ posterior.basis.T
        logs.append(MultivariateNormal(centre, covariance).log_prob(u) - place.square() / 2)
    expected = torch.logsumexp(torch.stack(logs), dim=0) - torch.logsumexp(-places.square() / 2, dim=0)
    torch.testing.assert_close(posterior.log_prob(context, octave, u), expected, rtol=1e-3, atol=1e-3)
    noise = torch.randn(2, 40_000, posterior.noise_dim, generator=torch.Generator().manual_seed(1))
    found = torch.cov(posterior.sample(context, octave, noise)[0].T)
    second = 0.7**2 * math.exp(2 * 0.3**2)
    torch.testing.assert_close(found, second * (posterior.basis @ inside[0] @ posterior.basis.T), atol=0.06, rtol=0.1)


@pytest.mark.parametrize(("width", "wobble"), [(1.5, 0.001), (0.8, 0.2)])
def test_calibration_finds_the_width(width, wobble):
    posterior = GaussianPosterior(C, 60).eval().requires_grad_(False)
    context, octave = torch.randn(600, C), torch.zeros(600)
    posterior.width.fill_(width)
    posterior.wobble.fill_(wobble)
    noise = torch.randn(600, 1, posterior.noise_dim, generator=torch.Generator().manual_seed(1))
    u = posterior.sample(context, octave, noise)[:, 0]
    posterior.width.fill_(1.0)
    posterior.wobble.zero_()
    calibrate(posterior, context, octave, u)
    assert float(posterior.width) == pytest.approx(width, rel=0.03)
    assert float(posterior.wobble) == pytest.approx(wobble, abs=0.05)


def test_the_flow_is_a_density():
    """Its log-density is that of its noise, less the stretch of the map from noise to samples, which autograd gives."""
    posterior, context, octave = untrained("flow"), torch.randn(2, C), torch.tensor([0.2, 0.8])
    noise = torch.randn(2, D, generator=torch.Generator().manual_seed(1))
    for i in range(2):
        part = context[i : i + 1], octave[i : i + 1]
        jacobian = torch.func.jacrev(lambda e, part=part: posterior.sample(*part, e[None, None])[0, 0])(noise[i])
        u = posterior.sample(*part, noise[i][None, None])[:, 0]
        expected = -0.5 * (noise[i].square() + math.log(2 * math.pi)).sum() - torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(posterior.log_prob(*part, u)[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["gaussian", "flow"])
def test_it_sees_face_and_size(kind):
    posterior, context = untrained(kind), torch.randn(2, C)
    noise = torch.randn(2, 3, posterior.noise_dim)
    same = posterior.sample(context, torch.tensor([0.5, 0.5]), noise)
    assert same.shape == (2, 3, D)
    assert not torch.allclose(same[0], posterior.sample(context.flip(0), torch.tensor([0.5, 0.5]), noise)[0])
    assert not torch.allclose(same[0], posterior.sample(context, torch.tensor([0.1, 0.5]), noise)[0])


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="gaussian or flow"):
        make_posterior("mixture", C, D)


@pytest.mark.parametrize("kind", ["gaussian", "flow"])
def test_it_learns_a_conditional_gaussian(kind):
    """u = c + 0.3 ε: the fit knows more than the best that ignores c, whose likelihood is known, by most of the way."""
    torch.manual_seed(0)
    posterior = make_posterior(kind, C, D)
    adam = torch.optim.Adam(posterior.parameters(), 3e-3)
    best, blind = (-math.log(width * math.sqrt(2 * math.pi * math.e)) for width in (0.3, math.sqrt(0.99 + 0.3**2)))
    for _ in range(150):
        context = torch.randn(256, C)
        seen = posterior.network.norm(context)[:, :D]
        loss = -posterior.log_prob(context, torch.zeros(256), seen + 0.3 * torch.randn(256, D)).mean() / D
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert best > -loss.item() > blind + 0.5 * (best - blind)


def encoder_with(kind: str | None) -> tuple[Encoder, Generator]:
    torch.manual_seed(5)
    generator = Generator(32, (8, 8, 6, 4), z_dim=D, w_dim=D, mapping_layers=2).eval().requires_grad_(False)
    encoder = Encoder(32, generator.num_ws, D, backbone="test_resnet", width=8, posterior=kind).eval()
    encoder.latents.fit(generator, 1000)
    encoder.spread.fill_(1.0)
    return encoder.requires_grad_(False), generator


@pytest.mark.parametrize("kind", [None, "gaussian", "flow"])
def test_candidates(kind):
    encoder, _ = encoder_with(kind)
    lr = torch.rand(2, 3, 8, 8) * 2 - 1
    ws, cold = (encoder(lr, 4, np.random.default_rng(1), temperature) for temperature in (1.0, 0.0))
    assert ws.shape == (2, 4, encoder.num_ws, D)
    torch.testing.assert_close(ws[:, 0], encoder(lr)[:, 0])
    assert (ws[:, 1:] - ws[:, :1]).abs().amax(dim=(2, 3)).min() > 1e-3
    if kind == "gaussian":  # its mean, mapped to w, is where zero noise leads
        torch.testing.assert_close(cold, cold[:, :1].expand_as(cold), atol=1e-5, rtol=1e-5)


def test_whitening_is_the_inverse_of_sampling():
    encoder, generator = encoder_with(None)
    w = generator.mapping(torch.randn(5, D))[:, 0]
    torch.testing.assert_close(encoder.latents.sample(encoder.latents.whiten(w)), w, rtol=1e-3, atol=1e-3)


class Normal:
    """N(0, width² I), whatever the context."""

    def __init__(self, width: float) -> None:
        self.width = width

    def log_prob(self, context, octave, u):
        return -0.5 * (u / self.width).square().sum(dim=-1)


@pytest.mark.parametrize(("width", "covered"), [(1.0, 0.8), (0.5, 0.05), (2.0, 1.0)])
def test_coverage_tells_honest_from_narrow_and_wide(width, covered):
    """Truths are standard normal; a distribution of half the width holds few of them in its 80 % region."""
    rng = torch.Generator().manual_seed(0)
    u, references = torch.randn(2, 2000, D, generator=rng)
    samples = width * torch.randn(2000, 200, D, generator=rng)
    none = torch.zeros(2000, 1)
    levels = region_levels(Normal(width), none, none[:, 0], u, samples)
    assert float(expected_coverage(levels, torch.tensor([0.8]))) == pytest.approx(covered, abs=0.06)
    f, r = tarp(u, samples, references), ranks(u, samples).float() / 200
    if width == 1.0:
        for values in (levels, f, r.flatten()):
            assert torch.histc(values, 5, 0, 1).div(values.numel()) == pytest.approx(np.full(5, 0.2), abs=0.03)
    ends = float(((r < 0.1) | (r > 0.9)).float().mean())
    assert ends == pytest.approx({1.0: 0.2, 0.5: 0.52, 2.0: 0.01}[width], abs=0.03)


def test_the_floor_keeps_the_density_finite():
    posterior = GaussianPosterior(C, D).eval().requires_grad_(False)
    posterior.network.last.bias[D : 2 * D] = -1e4
    assert posterior.parts(torch.randn(1, C), torch.zeros(1))[1].min() > 0.01
