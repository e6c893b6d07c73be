"""How a script ends: a user's mistake is one line and exit code 2, Ctrl-C one line and code 130.

Every script calls `begin_script` before its other imports, so this module imports nothing slow
(system.device loads torch).
"""

import atexit
import codecs
import contextlib
import os
import signal
import sys
import time

# A shell's exit codes for a program that Ctrl-C ended, and for one whose output nobody reads any
# more: SIGPIPE, which is 13, and which Windows does not have.
STOPPED = 128 + signal.SIGINT
PIPE_CLOSED = 128 + 13
REPLACED = 'nanogpt-replaced'  # the name of the error handler that begin_script registers


def begin_script():
    """Prepare the process for a user at a terminal; every script calls it first.

    From here on until the process ends, Ctrl-C prints one line and exits with code 130. A closed
    pipe (`| head`) ends the script silently. A character that standard output can't encode is
    printed as `?`, and a line at the end says so.
    """
    # Only Python's own handler is replaced: nohup, for example, has the signal ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop_at_once)
    if hasattr(signal, 'pthread_sigmask'):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # see no_interrupt
    sys.excepthook = _end_after_exception
    sys.unraisablehook = _end_after_unraisable

    lacking = set()  # encodings of standard output that lacked a character of what was printed

    def replace_character(error):
        lacking.add(sys.stdout.encoding)
        return codecs.replace_errors(error)

    codecs.register_error(REPLACED, replace_character)
    if hasattr(sys.stdout, 'reconfigure') and sys.stdout.errors in ('strict', 'surrogateescape'):
        sys.stdout.reconfigure(errors=REPLACED)  # stderr never fails, as it writes backslashes
    atexit.unregister(_finish_output)
    atexit.register(_finish_output, lacking)


# ---- a user's mistakes ---------------------------------------------------------------------------


def fail(message):
    """End the script because of a user's mistake: one line on stderr, exit code 2."""
    line = one_line(message)
    with contextlib.suppress(OSError):
        print(f"error: {line}", file=sys.stderr, flush=True)
    tell_torchrun(line)
    raise SystemExit(2)


MAX_LENGTH = 480  # characters of a line
MAX_LENGTH_WITH_COMMAND = 2000  # of one with a `command`, which must not be cut


def one_line(message):
    """A message as one printable line of moderate length; a long one is cut near its end."""
    line = ' '.join(str(message).split())
    # File names and rows of a dataset may hold any character.
    line = ''.join(c if c.isprintable() else '\ufffd' for c in line)
    has_command = line.count('`') > 1
    max_length = MAX_LENGTH_WITH_COMMAND if has_command else MAX_LENGTH
    if len(line) <= max_length:
        return line
    return f"{line[: max_length - 110]} … {line[-90:]}"


def tell_torchrun(line):
    """Under torchrun, make it repeat `line` at its end, as the reason why this process failed."""
    path = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if not path:
        return
    import json  # here, as it takes 5 ms, during which Ctrl-C would print a traceback

    with contextlib.suppress(OSError), open(path, 'w', encoding='utf-8') as file:
        json.dump({'message': line, 'timestamp': int(time.time())}, file)


@contextlib.contextmanager
def user_errors():
    """In the body, ValueError and OSError end the script with their message, and exit code 2.

    The project's modules raise them with a line for the user. Use this only around calls that check
    what a user gave.
    """
    # The imports are done: from now on Ctrl-C raises KeyboardInterrupt, so that work is cleaned up.
    if signal.getsignal(signal.SIGINT) is _stop_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except BrokenPipeError:
        _discard_output()
        raise SystemExit(PIPE_CLOSED) from None
    except (ValueError, OSError) as error:
        if getattr(error, 'filename', None):
            fail(f"{error.filename}: {error.strerror}")
        fail(error)
    except KeyboardInterrupt:
        _print_stopped()
        raise SystemExit(STOPPED) from None


# ---- Ctrl-C --------------------------------------------------------------------------------------


def _stop_at_once(number, frame):
    """The handler of SIGINT during imports, when there is nothing to clean up.

    An exception instead could be caught by what is being imported.
    """
    _print_stopped()
    os._exit(STOPPED)


@contextlib.contextmanager
def no_interrupt():
    """Hold Ctrl-C back until this block ends.

    Processes started inside inherit the blocked signal, so it never reaches them; only the
    project's own scripts unblock it, in begin_script.
    """
    if not hasattr(signal, 'pthread_sigmask'):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _print_stopped():
    with contextlib.suppress(ValueError):  # this is not the main thread
        # A second Ctrl-C does not wait for any cleaning up.
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(STOPPED))
    # OSError: stderr is closed. RuntimeError: the signal arrived during another print.
    with contextlib.suppress(OSError, RuntimeError):
        print("stopped", file=sys.stderr, flush=True)


def _end_after_exception(kind, error, traceback):
    """sys.excepthook, for what user_errors did not catch.

    Prints one line for Ctrl-C, nothing for a closed pipe, otherwise the traceback.
    """
    if _was_interrupted(error):
        _print_stopped()
        raise SystemExit(STOPPED)  # from an excepthook, this sets the exit code
    if isinstance(error, BrokenPipeError):
        _discard_output()
        raise SystemExit(PIPE_CLOSED)
    sys.__excepthook__(kind, error, traceback)


def _end_after_unraisable(unraisable):
    """sys.unraisablehook, for exceptions in destructors and functions of atexit.

    Python ignores those, and so it would ignore Ctrl-C.
    """
    if _was_interrupted(unraisable.exc_value):
        _print_stopped()
        os._exit(STOPPED)
    sys.__unraisablehook__(unraisable)


def _was_interrupted(error):
    """Whether `error` was caused by KeyboardInterrupt, which libraries wrap in their own errors."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


# ---- standard output -----------------------------------------------------------------------------


def _discard_output():
    """Redirect stdout and stderr to os.devnull if nobody reads them, or the flush at exit fails."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(devnull, stream.fileno())


def _finish_output(lacking):
    """At exit: write what is left, and report characters that could not be printed.

    lacking: the encodings that lacked one. Ctrl-C is ignored at the end, because Python is about to
    remove its own handlers, and the system's would kill a script that has finished its work.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
    except OSError as error:
        with contextlib.suppress(OSError):
            print(
                f"error: cannot write to standard output: {error.strerror}",
                file=sys.stderr,
                flush=True,
            )
        os._exit(2)

    for encoding in sorted(lacking):
        line = f"? stands for characters that standard output can't encode, as it is {encoding}"
        # UTF-8 lacks only lone surrogates, as in a file's name that is not UTF-8: no encoding has
        # those.
        if codecs.lookup(encoding).name != 'utf-8':
            line += "; to print them, set PYTHONIOENCODING=utf-8"
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
