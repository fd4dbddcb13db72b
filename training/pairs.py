"""Pairs that the generator makes: faces whose true code is known, as the encoder sees them.

z → w → face → LR face of a random size → the encoder's features. Neither photos nor gradients are needed, so the pairs
are made once, and every distribution over codes is fitted to them in minutes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning import LightningDataModule
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from data.datamodule import ResumableSampler, progress
from data.report import complete_file
from models.bundle import Bundle, load_bundle
from models.bundle_info import GENERATOR
from models.checkpoints import write_safetensors
from training.batches import downscale_groups, lr_sizes_of, random_sizes

AT_ONCE, SIZES_AT_ONCE = 64, 4


class Pairs(NamedTuple):
    """What the encoder sees, and the truth.

    Attributes:
        context: Features of the encoder (N, C), float16.
        size: LR sizes in pixels (N,).
        u: Whitened codes (N, D), see `models.posterior`.
    """

    context: Tensor
    size: Tensor
    u: Tensor


@torch.inference_mode()
def make_pairs(
    bundle: Bundle,
    count: int,
    seed: int,
    smallest: int = 4,
    often: tuple[int, ...] = (),
    often_share: float = 0.5,
) -> Pairs:
    """Makes pairs.

    Args:
        bundle: Generator and encoder.
        count: How many.
        seed: Of codes and sizes.
        smallest: Smallest LR size in pixels; the largest is R / 2.
        often: LR sizes that are drawn more than others.
        often_share: How often one of them is drawn.

    Returns:
        The pairs, on the CPU.
    """
    encoder, generator, device = bundle.encoder, bundle.generator, bundle.device
    rng = torch.Generator().manual_seed(seed)
    z = torch.from_numpy(np.random.default_rng((seed, count)).standard_normal((count, generator.z_dim), np.float32))
    parts = []
    for some in tqdm(z.split(AT_ONCE), desc="pairs", unit="batch", disable=None):
        w = generator.mapping(some.to(device))  # (b, L, D)
        images = generator.synthesis(w).clamp(-1, 1)
        sizes = random_sizes(SIZES_AT_ONCE, smallest, bundle.resolution // 2, often, often_share, rng)
        groups = downscale_groups(images, sizes)
        size = lr_sizes_of(groups)
        features = encoder.read(torch.cat([encoder.on_canvas(group.faces) for group in groups]), size)
        u = encoder.latents.whiten(w[:, 0])
        parts.append((encoder.context(features).half().cpu(), size.cpu(), u.cpu()))
    return Pairs(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _what_sees(bundle: Bundle) -> str:
    """A hash of all that the pairs depend on: not of feedback, or of a distribution that was fitted to them."""
    digest = hashlib.sha256(bundle.info["parts"][GENERATOR].encode())
    for name, tensor in sorted(bundle.encoder.state_dict().items()):
        if name.startswith(("backbone.", "lateral.", "heads.", "latents.mean", "latents.factor")):
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


class PairData(LightningDataModule):
    """Pairs for training and, from other random numbers, for validation.

    Args:
        bundle: Folder with the generator and the encoder.
        count: Pairs for training.
        val_count: Pairs for validation.
        batch_size: Pairs per step.
        smallest_lr: Smallest LR size in pixels.
        often: LR sizes that are drawn more than others.
        often_share: How often one of them is drawn.
        cache: File that keeps the pairs for later runs; None for none. It is made anew for another bundle.
        seed: Determines the pairs and their order.
    """

    def __init__(
        self,
        bundle: str = "bundles/celeba64",
        count: int = 40_000,
        val_count: int = 2_000,
        batch_size: int = 256,
        smallest_lr: int = 4,
        often: tuple[int, ...] = (8, 16),
        often_share: float = 0.5,
        cache: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.pairs: dict[str, Pairs] = {}

    def setup(self, stage: str) -> None:
        """Makes the pairs, or reads them from the cache."""
        h = self.hparams
        wanted = {"train": h.count, "val": h.val_count}
        if self.pairs:
            return
        loaded = load_bundle(h.bundle)
        decisive = h.count, h.val_count, h.smallest_lr, tuple(h.often), h.often_share, h.seed
        own = repr((_what_sees(loaded), decisive))
        cache = None if h.cache is None else Path(h.cache)
        if cache is not None and cache.is_file():
            tensors = load_file(cache)
            if bytes(tensors.pop("made_from").tolist()).decode() == own:
                self.pairs = {n: Pairs(*(tensors[f"{n}.{field}"] for field in Pairs._fields)) for n in wanted}
                return
        for seed, (name, count) in enumerate(wanted.items()):
            self.pairs[name] = make_pairs(
                loaded, count, 2 * h.seed + seed, h.smallest_lr, tuple(h.often), h.often_share
            )
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            tensors = {
                f"{n}.{f}": t.contiguous() for n, pairs in self.pairs.items() for f, t in pairs._asdict().items()
            }
            tensors["made_from"] = torch.tensor(list(own.encode()), dtype=torch.uint8)
            with complete_file(cache) as partial:
                write_safetensors(tensors, partial, {})

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Gives shuffled batches (context, size, u), from where an interrupted epoch stopped."""
        h, trainer = self.hparams, self.trainer
        assert trainer is not None
        epoch, seen = progress(trainer)
        dataset = TensorDataset(*self.pairs["train"])
        sampler = ResumableSampler(dataset, h.seed, trainer.global_rank, trainer.world_size, skip=seen * h.batch_size)
        sampler.set_epoch(epoch)
        return DataLoader(dataset, h.batch_size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Gives the validation pairs in order."""
        return DataLoader(TensorDataset(*self.pairs["val"]), self.hparams["batch_size"])
