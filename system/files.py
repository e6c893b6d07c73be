"""Files that are complete or absent: atomic writing, locks, checksums, downloads."""

import contextlib
import hashlib
import http.client
import io
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

# Once something was received, this many attempts without another byte end a download. The pause
# before each is twice the previous one.
TRIES = 5


# ---- writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path):
    """A binary file to write, which replaces `path` once it is complete and on the disk.

    If anything goes wrong before, `path` stays as it was and nothing else is left. Raises OSError,
    with the path in it.
    """
    path = Path(path)
    is_special = path.exists() and not path.is_file() and not path.is_dir()
    if is_special:  # such as /dev/null: write to it, and never replace it
        with open(path, 'wb') as file:
            yield file
        return

    temporary = path.with_name(f'.{path.name}.tmp')
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


def sync_folder(folder):
    """Put a folder's renames on the disk, where the operating system can."""
    with contextlib.suppress(OSError):  # Windows can't open folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path):
    """The sha256 of a file's content, in hex."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


# ---- one process at a time -----------------------------------------------------------------------


def lock(path):
    """Open a file that no other process can lock until it is closed; returns it.

    Raises BlockingIOError if another process has locked it, OSError if it can't be opened. Where
    the system has no locks, as on Windows and some network file systems, it opens the file.
    """
    file = open(path, 'wb')
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except (ImportError, OSError):
        pass
    return file


# The folders that this process has locked: alone_in can be nested.
_locked_folders = set()


@contextlib.contextmanager
def alone_in(folder):
    """Create a dataset's folder, and keep other processes from preparing it during the body.

    A folder that is empty at the end is removed. Raises OSError if another process prepares it, or
    it can't be written to.
    """
    folder = Path(folder)
    if folder in _locked_folders:
        yield
        return

    lock_path = folder / '.lock'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock_file = lock(lock_path)
    except BlockingIOError:
        raise OSError(
            f"another process is preparing {folder}: wait until it ends, or use another name"
        ) from None
    except OSError as error:
        raise OSError(f"{folder} can't be written to: {error.strerror}") from None

    _locked_folders.add(folder)
    try:
        yield
    finally:
        _locked_folders.discard(folder)
        if os.listdir(folder) == [lock_path.name]:
            with contextlib.suppress(OSError):  # Windows can't remove an open file
                lock_path.unlink()
                folder.rmdir()
        lock_file.close()


def workplace(folder):
    """The subfolder of a dataset's folder for what is not complete yet."""
    return Path(folder) / '.preparing'


# ---- downloads -----------------------------------------------------------------------------------


def download(url, path, digest, mirrored_as):
    """Download `url` to `path`, unless the file is there; returns `path`.

    url: one, or a list of places that have the same file, which are tried in turn. digest: the
    file's sha256. mirrored_as: its name below NANOGPT_MIRROR, a folder or URL prefix, which
    replaces all urls if it is set.

    Until it is complete the file is PATH.part. An interrupted download continues from there after a
    pause or in the next call, from any of the places. Raises OSError if network or disk fail,
    ValueError if the content is another one.
    """
    path = Path(path)
    part = path.with_name(f'{path.name}.part')
    if path.is_file():
        if sha256(path) != digest:
            raise ValueError(
                f"{path} exists, but is not {url}: remove it; to train on a text of your own, "
                f"`python data/prepare.py NAME {path}` makes a dataset of it"
            )
        return path

    urls = [url] if isinstance(url, str) else url
    mirror = os.environ.get('NANOGPT_MIRROR')
    if mirror:
        urls = [f'{mirror.rstrip("/")}/{mirrored_as}']

    for url in urls:
        try:
            _fetch(url, part, digest)
            os.replace(part, path)
            sync_folder(path.parent)
            return path
        except ConnectionError as error:
            kept = ''
            if part.is_file():
                kept = (
                    f"; {part.stat().st_size:,} bytes are kept, and the same command continues "
                    "from there"
                )
            problem = OSError(
                f"cannot download {url} ({error}): put the file at {path} by hand, or set "
                f"NANOGPT_MIRROR to a folder or URL that has {mirrored_as}{kept}"
            )
        except ValueError as error:
            problem = error
        except OSError as error:
            raise OSError(
                f"cannot write {part}: {error.strerror or error}; what was downloaded is kept, and "
                "the same command continues from there"
            ) from None
        if url == urls[-1]:
            raise problem from None
        print(f"{problem}; trying another place", flush=True)


