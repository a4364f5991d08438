"""How every program starts: the flags they share, and one line for what a user can mend."""

from __future__ import annotations

import inspect
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gin
from absl import app, flags, logging

from experiments import bindings, interrupts
from models import FetchError


class _Numbers(flags.ArgumentParser):
    """Reads numbers with commas between them."""

    def __init__(self, kind: type, noun: str):
        self._kind, self.syntactic_help = kind, f"{noun}, or several with commas between"

    def parse(self, argument: Any) -> tuple[Any, ...]:
        try:
            return tuple(self._kind(part) for part in str(argument).split(","))
        except ValueError:
            raise ValueError(f"expected {self.syntactic_help}") from None

    def flag_type(self) -> str:
        return "numbers"


def define_numbers(name: str, kind: type, noun: str, help: str):
    """Defines a flag whose value is a tuple of numbers."""
    return flags.DEFINE(_Numbers(kind, noun), name, None, help, serializer=flags.CsvListSerializer(","))


def fraction_or_tokens(text: str) -> float | int:
    """Reads "0.125" as a fraction of the context, "512" as tokens."""
    try:
        return int(text)
    except ValueError:
        return float(text)


# One flag has one meaning in all programs. A program declares those that it accepts with `flags.declare_key_flag`;
# they are what its --help lists, and the others are refused.
GIN_FILE = flags.DEFINE_multi_string("gin_file", [], "Config files, read in order.")
GIN_BINDINGS = flags.DEFINE_multi_string("gin_bindings", [], "Bindings that win over all files.")
MODEL = flags.DEFINE_string("model", None, "smollm2, gemma3-270m, a path, or a name on the hub.")
METHODS = flags.DEFINE_list("methods", None, "Names of files in configs/methods, or paths of others.")
KEEP = define_numbers("keep", float, "a fraction", "Fraction of the context that token-budget methods keep.")
BUDGET = define_numbers("budget", int, "a number of tokens", "The same in tokens per KV head.")
READ = define_numbers("read", fraction_or_tokens, "a fraction or tokens", "Of the context, what a step may read.")
CONTEXT = define_numbers("context", int, "a number of tokens", "Tokens of the context.")
TASKS = flags.DEFINE_string("tasks", None, "Names of generated tasks, and task files and texts by their paths.")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the weights and of what they compute.")
BATCH = flags.DEFINE_integer("batch", None, "Prompts at once.")
MESH = flags.DEFINE_string("mesh", None, "Devices as named axes and sizes, such as data:2,seq:2,model:2.")
RATIOS = define_numbers("ratios", float, "a fraction", "Parts of the tokens that are read again.")
EXAMPLES = flags.DEFINE_integer("examples", None, "Examples of each task.")
TASK_SEED = flags.DEFINE_integer("task_seed", 1, "Of the generated tasks.")
FOLLOWING = flags.DEFINE_integer("following", 64, "Tokens of the text behind the context that are scored.")
OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Where results go.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Discard the results that output_dir holds.")
JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")

_INSTALLED = pathlib.Path(__file__).parents[1]  # the folder of configs/, in a clone and where pip installs


def gin_files() -> list[str]:
    """The files of --gin_file; one of configs/ is found from any folder.

    Raises:
      ValueError: a file that does not exist.
    """
    found = []
    for path in GIN_FILE.value:
        installed = _INSTALLED / path
        if not os.path.isfile(path) and not (path.startswith("configs/") and installed.is_file()):
            raise ValueError(f"--gin_file: no such file: {path}.")
        found.append(path if os.path.isfile(path) else str(installed))
    return found


def configs() -> dict[str, list[str]]:
    """Returns what `load_method` takes of the flags; refuses bindings that would replace what every method is.

    Raises:
      ValueError: names them.
    """
    files = gin_files()
    bindings.check_own(files, GIN_BINDINGS.value)
    return {"gin_files": files, "bindings": GIN_BINDINGS.value}


