"""`infer.py --runtime onnx`: the bundle's ONNX models in the place of its torch networks, on the same command line.

The models are exported once for each bundle, into .cache/onnx/ of the checkout; after that no network of torch is
loaded. A folder with an export serves as well as a bundle does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data.command import complain, reason_of, say
from data.taps import EPSILON
from export.metadata import BOUNDARIES, ENCODER, FEEDBACK, FORMAT, GENERATOR, REPORT

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "onnx"
# What export.run cannot do: option of infer.py -> its value where it is not asked for.
TORCH_ONLY = {
    "precision": "float32",
    "refine": 0,
    "method": "ours",
    "start": "encoder",
    "epsilon": EPSILON,
    "consistency": None,
    "edit_consistent": False,
}


def check_runtime(args: argparse.Namespace) -> None:
    """Checks the options that go together with --runtime.

    Args:
        args: Those of infer.py.

    Raises:
        ValueError: If one asks for what only torch does.
    """
    if args.runtime != "onnx":
        return
    for name, default in TORCH_ONLY.items():
        if getattr(args, name, default) != default:
            raise ValueError(f"--{name.replace('_', '-')}: needs torch; leave it out, or --runtime onnx")
    if args.device not in ("auto", "cpu"):
        raise ValueError(f"--device {args.device}: --runtime onnx runs on the CPU; export.run --provider has others")


def run_exported(args: argparse.Namespace, cache: Path = CACHE) -> int:
    """Upsamples as infer.py does, by `export.run`.

    Args:
        args: The options of infer.py, checked.
        cache: Where exports of bundles are kept.

    Returns:
        The exit status.
    """
    import export.run  # late: onnxruntime takes its time, and most calls do without

    try:
        models = exported(Path(args.bundle), cache)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        complain(f"the bundle {args.bundle} cannot be used: {reason_of(error)}")
        return 1
    command = ["--model", str(models), "--out", str(args.out), "--k", str(args.k), "--seed", str(args.seed)]
    command += [] if args.downscale is None else ["--downscale", str(args.downscale)]
    command += [] if args.passes is None else ["--passes", str(args.passes)]
    command += ["--temperature", str(args.temperature)]
    command += [f"--edit={edit}" for edit in args.edit or ()]
    command += [] if args.edit_strip is None else ["--edit-strip", args.edit_strip]
    command += ["--overwrite"] if args.overwrite else []
    return export.run.main([*command, "--", *map(str, args.inputs)])


def exported(bundle: Path, cache: Path = CACHE) -> Path:
    """Finds the ONNX models of a bundle, and makes them at the first call.

    Args:
        bundle: A bundle's folder, or one with an export.
        cache: Where exports are kept.

    Returns:
        The folder with the models.

    Raises:
        ValueError: If the bundle cannot be exported.
        FileNotFoundError: If there is no bundle.
    """
    if (bundle / ENCODER).is_file() and (bundle / GENERATOR).is_file():
        return bundle
    from models.bundle_info import read_info
    from models.checkpoints import sha256_of

    wanted = [REPORT] + [FEEDBACK] * ("feedback" in read_info(bundle)["encoder"])  # or says what is wrong
    folder = cache / f"{FORMAT.rpartition('/')[2]}-{sha256_of(bundle / 'bundle.json')[:16]}"
    # The report is the last of an export's files; one made before feedback was exported lacks that.
    if not all((folder / name).is_file() for name in wanted):
        from export.onnx import export_bundle
        from models.bundle import load_bundle

        say(f"exporting {bundle} to ONNX, once")
        export_bundle(load_bundle(bundle), folder, overwrite=True, boundaries=bundle / BOUNDARIES)
    else:
        from export.onnx import copy_boundaries

        copy_boundaries(bundle / BOUNDARIES, folder / BOUNDARIES)  # they are no part of the bundle's hash
    return folder
