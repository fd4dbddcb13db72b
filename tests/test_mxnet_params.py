"""The reader of MXNet's parameter files, against files written here byte by byte as MXNet writes them."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from models.mxnet_params import DENSE, NUMBER_TYPES, V1, V2, V3, read_mxnet_params

ARRAYS = {
    "arg:conv_weight": np.arange(24, dtype="<f4").reshape(4, 3, 2) / 7,
    "aux:norm_moving_mean": np.array([1.5, -2.0], "<f2"),
    "arg:größe": np.array([[3]], "<i8"),
}
MXNET_FILE = (
    "120100000000000000000000000000000200000000000000c9fa93f900000000020000000200000000000000030000000000000001000000"
    "0000000000000000000000000000803f0000004000004040000080400000a040c9fa93f90000000001000000040000000000000001000000"
    "00000000020000000000003c00400042020000000000000005000000000000006172673a6105000000000000006175783a62"
)


def array_bytes(array: np.ndarray, version: int = V2, storage: int = DENSE, flag: int | None = None) -> bytes:
    flag = [np.dtype(t) for t in NUMBER_TYPES].index(array.dtype) if flag is None else flag
    head = struct.pack("<I", version) + (struct.pack("<i", storage) if version != V1 else b"")
    shape = struct.pack(f"<i{array.ndim}q", array.ndim, *array.shape)
    return head + shape + struct.pack("<iii", 1, 0, flag) + array.tobytes()  # device 1 is the CPU


def file_bytes(arrays: list[bytes], names: list[str]) -> bytes:
    encoded = [name.encode() for name in names]
    return b"".join(
        [
            struct.pack("<QQQ", 0x112, 0, len(arrays)), *arrays,
            struct.pack("<Q", len(names)), *(struct.pack("<Q", len(name)) + name for name in encoded),
        ]
    )  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model-0000.params"


@pytest.mark.parametrize("version", [V1, V2, V3])
def test_arrays_come_back_by_name(path, version) -> None:
    path.write_bytes(file_bytes([array_bytes(a, version) for a in ARRAYS.values()], list(ARRAYS)))
    found = read_mxnet_params(path)
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)
        assert found[name].flags.writeable


@pytest.mark.parametrize("kind", NUMBER_TYPES)
def test_every_number_type_is_read(path, kind) -> None:
    array = np.array([0, 1, 100], kind)
    path.write_bytes(file_bytes([array_bytes(array)], ["a"]))
    assert read_mxnet_params(path)["a"].dtype == array.dtype
    assert np.array_equal(read_mxnet_params(path)["a"], array)


def test_file_that_mxnet_itself_wrote(path) -> None:
    # mx.nd.save of MXNet 1.9.1: {"arg:a": [[0, 1, 2], [3, 4, 5]] in float32, "aux:b": [0, 1, 2, 3] in float16}
    path.write_bytes(bytes.fromhex(MXNET_FILE))
    found = read_mxnet_params(path)
    assert found["arg:a"].dtype == np.float32 and np.array_equal(found["arg:a"], [[0, 1, 2], [3, 4, 5]])
    assert found["aux:b"].dtype == np.float16 and np.array_equal(found["aux:b"], [0, 1, 2, 3])


def test_scalars_and_empty_arrays_of_version_3(path) -> None:
    arrays = [np.array(3.5, "<f4"), np.zeros((0, 2), "<f4")]
    path.write_bytes(file_bytes([array_bytes(a, V3) for a in arrays], ["s", "e"]))
    found = read_mxnet_params(path)
    assert found["s"].shape == () and found["s"] == 3.5 and found["e"].shape == (0, 2)


# --- refusals ---

ARRAY = np.ones((2, 3), "<f4")
WHOLE = file_bytes([array_bytes(ARRAY)], ["arg:a"])


@pytest.mark.parametrize("length", [0, 10, 30, 50, 80, len(WHOLE) - 1])
def test_truncated_file_is_refused(path, length) -> None:
    path.write_bytes(WHOLE)
    assert read_mxnet_params(path).keys() == {"arg:a"}
    path.write_bytes(WHOLE[:length])
    with pytest.raises(ValueError, match=r"model-0000\.params.*it ends at byte"):
        read_mxnet_params(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04" + bytes(100), "begins with"),
        (file_bytes([array_bytes(ARRAY, version=2)], ["a"]), "none of the versions"),
        (file_bytes([array_bytes(ARRAY, storage=1)], ["a"]), "sparse"),
        (file_bytes([array_bytes(ARRAY, flag=12)], ["a"]), "unknown type 12"),
        (file_bytes([array_bytes(ARRAY)], []), "1 arrays and 0 names"),
        (file_bytes([struct.pack("<Iii", V2, DENSE, 0)], ["a"]), "no shape"),
        (file_bytes([struct.pack("<Iii", V3, DENSE, -1)], ["a"]), "no shape"),
        (file_bytes([struct.pack("<Iii", V2, DENSE, 2**30)], ["a"]), "dimensions"),
        (file_bytes([struct.pack("<Iii2q", V2, DENSE, 2, -1, 3)], ["a"]), "shape"),
        (file_bytes([struct.pack("<Iii2qiii", V2, DENSE, 2, 2**40, 2**40, 1, 0, 0)], ["a"]), "it ends at byte"),
        (WHOLE[:-5] + b"\xff" * 5, "decode"),
    ],
)
def test_other_content_is_refused(path, content, reason) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_mxnet_params(path)
