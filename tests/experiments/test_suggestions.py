"""What a message says of an unknown name."""

from experiments.suggestions import nearest, there_are

NAMES = ["full", "h2o", "snapkv", "snapkv_int4"]


def test_another_case_and_a_typing_error_find_the_name_and_a_stranger_does_not():
    assert [nearest(name, NAMES) for name in ("SnapKV", "snapkw", "H2O", "full ", "locret")] == [
        "snapkv", "snapkv", "h2o", "full", None
    ]  # fmt: skip


def test_the_nearest_comes_first_and_all_are_listed():
    assert there_are("SnapKV", NAMES) == "did you mean 'snapkv'? There are full, h2o, snapkv, snapkv_int4."
    assert there_are("x", NAMES) == "there are full, h2o, snapkv, snapkv_int4."
