"""Ray casting against triangles, with Intel Embree."""

from __future__ import annotations

import numpy as np

from qat.core.errors import UserError

try:
    from embreex import rtcore_scene
    from embreex.mesh_construction import TriangleMesh
except ModuleNotFoundError:
    raise UserError(
        "synth: the package embreex is not installed, which casts the rays; fix by: pip install 'bevqat[synth]'"
    ) from None


class Caster:
    """Triangles to cast rays against. `triangles`: float32[T,3,3], metres."""

    def __init__(self, triangles: np.ndarray) -> None:
        self._scene = rtcore_scene.EmbreeScene()
        self._mesh = TriangleMesh(self._scene, np.ascontiguousarray(triangles, np.float32))
        edges = triangles[:, 1:] - triangles[:, :1]
        normals = np.cross(edges[:, 0], edges[:, 1])
        self.normals = (normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)).astype(np.float32)

    def nearest(self, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first hit of each ray: triangle index int32[R] (-1 where none) and distance float32[R] in metres."""
        hit = self._scene.run(origins, directions, output=True)
        return hit["primID"], hit["tfar"]

    def blocked(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Whether anything blocks each ray, bool[R]."""
        return self._scene.run(origins, directions, query="OCCLUDED") != -1
