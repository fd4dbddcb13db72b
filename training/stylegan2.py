"""Trains the generator, which everything else in the project rests on, and its discriminator.

Non-saturating loss with lazy R1 and path-length regularisation (Karras et al. 2020), adaptive augmentation (Karras et
al. 2020b), an exponential moving average of the generator. One synthesis per step serves both networks: the
discriminator learns from the faces first, then the generator through the discriminator that has just seen them, which
saves a tenth of the work.

All randomness of a step follows from (seed, step), so a run that was killed resumes exactly. Every process samples the
random numbers of the whole batch and keeps those of its samples, and what a step averages it averages over all
processes: the step is the same on any number of them, and in any number of parts.
"""

from __future__ import annotations

import copy
import time
from contextlib import AbstractContextManager
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.utils import make_grid

from losses.adversarial import discriminator_loss, generator_loss, hinge_loss, r1_penalty
from losses.path_length import path_lengths
from losses.perceptual import SqueezeNetFeatures
from models.checkpoints import save_generator
from models.device import compile_if_possible, faces_at_once
from models.discriminator import Discriminator, PooledFeatureDiscriminator
from models.generator import Generator
from models.layers import without_autocast
from training.augment import AdaptiveAugment
from training.batches import BatchRandom, faces_from_bytes, step_rng
from training.optimizers import average_gradients
from training.reconstruction import Reconstruction
from training.start import start_discriminator, start_generator


class Stream(IntEnum):
    """Sources of random numbers within a step."""

    FLIP, FAKE, AUGMENT_REAL, AUGMENT_FAKE, AUGMENT_R1, PATH = range(6)


class View(NamedTuple):
    """Faces as the discriminators see them."""

    images: Tensor  # augmented (B, 3, R, R)
    features: tuple[Tensor, ...]  # a frozen network's of these, if there is a discriminator for them


class Fake(NamedTuple):
    """Generated faces.

    Attributes:
        view: As the discriminators see them; first those of random codes, then reconstructed photos.
        ws: The random codes (B', L, D).
        reconstructed: The reconstructed photos (B − B', 3, R, R), without augmentation.
    """

    view: View
    ws: Tensor
    reconstructed: Tensor


