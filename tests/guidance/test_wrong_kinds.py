"""Wrong arguments of each kind of guidance are refused when it is made, by their names."""

import math

import pytest

from hf_guided.guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    CLIPGuidance,
    DenoisedClassifierGuidance,
    EntropyScaling,
    LossGuidance,
)

NAN = math.nan
WRONG = {
    "scale": ["x", NAN, math.inf, -1, None, [1], True, {}, {"a": 1}],
    "interval": ["x", 5, (1,), (5, 1), ("a", "b"), (NAN, 1), (1, 2, 3), {}],
    "every": [0, -1, 1.5, "x", NAN, None],
    "joint_temperature": ["x", NAN, math.inf, 0, None],
    "marginal_temperature": ["x", NAN, -1, None],
    "softplus_beta": ["x", NAN, 0, -1],
    "sine": ["x", NAN, -1],
    "num_cutouts": [0, -1, 1.5, "x", None],
    "min_cutout": [0, -1, 2, "x", NAN, None],
    "prompt": ["", None, 5, ["a"]],
    "max_factor": ["x", NAN, 0, -1, math.inf, None],
}
COMMON = ["scale", "interval"]
KINDS = [
    (AutoGuidance, COMMON, {}),
    (ClassifierFreeGuidance, COMMON, {}),
    (ClassifierGuidance, [*COMMON, "every"], {}),
    (
        DenoisedClassifierGuidance,
        [*COMMON, "every", "joint_temperature", "marginal_temperature", "softplus_beta", "sine"],
        {},
    ),
    (CLIPGuidance, [*COMMON, "every", "num_cutouts", "min_cutout", "prompt"], {"prompt": "a pug"}),
    (LossGuidance, [*COMMON, "every"], {"fn": lambda images: images.sum()}),
    (EntropyScaling, ["max_factor"], {}),
]


@pytest.mark.parametrize(
    ("kind", "name", "value", "others"),
    [(kind, name, value, others) for kind, names, others in KINDS for name in names for value in WRONG[name]],
)
def test_a_wrong_argument(kind, name, value, others):
    with pytest.raises(ValueError, match=name) as refused:
        kind(**{**others, name: value})
    assert kind.__name__ in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("loss", [None, 5, "x"])
def test_a_loss_that_is_no_function(loss):
    with pytest.raises(ValueError, match="LossGuidance takes a function"):
        LossGuidance(loss)
