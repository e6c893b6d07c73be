"""Files that are whole or not there: atomic writing, checksums, downloads."""

import contextlib
import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

# after a break in the middle of a download, each after twice the pause, without a byte between them
TRIES = 5


@contextlib.contextmanager
def replacing(path):
    """A binary file that takes the place of `path` once it is written and on the disk.

    Whatever goes wrong before that leaves `path` as it was and no litter. Raises OSError, with the
    path in it.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.tmp')
    # /dev/null is written to, and stays what it is
    if path.exists() and not path.is_file() and not path.is_dir():
        with open(path, 'wb') as file:
            yield file
        return
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(f"cannot write {path}: {error.strerror or error}") from None
        raise


_alone_in = set()


def workplace(folder):
    """Where what is being prepared in a dataset's folder waits until it is whole."""
    return Path(folder) / '.preparing'


def lock(path):
    """Open a file that no other process can have locked like this until it is closed. Raises
    BlockingIOError, OSError."""
    file = open(path, 'wb')
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except (ImportError, OSError):  # Windows; a network file system without locks
        pass
    return file


@contextlib.contextmanager
def alone_in(folder):
    """Make a dataset's folder and keep other processes from preparing it; a folder that stays empty
    goes. OSError."""
    folder = Path(folder)
    if folder in _alone_in:
        yield
        return
    held = folder / '.lock'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        locked = lock(held)
    except BlockingIOError:
        raise OSError(
            f"another process prepares {folder}: wait for its end, or take another name"
        ) from None
    except OSError as error:
        raise OSError(f"{folder} can't be written to: {error.strerror}") from None
    _alone_in.add(folder)
    try:
        yield
    finally:
        _alone_in.discard(folder)
        if os.listdir(folder) == [held.name]:
            with contextlib.suppress(OSError):  # Windows removes nothing that is open
                held.unlink()
                folder.rmdir()
        locked.close()


def sync_folder(folder):
    """Put a folder's renames on the disk, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path):
    """The sha256 of a file's content, in hex."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def download(url, path, digest, mirrored_as):
    """Fetch `url`, or the first that can be had of several, to `path`, unless a file with this
    sha256 is there.

    Returns `path`. What has come is in PATH.part until all has: a download that breaks is taken up
    again there, after a pause or by the next call, from any of the places. NANOGPT_MIRROR, a folder
    or a URL prefix, stands for all of them: `mirrored_as` is the file's name in it. Raises OSError
    without a network or room, ValueError for another content.
    """
    path = Path(path)
    part = path.with_name(f'{path.name}.part')
    if path.is_file():
        if sha256(path) != digest:
            raise ValueError(
                f"{path} is there, but is not {url}: remove it; to learn a text of your own, `python "
                f"data/prepare.py NAME {path}` makes a dataset of it"
            )
        return path
    urls = [url] if isinstance(url, str) else url
    if mirror := os.environ.get('NANOGPT_MIRROR'):
        urls = [f'{mirror.rstrip("/")}/{mirrored_as}']
    for url in urls:
        try:
            _fetch(url, part, digest)
            os.replace(part, path)
            sync_folder(path.parent)
            return path
        except (ConnectionError, ValueError) as error:
            if isinstance(error, ConnectionError):
                kept = (
                    f"; {part.stat().st_size:,} bytes are kept, the same command goes on there"
                    if part.is_file()
                    else ''
                )
                error = OSError(
                    f"cannot download {url} ({error}): put the file at {path} by hand, or set NANOGPT_MIRROR "
                    f"to a folder or URL that has {mirrored_as}{kept}"
                )
            if url == urls[-1]:
                raise error from None
            print(f"{error}; trying another place", flush=True)
        except OSError as error:
            raise OSError(
                f"cannot write {part}: {error.strerror or error}; what has come is kept, the same command goes "
                "on there"
            ) from None


def _fetch(url, part, digest):
    """Fill `part`, of which a beginning may be there, with the content of `url`, which has this
    sha256.

    Raises ConnectionError where no more of it comes, ValueError where it is another; other OSErrors
    are the disk's.
    """
    tries, foreign = 0, part.is_file()  # foreign: some of it is from before this call
    while True:
        first = at = part.stat().st_size if part.is_file() else 0
        try:
            content = _content(url, at)
            first, size = next(content)
            at, foreign = first, foreign and first > 0
            if not sys.stderr.isatty() and (size or 0) - at > 10e6:
                print(f"downloading {url}: {(size - at) / 1e6:,.0f} MB", flush=True)
            with (
                open(part, 'r+b' if at else 'wb') as file,
                tqdm(
                    None,
                    part.stem,
                    size,
                    False,
                    initial=at,
                    unit='B',
                    unit_scale=True,
                    disable=None,
                ) as bar,
            ):
                hashed = hashlib.file_digest(file, 'sha256') if at else hashlib.sha256()
                for piece in content:
                    file.write(piece)
                    hashed.update(piece)
                    bar.update(len(piece))
                    at += len(piece)
                file.flush()
                os.fsync(file.fileno())
            if at < (size or 0):
                raise ConnectionError(f"it ended after {at:,} of {size:,} bytes")
        except ConnectionError:
            if part.is_file() and not part.stat().st_size:
                part.unlink()
            tries = TRIES if at > first else tries - 1
            if tries <= 0:  # nothing has come in this call, or nothing for a while
                raise
            time.sleep(2 ** (TRIES - tries))
            continue
        if (found := hashed.hexdigest()) == digest:
            return
        part.unlink()
        if not foreign:
            raise ValueError(
                f"{url} is not the expected file: its sha256 is {found}, not {digest}; nothing was kept"
            )


def _content(url, start):
    """(where the content begins that follows: at `start`, or 0; the size of all or None), then that
    content in pieces.

    Raises ConnectionError.
    """
    remote = '://' in url
    try:
        request = (
            urllib.request.Request(url, headers={'Range': f'bytes={start}-'} if start else {})
            if remote
            else url
        )
        with urllib.request.urlopen(request, timeout=60) if remote else open(url, 'rb') as source:
            first = start if remote and source.status == 206 else 0
            length = (
                source.headers['Content-Length'] if remote else os.fstat(source.fileno()).st_size
            )
            yield first, first + int(length) if length else None
            while piece := source.read1(1 << 18):
                yield piece
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise ConnectionError(error) from None
        yield start, start  # nothing lies behind what is there
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            getattr(error, 'reason', None) or getattr(error, 'strerror', None) or error
        ) from None
