"""What `kvjax` shows is what it imports, each name once."""

import inspect
import types

import kvjax


def test_every_public_name_is_in_a_group_once():
    shown = list(kvjax.__all__)
    assert len(shown) == len(set(shown))
    named = {
        name
        for name, value in vars(kvjax).items()
        if not name.startswith("_") and (not isinstance(value, types.ModuleType) or name in shown)
    }
    assert named == set(shown)


def test_every_public_name_says_what_it_is():
    bare = [name for name in kvjax.__all__ if name != "ALL" and not inspect.getdoc(getattr(kvjax, name))]
    assert bare == []