def _fetch(url, part, digest):
    """Complete the file `part`, which may exist, with the content of `url`, and check its sha256.

    Raises ConnectionError if it can't be completed, ValueError if the content is another one. Other
    OSErrors are those of writing.
    """
    tries_left = 0  # a connection that never sends anything is not tried again
    has_older_bytes = part.is_file()  # from before this call: they may be of another file
    furthest = _size(part)  # a server that breaks at the same byte each time makes no progress
    while True:
        size_before = _size(part)
        try:
            source, first, size = _open(url, start=size_before)
            if first == 0 and has_older_bytes:  # this server starts again: the old bytes are gone
                has_older_bytes = False
                furthest = 0
            if not sys.stderr.isatty() and (size or 0) - first > 10e6:
                print(f"downloading {url}: {(size - first) / 1e6:,.0f} MB", flush=True)
            with source:
                found = _append(source, part, first, size)
        except ConnectionError:
            has_progressed = _size(part) > furthest
            furthest = max(furthest, _size(part))
            if part.is_file() and _size(part) == 0:
                part.unlink()
            tries_left = TRIES if has_progressed else tries_left - 1
            if tries_left <= 0:
                raise
            time.sleep(2 ** (TRIES - tries_left))
            continue

        if found == digest:
            return
        part.unlink()
        if not has_older_bytes:
            raise ValueError(
                f"{url} is not the expected file: its sha256 is {found}, not {digest}; nothing was "
                "kept"
            )


def _size(path):
    return path.stat().st_size if path.is_file() else 0


def _open(url, start):
    """Open a URL or a local file to read the bytes from `start`.

    Returns (source, first, size): what to read from, the position of its first byte, which is 0 if
    the server ignores `start`, and the size of the whole content, None if unknown. Raises
    ConnectionError.
    """
    if '://' not in url:
        with _connection_errors():
            source = open(url, 'rb')
        return source, 0, os.fstat(source.fileno()).st_size

    headers = {'Range': f'bytes={start}-'} if start else {}
    try:
        with _connection_errors():
            source = urllib.request.urlopen(
                urllib.request.Request(url, headers=headers), timeout=60
            )
    except urllib.error.HTTPError as error:
        if error.code == 416:  # there is nothing from `start` on
            return io.BytesIO(), start, start
        raise ConnectionError(error) from None
    first = start if source.status == 206 else 0
    length = source.headers['Content-Length']
    size = first + int(length) if length else None
    return source, first, size


def _append(source, part, first, size):
    """Write what comes from `source` to the file `part`, from position `first` on.

    Returns the sha256 of the whole file. Raises ConnectionError if less comes than `size` says.
    """
    at = first
    with (
        open(part, 'r+b' if first else 'wb') as file,
        tqdm(
            desc=part.stem,
            total=size,
            leave=False,
            initial=first,
            unit='B',
            unit_scale=True,
            disable=None,  # unless stderr is a terminal
        ) as bar,
    ):
        # Hashing what is there leaves the file at its end.
        digest = hashlib.file_digest(file, 'sha256') if first else hashlib.sha256()
        for piece in _pieces(source):
            file.write(piece)
            digest.update(piece)
            bar.update(len(piece))
            at += len(piece)
        file.flush()
        os.fsync(file.fileno())
    if at < (size or 0):
        raise ConnectionError(f"it ended after {at:,} of {size:,} bytes")
    return digest.hexdigest()


def _pieces(source):
    """The content of `source` in pieces of up to 256 KiB. Raises ConnectionError."""
    while True:
        with _connection_errors():
            piece = source.read1(2**18)
        if not piece:
            return
        yield piece


@contextlib.contextmanager
def _connection_errors():
    """Turn errors of reading into ConnectionError with the reason, apart from HTTPError."""
    try:
        yield
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, 'reason', None) or getattr(error, 'strerror', None) or error
        raise ConnectionError(reason) from None
