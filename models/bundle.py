"""The bundle: a folder with all that turns a low-resolution face into faces, whose parts are known to fit together.

    bundle.json            name, resolution, LR sizes, licence, training data, encoder settings, sha256 of each part
    generator.safetensors  float16
    encoder.safetensors    float16, without its latent statistics
    latents.safetensors    the encoder's `latents`: where the generator's codes lie, in float32, their directions in
                           float16; and a flow over them in float16, if one was added, see `models.flow`

The encoder and the statistics mean nothing to another generator, so both name the generator's sha256 in their headers,
and are refused next to another one.
"""

from __future__ import annotations

import inspect
import json
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.files import atomic_folder
from models.bundle_info import (
    DEFAULT_BUNDLE,
    ENCODER,
    FORMAT,
    GENERATOR,
    INFO,
    LATENTS,
    PARTS,
    check_encoder,
    check_info,
    read_info,
)
from models.checkpoints import load_generator, save_generator, sha256_of, to_half, write_safetensors
from models.device import faces_at_once
from models.encoder_base import EncoderBase, Encoding, face_noise
from models.generator import Generator, SynthesisNetwork

FLOW_PREFIX = "flow."  # of the flow's tensors in latents.safetensors
PRECISIONS = ("float32", "bf16")
_LATENTS_PREFIX = "latents."


