"""Meshes of the ten detection classes, built from boxes, frustums and cylinders.

Object frame: x forward, y left, z up, origin at the centre of the box's bottom face, metres. A mesh is stretched to
fill its annotated box exactly, so that a box drawn around it is tight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PAINT, GLASS, LAMP, MATT, SKIN = 0, 1, 2, 3, 4  # materials of objects
GROUND, FACADE, FOLIAGE, STATIC = 10, 11, 12, 13  # materials of the street

# class: (mean length, width, height in metres, spread as a fraction)
# Means follow the annotated sizes of nuScenes v1.0-trainval.
CLASSES: dict[str, tuple[float, float, float, float]] = {
    "car": (4.6, 1.95, 1.73, 0.08),
    "truck": (6.9, 2.5, 2.85, 0.15),
    "construction_vehicle": (6.4, 2.8, 3.2, 0.12),
    "bus": (11.0, 2.9, 3.5, 0.08),
    "trailer": (11.5, 2.9, 3.9, 0.10),
    "barrier": (0.5, 2.5, 0.98, 0.07),
    "motorcycle": (2.1, 0.77, 1.47, 0.07),
    "bicycle": (1.7, 0.6, 1.28, 0.07),
    "pedestrian": (0.73, 0.67, 1.77, 0.07),
    "traffic_cone": (0.41, 0.41, 1.07, 0.10),
}

DARK = (0.04, 0.04, 0.045)
WINDOW = (0.06, 0.08, 0.10)
WHITE_LAMP, RED_LAMP, AMBER_LAMP = (1.0, 0.97, 0.85), (0.9, 0.05, 0.04), (1.0, 0.6, 0.1)


@dataclass
class Mesh:
    """Triangles float32[T,3,3], their base colour float32[T,3] in linear RGB and material int8[T]."""

    triangles: np.ndarray
    colours: np.ndarray
    materials: np.ndarray


class Builder:
    """Collects primitives into a `Mesh`."""

    def __init__(self) -> None:
        self._triangles: list[np.ndarray] = []
        self._colours: list[np.ndarray] = []
        self._materials: list[np.ndarray] = []

    def _add(self, quads: np.ndarray, colour: tuple[float, float, float], material: int) -> None:
        triangles = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
        self._triangles.append(triangles)
        self._colours.append(np.tile(np.asarray(colour, np.float32), (len(triangles), 1)))
        self._materials.append(np.full(len(triangles), material, np.int8))

    def frustum(
        self,
        bottom: tuple[float, float, float, float],
        top: tuple[float, float, float, float],
        z0: float,
        z1: float,
        colour: tuple[float, float, float],
        material: int = PAINT,
    ) -> None:
        """A solid between two rectangles (x0, x1, y0, y1) at heights z0 and z1."""

        def ring(r: tuple[float, float, float, float], z: float) -> list[list[float]]:
            x0, x1, y0, y1 = r
            return [[x0, y0, z], [x1, y0, z], [x1, y1, z], [x0, y1, z]]

        a, b = np.array(ring(bottom, z0)), np.array(ring(top, z1))
        sides = [[a[i], a[(i + 1) % 4], b[(i + 1) % 4], b[i]] for i in range(4)]
        self._add(np.array([a[::-1], b, *sides]), colour, material)

    def box(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        z: tuple[float, float],
        colour: tuple[float, float, float],
        material: int = PAINT,
    ) -> None:
        """An axis-aligned box."""
        self.frustum((*x, *y), (*x, *y), z[0], z[1], colour, material)

    def bar(
        self,
        start: tuple[float, float, float],
        end: tuple[float, float, float],
        thickness: float,
        colour: tuple[float, float, float],
        material: int = PAINT,
    ) -> None:
        """A square bar between two points."""
        p, q = np.asarray(start), np.asarray(end)
        axis = (q - p) / max(np.linalg.norm(q - p), 1e-9)
        side = np.cross(axis, [0, 1, 0] if abs(axis[1]) < 0.9 else [1, 0, 0])
        side /= np.linalg.norm(side)
        up = np.cross(axis, side)
        h = thickness / 2
        corners = [side * h + up * h, side * h - up * h, -side * h - up * h, -side * h + up * h]
        a, b = np.array([p + c for c in corners]), np.array([q + c for c in corners])
        sides = [[a[i], a[(i + 1) % 4], b[(i + 1) % 4], b[i]] for i in range(4)]
        self._add(np.array([a[::-1], b, *sides]), colour, material)

    def wheel(self, x: float, y: float, radius: float, width: float, colour: tuple[float, float, float] = DARK) -> None:
        """A ten-sided wheel standing on the ground, its axle along y."""
        angle = np.arange(10) * (2 * np.pi / 10)
        rim = np.stack([x + radius * np.cos(angle), np.zeros(10), radius + radius * np.sin(angle)], 1)
        a, b = rim + [0, y - width / 2, 0], rim + [0, y + width / 2, 0]
        centre = np.array([x, 0, radius])
        quads = []
        for i in range(10):
            j = (i + 1) % 10
            quads.append([a[i], a[j], b[j], b[i]])
            for face, offset in ((a, y - width / 2), (b, y + width / 2)):
                c = centre + [0, offset, 0]
                quads.append([c, face[i], face[j], c])
        self._add(np.array(quads), colour, MATT)

    def collected(self) -> Mesh:
        """The collected mesh, unchanged."""
        if not self._triangles:
            return Mesh(np.zeros((0, 3, 3), np.float32), np.zeros((0, 3), np.float32), np.zeros(0, np.int8))
        triangles = np.concatenate(self._triangles).astype(np.float32)
        return Mesh(triangles, np.concatenate(self._colours), np.concatenate(self._materials))

    def mesh(self, length: float, width: float, height: float) -> Mesh:
        """The collected mesh, stretched to fill the box length × width × height."""
        mesh = self.collected()
        triangles = mesh.triangles
        low, high = triangles.min((0, 1)), triangles.max((0, 1))
        target_low = np.array([-length / 2, -width / 2, 0.0])
        scale = np.array([length, width, height]) / np.maximum(high - low, 1e-9)
        triangles = (triangles - low) * scale + target_low
        return Mesh(triangles.astype(np.float32), mesh.colours, mesh.materials)


def _lamps(b: Builder, l: float, w: float, z: float, size: float, lit: bool) -> None:
    front, rear = (WHITE_LAMP, RED_LAMP) if lit else ((0.55, 0.55, 0.55), (0.30, 0.02, 0.02))
    material = LAMP if lit else PAINT
    for side in (-1, 1):
        y = side * w * 0.36
        b.box((l / 2 - 0.05, l / 2 + 0.01), (y - size, y + size), (z - size * 0.6, z + size * 0.6), front, material)
        b.box((-l / 2 - 0.01, -l / 2 + 0.05), (y - size, y + size), (z - size * 0.6, z + size * 0.6), rear, material)


def _paint(rng: np.random.Generator) -> tuple[float, float, float]:
    palette = [(0.75, 0.75, 0.75), (0.02, 0.02, 0.025), (0.30, 0.31, 0.33), (0.45, 0.03, 0.03), (0.03, 0.08, 0.35)]
    palette += [(0.85, 0.85, 0.82), (0.12, 0.12, 0.13), (0.05, 0.2, 0.1), (0.4, 0.35, 0.25), (0.15, 0.3, 0.5)]
    base = np.asarray(palette[rng.integers(len(palette))])
    return tuple(np.clip(base * rng.uniform(0.8, 1.2) + rng.uniform(-0.01, 0.02, 3), 0.01, 0.95))


def _car(b: Builder, l: float, w: float, h: float, rng: np.random.Generator, active: bool) -> None:
    paint = _paint(rng)
    estate = rng.random() < 0.4
    y = w / 2
    b.frustum((-l / 2, l / 2, -y, y), (-l * 0.49, l * 0.47, -y * 0.96, y * 0.96), h * 0.16, h * 0.56, paint)
    rear_bottom, rear_top = (-l * 0.49, -l * 0.44) if estate else (-l * 0.40, -l * 0.28)
    b.frustum(
        (rear_bottom, l * 0.24, -y * 0.94, y * 0.94),
        (rear_top, l * 0.08, -y * 0.78, y * 0.78),
        h * 0.56,
        h * 0.95,
        WINDOW,
        GLASS,
    )
    b.box((rear_top, l * 0.08), (-y * 0.79, y * 0.79), (h * 0.94, h), paint)
    for x in (-l * 0.31, l * 0.31):
        for side in (-1, 1):
            b.wheel(x, side * (y - 0.11), h * 0.2, 0.22)
    b.box((l * 0.46, l * 0.501), (-y * 0.55, y * 0.55), (h * 0.2, h * 0.36), DARK, MATT)
    _lamps(b, l, w, h * 0.46, 0.17, active)


def _truck(b: Builder, l: float, w: float, h: float, rng: np.random.Generator, active: bool) -> None:
    paint = _paint(rng)
    y, cab = w / 2, l / 2 - min(2.0, l * 0.3)
    b.box((cab, l / 2), (-y * 0.95, y * 0.95), (h * 0.14, h * 0.78), paint)
    b.box((l / 2 - 0.02, l / 2 + 0.03), (-y * 0.85, y * 0.85), (h * 0.48, h * 0.72), WINDOW, GLASS)
    b.box((cab + 0.5, l / 2 - 0.3), (-y * 0.97, y * 0.97), (h * 0.48, h * 0.7), WINDOW, GLASS)
    cargo = [(0.7, 0.7, 0.68), (0.35, 0.36, 0.38), (0.5, 0.28, 0.08), (0.1, 0.25, 0.4)][rng.integers(4)]
    if rng.random() < 0.75:
        b.box((-l / 2, cab - 0.15), (-y, y), (h * 0.32, h), cargo)
    else:  # an open load bed with a load
        b.box((-l / 2, cab - 0.15), (-y, y), (h * 0.32, h * 0.55), cargo)
        b.frustum(
            (-l * 0.45, cab - 0.4, -y * 0.8, y * 0.8),
            (-l * 0.3, cab - 0.9, -y * 0.4, y * 0.4),
            h * 0.55,
            h,
            (0.3, 0.22, 0.13),
            MATT,
        )
    b.box((-l / 2, cab), (-y * 0.5, y * 0.5), (h * 0.2, h * 0.32), DARK, MATT)
    for x in (-l * 0.36, -l * 0.22, l * 0.36):
        for side in (-1, 1):
            b.wheel(x, side * (y - 0.16), 0.48, 0.3)
    _lamps(b, l, w, h * 0.24, 0.16, active)


def _bus(b: Builder, l: float, w: float, h: float, rng: np.random.Generator, active: bool) -> None:
    paint = [(0.75, 0.72, 0.65), (0.6, 0.05, 0.04), (0.05, 0.25, 0.5), (0.75, 0.5, 0.02), (0.1, 0.4, 0.15)][
        rng.integers(5)
    ]
    y = w / 2
    b.box((-l / 2, l / 2), (-y, y), (h * 0.1, h), paint)
    b.box((-l * 0.47, l * 0.46), (-y - 0.02, y + 0.02), (h * 0.45, h * 0.78), WINDOW, GLASS)
    count = max(3, int(l / 1.6))
    for i in range(1, count):  # pillars between the windows
        x = -l * 0.47 + i * l * 0.93 / count
        b.box((x - 0.08, x + 0.08), (-y - 0.03, y + 0.03), (h * 0.45, h * 0.78), paint)
    b.box((l / 2 - 0.02, l / 2 + 0.03), (-y * 0.9, y * 0.9), (h * 0.35, h * 0.78), WINDOW, GLASS)
    b.box((l / 2 - 0.02, l / 2 + 0.04), (-y * 0.6, y * 0.6), (h * 0.82, h * 0.93), AMBER_LAMP, LAMP)
    b.box((-l / 2 - 0.03, -l / 2 + 0.02), (-y * 0.7, y * 0.7), (h * 0.5, h * 0.75), WINDOW, GLASS)
    for x in (-l * 0.28, l * 0.33):
        for side in (-1, 1):
            b.wheel(x, side * (y - 0.14), 0.5, 0.3)
    _lamps(b, l, w, h * 0.2, 0.18, active)


def _trailer(b: Builder, l: float, w: float, h: float, rng: np.random.Generator, active: bool) -> None:
    body = [(0.62, 0.62, 0.6), (0.1, 0.2, 0.42), (0.55, 0.12, 0.06), (0.35, 0.4, 0.35)][rng.integers(4)]
    y = w / 2
    b.box((-l / 2, l / 2), (-y, y), (h * 0.32, h), body)
    ribs = int(l / 1.2)
    for i in range(ribs):  # ribs along the container
        x = -l / 2 + (i + 0.5) * l / ribs
        shade = tuple(c * 0.6 for c in body)
        b.box((x - 0.12, x + 0.12), (-y - 0.03, y + 0.03), (h * 0.34, h * 0.98), shade)  # type: ignore[arg-type]
    b.box((-l / 2, l / 2), (-y * 0.4, y * 0.4), (h * 0.22, h * 0.32), DARK, MATT)
    for x in (-l * 0.42, -l * 0.32, -l * 0.22):
        for side in (-1, 1):
            b.wheel(x, side * (y - 0.16), 0.5, 0.3)
    b.box((l * 0.3, l * 0.33), (-y * 0.7, y * 0.7), (0.0, h * 0.25), DARK, MATT)
    lamp = (RED_LAMP, LAMP) if active else ((0.3, 0.02, 0.02), PAINT)
    b.box((-l / 2 - 0.02, -l / 2), (-y * 0.95, y * 0.95), (h * 0.25, h * 0.3), *lamp)


def _construction_vehicle(b: Builder, l: float, w: float, h: float, rng: np.random.Generator, active: bool) -> None:
    yellow = ((0.75, 0.42, 0.02), (0.8, 0.55, 0.03), (0.7, 0.25, 0.02))[rng.integers(3)]
    y = w / 2
    for side in (-1, 1):
        b.frustum(
            (-l * 0.44, l * 0.2, side * y - 0.3 * (side > 0) * 2, side * y + 0.3 * (side < 0) * 2),
            (-l * 0.38, l * 0.14, side * y - 0.3 * (side > 0) * 2, side * y + 0.3 * (side < 0) * 2),
            0.0,
            h * 0.26,
            DARK,
            MATT,
        )
    b.box((-l * 0.5, l * 0.1), (-y * 0.8, y * 0.8), (h * 0.28, h * 0.56), yellow)
    b.box((-l * 0.51, -l * 0.34), (-y * 0.75, y * 0.75), (h * 0.3, h * 0.66), (0.12, 0.12, 0.12), MATT)
    b.frustum(
        (-l * 0.2, l * 0.08, y * 0.05, y * 0.75),
        (-l * 0.18, l * 0.04, y * 0.1, y * 0.7),
        h * 0.56,
        h * 0.88,
        WINDOW,
        GLASS,
    )
    b.box((-l * 0.2, l * 0.06), (y * 0.05, y * 0.75), (h * 0.88, h * 0.92), yellow)
    reach = rng.uniform(0.22, 0.34)
    b.bar((l * 0.02, -y * 0.3, h * 0.5), (l * reach, -y * 0.3, h * 0.97), h * 0.11, yellow)
    b.bar((l * reach, -y * 0.3, h * 0.97), (l * 0.44, -y * 0.3, h * 0.3), h * 0.09, yellow)
    b.frustum(
        (l * 0.36, l * 0.5, -y * 0.65, y * 0.05),
        (l * 0.4, l * 0.5, -y * 0.6, 0.0),
        h * 0.05,
        h * 0.3,
        (0.2, 0.19, 0.18),
        MATT,
    )
    b.box((-l * 0.1, -l * 0.06), (-y * 0.1, y * 0.0), (h * 0.88, h), AMBER_LAMP, LAMP)


def _rider(b: Builder, x: float, seat: float, h: float, rng: np.random.Generator, helmet: bool) -> None:
    clothes = tuple(rng.uniform(0.03, 0.6, 3))
    b.frustum((x - 0.2, x + 0.12, -0.2, 0.2), (x - 0.02, x + 0.2, -0.17, 0.17), seat, h * 0.84, clothes, MATT)
    for side in (-0.15, 0.15):
        b.bar((x, side, seat), (x + 0.3, side, seat * 0.55), 0.13, (0.05, 0.05, 0.09), MATT)
        b.bar((x + 0.3, side, seat * 0.55), (x + 0.12, side, 0.12), 0.11, (0.05, 0.05, 0.09), MATT)
        b.bar((x + 0.1, side * 1.2, h * 0.78), (x + 0.5, side * 1.4, h * 0.62), 0.09, clothes, MATT)
    head = tuple(rng.uniform(0.1, 0.8, 3)) if helmet else (0.45, 0.28, 0.2)
    b.box((x + 0.0, x + 0.22), (-0.1, 0.1), (h * 0.86, h), head, SKIN)


def _motorcycle(b: Builder, l: float, w: float, h: float, rng: np.random.Generator, active: bool) -> None:
    paint = _paint(rng)
    top = h * 0.72 if active else h
    for x in (-l * 0.34, l * 0.34):
        b.wheel(x, 0.0, 0.31, 0.15)
    b.frustum((-l * 0.3, l * 0.25, -0.16, 0.16), (-l * 0.15, l * 0.22, -0.2, 0.2), top * 0.28, top * 0.72, paint)
    b.box((-l * 0.42, -l * 0.05), (-0.13, 0.13), (top * 0.66, top * 0.76), DARK, MATT)
    b.bar((l * 0.34, 0.0, 0.3), (l * 0.2, 0.0, top * 0.95), 0.09, (0.4, 0.4, 0.4))
    b.bar((l * 0.2, -w / 2, top * 0.96), (l * 0.2, w / 2, top * 0.96), 0.06, DARK, MATT)
    b.box(
        (l * 0.24, l * 0.3),
        (-0.09, 0.09),
        (top * 0.7, top * 0.85),
        WHITE_LAMP if active else (0.5, 0.5, 0.5),
        LAMP if active else PAINT,
    )
    b.box(
        (-l * 0.45, -l * 0.42),
        (-0.09, 0.09),
        (top * 0.6, top * 0.7),
        RED_LAMP if active else (0.3, 0.02, 0.02),
        LAMP if active else PAINT,
    )
    if active:
        _rider(b, -l * 0.12, top * 0.75, h, rng, True)


def _bicycle(b: Builder, l: float, w: float, h: float, rng: np.random.Generator, active: bool) -> None:
    paint = tuple(rng.uniform(0.03, 0.7, 3))
    top = h * 0.66 if active else h
    for x in (-l * 0.3, l * 0.3):
        b.wheel(x, 0.0, 0.33, 0.06, (0.03, 0.03, 0.03))
        b.wheel(x, 0.0, 0.05, 0.1, (0.6, 0.6, 0.6))
    for start, end in (
        ((-l * 0.3, 0, 0.33), (-l * 0.1, 0, top * 0.8)),
        ((-l * 0.1, 0, top * 0.75), (l * 0.2, 0, top * 0.8)),
        ((-l * 0.05, 0, 0.3), (l * 0.2, 0, top * 0.75)),
        ((l * 0.3, 0, 0.33), (l * 0.19, 0, top)),
        ((-l * 0.1, 0, top * 0.9), (-l * 0.04, 0, 0.3)),
    ):
        b.bar(start, end, 0.06, paint)
    b.bar((l * 0.19, -w / 2, top), (l * 0.19, w / 2, top), 0.05, DARK, MATT)
    b.box((-l * 0.2, -l * 0.04), (-0.07, 0.07), (top * 0.86, top * 0.92), DARK, MATT)
    if active:
        _rider(b, -l * 0.12, top * 0.9, h, rng, rng.random() < 0.5)


def _pedestrian(b: Builder, l: float, w: float, h: float, rng: np.random.Generator, active: bool) -> None:
    top, trousers = tuple(rng.uniform(0.03, 0.75, 3)), tuple(rng.uniform(0.02, 0.3, 3))
    skin = (0.5, 0.33, 0.25) if rng.random() < 0.6 else (0.22, 0.13, 0.09)
    stride = l * 0.3 if active else l * 0.08
    b.bar((0, -0.1, h * 0.5), (stride, -0.1, 0.0), 0.15, trousers, MATT)
    b.bar((0, 0.1, h * 0.5), (-stride, 0.1, 0.0), 0.15, trousers, MATT)
    b.frustum((-0.11, 0.11, -0.17, 0.17), (-0.13, 0.13, -0.23, 0.23), h * 0.48, h * 0.84, top, MATT)
    swing = stride * 0.8
    b.bar((0, -0.27, h * 0.82), (-swing, -0.3, h * 0.48), 0.09, top, MATT)
    b.bar((0, 0.27, h * 0.82), (swing, 0.3, h * 0.48), 0.09, top, MATT)
    b.box((-0.1, 0.11), (-0.09, 0.09), (h * 0.86, h * 0.97), skin, SKIN)
    b.box((-0.12, 0.06), (-0.1, 0.1), (h * 0.93, h), tuple(rng.uniform(0.01, 0.25, 3)), MATT)


def _traffic_cone(b: Builder, l: float, w: float, h: float, rng: np.random.Generator, active: bool) -> None:
    orange, white = (0.85, 0.18, 0.02), (0.85, 0.85, 0.85)
    b.box((-l / 2, l / 2), (-w / 2, w / 2), (0.0, h * 0.05), (0.1, 0.08, 0.08), MATT)
    levels = [0.05, 0.35, 0.5, 0.65, 0.8, 1.0]
    for i, colour in enumerate((orange, white, orange, white, orange)):
        r0, r1 = (l * (0.4 - 0.34 * z) for z in levels[i : i + 2])
        b.frustum((-r0, r0, -r0, r0), (-r1, r1, -r1, r1), levels[i] * h, levels[i + 1] * h, colour, MATT)


def _barrier(b: Builder, l: float, w: float, h: float, rng: np.random.Generator, active: bool) -> None:
    stripes = ((0.75, 0.05, 0.04), (0.85, 0.85, 0.85)) if rng.random() < 0.6 else ((0.85, 0.3, 0.02), (0.8, 0.8, 0.78))
    for side in (-0.4, 0.4):
        b.box((-l / 2, l / 2), (side * w - 0.08, side * w + 0.08), (0.0, h * 0.1), DARK, MATT)
        b.box((-0.05, 0.05), (side * w - 0.05, side * w + 0.05), (0.0, h * 0.6), (0.3, 0.3, 0.3), MATT)
    for i in range(8):
        y0 = -w / 2 + i * w / 8
        b.box((-0.06, 0.06), (y0, y0 + w / 8), (h * 0.3, h * 0.58), stripes[i % 2], MATT)
        b.box((-0.06, 0.06), (y0, y0 + w / 8), (h * 0.7, h), stripes[(i + 1) % 2], MATT)


BUILDERS: dict[str, Callable[[Builder, float, float, float, np.random.Generator, bool], None]] = {
    "car": _car,
    "truck": _truck,
    "construction_vehicle": _construction_vehicle,
    "bus": _bus,
    "trailer": _trailer,
    "barrier": _barrier,
    "motorcycle": _motorcycle,
    "bicycle": _bicycle,
    "pedestrian": _pedestrian,
    "traffic_cone": _traffic_cone,
}


def draw_size(name: str, rng: np.random.Generator) -> tuple[float, float, float]:
    """A length, width and height in metres for the class; the three vary together, and each a little on its own."""
    length, width, height, spread = CLASSES[name]
    common = np.clip(rng.normal(1.0, spread), 1 - 2 * spread, 1 + 2 * spread)
    own = np.clip(rng.normal(1.0, 0.03, 3), 0.93, 1.07)
    return length * common * own[0], width * common**0.5 * own[1], height * common**0.5 * own[2]


def build(name: str, size: tuple[float, float, float], rng: np.random.Generator, active: bool) -> Mesh:
    """The mesh of one object. `active`: moving, so its lamps are lit, its rider is on, its legs stride."""
    builder = Builder()
    BUILDERS[name](builder, *size, rng, active)
    return builder.mesh(*size)
