"""The flags of a run; and what is wrong with a command, said in one line: `error: ...` on stderr, exit status 2."""

import contextlib
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Iterator
from typing import NoReturn

from absl import flags
from ml_collections import config_flags

from laser_jax.config import Config, kinds
from laser_jax.vault import VaultError

EXIT_REFUSED = 2  # as of argparse: the same command would fail again
#: How config_flags says that a part of a config, of some class, has no such field.
_NO_FIELD = (
    r"Field (?P<field>\w+) not found on dataclass <class '[\w.]*?(?P<kind>\w+)'>",
    r"Attribute <class '[\w.]*?(?P<kind>\w+)'>\.(?P<field>\w+) does not exist",
)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Around what sets a run up: what is wrong with its config, data or workdir ends the process in one line."""
    try:
        yield
    except (ValueError, OSError, VaultError) as error:
        refuse(str(error))


def refuse(why: str) -> NoReturn:
    """Ends the process."""
    print(f"error: {why}", file=sys.stderr)
    sys.exit(EXIT_REFUSED)


def parse(argv: list[str]) -> list[str]:
    """Parses the flags, for `app.run`; ends the process where they are not those of a run."""
    try:
        rest = flags.FLAGS(argv)
    except OSError as error:  # a field is set of a file that is not there
        refuse(f"--config: {_last_line(error.__cause__ or error)}")
    except KeyError as error:
        if (why := _unknown_field(str(error))) is None:
            raise
        refuse(why)
    except ValueError as error:  # those of the experiment file come as flags.Error
        refuse(f"--config: {error}")
    except flags.Error as error:
        # What an experiment file refuses, such as an unknown encoder, comes with a trace of the libraries.
        refused = _last_line(error).partition("ValueError: ")
        refuse(refused[2] if refused[1] and not refused[0] else str(error))
    path, _, _ = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    if not os.path.isfile(path):
        refuse(f"--config={path}: there is no such file")
    if not isinstance(flags.FLAGS.config, Config):
        refuse(f"--config={path}: its get_config() returns no laser_jax.config.Config")
    if len(rest) > 1:
        refuse(f"unexpected arguments {' '.join(rest[1:])}: flags have the form --config.optim.clip=1.0")
    return rest


def _unknown_field(text: str) -> str | None:
    """What to give instead of a field that a config does not have; None if the text is of something else."""
    found = next(filter(None, (re.search(pattern, text) for pattern in _NO_FIELD)), None)
    if found is None:
        return None
    if found["kind"] not in kinds():
        return f"--config: a {found['kind']} has no field {found['field']!r}"
    known = [field.name for field in dataclasses.fields(kinds()[found["kind"]])]
    near = difflib.get_close_matches(found["field"], known, n=1)
    hint = f"did you mean {near[0]!r}? It has" if near else "it has"
    return f"--config: {found['kind']} has no field {found['field']!r}; {hint} {', '.join(known)}"


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1].strip()