@dataclass(frozen=True)
class Bundle:
    """A generator with the encoder made for it.

    Attributes:
        name: Short name, such as "celeba64".
        resolution: Size R of the faces in pixels.
        lr_sizes: Smallest and largest low-resolution size in pixels.
        info: The content of bundle.json.
        hash: The sha256 of bundle.json, which holds those of all parts: it identifies the whole bundle.
        generator: The generator, in eval mode.
        encoder: The encoder, in eval mode.
        device: Where both are.
        precision: "float32", or "bf16" for an encoder and searches that compute in bfloat16 where that is faster; what
            is handed out is synthesized in float32 all the same.
        latents_path: latents.safetensors, from which the flow is read when it is asked for; None for a bundle that is
            in no folder.

    Example:
        >>> bundle = load_bundle(DEFAULT_BUNDLE)
        >>> encoding = bundle.encode(lr, k=4)  # lr (B, 3, s, s) in [-1, 1] -> codes (B, 4, L, D) and details
        >>> faces = bundle.generate(encoding)  # (B, 4, 3, R, R), before the projection onto lr
    """

    name: str
    resolution: int
    lr_sizes: tuple[int, int]
    info: dict[str, Any] = field(repr=False)
    hash: str
    generator: Generator = field(repr=False)
    encoder: EncoderBase = field(repr=False)
    device: torch.device
    precision: str = "float32"
    latents_path: Path | None = field(default=None, repr=False)

    @torch.inference_mode()
    def encode(self, lr: Tensor, k: int = 1, seed: int = 0, sigma: Tensor | None = None) -> Encoding:
        """Encodes low-resolution faces, k times each.

        Args:
            lr: Low-resolution faces (B, 3, s, s) in [-1, 1], s within `lr_sizes`.
            k: Encodings per face, at least 1; the first is the point estimate, the others are samples.
            seed: Of the samples; together with the face it determines them.
            sigma: Standard deviation of the noise in the faces, in grey levels (B,); 0 if None.

        Returns:
            Codes and details, float32 on the bundle's device.

        Raises:
            ValueError: If the pictures are not of this form or size, k is below 1, or what comes out is not finite.
        """
        self.check_faces(lr)
        if k < 1:
            raise ValueError(f"Expected at least 1 sample per face, got k = {k}.")
        noise = face_noise(lr, k, self.encoder.noise_dim, seed).to(self.device)
        sigma = None if sigma is None else sigma.to(self.device, torch.float32)
        with self._at_precision():
            encoding = self.encoder(lr.to(self.device, torch.float32), noise, sigma)
        self._check_weights("encoder", encoding.ws)
        return Encoding(encoding.ws.float(), {size: d.float() for size, d in encoding.details.items()})

    def check_faces(self, lr: Tensor) -> None:
        """Raises ValueError for what is no batch of low-resolution faces of this bundle."""
        smallest, largest = self.lr_sizes
        if lr.ndim != 4 or lr.shape[1] != 3 or lr.shape[2] != lr.shape[3] or not lr.is_floating_point():
            raise ValueError(
                f"Expected floating-point faces (B, 3, s, s) in [-1, 1], got {lr.dtype} {tuple(lr.shape)}; "
                "read them with data.image_io.read_image and crop with data.image_io.centre_square."
            )
        if not smallest <= lr.shape[-1] <= largest:
            raise ValueError(
                f"Expected faces of {smallest} to {largest} px for the bundle {self.name!r}, got {lr.shape[-1]} px; "
                "shrink larger ones with data.operator.Downscale."
            )
        if not lr.isfinite().all():
            raise ValueError("Expected faces in [-1, 1], got NaN or infinite values; look at where they were made.")

    def noise_ratio(self, sigma: Tensor) -> Tensor | None:
        """Gives σ²/τ² of `data.operator.trusted_part` for noise in grey levels (B,); None where there is none."""
        if not sigma.any():
            return None
        return self.encoder.noise_ratio(sigma.to(self.device))

    @property
    def search_synthesis(self) -> SynthesisNetwork:
        """The generator's synthesis network, as searches use it: at the bundle's precision."""
        synthesis = self.generator.synthesis
        return synthesis.in_bfloat16() if self.precision == "bf16" else synthesis

    def _at_precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @torch.inference_mode()
    def generate(self, encoding: Encoding | Tensor) -> Tensor:
        """Synthesizes the faces of encodings, with the generator's stored noise maps.

        Args:
            encoding: k encodings of each face, or codes alone (B, L, D) or (B, k, L, D).

        Returns:
            Faces (B, k, 3, R, R), or (B, 3, R, R) for codes (B, L, D); about [-1, 1] but not clamped.

        Raises:
            ValueError: If the codes do not have such a shape, or they or the faces are not finite.
        """
        ws, details = encoding if isinstance(encoding, Encoding) else (encoding, {})
        wanted = (self.generator.num_ws, self.generator.w_dim)
        if ws.ndim not in (3, 4) or ws.shape[-2:] != wanted:
            raise ValueError(f"Expected codes (B, {wanted[0]}, {wanted[1]}), or (B, k, …), got {tuple(ws.shape)}.")
        if not ws.isfinite().all():
            raise ValueError("Expected finite codes, got NaN or infinite values; look at where they were made.")
        rows = {size: d.to(self.device).flatten(0, 1) for size, d in details.items()}
        flat = ws.to(self.device, torch.float32).flatten(0, -3)  # (N, L, D)
        at_once = faces_at_once(self.generator)
        parts = [
            self.generator.synthesis(
                flat[i : i + at_once], details={size: d[i : i + at_once] for size, d in rows.items()}
            )
            for i in range(0, max(len(flat), 1), at_once)
        ]
        images = parts[0] if len(parts) == 1 else torch.cat(parts)
        self._check_weights("generator", images)
        return images.unflatten(0, ws.shape[:-2])  # (B, 3, R, R) or (B, k, 3, R, R)

    def _check_weights(self, network: str, output: Tensor) -> None:
        """Refuses what is not finite: as bytes it would pass for a picture."""
        if not output.isfinite().all():
            raise ValueError(
                f"the bundle's weights are broken: its {network} gives NaN or infinite values; copy the bundle "
                f"{self.name!r} again from where it came, or train its {network} anew"
            )


def save_bundle(path: str | Path, generator: Generator, encoder: EncoderBase, info: dict[str, Any]) -> None:
    """Writes a bundle; an older one at the same place is replaced only once the new one is complete.

    Other files of the older one (its card, directions) are taken along, and its flow if the generator is the same.

    Args:
        path: The folder.
        generator: Written in float16.
        encoder: Made for this generator; written in float16, its `latents` in float32.
        info: For bundle.json: `name`, `licence` and `training_data` (str), `lr_sizes` ([smallest, largest] in pixels;
            [4, R] if left out), and whatever else is worth keeping, as JSON.

    Raises:
        ValueError: If a note is missing, the encoder is for another generator, a tensor exceeds float16, or the folder
            exists and is no bundle.
    """
    path = Path(path)
    _check_fit(generator, encoder.config, "save_bundle")
    content = {"lr_sizes": [4, generator.resolution], **info, "format": FORMAT, "resolution": generator.resolution}
    content |= {"encoder": encoder.config, "parts": {}}
    check_info(content, path / INFO)
    if path.exists() and not (path / INFO).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"Expected a bundle or nothing at {path}, found something else; name another folder.")
    with atomic_folder(path, replace=path.exists()) as partial:
        if path.exists():
            shutil.copytree(path, partial, dirs_exist_ok=True)
        _write_parts(partial, generator, encoder)
        content["parts"] = {name: sha256_of(partial / name) for name in PARTS}
        _write_info(content, partial)


