"""A run: the processes that train it, its folder, which one training has at a time, and what it leaves there.

torchrun and SLURM start the processes themselves. A trainer that is set up for one device would then train the same run
as many times as there are processes, all into one folder.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from lightning import LightningModule, Trainer

from models.bundle_info import is_bundle
from models.checkpoints.generators import is_our_tensors

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_DATA = ("batch_size", "seed", "resolution", "augment", "crop")
# Settings of a model that a run may change: how fast it learns, how it computes, what it measures and leaves behind;
# its first weights, which it has left behind; and the generator, whose hash `Owner` compares.
_MAY_CHANGE = (
    r"(.*learning_rate.*|export_to|bundle_info|notes|micro_batches|compile|generator|init_.*|val_.*|metric.*)$"
)
# Where launchers say how many processes they started: torchrun, SLURM, Open MPI, MPICH, LSF.
COUNTS = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "JSM_NAMESPACE_SIZE")


class Launch(NamedTuple):
    """What a launcher started."""

    launcher: str  # its name
    per_node: int  # processes on each machine
    nodes: int


def find_launch(environment: Mapping[str, str]) -> Launch | None:
    """Reads from the environment whether torchrun or SLURM started this process, and how many; None otherwise.

    Raises:
        ValueError: If SLURM is to start several processes and did not.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        world, per_node = int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
        return Launch("torchrun", per_node, world // per_node)
    tasks = _slurm_tasks(environment)
    if tasks > 1 and "SLURM_STEP_ID" not in environment:
        raise ValueError(
            f"Expected srun to start the processes that SLURM_NTASKS={tasks} speaks of; put srun before the command, "
            "or unset SLURM_NTASKS."
        )
    nodes = int(environment.get("SLURM_NNODES", "1"))
    return Launch("SLURM", tasks // nodes, nodes) if tasks > 1 else None


def follow_launch(trainer: Any, launch: Launch | None) -> None:
    """Sets a trainer's arguments up for the processes that a launcher started, and batch normalisation for the device.

    Raises:
        ValueError: If the arguments ask for another number of devices.
    """
    if launch is not None:
        asked = trainer.get("devices", "auto")
        number = len(asked) if isinstance(asked, list) else asked
        if str(number) not in ("auto", "-1", str(launch.per_node)):
            raise ValueError(
                f"Expected trainer.devices {launch.per_node}, as {launch.launcher} started so many processes on this "
                f"machine, got {asked}; set --trainer.devices auto, or start fewer."
            )
        trainer["devices"] = asked if isinstance(asked, list) else launch.per_node
        trainer["num_nodes"] = launch.nodes
    on_gpu = torch.cuda.is_available() and trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    trainer["sync_batchnorm"] = bool(trainer.get("sync_batchnorm")) and on_gpu  # it exists for CUDA alone


def check_followed(world_size: int, environment: Mapping[str, str]) -> None:
    """Raises ValueError if a launcher started more processes than the trainer knows of."""
    for name in COUNTS:
        count = _slurm_tasks(environment) if name == "SLURM_NTASKS" else int(environment.get(name) or 1)
        if count > 1 and count != world_size:
            raise ValueError(
                f"Expected a training on {world_size} process{'es' * (world_size > 1)}, but {name}={count}: every "
                f"process would train the same run. Start it by torchrun --nproc-per-node {count} train.py …, or "
                f"unset {name}."
            )


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    """Counts the tasks of a SLURM job; an interactive shell starts its programs itself."""
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return 1 if interactive else int(environment.get("SLURM_NTASKS") or 1)


def lock_run(folder: Path) -> IO[str]:
    """Takes a run's folder for this process, until the file is closed or the process ends, however it ends.

    Raises:
        ValueError: If another process trains there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK).open("a+")
    try:
        if fcntl is not None:
            # The lock of a process, not of an open file: workers that outlive a kill do not hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise ValueError(
            f"Expected nobody else to train in {folder}, {owner} does. Wait for it, or name another run: "
            "--trainer.logger.init_args.name NAME."
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


class RunRefused(ValueError):
    """A run cannot start or go on as it is; the message says what to do, so that no traceback is needed."""


def describe_run(trainer: Trainer, module: LightningModule) -> dict[str, str]:
    """Says what a run is made of: its data, its random numbers, its batches and its recipe.

    Args:
        trainer: Lightning's.
        module: What it trains.

    Returns:
        Values in JSON by the name of the option that sets them.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    faces = getattr(data, "train_faces", None)
    found: dict[str, Any] = {"training": type(module).__name__, "processes": trainer.world_size}
    if faces is not None and hasattr(faces, "fingerprint"):
        found["data.train"] = faces.fingerprint()
    found["trainer.accumulate_grad_batches"] = trainer.accumulate_grad_batches
    found |= {f"data.{name}": value for name, value in data.hparams.items() if name in _DATA}
    found |= {f"model.{name}": v for name, v in module.hparams.items() if not re.match(_MAY_CHANGE, name)}
    return {name: json.dumps(value, sort_keys=True, default=str) for name, value in found.items()}


def check_same_run(began: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuses to go on with a run that was begun with something else.

    Args:
        began: From `describe_run`, when it began; settings that it does not know, being older, may have any value.
        now: The same for now.

    Raises:
        RunRefused: If they differ; names what.
    """
    words = [
        "the pictures of --data.train are others" if name == "data.train" else f"{name} is {now[name]} and was {value}"
        for name, value in began.items()
        if now.get(name, value) != value
    ]
    if words:
        raise RunRefused(
            f"Expected to go on with the run as it began, but {'; '.join(words)}. Set them as they were, start another "
            "run under another --trainer.logger.init_args.name, or give --checkpoint.accept_changes true: pictures of "
            "this epoch may then be seen twice or not at all."
        )


def check_export_target(path: Path, ours: bool) -> None:
    """Refuses, before the first step, to export to where something is that this run did not leave.

    Args:
        path: Where the run exports to; what lies beside a file may be named after it.
        ours: Whether this run exported there before, as far as its checkpoint tells.

    Raises:
        RunRefused: If something is there that this run must not replace.
    """
    beside = [path.with_stem(f"{path.stem}_short"), path.with_suffix(".md")] if path.suffix else []
    there = next((p for p in [path, *beside] if os.path.lexists(p)), None)
    if there and not (ours and (is_bundle(path) or is_our_tensors(path))):
        raise RunRefused(f"--model.export_to: {there} exists, and this run did not write it; move it, or name another.")


def check_config(folder: Path) -> None:
    """Refuses to write a run's config.yaml where somebody else's is.

    Raises:
        RunRefused: If there is one.
    """
    path = folder / "config.yaml"
    if os.path.lexists(path) and not (path.is_file() and path.read_bytes().startswith(b"# lightning")):
        raise RunRefused(f"{path} is not of a training; name another run: --trainer.logger.init_args.name NAME.")


def export_folder(trainer: Trainer, target: str | None) -> Path | None:
    """Says where the process that calls it should export to, at the end of a run. All processes of a run must ask.

    Args:
        trainer: Lightning's.
        target: Name of the export, relative to the run's folder, or an absolute path.

    Returns:
        The path; None where there is nothing to do: on all processes but the first, where no name was given, after runs
        that trained nothing, and where a finished run, called again, has left its export before.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # `log_dir` waits for all processes
    idle = trainer.global_step == 0 or trainer.fast_dev_run  # type: ignore[attr-defined]
    if target is None or trainer.global_rank != 0 or idle:
        return None
    finished = getattr(trainer.checkpoint_callback, "began_at", 0) is None and (folder / target).exists()
    return None if finished else folder / target


def check_export(target: str | None, info: Mapping[str, str] | None) -> None:
    """Refuses, before a training, a bundle without name, licence or training data; `target` as for `export_folder`."""
    missing = {"name", "licence", "training_data"} - set(info or {})
    if target is not None and missing:
        raise ValueError(
            f"Expected bundle_info to name {', '.join(sorted(missing))}, since export_to asks for a bundle."
        )
