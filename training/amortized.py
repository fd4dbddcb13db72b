"""Trains the stochastic encoder by the energy score, through the frozen generator and the back-projection.

    L = S(x; s, s′) + λ_p d(x, s₀) + λ_r ‖y − D G‖ + λ_w ‖(w − w̄)/σ_w‖² + λ_a L_adv + λ_o (|G| − 1)₊

s and s′ are two samples of one face and s₀ is the point estimate, all after the projection onto the input y; S and d
are in `losses.energy`. The score alone lets codes leave the generator's manifold, since the projection mends what they
miss: λ_r weighs what it has to mend, and λ_w the distance to the mean latent. A discriminator on the features that
LPIPS has computed keeps the samples as sharp as photos.

Inputs have all sizes from `min_lr_size` to `max_lr_size`, several in every batch; some are degraded, and the encoder is
told how strongly.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchvision.utils import make_grid

from data.degradation import face_rngs, random_degradation
from data.operator import Downscale, back_project, upscale_bicubic
from losses.energy import Embedded, energy_score, feature_distance
from losses.perceptual import LPIPS
from models import load_generator
from models.bundle import save_bundle
from models.checkpoints import sha256_of
from models.discriminator import FeatureDiscriminator
from models.encoder import Encoder
from models.encoder_base import Encoding
from models.face_embedder import load_face_embedder
from models.generator import Generator
from models.latents import measure_preconditioner
from models.layers import Frozen
from training.batches import BatchRandom, faces_from_bytes, random_sizes, step_rng
from training.checkpoints import OwnedTraining, Owner
from training.optimizers import average_gradients, update_average, warmup_cosine
from training.run import check_export, export_folder
from training.start import load_encoder_like

# Of LPIPS' levels, those that the discriminator sees.
JUDGED = {"squeeze": (0, 1, 2, 4, 6), "alex": (0, 1, 2, 3, 4), "vgg": (0, 1, 2, 3, 4)}
ROUNDS = 2  # of the projection; the other six hardly move a face, and each costs as much
GREY = 127.5  # grey levels in a unit of [-1, 1]


class Inputs(NamedTuple):
    """LR faces of one size."""

    lr: Tensor  # (b, 3, s, s) in [-1, 1], on the 8-bit grid
    sigma: Tensor  # root mean square of what a degradation did to them, in grey levels (b,)


class Synthesized(NamedTuple):
    """Faces before and after the projection."""

    encoding: Encoding  # where they come from
    raw: Tensor  # the generator's faces (B, k, 3, R, R)
    images: Tensor  # the projected faces (B, k, 3, R, R), in [-1, 1]
    lacking: Tensor  # mean square of y − D(raw) (B, k)


class AmortizedTraining(OwnedTraining):
    """Training of the stochastic encoder for a given generator.

    Args:
        generator: Weights of the generator, see `models.load_generator`.
        architecture: Further arguments of `models.encoder.Encoder`.
        init_encoder: Bundle whose encoder and latent statistics to start from; None to start from scratch.
        learning_rate: Adam's, at its peak.
        learning_rate_discriminator: Adam's.
        warmup_steps: Steps over which the learning rate rises, before half a cosine down to zero.
        weight_lpips: c_lpips of `losses.energy`.
        weight_l2: c_l2.
        weight_identity: c_identity; 0 switches the embedding network off.
        score_patches: Patches along a side in which the score is taken apart, see `losses.energy`; 1 for none.
        weight_point: λ_p.
        weight_residual: λ_r.
        weight_latent: λ_w.
        weight_adversarial: λ_a.
        weight_range: λ_o.
        lpips: LPIPS' trunk, whose features the discriminator sees as well: "squeeze", "alex" or "vgg".
        identity: Network of c_identity, see `models.face_embedder`.
        loss_size: Size in pixels at which faces are compared and judged, as pSp does at 256; R if None.
        identity_faces: Faces of each batch that the identity looks at, at least one of each micro-batch; it is the most
            expensive term.
        discriminator_warmup: Steps in which the discriminator only learns.
        min_lr_size: Smallest LR size in pixels.
        max_lr_size: Largest LR size in pixels; R − 1 if None.
        oversample_sizes: LR sizes that are trained more than others.
        oversample_prob: How often one of them is taken.
        sizes_per_batch: Number of LR sizes in one step, dealt out over its processes and micro-batches.
        degraded_prob: How often the faces of one size are degraded by more than downscaling.
        ema_steps: Half-life of the moving average, in steps.
        micro_batches: Parts that a batch is taken in, one after the other, to save memory.
        gradient_clip: Largest norm of the encoder's gradient.
        checkpointed: Finest blocks of the generator that compute their features again in the backward pass, and keep
            none: less memory for some time, from 256 px on.
        val_lr: LR sizes that validation measures.
        export_to: Folder where the bundle is saved at the end, relative to the run's; None for nowhere.
        bundle_info: Name, licence and training data, for the bundle.
        seed: Determines every random choice together with the step.
    """

    def __init__(
        self,
        generator: str = "bundles/celeba64/generator.safetensors",
        architecture: dict[str, Any] | None = None,
        init_encoder: str | None = None,
        learning_rate: float = 2e-4,
        learning_rate_discriminator: float = 1e-3,
        warmup_steps: int = 50,
        weight_lpips: float = 1.0,
        weight_l2: float = 0.5,
        weight_identity: float = 0.1,
        score_patches: int = 8,
        weight_point: float = 0.5,
        weight_residual: float = 1.0,
        weight_latent: float = 0.03,
        weight_adversarial: float = 0.05,
        weight_range: float = 1.0,
        lpips: str = "squeeze",
        identity: str = "mobilefacenet",
        loss_size: int | None = None,
        identity_faces: int = 2,
        discriminator_warmup: int = 100,
        min_lr_size: int = 4,
        max_lr_size: int | None = None,
        oversample_sizes: tuple[int, ...] = (),
        oversample_prob: float = 0.6,
        sizes_per_batch: int = 4,
        degraded_prob: float = 0.25,
        ema_steps: float = 500,
        micro_batches: int = 1,
        gradient_clip: float = 1.0,
        checkpointed: int = 0,
        val_lr: tuple[int, ...] = (16, 8),
        export_to: str | None = None,
        bundle_info: dict[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        check_export(export_to, bundle_info)
        # Held in tuples, so that they stay out of checkpoints and of `train()`: they only measure. They come first, so
        # that a file that is missing is told before anything else is loaded.
        self._lpips = (LPIPS(lpips),)
        self._identity: tuple[Frozen, ...] = (
            (load_face_embedder(identity),) if weight_identity and identity_faces else ()
        )
        loaded = load_generator(generator)
        loaded.synthesis.checkpointed = checkpointed
        self.owner = Owner("generator_sha256", sha256_of(generator), str(generator))
        shape = loaded.resolution, loaded.num_ws, loaded.w_dim, loaded.config["channels"]
        self.encoder = Encoder(*shape, **(architecture or {}))  # type: ignore[arg-type]
        self._start(loaded, init_encoder)
        self.encoder_ema = copy.deepcopy(self.encoder).eval().requires_grad_(False)
        self._generator: tuple[Generator] = (loaded.requires_grad_(False),)
        self._judged = JUDGED[lpips]
        self.discriminator = self._new_discriminator()

    def _start(self, generator: Generator, path: str | None) -> None:
        """Fits the latent statistics, or takes them and all weights from a bundle."""
        encoder = self.encoder
        if path is None:
            encoder.latents.fit(generator)
            noise = torch.randn(4000, encoder.w_dim, generator=torch.Generator().manual_seed(0))
            encoder.w_std.copy_(encoder.latents.sample(noise).std(dim=0))
            return
        encoder.load_state_dict(load_encoder_like(encoder, path).state_dict())

    def _new_discriminator(self) -> FeatureDiscriminator:
        """Makes the discriminator; the scales of the levels are those of noise until the first batch sets them."""
        with torch.no_grad():
            levels = self._lpips[0].activations(torch.zeros(1, 3, 64, 64))
        channels = [levels[i].shape[1] for i in self._judged]
        return FeatureDiscriminator([1.0] * len(channels), channels)

    # ---------------------------------------------------------------- set-up

    def setup(self, stage: str) -> None:
        """Moves the frozen networks to the device; ValueError if sizes or precision do not fit."""
        if self.trainer.precision == "16-mixed":
            raise ValueError("Expected precision bf16-mixed or 32-true: float16 would need its gradients scaled.")
        faces = self.trainer.datamodule.hparams["resolution"]  # type: ignore[attr-defined]
        if faces != self.encoder.resolution:
            raise ValueError(f"Expected model and data of one resolution, got {self.encoder.resolution} and {faces}.")
        device = self.trainer.strategy.root_device
        for network in (self._generator[0], self._lpips[0], *self._identity):
            network.to(device)
        for network in (self._generator[0], self.encoder, self.encoder_ema):
            network.to(memory_format=torch.channels_last)

    def on_fit_start(self) -> None:
        """Measures the preconditioner, unless a bundle or the checkpoint of an interrupted run brought it."""
        latents = self.encoder.latents
        if latents.rank and not latents.directions.any():
            preconditioner = measure_preconditioner(self._generator[0], latents.rank, seed=0)
            for encoder in (self.encoder, self.encoder_ema):
                encoder.latents.set_preconditioner(preconditioner)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW for the encoder, Adam for the discriminator."""
        adam = torch.optim.AdamW(
            self.encoder.parameters(), self.hparams["learning_rate"], betas=(0.9, 0.99), weight_decay=1e-4
        )
        rate = self.hparams["learning_rate_discriminator"]
        return [adam, torch.optim.Adam(self.discriminator.parameters(), rate, betas=(0.0, 0.99))]

    # ---------------------------------------------------------------- one step

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """Improves both networks on one batch of faces, uint8 (B, 3, R, R), taken in parts."""
        parts = self.hparams["micro_batches"]
        if len(batch) % parts:
            raise ValueError(f"Expected a batch that micro_batches divides, got {len(batch)} faces in {parts} parts.")
        self._keep_batch_statistics()
        if self.global_step == 0:
            self._set_scales(batch)
        self.discriminator.iterate_norms()
        adam, adam_d = self.optimizers()
        adam.zero_grad()
        adam_d.optimizer.zero_grad()
        found = [self._accumulate(batch[part::parts], part) for part in range(parts)]
        values = {name: torch.stack([own[name] for own, _ in found]).mean() for name in found[0][0]}
        self._update_lacking(torch.cat([lacking for _, lacking in found]))
        self._encoder_step(adam)
        average_gradients(self.trainer, self.discriminator.parameters())
        adam_d.optimizer.step()
        update_average(self.encoder_ema, self.encoder, self.hparams["ema_steps"], self.global_step)
        self.log("loss", values.pop("loss"), prog_bar=True)
        self.log_dict(values)

    def _accumulate(self, batch: Tensor, part: int) -> tuple[dict[str, Tensor], Tensor]:
        """Adds both networks' gradients of a part of the batch; gives what is logged, and what clean faces lack."""
        random = self._random(part)
        faces = faces_from_bytes(batch, random)
        inputs = self.make_inputs(faces, random)
        noise = random.randn(len(faces), 3, self.encoder.noise_dim)
        noise[:, 2] = 0  # the point estimate
        made = self.synthesize(self.encoder, inputs, noise)
        with self._full_precision():
            faces, made = self._compared(faces), made._replace(images=self._compared(made.images))
            fake = self._lpips[0].activations(made.images.flatten(0, 1))
            with torch.no_grad():
                real = self._lpips[0].activations(faces)
            losses, energy = self._losses(faces, made, real, fake, inputs, random.rng)
        total = torch.stack([self.hparams.get(f"weight_{name}", 1.0) * value for name, value in losses.items()]).sum()
        (total / self.hparams["micro_batches"]).backward()
        values = {"loss": total, **{f"loss/{name}": value for name, value in losses.items()}, **energy}
        if self.hparams["weight_adversarial"]:
            values |= self._discriminator_loss(real, [level.detach() for level in fake])
        clean = torch.cat([part.sigma for part in inputs]) == 0
        return {name: value.detach() for name, value in values.items()}, made.lacking.detach()[clean]

    def _random(self, part: int) -> BatchRandom:
        """Random numbers of a part of the batch: each part of each process is one of so many that share a step."""
        parts, world = self.hparams["micro_batches"], self.trainer.world_size
        rng = step_rng(self.hparams["seed"], self.global_step, 0, self.device)
        return BatchRandom(rng, self.trainer.global_rank + world * part, world * parts)

    def make_inputs(self, faces: Tensor, random: BatchRandom) -> list[Inputs]:
        """Downscales faces (B, 3, R, R) to the sizes of the step, dealt out over all its parts, and degrades some."""
        h, rng, places = self.hparams, random.rng, random.positions(len(faces))
        largest = h["max_lr_size"] or self.encoder.resolution - 1
        share = h["oversample_sizes"], h["oversample_prob"]
        sizes = random_sizes(h["sizes_per_batch"], h["min_lr_size"], largest, *share, rng)
        seeds = torch.randint(0, 2**31, (len(sizes),), device=self.device, generator=rng).tolist()
        inputs = []
        with self._full_precision():
            for group, rows in itertools.groupby(
                range(len(faces)), lambda i: places[i] * len(sizes) // random.total(len(faces))
            ):
                own, operator = list(rows), Downscale(sizes[group])
                part = faces[own[0] : own[-1] + 1]
                degradation = random_degradation(np.random.default_rng(seeds[group]), clean=1 - h["degraded_prob"])
                lr = degradation(part, operator, face_rngs(seeds[group], [places[i] for i in own]))
                sigma = (lr - operator(part)).square().mean(dim=(1, 2, 3)).sqrt() * GREY
                inputs.append(Inputs(lr, torch.where(sigma < 1, 0, sigma)))  # rounding to 8 bits is no noise
        return inputs

    def synthesize(self, encoder: Encoder, inputs: list[Inputs], noise: Tensor) -> Synthesized:
        """Encodes, synthesizes and projects; noise (B, k, E)."""
        k = noise.shape[1]
        with self._full_precision():  # LR faces lie on the 8-bit grid, which bfloat16 would blur
            canvas = torch.cat([encoder.on_canvas(part.lr) for part in inputs])
        size = torch.cat([torch.full_like(part.sigma, part.lr.shape[3]) for part in inputs])
        sigma = torch.cat([part.sigma for part in inputs])
        encoding = encoder.sample(encoder.read(canvas, size, sigma), noise)
        details = {r: d.flatten(0, 1) for r, d in encoding.details.items()}
        raw = self._generator[0].synthesis(encoding.ws.flatten(0, 1), details=details).float()
        images, lacking = [], []
        with self._full_precision():
            for part, x in zip(inputs, raw.split([k * len(part.lr) for part in inputs]), strict=True):
                lr, ratio = part.lr.repeat_interleave(k, dim=0), self._noise_ratio(encoder, part.sigma, k)
                lacking.append((lr - Downscale(lr.shape[3])(x)).square().mean(dim=(1, 2, 3)))
                images.append(back_project(x, lr, noise_ratio=ratio, rounds=ROUNDS))
        shape = noise.shape[:2]
        return Synthesized(
            encoding,
            raw.unflatten(0, shape),
            torch.cat(images).unflatten(0, shape),
            torch.cat(lacking).unflatten(0, shape),
        )

    @staticmethod
    def _noise_ratio(encoder: Encoder, sigma: Tensor, k: int) -> Tensor | None:
        if not sigma.any():
            return None
        return encoder.noise_ratio(sigma).repeat_interleave(k)

    def _losses(
        self, faces: Tensor, made: Synthesized, real: list[Tensor], fake: list[Tensor], inputs: list[Inputs],
        rng: torch.Generator,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
        h, encoder = self.hparams, self.encoder
        weights = h["weight_lpips"], h["weight_l2"], h["weight_identity"]
        truth, (a, b, point) = self._embedded(faces, made.images, real, fake, rng)
        energy = energy_score(truth, a, b, weights, h["score_patches"])
        sigma = torch.cat([part.sigma for part in inputs])
        guessed = torch.cat(
            [encoder.noise_estimator(p.lr, encoder.octave(torch.full_like(p.sigma, p.lr.shape[3]))) for p in inputs]
        )
        losses = {
            "score": energy.score.mean(),
            "point": feature_distance(truth, point, weights).mean(),
            "residual": (made.lacking + 1e-6).sqrt().mean(),
            "latent": ((made.encoding.ws - encoder.latents.w_avg) / encoder.w_std).square().mean(),
            "range": F.relu(made.raw.abs() - 1).mean(),
            "noise": (guessed - (1 + sigma).log()).square().mean(),
        }
        if h["weight_adversarial"] and self.global_step >= h["discriminator_warmup"]:
            self.discriminator.requires_grad_(False)
            logits = self._judge(fake)
            losses["adversarial"] = -torch.stack([level.mean() for level in logits]).mean()
            self.discriminator.requires_grad_(True)
        return losses, {"energy/to_truth": energy.to_truth.mean(), "energy/between": energy.between.mean()}

    def _embedded(
        self, faces: Tensor, images: Tensor, real: list[Tensor], fake: list[Tensor], rng: torch.Generator
    ) -> tuple[Embedded, list[Embedded]]:
        """What the distance compares; the faces whose identity is looked at come first."""
        lpips, count = self._lpips[0], max(1, round(self.hparams["identity_faces"] / self.hparams["micro_batches"]))
        count = min(count, len(faces))
        order = torch.randperm(len(faces), device=self.device, generator=rng)
        truth_features = [f[order] for f in lpips.normalized(real)]
        features = [f.unflatten(0, images.shape[:2])[order] for f in lpips.normalized(fake)]
        faces, images = faces[order], images[order]
        person, persons = None, [None] * images.shape[1]
        for identity in self._identity:
            with torch.no_grad():
                person = identity(faces[:count])
            persons = identity(images[:count].flatten(0, 1)).unflatten(0, (count, -1)).unbind(dim=1)
        samples = zip(
            images.unbind(dim=1), zip(*(f.unbind(dim=1) for f in features), strict=True), persons, strict=True
        )
        return Embedded(faces, truth_features, person), [Embedded(*sample) for sample in samples]

    def _encoder_step(self, adam: Any) -> None:
        h, step = self.hparams, self.global_step
        for group in adam.param_groups:
            group["lr"] = h["learning_rate"] * warmup_cosine(step, self.trainer.max_steps, h["warmup_steps"])
        average_gradients(self.trainer, self.encoder.parameters())
        apart = {id(p) for p in self.encoder.noise_estimator.parameters()}  # its loss says nothing of the others' scale
        norm = nn.utils.clip_grad_norm_(
            [p for p in self.encoder.parameters() if id(p) not in apart], h["gradient_clip"]
        )
        nn.utils.clip_grad_norm_(self.encoder.noise_estimator.parameters(), h["gradient_clip"])
        adam.step()
        self.log("gradient_norm", norm)

    def _discriminator_loss(self, real: list[Tensor], fake: list[Tensor]) -> dict[str, Tensor]:
        """Adds the discriminator's gradients."""
        pairs = list(zip(self._judge(real), self._judge(fake), strict=True))
        loss = torch.stack([F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in pairs]).mean()
        (loss / self.hparams["micro_batches"]).backward()
        return {
            "loss/discriminator": loss,
            "logits/gap": torch.stack([r.mean() - f.mean() for r, f in pairs]).mean(),
        }

    def _judge(self, levels: list[Tensor]) -> list[Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.trainer.precision == "bf16-mixed"):
            return [logits.float() for logits in self.discriminator([levels[i] for i in self._judged])]

    # ---------------------------------------------------------------- pieces

    def _full_precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=False)

    def _compared(self, images: Tensor) -> Tensor:
        """Brings images (…, 3, R, R) to the size at which they are compared."""
        size = self.hparams["loss_size"]
        if size is None or size == images.shape[-1]:
            return images
        return Downscale(size)(images.flatten(0, -4)).unflatten(0, images.shape[:-3])

    def _keep_batch_statistics(self) -> None:
        """Holds the statistics of an encoder that was trained before: one batch of 16 faces knows them less well."""
        if self.hparams["init_encoder"] is not None:
            for module in self.encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    @torch.no_grad()
    def _set_scales(self, batch: Tensor) -> None:
        """Measures the scales of the discriminator's levels on the first batch."""
        with self._full_precision():
            parts = [faces_from_bytes(part) for part in batch.chunk(self.hparams["micro_batches"])]
            levels = [self._lpips[0].activations(self._compared(part)) for part in parts]
        squares = torch.stack([torch.stack([own[i].square().mean() for own in levels]).mean() for i in self._judged])
        self.discriminator.scales.copy_(self.trainer.strategy.reduce(squares, reduce_op="mean").sqrt())

    @torch.no_grad()
    def _update_lacking(self, lacking: Tensor) -> None:
        """Lets τ² follow the mean over the clean faces of all processes."""
        total, count = self.trainer.strategy.reduce(
            torch.stack([lacking.sum(), lacking.new_tensor(lacking.numel())]), reduce_op="sum"
        )
        if count:
            self.encoder.lacking.lerp_(total / count, 0.1 if self.global_step < 100 else 0.005)

    # ---------------------------------------------------------------- validation

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Measures the averaged encoder on faces uint8 (B, 3, R, R), without flips."""
        faces, lpips = faces_from_bytes(batch), self._lpips[0]
        rng = step_rng(self.hparams["seed"], -1 - batch_idx, 0, self.device)
        noise = torch.randn(len(faces), 3, self.encoder.noise_dim, device=self.device, generator=rng)
        noise[:, 2] = 0
        for size in self.hparams["val_lr"]:
            with self._full_precision():
                lr = ((Downscale(size)(faces) + 1) * GREY).round().clamp(0, 255) / GREY - 1
            made = self.synthesize(self.encoder_ema, [Inputs(lr, torch.zeros(len(lr), device=self.device))], noise)
            with self._full_precision():
                truth = lpips.features(self._compared(faces))
                a, b, point = (lpips.features(x) for x in self._compared(made.images).unbind(1))
                draws = (lpips.distance(truth, a) + lpips.distance(truth, b)).mean() / 2
                between = lpips.distance(a, b).mean()
            scores = {
                f"val/lpips_point_{size}": lpips.distance(truth, point).mean(),
                f"val/lpips_draw_{size}": draws,
                f"val/lpips_between_{size}": between,
                f"val/dispersion_{size}": between / draws,
            }
            self.log_dict(scores, batch_size=len(faces), sync_dist=True)
            if batch_idx == 0 and isinstance(self.logger, TensorBoardLogger):
                rows = [upscale_bicubic(lr, faces.shape[3])[:8], *made.images[:8].unbind(1), faces[:8]]
                grid = make_grid(torch.cat(rows).clamp(-1, 1) / 2 + 0.5, nrow=min(8, len(faces)))
                self.logger.experiment.add_image(f"samples_{size}", grid, self.global_step)

    def on_fit_end(self) -> None:
        """Saves the bundle."""
        folder = export_folder(self.trainer, self.hparams["export_to"])
        if folder is None:
            return
        self.owner.check_unchanged(sha256_of(self.hparams["generator"]))
        sizes = [self.hparams["min_lr_size"], self.encoder.resolution]
        info = {"lr_sizes": sizes, **self.hparams["bundle_info"]}
        save_bundle(folder, load_generator(self.hparams["generator"]), self.encoder_ema.float().cpu(), info)
