"""Pictures of a lidar detector's boxes, without a display and without open3d: from above, and over a camera's image.

    draw(points, found, "boxes.png")
    draw(points, {"onnxruntime": found, "pytorch": expected}, "beside.png", image, lidar2img, classes)

Several sets of boxes are drawn side by side, each over the same points and the same image, and over the other sets' boxes in white:
where white shows, they differ.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from qat.boxes.detections import Detections
from qat.boxes.geometry import box_corners_bev
from qat.core.files import atomic_path
from qat.data.overlay import draw_boxes, draw_points

LONG, NARROWEST = 1000, 0.7  # pixels: a panel's longer side; and the shorter one's share of it, at least
MARGIN, BAR = 8, 34  # pixels: between panels, and of the line of text above each
FARTHEST, AROUND = (
    100.0,
    3.0,
)  # metres: no more than this is shown where no limits are given; of empty ground around what is shown
BACKGROUND, RING, TEXT, SENSOR = (16, 18, 24), (46, 50, 60), (225, 228, 235), (255, 90, 90)
OTHERS = (255, 255, 255)
# Light colours, for a dark ground; as many as nuScenes has classes.
PALETTE = [
    (86, 180, 255), (255, 159, 64), (94, 220, 120), (255, 99, 99), (196, 150, 255),
    (214, 160, 120), (255, 150, 220), (235, 235, 90), (70, 225, 235), (180, 200, 210),
]  # fmt: skip
FONT = cv2.FONT_HERSHEY_SIMPLEX
DIGITS = 4


def draw(
    points: np.ndarray,
    boxes: Detections | Mapping[str, Detections],
    path: str | Path,
    image: np.ndarray | None = None,
    lidar2img: np.ndarray | None = None,
    classes: Sequence[str] = (),
    score_thr: float = 0.0,
    limits: Sequence[float] | None = None,
) -> Path:
    """Writes a PNG, whole or not at all, and returns its path.

    Seen from above x points up and y to the left; with an image that axis points up along which the camera looks. The sensor is a cross,
    with rings around it every 10 or 20 m; points are light where they are high; a line goes from each box's middle to its front. Over
    the image the front's lower edge is thicker.

    Args:
        points: float[M,≥3] in metres, in the lidar's frame.
        boxes: one set, or several by their names.
        image: uint8[H,W,3] RGB. lidar2img: float[3 or 4,4], from the lidar's frame to its pixels times depth.
        classes: names of the labels, for the legend.
        score_thr: boxes that score less are not drawn; the text above a panel says how many there are.
        limits: lowest and highest x, y, z that are shown at most (a config's point_cloud_range). What the points, the boxes and the
            sensor do not reach is cut off.
    """
    sets = {"": boxes} if isinstance(boxes, Detections) else dict(boxes)
    ours = {name: found.converted() for name, found in sets.items()}
    seen = {name: found.chosen(found.scores >= score_thr) for name, found in ours.items()}
    quarters = 0 if image is None or lidar2img is None else _quarters(lidar2img)
    cloud, limits = _turned(points, quarters), _turned_limits(limits, quarters)
    shown = {name: _turned_boxes(found, quarters) for name, found in seen.items()}
    low, high = _limits(cloud, list(shown.values()), limits)
    scale = _scale(low, high)
    ground = _ground(cloud, low, high, scale)
    columns = []
    for name, found in shown.items():
        above = ground.copy()
        for other in shown.values():
            if other is not found:
                _draw_above(above, other, high, scale, OTHERS)
        _draw_above(above, found, high, scale)
        words = _words(name, len(ours[name]), len(found), score_thr)
        others = ", ".join(other for other in shown if other != name)
        parts = [_bar(above.shape[1], f"{words} (white: {others})" if others else words), above]
        if image is not None and lidar2img is not None:
            parts.append(np.full((MARGIN, above.shape[1], 3), BACKGROUND, np.uint8))
            parts.append(_over_image(image, lidar2img, points, seen[name], above.shape[1]))
        columns.append(np.concatenate(parts))
    gap = np.full((len(columns[0]), MARGIN, 3), RING, np.uint8)
    sheet = np.concatenate([part for column in columns for part in (gap, column)][1:], 1)
    labels = [label for found in shown.values() for label in found.labels.tolist()]
    sheet = np.concatenate([sheet, *_legend(sheet.shape[1], labels, classes)])
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "PNG")
    with atomic_path(Path(path)) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return Path(path)


def show(path: str | Path) -> bool:
    """Opens a picture in a window where there is a display; returns whether there is one."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    with Image.open(path) as picture:
        picture.show(title=str(path))
    return True


def _quarters(lidar2img: np.ndarray) -> int:
    """How many quarter turns a camera's view is turned from x: a pixel's depth grows along where it looks."""
    forward = np.asarray(lidar2img)[2]
    return round(float(np.arctan2(forward[1], forward[0])) / (np.pi / 2)) % 4


def _turned(rows: np.ndarray, quarters: int) -> np.ndarray:
    """x and y [M,≥2] in a frame that is turned by so many quarters; other columns are kept."""
    found = rows.copy()
    for _ in range(quarters):
        found[:, 0], found[:, 1] = found[:, 1].copy(), -found[:, 0]
    return found


def _turned_boxes(found: Detections, quarters: int) -> Detections:
    """The same of boxes in the convention `OURS`, whose yaw is clockwise."""
    boxes = _turned(found.boxes, quarters)
    boxes[:, 6] += quarters * np.pi / 2
    return replace(found, boxes=boxes)


def _turned_limits(limits: Sequence[float] | None, quarters: int) -> Sequence[float] | None:
    if limits is None:
        return None
    corners = _turned(np.array([limits[:3], limits[3:]], np.float64), quarters)
    return [*corners.min(0), *corners.max(0)]


def _limits(
    points: np.ndarray, sets: Sequence[Detections], limits: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest x and y that are shown, float64[2] each."""
    there = [np.zeros((1, 2)), points[np.isfinite(points[:, :3]).all(1), :2], *(found.boxes[:, :2] for found in sets)]
    most = np.array([[-FARTHEST] * 2, [FARTHEST] * 2]) if limits is None else np.array([limits[:2], limits[3:5]])
    reached = np.clip(np.concatenate(there).astype(np.float64), *most)
    low, high = reached.min(0) - AROUND, reached.max(0) + AROUND
    lacking = np.maximum(NARROWEST * (high - low).max() - (high - low), 0) / 2
    return low - lacking, high + lacking


def _scale(low: np.ndarray, high: np.ndarray) -> float:
    """Pixels a metre."""
    return float(LONG / (high - low).max())


def _pixels(places: np.ndarray, high: np.ndarray, scale: float) -> np.ndarray:
    """float64[...,2] of columns and rows: x up, y to the left."""
    return (high[::-1] - places[..., 1::-1]) * scale


def _ground(points: np.ndarray, low: np.ndarray, high: np.ndarray, scale: float) -> np.ndarray:
    """The panel without boxes, uint8[H,W,3]."""
    height, width = np.ceil((high - low) * scale).astype(int)
    panel = np.full((height, width, 3), BACKGROUND, np.uint8)
    middle = _pixels(np.zeros(2), high, scale)
    reach = float(np.abs([low, high]).max()) * 1.5
    every = 10 if reach < 80 else 20
    for metres in range(every, int(reach) + 1, every):
        at = (round(middle[0]), round(middle[1]))
        cv2.circle(panel, at, round(metres * scale), RING, 1, cv2.LINE_AA)
        for side in (1, -1):  # the number on the x axis, before or behind the sensor, where that is inside
            row = round(middle[1] - side * metres * scale)
            if 12 < row < height - 4 and 0 <= middle[0] < width:
                cv2.putText(panel, f"{metres} m", (at[0] + 4, row - 3), FONT, 0.36, (120, 126, 140), 1, cv2.LINE_AA)
                break
    seen = points[np.isfinite(points[:, :3]).all(1), :3].astype(np.float64)
    places = np.floor(_pixels(seen[:, :2], high, scale)).astype(int)
    inside = ((places >= 0) & (places < [width, height])).all(1)
    if inside.any():
        z, places = seen[inside, 2], places[inside]
        bottom, top = np.percentile(z, [2, 98])
        share = np.clip((z - bottom) / max(top - bottom, 0.1), 0, 1)
        order = np.argsort(share, kind="stable")  # what is high is drawn last
        colour = np.array([70.0, 84.0, 110.0]) + share[order, None] * np.array([150.0, 140.0, 110.0])
        for right, down in ((1, 1), (0, 1), (1, 0), (0, 0)):  # four pixels, a point's own over others' rims
            dots = np.minimum(places[order] + [right, down], [width - 1, height - 1])
            panel[dots[:, 1], dots[:, 0]] = colour.astype(np.uint8)
    cross = (round(middle[0]), round(middle[1]))
    cv2.drawMarker(panel, cross, SENSOR, cv2.MARKER_CROSS, 14, 2, cv2.LINE_AA)
    return panel


def _draw_above(
    panel: np.ndarray, found: Detections, high: np.ndarray, scale: float, colour: tuple[int, int, int] | None = None
) -> None:
    """The weakest box first, so that the surest is on top. colour: None for that of each label."""
    order = np.argsort(found.scores, kind="stable")
    for corners, label in zip(box_corners_bev(found.boxes[order]), found.labels[order], strict=True):
        own = PALETTE[int(label) % len(PALETTE)] if colour is None else colour
        rectangle = _fixed_point(_pixels(corners, high, scale))
        cv2.polylines(panel, [rectangle], True, own, 1, cv2.LINE_AA, DIGITS)
        front, centre = _fixed_point(_pixels(np.stack([corners[:2].mean(0), corners.mean(0)]), high, scale)).tolist()
        cv2.line(panel, centre, front, own, 1, cv2.LINE_AA, DIGITS)
        cv2.line(panel, rectangle[0].tolist(), rectangle[1].tolist(), own, 2, cv2.LINE_AA, DIGITS)


def _fixed_point(pixels: np.ndarray) -> np.ndarray:
    """As OpenCV draws between pixels: int32 with DIGITS binary digits behind the point."""
    return (np.clip(pixels, -1e4, 1e4) * (1 << DIGITS)).round().astype(np.int32)


def _over_image(
    image: np.ndarray, lidar2img: np.ndarray, points: np.ndarray, found: Detections, width: int
) -> np.ndarray:
    """The image, as wide as the panel."""
    matrix = np.eye(4)
    matrix[: len(lidar2img), : len(lidar2img[0])] = lidar2img
    resized = np.eye(4)
    resized[:2, :2] *= width / image.shape[1]
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    smaller = cv2.INTER_AREA if width < image.shape[1] else cv2.INTER_LINEAR
    canvas = cv2.resize(image, (width, height), interpolation=smaller)
    with_points = canvas.copy()
    draw_points(with_points, points, matrix, resized)
    canvas = cv2.addWeighted(canvas, 0.6, with_points, 0.4, 0.0)  # the picture stays visible below the points
    draw_boxes(canvas, found.boxes, found.labels, matrix, resized, PALETTE)
    return canvas


def _words(name: str, count: int, drawn: int, score_thr: float) -> str:
    boxes = f"{count} boxes" if drawn == count else f"{drawn} of {count} boxes, scores from {score_thr:g} on"
    return f"{name}: {boxes}" if name else boxes


def _bar(width: int, text: str) -> np.ndarray:
    bar = np.full((BAR, width, 3), BACKGROUND, np.uint8)
    size = 0.55
    while cv2.getTextSize(text, FONT, size, 1)[0][0] > width - 16 and size > 0.3:
        size -= 0.05
    cv2.putText(bar, text, (8, 23), FONT, size, TEXT, 1, cv2.LINE_AA)
    return bar


def _legend(width: int, labels: Sequence[int], classes: Sequence[str]) -> list[np.ndarray]:
    """Lines with each class that is drawn and its colour; none without classes or boxes."""
    lines: list[np.ndarray] = []
    x = width
    for label in sorted(set(labels)):
        if label >= len(classes):
            continue
        wide = 26 + cv2.getTextSize(classes[label], FONT, 0.45, 1)[0][0] + 18
        if x + wide > width:
            lines.append(np.full((26, width, 3), BACKGROUND, np.uint8))
            x = 8
        cv2.rectangle(lines[-1], (x, 7), (x + 14, 19), PALETTE[label % len(PALETTE)], -1)
        cv2.putText(lines[-1], classes[label], (x + 20, 18), FONT, 0.45, TEXT, 1, cv2.LINE_AA)
        x += wide
    return lines
