"""What gin files and bindings may say, and what is said where they reach nothing."""

import gin
import pytest

from experiments import bindings, methods
from experiments.methods import load_method


def read(*texts):
    gin.clear_config()
    gin.parse_config(list(texts))


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("snapkv.window = (1, 2)", "snapkv.window must be a whole number, got (1, 2)."),
        ("snapkv.window = 5.0", "snapkv.window must be a whole number, got 5.0."),
        ("snapkv.window = True", "snapkv.window must be a whole number, got True."),
        ("snapkv.budget = '64'", "snapkv.budget must be a number, got '64'."),
        ("method.prefill_chunk = [8]", "method.prefill_chunk must be a whole number or None, got [8]."),
        ("calibration.path = 3", "calibration.path must be a string or None, got 3."),
        ("snapkv.window = 2147483648", "snapkv.window must fit into 32 bits, got 2147483648."),
        ("scores.random.seed = 9223372036854775808", "random.seed must fit into 64 bits, got 9223372036854775808."),
        ("narrow/snapkv.window = 'x'", "narrow/snapkv.window must be a whole number, got 'x'."),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_its_name(text, wanted):
    read(text)
    with pytest.raises(ValueError) as error:
        bindings.check_values()
    assert str(error.value) == wanted


def test_values_of_the_right_kind_references_and_macros_pass():
    read("x = 3", "snapkv.window = %x", "snapkv.budget = 0.5", "knorm.budget = 7", "method.transform = @snapkv()")
    bindings.check_values()


def test_a_list_of_names_is_no_string():
    from experiments import evaluation  # noqa: F401, makes Settings known to gin

    read("Settings.methods = 'snapkv'")
    with pytest.raises(ValueError, match="Settings.methods must be a list of strings, got 'snapkv'"):
        bindings.check_values()


def test_a_method_names_the_value_that_it_cannot_use():
    with pytest.raises(ValueError, match=r"^method snapkv: snapkv.kernel must be a whole number, got \(5,\)\.$"):
        load_method("snapkv", budget=0.5, bindings=["snapkv.kernel = (5,)"])


def test_bindings_that_nothing_uses_are_refused_and_those_of_files_are_said(tmp_path, capsys):
    config = load_method("snapkv_int4", budget=0.5).config
    bindings.check_reached([], ["snapkv.window = 7", "kivi.bits = 2"], [config])
    with pytest.raises(ValueError, match="^--gin_bindings: nothing here uses knorm, got 'knorm.budget = 3'.$"):
        bindings.check_reached([], ["snapkv.window = 7", "knorm.budget = 3"], [config])
    with pytest.raises(ValueError, match="nothing here uses size"):
        bindings.check_reached([], ["size = 3"], [config])
    path = tmp_path / "mine.gin"
    path.write_text("snapkv.window = 7\nknorm.budget = 3\n")
    bindings.check_reached([str(path)], [], [config])
    assert capsys.readouterr().err == f"note: {path}: nothing here uses knorm.\n"


def test_a_call_in_a_scope_uses_what_is_bound_for_it_and_above_it():
    @gin.configurable
    def scoped_only(x=1):
        return x

    read("scoped_only.x = 2")
    with gin.config_scope("a"), gin.config_scope("b"):
        scoped_only()
    config = gin.operative_config_str()
    bindings.check_reached([], ["scoped_only.x = 2", "a/scoped_only.x = 3", "a/b/scoped_only.x = 3"], [config])
    with pytest.raises(ValueError, match="nothing here uses b/scoped_only"):
        bindings.check_reached([], ["b/scoped_only.x = 2"], [config])


def test_files_win_over_a_methods_own_and_bindings_over_files(tmp_path):
    path = tmp_path / "mine.gin"
    path.write_bytes(b"\xef\xbb\xbfsnapkv.window = 7\nsnapkv.kernel = 3\n")  # with a byte order mark
    method = load_method("snapkv", budget=0.5, gin_files=[str(path)], bindings=["snapkv.kernel = 1"])
    assert "snapkv.window = 7" in method.config and "snapkv.kernel = 1" in method.config


