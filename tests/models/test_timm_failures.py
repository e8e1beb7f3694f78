"""What timm's networks raise while they are built ends in one line that names the model."""

import pytest
import timm

from qat.core.errors import UserError
from qat.families.bevfusion.networks.backbone import build_backbone
from tests.messages import refused


class HubError(Exception):
    """Of a kind that nobody here knows."""


@pytest.mark.parametrize(
    "error", [HubError("no\nnetwork"), ImportError("no module named x"), OSError("gone"), KeyError("w"), HubError()]
)
@pytest.mark.parametrize("where", ["build", "maps"])
def test_whatever_timm_raises_is_one_line(monkeypatch, error, where):
    def raises(*_, **__):
        raise error

    if where == "build":
        monkeypatch.setattr(timm, "create_model", raises)
    else:
        monkeypatch.setattr(timm.models.FeatureInfo, "channels", raises)
    with pytest.raises(
        UserError, match=r"backbone: found 'resnet18' with out_indices \[1, 2\], expected a timm model"
    ) as caught:
        build_backbone({"type": "timm", "model_name": "resnet18", "out_indices": [1, 2]}, (64, 96))
    assert "\\n" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nest_base", "mvitv2_base", "no_such_model"])
def test_models_that_have_no_such_maps_or_do_not_exist_are_one_line(name):
    """NesT takes square images only; MViTv2 ends in an assertion without words."""
    with refused(f"found '{name}' with out_indices [1, 2]", "expected a timm model that has them:"):
        build_backbone({"type": "timm", "model_name": name, "out_indices": [1, 2]}, (60, 100))
