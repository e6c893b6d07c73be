"""What the option --dataset= names: a folder in data/, a path, or a mixture of several. It is
opened, and prepared first where that is a small download."""

import re
import signal
import subprocess
import sys
import time

from system import errors
from text import folders
from text.dataset import Dataset, open_single
from text.folders import is_path
from text.mixture import Mixture, parse

# A download of this size is not started unasked.
LARGE_MB = 100


def open_dataset(words, *args):
    """The dataset that --dataset= names, or the Mixture of several; the arguments are theirs."""
    if len(parse(words)) == 1:
        return open_single(words, *args)
    return Mixture(words, *args)


def open_unmixed(words):
    """The one dataset that --dataset= names, to read it token by token; prepares it first where
    that is a small download. Raises ValueError if it is a mixture."""
    parts = parse(words)
    if len(parts) > 1:
        raise ValueError(f"{words} is a mixture: give one of them, as --dataset={parts[0][0]}")
    prepare_if_small(words)
    data = Dataset(words, block_size=1, batch_size=1)
    if data.masks:
        print(
            f"{data.folder} marks what is learned: all of its text is evaluated here, unlike in "
            "training",
            file=sys.stderr,
        )
    return data


def prepare_if_small(words):
    """Run data/NAME/prepare.py of each dataset whose bins are missing, if it downloads less than
    LARGE_MB."""
    for name, _ in parse(words):
        if not is_path(name):  # only the project's own scripts run, those in data/
            _prepare_if_small(name)


def _prepare_if_small(name):
    folder = folders.DATA_FOLDER / name
    script = folder / 'prepare.py'
    is_prepared = any((folder / bin).is_file() for bin in ('train.bin', 'train-00000.bin'))
    if is_prepared or not script.is_file():
        return
    source = script.read_text(encoding='utf-8')
    megabytes = re.search(r'^DOWNLOAD_MB = ([\d._]+)', source, re.MULTILINE)
    if not megabytes:  # not one of ours: Dataset says what is missing
        return
    if float(megabytes[1]) >= LARGE_MB:
        raise FileNotFoundError(
            f"data/{name} is not prepared, and it is large: run `python data/{name}/prepare.py` "
            "first"
        )
    print(f"data/{name} is not prepared yet: running data/{name}/prepare.py", flush=True)
    code = run_script(script)
    if code:
        raise SystemExit(code)  # the script has said why


def run_script(script):
    """Run a script of the project to its end; returns its exit code.

    A terminal sends Ctrl-C to the script too, which cleans up and says so. Raises KeyboardInterrupt
    if the script did not get it.
    """
    # A handler that only notes the time: an exception during the wait could lose the exit code.
    interrupts = []
    with errors.no_interrupt():
        process = subprocess.Popen([sys.executable, str(script)])
        previous_handler = signal.signal(
            signal.SIGINT, lambda number, frame: interrupts.append(time.monotonic())
        )
    try:
        while process.poll() is None:
            time.sleep(0.05)
            if interrupts and time.monotonic() > interrupts[0] + 5:
                process.terminate()
    finally:
        signal.signal(signal.SIGINT, previous_handler)
    if interrupts and process.returncode != errors.STOPPED:
        raise KeyboardInterrupt
    return process.returncode
