"""T4 data sets (tier4's form of nuScenes), read as one nuScenes data set: `{id}/{version}/{annotation, data}`, a scene each.

A root is a folder with one or many of them, or a YAML file beside them:

    train: [ID/0, ID]              # splits: an ID with a version, or alone for its newest one
    val: [ID]
    name_mapping: {police_car: car}    # categories → nuScenes' detection classes, besides NAMES
    class_ranges: {car: 121.0}         # metres within which a class is scored, of those that are not nuScenes'
    lidar: LIDAR_CONCAT                # the channel to read

What the devkit cannot read is brought into its form: several data sets have one set of tables; categories are nuScenes'; one attribute
an object at most; the lidar goes by LIDAR_TOP; map.json and lidarseg.json are not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.core.console import note
from qat.core.errors import UserError
from qat.core.files import read_json
from qat.data.tables import ATTRIBUTES, CATEGORIES, LIDAR

FOLDER = "annotation"
LIDARS = ("LIDAR_CONCAT", LIDAR)  # the first that a data set has
TABLES = (
    "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "sample", "sample_annotation",
    "sample_data", "scene", "sensor", "visibility",
)  # fmt: skip
SETTINGS = ("name_mapping", "class_ranges", "lidar")
DEFAULT_WIDTH = 5  # float32 values of a point, where nothing says otherwise
# Categories as data sets of several years name them, by the last word of theirs without what is in brackets.
NAMES = {
    **{name: name for name in CATEGORIES},
    "ambulance": "car",
    "police": "car",
    "police_car": "car",
    "emergency": "car",
    "forklift": "car",
    "kart": "car",
    "fire": "truck",
    "fire_truck": "truck",
    "tractor_unit": "truck",
    "construction": "construction_vehicle",
    "semi_trailer": "trailer",
    "motorcyclist": "motorcycle",
    "cyclist": "bicycle",
    "adult": "pedestrian",
    "child": "pedestrian",
    "construction_worker": "pedestrian",
    "personal_mobility": "pedestrian",
    "police_officer": "pedestrian",
    "stroller": "pedestrian",
    "wheelchair": "pedestrian",
    "trafficcone": "traffic_cone",
}


def _newest(folder: Path) -> Path | None:
    """The newest version of a data set's folder that has tables."""
    found = [p for p in folder.iterdir() if p.name.isdecimal() and (p / FOLDER / "sample_data.json").is_file()]
    return max(found, key=lambda path: int(path.name), default=None)


def find(root: Path) -> list[Path]:
    """The folders of the data sets below a root, each with its `annotation`; none where it is no T4 root."""
    if root.suffix in (".yaml", ".yml") and root.is_file():
        return _all(_splits(root, _settings(root)))
    if not root.is_dir():
        return []
    if (root / FOLDER / "sample_data.json").is_file():
        return [root]
    if (newest := _newest(root)) is not None:
        return [newest]
    several = (_newest(path) for path in sorted(root.iterdir()) if path.is_dir())
    return [path for path in several if path is not None]