def check_reached(configs: Iterable[str]) -> None:
    """Refuses --gin_bindings that nothing of these operative configurations used; see `bindings.check_reached`."""
    bindings.check_reached(gin_files(), GIN_BINDINGS.value, configs)


def read_gin() -> None:
    """Reads the gin files, then the bindings."""
    gin.clear_config()
    with gin.unlock_config():
        bindings.read_files(gin_files())
        bindings.parse_each(GIN_BINDINGS.value)
    bindings.check_values()


def check_flags(program: Callable[..., None]) -> None:
    """Refuses flags that the program does not declare, rather than ignore them, and values that no program accepts.

    Raises:
      ValueError: names the flag.
    """
    accepted = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.modules[program.__module__])}
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        for flag in defined:
            if module.startswith("experiments.") and flag.present and flag.name not in accepted:
                raise ValueError(f"--{flag.name} means nothing to this program.")
    gin_files()
    for read in READ.value or ():
        if not (read >= 1 if isinstance(read, int) else 0 < read <= 1):
            raise ValueError(f"--read must be a fraction in (0, 1] or at least 1 token, got {read}.")
    for keep in KEEP.value or ():
        if not 0 < keep <= 1:
            raise ValueError(f"--keep must be in (0, 1], got {keep}.")


def only(flag: flags.FlagHolder, default: Any) -> Any:
    """Returns the one number of a flag that may hold several, or the default where it is not given.

    Raises:
      ValueError: it holds several, which this program has no use for.
    """
    if flag.value is None:
        return default
    if len(flag.value) > 1:
        raise ValueError(f"--{flag.name} takes one number here, got {','.join(map(str, flag.value))}.")
    return flag.value[0]


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parser with its errors in one line."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _fail(str(error))


def show_progress(what: str) -> None:
    """A line that the next one replaces, and an empty one removes; lines below each other where nobody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)
    elif what:
        print(what, file=sys.stderr, flush=True)


def call(program: Callable[..., None], argv: Sequence[str]) -> None:
    """Runs a program; bad input, a full disk or a failed download becomes one line and exit status 2.

    A program with parameters gets the arguments that are no flags.
    """
    try:
        if len(argv) > 1 and not inspect.signature(program).parameters:
            raise ValueError(f"unexpected argument {argv[1]!r}; flags are written --name=value.")
        check_flags(program)
        program(*argv[1:])
    except KeyboardInterrupt:
        interrupted()
    except OSError as error:
        _fail(_with_origin(error))
    except (ValueError, OverflowError, FetchError) as error:
        _fail(str(error).strip() or repr(error))


def interrupted(what: str = "") -> None:
    """Says what Ctrl-C left, and exits as a shell expects of it."""
    print(f"\ninterrupted{f': {what}' if what else ''}.", file=sys.stderr)
    sys.exit(130)


def start(program: Callable[..., None]) -> None:
    """The main of a program."""
    interrupts.raise_again()
    logging.set_verbosity(logging.WARNING)  # checkpoints are saved and read with many lines of INFO
    app.run(lambda argv: call(program, argv), flags_parser=parse_flags)


def _with_origin(error: OSError) -> str:
    """The message of the system, behind the flag or binding that named the file or a folder above it."""
    if error.filename is None or error.strerror is None:
        return str(error).strip() or repr(error)
    path = os.fsdecode(error.filename)
    named = {
        value: f"--{flag.name}"
        for defined in flags.FLAGS.flags_by_module_dict().values()
        for flag in defined
        if flag.present
        for value in (flag.value if isinstance(flag.value, list) else [flag.value])
        if isinstance(value, str) and value and pathlib.Path(path).is_relative_to(value)
    }
    name = named[max(named, key=len)] if named else bindings.origin(path, gin_files(), GIN_BINDINGS.value)
    return f"{f'{name}: ' if name else ''}{path}: {error.strerror}."


def _fail(message: str) -> None:
    print(f"error: {message.splitlines()[0]}", file=sys.stderr)
    sys.exit(2)
