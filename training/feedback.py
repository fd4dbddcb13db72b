"""Trains the learned feedback on photos, for an encoder and a generator that stay as they are.

    L = log(‖D x̂ − y‖² / M + 3e-4) + λ_p LPIPS(x̂, x) + λ_φ ‖E φ(x̂) − E φ(x)‖² + λ_ψ ‖E ψ(x̂) − E ψ(x)‖²
        + λ_m ‖Δ / σ‖² / (L D),    x̂ = g(w + Δ)

One batch serves several passes, each of which is a step of the optimiser: the face that a pass draws is where the next
one starts, so that the network sees its own results. The logarithm asks for the same factor of every face, near the
solution or far away; the means of features, of LPIPS (φ) and of a network that LPIPS knows nothing of (ψ,
`losses.face_parts`), keep what all corrections have in common out of the faces (`losses.feature_means`), for each pass
and octave of LR sizes. Half of the faces start at the encoder's best guess, half at a candidate around it, whose means
are their own.

With `small_rank`, the network stays as it is, and low-rank additions to it are trained, which small LR faces take.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.utils import make_grid

from data.operator import EPSILON, Downscale, downscaling_error
from losses.face_parts import FaceParts
from losses.feature_means import FeatureMeans
from losses.perceptual import LPIPS
from models.adapted import additions
from models.bundle import load_bundle, save_bundle
from models.bundle_info import notes_of
from models.encoder import make_encoder
from models.encoder_base import EncoderBase
from models.feedback import NO_ADDITIONS, Feedback, on_canvas
from models.generator import Generator
from training.batches import LowResolution, downscale_groups, faces_from_bytes, lr_sizes_of, random_sizes
from training.compiling import compile_if_possible
from training.coordinates import measure_coordinates
from training.export_folder import export_folder
from training.owner import OwnedTraining, Owner
from training.randomness import step_rng
from training.schedule import warmup_cosine
from training.spread import CALIBRATION_FACES, calibrate_spread

FURTHER = 1.5
FLOOR = 3e-4  # of the downscaling error: below it, there is little left to win
SCALE_FACES = 1024  # photos that say how far features spread over faces


class _Target(NamedTuple):
    """What the faces of a batch are compared with."""

    features: tuple[Tensor, ...]  # of the truths, φ
    parts: list[Tensor]  # of the truths, ψ; empty where it has no weight
    candidates: Tensor  # (B,), whether a face starts at a candidate


class FeedbackTraining(OwnedTraining):
    """Training of the feedback network of a bundle's encoder.

    Args:
        bundle: Folder with the generator and the encoder; a feedback network that it already has is trained on.
        passes: Passes per batch, each with a step of the optimiser.
        rank: Directions of the coordinates that it speaks in, see `models.curvature`.
        small_rank: Trains nothing but additions of this rank, see `models.feedback.Feedback`; 0 trains the network, and
            drops additions that were fitted to it as it was.
        learning_rate: AdamW's, at its peak; a short warm-up, then a cosine to zero at `trainer.max_steps`.
        warmup_steps: Steps over which the learning rate rises.
        weight_lpips: λ_p.
        weight_means: λ_φ.
        weight_parts: λ_ψ.
        candidates_lpips: λ_p of the candidates, as a share of that of the best guesses: a candidate is not the truth,
            and one that is held to it as strictly moves back to the mean.
        weight_moves: λ_m.
        spread: Candidates start up to so far from the best guess, as a share of the way to a random face; where the
            encoder has a posterior, up to half as far again as its spread says instead.
        smallest_lr: Smallest LR size in pixels.
        largest_lr: Largest LR size in pixels; R / 2 if None.
        often: LR sizes that are trained more than others.
        often_share: How often one of them is drawn.
        sizes_per_batch: Number of LR sizes in one batch.
        gradient_clip: Largest norm of the gradient.
        ema_steps: Half-life of the moving average, in steps.
        val_lr: LR sizes that validation measures.
        val_passes: Passes that validation takes.
        compile: Compile the generator's synthesis; ignored where there is no compiler.
        export_to: Folder where the bundle is saved at the end, relative to the run's; None for nowhere.
        export_passes: Passes that this bundle takes by default.
        budget: Downscaling error that candidates may have, as a multiple of the best guesses', see `training.spread`;
            where the encoder has a posterior.
        seed: Determines every random choice together with the step.
    """

    def __init__(
        self,
        bundle: str = "bundles/celeba64",
        passes: int = 4,
        rank: int = 640,
        small_rank: int = 0,
        learning_rate: float = 1e-3,
        warmup_steps: int = 100,
        weight_lpips: float = 1.0,
        weight_means: float = 0.0,
        weight_parts: float = 0.0,
        candidates_lpips: float = 1.0,
        weight_moves: float = 0.1,
        spread: float = 0.3,
        smallest_lr: int = 4,
        largest_lr: int | None = None,
        often: tuple[int, ...] = (),
        often_share: float = 0.6,
        sizes_per_batch: int = 4,
        gradient_clip: float = 1.0,
        ema_steps: float = 200,
        val_lr: tuple[int, ...] = (16, 8),
        val_passes: int = 4,
        compile: bool = True,
        export_to: str | None = None,
        export_passes: int = 4,
        budget: float = 1.6,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        loaded = load_bundle(bundle)
        self.owner = Owner("bundle_hash", loaded.hash, str(bundle))
        self.encoder = _with_feedback(_with_additions(loaded.encoder, small_rank), rank, export_passes)
        self.feedback_ema = copy.deepcopy(self._trained).eval().requires_grad_(False)
        self.encoder.eval().requires_grad_(False)
        for parameter in self._parameters_of(self._trained):
            parameter.requires_grad_(True)
        # Held in tuples, so that they stay out of checkpoints and of `train()`: they only measure.
        self._generator: tuple[Generator] = (loaded.generator,)
        self._lpips = (LPIPS(),)
        self.octaves = int(math.log2(self.encoder.resolution)) - 1  # of LR sizes: about 4, about 8, …, about R px
        groups = 2 * passes * self.octaves
        self.feature_means = FeatureMeans(groups, self._lpips[0].width)
        self._parts = (FaceParts(),) if weight_parts else ()
        self.part_means = FeatureMeans(groups, sum(parts.width for parts in self._parts)) if weight_parts else None

    @property
    def _trained(self) -> Feedback:
        assert self.encoder.feedback is not None
        return self.encoder.feedback

    def _parameters_of(self, network: Feedback) -> list[torch.nn.Parameter]:
        """What is trained of a feedback network: all of it, or the additions alone."""
        return additions(network) if self.hparams["small_rank"] else list(network.parameters())

    # ---------------------------------------------------------------- set-up

    def setup(self, stage: str) -> None:
        """Puts the frozen networks where the training runs, and measures the coordinates.

        Raises:
            ValueError: If the faces have another size than the generator's.
        """
        faces = self.trainer.datamodule.hparams["resolution"]  # type: ignore[attr-defined]
        if faces != self.encoder.resolution:
            raise ValueError(f"Expected faces of {self.encoder.resolution} px as the generator draws, got {faces} px.")
        self.to(memory_format=torch.channels_last)
        device = self.trainer.strategy.root_device  # Lightning moves this module only after set-up
        for network in (*self._generator, *self._lpips, *self._parts):
            network.to(device)
        if stage == "fit" and self._parts:
            photos = self.trainer.datamodule.train_faces.images(SCALE_FACES)  # type: ignore[attr-defined]
            for parts in self._parts:
                parts.calibrate(photos.to(device))
        if stage == "fit" and not self.encoder.latents.directions.any():
            self._measure_coordinates()
        if stage == "fit" and self.hparams["compile"]:
            compile_if_possible(self._generator[0].synthesis, device)

    def _measure_coordinates(self) -> None:
        """Measures P on faces that the generator draws, as the encoder sees them."""
        encoder = copy.deepcopy(self.encoder).to(self.trainer.strategy.root_device)
        rank, seed = self.encoder.latents.rank, self.hparams["seed"]
        self.encoder.latents.set_curvature(measure_coordinates(self._generator[0], rank, seed, encoder))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; `training_step` sets its learning rate."""
        rate = self.hparams["learning_rate"]
        parameters = self._parameters_of(self._trained)
        return torch.optim.AdamW(parameters, rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)

    def _rate(self) -> float:
        h = self.hparams
        return h["learning_rate"] * warmup_cosine(self.global_step, self.trainer.max_steps, h["warmup_steps"])

    # ---------------------------------------------------------------- one batch

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """Several passes on one batch of faces, uint8 (B, 3, R, R), each with a step of the optimiser."""
        h = self.hparams
        rng = step_rng(h["seed"], self.global_step, self.global_rank, self.device)
        faces = faces_from_bytes(batch, rng)
        largest = h["largest_lr"] or self.encoder.resolution // 2
        sizes = random_sizes(h["sizes_per_batch"], h["smallest_lr"], largest, h["often"], h["often_share"], rng)
        with self._full_precision():  # LR faces lie on the 8-bit grid, which bfloat16 would blur
            groups = downscale_groups(faces, sizes)
        with torch.no_grad():
            ws, candidates = self._starts(groups, rng)
            images = self._generator[0].synthesis(ws).float()
            target = _Target(self._lpips[0].features(faces), [parts(faces) for parts in self._parts], candidates)
        optimiser = self.optimizers()
        for number in range(h["passes"]):
            moved = self._pass(groups, images, ws)  # (B, L, D)
            images = self._generator[0].synthesis(moved).float()
            loss = self._loss(groups, images, moved - ws, target, number)
            optimiser.zero_grad()  # type: ignore[union-attr]
            self.manual_backward(loss)
            # Not Lightning's clipping, which does not go with the fused optimiser.
            torch.nn.utils.clip_grad_norm_(self._parameters_of(self._trained), h["gradient_clip"])
            for group in optimiser.param_groups:  # type: ignore[union-attr]
                group["lr"] = self._rate()
            optimiser.step()  # type: ignore[union-attr]
            self._average()
            ws, images = moved.detach(), images.detach()

    def _starts(self, groups: list[LowResolution], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """The encoder's best guesses, half of them moved as its candidates are (B, L, D), and which ones (B,)."""
        encoder, sizes = self.encoder, lr_sizes_of(groups)
        canvas = torch.cat([encoder.on_canvas(group.faces) for group in groups])
        features = encoder.read(canvas, sizes)
        best = encoder.codes(features).float()
        noise = torch.randn(len(best), 1, encoder.noise_dim, device=rng.device, generator=rng)
        share, chosen = torch.rand(2, len(best), 1, 1, device=rng.device, generator=rng)
        moves = encoder.moves(features, best, sizes, noise)[:, 0].float()  # (B, 1 or L, D)
        if encoder.posterior is None:  # the spread is calibrated after this training
            spread = torch.full((len(best), encoder.num_ws), self.hparams["spread"], device=rng.device)
        else:
            spread = FURTHER * torch.cat(
                [encoder.spread_at(g.operator.lr_size).repeat(len(g.faces), 1) for g in groups]
            )
        return best + spread[:, :, None] * share * (chosen < 0.5) * moves, (chosen < 0.5).flatten()

    def _pass(self, groups: list[LowResolution], images: Tensor, ws: Tensor) -> Tensor:
        canvas = self._trained.canvas
        with self._full_precision():
            lr = torch.cat([on_canvas(group.faces, canvas) for group in groups])
            missing = [group.faces - group.operator(images[group.rows]) for group in groups]
            residual = torch.cat([on_canvas(part, canvas) for part in missing])
            shrunk = images if images.shape[3] == 2 * canvas else on_canvas(images, 2 * canvas)
        return self.encoder.correct_on_canvas(lr, residual, shrunk, lr_sizes_of(groups), ws)

    def _loss(self, groups: list[LowResolution], images: Tensor, move: Tensor, target: _Target, number: int) -> Tensor:
        h = self.hparams
        with self._full_precision():
            errors = torch.cat([downscaling_error(images[g.rows], g.faces, g.operator) for g in groups])
        features = self._lpips[0].features(images)
        group = self._mean_group(groups, target.candidates, number)
        share = torch.where(target.candidates, h["candidates_lpips"], 1.0)
        losses = {
            "error": (errors + FLOOR).log().mean(),
            "lpips": (share * self._lpips[0].distance(features, target.features)).mean(),
            "means": self.feature_means(features, target.features, group),
            "moves": (move / self.encoder.latents.sigma).square().mean(),
        }
        if self.part_means is not None:
            losses["parts"] = self.part_means([parts(images) for parts in self._parts], target.parts, group)
        self.log_dict({f"loss/{name}_{number + 1}": value.detach() for name, value in losses.items()})
        self.log(f"downscaling_error_{number + 1}", errors.detach().mean(), prog_bar=number == h["passes"] - 1)
        return losses.pop("error") + sum(h[f"weight_{name}"] * loss for name, loss in losses.items())

    def _mean_group(self, groups: list[LowResolution], candidates: Tensor, number: int) -> Tensor:
        """Which means of features each face belongs to (B,): by the pass, its octave of LR sizes, and its kind."""
        octave = (lr_sizes_of(groups).log2().round().long() - 2).clamp(0, self.octaves - 1)
        return 2 * (number * self.octaves + octave) + candidates.long()

    def _full_precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=False)

    @torch.no_grad()
    def _average(self) -> None:
        """Updates the averaged network; early in a run the average is short."""
        halflife = min(self.hparams["ema_steps"], 0.1 * self.global_step + 1)
        update = get_ema_multi_avg_fn(0.5 ** (1 / halflife))
        update(self._parameters_of(self.feedback_ema), self._parameters_of(self._trained), None)

    # ---------------------------------------------------------------- validation

    def averaged(self) -> EncoderBase:
        """The encoder with the averaged feedback network, a view of both."""
        encoder = copy.copy(self.encoder)
        encoder._modules = {**self.encoder._modules, "feedback": self.feedback_ema}
        return encoder

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Measures every pass of the averaged network on faces uint8 (B, 3, R, R), without flips."""
        faces, lpips, encoder = faces_from_bytes(batch), self._lpips[0], self.averaged()
        for size in self.hparams["val_lr"]:
            with self._full_precision():
                operator = Downscale(size)
                lr = operator(faces)
            ws = encoder(lr)[:, 0].float()
            shown: list[Tensor] = []
            for number in range(self.hparams["val_passes"] + 1):
                if number > 0:
                    ws = encoder.correct(lr, shown[-1], ws).float()
                with self._full_precision():
                    shown.append(self._generator[0].synthesis(ws).clamp(-1, 1))
                    errors = downscaling_error(shown[-1], lr, operator)
                scores = {"downscaling_error": errors, "within": (errors <= EPSILON).float()}
                scores |= {"lpips": lpips(shown[-1], faces)}
                named = {f"val/{name}_{size}_{number}": value.mean() for name, value in scores.items()}
                self.log_dict(named, batch_size=len(faces), sync_dist=True)
            if batch_idx == 0 and isinstance(self.logger, TensorBoardLogger):
                rows = [torch.nn.functional.interpolate(lr[:8], faces.shape[3], mode="nearest")]
                grid = torch.cat([*rows, *(images[:8] for images in shown), faces[:8]]).clamp(-1, 1) / 2 + 0.5
                self.logger.experiment.add_image(f"passes_{size}", make_grid(grid.float(), nrow=8), self.global_step)

    def on_fit_end(self) -> None:
        """Saves the bundle with the averaged network; where there is a posterior, calibrates anew how far it goes."""
        folder = export_folder(self.trainer, self.hparams["export_to"])
        if folder is None:
            return
        encoder = self.averaged().float().cpu()
        loaded = load_bundle(self.hparams["bundle"])
        self.owner.check_unchanged(loaded.hash)
        if encoder.posterior is not None:
            photos = self.trainer.datamodule.train_faces  # type: ignore[attr-defined]
            # Faces that take no additions are none of their business.
            below = NO_ADDITIONS * encoder.resolution if self.hparams["small_rank"] else math.inf
            faces, budget = photos.images(CALIBRATION_FACES), self.hparams["budget"]
            calibrate_spread(encoder, loaded.generator, faces, budget, below=below)
        save_bundle(folder, loaded.generator, encoder, notes_of(loaded.info))


def _with_additions(encoder: EncoderBase, small_rank: int) -> EncoderBase:
    """Gives an encoder whose feedback has additions of a rank, as they are or untrained; of rank 0, without any.

    Raises:
        ValueError: If there is no network of ours to add to, or it has additions of another rank.
    """
    present = 0 if encoder.feedback is None else encoder.feedback.small_rank
    variant = encoder.config.get("variant", "base")
    if small_rank and (encoder.feedback is None or variant != "base"):
        found = "one without feedback; train that first, with small_rank 0" if variant == "base" else repr(variant)
        raise ValueError(f"Expected our own encoder with feedback for additions to it, got {found}.")
    if small_rank and present not in (0, small_rank):
        raise ValueError(
            f"Expected feedback without additions, or with some of rank {small_rank}, got some of rank {present}; "
            "ask for that small_rank."
        )
    if present == small_rank:
        return encoder
    made = make_encoder({**encoder.config, "feedback_small_rank": small_rank})
    missing, unexpected = made.load_state_dict(encoder.state_dict(), strict=False)
    assert all(".narrow." in name or ".wide." in name for name in [*missing, *unexpected])
    return made


def _with_feedback(encoder: EncoderBase, rank: int, passes: int) -> EncoderBase:
    """Gives an encoder with feedback, a copy with an untrained network if it had none, and notes its passes.

    Where the encoder's heads speak in coordinates of their own rank, the feedback speaks in the same.
    """
    if encoder.feedback is not None:
        encoder.config["feedback"] = passes
        return encoder
    made = make_encoder({"rank": rank, **encoder.config, "feedback": passes})
    missing, unexpected = made.load_state_dict(encoder.state_dict(), strict=False)
    ours = ("feedback.", "latents.sigma", "latents.directions", "latents.gains")
    assert not unexpected and all(name.startswith(ours) for name in missing)
    if not encoder.latents.rank:
        from search.refine import spread_of_w  # late: it imports this package's models

        made.latents.sigma.fill_(spread_of_w(encoder.latents))
    return made
