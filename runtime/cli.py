"""Command lines: flags that override a config, checks of the values, and errors of one line."""

import argparse
import difflib
import errno
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import jsonargparse
import torch.distributed as dist
import yaml

from runtime import UserError
from runtime.files import check_writable, printable
from runtime.processes import CommonError, of_launch

MAX_SIZE = 8192  # pixels of a side of an image
WRONG_VALUE = (ValueError, TypeError, ArithmeticError, RuntimeError, AssertionError)  # what libraries raise for a wrong value

# Of the system, not of the program; None: an error that we raise, with a sentence.
FAULTS = {None, *(getattr(errno, name) for name in "EACCES EPERM EROFS ENOSPC EDQUOT EFBIG EIO ESTALE EMFILE ENFILE ENOMEM "
                  "ETIMEDOUT ECONNREFUSED ECONNRESET EHOSTUNREACH EHOSTDOWN ENETUNREACH ENOTCONN EPIPE ENODEV ENXIO "
                  "ENAMETOOLONG ENOTDIR".split())}
# Of gloo, NCCL and torch's store; NCCL's errors of the own GPU, such as its memory, are not among them.
LOST = r"(?i)(connection (was likely )?(closed|reset|refused)|timed out waiting|remote process exited|broken pipe)[^\n]*"


