"""Trains the flow over W, the prior of the regularized latent search, on codes that a generator maps."""

from __future__ import annotations

import math

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from models.checkpoints import load_generator, sha256_of
from models.flow import FlowPrior, gaussian_of, save_flow
from models.generator import Generator
from models.latents import gaussianize
from training.batches import BatchRandom, step_rng
from training.checkpoints import OwnedTraining, Owner
from training.optimizers import scheduled
from training.run import export_folder

FIT_CODES = 50_000  # for the affine map


class FlowTraining(OwnedTraining):
    """Maximum likelihood, loss = −E log p(w) / D, on fresh codes at every step.

    Validation compares it with the full Gaussian of v = lrelu₅(w), in the same unit, nats per number of w.

    Args:
        generator: Weights whose mapping network is learned (`models.load_generator` reads them).
        blocks: Autoregressive transformations; 5 in the paper.
        hidden: Width of each one's network; 1024 in the paper.
        whiten: Whiten the codes before the flow, see `models.flow`; the paper does not.
        noise: Spread of the normal noise that blurs the codes, as a share of their own over all numbers; 0 for the
            codes themselves, whose density is too steep to search with.
        learning_rate: Adam's; it falls to zero as a cosine.
        export_to: File for the flow, relative to the run's folder; None for nowhere.
        seed: Determines every random choice together with the step.
    """

    def __init__(
        self,
        generator: str = "bundles/celeba64/generator.safetensors",
        blocks: int = 5,
        hidden: int = 1024,
        whiten: bool = True,
        noise: float = 0.1,
        learning_rate: float = 1e-3,
        export_to: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        loaded = load_generator(generator)
        self.owner = Owner("generator_sha256", sha256_of(generator), str(generator))
        torch.manual_seed(seed)
        self.flow = FlowPrior(loaded.w_dim, blocks, hidden, whiten)
        self._generator: tuple[Generator] = (loaded,)  # in a tuple, so that it stays out of checkpoints
        self._noise = 0.0
        w = self.sample_codes(FIT_CODES, BatchRandom(step_rng(seed, -1_000_000, 0, "cpu")))
        self._noise = noise * float((w - w.mean(dim=0)).square().mean().sqrt())
        w = self.sample_codes(FIT_CODES, BatchRandom(step_rng(seed, -1_000_000, 0, "cpu")))
        self.flow.fit_scale(w)
        self._gaussian = gaussian_of(w)

    def setup(self, stage: str) -> None:
        """Puts the generator where the training runs."""
        device = self.trainer.strategy.root_device  # Lightning moves this module only after set-up
        self._generator[0].to(device)
        self._gaussian = (self._gaussian[0].to(device), self._gaussian[1].to(device))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam with a cosine."""
        adam = torch.optim.Adam(self.flow.parameters(), self.hparams["learning_rate"])

        return scheduled(adam, self.trainer)

    @torch.no_grad()
    def sample_codes(self, count: int, random: BatchRandom) -> Tensor:
        """Samples blurred codes w (B, D)."""
        w = self._generator[0].mapping(random.randn(count, self._generator[0].z_dim))[:, 0]
        return w + self._noise * random.randn(*w.shape)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """The loss on as many fresh codes as the batch is long."""
        random = BatchRandom.of_step(self, self.hparams["seed"], batch_idx)
        _, log_density = self.flow(self.sample_codes(len(batch[0]), random))
        loss = -log_density.mean() / self.flow.config["w_dim"]
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Measures the likelihood of codes that are not trained on, and how far ‖u‖² is from its D."""
        dealt = batch_idx * self.trainer.world_size + self.global_rank  # as `DistributedSampler` deals the batches
        w = self.sample_codes(len(batch[0]), BatchRandom(step_rng(self.hparams["seed"], -1 - dealt, 0, self.device)))
        u, log_density = self.flow(w)
        dimension = w.shape[1]
        values = {
            "val/nats": -log_density.mean() / dimension,
            "val/nats_gaussian": -log_density_of_gaussian(*self._gaussian, w).mean() / dimension,
            "val/squared_norm": u.square().sum(dim=1).mean() / dimension,  # 1 for standard normal u
            "val/squared_norm_std": u.square().sum(dim=1).std() / math.sqrt(2 * dimension),  # 1 as well
        }
        self.log_dict(values, prog_bar=True, batch_size=len(w), sync_dist=True)

    def on_fit_end(self) -> None:
        """Saves the flow."""
        folder = export_folder(self.trainer, self.hparams["export_to"])
        if folder is None:
            return
        save_flow(self.flow, folder, self.owner.hash)


def log_density_of_gaussian(mean: Tensor, factor: Tensor, w: Tensor) -> Tensor:
    """The log density of codes w (B, D) under v = lrelu₅(w) ~ N(μ, F Fᵀ), in nats (B,)."""
    normal = torch.distributions.MultivariateNormal(mean, scale_tril=factor)
    return normal.log_prob(gaussianize(w).to(mean)) + math.log(5.0) * (w < 0).sum(dim=1)
