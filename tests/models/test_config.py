"""A config that no decoder has names its field."""

import dataclasses

import pytest


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"biases": ("router",)}, "biases must be a tuple of names among wqkv, wo, w_gate, w_up, w_down, got 'router'"),
        ({"biases": ("wqkv", "wk")}, "biases must be .*, got 'wk'"),
        ({"biases": "wqkv"}, "biases must be .*, got 'wqkv'"),
        ({"biases": ("w_gate",), "gated": False}, "biases has 'w_gate', which a feed-forward layer that is not gated"),
        ({"biases": ("w_up",), "num_experts": 2, "experts_per_token": 1}, "biases has 'w_up', which experts cannot"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
    ],
)
def test_a_config_that_cannot_be_names_its_field(tiny, fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny.config, **fields)
