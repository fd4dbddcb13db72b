"""Photos with faces in them: each is found, upsampled in a folder of its own, and put back if that is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cli.doubts import place_doubts
from cli.inputs import InputFace, Item
from cli.overview import FaceResult
from data.console import format_error, print_error
from data.face_finder import DetectedFace, FaceFinder
from data.ffhq_crop import Square, cut_out, ffhq_square
from data.files import owned_folder
from data.image_io import from_uint8, to_uint8
from data.paste_back import Patch, paste_back, read_photo, write_photo
from data.report import FACES, write_json
from data.resize import resize
from pipeline.about import About

ALIGN = ("auto", "always", "never")
FORMAT = "amortized-pulse/faces/1"
PASTED = "photo.png"
MAX_UPSCALE = 16
SMALLEST_FACE = 12  # px from eyebrows to chin, in a square of about 17 px; larger ones in photos of more than
SEARCHED_PIXELS = 6_000_000  # so that these take no longer


def add_photo_options(group: argparse._ArgumentGroup) -> None:
    """Adds --align, --paste-back, --paste-sample and --upscale to a group of options."""
    add = group.add_argument
    add(
        "--align",
        choices=ALIGN,
        default="auto",
        help="where to search for faces: auto in all but squares that are small enough to be the face itself, always, "
        "or never, which takes the centre of every picture (default: auto)",
    )
    add("--paste-back", action="store_true", help=f"put the faces back into the photo, as {PASTED}")
    add("--paste-sample", metavar="N", type=int, default=1, help="which sample is put back (default: 1)")
    add("--upscale", metavar="N", type=int, default=1, help="how much larger that photo becomes (default: 1)")


def check_photo_options(args: argparse.Namespace) -> None:
    """Checks the options that `add_photo_options` added; `args.sampling` is there.

    Raises:
        ValueError: If one cannot be followed, in words for the command line.
    """
    kept = args.sampling.kept
    if not 1 <= args.paste_sample <= kept:
        raise ValueError(f"--paste-sample: expected 1 to {kept}, the samples per face, got {args.paste_sample}")
    if not 1 <= args.upscale <= MAX_UPSCALE:
        raise ValueError(f"--upscale: expected 1 to {MAX_UPSCALE}, got {args.upscale}")
    for name, unused in (("paste_sample", 1), ("upscale", 1)):
        if getattr(args, name) != unused and not args.paste_back:
            raise ValueError(f"--{name.replace('_', '-')}: needs --paste-back")
    if args.paste_back and args.archive == "parquet":
        raise ValueError("--paste-back: a Parquet table has no place for photos; use --archive tar, or leave it out")
    if args.paste_back and args.align == "never":
        raise ValueError("--paste-back: needs faces that were searched for; leave out --align never")


@dataclass(frozen=True)
class FaceInPhoto:
    """A face that was found.

    Attributes:
        name: Of its folder.
        square: Its square in the photo.
        confidence: Its probability in [0, 1].
        lr: What is upsampled; None if it is passed through.
        remark: Why it is passed through.
        doubts: Why its samples should not be believed, as far as its place in the photo tells.
    """

    name: str
    square: Square
    confidence: float
    lr: InputFace | None
    remark: str = ""
    doubts: tuple[str, ...] = ()


class PhotoReader:
    """Finds the faces of photos.

    Args:
        about: The bundle: R, and the sizes that it takes.
        align: One of ALIGN.
        downscale: Size in pixels that each face is downscaled to; None for its own size.
    """

    def __init__(self, about: About, align: str, downscale: int | None) -> None:
        self.about, self.align, self.downscale = about, align, downscale
        self._finder: FaceFinder | None = None

    def faces(self, image: np.ndarray) -> list[FaceInPhoto] | None:
        """Finds the faces of a photo.

        Args:
            image: The photo (3, H, W) in [-1, 1].

        Returns:
            Its faces, by falling size; empty if there are none, None if the picture is to be taken for a face.

        Raises:
            ValueError: If a face has to be found and there is none.
        """
        if self._is_face(*image.shape[:0:-1]):
            return None
        picture = Image.fromarray(np.ascontiguousarray(to_uint8(image).transpose(1, 2, 0)))
        if self._finder is None:
            try:
                self._finder = self._load()
            except ImportError as error:
                if self.align == "always":
                    raise ValueError(format_error(error)) from error
                self.align = "never"
                print_error(f"note: faces are not searched for, every picture's centre is taken for one: {error}")
                return None
        smallest = round(SMALLEST_FACE * max(1, picture.width * picture.height / SEARCHED_PIXELS) ** 0.5)
        found = [(ffhq_square(face.points), face) for face in self._finder.detect(picture, smallest)]
        if not found and self.align == "always":
            raise ValueError("no face was found in any of four turns; --align never takes the picture's centre for one")
        found.sort(key=lambda pair: -pair[0].side)
        return [self._face(f"face-{i}", picture, *pair) for i, pair in enumerate(found, start=1)]

    def _load(self) -> FaceFinder:
        from models.device import choose_device  # here, since the runtime onnx may be without torch

        return FaceFinder(device=str(choose_device("auto" if self.about.device == "cuda" else "cpu")))

    def _is_face(self, width: int, height: int) -> bool:
        smallest, largest = self.about.lr_sizes
        small = width == height and smallest <= width <= largest
        return self.align == "never" or (self.align == "auto" and small)

    def _face(self, name: str, picture: Image.Image, square: Square, face: DetectedFace) -> FaceInPhoto:
        """Cuts a face out at its own size, or says why not."""
        (smallest, largest), side = self.about.lr_sizes, int(square.side + 1e-6)
        least = self.downscale or smallest
        size, remark = min(side, largest), ""
        if side < least:
            remark = f"has {side} px, less than {least} px"
        elif self.downscale is None and side > self.about.resolution:
            remark = f"has {side} px, more than the {self.about.resolution} px that this bundle makes (--downscale PX)"
        if remark:
            return FaceInPhoto(name, square, face.confidence, None, remark)
        pixels = from_uint8(np.asarray(cut_out(picture, square, side if self.downscale else size)).transpose(2, 0, 1))
        if self.downscale is not None:
            pixels = from_uint8(to_uint8(resize(pixels, self.downscale)))
        doubts = place_doubts(face, picture.size, pixels.shape[-1] / square.side)
        return FaceInPhoto(name, square, face.confidence, InputFace(pixels, picture.size), doubts=tuple(doubts))


class PhotoFolder:
    """The folder of a photo while it is being made; it appears once all faces are in it.

    Args:
        item: The photo.
        folder: The folder to be.
        key: Hash of all that it is made of.
        faces: Its faces.
        args: The options.
    """

    def __init__(
        self, item: Item, folder: Path, key: str, faces: Sequence[FaceInPhoto], args: argparse.Namespace
    ) -> None:
        self.item, self.folder, self.key, self.faces, self.args = item, folder, key, faces, args
        self.path = item.picture
        self._stack = ExitStack()
        self.partial = self._stack.enter_context(owned_folder(folder, args.overwrite, FACES, job=key))

    def __enter__(self) -> None:
        """Begins the last steps."""

    def __exit__(self, *error: Any) -> None:
        """Lets the folder appear, unless there was an error."""
        self._stack.__exit__(*error)

    def finish(self, made: Mapping[str, FaceResult]) -> None:
        """Puts the faces back and lists them.

        Args:
            made: What each face became, by its name.
        """
        if self.args.paste_back:
            self._paste(made)
        rows = [self._row(face, made.get(face.name)) for face in self.faces]
        write_json({"format": FORMAT, "input": self.path.name, "faces": rows}, self.partial / FACES)

    def summary(self, archive: Path | None) -> list[str]:
        """Says in lines what is to be told of the photo as a whole, once it is finished, and put into an archive."""
        lines = [
            f"{self.path.name}: {face.name} is left as it is: it {face.remark}" for face in self.faces if face.remark
        ]
        if self.args.paste_back:
            hint = "; --upscale 2 makes room for what the samples add" if self.args.upscale == 1 else ""
            lines.append(f"{self.path.name}: faces put back{hint} -> {archive or self.folder / PASTED}")
        return lines

    def _paste(self, made: Mapping[str, FaceResult]) -> None:
        path = self.path
        photo = read_photo(path if isinstance(path, Path) else path.open())
        number = self.args.paste_sample - 1
        if photo.converted:
            print_error(f"note: {self.path}: {PASTED} is in sRGB with 8 bit, since PNG cannot hold {photo.converted}")
        pairs = [(face.square, made[face.name].images) for face in self.faces if face.name in made]
        patches = [Patch(square, np.asarray(images[number])) for square, images in pairs]
        write_photo(paste_back(photo, patches, self.args.upscale), self.partial / PASTED)

    def _row(self, face: FaceInPhoto, made: FaceResult | None) -> dict[str, Any]:
        """Describes a face for faces.json."""
        right = face.square.right
        return {
            "folder": face.name if made else None,
            "square": face.square.corners.round(2).tolist(),
            "angle": round(float(np.degrees(np.arctan2(right[1], right[0]))), 1),
            "confidence": round(face.confidence, 4),
            "lr_size": None if face.lr is None else face.lr.image.shape[-1],
            **({"passed_through": face.remark} if face.remark else {}),
            "doubts": list(made.doubts if made else face.doubts),
        }
