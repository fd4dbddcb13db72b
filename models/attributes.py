"""The attribute classifier: which of CelebA's forty attributes a face shows, as calibrated logits.

    classifier = load_attributes("bundles/celeba64/attributes.safetensors")
    logits = classifier(images)                   # (B, 3, R, R) in [-1, 1] -> (B, 40)
    smiling = logits[:, classifier.names.index("Smiling")].sigmoid()

It scores generated faces, to find and to measure editing directions. It is not made to judge real people: its labels
are the opinions of CelebA's annotators, some of them about what no picture can show.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from data.operator import Downscale, upscale_bicubic
from models.checkpoints import to_half, write_safetensors

FORMAT = "amortized-pulse/attributes/1"
MAX_FACES = 256  # at once in `score`


class AttributeClassifier(nn.Module):
    """A timm backbone with one logit per attribute.

    Args:
        names: Of the attributes.
        resolution: Size in pixels at which it looks at faces.
        backbone: A timm model.
        options: Further arguments of `timm.create_model`, such as the channels of a ResNet.
        stem_pool: Keep the pooling after a ResNet's first convolution; without it small faces keep their detail.

    Raises:
        ValueError: If timm has no such backbone.
    """

    log_weights: Tensor
    rates: Tensor

    def __init__(
        self,
        names: Sequence[str],
        resolution: int = 64,
        backbone: str = "resnet18",
        options: dict[str, Any] | None = None,
        stem_pool: bool = True,
    ) -> None:
        super().__init__()
        import timm  # late: it takes longer to import than to score a face

        if ":" in backbone or "/" in backbone or not timm.is_model(backbone):  # timm looks for those on the network
            raise ValueError(f"Expected a backbone that timm {timm.__version__} has by name, got {backbone!r}.")
        self.names = tuple(names)
        self.resolution = resolution
        self.config = {
            "names": list(names),
            "resolution": resolution,
            "backbone": backbone,
            "options": dict(options or {}),
            "stem_pool": stem_pool,
        }
        self.network = timm.create_model(backbone, pretrained=False, num_classes=len(self.names), **(options or {}))
        if not stem_pool:
            self.network.maxpool = nn.Identity()
        self.register_buffer("log_weights", torch.zeros(len(self.names)))
        self.register_buffer("rates", torch.full((len(self.names),), 0.5))

    def forward(self, images: Tensor) -> Tensor:
        """Scores faces (B, 3, R, R) of any size in [-1, 1], FFHQ framing: calibrated logits (B, A), see `rates`."""
        return self.weighted(images) - self.log_weights

    def weighted(self, images: Tensor) -> Tensor:
        """Scores faces (B, 3, R, R) as the weighted loss sees it: calibrated logits plus the log of the weights."""
        return self.network(self._resized(images).contiguous(memory_format=torch.channels_last)).float()

    def _resized(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise ValueError(f"Expected square colour faces (B, 3, R, R) in [-1, 1], got {tuple(images.shape)}.")
        if images.shape[-1] == self.resolution:
            return images
        with torch.autocast(images.device.type, enabled=False):
            larger = images.shape[-1] > self.resolution
            return Downscale(self.resolution)(images) if larger else upscale_bicubic(images, self.resolution)

    def balanced(self, logits: Tensor) -> Tensor:
        """Turns calibrated logits (…, A) into those for faces of which half have each attribute, l − logit(r)."""
        return logits - self.rates.logit()

    @torch.inference_mode()
    def score(self, images: Tensor) -> Tensor:
        """Scores many faces (N, 3, R, R) in batches, without gradients; calibrated logits (N, A)."""
        return torch.cat([self(part) for part in images.split(MAX_FACES)])


def save_attributes(classifier: AttributeClassifier, path: str | Path, notes: dict[str, str] | None = None) -> None:
    """Writes a classifier in float16, with notes such as licence and training data in the file's header.

    Raises:
        ValueError: If a tensor is not finite or too large for float16.
    """
    path = Path(path)
    tensors = to_half(classifier.state_dict())
    for name in ("log_weights", "rates"):
        tensors[name] = getattr(classifier, name).detach().float().cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(tensors, path, {**(notes or {}), "format": FORMAT, "config": json.dumps(classifier.config)})


def load_attributes(path: str | Path, device: torch.device | str = "cpu") -> AttributeClassifier:
    """Reads what `save_attributes` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected an attribute classifier at {path}, found no such file; "
            "python train.py fit --config configs/attributes_64.yaml makes one."
        )
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            if notes.get("format") != FORMAT:
                raise ValueError(f"{path}: expected an attribute classifier ({FORMAT}), got {notes.get('format')!r}.")
            state = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error}); copy it again.") from error
    try:
        classifier = AttributeClassifier(**json.loads(notes["config"]))
        classifier.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in state.items()})
    except Exception as error:  # timm raises whatever it stumbles over
        raise ValueError(f"{path}: its header and its tensors do not fit ({error}); copy it again.") from error
    return classifier.to(device).eval().requires_grad_(False)
