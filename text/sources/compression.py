"""Reads files that may be compressed: plain, .gz or .zst."""

import contextlib
import gzip
import io
import zlib

BLOCK = 1 << 20  # bytes read at a time
ENDINGS = {'.gz': 'gz', '.zst': 'zst'}  # of a name: the compression


def split_name(name):
    """(name without the ending of a compressed file, '' or the compression: gz, zst)."""
    for ending, compression in ENDINGS.items():
        if name.lower().endswith(ending):
            return name[: -len(ending)], compression
    return name, ''


@contextlib.contextmanager
def opened(file):
    """(the file on the disk, its unpacked content), both binary files to read from.

    file: a formats.SourceFile. Raises ValueError if the file is damaged or a package is missing.
    """
    damages = [EOFError, zlib.error, gzip.BadGzipFile]
    try:
        with open(file.path, 'rb') as raw:
            if file.compression == 'zst':
                try:
                    import zstandard
                except ImportError:
                    raise ValueError(
                        f"{file.name} needs a package: pip install zstandard"
                    ) from None
                damages.append(zstandard.ZstdError)
                blocks = _unpacked_blocks(raw, zstandard.ZstdDecompressor())
                yield raw, io.BufferedReader(_IteratorFile(blocks), BLOCK)
            elif file.compression == 'gz':
                yield raw, gzip.GzipFile(fileobj=raw)
            else:
                yield raw, raw
    except tuple(damages) as error:
        raise ValueError(f"{file.name} is damaged: {error}") from None


def _unpacked_blocks(raw, decompressor):
    """Yields the content of a .zst file, block by block. Raises EOFError if its end is missing,
    which the library's own reader ignores."""
    frame = None
    while block := raw.read(1 << 12):  # a block may unpack to 32,000 times its size
        while block:
            if frame is None:
                frame = decompressor.decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data
            if frame.eof:
                frame = None
    if frame:
        raise EOFError("its end is missing")


class _IteratorFile(io.RawIOBase):
    """An iterator of bytes as a file to read from."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.left = b''

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.left:
            block = next(self.blocks, None)
            if block is None:
                return 0
            self.left = memoryview(block)
        n = min(len(buffer), len(self.left))
        buffer[:n] = self.left[:n]
        self.left = self.left[n:]
        return n