class ConfigLoader(yaml.SafeLoader):
    """YAML of a config: duplicate keys are refused, 1e-4 is a number, and a date is a string."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.YAMLError(f"duplicate key {key.value!r} in {self.name}, line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(text: str, path: str = "") -> object:
    """The value of a flag, or the content of a config, for which jsonargparse passes a path too."""
    if not path:
        return jsonargparse.get_loader("yaml")(text)
    loader = ConfigLoader(text)
    loader.name = path
    content = loader.get_single_data()
    if not isinstance(content, dict):
        raise yaml.YAMLError(f"{path} has no keys and values")
    return content


ConfigLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), None)
ConfigLoader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)
jsonargparse.set_loader("config", load_yaml, (yaml.YAMLError,))


class ArgumentParser(jsonargparse.ArgumentParser):
    """Flags override a YAML `--config`, in any order on the command line. An error is one line and exit code 2."""

    def __init__(self, description: str):
        self.flags: dict[str, argparse.Action] = {}  # by its name in the parsed arguments
        self.registries: dict[str, Collection[str]] = {}
        self.given: set[str] = set()  # words of the command line, without values after "="
        self.origins: dict[str, str] = {}  # the config of each flag that only a config gives
        super().__init__(description=description, allow_abbrev=False, parser_mode="config")
        self.add_argument("--config", action="config", help="YAML file of flags, written with underscores; flags override it")

    def add_argument(self, *names: str, registry: Collection[str] | None = None, **options) -> argparse.Action:
        """Add a flag. With a registry, its value must be a name of it; unlike `choices`, help does not list them."""
        action = super().add_argument(*names, **options)
        self.flags[action.dest] = action
        if registry is not None:
            self.registries[action.dest] = registry
        return action

    def add_device_argument(self) -> None:
        self.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: cuda where there is one, else cpu")

    def add_shared_arguments(self) -> None:
        """Add the flags of every script that uses one of our networks."""
        self.add_device_argument()
        self.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast, fp32 weights")
        self.add_argument("--compile", action="store_true", help="torch.compile the model")

    def add_data_arguments(self) -> None:
        """Add the flags of the scripts that read images."""
        self.add_argument("--data-path", required=True, help="digits, mnist, cifar10, a folder of classes, or cached features")
        self.add_argument("--data-root", default="data", help="where named data sets lie")
        self.add_argument("--vae", type=str | None, help="ema (default), mse, pixels, a folder, an own run, or a hub id")
        self.add_argument("--image-size", type=int | None, help="default: the data's own, 256 for a folder of classes")
        self.add_argument("--num-classes", type=int | None, help="default: the data's, with which it must agree")
        self.add_argument("--num-workers", type=int, default=min(4, os.cpu_count()), help="of each process, to read data")

    def parse_args(self, args=None, *rest, **options):
        args, self.origins = list(sys.argv[1:] if args is None else args), {}
        if deep := [arg for arg in args if re.match(r"--[\w-]+\.\w+\.", arg)]:
            self.error(f"{deep[0]}: a dotted flag changes one entry of a dictionary, not an entry of an entry")
        # Configs first, so that flags override them wherever they stand.
        is_config = [arg.startswith("--config=") or "--config" in (arg, before) for before, arg in zip(["", *args], args)]
        args = [args[i] for i in sorted(range(len(args)), key=is_config.__getitem__, reverse=True)]
        try:
            parsed = super().parse_args(args, *rest, **options)
        except UnicodeDecodeError as error:
            self.error(f"--config is not a text file in UTF-8: {error}")
        self.given = {arg.partition("=")[0] for arg in args}
        self.origins = {name: path for name, path in self.origins.items()
                        if not self.given & {*self.flags[name].option_strings}}
        for name, action in self.flags.items():  # jsonargparse accepts null for any type
            if action.default is not None and getattr(parsed, name, "") is None:
                self.error(f"{action.option_strings[0]}: null is not allowed")
        for name, registry in self.registries.items():
            if (value := getattr(parsed, name)) is not None and value not in list(registry):
                self.error(f"{self.flags[name].option_strings[0]} {value} is unknown{nearest(value, registry, 3, 0.0)}")
        return parsed

    def parse_path(self, path, **options) -> jsonargparse.Namespace:
        """Read a config. An unknown key is an error here, where its file is known."""
        parsed = super().parse_path(path, **options)
        for key in vars(parsed):
            if key not in self.flags:
                self.error(f"unknown key {key!r} in {path}{nearest(key, self.flags)}")
            self.origins[key] = str(path)
        return parsed

    def origin(self, message: str) -> str:
        """A sentence about the first flag in an error: which config gives it, if the command line does not; or ""."""
        flag = re.search(r"--[a-z][\w-]*", message)
        name = next((name for name, action in self.flags.items() if flag and flag[0] in action.option_strings), None)
        key = re.search(r"unknown key '(\w+)'", message)
        if name not in self.origins or (key and f"{flag[0]}.{key[1]}" in self.given):
            return ""
        path, remedy = self.origins[name], f"; pass {flag[0]} '{{}}'" if key and self.flags[name].default == {} else ""
        return f"{' ' if message.endswith('?') else '. '}{repr(key[1]) if key else flag[0]} comes from {path}{remedy}"

    def dump(self, *args, **options) -> str:
        """The flags as YAML, each below its help. --print_config prints this."""
        text = super().dump(*args, **options)
        return re.sub(r"^(\w+):", lambda key: f"# {self.flags[key[1]].help}\n{key[0]}", text, flags=re.M)

    def with_flags(self, message: str) -> str:
        """Make a flag of each parameter in backticks."""
        flags = {name: action.option_strings[0] for name, action in self.flags.items() if action.option_strings}
        return re.sub(r"`(\w+)`", lambda name: flags.get(name[1], name[1]), message)

    def error(self, message: str, ex: Exception | None = None) -> None:
        message = re.sub(r'Parser key "(\w+)"', r"`\1`", short_message(message))
        message = re.sub(r"(?<=the following arguments are required: )\w+", r"`\g<0>`", message)
        message = self.with_flags(message)
        if flag := re.search(r"[Uu]nrecognized arguments: (--[\w-]+)", message):
            message += nearest(flag[1], [option for action in self.flags.values() for option in action.option_strings])
        fail(message)


def nearest(name: object, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> str:
    """The end of an error about an unknown name: the known ones that are most like it, if any exceeds `cutoff` in 0..1."""
    lower = {entry.lower(): entry for entry in known}
    found = [lower[entry] for entry in difflib.get_close_matches(str(name).lower(), list(lower), count, cutoff)]
    return f"; did you mean {', '.join(found)}?" if found else ""


def short_message(message: object) -> str:
    """jsonargparse's message on one line, without the errors of each type of a union."""
    return re.sub(r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: .* Given value:",
                  r"Expected one of \1. Got value:", one_line(message))


