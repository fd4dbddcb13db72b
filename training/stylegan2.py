"""Trains the generator and its discriminator: the prior over faces that everything else in the project rests on.

Non-saturating loss with lazy R1 and path-length regularisation (Karras et al. 2020), adaptive augmentation (Karras et
al. 2020b), an exponential moving average of the generator. One synthesis per step serves both networks: the
discriminator learns from the faces first, then the generator through the discriminator that has just seen them, which
saves a tenth of the work.

All randomness of a step follows from (seed, rank, step), so a run that was killed goes on exactly.
"""

from __future__ import annotations

import copy
import time
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.utils import make_grid

from evaluation.frechet import frechet_metric
from losses.adversarial import discriminator_loss, generator_loss, r1_penalty
from losses.path_length import path_lengths
from models.discriminator import Discriminator
from models.generator import Generator
from models.layers import without_autocast
from models.weights import save_generator
from training.augment import AdaptiveAugment
from training.batches import faces_from_bytes
from training.compiling import compile_if_possible
from training.growing import start_discriminator, start_generator
from training.randomness import step_rng


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
        mixing_probability: Share of faces drawn from two codes, the second from a random layer on.
        ema_images: Half-life of the long moving average, in images: the one that is measured and exported.
        ema_images_short: Half-life of the short one, which is ahead while a run is young.
        augment_target: Target of adaptive augmentation; None switches it off.
        init_generator: Weights to start from (`models.load_generator` reads them), of this resolution or of half of
            it, see `training.growing`; None to start from scratch.
        init_discriminator: A safetensors file of the discriminator's state dict, None to start from scratch.
        warmup_steps: Steps in which only the discriminator learns; useful with `init_generator`.
        freeze_below: Blocks smaller than this, in pixels, and the mapping network count as old: a generator that has
            grown brings them along. None if there are none.
        freeze_steps: Steps in which the old blocks stay as they are.
        rate_below: Factor on the learning rate of the old blocks.
        metric: Fréchet distance to report: auto, fid or fd_vgg11.
        metric_samples: Generated faces per validation.
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
        augment_target: float | None = 0.6,
        init_generator: str | None = None,
        init_discriminator: str | None = None,
        warmup_steps: int = 0,
        freeze_below: int | None = None,
        freeze_steps: int = 0,
        rate_below: float = 1.0,
        metric: str = "auto",
        metric_samples: int = 2000,
        compile: bool = True,
        export_to: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = Generator(resolution, channels, z_dim, w_dim, mapping_layers)
        self.discriminator = Discriminator(resolution, channels)
        self.augment = AdaptiveAugment(augment_target or 0.6)
        self.register_buffer("path_mean", torch.zeros([]))
        self.register_buffer("images_seen", torch.zeros([], dtype=torch.int64))
        grown = init_generator is not None and start_generator(self.generator, init_generator)
        if init_discriminator is not None:
            start_discriminator(self.discriminator, init_discriminator)
        self._fresh = init_generator is None or grown
        self.generator_ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self.generator_ema_short = copy.deepcopy(self.generator_ema)
        self._metric: Any = None
        self._clock = (0, 0.0)

    # ---------------------------------------------------------------- set-up

    def setup(self, stage: str) -> None:
        """Prepares memory layout and compilation.

        Raises:
            ValueError: If the trainer is set up in a way that this training cannot follow.
        """
        if self.trainer.world_size > 1:
            raise ValueError("Expected one device: the prior's training is not distributed; set trainer.devices to 1.")
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
            ([list(self.discriminator.parameters())], h["learning_rate_discriminator"], h["r1_every"]),
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

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """Improves both networks on one batch of faces, uint8 (B, 3, R, R)."""
        h, step = self.hparams, self.global_step
        rng = step_rng(h["seed"], step, 0, self.device)
        real = faces_from_bytes(batch, rng)
        # Only the generator's steps go through Lightning's wrapper, so that global_step counts batches.
        adam_g, adam_d = self.optimizers()
        self._set_learning_rate(step)

        learning = step >= h["warmup_steps"]
        frozen = step < h["freeze_steps"]
        for parameter in self._new_and_old()[1]:
            parameter.requires_grad_(not frozen)
        with torch.set_grad_enabled(learning):
            fake = self.generator.synthesis(self._codes(real.shape[0], rng), noise=self._noise(real.shape[0], rng))
        self._discriminator_step(adam_d.optimizer, real, fake.detach(), rng)
        if step % h["r1_every"] == 0:
            self._r1_step(adam_d.optimizer, real, rng)
        self._generator_step(adam_g, fake if learning else None, rng)
        if learning and not frozen and h["path_length_weight"] and step % h["path_length_every"] == 0:
            self._path_length_step(adam_g.optimizer, max(1, real.shape[0] // 2), rng)

        self.images_seen += real.shape[0]
        self._average(real.shape[0])
        self._log_speed()

    def _generator_step(self, adam: Any, fake: Tensor | None, rng: torch.Generator) -> None:
        """Improves the generator on faces (B, 3, R, R) that carry its graph; without faces the step only counts."""
        if fake is None:
            adam.zero_grad()
            adam.step()
            return
        self.discriminator.requires_grad_(False)
        loss = generator_loss(self.discriminator(self.augment(fake, rng))).mean()
        self.discriminator.requires_grad_(True)
        self._step(adam, loss)
        self.log("loss/generator", loss.detach())

    def _discriminator_step(self, adam: Any, real: Tensor, fake: Tensor, rng: torch.Generator) -> None:
        real_logits = self.discriminator(self.augment(real, rng))
        fake_logits = self.discriminator(self.augment(fake, rng))
        loss = discriminator_loss(real_logits, fake_logits).mean()
        self._step(adam, loss)
        if self.hparams["augment_target"] is not None:
            self.augment.adapt(real_logits)
        self.log_dict(
            {
                "loss/discriminator": loss.detach(),
                "logits/real": real_logits.detach().mean(),
                "logits/fake": fake_logits.detach().mean(),
                "augment/p": self.augment.p,
            }
        )

    def _r1_step(self, adam: Any, real: Tensor, rng: torch.Generator) -> None:
        with self._full_precision():  # in bfloat16 oneDNN kills the process on one thread of a processor with AMX
            _, penalty = r1_penalty(self.discriminator, self.augment(real, rng))
        self._step(adam, penalty.mean() * (self.hparams["r1_gamma"] / 2 * self.hparams["r1_every"]))
        self.log("loss/r1", penalty.detach().mean())

    def _path_length_step(self, adam: Any, batch: int, rng: torch.Generator) -> None:
        ws = self._codes(batch, rng)
        # `.forward` passes by the compiled synthesis: compiled graphs cannot be differentiated twice.
        with self._full_precision():
            images = self.generator.synthesis.forward(ws, noise=self._noise(batch, rng))
            lengths = path_lengths(images, ws, rng)
        mean = self.path_mean.lerp(lengths.detach().mean(), 0.01 if self.path_mean > 0 else 1.0)
        penalty = (lengths - mean).square().mean()
        self._step(adam, penalty * self.hparams["path_length_weight"] * self.hparams["path_length_every"])
        self.path_mean.copy_(mean)
        self.log_dict({"loss/path_length": penalty.detach(), "path_length": lengths.detach().mean()})

    def _step(self, adam: Any, loss: Tensor) -> None:
        adam.zero_grad()
        self.manual_backward(loss)
        adam.step()

    # ---------------------------------------------------------------- pieces

    def _full_precision(self) -> AbstractContextManager[object]:
        return without_autocast(self.device.type)

    def _codes(self, batch: int, rng: torch.Generator) -> Tensor:
        """Draws style codes (B, L, D) with style mixing, and tracks their mean."""
        z = torch.randn(2, batch, self.generator.z_dim, device=self.device, generator=rng)
        with self._full_precision():
            ws = self.generator.mapping(z.flatten(0, 1))
        first, second = ws.unflatten(0, (2, batch))  # (B, L, D) each
        self.generator.w_avg.lerp_(first[:, 0].detach().mean(dim=0), 0.005)
        layers = self.generator.num_ws
        cut = torch.randint(1, layers, (batch, 1, 1), device=self.device, generator=rng)
        mixed = torch.rand(batch, 1, 1, device=self.device, generator=rng) < self.hparams["mixing_probability"]
        layer = torch.arange(layers, device=self.device)[None, :, None]
        return torch.where(mixed & (layer >= cut), second, first)

    def _noise(self, batch: int, rng: torch.Generator) -> list[Tensor | None]:
        return list(self.generator.synthesis.make_noise(batch, rng))

    def _set_learning_rate(self, step: int) -> None:
        decay = self.hparams["decay_steps"]
        left = self.trainer.max_steps - step
        factor = min(1.0, left / decay) if decay and self.trainer.max_steps > 0 else 1.0
        for adam in self.trainer.optimizers:
            for group, scale in zip(adam.param_groups, (1.0, self.hparams["rate_below"]), strict=False):
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
                halflife = min(halflife, 0.05 * float(self.images_seen) + 1)
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

    def on_validation_start(self) -> None:
        """Makes the metric when it is first needed; a run goes on without one where its weights are not to be had."""
        if self._metric is None and not self.trainer.sanity_checking:
            try:
                name, metric = frechet_metric(self.hparams["metric"])
                self._metric = (name, metric.to(self.device))
            except (OSError, ImportError) as error:
                warnings.warn(f"No Fréchet distance is measured: {error}", stacklevel=2)
                self._metric = (None, None)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Shows the metric one batch of real faces, uint8 (B, 3, R, R); once, since they stay the same."""
        metric = self._metric[1] if self._metric else None
        if metric is not None and metric.real_features_num_samples < len(self.trainer.datamodule.val_faces):  # type: ignore[attr-defined]
            metric.update(batch, real=True)

    def on_validation_epoch_end(self) -> None:
        """Measures the Fréchet distance of the averaged generator, draws the grid, saves the weights."""
        if self.trainer.sanity_checking:
            return
        self._measure()
        self._show_grid()
        self._export()
        self._clock = (int(self.images_seen), 0.0)

    def on_train_end(self) -> None:
        """Saves the weights of the last step, which need not be one of validation."""
        self._export()

    def _measure(self) -> None:
        name, metric = self._metric
        if metric is None:
            return
        rng = step_rng(self.hparams["seed"], -1, 0, self.device)
        left = self.hparams["metric_samples"]
        while left > 0:
            images = self.sample(min(left, 50), rng)
            metric.update(((images.clamp(-1, 1) + 1) * 127.5).round().byte(), real=False)
            left -= len(images)
        self.log(name, metric.compute().float(), prog_bar=True)
        metric.reset()

    def _export(self) -> None:
        trainer, target = self.trainer, self.hparams["export_to"]
        if target and trainer.state.fn == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = Path(trainer.log_dir or trainer.default_root_dir)
            notes = {"images_seen": str(int(self.images_seen))}
            save_generator(self.generator_ema, folder / target, notes)
            save_generator(self.generator_ema_short, (folder / target).with_stem(f"{Path(target).stem}_short"), notes)

    def sample(self, batch: int, rng: torch.Generator) -> Tensor:
        """Draws faces (B, 3, R, R) from the averaged generator, truncation 1, stored noise."""
        z = torch.randn(batch, self.generator.z_dim, device=self.device, generator=rng)
        with torch.no_grad(), self._full_precision():
            return self.generator_ema(z)

    def _show_grid(self) -> None:
        if not isinstance(self.logger, TensorBoardLogger):  # Others do not take pictures, or take them differently.
            return
        images = self.sample(48, step_rng(self.hparams["seed"], -2, 0, self.device))
        grid = make_grid(images.clamp(-1, 1) / 2 + 0.5, nrow=8)
        self.logger.experiment.add_image("samples", grid, int(self.images_seen))