def _settings(root: Path) -> dict[str, Any]:
    import yaml

    if not root.is_file():
        return {}
    try:
        found = yaml.safe_load(root.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{root}: found {str(error).splitlines()[0]}, expected YAML with splits") from error
    if not isinstance(found, dict):
        raise UserError(f"{root}: found {type(found).__name__}, expected splits: names with lists of data sets")
    mapping = found.get("name_mapping") or {}
    if unknown := [name for name in mapping.values() if name not in CATEGORIES]:
        raise UserError(
            f"{root}: name_mapping: found {unknown[0]!r}, expected nuScenes' classes: {', '.join(CATEGORIES)}"
        )
    ranges = found.get("class_ranges") or {}
    for name, value in ranges.items():
        if name not in CATEGORIES or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{root}: class_ranges: found {name}: {value!r}, expected metres for nuScenes' classes")
    return found


def _all(splits: Mapping[str, list[Path]]) -> list[Path]:
    return list(dict.fromkeys(path for paths in splits.values() for path in paths))


def _splits(root: Path, settings: Mapping[str, Any]) -> dict[str, list[Path]]:
    """The folders of each split of a YAML file."""
    found: dict[str, list[Path]] = {}
    for split, names in settings.items():
        if split in SETTINGS or not isinstance(names, list):
            continue
        found[split] = []
        for name in names:
            own = root.parent / str(name)
            folder = own if (own / FOLDER).is_dir() else _newest(own) if own.is_dir() else None
            if folder is None:
                raise UserError(f"{root}: {split}: found {name}, expected a T4 data set: {own} with VERSION/{FOLDER}")
            found[split].append(folder)
    if not found:
        raise UserError(f"{root}: found no splits, expected lists of data sets such as `val: [ID/0]`")
    return found


def class_of(category: str, names: Mapping[str, str]) -> str | None:
    """The detection class of a category, by its whole name or its last word; None where it has none."""
    plain = category.split(" (")[0].strip().lower()
    last = plain.split(".")[-1].replace(" ", "_")
    return next((names[word] for word in (category, plain, last) if word in names), None)


def _refers(key: str) -> bool:
    return key in ("token", "prev", "next") or key.endswith("_token") or key.endswith("_tokens")


def _named(value: Any, before: str) -> Any:
    if isinstance(value, list):
        return [_named(one, before) for one in value]
    return f"{before}{value}" if isinstance(value, str) and value else value


class T4Tables:
    """The tables of several data sets in nuScenes' form.

    root: their common folder, below which file names lie. folders: theirs. splits: names of scenes by split. ranges: metres by class.
    skipped: tokens of keyframes whose lidar is not valid.
    """

    def __init__(self, root: Path) -> None:
        settings = _settings(root)
        splits = _splits(root, settings) if root.is_file() else {}
        self.folders = _all(splits) or find(root)
        self.root = root.parent if root.is_file() else root
        names = {**NAMES, **(settings.get("name_mapping") or {})}
        self.ranges = {name: float(value) for name, value in (settings.get("class_ranges") or {}).items()}
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.skipped: set[str] = set()
        self.left_out: Counter[str] = Counter()
        scenes: dict[Path, list[str]] = {}
        for n, folder in enumerate(self.folders):
            before = f"{n}-" if len(self.folders) > 1 else ""
            self._add(folder, before, names, settings.get("lidar"))
            added = [record["name"] for record in self.tables["scene"]]
            scenes[folder] = added[sum(map(len, scenes.values())) :]
        self.splits = {split: [name for path in paths for name in scenes[path]] for split, paths in splits.items()}
        logs = [record["token"] for record in self.tables["log"]]
        self.tables["map"] = [{"token": "map", "log_tokens": logs, "category": "", "filename": ""}]
        if self.left_out:
            listed = ", ".join(f"{name} ({count})" for name, count in self.left_out.most_common(8))
            note(f"{root}: categories without a detection class, whose boxes are left out: {listed}; see name_mapping")
        if self.skipped:
            note(f"{root}: left out {len(self.skipped)} keyframes whose lidar is not valid")

    def _add(self, folder: Path, before: str, names: Mapping[str, str], wanted: str | None) -> None:
        tables = {name: _read(folder / FOLDER / f"{name}.json") for name in TABLES}
        channels = [record["channel"] for record in tables["sensor"]]
        lidar = next((name for name in ((wanted,) if wanted else LIDARS) if name in channels), None)
        if lidar is None:
            expected = wanted or " or ".join(LIDARS)
            raise UserError(f"{folder}: sensor.json: found {', '.join(map(str, channels))}, expected {expected}")
        for record in tables["sensor"]:
            if record["channel"] == lidar:
                record["channel"] = LIDAR
            elif record["channel"] == LIDAR:
                record["channel"] = f"{LIDAR}_SINGLE"
        own = {record["token"]: record for record in tables["category"]}
        used = Counter(own[record["category_token"]]["name"] for record in tables["instance"])
        for record in tables["category"]:
            found = class_of(str(record["name"]), names)
            if found is None and used[record["name"]]:
                self.left_out[record["name"]] += used[record["name"]]
            record["name"] = CATEGORIES[found] if found is not None else f"t4.{record['name']}"
        known = {record["token"] for record in tables["attribute"] if record["name"] in ATTRIBUTES}
        for record in tables["sample_annotation"]:
            record["attribute_tokens"] = [token for token in record.get("attribute_tokens", ()) if token in known][:1]
            record.setdefault("num_radar_pts", 0)
        place = folder.relative_to(self.root).as_posix()
        sensors = {record["token"]: record["channel"] for record in tables["sensor"]}
        calibrated = {record["token"]: sensors[record["sensor_token"]] for record in tables["calibrated_sensor"]}
        for record in tables["sample_data"]:
            channel = calibrated[record["calibrated_sensor_token"]]
            record["num_pts_feats"] = _width(folder, record) if channel == LIDAR else None
            record["filename"] = record["filename"] if place == "." else f"{place}/{record['filename']}"
            if not record.get("is_valid", True) and record["is_key_frame"]:
                record["is_key_frame"] = False
                if channel == LIDAR:
                    self.skipped.add(_named(record["sample_token"], before))
        for record in tables["scene"]:
            record["name"] = f"{place}/{record['name']}" if before else record["name"]
        for name, records in tables.items():
            for record in records:
                record.update({key: _named(value, before) for key, value in record.items() if before and _refers(key)})
            self.tables.setdefault(name, []).extend(records)


def _read(path: Path) -> list[dict[str, Any]]:
    found = read_json(path)
    if not isinstance(found, list) or not all(isinstance(row, dict) and "token" in row for row in found):
        raise UserError(
            f"{path}: found something else than records with tokens, expected a list of them; fetch it again"
        )
    return found


def _width(folder: Path, record: Mapping[str, Any]) -> int:
    """The float32 values of a point in a lidar file, as its info file says."""
    name = str(record["filename"])
    if not name.endswith(".bin"):
        raise UserError(f"{folder}: sample_data.json: found {name}, expected .pcd.bin: raw float32 points; convert it")
    info = record.get("info_filename")
    path = folder / str(info)
    if not info or not path.is_file():
        return DEFAULT_WIDTH
    width = read_json(path).get("num_pts_feats", DEFAULT_WIDTH)
    if not isinstance(width, int) or not 3 <= width <= 32:
        raise UserError(f"{path}: num_pts_feats: found {width!r}, expected 3 to 32 values of a point")
    return width