class StyleGAN2Training(LightningModule):
    """StyleGAN2 training.

    Args:
        resolution: Size R in pixels.
        channels: Widths of generator and discriminator per resolution 4, 8, …, R.
        z_dim: Width Z of z.
        w_dim: Width D of w.
        mapping_layers: Depth of the mapping network.
        learning_rate: Adam's, for the generator.
        learning_rate_discriminator: Adam's, for the discriminator. Twice the generator's keeps it from falling behind
            (two time scales, Heusel et al. 2017).
        decay_steps: The learning rate falls linearly to zero over the last so many steps of `trainer.max_steps`.
        r1_gamma: Weight γ of the gradient penalty γ/2 E‖∇D‖² on real faces.
        r1_every: Steps between gradient penalties.
        path_length_weight: Weight of the path-length penalty; 0 switches it off.
        path_length_every: Steps between path-length penalties.
        mixing_probability: Share of faces made from two codes, the second from a random layer on.
        ema_images: Half-life of the long moving average, in images: the one that is measured and exported.
        ema_images_short: Half-life of the short one, which is ahead while a run is young.
        ema_rampup: Both are at most this share of the images seen, unless the run starts from a generator of its size.
        augment_target: Target of adaptive augmentation; None switches it off.
        init_generator: Weights to start from (`models.load_generator` reads them), of this resolution or of half of
            it, see `training.start`; None to start from scratch.
        init_discriminator: Weights of the discriminators to start from, see `training.start`; None for none.
        warmup_steps: Steps in which only the discriminator learns; useful with `init_generator`.
        freeze_below: Blocks smaller than this, in pixels, and the mapping network count as old: a generator that has
            grown brings them along. None if there are none.
        freeze_steps: Steps in which the old blocks stay as they are.
        rate_below: Factor on the learning rate of the old blocks.
        feature_weight: Weight, in the generator's loss, of a second discriminator that judges the features of a frozen
            ImageNet SqueezeNet, see `models.discriminator.PooledFeatureDiscriminator`; 0 for none.
        learning_rate_features: Adam's, for that discriminator.
        reconstruction_weight: Weight, in the generator's loss, of LPIPS and mean square difference between photos and
            their reconstructions, see `training.reconstruction`; 0 for none.
        reconstruction_bundle: The bundle of the generator that this one has grown from; its encoder reads the photos.
        reconstruction_steps: Steps in which the generator learns from reconstructions alone, while the discriminators
            already learn.
        reconstruction_share: Share of reconstructions among the generated faces, below 1; the discriminators see all.
        micro_batches: Parts that a batch is taken in, one after the other, to save memory, or on a CPU to stay within
            its cache; the step is the same.
        compile: Compile the generator's synthesis; ignored where there is no compiler.
        export_to: File where the averaged generator is saved in float16 at every validation and at the end, relative
            to the run's folder; None for nowhere.
        seed: Determines every random choice together with the step.
    """

    path_mean: Tensor
    images_seen: Tensor

    def __init__(
        self,
        resolution: int = 64,
        channels: tuple[int, ...] = (256, 256, 128, 64, 32),
        z_dim: int = 256,
        w_dim: int = 256,
        mapping_layers: int = 4,
        learning_rate: float = 1e-3,
        learning_rate_discriminator: float = 2e-3,
        decay_steps: int = 0,
        r1_gamma: float = 0.5,
        r1_every: int = 16,
        path_length_weight: float = 2.0,
        path_length_every: int = 8,
        mixing_probability: float = 0.9,
        ema_images: float = 20_000,
        ema_images_short: float = 5_000,
        ema_rampup: float = 0.05,
        augment_target: float | None = 0.6,
        init_generator: str | None = None,
        init_discriminator: str | None = None,
        warmup_steps: int = 0,
        freeze_below: int | None = None,
        freeze_steps: int = 0,
        rate_below: float = 1.0,
        feature_weight: float = 0.0,
        learning_rate_features: float = 5e-4,
        reconstruction_weight: float = 0.0,
        reconstruction_bundle: str = "bundles/celeba64",
        reconstruction_steps: int = 0,
        reconstruction_share: float = 0.25,
        micro_batches: int = 1,
        compile: bool = True,
        export_to: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        if reconstruction_steps and not reconstruction_weight:
            raise ValueError("Expected a reconstruction_weight above 0 with reconstruction_steps, got 0.")
        self.generator = Generator(resolution, channels, z_dim, w_dim, mapping_layers)
        self.discriminator = Discriminator(resolution, channels)
        self.augment = AdaptiveAugment(augment_target or 0.6)
        self.register_buffer("path_mean", torch.zeros([]))
        self.register_buffer("images_seen", torch.zeros([], dtype=torch.int64))
        grown = init_generator is not None and start_generator(self.generator, init_generator)
        self._fresh = init_generator is None or grown
        self.generator_ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self.generator_ema_short = copy.deepcopy(self.generator_ema)
        self.features = SqueezeNetFeatures() if feature_weight else None
        self.feature_discriminator = PooledFeatureDiscriminator(SqueezeNetFeatures.widths if feature_weight else ())
        self.reconstruction = Reconstruction(reconstruction_bundle) if reconstruction_weight else None
        if init_discriminator is not None:
            start_discriminator(self.discriminator, init_discriminator, self.feature_discriminator)
        self._values: dict[str, list[Tensor]] = {}
        self._clock = (0, 0.0)

    # ---------------------------------------------------------------- set-up

    def setup(self, stage: str) -> None:
        """Prepares memory layout and compilation.

        Raises:
            ValueError: If the trainer is set up in a way that this training cannot follow.
        """
        if self.trainer.precision == "16-mixed":
            raise ValueError("Expected precision bf16-mixed or 32-true: float16 would need its gradients scaled.")
        faces = self.trainer.datamodule.hparams["resolution"]  # type: ignore[attr-defined]
        if faces != self.generator.resolution:
            raise ValueError(f"Expected model and data of one resolution, got {self.generator.resolution} and {faces}.")
        self.to(memory_format=torch.channels_last)
        if stage == "fit" and self.hparams["compile"]:
            compile_if_possible(self.generator.synthesis, self.trainer.strategy.root_device)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for each network; lazy regularisation shortens its memory as in the paper, section 3.1."""
        h = self.hparams
        adams: list[torch.optim.Optimizer] = []
        for groups, rate, every in (
            (self._new_and_old(), h["learning_rate"], h["path_length_every"] if h["path_length_weight"] else 0),
            (
                [list(self.discriminator.parameters()), list(self.feature_discriminator.parameters())],
                h["learning_rate_discriminator"],
                h["r1_every"],
            ),
        ):
            ratio = every / (every + 1) if every else 1.0
            parameters = [{"params": group} for group in groups if group]
            adams.append(torch.optim.Adam(parameters, rate * ratio, betas=(0.0, 0.99**ratio), fused=True))
        return adams

    def _new_and_old(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The generator's parameters, without those of the old blocks and of the mapping network, and those."""
        smallest = self.hparams["freeze_below"] or 0
        synthesis = self.generator.synthesis
        old = [block for block, size in zip(synthesis.blocks, synthesis.resolutions, strict=True) if size < smallest]
        modules = [self.generator.mapping, *old] if old else []
        below = [p for module in modules for p in module.parameters()]
        names = {id(p) for p in below}
        return [p for p in self.generator.parameters() if id(p) not in names], below

    # ---------------------------------------------------------------- one step

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Leaves the averaging of gradients to `_update`: one forward of the wrapper has several backwards here."""
        if isinstance(self.trainer.model, DistributedDataParallel):
            self.trainer.model.require_backward_grad_sync = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """Improves both networks on one batch of faces, uint8 (B, 3, R, R)."""
        h, step = self.hparams, self.global_step
        # Only the generator's steps go through Lightning's wrapper, so that global_step counts batches.
        adam_g, adam_d = self.optimizers()
        self._set_learning_rate(step)
        learning = step >= h["warmup_steps"]
        frozen = step < h["freeze_steps"]
        for parameter in self._new_and_old()[1]:
            parameter.requires_grad_(not frozen)
        if self.features is not None:
            self.feature_discriminator.normalise()

        real = self._real(batch)
        # One synthesis serves both networks, unless its graph takes memory that the parts are to save.
        keep = learning and (h["micro_batches"] == 1 or self.device.type == "cpu")
        with torch.set_grad_enabled(keep):
            fakes = [self._fake(part, i) for i, part in enumerate(real)]
        self._track_mean([fake.ws for fake in fakes])
        self._discriminator_step(adam_d.optimizer, real, [fake.view for fake in fakes])
        if step % h["r1_every"] == 0:
            self._r1_step(adam_d.optimizer, real)
        if learning:
            self._generator_step(adam_g, fakes if keep else None, real)
            if not frozen and h["path_length_weight"] and step % h["path_length_every"] == 0:
                self._path_length_step(adam_g.optimizer, max(1, len(real[0]) // 2))
        else:  # the step only counts
            adam_g.zero_grad()
            adam_g.step()

        images = len(batch) * self.trainer.world_size
        self.images_seen += images
        self._average(images)
        self._log_speed()
        self._log_means()

    def _discriminator_step(self, adam: Any, real: list[Tensor], fake: list[View]) -> None:
        adam.zero_grad()
        signs = []
        for i, images in enumerate(real):
            real_view = self._view(images, Stream.AUGMENT_REAL, i)
            real_logits = self.discriminator(real_view.images)
            fake_logits = self.discriminator(fake[i].images.detach())
            loss = discriminator_loss(real_logits, fake_logits).mean()
            self._collect("loss/discriminator", loss)
            self._collect("logits/real", real_logits.mean())
            self._collect("logits/fake", fake_logits.mean())
            if self.features is not None:
                judged = self.feature_discriminator(real_view.features)
                pairs = zip(judged, self.feature_discriminator([x.detach() for x in fake[i].features]), strict=True)
                hinge = torch.stack([hinge_loss(r, f) for r, f in pairs]).mean()
                self._collect("loss/discriminator_features", hinge)
                loss = loss + hinge
            self._accumulate(loss)
            signs.append(real_logits.detach().sign().mean())
        self._update(adam)
        if self.hparams["augment_target"] is not None:
            self.augment.adapt(self._mean(torch.stack(signs).mean()), sum(map(len, real)) * self.trainer.world_size)
        self.log("augment/p", self.augment.p)

    def _generator_step(self, adam: Any, fakes: list[Fake] | None, real: list[Tensor]) -> None:
        """Improves the generator on faces that carry its graph, or makes the same ones again."""
        adam.zero_grad()
        judges = [self.discriminator] + ([self.feature_discriminator] if self.features is not None else [])
        for judge in judges:
            judge.requires_grad_(False)
        for i, photos in enumerate(real):
            fake = fakes[i] if fakes else self._fake(photos, i)
            loss = self._reconstruction_loss(fake.reconstructed, photos)
            if self.global_step >= self.hparams["reconstruction_steps"]:
                loss = loss + self._adversarial_loss(fake.view)
            self._accumulate(loss)
        for judge in judges:
            judge.requires_grad_(True)
        self._update(adam)

    def _adversarial_loss(self, fake: View) -> Tensor:
        loss = generator_loss(self.discriminator(fake.images)).mean()
        self._collect("loss/generator", loss)
        if self.features is not None:
            hinge = -torch.stack([logits.mean() for logits in self.feature_discriminator(fake.features)]).mean()
            self._collect("loss/generator_features", hinge)
            loss = loss + self.hparams["feature_weight"] * hinge
        return loss

    def _reconstruction_loss(self, reconstructed: Tensor, photos: Tensor) -> Tensor:
        if self.reconstruction is None:
            return torch.zeros([], device=self.device)
        lpips, square = (x.mean() for x in self.reconstruction.distance(reconstructed, photos))
        self._collect("reconstruction/lpips", lpips)
        self._collect("reconstruction/square", square)
        return self.hparams["reconstruction_weight"] * (lpips + square)

    def _r1_step(self, adam: Any, real: list[Tensor]) -> None:
        adam.zero_grad()
        for i, images in enumerate(real):
            with self._full_precision():  # in bfloat16 oneDNN kills a process with one thread on processors with AMX
                view = self.augment(images, self._random(Stream.AUGMENT_R1, i))
                penalty = r1_penalty(self.discriminator, view)[1].mean()
            self._accumulate(penalty * (self.hparams["r1_gamma"] / 2 * self.hparams["r1_every"]))
            self._collect("loss/r1", penalty)
        self._update(adam)

    def _path_length_step(self, adam: Any, count: int) -> None:
        """Pulls the path lengths towards their running mean; the very first time the mean is only measured."""
        adam.zero_grad()
        means = []
        for i in range(self.hparams["micro_batches"]):
            random = self._random(Stream.PATH, i)
            ws = self._codes(count, random)
            # `.forward` goes around the compiled synthesis: compiled graphs cannot be differentiated twice.
            with self._full_precision():
                images = self.generator.synthesis.forward(ws, noise=self._noise(count, random))
                lengths = path_lengths(images, ws, random.randn(*images.shape))
            if self.path_mean > 0:
                penalty = (lengths - self.path_mean).square().mean()
                self._accumulate(penalty * self.hparams["path_length_weight"] * self.hparams["path_length_every"])
                self._collect("loss/path_length", penalty)
            means.append(lengths.detach().mean())
        if self.path_mean > 0:
            self._update(adam)
        mean = self._mean(torch.stack(means).mean())
        self.path_mean.lerp_(mean, 0.01 if self.path_mean > 0 else 1.0)
        self.log("path_length", mean)

    # ---------------------------------------------------------------- pieces

    def _accumulate(self, loss: Tensor) -> None:
        self.manual_backward(loss / self.hparams["micro_batches"])

    def _update(self, adam: Any) -> None:
        """Takes a step along the gradients of all processes."""
        average_gradients(self.trainer, [p for group in adam.param_groups for p in group["params"]])
        adam.step()

    def _mean(self, x: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        if self.trainer.world_size == 1:
            return x
        return self.trainer.strategy.reduce(x.clone(), reduce_op="mean")

    def _random(self, stream: Stream, part: int = 0) -> BatchRandom:
        """Random numbers for a part of the batch: each part of each process is one of so many that share a batch."""
        parts, world = self.hparams["micro_batches"], self.trainer.world_size
        rng = step_rng(self.hparams["seed"], self.global_step, stream, self.device)
        return BatchRandom(rng, self.trainer.global_rank + world * part, world * parts)

    def _real(self, batch: Tensor) -> list[Tensor]:
        """The parts of a batch as images, every second one mirrored, by chance."""
        parts = self.hparams["micro_batches"]
        if len(batch) % parts:
            raise ValueError(f"Expected a batch that micro_batches divides, got {len(batch)} faces in {parts} parts.")
        real = [faces_from_bytes(batch[i::parts]) for i in range(parts)]
        return [
            torch.where(self._random(Stream.FLIP, i).rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x).contiguous(
                memory_format=torch.channels_last
            )
            for i, x in enumerate(real)
        ]

    def _fake(self, photos: Tensor, part: int) -> Fake:
        """Generates as many faces as there are photos (B, 3, R, R), the last of them from the first photos."""
        random, reconstructed = self._random(Stream.FAKE, part), photos[:0]
        if self.reconstruction is not None:
            count = round(len(photos) * self.hparams["reconstruction_share"])
            reconstructed = self.reconstruction(self.generator.synthesis, photos[:count])
        ws = self._codes(len(photos) - len(reconstructed), random)
        images = self.generator.synthesis(ws, noise=self._noise(len(ws), random))
        return Fake(self._view(torch.cat([images, reconstructed]), Stream.AUGMENT_FAKE, part), ws, reconstructed)

    def _view(self, images: Tensor, stream: Stream, part: int) -> View:
        images = self.augment(images, self._random(stream, part))
        return View(images, self.features(images) if self.features is not None else ())

    def _full_precision(self) -> AbstractContextManager[object]:
        return without_autocast(self.device.type)

    def _codes(self, count: int, random: BatchRandom) -> Tensor:
        """Samples style codes (B, L, D) with style mixing."""
        z = torch.stack([random.randn(count, self.generator.z_dim) for _ in range(2)])
        with self._full_precision():
            ws = self.generator.mapping(z.flatten(0, 1))
        first, second = ws.unflatten(0, (2, count))  # (B, L, D) each
        layers = self.generator.num_ws
        cut = 1 + (random.rand(count, 1, 1) * (layers - 1)).floor()  # uniform on 1 … L − 1
        mixed = random.rand(count, 1, 1) < self.hparams["mixing_probability"]
        layer = torch.arange(layers, device=self.device)[None, :, None]
        return torch.where(mixed & (layer >= cut), second, first)

    @torch.no_grad()
    def _track_mean(self, ws: list[Tensor]) -> None:
        """Tracks the mean of w; the first layer's code is never mixed."""
        mean = torch.stack([codes[:, 0].mean(dim=0) for codes in ws]).mean(dim=0)
        self.generator.w_avg.lerp_(self._mean(mean), 0.005)

    def _noise(self, count: int, random: BatchRandom) -> list[Tensor | None]:
        return [random.randn(count, 1, n.resolution, n.resolution) for n in self.generator.synthesis.layers]

    def _collect(self, name: str, value: Tensor) -> None:
        self._values.setdefault(name, []).append(value.detach())

    def _log_means(self) -> None:
        """Logs the means over the parts of the step, and over all processes."""
        names = sorted(self._values)
        means = self._mean(torch.stack([torch.stack(self._values[name]).mean() for name in names]))
        self.log_dict(dict(zip(names, means, strict=True)))
        self._values = {}

    def _set_learning_rate(self, step: int) -> None:
        decay = self.hparams["decay_steps"]
        left = self.trainer.max_steps - step
        factor = min(1.0, left / decay) if decay and self.trainer.max_steps > 0 else 1.0
        h = self.hparams
        features = h["learning_rate_features"] / h["learning_rate_discriminator"]
        for adam, scales in zip(self.trainer.optimizers, ((1.0, h["rate_below"]), (1.0, features)), strict=True):
            for group, scale in zip(adam.param_groups, scales, strict=False):
                group["lr"] = adam.defaults["lr"] * factor * scale
        if step % 50 == 0:
            self.log("learning_rate_factor", factor)

    @torch.no_grad()
    def _average(self, batch: int) -> None:
        """Updates the averaged generators; early in a run from scratch they are short and forget the start."""
        for average, halflife in (
            (self.generator_ema, self.hparams["ema_images"]),
            (self.generator_ema_short, self.hparams["ema_images_short"]),
        ):
            if self._fresh:
                halflife = min(halflife, self.hparams["ema_rampup"] * float(self.images_seen) + 1)
            update = get_ema_multi_avg_fn(0.5 ** (batch / halflife))
            update(list(average.parameters()), list(self.generator.parameters()), None)
            for mine, current in zip(average.buffers(), self.generator.buffers(), strict=True):
                mine.copy_(current)

    def _log_speed(self) -> None:
        images, since = self._clock
        if int(self.images_seen) - images >= 2000 or since == 0:
            now = time.perf_counter()
            if since:
                self.log("images_per_second", (int(self.images_seen) - images) / (now - since), prog_bar=True)
            self._clock = (int(self.images_seen), now)
        self.log("images_seen", self.images_seen.float(), prog_bar=True)

    # ---------------------------------------------------------------- validation

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Leaves faces uint8 (B, 3, R, R) to callbacks such as `evaluation.frechet.FrechetDistance`."""

    def on_validation_epoch_end(self) -> None:
        """Shows a grid of faces and saves the weights."""
        if self.trainer.sanity_checking:
            return
        if self.trainer.is_global_zero:
            self._show_grid()
        self._export()
        self._clock = (int(self.images_seen), 0.0)

    def on_train_end(self) -> None:
        """Saves the weights of the last step, which need not be one of validation."""
        self._export()

    def _export(self) -> None:
        trainer, target = self.trainer, self.hparams["export_to"]
        if target and trainer.is_global_zero and trainer.state.fn == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = Path(trainer.log_dir or trainer.default_root_dir)
            notes = {"images_seen": str(int(self.images_seen))}
            save_generator(self.generator_ema, folder / target, notes)
            save_generator(self.generator_ema_short, (folder / target).with_stem(f"{Path(target).stem}_short"), notes)

    def sample(self, z: Tensor) -> Tensor:
        """Generates faces (B, 3, R, R) for z (B, Z) by the averaged generator, truncation 1, stored noise."""
        with torch.no_grad(), self._full_precision():
            return torch.cat([self.generator_ema(part) for part in z.split(faces_at_once(self.generator_ema))])

    def _show_grid(self) -> None:
        if not isinstance(self.logger, TensorBoardLogger):  # Others do not take pictures, or take them differently.
            return
        rng = step_rng(self.hparams["seed"], -2, 0, self.device)
        images = self.sample(torch.randn(48, self.generator.z_dim, device=self.device, generator=rng))
        grid = make_grid(images.clamp(-1, 1) / 2 + 0.5, nrow=8)
        self.logger.experiment.add_image("samples", grid, int(self.images_seen))
