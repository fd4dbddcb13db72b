"""Fits a distribution over codes to pairs that the generator makes: maximum likelihood of the true code.

    L = −log q(u | c) / D

The encoder stays as it is; only the distribution on top of its features is fitted (`models.posterior`). Validation
tells how honest it is: how many nats it gains over the prior N(0, I), which is covered too but knows nothing, and how
often the true code lies in the regions that should hold it (`training.coverage`).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from data.faces import Faces
from models.bundle import load_bundle, save_bundle
from models.bundle_info import notes_of
from models.encoder import make_encoder
from training.coverage import LEVELS, calibrate, region_levels
from training.export_folder import export_folder
from training.owner import OwnedTraining, Owner
from training.randomness import step_rng
from training.schedule import scheduled
from training.spread import CALIBRATION_FACES, calibrate_spread


class PosteriorTraining(OwnedTraining):
    """Fit of the distribution over codes of a bundle's encoder.

    Args:
        bundle: Folder with the generator and the encoder, the same as that of the pairs.
        kind: Which distribution, see `models.posterior`.
        learning_rate: AdamW's, at its peak; a short warm-up, then a cosine to zero at `trainer.max_steps`.
        warmup_steps: Steps over which the learning rate rises.
        weight_decay: AdamW's.
        dropout: Share of the context that is left out in training.
        ema_steps: Half-life of the moving average, in steps.
        coverage_samples: Samples per pair from which validation estimates the regions.
        photos: Zip or folder of training faces on which the candidates' spread is calibrated, see `training.spread`.
        budget: See `training.spread.calibrate_spread`.
        export_to: Folder where the bundle is saved at the end, relative to the run's; None for nowhere.
        seed: Of the samples.
    """

    def __init__(
        self,
        bundle: str = "bundles/celeba64",
        kind: str = "gaussian",
        learning_rate: float = 1e-3,
        warmup_steps: int = 50,
        weight_decay: float = 0.05,
        dropout: float = 0.2,
        ema_steps: float = 100,
        coverage_samples: int = 200,
        photos: str = "celeba128_train.zip",
        budget: float = 1.6,
        export_to: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        loaded = load_bundle(bundle)
        self.owner = Owner("bundle_hash", loaded.hash, str(bundle))
        config = {name: value for name, value in loaded.encoder.config.items() if name != "context_rank"}
        made = make_encoder({**config, "posterior": kind})  # a bottleneck is for what is trained already
        state = {name: t for name, t in loaded.encoder.state_dict().items() if not name.startswith("posterior.")}
        missing, unexpected = made.load_state_dict(state, strict=False)
        assert not unexpected and all(name.startswith("posterior.") for name in missing)
        assert made.posterior is not None
        self.posterior = made.posterior
        self.posterior_ema = copy.deepcopy(made.posterior).eval().requires_grad_(False)
        self._encoder = (made.eval().requires_grad_(False),)  # in a tuple: it stays out of checkpoints
        self.posterior.train().requires_grad_(True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine."""
        h = self.hparams
        adam = torch.optim.AdamW(self.posterior.parameters(), h["learning_rate"], weight_decay=h["weight_decay"])

        return scheduled(adam, self.trainer, h["warmup_steps"])

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Minus the mean log-density per dimension of the true codes of pairs (context, size, u)."""
        context, size, u = batch
        share = self.hparams["dropout"]
        rng = step_rng(self.hparams["seed"], self.global_step, self.global_rank, self.device)
        kept = torch.rand(context.shape, device=self.device, generator=rng) >= share
        context = context * kept / (1 - share)
        loss = -self.posterior.log_prob(context.float(), self._encoder[0].octave(size), u).mean() / u.shape[1]
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Improves the network, then its average; here, so that a checkpoint of this step holds both."""
        super().optimizer_step(*args, **kwargs)
        halflife = min(self.hparams["ema_steps"], 0.1 * self.global_step + 1)
        update = get_ema_multi_avg_fn(0.5 ** (1 / halflife))
        with torch.no_grad():
            update(list(self.posterior_ema.parameters()), list(self.posterior.parameters()), None)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Measures likelihood and coverage of the averaged network."""
        context, size, u = batch
        context, octave, posterior = context.float(), self._encoder[0].octave(size), self.posterior_ema
        known = posterior.log_prob(context, octave, u)  # (B,)
        prior = -0.5 * (u.square() + math.log(2 * math.pi)).sum(dim=1)
        rng = torch.Generator(self.device).manual_seed(self.hparams["seed"] + batch_idx)
        shape = (len(u), self.hparams["coverage_samples"], posterior.noise_dim)
        samples = posterior.sample(context, octave, torch.randn(shape, device=self.device, generator=rng))
        level = region_levels(posterior, context, octave, u, samples)
        scores = {"val/loss": -known.mean() / u.shape[1], "val/gain": (known - prior).mean()}
        scores |= {f"val/gain_{s}": (known - prior)[size == s].mean() for s in (8, 16) if (size == s).any()}
        scores |= {f"val/covered_{p}": (level <= p / 100).float().mean() for p in LEVELS}
        self.log_dict(scores, batch_size=len(u), sync_dist=True)

    def on_fit_end(self) -> None:
        """Calibrates the spread of the candidates and saves the bundle."""
        folder = export_folder(self.trainer, self.hparams["export_to"])
        if folder is None:
            return
        loaded, encoder = load_bundle(self.hparams["bundle"]), self._encoder[0].cpu()
        self.owner.check_unchanged(loaded.hash)
        encoder.posterior = self.posterior_ema.float().cpu()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        held_out = data.pairs["val"]
        octave = encoder.octave(held_out.size)
        calibrate(encoder.posterior, held_out.context.float(), octave, held_out.u)
        photos = Faces(self.hparams["photos"], encoder.resolution, limit=CALIBRATION_FACES)
        faces = photos.images(CALIBRATION_FACES)
        calibrate_spread(encoder, loaded.generator, faces, budget=self.hparams["budget"])
        save_bundle(folder, loaded.generator, encoder, notes_of(loaded.info))
