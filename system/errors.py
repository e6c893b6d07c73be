"""How a script ends: a user's mistake is one line on stderr and exit code 2, Ctrl-C one line and
exit code 130.

Every script calls `begin_script` before its other imports, so this module imports nothing slow
(runtime.py loads torch).
"""

import atexit
import codecs
import contextlib
import os
import signal
import sys
import time

STOPPED = 128 + signal.SIGINT  # a shell's exit codes: of a program that Ctrl-C ended,
# and of one whose output nobody reads any more (SIGPIPE, which Windows does not have)
PIPE_CLOSED = 128 + 13
REPLACED = 'nanogpt-replaced'  # the name of the error handler below
_lacking = set()  # encodings of standard output that lacked a character of what was printed


def begin_script():
    """Prepare the process for a user at a terminal; the first call of every script.

    Ctrl-C, from here on until the process ends, is one line and exit code 130. A closed pipe (`|
    head`) ends the script without a word. A character that standard output can't encode is printed
    as `?`, and a line at the end says so.
    """
    # otherwise nohup, for example, ignores it
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop_at_once)
    if hasattr(signal, 'pthread_sigmask'):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # see no_interrupt
    sys.excepthook = _end
    sys.unraisablehook = _end_where_nobody_catches
    codecs.register_error(REPLACED, _replaced)
    if hasattr(sys.stdout, 'reconfigure') and sys.stdout.errors in ('strict', 'surrogateescape'):
        sys.stdout.reconfigure(errors=REPLACED)  # stderr writes backslashes, which never fails
    atexit.unregister(_finish_output)
    atexit.register(_finish_output)


# ---- a user's mistakes ---------------------------------------------------------------------------


def fail(message):
    """End the script on a user's mistake: one line on stderr, exit code 2."""
    line = one_line(message)
    with contextlib.suppress(OSError):
        print(f"error: {line}", file=sys.stderr, flush=True)
    tell_torchrun(line)
    raise SystemExit(2)


MOST = 480  # characters of a line,
MOST_WITH_COMMAND = 2000  # and of one with a `command`, which would not work if it were cut


def one_line(message):
    """A message as one printable line of moderate length."""
    line = ' '.join(str(message).split())
    # File names and rows may hold anything.
    line = ''.join(c if c.isprintable() else '\ufffd' for c in line)
    most = MOST_WITH_COMMAND if line.count('`') > 1 else MOST
    if len(line) <= most:
        return line
    return f"{line[: most - 110]} … {line[-90:]}"


def tell_torchrun(line):
    """Under torchrun, have it repeat `line` at its end, as the reason why this process failed."""
    path = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if not path:
        return
    import json  # here, since it takes 5 ms, in which Ctrl-C would print a traceback

    with contextlib.suppress(OSError), open(path, 'w', encoding='utf-8') as file:
        json.dump({'message': line, 'timestamp': int(time.time())}, file)


@contextlib.contextmanager
def user_errors():
    """The project's modules raise ValueError and OSError with a line for the user; inside this,
    that line ends the script. Only around calls that check what a user gave."""
    # the imports are done: from now on there is work to clean up
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
        _say_stopped()
        raise SystemExit(STOPPED) from None


# ---- Ctrl-C --------------------------------------------------------------------------------------


def _stop_at_once(number, frame):
    """The handler of SIGINT during imports. There is nothing to clean up, and an exception could be
    caught there."""
    _say_stopped()
    os._exit(STOPPED)


@contextlib.contextmanager
def no_interrupt():
    """Hold Ctrl-C back until this block ends. Processes started inside inherit the blocked signal,
    so it never reaches them; only the project's own scripts unblock it, in begin_script."""
    if not hasattr(signal, 'pthread_sigmask'):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _say_stopped():
    with contextlib.suppress(ValueError):  # not in the main thread
        # pressed again: do not clean up
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(STOPPED))
    # stderr is closed; the signal came during a print
    with contextlib.suppress(OSError, RuntimeError):
        print("stopped", file=sys.stderr, flush=True)


def _end(kind, error, traceback):
    """sys.excepthook, for what user_errors did not catch: one line for Ctrl-C, nothing for a closed
    pipe, otherwise a traceback."""
    if _was_interrupted(error):
        _say_stopped()
        raise SystemExit(STOPPED)  # from an excepthook, this sets the exit code
    if isinstance(error, BrokenPipeError):
        _discard_output()
        raise SystemExit(PIPE_CLOSED)
    sys.__excepthook__(kind, error, traceback)


def _was_interrupted(error):
    """Whether KeyboardInterrupt is what happened first: libraries turn it into errors of their
    own."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _end_where_nobody_catches(unraisable):
    """sys.unraisablehook: Python drops an exception in a destructor or in a function of atexit, and
    Ctrl-C with it."""
    if _was_interrupted(unraisable.exc_value):
        _say_stopped()
        os._exit(STOPPED)
    sys.__unraisablehook__(unraisable)


# ---- standard output -----------------------------------------------------------------------------


def _replaced(error):
    """The error handler of standard output: `?` for each character that its encoding lacks."""
    _lacking.add(sys.stdout.encoding)
    return codecs.replace_errors(error)


def _discard_output():
    """Redirect stdout and stderr to os.devnull where they have no reader, so that the flush at exit
    can't fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())


def _finish_output():
    """At the end: write what is left, and say whether something could not be printed.

    Ctrl-C is ignored from then on. Python is about to remove its own handlers, and the system's
    would kill a script that has done its work.
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
    for encoding in sorted(_lacking):
        hint = (
            '' if codecs.lookup(encoding).name == 'utf-8' else '; PYTHONIOENCODING=utf-8 prints it'
        )
        with contextlib.suppress(OSError):
            print(
                f"? stands for text that standard output can't show, as it is {encoding}{hint}",
                file=sys.stderr,
            )
    signal.signal(signal.SIGINT, signal.SIG_IGN)
