"""A street with its fixed and moving objects.

The street's frame: x along the road, y left, z up, metres. Traffic keeps right, so lanes at y < 0 drive towards
+x. A random rigid transform takes the street into nuScenes' global frame.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qat.data.synth.catalogue import FACADE, FOLIAGE, GROUND, LAMP, STATIC, Builder, Mesh, build, draw_size
from qat.data.synth.rig import pose, rotation_z

LANE_WIDTH = 3.5
PARKING_WIDTH = 2.7
PAVEMENT_WIDTH = 3.6
HALF_LENGTH = 130.0


@dataclass
class Thing:
    """One annotated object: its class, size (length, width, height), place at time 0 and constant velocity."""

    name: str
    size: tuple[float, float, float]
    position: np.ndarray
    yaw: float
    speed: float
    attribute: str
    mesh: Mesh

    def at(self, time: float) -> np.ndarray:
        """The centre of its bottom face at `time` seconds, float64[3]."""
        return self.position + time * self.speed * np.array([np.cos(self.yaw), np.sin(self.yaw), 0.0])

    def triangles(self, time: float) -> np.ndarray:
        """Its mesh in the street frame at `time`, float32[T,3,3]."""
        rotation = rotation_z(self.yaw).astype(np.float32)
        return self.mesh.triangles @ rotation.T + self.at(time).astype(np.float32)


@dataclass
class Street:
    """Layout for the ground's texture: lanes, parking strips, pavements and the cross street."""

    lanes: int
    cross_x: float | None
    grass: bool
    seed: int

    @property
    def kerb(self) -> float:
        """|y| of the kerb."""
        return self.lanes * LANE_WIDTH + PARKING_WIDTH

    @property
    def frontage(self) -> float:
        """|y| at which the pavement ends."""
        return self.kerb + PAVEMENT_WIDTH


@dataclass
class World:
    """One scene: the street, its fixed geometry, the things on it and the ego car's motion."""

    street: Street
    fixed: Mesh
    things: list[Thing]
    ego_start: np.ndarray
    ego_speed: float
    ego_yaw: float
    street2global: np.ndarray
    times: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def ego2street(self, time: float) -> np.ndarray:
        """The ego pose at `time` seconds, float64[4,4]."""
        heading = np.array([np.cos(self.ego_yaw), np.sin(self.ego_yaw), 0.0])
        return pose(rotation_z(self.ego_yaw), self.ego_start + time * self.ego_speed * heading)


def _corners(position: np.ndarray, yaw: float, length: float, width: float) -> np.ndarray:
    c, s = np.cos(yaw), np.sin(yaw)
    half = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) * np.array([length / 2, width / 2])
    return half @ np.array([[c, s], [-s, c]]) + position[:2]