def _write_info(content: dict[str, Any], folder: Path) -> None:
    """Writes bundle.json, and gives the parts its permissions: those of any new file."""
    (folder / INFO).unlink(missing_ok=True)
    (folder / INFO).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in PARTS:
        (folder / name).chmod(stat.S_IMODE((folder / INFO).stat().st_mode))


def _write_parts(folder: Path, generator: Generator, encoder: EncoderBase) -> None:
    save_generator(generator, folder / GENERATOR)
    notes = {"generator_sha256": sha256_of(folder / GENERATOR)}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    statistics = {name[len(_LATENTS_PREFIX) :]: t for name, t in state.items() if name.startswith(_LATENTS_PREFIX)}
    network = to_half({name: tensor for name, tensor in state.items() if not name.startswith(_LATENTS_PREFIX)})
    write_safetensors(network, folder / ENCODER, notes)
    # The directions are many, and no more than coordinates: half the digits will do.
    tensors = {name: t.half() if name == "directions" else t.float() for name, t in statistics.items()}
    more: dict[str, str] = {}
    if (folder / LATENTS).is_file():  # of the older bundle
        more, flow = _read_flow(folder / LATENTS, notes["generator_sha256"])
        tensors |= flow
    write_safetensors(tensors, folder / LATENTS, notes | more)


def _read_flow(path: Path, generator_sha256: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Reads the notes and tensors of a flow in latents.safetensors; none if there is none, or for another generator."""
    with safe_open(path, framework="pt") as file:
        notes = file.metadata() or {}
        if "flow" not in notes or notes.get("generator_sha256") != generator_sha256:
            return {}, {}
        names = [name for name in file.keys() if name.startswith(FLOW_PREFIX)]
        return {"flow": notes["flow"]}, {name: file.get_tensor(name) for name in names}


def add_to_latents(path: str | Path, tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
    """Adds tensors to a bundle's latents.safetensors, in place of those of the same names, and renews bundle.json.

    The bundle is replaced only once the new one is complete; `notes` go into the file's header.

    Raises:
        FileNotFoundError: If there is no bundle.
        ValueError: If it is not whole.
    """
    path = Path(path)
    info = read_info(path)
    for name in PARTS:
        _check_part(path / name, info["parts"].get(name))
    owner = info["parts"][GENERATOR]
    with atomic_folder(path, replace=True) as partial:
        shutil.copytree(path, partial, dirs_exist_ok=True)
        content = _read_tensors(path / LATENTS, owner) | tensors
        with safe_open(path / LATENTS, framework="pt") as file:
            notes = (file.metadata() or {}) | notes
        write_safetensors(content, partial / LATENTS, notes)
        info["parts"][LATENTS] = sha256_of(partial / LATENTS)
        _write_info(info, partial)


def load_bundle(
    path: str | Path = DEFAULT_BUNDLE, device: torch.device | str = "cpu", precision: str = "float32"
) -> Bundle:
    """Reads a bundle and checks that its parts are whole and fit together.

    Args:
        path: The folder.
        device: Where to put the networks.
        precision: One of `PRECISIONS`, see `Bundle`.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ImportError: If a library is missing that the encoder is made of, such as timm or zuko.
        ValueError: If bundle.json is not valid, of an unknown format, or a part is damaged or belongs to another
            generator; or if the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"Expected the precision to be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    path = Path(path)
    info = read_info(path)
    for name in PARTS:
        _check_part(path / name, info["parts"].get(name))
    generator = load_generator(path / GENERATOR, device)
    if generator.resolution != info["resolution"]:
        raise ValueError(
            f"{path / INFO}: expected the generator's resolution {generator.resolution}, found {info['resolution']}; "
            "copy the bundle again from where it came."
        )
    _check_fit(generator, info["encoder"], str(path / INFO))
    encoder = _load_encoder(path, info).to(device).eval().requires_grad_(False)
    return Bundle(
        name=info["name"],
        resolution=info["resolution"],
        lr_sizes=(info["lr_sizes"][0], info["lr_sizes"][1]),
        info=info,
        hash=sha256_of(path / INFO),
        generator=generator,
        encoder=encoder,
        device=torch.device(device),
        precision=precision,
        latents_path=path / LATENTS,
    )


def _load_encoder(path: Path, info: dict[str, Any]) -> EncoderBase:
    owner = info["parts"][GENERATOR]
    statistics = _read_tensors(path / LATENTS, owner, without=FLOW_PREFIX)
    state = _read_tensors(path / ENCODER, owner) | {_LATENTS_PREFIX + name: t for name, t in statistics.items()}
    check_encoder(info["encoder"], path / INFO)
    try:
        encoder = make_encoder(info["encoder"])
        encoder.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in state.items()})
    except ImportError as error:
        name = error.name or str(error)
        raise ImportError(
            f"Expected the library {name}, which the encoder in {path} needs: pip install {name}"
        ) from error
    except Exception as error:  # timm raises whatever it stumbles over: AssertionError, IndexError, …
        raise ValueError(
            f"{path / ENCODER}: expected an encoder made with {info['encoder']}, found another ({error}); "
            "the bundle is from another version of this software: update, or export it again."
        ) from error
    return encoder


