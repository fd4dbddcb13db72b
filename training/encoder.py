"""Trains the encoder on photos, through the frozen generator.

    L = λ₂ ‖x̂ − x‖² + λ_p LPIPS(x̂, x) + λ_id (1 − cos) + λ_w ‖w − w̄‖ + λ_d ‖D x̂ − D x‖²

with x̂ = g(E(D x)): pSp's losses and defaults for super-resolution (Richardson et al. 2021, equations 1 to 5) and the
downscaling error. D downscales by random factors, most of them fractional, several of them in every batch.

Coarse to fine (Zhou et al. 2022), two more terms supervise what is there before the fine styles are: `weight_partial`
the face of a code whose finer layers, from a random level on, are still the base code, by the first two losses;
`weight_side` the generator's side output at every resolution (`losses.side_outputs`), by its squared difference from
the photo at that resolution.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchvision.utils import make_grid

from data.operator import Downscale, downscaling_error, upscale_bicubic
from losses.identity import identity_loss
from losses.latent import mean_latent_distance
from losses.perceptual import LPIPS
from losses.side_outputs import SideOutputs
from models import load_generator
from models.bundle import make_encoder
from models.checkpoints import sha256_of
from models.device import compile_if_possible
from models.encoder_base import Features
from models.face_embedder import load_face_embedder
from models.generator import Generator
from models.layers import Frozen
from models.propulse import ProPulseEncoder
from training.batches import BatchRandom, deal_sizes, downscale_groups, faces_from_bytes, lr_sizes_of, random_sizes
from training.checkpoints import OwnedTraining, Owner
from training.optimizers import Ranger, scheduled, update_average
from training.run import check_export, export_folder
from training.start import start_backbone, start_from


class EncoderTraining(OwnedTraining):
    """Training of an encoder for a given generator.

    Args:
        generator: Weights of the generator, see `models.load_generator`.
        variant: "psp" or "propulse", see `models.bundle.make_encoder`.
        architecture: Further arguments of that encoder, such as `backbone` or `canvas`.
        init_encoder: Bundle whose encoder to start from (or, for the variant "psp", a checkpoint of pSp), None to start
            from scratch: when a generator has been trained on, its old encoder needs a fraction of the steps.
        init_backbone: For the variant "psp": weights of a face recognition network for its backbone, such as
            model_ir_se50.pth, see `PspVariant.load_backbone`.
        optimiser: "adamw", or pSp's "ranger", see `training.optimizers`.
        learning_rate: At its peak.
        warmup_steps: Steps over which the learning rate rises.
        decay: "cosine" to zero at `trainer.max_steps`, or "none".
        weight_l2: λ₂.
        weight_lpips: λ_p.
        weight_identity: λ_id; 0 switches the embedding network off.
        lpips: Trunk of λ_p's network: "squeeze", or "alex" as in pSp, or "vgg".
        identity: λ_id's network: "mobilefacenet", "ir_se50" as in pSp, or "inception_resnet", see
            `models.face_embedder`.
        weight_latent: λ_w.
        weight_downscaling: λ_d.
        weight_partial: Of codes whose finer layers are the base code; for the variant "propulse". Synthesizes
            every batch once more.
        weight_side: Of the side outputs.
        loss_size: Size in pixels at which faces are compared by λ₂, λ_p and λ_id, as pSp does at 256; R if None.
        identity_share: Share of each batch that the identity loss looks at; it is the most expensive loss.
        min_lr_size: Smallest LR size in pixels.
        max_lr_size: Largest LR size in pixels; R if None.
        oversample_sizes: LR sizes that are trained more than others.
        oversample_prob: How often one of them is taken.
        sizes_per_batch: Number of LR sizes in one step, dealt out over its processes and micro-batches.
        ema_steps: Half-life of the moving average, in steps.
        val_lr: LR sizes that validation measures.
        checkpointed: Finest blocks of the generator that compute their features again in the backward pass, and keep
            none: less memory for some time, from 256 px on.
        compile: Compile the generator's synthesis; ignored where there is no compiler.
        export_to: Folder where the bundle is saved at the end, relative to the run's; None for nowhere.
        bundle_info: Name, licence and training data, for the bundle.
        seed: Determines every random choice together with the step.
    """

    def __init__(
        self,
        generator: str = "bundles/celeba64/generator.safetensors",
        variant: str = "psp",
        architecture: dict[str, Any] | None = None,
        init_encoder: str | None = None,
        init_backbone: str | None = None,
        optimiser: Literal["adamw", "ranger"] = "adamw",
        learning_rate: float = 1e-3,
        warmup_steps: int = 100,
        decay: Literal["cosine", "none"] = "cosine",
        weight_l2: float = 1.0,
        weight_lpips: float = 0.8,
        weight_identity: float = 0.1,
        lpips: str = "squeeze",
        identity: str = "mobilefacenet",
        weight_latent: float = 0.005,
        weight_downscaling: float = 0.0,
        weight_partial: float = 0.0,
        weight_side: float = 0.0,
        loss_size: int | None = None,
        identity_share: float = 0.25,
        min_lr_size: int = 4,
        max_lr_size: int | None = None,
        oversample_sizes: tuple[int, ...] = (),
        oversample_prob: float = 0.5,
        sizes_per_batch: int = 8,
        ema_steps: float = 200,
        val_lr: tuple[int, ...] = (16, 8),
        checkpointed: int = 0,
        compile: bool = True,
        export_to: str | None = None,
        bundle_info: dict[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_export(export_to, bundle_info)
        # Held in tuples, so that they stay out of checkpoints and of `train()`: they only measure. They come first, so
        # that a file that is missing is told before anything else is loaded.
        self._lpips = (LPIPS(lpips),)
        self._identity: tuple[Frozen, ...] = (load_face_embedder(identity),) if weight_identity else ()
        loaded = load_generator(generator)
        self.owner = Owner("generator_sha256", sha256_of(generator), str(generator))
        shape = {"resolution": loaded.resolution, "num_ws": loaded.num_ws, "w_dim": loaded.w_dim}
        self.encoder = make_encoder({"variant": variant, **shape, **(architecture or {})})
        if weight_partial and not isinstance(self.encoder, ProPulseEncoder):
            raise ValueError('Expected the variant "propulse" for weight_partial, which has a base code; name it.')
        self.encoder.latents.fit(loaded)
        if init_backbone is not None:
            start_backbone(self.encoder, init_backbone)
        if init_encoder is not None:
            start_from(self.encoder, init_encoder)
        self.encoder_ema = copy.deepcopy(self.encoder).eval().requires_grad_(False)
        loaded.synthesis.checkpointed = checkpointed
        self._generator: tuple[Generator] = (loaded,)
        self._sides: tuple[SideOutputs, ...] = ()

    # ---------------------------------------------------------------- set-up

    def setup(self, stage: str) -> None:
        """Puts the frozen networks where the training runs; ValueError if the faces have another size than theirs."""
        faces = self.trainer.datamodule.hparams["resolution"]  # type: ignore[attr-defined]
        if faces != self.encoder.resolution:
            raise ValueError(f"Expected faces of {self.encoder.resolution} px as the generator makes, got {faces} px.")
        self.to(memory_format=torch.channels_last)
        device = self.trainer.strategy.root_device  # Lightning moves this module only after set-up
        for network in (*self._generator, *self._lpips, *self._identity):
            network.to(device)
        if stage == "fit" and self.hparams["weight_side"]:
            self._sides = (SideOutputs(self._generator[0], seed=self.hparams["seed"]).to(device),)
        if stage == "fit" and self.hparams["compile"]:
            for network in (self._generator[0].synthesis, *self._sides):
                compile_if_possible(network, device)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW or Ranger, with warm-up and decay."""
        h, trained = self.hparams, self.encoder.parameters()
        # Not the fused form: Lightning does not clip gradients with it.
        adam = (
            Ranger(trained, h["learning_rate"])
            if h["optimiser"] == "ranger"
            else torch.optim.AdamW(trained, h["learning_rate"], betas=(0.9, 0.99), weight_decay=1e-4)
        )

        return scheduled(adam, self.trainer, h["warmup_steps"], decay=h["decay"] == "cosine")

    # ---------------------------------------------------------------- one step

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss on one batch of faces, uint8 (B, 3, R, R)."""
        h, encoder = self.hparams, self.encoder
        random = BatchRandom.of_step(self, h["seed"], batch_idx)
        rng, faces = random.rng, faces_from_bytes(batch, random)
        largest = h["max_lr_size"] or encoder.resolution
        sizes = random_sizes(
            h["sizes_per_batch"], h["min_lr_size"], largest, h["oversample_sizes"], h["oversample_prob"], rng
        )
        sizes = deal_sizes(sizes, len(faces), random)
        with self._full_precision():  # LR faces lie on the 8-bit grid, which bfloat16 would blur
            groups = downscale_groups(faces, sizes)
            canvas = torch.cat([encoder.on_canvas(group.faces) for group in groups])
        lr_sizes = lr_sizes_of(groups)
        features = encoder.read(canvas, lr_sizes, torch.zeros_like(lr_sizes))
        ws = encoder.point(features)
        *sides, images = self._sides[0](ws) if self._sides else [self._generator[0].synthesis(ws)]

        losses = self._pixel_losses(images, faces)
        losses["latent"] = mean_latent_distance(ws, encoder.latents.w_avg).mean()
        with self._full_precision():
            errors = [downscaling_error(images[g.rows], g.faces, g.operator) for g in groups]
        losses["downscaling"] = torch.cat(errors).mean()
        if self._identity:
            losses["identity"] = self._identity_of_some(images, faces, rng)
        if h["weight_partial"]:
            losses["partial"] = self._partial_loss(features, faces, rng)
        if sides:
            losses["side"] = self._side_loss(sides, faces)
        loss = torch.stack([h[f"weight_{name}"] * value for name, value in losses.items()]).sum()
        self.log_dict({f"loss/{name}": value.detach() for name, value in losses.items()})
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def _pixel_losses(self, images: Tensor, faces: Tensor) -> dict[str, Tensor]:
        images, faces = self._compared(images), self._compared(faces)
        return {"l2": (images - faces).square().mean(), "lpips": self._lpips_loss(images, faces)}

    def _compared(self, images: Tensor) -> Tensor:
        """Brings images to the size at which they are compared."""
        size = self.hparams["loss_size"]
        if size is None or size == images.shape[3]:
            return images
        with self._full_precision():
            return Downscale(size)(images.float())

    def _identity_of_some(self, images: Tensor, faces: Tensor, rng: torch.Generator) -> Tensor:
        count = max(1, round(len(faces) * self.hparams["identity_share"]))
        start = int(torch.randint(0, len(faces) - count + 1, (), generator=rng, device=rng.device))
        some = slice(start, start + count)
        return self._identity_loss(self._compared(images[some]), self._compared(faces[some]))

    def _partial_loss(self, features: Features, faces: Tensor, rng: torch.Generator) -> Tensor:
        """The first two losses of a code whose finer layers are the base code, from a random level on."""
        assert isinstance(self.encoder, ProPulseEncoder)
        level = int(torch.randint(0, self.encoder.levels, (), generator=rng, device=rng.device))
        images = self._generator[0].synthesis(self.encoder.partial(features, level))
        losses = self._pixel_losses(images, faces)
        return self.hparams["weight_l2"] * losses["l2"] + self.hparams["weight_lpips"] * losses["lpips"]

    def _side_loss(self, sides: list[Tensor], faces: Tensor) -> Tensor:
        """The mean squared difference of the side outputs from the photos at their resolutions."""
        with self._full_precision():
            targets = [Downscale(side.shape[3])(faces) for side in sides]
            return torch.stack([(a.float() - b).square().mean() for a, b in zip(sides, targets, strict=True)]).mean()

    def _full_precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=False)

    def _lpips_loss(self, images: Tensor, faces: Tensor) -> Tensor:
        with torch.no_grad():
            target = self._lpips[0].features(faces)
        return self._lpips[0].distance(self._lpips[0].features(images), target).mean()

    def _identity_loss(self, images: Tensor, faces: Tensor) -> Tensor:
        with torch.no_grad():
            target = self._identity[0](faces)
        return identity_loss(self._identity[0](images), target).mean()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Improves the encoder, then its average; here, so that a checkpoint of this step holds both."""
        super().optimizer_step(*args, **kwargs)
        update_average(self.encoder_ema, self.encoder, self.hparams["ema_steps"], self.global_step)

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
            images = self.sample(lr)
            scores = {
                f"val/lpips_{size}": lpips(images, faces).mean(),
                f"val/lpips_bicubic_{size}": lpips(bicubic, faces).mean(),
                f"val/downscaling_error_{size}": downscaling_error(images.clamp(-1, 1), lr, operator).mean(),
            }
            if self._identity:
                scores[f"val/identity_{size}"] = 1 - self._identity_loss(images, faces)
            self.log_dict(scores, batch_size=len(faces), sync_dist=True)
            if batch_idx == 0 and isinstance(self.logger, TensorBoardLogger):
                shown = torch.cat([self._nearest(lr[:8]), images[:8], faces[:8]]).clamp(-1, 1) / 2 + 0.5
                self.logger.experiment.add_image(f"faces_{size}", make_grid(shown.float(), nrow=8), self.global_step)

    def on_validation_epoch_end(self) -> None:
        """Relates LPIPS to that of bicubic interpolation."""
        means = self.trainer.callback_metrics
        for size in self.hparams["val_lr"]:
            self.log(f"val/lpips_ratio_{size}", means[f"val/lpips_{size}"] / means[f"val/lpips_bicubic_{size}"])

    def sample(self, lr: Tensor) -> Tensor:
        """The averaged encoder's point estimates for LR faces (B, 3, s, s): (B, 3, R, R)."""
        return self._generator[0].synthesis(self.encoder_ema(lr).ws[:, 0]).float()

    def _nearest(self, lr: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(lr, self.encoder.resolution, mode="nearest")

    def on_fit_end(self) -> None:
        """Saves the bundle."""
        folder = export_folder(self.trainer, self.hparams["export_to"])
        if folder is None:
            return
        from models.bundle import save_bundle

        generator, encoder = load_generator(self.hparams["generator"]), self.encoder_ema.float().cpu()
        self.owner.check_unchanged(sha256_of(self.hparams["generator"]))
        sizes = [self.hparams["min_lr_size"], self.hparams["max_lr_size"] or encoder.resolution]
        save_bundle(folder, generator, encoder, {"lr_sizes": sizes, **self.hparams["bundle_info"]})
