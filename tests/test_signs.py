"""Signs: what beginnings keep of theta_0."""

import torch

from windfall import signs

PARAMS = {
    "w": torch.tensor([[3.0, -1.0], [0.0, -2.0]], dtype=torch.float64),
    "b": torch.tensor([-7.0, 5.0], dtype=torch.float64),
}
OTHER = {
    "w": torch.tensor([[-10.0, -20.0], [-30.0, 40.0]], dtype=torch.float64),
    "b": torch.tensor([1.0, 1.0], dtype=torch.float64),
}


def test_a_constant_is_the_sign_times_the_layers_deviation():
    # mean 0, variance (9 + 1 + 0 + 4) / 4
    made, sigma = signs.constant(PARAMS, ["w"]), 3.5**0.5
    assert made["w"].tolist() == [[sigma, -sigma], [sigma, -sigma]]
    assert torch.equal(made["b"], PARAMS["b"])


def test_signed_weights_have_their_own_magnitude_and_the_others_sign():
    made = signs.signed(OTHER, PARAMS, ["w"])
    assert made["w"].tolist() == [[10.0, -20.0], [30.0, -40.0]]
    assert torch.equal(made["b"], OTHER["b"])


def test_a_weights_own_signs_change_nothing():
    assert torch.equal(signs.signed(OTHER, OTHER, ["w"])["w"], OTHER["w"])


def test_a_layer_of_one_value_keeps_finite_weights():
    same = {"w": torch.full((2, 2), -3.0)}
    assert signs.constant(same, ["w"])["w"].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_what_is_made_shares_no_storage_with_what_it_is_made_from():
    before = {name: value.clone() for name, value in PARAMS.items()}
    for made in (signs.constant(PARAMS, ["w"]), signs.signed(PARAMS, OTHER, ["w"])):
        for value in made.values():
            value.fill_(99.0)
    assert all(torch.equal(PARAMS[name], before[name]) for name in PARAMS)
