"""Trains the generator on a GPU that is lent for minutes, and brings everything back in small files.

On the machine at home, pack the faces and the newest state; both are files of at most 16 MB:
    python -m training.gpu_loan pack-faces --data celeba128_train.zip --out .gpu/faces
    python -m training.gpu_loan pack-state --checkpoint runs/stylegan2_128/checkpoints/last.ckpt --out .gpu/state
On the GPU, where they have been copied to, part by part if need be; without a state the recipe starts afresh:
    python -m training.gpu_loan train --faces .gpu/faces --state .gpu/state --minutes 8 --out OUT
At home again, where `train.py fit` goes on from it:
    python -m training.gpu_loan unpack-state --state OUT --out runs/stylegan2_128/checkpoints/last.ckpt --overwrite

The GPU needs torch, torchvision, lightning, safetensors, Pillow and PyYAML, and nothing from the network: SqueezeNet's
weights are looked for as always (`$TORCH_HOME`, `models.pretrained`). The state is also written while the training
runs, so that little is lost if the loan ends early.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Timer
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.console import blame, path_option, print_line, run_command
from data.datamodule import FaceData
from data.faces import Faces
from data.files import LEDGER, check_folder, check_replaceable, is_complete, ledger_names, owned_file, owned_folder
from data.splits import add_split_options
from training.checkpoints import NonFiniteGuard, is_checkpoint, read_checkpoint
from training.stylegan2 import StyleGAN2Training

PART_BYTES = 16 * 10**6
NOTES, FORMAT = "state.json", "amortized-pulse/state/1"
# Order of a moment's numbers in memory, which must be that of its weights: fused Adam goes through both in one stride.
CONTIGUOUS, CHANNELS_LAST = "root", "root_channels_last"


def write_parts(checkpoint: dict[str, Any], folder: str | Path, overwrite: bool = False) -> list[Path]:
    """Writes a checkpoint in parts; all of them, or none.

    Args:
        checkpoint: What Lightning saves: `state_dict`, `optimizer_states` of Adam with β₁ = 0, and its counters.
        folder: Where to; made if need be.
        overwrite: Whether those of an earlier state may be replaced.

    Raises:
        ValueError: If something else is in the folder, or the optimisers are others, whose state would not survive.
    """
    folder = Path(folder)
    tensors = {f"weights/{name}": _short(name, tensor) for name, tensor in checkpoint["state_dict"].items()}
    groups = []
    for i, optimizer in enumerate(checkpoint["optimizer_states"]):
        if any(group.get("betas", (None,))[0] != 0 for group in optimizer["param_groups"]):
            raise ValueError("Expected the state of Adam with β₁ = 0, whose first moment may be left out.")
        groups.append(optimizer["param_groups"])
        for j, state in optimizer["state"].items():
            root = state["exp_avg_sq"].sqrt().bfloat16()
            last = root.ndim == 4 and not root.is_contiguous()
            tensors[f"adam/{i}/{j}/{CHANNELS_LAST if last else CONTIGUOUS}"] = root
            tensors[f"adam/{i}/{j}/step"] = state["step"]
    kept = ("epoch", "global_step", "loops", "pytorch-lightning_version")
    notes = {"format": FORMAT, "groups": groups, **{name: checkpoint[name] for name in kept}}
    with owned_folder(folder, overwrite, NOTES, job=FORMAT) as partial:
        for i, names in enumerate(_filled(tensors)):
            part = {name: tensors[name].contiguous() for name in names}
            save_file(part, partial / f"part{i:02d}.safetensors")
        (partial / NOTES).write_text(json.dumps(notes))
    return [*(folder / name for name in sorted(ledger_names(folder, NOTES))), folder / NOTES]


def read_parts(folder: str | Path) -> dict[str, Any]:
    """Reads what `write_parts` wrote.

    Returns:
        A checkpoint for `Trainer.fit(ckpt_path=…)`, once it is saved.

    Raises:
        FileNotFoundError: If there is no state.
        ValueError: If it is not whole.
    """
    folder = Path(folder)
    notes = json.loads((folder / NOTES).read_text())
    if not is_complete(folder, NOTES, FORMAT):
        raise ValueError(f"{folder}: expected a whole state, a part is missing or another; copy or pack it again.")
    tensors: dict[str, Tensor] = {}
    for name in sorted(notes.pop("files")):
        tensors |= load_file(folder / name)
    state_dict = {name[len("weights/") :]: _long(t) for name, t in tensors.items() if name.startswith("weights/")}
    optimizers = []
    for i, groups in enumerate(notes.pop("groups")):
        groups = [{**group, "betas": tuple(group["betas"])} for group in groups]
        optimizers.append({"state": _adam(tensors, f"adam/{i}/"), "param_groups": groups})
    return {**notes, "state_dict": state_dict, "optimizer_states": optimizers, "lr_schedulers": [], "callbacks": {}}


def _adam(tensors: dict[str, Tensor], prefix: str) -> dict[int, dict[str, Tensor]]:
    state = {}
    for name in (n for n in tensors if n.startswith(prefix) and not n.endswith("/step")):
        number, order = name.removeprefix(prefix).split("/")
        second = tensors[name].float().square()
        if order == CHANNELS_LAST:
            second = second.contiguous(memory_format=torch.channels_last)
        step = tensors[f"{prefix}{number}/step"]
        state[int(number)] = {"step": step, "exp_avg": torch.zeros_like(second), "exp_avg_sq": second}
    return state


def _short(name: str, tensor: Tensor) -> Tensor:
    return tensor.half() if name.startswith("generator_ema") and tensor.is_floating_point() else tensor


def _long(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _filled(tensors: dict[str, Tensor]) -> list[list[str]]:
    """Deals names out to parts, in order, each as full as it may be."""
    parts: list[list[str]] = [[]]
    left = PART_BYTES - 200_000  # for the header
    for name, tensor in tensors.items():
        left -= tensor.nbytes
        if left < 0:
            parts.append([])
            left = PART_BYTES - 200_000 - tensor.nbytes
        parts[-1].append(name)
    return parts


RECIPE = Path(__file__).resolve().parents[1] / "configs" / "stylegan2_128.yaml"


def pack_faces(
    source: str, folder: Path, split: str | None = None, part: str = "train", overwrite: bool = False
) -> list[Path]:
    """Copies the pictures of a data set, or a part of it, as they are, into zips of at most 16 MB: all, or none.

    Args:
        source: See `data.contents.find_data`.
        folder: Where to.
        split: See `data.faces.Faces`.
        part: The same.
        overwrite: Whether those of an earlier call may be replaced.

    Raises:
        ValueError: If a picture is larger than a part, or something else is in the folder.
    """
    faces = Faces(source, 8, cache_bytes=0, split=split, part=part)  # nothing is decoded
    with owned_folder(folder, overwrite) as partial, ExitStack() as stack:
        size = PART_BYTES
        for name in faces.names:
            file = faces.contents.open(name)
            content = file.read_bytes() if isinstance(file, Path) else file.getvalue()
            size += len(content) + 400  # of the zip's own
            if size >= PART_BYTES:
                stack.close()
                path = partial / f"faces{len(list(partial.iterdir())):02d}.zip"
                archive, size = stack.enter_context(zipfile.ZipFile(path, "w")), len(content) + 400
            if size >= PART_BYTES:
                raise ValueError(f"{name} has {len(content)} bytes, more than a part holds; take it out, or shrink it.")
            archive.writestr(zipfile.ZipInfo(name), content)  # without the time: the same bytes in every call
    return [folder / name for name in sorted(ledger_names(folder))]


def unpack_faces(folder: Path) -> Path:
    """Puts the pictures of all zips in a folder into one folder within it."""
    target = folder / "all"
    for path in sorted(folder.glob("faces*.zip")):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(target)
    return target


class Report(Callback):
    """Prints the speed and the losses, and writes the state, every so many seconds."""

    def __init__(self, out: Path, print_seconds: float = 10, save_seconds: float = 120) -> None:
        self.out = out
        self.print_seconds = print_seconds
        self.save_seconds = save_seconds

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clocks."""
        self._start = self._printed = self._saved = time.monotonic()
        self._images = self._first = int(pl_module.images_seen)  # type: ignore[arg-type]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """Prints and saves where it is time to."""
        now = time.monotonic()
        if now - self._printed >= self.print_seconds:
            images = int(pl_module.images_seen)
            losses = {n: float(v) for n, v in sorted(trainer.callback_metrics.items()) if "loss" in n or "logits" in n}
            line = " ".join(f"{name.removeprefix('loss/')} {value:.3f}" for name, value in losses.items())
            speed = (images - self._images) / (now - self._printed)
            print(f"{now - self._start:.0f} s, {images} images, {speed:.1f} images/s, {line}", flush=True)
            self._printed, self._images = now, images
        # Not when the training has ended: Lightning would take the epoch for ended too.
        last = trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step
        if last or now - self._saved >= self.save_seconds:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Prints what was done."""
        seconds, images = time.monotonic() - self._start, int(pl_module.images_seen) - self._first
        print(f"{images} images in {seconds:.0f} s, {images / seconds:.1f} images/s; the state is in {self.out}")

    def _save(self, trainer: Trainer) -> None:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "state.ckpt"
            trainer.save_checkpoint(path)
            write_parts(read_checkpoint(path), self.out, overwrite=True)  # `train` has asked whose the older one is
        self._saved = time.monotonic()


def train(
    faces: Path,
    state: Path,
    out: Path,
    recipe: str | Path = RECIPE,
    minutes: float = 8,
    steps: int = -1,
    batch: int | None = None,
    workers: int = 0,
    model: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Trains for some time, from the state if there is one.

    Args:
        faces: Folder of what `pack_faces` wrote.
        state: Folder of what `write_parts` wrote; without it the recipe starts afresh.
        out: Where to write the state.
        recipe: A recipe of `StyleGAN2Training`.
        minutes: How long to train, from the first step on.
        steps: Stop at this step of the run; -1 for no limit.
        batch: Faces per step; the recipe's if None.
        workers: Processes that decode faces.
        model: Arguments of `StyleGAN2Training` that replace the recipe's.
        overwrite: Whether an earlier state may be replaced.
    """
    check_folder(out, overwrite, NOTES)
    settings = yaml.safe_load(Path(recipe).read_text())
    seed_everything(settings["seed_everything"])
    torch.set_float32_matmul_precision("high")
    own: dict[str, Any] = {"export_to": None, "seed": settings["seed_everything"]}
    if torch.cuda.is_available():
        own["micro_batches"] = 1  # parts are for the cache of a CPU
    module = StyleGAN2Training(**{**settings["model"]["init_args"], **own, **(model or {})})
    pictures = str(unpack_faces(faces))
    batch = batch or settings["data"]["init_args"]["batch_size"]
    data = FaceData(
        pictures, pictures, module.hparams["resolution"], batch, workers, val_limit=1, seed=settings["seed_everything"]
    )
    trainer = Trainer(
        accelerator="auto", devices=1, precision=settings["trainer"]["precision"], max_epochs=-1, max_steps=steps,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, log_every_n_steps=10,
        callbacks=[Timer(timedelta(minutes=minutes)), NonFiniteGuard(), Report(out)],
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        start = Path(folder) / "start.ckpt" if (state / NOTES).is_file() else None
        print(f"goes on from {state}" if start else f"no state in {state}: starts afresh", flush=True)
        if start is not None:
            torch.save(read_parts(state), start)
        trainer.fit(module, data, ckpt_path=start, weights_only=False)


def parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    description, _, epilog = (__doc__ or "").partition("\n\n")
    result = argparse.ArgumentParser(
        "python -m training.gpu_loan",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = result.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pack-faces", help="faces into zips of at most 16 MB")
    command.add_argument("--data", default="celeba128_train.zip", help="a zip or a folder (default: %(default)s)")
    add_split_options(command, part="train")
    command.add_argument("--out", type=path_option, required=True)
    command = commands.add_parser("pack-state", help="a checkpoint into files of at most 16 MB")
    command.add_argument("--checkpoint", type=path_option, required=True)
    command.add_argument("--out", type=path_option, required=True)
    command = commands.add_parser("unpack-state", help="a checkpoint from such files")
    command.add_argument("--state", type=path_option, required=True)
    command.add_argument("--out", type=path_option, required=True, help="the checkpoint")
    command = commands.add_parser("train", help="train for some minutes")
    command.add_argument("--faces", type=path_option, required=True, help="folder of the packed faces")
    command.add_argument("--state", type=path_option, required=True, help="folder of the packed state, if there is one")
    command.add_argument("--out", type=path_option, required=True, help="where the new state goes")
    command.add_argument("--recipe", type=Path, default=RECIPE)
    command.add_argument("--minutes", type=float, default=8)
    command.add_argument("--steps", type=int, default=-1, help="stop at this step of the run")
    command.add_argument("--batch", type=int, help="faces per step (default: the recipe's)")
    command.add_argument("--workers", type=int, default=0, help="processes that decode faces")
    command.add_argument("--model", type=yaml.safe_load, help='replaces arguments of the recipe: "{compile: false}"')
    for command in commands.choices.values():
        command.add_argument("--overwrite", action="store_true", help="replace what an earlier call wrote")
    return result


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parser()
    given = options.parse_args(args)
    try:
        if given.command == "unpack-state":
            check_replaceable(given.out, given.overwrite, ours=is_checkpoint(given.out))
        else:
            check_folder(given.out, given.overwrite, LEDGER if given.command == "pack-faces" else NOTES)
    except ValueError as error:
        options.error(f"--out: {error}")
    return run_command("training.gpu_loan", lambda: _run(**vars(given)), "the last state stays")


def _run(command: str, out: Path, overwrite: bool, **given: Any) -> int:
    written = [out]
    if command == "train":
        train(out=out, overwrite=overwrite, **given)
    elif command == "pack-faces":
        written = pack_faces(given["data"], out, given["split"], given["part"], overwrite)
    elif command == "pack-state":
        with blame("--checkpoint"):
            written = write_parts(read_checkpoint(given["checkpoint"]), out, overwrite)
    else:
        with blame("--state"):
            state = read_parts(given["state"])
        with owned_file(out, overwrite, ours=is_checkpoint) as partial:
            torch.save(state, partial)
    for path in written:
        print_line(str(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
