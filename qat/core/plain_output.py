"""Output on terminals and pipes whose encoding is not Unicode: missing characters are replaced by similar ones."""

from __future__ import annotations

import codecs
import sys
import unicodedata

HANDLER = "bevqat-plain"
_NEAREST = {
    "…": "...", "×": "x", "→": "->", "←": "<-", "−": "-", "–": "-", "—": "-", "·": ".", "≥": ">=", "≤": "<=", "±": "+-", "²": "2",
    "µ": "u", "μ": "u", "Δ": "delta ", "σ": "sigma", "√": "sqrt", "°": " degrees", "“": '"', "”": '"', "‘": "'", "’": "'",
}  # fmt: skip


def _nearest(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = ""
    for letter in error.object[error.start : error.end]:
        plain = _NEAREST.get(letter) or unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or "?"
        try:
            text += letter.encode(error.encoding).decode(error.encoding)
        except UnicodeEncodeError:
            text += plain
    return text, error.end


def allow_any_text() -> None:
    """Makes stdout and stderr accept any text, whatever their encoding (LANG=C, PYTHONIOENCODING=ascii, a Windows code page)."""
    codecs.register_error(HANDLER, _nearest)
    for stream in (sys.stdout, sys.stderr):
        encoding = (getattr(stream, "encoding", None) or "utf-8").lower()
        if hasattr(stream, "reconfigure") and not encoding.startswith("utf"):
            stream.reconfigure(errors=HANDLER)
