"""Betas and respacings, against the published code's numbers."""

import numpy as np
import pytest

from hf_guided.schedulers.schedules import check_timesteps, make_betas, space_timesteps

OUR_NAME = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
RESPACINGS = ["1", "8", "25", "50", "100", "250", "1000", "ddim10", "ddim25", "ddim50", "90,60,60,20,20", "10,15,20"]


@pytest.mark.parametrize("respacing", [*RESPACINGS, "300,200,100"])
def test_respacing_keeps_the_published_timesteps(reference_json, respacing):
    assert space_timesteps(1000, respacing) == reference_json("schedules")["respacing_of_1000"][respacing]


def test_every_published_respacing_is_tested(reference_json):
    assert sorted([*RESPACINGS, "300,200,100"]) == sorted(reference_json("schedules")["respacing_of_1000"])


def test_respacing_of_another_number_of_timesteps(reference_json):
    for respacing, timesteps in reference_json("schedules")["respacing_of_300"].items():
        assert space_timesteps(300, respacing) == timesteps


def test_uneven_sections_give_the_rest_to_the_first():
    assert space_timesteps(10, "1,1,1") == [0, 4, 7]
    assert space_timesteps(10, " 2, 1") == [0, 4, 5]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_betas_are_the_published_ones(reference_json, schedule):
    for total, published in reference_json("schedules")["beta_schedules"][schedule].items():
        betas = make_betas(OUR_NAME[schedule], int(total))
        assert betas.dtype == np.float64
        assert betas.shape == (int(total),)
        np.testing.assert_allclose(betas[[0, 1, int(total) // 2, -2, -1]], published, rtol=1e-12)


@pytest.mark.parametrize(
    ("respacing", "sentence"),
    [
        ("fast", "is not understood"),
        ("ddim", "is not understood"),
        ("0", "is not understood"),
        ("10,-2", "is not understood"),
        ("10,,2", "is not understood"),
        ("2.5", "is not understood"),
        ("1001", "asks for 1001 timesteps of a section that has 1000"),
        ("10,600", "asks for 600 timesteps of a section that has 500; all 2 sections together have 1000"),
        ("ddim999", "no integer stride over 1000 timesteps keeps exactly 999"),
    ],
)
def test_respacings_that_cannot_be_satisfied(respacing, sentence):
    with pytest.raises(ValueError, match=sentence):
        space_timesteps(1000, respacing)


def test_schedules_that_do_not_exist():
    with pytest.raises(ValueError, match=r"its last beta would be 1, and betas stay below 1. Use 21 steps or more"):
        make_betas("linear", 20)
    assert make_betas("linear", 21).max() < 1
    with pytest.raises(ValueError, match="'sigmoid' is not one of 'linear', 'squaredcos_cap_v2'"):
        make_betas("sigmoid", 1000)


def test_explicit_timesteps_descend_within_the_schedule():
    assert check_timesteps(np.array([99, 10, 0]), 100) == [99, 10, 0]
    for wrong in ([], [10, 10], [0, 10]):
        with pytest.raises(ValueError, match="descending order without repeats"):
            check_timesteps(wrong, 100)
    for wrong in ([100, 0], [5, -1]):
        with pytest.raises(ValueError, match="must lie between 0 and 99"):
            check_timesteps(wrong, 100)