def check_arguments(function: Callable, arguments: dict, skip: set[str] = frozenset(), beside: tuple[str, ...] = ()) -> dict:
    """Check names and types of `arguments` against the signature of `function`, and return them converted.

    Parameters in `skip` must not be given. Raises UserError for an unknown key or a wrong type; the error also names the keys
    in `beside`, which other functions accept.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if inspect.isclass(function) else parser.add_function_arguments
    allowed = add(function, as_group=False, skip=set(skip))
    for name in arguments:
        if name not in allowed:
            known = [*allowed, *beside]
            raise UserError(f"unknown key {name!r}; allowed: {', '.join(known)}{nearest(name, known)}")
        if arguments[name] is None and type(None) not in get_args(inspect.signature(function).parameters[name].annotation):
            raise UserError(f"{name}: null is not allowed")  # jsonargparse accepts null for any type
    try:
        checked = parser.parse_object(dict(arguments)).as_dict()
    except jsonargparse.ArgumentError as error:
        raise UserError(short_message(error)) from None
    return {name: checked[name] for name in arguments}


def check_numbers(args: jsonargparse.Namespace, names: list[str], allowed: str, fine: Callable[[float], bool]) -> None:
    """Raises UserError for the first flag with a number that is not `fine`. A flag may hold a tuple; None is skipped."""
    for name in names:
        given = getattr(args, name)
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and not fine(value):
                raise UserError(f"`{name}` {value} is not {allowed}")


def check_data_arguments(args: jsonargparse.Namespace) -> None:
    if not args.data_path:
        raise UserError("`data_path` is empty")
    check_numbers(args, ["image_size"], f"in 1..{MAX_SIZE}", lambda n: 1 <= n <= MAX_SIZE)
    check_numbers(args, ["num_classes"], "at least 1", lambda n: n >= 1)
    check_numbers(args, ["num_workers"], "at least 0", lambda n: n >= 0)


def check_output_flag(args: jsonargparse.Namespace, name: str, suffix: str, size: int = 0) -> None:
    """Check that a flag names a file with that suffix, and that `size` bytes can be written there; None is left alone."""
    if (path := getattr(args, name)) is None:
        return
    with prefix_errors(f"`{name}`"):
        target = Path(os.path.realpath(path))
        if Path(path).suffix != suffix:
            raise UserError(f"{path} is not the name of a {suffix}")
        if target.exists() and not target.is_file():
            raise UserError(f"{path} is not a file")
        check_writable(target.parent, size)


@contextmanager
def prefix_errors(prefix: str, *also: type[Exception]) -> Iterator[None]:
    """Put a prefix such as "--vae" or "--rows x:" before each UserError and OSError. Exceptions `also` become UserErrors."""
    try:
        yield
    except (UserError, OSError, *also) as error:
        kind = type(error) if isinstance(error, UserError | FileNotFoundError) else \
            OSError if isinstance(error, OSError) else UserError
        raise kind(f"{prefix} {error}") from None


def run(main: Callable[[jsonargparse.Namespace], None], parser: ArgumentParser) -> None:
    """Run a script's main on the command line's flags. An error that a user can fix is one line on stderr and exit code 2.

    Such errors are UserError, OSError (ours, and the system's of FAULTS), and the loss of another process. Any other error is a
    bug and keeps its traceback; an OSError's is followed by its line.
    """
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        main(args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in FAULTS:
            traceback.print_exc()
        message = parser.with_flags(str(error))
        fail(message + parser.origin(message), common=isinstance(error, CommonError))
    except Exception as error:
        if not dist.is_initialized():
            raise
        if lost := is_lost(error):
            fail(f"lost another process of this run ({lost[0]}); the same command continues it from its last checkpoint")
        traceback.print_exc()
        fail(f"{type(error).__name__}: {error}")


def is_lost(error: BaseException) -> re.Match | None:
    """Whether an error tells of the loss of another process."""
    return re.search(LOST, str(error)) if isinstance(error, RuntimeError) else None


def fail(message: object, common: bool = False) -> None:
    """Print the message on one line and exit with code 2. The main process prints a common error, else the first to fail."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" if common else first_to_fail():
        where = "" if rank == "0" else f" (rank {rank})"
        print(f"{Path(sys.argv[0]).name}: error: {one_line(message)}{where}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(2)  # pending collectives never end, so a normal exit would hang
    sys.exit(2)


def first_to_fail() -> bool:
    """Whether no other process has reported a failure yet. If a process is lost, all the others fail at once."""
    if not dist.is_initialized():
        return of_launch("LOCAL_RANK", 0) == 0
    try:
        return dist.distributed_c10d._get_default_store().add("failures", 1) == 1
    except RuntimeError:  # the store was lost with its machine
        return True


def shortened(names: Iterable[str], shown: int = 10) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "") if names else "none"


def one_line(message: object) -> str:
    return printable(" ".join(str(message).split()))
