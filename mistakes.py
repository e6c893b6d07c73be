"""How a script ends on a user's mistake: one line on stderr, exit code 2. Apart from runtime.py, which loads torch."""
import contextlib
import json
import os
import signal
import sys
import time


def fail(message):
    """End the script on a user's mistake: one line on stderr, exit code 2."""
    line = one_line(message)
    print(f"error: {line}", file=sys.stderr, flush=True)
    tell_torchrun(line)
    raise SystemExit(2)


MOST = 480      # characters of a line,
MOST_WITH_COMMAND = 2000        # and of one with a `command`, which would not work if it were cut


def one_line(message):
    """A message as one printable line of moderate length."""
    line = ' '.join(str(message).split())
    # File names and rows may hold anything.
    line = ''.join(c if c.isprintable() else '\ufffd' for c in line)
    most = MOST_WITH_COMMAND if line.count('`') > 1 else MOST
    if len(line) <= most:
        return line
    return f"{line[:most - 110]} … {line[-90:]}"


def tell_torchrun(line):
    """Under torchrun, have it repeat `line` at its end, as what this process failed of."""
    if path := os.environ.get('TORCHELASTIC_ERROR_FILE'):
        with contextlib.suppress(OSError), open(path, 'w') as file:
            json.dump({'message': line, 'timestamp': int(time.time())}, file)


@contextlib.contextmanager
def user_errors():
    """The project's modules raise ValueError and OSError with a line for the user; inside this, that line ends the
    script. Only around calls that check what a user gave."""
    try:
        yield
    except BrokenPipeError:     # `| head` has seen enough; what is left of the output goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13) from None
    except (ValueError, OSError) as error:
        fail(f"{error.filename}: {error.strerror}" if getattr(error, 'filename', None) else error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
