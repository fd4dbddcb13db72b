"""Processes that torchrun or SLURM started train one run, or are refused by name."""

from __future__ import annotations

import pytest

from training.run import check_followed, find_launch, follow_launch

TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SLURM = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (TORCHRUN, ("torchrun", 2, 2)),
        (SLURM, ("SLURM", 2, 2)),
        ({**SLURM, "SLURM_JOB_NAME": "bash"}, None),
        ({**SLURM, **TORCHRUN}, ("torchrun", 2, 2)),
    ],
)
def test_launchers_are_found(environment, expected) -> None:
    assert find_launch(environment) == expected


def test_a_job_of_slurm_without_srun_is_refused() -> None:
    with pytest.raises(ValueError, match="srun.*SLURM_NTASKS=4"):
        find_launch({"SLURM_NTASKS": "4"})


def test_the_trainer_takes_what_was_started() -> None:
    trainer = {"devices": "auto", "accelerator": "cpu", "sync_batchnorm": True}
    follow_launch(trainer, find_launch(TORCHRUN))
    assert trainer == {"devices": 2, "num_nodes": 2, "accelerator": "cpu", "sync_batchnorm": False}
    with pytest.raises(ValueError, match="trainer.devices 2, as torchrun started .* got 1"):
        follow_launch({"devices": 1}, find_launch(TORCHRUN))


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_a_trainer_knows_nothing_of_are_refused(name) -> None:
    check_followed(2, {name: "2"})
    check_followed(2, {name: "1"})
    with pytest.raises(ValueError, match=f"on 1 process, but {name}=2: .*torchrun --nproc-per-node 2"):
        check_followed(1, {name: "2"})