def _check_part(path: Path, expected: str | None) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"Expected a part of the bundle at {path}, found no such file; copy the bundle again.")
    found = sha256_of(path)
    if found != expected:
        raise ValueError(
            f"{path}: expected the sha256 {expected} that {INFO} names, found {found}: it is damaged or from another "
            "bundle; copy the whole folder again."
        )


def _check_fit(generator: Generator, config: dict[str, Any], where: str) -> None:
    expected = {"resolution": generator.resolution, "num_ws": generator.num_ws, "w_dim": generator.w_dim}
    found = {name: config.get(name) for name in expected}
    if found != expected:
        raise ValueError(f"{where}: expected an encoder for a generator with {expected}, found one for {found}.")


def _read_tensors(path: Path, generator_sha256: str, without: str | None = None) -> dict[str, Tensor]:
    """Reads a part that depends on the generator, without the tensors whose names begin with `without`."""
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("generator_sha256")
            if found != generator_sha256:
                raise ValueError(
                    f"{path}: expected a part made for the generator with sha256 {generator_sha256}, found one for "
                    f"{found}; use the parts of one bundle together, or train this one for this generator."
                )
            names = [name for name in file.keys() if without is None or not name.startswith(without)]
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error}); copy the bundle again.") from error


def make_encoder(config: dict[str, Any]) -> EncoderBase:
    """Makes an untrained encoder from what `config` of another one says.

    These are arguments of `models.encoder.Encoder`; with "variant" "psp" or "propulse" those of `models.psp.PspVariant`
    or `models.propulse.ProPulseEncoder`. ValueError if the variant is unknown, or has no such argument.
    """
    from models.encoder import Encoder  # here, for what their backbones may import takes time
    from models.propulse import ProPulseEncoder
    from models.psp import PspVariant

    kinds: dict[str, type[EncoderBase]] = {"amortized": Encoder, "psp": PspVariant, "propulse": ProPulseEncoder}
    arguments = dict(config)
    variant = arguments.pop("variant", "amortized")
    if variant not in kinds:
        raise ValueError(f"Expected the variant to be one of {', '.join(kinds)}, got {variant!r}.")
    known = inspect.signature(kinds[variant]).parameters
    wrong = sorted(arguments.keys() - known.keys())
    if wrong:
        raise ValueError(f"Expected arguments of {kinds[variant].__name__} ({', '.join(known)}), got {wrong}.")
    return kinds[variant](**arguments)
