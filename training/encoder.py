"""Trains the encoder on photos, through the frozen generator.

    L = λ₂ ‖x̂ − x‖² + λ_p LPIPS(x̂, x) + λ_id (1 − cos) + λ_w ‖w − w̄‖ + λ_d ‖D x̂ − D x‖²

with x̂ = g(E(D x)): pSp's losses and defaults for super-resolution (Richardson et al. 2021, equations 1 to 5) and the
downscaling error. D downscales by random factors, most of them fractional, several of them in every batch.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.utils import make_grid

from data.operator import Downscale, downscaling_error, upscale_bicubic
from losses.identity import identity_loss
from losses.latent import mean_latent_distance
from losses.perceptual import LPIPS
from models import load_generator
from models.encoder import create_encoder
from models.generator import Generator
from models.identity import Identity
from models.weights import sha256_of
from training.batches import downscale_groups, faces_from_bytes, lr_sizes_of, random_sizes
from training.compiling import compile_if_possible
from training.randomness import step_rng


class EncoderTraining(LightningModule):
    """Training of an encoder for a given generator.

    Args:
        generator: Weights of the generator, see `models.load_generator`.
        variant: Which encoder, see `models.create_encoder`.
        init_encoder: Bundle whose encoder to start from, None to start from scratch: when a generator has been trained
            on, its old encoder needs a fraction of the steps.
        learning_rate: AdamW's, at its peak; a short warm-up, then a cosine to zero at `trainer.max_steps`.
        warmup_steps: Steps over which the learning rate rises.
        weight_l2: λ₂.
        weight_lpips: λ_p.
        weight_identity: λ_id; 0 switches the embedding network off.
        weight_latent: λ_w.
        weight_downscaling: λ_d.
        identity_share: Share of each batch that the identity loss looks at; it is the most expensive loss.
        smallest_lr: Smallest LR size in pixels.
        often: LR sizes that are trained more than others.
        often_share: How often one of them is drawn.
        sizes_per_batch: Number of LR sizes in one batch.
        ema_steps: Half-life of the moving average, in steps.
        val_lr: LR sizes that validation measures.
        compile: Compile the generator's synthesis; ignored where there is no compiler.
        export_to: Folder where the bundle is saved at the end, relative to the run's; None for nowhere.
        bundle_info: Name, licence and training data, for the bundle.
        seed: Determines every random choice together with the step.
    """

    def __init__(
        self,
        generator: str = "bundles/celeba64/generator.safetensors",
        variant: str = "base",
        init_encoder: str | None = None,
        learning_rate: float = 1e-3,
        warmup_steps: int = 100,
        weight_l2: float = 1.0,
        weight_lpips: float = 0.8,
        weight_identity: float = 0.1,
        weight_latent: float = 0.005,
        weight_downscaling: float = 0.0,
        identity_share: float = 0.25,
        smallest_lr: int = 4,
        often: tuple[int, ...] = (),
        often_share: float = 0.5,
        sizes_per_batch: int = 8,
        ema_steps: float = 200,
        val_lr: tuple[int, ...] = (16, 8),
        compile: bool = True,
        export_to: str | None = None,
        bundle_info: dict[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        missing = {"name", "licence", "training_data"} - set(bundle_info or {})
        if export_to is not None and missing:
            raise ValueError(
                f"Expected bundle_info to name {', '.join(sorted(missing))}, since export_to asks for a bundle."
            )
        loaded = load_generator(generator)
        self._generator_sha256 = sha256_of(generator)
        self.encoder = create_encoder(loaded.resolution, variant, loaded.w_dim)
        self.encoder.latents.fit(loaded)
        if init_encoder is not None:
            self._start_from(init_encoder)
        self.encoder_ema = copy.deepcopy(self.encoder).eval().requires_grad_(False)
        # Held in tuples, so that they stay out of checkpoints and of `train()`: they only measure.
        self._generator: tuple[Generator] = (loaded,)
        self._lpips = (LPIPS(),)
        self._identity: tuple[Identity, ...] = (Identity(),) if weight_identity else ()

    def _start_from(self, path: str) -> None:
        from models.bundle import load_bundle

        loaded = load_bundle(path).encoder
        if loaded.config != self.encoder.config:
            raise ValueError(
                f"Expected an encoder with {self.encoder.config} in {path}, got one with {loaded.config}; start from "
                "one for a generator of the same shape, or from scratch without init_encoder."
            )
        statistics = copy.deepcopy(self.encoder.latents.state_dict())  # those of the present generator stay
        self.encoder.load_state_dict(loaded.state_dict())
        self.encoder.latents.load_state_dict(statistics)

    # ---------------------------------------------------------------- set-up

    def setup(self, stage: str) -> None:
        """Puts the frozen networks where the training runs.

        Raises:
            ValueError: If the faces have another size than the generator's.
        """
        faces = self.trainer.datamodule.hparams["resolution"]  # type: ignore[attr-defined]
        if faces != self.encoder.resolution:
            raise ValueError(f"Expected faces of {self.encoder.resolution} px as the generator draws, got {faces} px.")
        self.to(memory_format=torch.channels_last)
        device = self.trainer.strategy.root_device  # Lightning moves this module only after set-up
        for network in (*self._generator, *self._lpips, *self._identity):
            network.to(device)
        if stage == "fit" and self.hparams["compile"]:
            compile_if_possible(self._generator[0].synthesis, device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes which generator the encoder belongs to."""
        checkpoint["generator_sha256"] = self._generator_sha256

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on with another generator.

        Raises:
            ValueError: If the checkpoint was made with another generator.
        """
        if checkpoint["generator_sha256"] != self._generator_sha256:
            raise ValueError(
                f"Expected the generator that this run began with, {self.hparams['generator']} has changed since; put "
                "the old one back, or start a new run under another --trainer.logger.init_args.name."
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine."""
        h = self.hparams
        # Not the fused form: Lightning does not clip gradients with it.
        adam = torch.optim.AdamW(self.encoder.parameters(), h["learning_rate"], betas=(0.9, 0.99), weight_decay=1e-4)

        def factor(step: int) -> float:
            warmup = min(1.0, (step + 1) / max(1, h["warmup_steps"]))
            progress = step / self.trainer.max_steps if self.trainer.max_steps > 0 else 0.0
            return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

        schedule = torch.optim.lr_scheduler.LambdaLR(adam, factor)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---------------------------------------------------------------- one step

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss on one batch of faces, uint8 (B, 3, R, R)."""
        h = self.hparams
        rng = step_rng(h["seed"], self.global_step, self.global_rank, self.device)
        faces = faces_from_bytes(batch, rng)
        sizes = random_sizes(
            h["sizes_per_batch"], h["smallest_lr"], self.encoder.resolution, h["often"], h["often_share"], rng
        )
        with self._full_precision():  # LR faces lie on the 8-bit grid, which bfloat16 would blur
            groups = downscale_groups(faces, sizes)
            canvas = torch.cat([self.encoder.on_canvas(group.faces) for group in groups])
        ws = self.encoder.best_guess(canvas, lr_sizes_of(groups))
        drawn = self._generator[0].synthesis(ws)

        losses = {"l2": (drawn - faces).square().mean(), "lpips": self._lpips_loss(drawn, faces)}
        losses["latent"] = mean_latent_distance(ws, self.encoder.latents.w_avg).mean()
        with self._full_precision():
            errors = [downscaling_error(drawn[g.rows], g.faces, g.operator) for g in groups]
        losses["downscaling"] = torch.cat(errors).mean()
        if self._identity:
            count = max(1, round(len(faces) * h["identity_share"]))
            start = int(torch.randint(0, len(faces) - count + 1, (), generator=rng, device=rng.device))
            losses["identity"] = self._identity_loss(drawn[start : start + count], faces[start : start + count])
        loss = torch.stack([h[f"weight_{name}"] * value for name, value in losses.items()]).sum()
        self.log_dict({f"loss/{name}": value.detach() for name, value in losses.items()})
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def _full_precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=False)

    def _lpips_loss(self, drawn: Tensor, faces: Tensor) -> Tensor:
        with torch.no_grad():
            target = self._lpips[0].features(faces)
        return self._lpips[0].distance(self._lpips[0].features(drawn), target).mean()

    def _identity_loss(self, drawn: Tensor, faces: Tensor) -> Tensor:
        with torch.no_grad():
            target = self._identity[0](faces)
        return identity_loss(self._identity[0](drawn), target).mean()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Improves the encoder, then its average; here, so that a checkpoint of this step holds both."""
        super().optimizer_step(*args, **kwargs)
        self._average()

    @torch.no_grad()
    def _average(self) -> None:
        """Updates the averaged encoder; early in a run the average is short."""
        halflife = min(self.hparams["ema_steps"], 0.1 * self.global_step + 1)
        update = get_ema_multi_avg_fn(0.5 ** (1 / halflife))
        # Batch statistics are averaged as well: those of the present weights would not fit the average.
        update(_floats(self.encoder_ema), _floats(self.encoder), None)

    # ---------------------------------------------------------------- validation

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Measures the averaged encoder on faces uint8 (B, 3, R, R), without flips."""
        faces = faces_from_bytes(batch)
        lpips = self._lpips[0]
        for size in self.hparams["val_lr"]:
            with self._full_precision():
                operator = Downscale(size)
                lr = operator(faces)
                bicubic = upscale_bicubic(lr, self.encoder.resolution)
            drawn = self.draw(lr)
            scores = {
                f"val/lpips_{size}": lpips(drawn, faces).mean(),
                f"val/lpips_bicubic_{size}": lpips(bicubic, faces).mean(),
                f"val/downscaling_error_{size}": downscaling_error(drawn.clamp(-1, 1), lr, operator).mean(),
            }
            if self._identity:
                scores[f"val/identity_{size}"] = 1 - self._identity_loss(drawn, faces)
            self.log_dict(scores, batch_size=len(faces), sync_dist=True)
            if batch_idx == 0 and isinstance(self.logger, TensorBoardLogger):
                shown = torch.cat([self._nearest(lr[:8]), drawn[:8], faces[:8]]).clamp(-1, 1) / 2 + 0.5
                self.logger.experiment.add_image(f"faces_{size}", make_grid(shown.float(), nrow=8), self.global_step)

    def on_validation_epoch_end(self) -> None:
        """Relates LPIPS to that of bicubic interpolation."""
        means = self.trainer.callback_metrics
        for size in self.hparams["val_lr"]:
            self.log(f"val/lpips_ratio_{size}", means[f"val/lpips_{size}"] / means[f"val/lpips_bicubic_{size}"])

    def draw(self, lr: Tensor) -> Tensor:
        """The averaged encoder's best guess for LR faces (B, 3, s, s), drawn: (B, 3, R, R)."""
        return self._generator[0].synthesis(self.encoder_ema(lr)[:, 0]).float()

    def _nearest(self, lr: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(lr, self.encoder.resolution, mode="nearest")

    def on_fit_end(self) -> None:
        """Calibrates the spread of the candidates and saves the bundle."""
        target, trainer = self.hparams["export_to"], self.trainer
        if target is None or self.global_rank != 0 or self.global_step == 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        from models.bundle import save_bundle
        from training.spread import calibrate_spread

        photos = trainer.datamodule.train_faces  # type: ignore[attr-defined]
        faces = torch.stack([photos[i] for i in range(min(48, len(photos)))])
        generator, encoder = load_generator(self.hparams["generator"]), self.encoder_ema.float().cpu()
        if sha256_of(self.hparams["generator"]) != self._generator_sha256:
            raise ValueError(f"Expected {self.hparams['generator']} to stay as it was; it changed during the training.")
        calibrate_spread(encoder, generator, faces_from_bytes(faces))
        folder = Path(trainer.log_dir or trainer.default_root_dir) / target
        save_bundle(folder, generator, encoder, dict(self.hparams["bundle_info"]))


def _floats(module: nn.Module) -> list[Tensor]:
    """Gives all floating-point parameters and buffers of a module."""
    return [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
