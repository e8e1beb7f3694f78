"""results.json: what compare hands to the report, and the checks that a page can be made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.core.files import read_json

SCHEMA = 1
Results = dict[str, Any]

EXACT_DB = 200  # what compare and sensitivity write for equal tensors


def check_results(results: Any, source: str = "results") -> Results:
    """Returns `results` when a report can be made of it.

    Args:
        results: a parsed results.json.
        source: what to call it in an error.

    Raises:
        UserError: another schema, or a missing or impossible value, named by its path.
    """
    from qat.core.validation import validated  # `bevqat benchmark` draws on machines without pydantic
    from qat.report import models

    validated(
        models.Results, results, source, models.check_rows, index="[{}]", fix="write it again with compare", longest=60
    )
    return results


def check_sensitivity(section: Any, source: str, fix: str) -> dict[str, Any]:
    """Returns what can be results.json's entry `sensitivity`.

    Args:
        source: the file that it is from. fix: what to do about a complaint.

    Raises:
        UserError: a missing or impossible value, named by its path.
    """
    from qat.core.validation import validated
    from qat.report import models

    validated(models.Sensitivity, section, source, index="[{}]", fix=fix, longest=60)
    return dict(section)


def load_results(results: Mapping[str, Any] | str | Path) -> Results:
    """Checked results, from a results.json or as they are.

    Raises:
        UserError: the file cannot be read, is not JSON, or fails `check_results`.
    """
    if isinstance(results, Mapping):
        return check_results(dict(results))
    return check_results(read_json(results), str(results))
