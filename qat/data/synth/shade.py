"""Turns ray hits into an 8-bit image: light, weather, textures, sensor.

All colours are linear RGB until the camera's response (gamma 2.2) at the end. Diffuse shading is Lambert's law; the
fog is Beer-Lambert's.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from qat.data.synth.cast import Caster
from qat.data.synth.catalogue import FACADE, FOLIAGE, GLASS, GROUND, LAMP, PAINT
from qat.data.synth.world import LANE_WIDTH, PARKING_WIDTH, Street

WEATHERS = ("clear", "overcast", "dusk", "night", "rain", "fog")


@dataclass(frozen=True)
class Light:
    """One scene's light, weather and camera response."""

    weather: str
    sun_direction: np.ndarray
    sun: np.ndarray
    ambient: np.ndarray
    zenith: np.ndarray
    horizon: np.ndarray
    fog: float
    headlights: float
    wet: float
    exposure: float
    white_balance: np.ndarray
    noise: float

    @staticmethod
    def sample(rng: np.random.Generator) -> Light:
        """Draws a random weather and the strength of its parts."""
        weather = WEATHERS[rng.choice(6, p=[0.36, 0.22, 0.12, 0.12, 0.1, 0.08])]
        elevation = np.deg2rad(
            {"clear": rng.uniform(22, 65), "dusk": rng.uniform(6, 16)}.get(weather, rng.uniform(30, 60))
        )
        azimuth = rng.uniform(-np.pi, np.pi)
        direction = np.array(
            [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
        )
        sun, ambient, zenith, horizon = {
            "clear": ((1.5, 1.4, 1.2), (0.42, 0.5, 0.65), (0.13, 0.3, 0.75), (0.65, 0.75, 0.9)),
            "overcast": ((0.25, 0.25, 0.25), (0.75, 0.78, 0.82), (0.55, 0.58, 0.62), (0.75, 0.77, 0.8)),
            "dusk": ((1.2, 0.7, 0.35), (0.3, 0.28, 0.35), (0.12, 0.15, 0.35), (0.8, 0.45, 0.25)),
            "night": ((0.05, 0.05, 0.07), (0.10, 0.10, 0.13), (0.01, 0.012, 0.03), (0.05, 0.045, 0.05)),
            "rain": ((0.1, 0.1, 0.1), (0.5, 0.54, 0.58), (0.35, 0.38, 0.42), (0.5, 0.52, 0.55)),
            "fog": ((0.15, 0.15, 0.15), (0.7, 0.72, 0.74), (0.66, 0.68, 0.7), (0.7, 0.72, 0.74)),
        }[weather]
        strength = rng.uniform(0.75, 1.25)
        fog = {"fog": rng.uniform(0.012, 0.03), "rain": rng.uniform(0.003, 0.008)}.get(
            weather, rng.uniform(0.0003, 0.0015)
        )
        night = weather == "night"
        return Light(
            weather=weather,
            sun_direction=direction.astype(np.float32),
            sun=np.float32(strength) * np.asarray(sun, np.float32),
            ambient=np.float32(strength) * np.asarray(ambient, np.float32),
            zenith=np.asarray(zenith, np.float32),
            horizon=np.asarray(horizon, np.float32),
            fog=float(fog),
            headlights=rng.uniform(4, 8) if night else (1.5 if weather == "dusk" else 0.0),
            wet=float(rng.uniform(0.5, 1) if weather == "rain" else 0.0),
            exposure=float(rng.uniform(0.75, 1.25) * (2.0 if night else 1.0)),
            white_balance=rng.uniform(0.92, 1.08, 3).astype(np.float32),
            noise=float(rng.uniform(0.004, 0.01) * (2.5 if night else 1.0)),
        )


def _hash(x: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """A lattice hash in [0, 1), float32, of integer coordinates (integer mixing after Wang)."""
    h = x.astype(np.uint32) * np.uint32(374761393) + y.astype(np.uint32) * np.uint32(668265263) + np.uint32(seed)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(1274126177)
    return ((h ^ (h >> np.uint32(16))) & np.uint32(0xFFFF)).astype(np.float32) * np.float32(1 / 65536)


def _noise(x: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """Value noise in [0, 1): the lattice hash, bilinearly interpolated."""
    xi, yi = np.floor(x), np.floor(y)
    fx, fy = (x - xi).astype(np.float32), (y - yi).astype(np.float32)
    xi, yi = xi.astype(np.int32), yi.astype(np.int32)
    a = _hash(xi, yi, seed) * (1 - fx) + _hash(xi + 1, yi, seed) * fx
    b = _hash(xi, yi + 1, seed) * (1 - fx) + _hash(xi + 1, yi + 1, seed) * fx
    return a * (1 - fy) + b * fy


def _ground(p: np.ndarray, street: Street, wet: float) -> np.ndarray:
    """Asphalt, markings, parking strip, kerb, pavement, grass. p: float32[M,3] → float32[M,3]."""
    x, y = p[:, 0], p[:, 1]
    ay = np.abs(y)
    road_edge = street.lanes * LANE_WIDTH
    cross = np.full(len(p), np.inf, np.float32) if street.cross_x is None else np.abs(x - np.float32(street.cross_x))
    grain = 0.6 * _noise(x * 1.3, y * 1.3, street.seed) + 0.4 * _noise(x * 6, y * 6, street.seed + 1)
    asphalt = 0.09 + 0.06 * grain
    colour = np.stack([asphalt, asphalt, asphalt * 1.03], 1)
    on_cross = cross < 4.5
    parking = (ay > road_edge) & (ay < street.kerb) & ~on_cross
    colour[parking] *= 1.35
    pavement = (ay >= street.kerb) & (ay < street.frontage) & ~on_cross
    slab = ((np.floor(x[pavement] / 1.2) + np.floor(y[pavement] / 1.2)) % 2) * 0.05
    joint = (np.mod(x[pavement], 1.2) < 0.06) | (np.mod(y[pavement], 1.2) < 0.06)
    tone = 0.30 + slab + 0.1 * grain[pavement] - 0.12 * joint
    colour[pavement] = np.stack([tone * 1.02, tone, tone * 0.95], 1)
    kerb = (np.abs(ay - street.kerb) < 0.12) & ~on_cross
    colour[kerb] = (0.5, 0.5, 0.48)
    beyond = (ay >= street.frontage) & ~on_cross
    if street.grass:
        g = grain[beyond]
        colour[beyond] = np.stack([0.06 + 0.08 * g, 0.12 + 0.14 * g, 0.03 + 0.04 * g], 1)
    else:
        colour[beyond] *= 1.8
    white = np.zeros(len(p), bool)
    lanes = ay / LANE_WIDTH
    dash = np.mod(x, 9.0) < 3.0
    inside = (np.round(lanes) < street.lanes) & (np.round(lanes) > 0)
    white |= (np.abs(lanes - np.round(lanes)) * LANE_WIDTH < 0.08) & inside & dash
    white |= np.abs(ay - road_edge) < 0.07
    white |= (np.abs(ay - (road_edge + PARKING_WIDTH / 2)) < PARKING_WIDTH / 2) & (np.mod(x, 6.5) < 0.1)
    white &= ~on_cross
    yellow = (np.abs(ay - 0.15) < 0.06) & ~on_cross
    zebra = (np.abs(cross - 6.5) < 1.4) & (np.mod(y, 1.0) < 0.5) & (ay < street.kerb)
    wear = (0.55 + 0.45 * grain)[:, None]
    colour[white | zebra] = (np.array([0.75, 0.75, 0.72]) * wear)[white | zebra]
    colour[yellow] = (np.array([0.65, 0.45, 0.05]) * wear)[yellow]
    return (colour * (1 - 0.5 * wet)).astype(np.float32)


def _facade(p: np.ndarray, n: np.ndarray, base: np.ndarray, night: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows, floors and bricks on walls. Returns colour float32[M,3] and emitted light float32[M,3]."""
    along = np.where(np.abs(n[:, 0]) > np.abs(n[:, 1]), p[:, 1], p[:, 0])
    up = p[:, 2]
    column, storey = np.floor(along / 2.6), np.floor(up / 3.1)
    u, v = along / 2.6 - column, up / 3.1 - storey
    wall = np.abs(n[:, 2]) < 0.5
    window = wall & (u > 0.25) & (u < 0.75) & (v > 0.3) & (v < 0.8)
    brick = 0.88 + 0.12 * ((np.mod(up, 0.25) > 0.04) & (np.mod(along + 0.3 * np.floor(up / 0.25), 0.6) > 0.05))
    dirt = 0.8 + 0.35 * _noise(along * 0.5, up * 0.5, seed)
    colour = base * (brick * dirt)[:, None]
    rnd = _hash(column.astype(np.int32), storey.astype(np.int32), seed)
    colour[window] = (0.05 + 0.10 * rnd[window])[:, None] * np.array([0.9, 1.0, 1.1])
    glow = np.zeros_like(colour)
    if night:
        lit = window & (rnd > 0.6)
        glow[lit] = np.array([0.5, 0.4, 0.22]) * rnd[lit][:, None]
    return colour.astype(np.float32), glow.astype(np.float32)


def _sky(directions: np.ndarray, light: Light, seed: int) -> np.ndarray:
    up = np.clip(directions[:, 2], 0.0, 1.0)
    t = np.sqrt(up)[:, None]
    colour = light.horizon * (1 - t) + light.zenith * t
    if light.weather in ("clear", "dusk"):
        scale = 1.0 / np.maximum(up, 0.05)
        cloud = np.clip(2.2 * _noise(directions[:, 0] * scale * 1.5, directions[:, 1] * scale * 1.5, seed) - 1.1, 0, 1)
        colour = colour + (light.horizon - colour) * (0.7 * cloud * np.clip(up * 8, 0, 1))[:, None]
        glare = np.clip(directions @ light.sun_direction, 0, 1) ** 64
        colour = colour + 0.6 * glare[:, None] * light.sun
    return colour.astype(np.float32)


def shade(
    caster: Caster,
    colours: np.ndarray,
    materials: np.ndarray,
    street: Street,
    light: Light,
    origin: np.ndarray,
    forward: np.ndarray,
    directions: np.ndarray,
    hit: np.ndarray,
    distance: np.ndarray,
    shape: tuple[int, int],
    rng: np.random.Generator,
) -> np.ndarray:
    """Colours the camera's rays and passes them through its response.

    directions: float32[H*W,3] in the street frame; hit, distance: results of `Caster.nearest` for them;
    colours, materials: per triangle. Returns uint8[H,W,3], sRGB-like.
    """
    image = np.empty((len(directions), 3), np.float32)
    miss = hit < 0
    image[miss] = _sky(directions[miss], light, street.seed)
    seen = np.flatnonzero(~miss)
    triangle, d = hit[seen], directions[seen]
    t = distance[seen][:, None]
    p = origin.astype(np.float32) + d * t
    n = caster.normals[triangle]
    facing = (n * d).sum(1)
    n = np.where(facing[:, None] > 0, -n, n)
    base = colours[triangle].copy()
    material = materials[triangle]
    glow = np.zeros_like(base)
    night = light.weather in ("night", "dusk")

    ground = material == GROUND
    base[ground] = _ground(p[ground], street, light.wet)
    facade = material == FACADE
    base[facade], glow[facade] = _facade(p[facade], n[facade], base[facade], night, street.seed)
    leaves = material == FOLIAGE
    q = p[leaves]
    base[leaves] *= (0.4 + 1.2 * _noise(q[:, 0] * 3 + q[:, 2] * 2, q[:, 1] * 3 + q[:, 2], street.seed))[:, None]

    # One shadow ray per pixel: towards the sun if there is one, otherwise a random one into the sky (ambient occlusion).
    sunny = light.weather in ("clear", "dusk")
    if sunny:
        towards = np.broadcast_to(light.sun_direction, n.shape)
    else:
        jitter = rng.normal(0, 0.55, n.shape).astype(np.float32)
        towards = n + np.array([0, 0, 0.8], np.float32) + jitter
        towards = towards / np.linalg.norm(towards, axis=1, keepdims=True)
    shadow = np.zeros(shape, np.float32).reshape(-1)
    shadow[seen] = caster.blocked(p + n * 0.01, np.ascontiguousarray(towards, np.float32))
    size = 3 if sunny else 7  # soft edges; and the random rays of neighbours averaged
    shadow = np.asarray(cv2.blur(shadow.reshape(shape), (size, size)), np.float32).reshape(-1)[seen][:, None]
    lambert = np.clip(n @ light.sun_direction, 0, None)[:, None]
    sky_part = 0.62 + 0.38 * n[:, 2:3]
    if sunny:
        irradiance = light.ambient * sky_part + light.sun * lambert * (1 - shadow)
    else:
        irradiance = (light.ambient * sky_part + light.sun * lambert) * (1 - 0.55 * shadow)
    if light.headlights > 0:
        ahead = np.clip(((d @ forward.astype(np.float32)) - 0.75) / 0.25, 0, 1)[:, None]
        irradiance = irradiance + light.headlights * ahead * np.clip(-facing, 0.1, 1)[..., None].clip(0.1) / (
            1 + (t / 9) ** 2
        )
        irradiance = irradiance + light.headlights * 0.03 * np.array([1.0, 0.85, 0.6], np.float32)  # street lamps
    colour = base * irradiance + glow
    shiny = (material == PAINT) | (material == GLASS)
    if light.wet > 0:
        shiny |= ground
    r = d[shiny] - 2 * (d[shiny] * n[shiny]).sum(1, keepdims=True) * n[shiny]
    fresnel = (0.04 + 0.5 * (1 - np.clip(-(d[shiny] * n[shiny]).sum(1), 0, 1)) ** 4)[:, None]
    colour[shiny] += (
        fresnel * (light.horizon + (light.zenith - light.horizon) * np.clip(r[:, 2:3], 0, 1)) * (r[:, 2:3] > 0)
    )
    lamp = material == LAMP
    colour[lamp] = base[lamp] * (1.6 if not night else 2.2)
    fade = np.exp(-light.fog * t)
    image[seen] = colour * fade + light.horizon * (1 - fade)

    height, width = shape
    image = image.reshape(height, width, 3) * (light.exposure * light.white_balance)
    v, u = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    image *= (1 - 0.12 * (u**2 + v**2))[..., None].astype(np.float32)
    image = image / (1 + 0.25 * image)  # a soft shoulder instead of hard clipping
    image = np.clip(image, 0, 1) ** np.float32(1 / 2.2)
    image += rng.normal(0, light.noise, image.shape).astype(np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