def _separated(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two convex quadrilaterals are apart (separating axis theorem). float64[4,2] each."""
    for polygon in (a, b):
        for i in range(2):
            edge = polygon[i + 1] - polygon[i]
            axis = np.array([-edge[1], edge[0]])
            pa, pb = a @ axis, b @ axis
            if pa.max() < pb.min() or pb.max() < pa.min():
                return True
    return False


class _Placer:
    """Accepts things that do not overlap accepted ones at any of the scene's times."""

    def __init__(self, rng: np.random.Generator, times: np.ndarray, ego: World) -> None:
        self.rng = rng
        self.times = times
        self.things: list[Thing] = []
        self._tracks = [
            np.stack([_corners(ego.ego2street(t)[:3, 3] + [1.3, 0, 0], ego.ego_yaw, 6.0, 2.6) for t in times])
        ]
        self._radii = [3.3]

    def put(
        self,
        name: str,
        x: float,
        y: float,
        yaw: float,
        speed: float = 0.0,
        attribute: str = "",
        active: bool | None = None,
        margin: float = 0.3,
    ) -> bool:
        """Builds and accepts the thing if its place is free; returns whether it did."""
        rng = self.rng
        size = draw_size(name, rng)
        position = np.array([x, y, 0.0])
        heading = np.array([np.cos(yaw), np.sin(yaw), 0.0])
        track = np.stack(
            [_corners(position + t * speed * heading, yaw, size[0] + margin, size[1] + margin) for t in self.times]
        )
        radius = float(np.hypot(size[0], size[1]) / 2 + margin)
        centres = track.mean(1)
        for other, other_radius in zip(self._tracks, self._radii, strict=True):
            near = np.linalg.norm(centres - other.mean(1), axis=1) < radius + other_radius
            if any(not _separated(track[i], other[i]) for i in np.flatnonzero(near)):
                return False
        self._tracks.append(track)
        self._radii.append(radius)
        mesh = build(name, size, rng, speed > 0 if active is None else active)
        self.things.append(Thing(name, size, position, yaw, speed, attribute, mesh))
        return True


VEHICLE_MIX = (("car", 0.56), ("truck", 0.14), ("bus", 0.11), ("trailer", 0.10), ("motorcycle", 0.09))


def _choose(rng: np.random.Generator, mix: tuple[tuple[str, float], ...]) -> str:
    weights = np.array([w for _, w in mix])
    return mix[rng.choice(len(mix), p=weights / weights.sum())][0]


def _traffic(placer: _Placer, street: Street, ego_lane: int, ego_speed: float, jam: bool) -> None:
    rng = placer.rng
    for direction in (-1, 1):
        for lane in range(street.lanes):
            y = direction * (lane + 0.5) * LANE_WIDTH
            yaw = 0.0 if direction < 0 else np.pi
            own = direction < 0 and lane == ego_lane
            speed = ego_speed if own else (0.0 if jam and rng.random() < 0.7 else rng.uniform(3, 13))
            x = -75.0 + rng.uniform(0, 15)
            while x < 75:
                name = _choose(rng, VEHICLE_MIX)
                attribute = "vehicle.moving" if speed > 0 else "vehicle.stopped"
                if name == "motorcycle":
                    attribute = "cycle.with_rider"
                offset, tilt = rng.normal(0, 0.25), rng.normal(0, 0.02)
                if name == "trailer":  # pulled by a truck
                    step = 12.0 if direction < 0 else -12.0
                    placer.put("truck", x + step * 0.88, y + offset, yaw, speed, attribute)
                placer.put(name, x, y + offset, yaw + tilt, speed, attribute, True)
                x += 14 + rng.exponential(12 if speed > 0 else 4)


def _kerbside(placer: _Placer, street: Street, work: tuple[float, float, int] | None) -> None:
    rng = placer.rng
    for side in (-1, 1):
        yaw = 0.0 if side < 0 else np.pi
        y = side * (street.kerb - PARKING_WIDTH / 2)
        occupancy = rng.uniform(0.25, 0.85)
        angled = rng.random() < 0.2
        x = -60.0 + rng.uniform(0, 8)
        while x < 60:
            in_work = work is not None and side == work[2] and work[0] - 4 < x < work[1] + 4
            at_cross = street.cross_x is not None and abs(x - street.cross_x) < 9
            if not in_work and not at_cross and rng.random() < occupancy:
                name = _choose(
                    rng,
                    (
                        ("car", 0.74),
                        ("truck", 0.09),
                        ("trailer", 0.05),
                        ("bus", 0.04),
                        ("motorcycle", 0.05),
                        ("bicycle", 0.03),
                    ),
                )
                tilt = rng.normal(0, 0.03) + (np.pi if rng.random() < 0.1 else 0.0)
                if name in ("motorcycle", "bicycle"):
                    placer.put(name, x, y, rng.uniform(-np.pi, np.pi), 0.0, "cycle.without_rider", False)
                elif angled and name == "car":
                    placer.put(name, x, y + side * 1.2, side * np.deg2rad(60) + tilt, 0.0, "vehicle.parked", False)
                else:
                    placer.put(name, x, y, yaw + tilt, 0.0, "vehicle.parked", False)
            x += (3.6 if angled else 6.6) + rng.exponential(1.2) + (4 if rng.random() < 0.1 else 0)


def _work_zone(placer: _Placer, street: Street, work: tuple[float, float, int]) -> None:
    rng = placer.rng
    start, end, side = work
    y = side * (street.kerb - PARKING_WIDTH / 2)
    inner = side * (street.kerb - PARKING_WIDTH - 0.2)
    for _ in range(rng.integers(1, 3)):
        placer.put(
            "construction_vehicle",
            rng.uniform(start + 4, end - 4),
            y + side * rng.uniform(0, 2.5),
            rng.uniform(-np.pi, np.pi),
            0.0,
            "vehicle.parked",
            False,
        )
    x = start
    barriers = rng.random() < 0.75
    while x < end:
        if barriers and rng.random() < 0.8:  # a barrier's long side is its width: turned along the road
            placer.put(
                "barrier", x, inner, np.pi / 2 + rng.normal(0, 0.06) + (np.pi if rng.random() < 0.5 else 0), margin=0.05
            )
            x += rng.uniform(2.7, 3.6)
        else:
            placer.put("traffic_cone", x, inner + rng.normal(0, 0.15), rng.uniform(-np.pi, np.pi))
            x += rng.uniform(1.5, 3.5)
    for x in (start - 1, end + 1):
        for k in range(3):
            kind = "barrier" if rng.random() < 0.4 else "traffic_cone"
            placer.put(kind, x + 0.4 * k, y + side * (k - 1) * 1.3, rng.normal(0, 0.1), margin=0.05)
    for _ in range(rng.integers(0, 4)):
        placer.put(
            "pedestrian",
            rng.uniform(start, end),
            y + rng.uniform(-1, 1),
            rng.uniform(-np.pi, np.pi),
            0.0,
            "pedestrian.standing",
        )


def _people(placer: _Placer, street: Street) -> None:
    rng = placer.rng
    for _ in range(rng.integers(8, 30)):
        side = rng.choice((-1, 1))
        y = side * rng.uniform(street.kerb + 0.5, street.frontage - 0.3)
        x = rng.uniform(-50, 50)
        if rng.random() < 0.65:
            yaw = rng.choice((0.0, np.pi)) + rng.normal(0, 0.25)
            group = rng.integers(1, 3)
            for k in range(group):
                placer.put(
                    "pedestrian", x, y + 0.8 * k * -side, yaw, rng.uniform(0.7, 1.7), "pedestrian.moving", margin=0.1
                )
        else:
            placer.put("pedestrian", x, y, rng.uniform(-np.pi, np.pi), 0.0, "pedestrian.standing", margin=0.1)
    for _ in range(rng.integers(0, 5)):  # crossing the road
        x = street.cross_x + rng.choice((-6.5, 6.5)) if street.cross_x is not None else rng.uniform(-40, 40)
        placer.put(
            "pedestrian",
            x + rng.normal(0, 0.7),
            rng.uniform(-street.kerb, street.kerb),
            rng.choice((-1, 1)) * np.pi / 2,
            rng.uniform(0.8, 1.8),
            "pedestrian.moving",
            margin=0.1,
        )


def _two_wheelers(placer: _Placer, street: Street) -> None:
    rng = placer.rng
    for _ in range(rng.integers(4, 11)):
        side = rng.choice((-1, 1))
        yaw = (0.0 if side < 0 else np.pi) + rng.normal(0, 0.06)
        name = "bicycle" if rng.random() < 0.7 else "motorcycle"
        if rng.random() < 0.55:
            y = side * (street.lanes * LANE_WIDTH - rng.uniform(0.2, 0.9))
            placer.put(name, rng.uniform(-45, 45), y, yaw, rng.uniform(2.5, 6.0), "cycle.with_rider", True)
        else:
            y = side * rng.uniform(street.kerb + 0.6, street.kerb + 1.6)
            placer.put(name, rng.uniform(-45, 45), y, rng.uniform(-np.pi, np.pi), 0.0, "cycle.without_rider", False)


def _cross_traffic(placer: _Placer, street: Street) -> None:
    if street.cross_x is None:
        return
    rng = placer.rng
    for direction in (-1, 1):  # waiting at the crossing, or driving away from it
        x = street.cross_x + direction * 1.9
        yaw = direction * np.pi / 2
        y = -direction * (street.frontage + rng.uniform(2.5, 5))
        for _ in range(rng.integers(0, 4)):
            placer.put(_choose(rng, VEHICLE_MIX[:3]), x, y, yaw + rng.normal(0, 0.02), 0.0, "vehicle.stopped", True)
            y -= direction * rng.uniform(9, 14)
        speed = rng.uniform(4, 10)
        y = direction * (street.frontage + rng.uniform(4, 10))
        for _ in range(rng.integers(0, 3)):
            placer.put(_choose(rng, VEHICLE_MIX), x, y, yaw + rng.normal(0, 0.02), speed, "vehicle.moving", True)
            y += direction * rng.uniform(13, 22)


def _scattered(placer: _Placer, street: Street) -> None:
    rng = placer.rng
    for _ in range(rng.integers(1, 5)):  # groups of cones and barriers away from any work zone
        x, side = rng.uniform(-35, 35), rng.choice((-1, 1))
        y = side * rng.uniform(street.kerb - 0.4, street.frontage)
        kind = "traffic_cone" if rng.random() < 0.6 else "barrier"
        yaw = rng.uniform(-np.pi, np.pi)
        for k in range(rng.integers(1, 6)):
            step = k * (1.6 if kind == "traffic_cone" else 2.9)
            placer.put(kind, x + step * -np.sin(yaw), y + step * np.cos(yaw) * 0.3, yaw, margin=0.05)
    if rng.random() < 0.25:
        side = rng.choice((-1, 1))
        placer.put(
            "construction_vehicle",
            rng.uniform(-40, 40),
            side * (street.frontage + rng.uniform(2.5, 6)),
            rng.uniform(-np.pi, np.pi),
            0.0,
            "vehicle.parked",
            False,
        )
    if rng.random() < 0.3:
        side = rng.choice((-1, 1))
        placer.put(
            "trailer",
            rng.uniform(-40, 40),
            side * (street.frontage + rng.uniform(3, 6)),
            rng.uniform(-0.2, 0.2),
            0.0,
            "vehicle.parked",
            False,
        )


def _fixed_geometry(street: Street, things: list[Thing], rng: np.random.Generator) -> Mesh:
    b = Builder()
    b.box((-400, 400), (-400, 400), (-1.0, 0.0), (0.2, 0.2, 0.2), GROUND)

    def free(x0: float, x1: float, y0: float, y1: float) -> bool:
        if street.cross_x is not None and x0 < street.cross_x + 9 and x1 > street.cross_x - 9:
            return False
        return not any(
            x0 - 4 < t.position[0] < x1 + 4 and min(y0, y1) - 4 < t.position[1] < max(y0, y1) + 4 for t in things
        )

    for side in (-1, 1):
        x = -HALF_LENGTH
        setback = 0.3 if not street.grass else rng.uniform(4, 12)
        while x < HALF_LENGTH:
            width = rng.uniform(9, 28)
            y0 = street.frontage + setback + rng.uniform(0, 2)
            depth, height = rng.uniform(8, 16), rng.uniform(4, 24)
            near, far = side * y0, side * (y0 + depth)
            if rng.random() < 0.8 and free(x, x + width, near, far):
                colour = tuple(
                    np.array(
                        [
                            (0.45, 0.22, 0.15),
                            (0.5, 0.47, 0.4),
                            (0.3, 0.32, 0.35),
                            (0.6, 0.5, 0.33),
                            (0.2, 0.22, 0.25),
                            (0.55, 0.55, 0.55),
                        ][rng.integers(6)]
                    )
                    * rng.uniform(0.6, 1.15)
                )
                b.box((x, x + width), (min(near, far), max(near, far)), (0.0, height), colour, FACADE)
            x += width + rng.uniform(0, 6 if not street.grass else 20)
        x = -70 + rng.uniform(0, 10)
        while x < 70:
            y = side * (street.kerb + rng.uniform(0.5, 0.9))
            clear = not any(
                np.hypot(t.position[0] - x, t.position[1] - y) < max(t.size[0], 1.5) for t in things if t.speed == 0
            )
            if clear and not (street.cross_x is not None and abs(x - street.cross_x) < 9):
                kind = rng.random()
                if kind < 0.5:
                    trunk, crown, r = rng.uniform(2.2, 3), rng.uniform(2.5, 4.5), rng.uniform(1.2, 2.2)
                    b.bar((x, y, 0), (x, y, trunk + 0.5), 0.28, (0.12, 0.08, 0.05), STATIC)
                    green = tuple(
                        np.array((0.06, 0.14, 0.03)) * rng.uniform(0.6, 1.8) + np.array([rng.uniform(0, 0.1), 0, 0])
                    )
                    b.frustum(
                        (x - r, x + r, y - r, y + r),
                        (x - r * 0.7, x + r * 0.7, y - r * 0.7, y + r * 0.7),
                        trunk,
                        trunk + crown * 0.7,
                        green,
                        FOLIAGE,
                    )
                    b.frustum(
                        (x - r * 0.7, x + r * 0.7, y - r * 0.7, y + r * 0.7),
                        (x - 0.1, x + 0.1, y - 0.1, y + 0.1),
                        trunk + crown * 0.7,
                        trunk + crown,
                        green,
                        FOLIAGE,
                    )
                elif kind < 0.8:
                    b.bar((x, y, 0), (x, y, 6.5), 0.16, (0.25, 0.25, 0.27), STATIC)
                    b.bar((x, y, 6.5), (x, y - side * 1.8, 6.7), 0.1, (0.25, 0.25, 0.27), STATIC)
                    b.box(
                        (x - 0.2, x + 0.2),
                        (y - side * 1.8 - 0.25, y - side * 1.8 + 0.25),
                        (6.55, 6.7),
                        (1.0, 0.85, 0.6),
                        LAMP,
                    )
                elif kind < 0.9:
                    b.bar((x, y, 0), (x, y, 2.4), 0.07, (0.4, 0.4, 0.4), STATIC)
                    b.box((x - 0.03, x + 0.03), (y - 0.3, y + 0.3), (2.0, 2.6), (0.1, 0.2, 0.6), STATIC)
                else:  # litter bins and hydrants: upright things other than cones
                    b.box(
                        (x - 0.25, x + 0.25), (y - 0.25, y + 0.25), (0, 0.95), tuple(rng.uniform(0.05, 0.4, 3)), STATIC
                    )
            x += rng.uniform(7, 14)
    return b.collected()


def sample_world(rng: np.random.Generator, times: np.ndarray) -> World:
    """Draws a scene. `times`: the keyframes' times in seconds, at which nothing may overlap."""
    lanes = int(rng.integers(1, 3))
    cross_x = float(rng.uniform(-30, 45)) if rng.random() < 0.45 else None
    street = Street(lanes, cross_x, bool(rng.random() < 0.4), int(rng.integers(2**31)))
    jam = rng.random() < 0.25
    ego_lane = int(rng.integers(lanes))
    ego_speed = 0.0 if (jam and rng.random() < 0.6) or rng.random() < 0.1 else float(rng.uniform(2, 11))
    yaw = float(rng.normal(0, 0.02))
    start = np.array([-0.5 * ego_speed * times[-1], -(ego_lane + 0.5) * LANE_WIDTH + rng.normal(0, 0.2), 0.0])
    street2global = pose(rotation_z(rng.uniform(-np.pi, np.pi)), np.array([*rng.uniform(145, 155, 2), 0.0]))
    world = World(street, Builder().collected(), [], start, ego_speed, yaw, street2global, times)

    placer = _Placer(rng, np.concatenate([times, times[:-1] + np.diff(times) / 2]) if len(times) > 1 else times, world)
    work = None
    if rng.random() < 0.6:
        begin = rng.uniform(-35, 25)
        work = (begin, begin + rng.uniform(12, 24), int(rng.choice((-1, 1))))
        _work_zone(placer, street, work)
    _traffic(placer, street, ego_lane, ego_speed, jam)
    _cross_traffic(placer, street)
    _kerbside(placer, street, work)
    _two_wheelers(placer, street)
    _scattered(placer, street)
    _people(placer, street)
    world.things = placer.things
    world.fixed = _fixed_geometry(street, placer.things, rng)
    return world
