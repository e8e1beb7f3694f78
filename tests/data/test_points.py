"""Lidar files are what their bytes say: format, type, values a point. Real files of four data sets, where they are at hand."""

from pathlib import Path

import numpy as np
import pytest

from qat.core.errors import UserError
from qat.data.points import read_points
from tests.messages import refused

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
# Values a point, as the data sets' own documentation has them.
REAL = {
    "nuscenes": (SHARED / "nuscenes-sample/LIDAR_TOP.bin", 5),
    "nuscenes sweep": (SHARED / "mmdet3d-data/nuscenes", 5),
    "kitti": (SHARED / "mmdet3d-data/kitti/000008.bin", 4),
    "scannet": (SHARED / "mmdet3d-data/scannet/scene0000_00.bin", 6),
    "sunrgbd": (SHARED / "mmdet3d-data/sunrgbd/000017.bin", 6),
    "example": (ROOT / "example-data/samples/LIDAR_TOP", 5),
}


def real(name):
    path, width = REAL[name]
    if path.is_dir():
        path = min(path.glob("*.bin"))
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path, width


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_read_as_they_are(name):
    path, width = real(name)
    found = read_points(path, width)
    assert np.array_equal(found, np.fromfile(path, np.float32).reshape(-1, width)[:, :5])


@pytest.mark.parametrize("folder", ["example-data/samples/LIDAR_TOP", "mmdet3d-data/tests/nuscenes"])
def test_every_small_and_every_shipped_file_is_read(folder):
    start = ROOT if folder.startswith("example") else SHARED
    files = sorted((start / folder).rglob("*.bin"))
    if not files:
        pytest.skip(f"{folder} is not here")
    for path in files:
        assert len(read_points(path, 5)) > 0


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("wrong", range(3, 11))
def test_another_number_of_values_a_point_is_told_though_it_divides(name, wrong, tmp_path):
    path, width = real(name)
    if wrong == width or (name == "example" and wrong % width == 0):
        pytest.skip("the right one")
    values = np.fromfile(path, np.float32)
    (tmp_path / "a.bin").write_bytes(values[: len(values) // (width * wrong) * width * wrong].tobytes())
    with pytest.raises(
        UserError, match=rf"a\.bin: found points of {width} values each, .* expected points of load_dim {wrong} "
    ) as caught:
        read_points(tmp_path / "a.bin", wrong)
    assert "\n" not in str(caught.value)


def cloud(count=4_000):
    """x, y, z, intensity and ring of a lidar that turns."""
    random = np.random.default_rng(0)
    angle, ring = random.uniform(0, 2 * np.pi, count), random.integers(0, 32, count)
    distance = random.gamma(2.0, 9.0, count)
    z = distance * np.sin(np.radians(ring - 25.0))
    columns = (distance * np.cos(angle), distance * np.sin(angle), z, random.integers(0, 256, count), ring)
    return np.stack(columns, 1).astype(np.float32)


@pytest.mark.parametrize("dtype", ["<f8", "<f2", ">f4", "<i2", "<i4", "u1"])
def test_another_type_of_number_is_told_though_it_divides(dtype, tmp_path):
    content = cloud().astype(dtype).tobytes()
    (tmp_path / "a.bin").write_bytes(content[: len(content) // 20 * 20])
    with pytest.raises(UserError, match=r"a\.bin: found .*, expected .*load_dim 5"):
        read_points(tmp_path / "a.bin", 5)


def _npz(path, points):
    with path.open("wb") as stream:
        np.savez(stream, points=points)


def _npy(path, points):
    with path.open("wb") as stream:
        np.save(stream, points)


def _pcd(head):
    def write(path, points):
        fields = "FIELDS x y z intensity ring\nSIZE 4 4 4 4 4\nTYPE F F F F F\nCOUNT 1 1 1 1 1\n"
        path.write_bytes((head + fields + f"WIDTH {len(points)}\nHEIGHT 1\nDATA binary\n").encode() + points.tobytes())

    return write


FORMATS = {
    "a NumPy array": _npy,
    "a zip archive": _npz,
    "a PCD point cloud": _pcd("# .PCD v0.7 - Point Cloud Data file format\nVERSION 0.7\n"),
    "a PCD point cloud, without the comment": _pcd("VERSION 0.7\n"),
    "a PLY point cloud": lambda path, points: path.write_bytes(
        b"ply\nformat binary_little_endian 1.0\n" + points.tobytes()
    ),
    "a text file": lambda path, points: np.savetxt(path, points),
    "a Git LFS pointer": lambda path, points: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "a web page": lambda path, points: path.write_text("<!DOCTYPE html>" + " " * 85),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_other_formats_under_the_name_are_told(kind, tmp_path):
    """Cut or filled so that the size is one of whole points."""
    path = tmp_path / "a.pcd.bin"
    FORMATS[kind](path, cloud())
    content = path.read_bytes()
    path.write_bytes(content + b" " * (-len(content) % 20))
    kind = kind.partition(",")[0]
    with refused("a.pcd.bin", f"found {kind}", ", expected points of load_dim 5 float32 values each"):
        read_points(path, 5)


def test_coordinates_of_a_map_are_told(tmp_path):
    """UTM's, in metres: no sensor's frame."""
    points = cloud()
    points[:, :2] += (450_000, 5_400_000)
    points.tofile(tmp_path / "a.bin")
    with pytest.raises(UserError, match="beyond 2,000 m or next to nothing"):
        read_points(tmp_path / "a.bin", 5)


@pytest.mark.parametrize("flat", ["no intensity", "one ring", "a wall", "few points", "one point", "a sphere"])
def test_odd_clouds_are_read(flat, tmp_path):
    points = cloud()
    if flat == "no intensity":
        points[:, 3:] = 0
    elif flat == "one ring":
        points[:, 2], points[:, 4] = 0, 0
    elif flat == "a wall":
        points[:, 0] = 10
    elif flat == "few points":
        points = points[:7]
    elif flat == "one point":
        points = np.zeros((1, 5), np.float32)
    else:  # x, y and z alike, and nothing else
        points[:, :3] = np.random.default_rng(1).normal(size=(len(points), 3))
        points[:, 3:] = np.random.default_rng(2).normal(size=(len(points), 2))
    points.tofile(tmp_path / "a.bin")
    assert np.array_equal(read_points(tmp_path / "a.bin", 5), points)
