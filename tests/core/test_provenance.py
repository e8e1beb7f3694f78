"""The command that makes a file."""

from __future__ import annotations

import pytest

from qat.core.command import command_line, running
from qat.core.provenance import made_by


def test_the_command_can_be_pasted_and_ends_with_its_verb() -> None:
    assert command_line() == ""
    with running(["calibrate", "--out", "my runs/ptq.pth", "--method-for", "camera.*=max"]):
        assert command_line() == "bevqat calibrate --out 'my runs/ptq.pth' --method-for 'camera.*=max'"
        with running(["report", "a.json"]):
            assert made_by()["command"] == "bevqat report a.json"
        assert command_line().startswith("bevqat calibrate")
    with pytest.raises(KeyboardInterrupt), running(["demo"]):
        raise KeyboardInterrupt
    assert command_line() == ""


def test_what_is_made_knows_its_packages() -> None:
    assert {"bevqat", "python", "numpy"} <= made_by()["versions"].keys()
