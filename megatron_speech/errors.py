"""The one error that users cause, and how every command reports it."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable

from megatron_speech.console import install_handler, message

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class InputError(ValueError):
    """Something the user gave cannot be used: a file, a field, a flag, a recipe.

    The message is one sentence (or a few) that names the file or field, what was found there, what was
    needed, and what to do about it. Commands print it without a traceback and exit with status 2.
    """


class OutputError(RuntimeError):
    """The output cannot be written: a full disk, a quota, a failing device. A sentence, as :class:`InputError`'s.

    It is no fault of the input, so commands exit with status 1 and may be repeated as they were.
    """


class DivergenceError(RuntimeError):
    """Training has left the numbers: a loss, a gradient or the weights are NaN or infinite. Says how to go on.

    Every rank of the run raises it at the same step; commands exit with status 1.
    """


class PeerError(RuntimeError):
    """Another process of the run has ended, so this one cannot continue. Names it and the reason, where known."""


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a command's `main`: notices and warnings are printed, and bad input prints one sentence and exits 2.

    The wrapped function returns the exit status: 0 (also for None), 2 on :class:`InputError`, 1 with a sentence on
    :class:`OutputError`, :class:`DivergenceError` or when a disk is full, 130 on an interrupt. Any other exception is
    our own failure: it keeps its traceback and exits 1.
    """

    @functools.wraps(main)
    def run(*args: object, **kwargs: object) -> int:
        install_handler()
        try:
            return main(*args, **kwargs) or 0
        except InputError as error:
            message("error", str(error))
            return 2
        except (OutputError, DivergenceError) as error:
            message("error", str(error))
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # The reader of our stdout went away (`| head`): not an error of the data or of ours.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except ConnectionError as error:
            if error.errno is not None:
                raise
            message("error", str(error))  # a remote input broke off: its reader made a sentence of it
            return 1
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            where = f" while writing {error.filename}" if error.filename else ""
            message("error", f"{error.strerror}{where}; free some space and run the same command again")
            return 1

    return run
