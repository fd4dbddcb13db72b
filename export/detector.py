"""MTCNN as one ONNX graph of fixed sizes: the face detector of the page.

    planes (3, SIDE, SIDE) -> scores (FACES,), squares (FACES, 4)

The cascade of Zhang et al. 2016 with the weights that come with facenet-pytorch (MIT licence). Each stage keeps a
fixed number of candidates, and a candidate is dropped where any better one overlaps it, so that no size depends on the
picture. The squares are those of `data.ffhq_crop.ffhq_square`.
"""

from __future__ import annotations

import onnx
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou, roi_align

from data.ffhq_crop import DOWNWARDS, EYES, MOUTHS
from export.graph import resize_matrix
from export.onnx import trace
from export.quantise import FP16, store

SIDE = 480  # px; a smaller picture is padded, a larger one downscaled
SMALLEST = 24  # px of the smallest face, eyebrows to chin
CELL, STRIDE = 12, 2  # of P-Net: a face of 12 px every 2 px
SHRINK = 0.709  # from scale to scale: half the area
CANDIDATES, REFINED, FACES = 128, 48, 16
LEAST_P, LEAST_R = 0.6, 0.7  # probabilities that go on to the next network


def _sizes() -> list[int]:
    sizes, size = [], SIDE * CELL / SMALLEST
    while size >= CELL:
        sizes.append(int(size))
        size *= SHRINK
    return sizes


class DetectorGraph(nn.Module):
    """Finds the faces of one picture."""

    def __init__(self) -> None:
        from facenet_pytorch.models.mtcnn import ONet, PNet, RNet

        super().__init__()
        self.propose, self.refine, self.locate = PNet().eval(), RNet().eval(), ONet().eval()

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """Finds faces.

        Args:
            planes: The picture (3, SIDE, SIDE) in [-1, 1].

        Returns:
            Probabilities (FACES,), 0 for none, falling; squares (FACES, 4): centre, and the vector from there to the
            middle of the right side, x before y, in pixels.
        """
        image = planes[None] * (127.5 / 128)
        found = [self._propose(image, size) for size in _sizes()]
        boxes, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
        boxes, scores = _best(boxes, scores, CANDIDATES, 0.7)
        shifts, probabilities = self.refine(_cut(image, boxes, 24))
        scores = torch.where(scores > 0, _above(probabilities[:, 1], LEAST_R), 0)
        boxes, scores = _best(_squared(_shifted(boxes, shifts)), scores, REFINED, 0.7)
        _, points, probabilities = self.locate(_cut(image, boxes, 48))
        scores, order = torch.where(scores > 0, probabilities[:, 1], 0).topk(FACES)
        boxes, points = boxes[order], points[order].unflatten(1, (2, 5))  # (n, xy, 5)
        scores = scores * _unrivalled(boxes, 0.3)
        points = boxes[:, :2, None] + points * (boxes[:, 2:] - boxes[:, :2])[:, :, None]
        return scores, _ffhq_squares(points)

    def _propose(self, image: Tensor, size: int) -> tuple[Tensor, Tensor]:
        down = resize_matrix(SIDE, size)
        shifts, probabilities = self.propose(down @ image @ down.T)
        cells = probabilities.shape[3]
        scores, order = _above(probabilities[0, 1], LEAST_P).flatten().topk(min(CANDIDATES, cells * cells))
        corner = torch.stack([order % cells, order // cells], dim=1) * STRIDE  # x, y
        boxes = torch.cat([corner, corner + CELL], dim=1) * (SIDE / size)
        boxes, shifts = boxes.float(), shifts[0].flatten(1).T[order]
        boxes, scores = _shifted(boxes, shifts), scores * _unrivalled(boxes, 0.5)
        return _squared(boxes), scores


def _above(scores: Tensor, least: float) -> Tensor:
    return torch.where(scores >= least, scores, 0.0)


def _unrivalled(boxes: Tensor, overlap: float) -> Tensor:
    """Says of boxes (n, 4) by falling score which ones no better one overlaps: 0 or 1 (n,)."""
    n = boxes.shape[0]
    rivals = (box_iou(boxes, boxes) > overlap) & torch.ones(n, n, dtype=torch.bool).tril(-1)
    return (~rivals.any(dim=1)).float()


def _best(boxes: Tensor, scores: Tensor, count: int, overlap: float) -> tuple[Tensor, Tensor]:
    """Gives the best boxes (count, 4) with their scores, 0 for those that a better one overlaps."""
    scores, order = scores.topk(scores.shape[0])
    boxes = boxes[order]
    scores, order = (scores * _unrivalled(boxes, overlap)).topk(count)
    return boxes[order], scores


def _shifted(boxes: Tensor, shifts: Tensor) -> Tensor:
    """Moves the sides of boxes (n, 4) by shares (n, 4) of their sizes."""
    return boxes + shifts * (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)


def _squared(boxes: Tensor) -> Tensor:
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).amax(dim=1, keepdim=True) / 2
    return torch.cat([centre - half, centre + half], dim=1)


def _cut(image: Tensor, boxes: Tensor, size: int) -> Tensor:
    return roi_align(image, [boxes.clamp(0, SIDE)], (size, size), sampling_ratio=4, aligned=True)


def _ffhq_squares(points: Tensor) -> Tensor:
    """Computes `data.ffhq_crop.ffhq_square` of points (n, xy, 5); centres and right vectors (n, 4)."""
    eye_left, eye_right, _, mouth_left, mouth_right = points.unbind(dim=2)
    eyes = (eye_left + eye_right) / 2
    e, m = eye_right - eye_left, (mouth_left + mouth_right) / 2 - eyes
    direction = e + torch.stack([m[:, 1], -m[:, 0]], dim=1)
    half = torch.maximum(EYES * _length(e), MOUTHS * _length(m))
    return torch.cat([eyes + DOWNWARDS * m, direction / _length(direction).clamp(min=1e-6) * half], dim=1)


def _length(vectors: Tensor) -> Tensor:
    return vectors.square().sum(dim=1, keepdim=True).sqrt()


def detector_model() -> onnx.ModelProto:
    """Traces `DetectorGraph` as an ONNX model of about a megabyte."""
    model = trace(
        DetectorGraph(), "detector", {"planes": torch.zeros(3, SIDE, SIDE)}, {"planes": {}}, ["scores", "squares"]
    )
    model.doc_string = f"MTCNN: faces of a picture of {SIDE} px in [-1, 1], framed as in FFHQ."
    return store(model, FP16)
