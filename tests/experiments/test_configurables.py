"""What the list of configurables says is what gin binds."""

import json

import gin
import pytest

from experiments import bindings, configurables
from tests.experiments import in_process


def test_every_name_that_is_listed_can_be_bound_as_it_is_listed():
    described = configurables.configurables()
    assert {"snapkv", "Settings", "Training", "method", "evict"} <= set(described)
    for name, entry in described.items():
        for parameter in entry["parameters"]:
            gin.clear_config()
            with gin.unlock_config():
                bindings.parse(f"{name}.{parameter} = None", "here")
    gin.clear_config()


def test_types_defaults_and_what_is_required_are_those_of_the_signature():
    parameters = configurables.configurables()["snapkv"]["parameters"]
    assert parameters["window"] == {"type": "int", "default": "32"}
    method = configurables.configurables()["method"]["parameters"]
    assert method["transform"]["default"] == "required" and method["prefill_chunk"]["default"] == "None"


def test_a_method_lists_what_its_file_binds_with_its_values():
    code, out, err = in_process.call(configurables, "--methods=snapkv_int4")
    assert code == 0, err
    assert "  snapkv.budget: Budget = %budget\n" in out and "  kivi.bits: int = 4\n" in out
    assert "knorm" not in out and "  method.transform: kvjax.CacheTransform = @compose()\n" in out
    code, out, _ = in_process.call(configurables, "--methods=snapkv_int4", "--json")
    assert json.loads(out)["bound"]["kivi"]["bits"] == "4" and "snapkv" in json.loads(out)["configurables"]


@pytest.mark.parametrize(
    "given, wanted",
    [
        (["snapvk"], "error: nothing is called 'snapvk'; did you mean 'snapkv'?\n"),
        (["--methods=snapvk"], "error: --methods: unknown method 'snapvk'; did you mean 'snapkv'? There are"),
    ],
)
def test_unknown_names_are_refused(given, wanted):
    code, out, err = in_process.call(configurables, *given)
    assert (code, out) == (2, "") and err.startswith(wanted)


def test_names_given_are_listed_alone():
    code, out, _ = in_process.call(configurables, "snapkv")
    assert code == 0 and out.startswith("snapkv  # ")
    assert all(line.startswith(("snapkv", "  snapkv.")) for line in out.splitlines())
