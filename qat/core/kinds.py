"""Recognizes a file by its first bytes, for messages about a file of the wrong kind."""

from __future__ import annotations

import struct
from pathlib import Path

_SIGNATURES = {
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89PNG\r\n\x1a\n": "a PNG picture",
    b"GIF8": "a GIF picture",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"# .PCD v": "a PCD point cloud",
    b"VERSION .7\nFIELDS": "a PCD point cloud",
    b"VERSION 0.7\nFIELDS": "a PCD point cloud",
    b"ply\n": "a PLY point cloud",
    b"ply\r\n": "a PLY point cloud",
    b"LASF": "a LAS point cloud",
    b"#ROSBAG V": "a ROS bag",
    b"\x1f\x8b\x08": "a gzip archive",
    b"7z\xbc\xaf'\x1c": "a 7-Zip archive",
    b"%PDF": "a PDF",
}


def kind_of_file(path: str | Path) -> str | None:
    """The kind of a file by its first bytes, such as "a JPEG picture"; None if unknown, or if it cannot be read."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(512)
    except OSError:
        return None
    if not head:
        return "an empty file"
    if (kind := signature_of(head)) is not None:
        return kind
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 1 << 32:
        return "a safetensors file"
    if head[0] == 8 and len(head) > 2 and head[1] < 32 and head[2] in (0x12, 0x1A, 0x22, 0x3A):
        return "an ONNX graph"  # protobuf: ir_version, then producer_name, or a later field of a ModelProto
    return None


def signature_of(head: bytes) -> str | None:
    """The kind of a file with these first bytes (512 are enough), if they are unambiguous."""
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            return kind
    if head.lstrip()[:9].lower() in (b"<!doctype", b"<html>") or head.lstrip()[:5].lower() == b"<html":
        return "a web page"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, without the file that it stands for"
    if not head:
        return None
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        text = head[: error.start].decode("utf-8") if error.start > len(head) - 4 else "\0"
    return "a text file" if all(letter.isprintable() or letter in "\t\r\n" for letter in text) else None
