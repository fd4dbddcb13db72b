"""Tiny networks that many tests share: a generator of 32 px, its encoder, and the bundle of both."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_runs import tiny_networks, write_bundle

from models.bundle import Bundle, load_bundle
from models.encoder import Encoder
from models.generator import Generator


@pytest.fixture(scope="session")
def networks() -> tuple[Generator, Encoder]:
    return tiny_networks()


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bundle of 32 px; nobody writes into it, `bundle_copy` is for that."""
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    write_bundle(path)
    return path


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


@pytest.fixture(scope="session")
def bundle(tiny_bundle: Path) -> Bundle:
    return load_bundle(tiny_bundle)
