"""Files that are whole or not there: atomic writing, checksums, downloads."""
import contextlib
import hashlib
import http.client
import os
import urllib.request
from pathlib import Path


@contextlib.contextmanager
def replacing(path):
    """A binary file that takes the place of `path` once it is written and on the disk.

    Whatever goes wrong before that leaves `path` as it was and no litter. Raises OSError, with the path in it.
    """
    path = Path(path)
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
    """Put a folder's renames on the disk, where the system can."""
    with contextlib.suppress(OSError):      # Windows opens no folders
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
    """Fetch `url`, of a size that fits into memory, to `path`, unless a file with this sha256 is there; returns `path`.

    NANOGPT_MIRROR, a folder or a URL prefix, takes the place of the host: `mirrored_as` is the file's name in it.
    Raises OSError without a network, ValueError where the content is not the expected one.
    """
    path = Path(path)
    if path.is_file():
        if sha256(path) != digest:
            raise ValueError(f"{path} is there, but is not {url}: remove it; for a text of your own, copy this folder and "
                             "let its prepare.py read the text in place of the download")
        return path
    if mirror := os.environ.get('NANOGPT_MIRROR'):
        url = f'{mirror.rstrip("/")}/{mirrored_as}'
    try:
        with urllib.request.urlopen(url, timeout=60) if '://' in url else open(url, 'rb') as source:
            content = source.read()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, 'reason', None) or getattr(error, 'strerror', None) or error
        raise OSError(f"cannot download {url} ({reason}): put the file at {path} by hand, or set NANOGPT_MIRROR to a "
                      f"folder or URL that has {mirrored_as}") from None
    if (found := hashlib.sha256(content).hexdigest()) != digest:
        raise ValueError(f"{url} is not the expected file: its sha256 is {found}, not {digest}; nothing was kept")
    with replacing(path) as file:
        file.write(content)
    return path
