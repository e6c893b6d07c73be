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


def open_dataset(words, *args):
    """The dataset, or the Mixture of several, that --dataset= names; the arguments are theirs."""
    return (open_single if len(parse(words)) == 1 else Mixture)(words, *args)


def open_unmixed(words):
    """The one dataset that --dataset= names, to read it token by token. ValueError where it is a
    mixture."""
    if len(parts := parse(words)) > 1:
        raise ValueError(f"{words} is a mixture: give one of them, as --dataset={parts[0][0]}")
    _prepare_if_small(words)
    data = Dataset(words, 1, 1)
    if data.masks:
        print(
            f"{data.folder} marks what is learned: evaluated is all of its text, not as in training that alone",
            file=sys.stderr,
        )
    return data


def prepare_if_small(words):
    """Run data/NAME/prepare.py of each dataset whose bins are missing, where it says that it
    downloads less than 100 MB."""
    for name, _ in parse(words):
        _prepare_if_small(name)


def _prepare_if_small(name):
    """Run data/NAME/prepare.py where the bins are missing and it says that it downloads less than
    100 MB."""
    script = folders.DATA_FOLDER / name / 'prepare.py'
    if is_path(name):  # only the scripts in data/ are run, and nothing else
        return
    if (
        any(
            (folders.DATA_FOLDER / name / first).is_file()
            for first in ('train.bin', 'train-00000.bin')
        )
        or not script.is_file()
    ):
        return
    size = re.search(r'^DOWNLOAD_MB = ([\d._]+)', script.read_text(encoding='utf-8'), re.MULTILINE)
    if not size:  # Dataset says what is missing
        return
    if float(size[1]) >= 100:
        raise FileNotFoundError(
            f"data/{name} is not prepared, and it is large: run `python data/{name}/prepare.py` first"
        )
    print(f"data/{name} is not prepared yet: running data/{name}/prepare.py", flush=True)
    code = run_script(script)
    if code:
        raise SystemExit(code)  # it has said why


def run_script(script):
    """Run a script of the project to its end; returns its exit code.

    A terminal sends Ctrl-C to the script too, which cleans up and says so. KeyboardInterrupt where
    it was not told.
    """
    interrupts = []  # when: an exception in the wait could lose the exit code
    with errors.no_interrupt():
        process = subprocess.Popen([sys.executable, str(script)])
        before = signal.signal(
            signal.SIGINT, lambda number, frame: interrupts.append(time.monotonic())
        )
    try:
        while process.poll() is None:
            time.sleep(0.05)
            if interrupts and time.monotonic() > interrupts[0] + 5:
                process.terminate()
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts and process.returncode != errors.STOPPED:
        raise KeyboardInterrupt
    return process.returncode