@pytest.mark.parametrize(
    "content, wanted",
    [
        (b"snapkv.window = \xff", "got bytes that are not UTF-8"),
        (b"x = 1\nsnapkv.window =\n", ", line 2: "),
        (b"snapkvv.window = 3\n", "No configurable matching 'snapkvv'"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_on_one_line(content, wanted, tmp_path):
    path = tmp_path / "bad.gin"
    path.write_bytes(content)
    gin.clear_config()
    with pytest.raises(ValueError) as error:
        bindings.read_files([str(path)])
    assert str(path) in str(error.value) and wanted in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("method.transform = @knorm()", "binds method.transform, which is a method's own: name it in --methods"),
        ("budget = 32", "binds the macro budget, which --keep or --budget sets"),
    ],
)
def test_what_every_method_has_of_its_own_is_not_bound_for_all(text, wanted, tmp_path):
    path = tmp_path / "mine.gin"
    path.write_text(f"{text}\n")
    bindings.check_own([], ["method.prefill_chunk = 64", "snapkv.budget = 64"])
    for files, given in (([str(path)], []), ([], [text])):
        with pytest.raises(ValueError, match=wanted):
            bindings.check_own(files, given)


def test_the_origin_of_a_path_is_the_binding_that_holds_it(tmp_path):
    path = tmp_path / "mine.gin"
    path.write_text("Settings.tasks = 'a/b.jsonl'\n")
    assert bindings.origin("a/b.jsonl", [str(path)], []) == "Settings.tasks"
    assert bindings.origin("c", [str(path)], ["calibration.path='c'"]) == "calibration.path"
    assert bindings.origin("d", [str(path)], ["calibration.path='c'"]) is None


NOT_BINDINGS = [
    ("snapkv.window = [1", "a bracket or a string is not closed (EOF in multi-line statement)."),
    ("snapkv.window = nan", "not a value; Failed to parse token 'nan'"),
    ("snapkv.window = " + "[" * 5000, "includes itself, or holds brackets nested too deeply."),
    ("snapkv.window = 1" + "0" * 5000, "Exceeds the limit (4300 digits) for integer string conversion"),
    ("snapkv.windw = 3", "Configurable 'snapkv' doesn't have a parameter named 'windw'. Did you mean 'window'?"),
    ("snapkvv.window = 3", "No configurable matching 'snapkvv'. Did you mean 'snapkv'?"),
    ("methods.snapkvv.window = 3", "No configurable matching 'methods.snapkvv'. Did you mean 'methods.snapkv'?"),
    ("narrow/snapkv.windw = 3", "a parameter named 'windw'. Did you mean 'window'?"),
    ("adaptive.score = @scores.randon()", "'@scores.randon()'. Did you mean 'scores.random'?"),
    ("import nowhere_at_all", "No module named 'nowhere_at_all'"),
    ("include 'nowhere.gin'", "Unable to open file: nowhere.gin."),
]


@pytest.mark.parametrize("text, wanted", NOT_BINDINGS)
def test_what_is_no_binding_is_named_wherever_it_stands(text, wanted, tmp_path):
    path = tmp_path / "mine.gin"
    path.write_text(f"\n{text}\n")
    for where, how in (
        (f"{path}", {"gin_files": [str(path)]}),
        ("--gin_bindings: ", {"bindings": [text]}),
        ("method mine, its config", {"text": f"method.transform = @snapkv()\n{text}"}),
    ):
        with pytest.raises(ValueError) as error:
            load_method("mine", budget=0.5, **({"text": "method.transform = @snapkv()"} | how))
        message = str(error.value)
        assert message.startswith(where) and wanted in message
        assert " object at 0x" not in message and "\n" not in message and len(message) < 600


def test_a_file_that_includes_itself_is_refused(tmp_path):
    path = tmp_path / "mine.gin"
    path.write_text(f"include '{path}'\n")
    with pytest.raises(ValueError, match="mine.gin: includes itself, or holds brackets nested too deeply"):
        load_method("snapkv", budget=0.5, gin_files=[str(path)])


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("", "method mine: Required bindings for `method` not provided in config: ['transform']"),
        ("method.transform = 3", "method mine: method.transform must be a call such as @snapkv(), got 3."),
        ("method.transform = @snapkv", "method mine: method.transform must be a call such as @snapkv(), got @sn"),
        ("method.transform = @snapkv()\nsnapkv.window = %foo", "method mine: %foo is used, and nothing binds foo."),
        ("method.transform = @snapkv()\nsnapkv.window = %a/b", "method mine: %a/b is used, and nothing binds a/b."),
        (
            f"method.transform = @snapkv()\nsnapkv.window = {10**27}",
            "method mine: snapkv.window must fit into 32 bits, got 1000000000000000000000000000.",
        ),
        ("method.transform = @compose()\ncompose.transforms = 3", "method mine: kvjax.transforms.base.chain() arg"),
    ],
)
def test_a_config_that_makes_no_method_is_refused(text, wanted):
    with pytest.raises(ValueError) as error:
        load_method("mine", budget=0.5, text=text)
    assert str(error.value).splitlines()[0].startswith(wanted)


def test_a_methods_file_may_open_with_a_byte_order_mark_and_must_be_utf8(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "METHODS_DIR", tmp_path)
    path = tmp_path / "mine.gin"
    path.write_bytes(b"\xef\xbb\xbfmethod.transform = @snapkv()\n")
    assert load_method("mine", budget=0.25).transform.schedule.budget is not None
    path.write_bytes(b"method.transform = @snapkv() # \xff\n")
    with pytest.raises(ValueError, match="method mine: .*mine.gin: got bytes that are not UTF-8"):
        load_method("mine", budget=0.25)
