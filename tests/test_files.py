"""Files that are whole or not there: downloads by networks that break, and atomic writing."""

import errno
import hashlib
import os
import random

import pytest
from support.servers import FileServer

from system import files

TEXT = random.Random(0).randbytes(1_500_000)
DIGEST = hashlib.sha256(TEXT).hexdigest()
NOWHERE = 'http://127.0.0.1:9/file'  # nobody listens there
NAME = 'hamlet/input.txt'


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The seconds that downloads would have waited; and no mirror."""
    waited = []
    monkeypatch.setattr(files.time, 'sleep', waited.append)
    monkeypatch.delenv('NANOGPT_MIRROR', raising=False)
    return waited


@pytest.fixture
def server():
    with FileServer(TEXT, NAME) as server:
        yield server


@pytest.fixture
def path(tmp_path):
    """Where the download goes: into an empty folder."""
    (tmp_path / 'here').mkdir()
    return tmp_path / 'here' / 'input.txt'


@pytest.fixture
def mirror(tmp_path):
    """A folder that has the file."""
    (tmp_path / 'mirror/hamlet').mkdir(parents=True)
    (tmp_path / 'mirror' / NAME).write_bytes(TEXT)
    return tmp_path / 'mirror'


def left(path):
    """The names and sizes of what lies in the folder of `path`."""
    return {file.name: file.stat().st_size for file in path.parent.iterdir()}


WHOLE = {'input.txt': len(TEXT)}


# ---- downloads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'kind',
    [
        'the host',
        'a second host',
        'a server as mirror',
        'a folder as mirror',
        'a file:// as mirror',
    ],
)
def test_a_download_comes_from_its_host_or_a_mirror(mirror, server, path, monkeypatch, kind):
    url = {'the host': server.url, 'a second host': [NOWHERE, server.url]}.get(kind, NOWHERE)
    if 'mirror' in kind:
        monkeypatch.setenv(
            'NANOGPT_MIRROR',
            {
                'a server': server.url.removesuffix(NAME),
                'a folder': str(mirror),
                'a file://': f'{mirror.as_uri()}/',
            }[kind.removesuffix(' as mirror')],
        )
    assert files.download(url, path, DIGEST, NAME) == path
    assert path.read_bytes() == TEXT and left(path) == WHOLE
    monkeypatch.setenv('NANOGPT_MIRROR', '/nowhere')
    assert files.download(NOWHERE, path, DIGEST, NAME) == path  # it is there already


@pytest.mark.parametrize('knows_ranges', [True, False])
def test_a_connection_that_breaks_is_taken_up_where_it_was(server, path, pauses, knows_ranges):
    server.most, server.broken, server.knows_ranges = 600_000, 2, knows_ranges
    files.download(server.url, path, DIGEST, NAME)
    assert path.read_bytes() == TEXT and left(path) == WHOLE
    assert server.requests == [
        None,
        'bytes=600000-',
        f'bytes={1_200_000 if knows_ranges else 600_000}-',
    ]
    assert pauses == [1, 1 if knows_ranges else 2]  # the same bytes again are no progress


def test_a_server_that_always_starts_anew_and_breaks_is_given_up(server, path, pauses):
    server.most, server.broken, server.knows_ranges = 600_000, 100, False
    with pytest.raises(OSError, match='it ended after 600,000 of 1,500,000 bytes'):
        files.download(server.url, path, DIGEST, NAME)
    assert pauses == [1, 2, 4, 8, 16]


def test_older_bytes_do_not_count_against_a_server_that_starts_anew(server, path):
    """A part from before is longer than what comes until the connection breaks."""
    path.with_name('input.txt.part').write_bytes(TEXT[:700_000])
    server.most, server.broken, server.knows_ranges = 600_000, 1, False
    files.download(server.url, path, DIGEST, NAME)
    assert path.read_bytes() == TEXT and left(path) == WHOLE
    assert len(server.requests) == 2


def test_pauses_grow_while_nothing_comes_and_what_came_is_kept_for_the_next_call(
    server, path, pauses, monkeypatch
):
    server.most, server.broken = 600_000, 1

    def sleep(seconds):  # from here on, the server breaks each connection at once
        pauses.append(seconds)
        server.most, server.broken = 0, 100

    monkeypatch.setattr(files.time, 'sleep', sleep)
    with pytest.raises(
        OSError,
        match=r'cannot download .*600,000 of 1,500,000.*NANOGPT_MIRROR.*600,000 bytes are kept',
    ):
        files.download(server.url, path, DIGEST, NAME)
    assert pauses == [1, 2, 4, 8, 16] and left(path) == {'input.txt.part': 600_000}
    server.broken, server.requests = 0, []
    files.download([NOWHERE, server.url], path, DIGEST, NAME)
    assert (
        server.requests == ['bytes=600000-'] and path.read_bytes() == TEXT and left(path) == WHOLE
    )


def test_a_connection_that_gives_nothing_leaves_nothing(server, path, pauses):
    server.most, server.broken = 0, 100
    with pytest.raises(OSError, match='it ended after 0 of 1,500,000 bytes'):
        files.download(server.url, path, DIGEST, NAME)
    assert left(path) == {} and pauses == []


@pytest.mark.parametrize(
    'there', [b'the beginning of another file', TEXT[:-1] + b'?', TEXT + b' and more']
)
def test_a_beginning_of_another_file_is_found_out_and_the_download_starts_anew(server, path, there):
    path.with_name('input.txt.part').write_bytes(there)
    files.download(server.url, path, DIGEST, NAME)
    assert (
        server.requests == [f'bytes={len(there)}-', None]
        and path.read_bytes() == TEXT
        and left(path) == WHOLE
    )


def test_a_finished_part_needs_only_its_name(server, path):
    path.with_name('input.txt.part').write_bytes(TEXT)
    files.download(server.url, path, DIGEST, NAME)
    assert server.requests == [f'bytes={len(TEXT)}-'] and left(path) == WHOLE


@pytest.mark.parametrize(
    'there, knows_ranges, n_requests',
    [
        (b'', True, 1),
        (b'the beginning of something', True, 2),
        (b'the beginning of something', False, 1),
    ],
)
def test_a_wrong_file_is_not_kept(server, path, there, knows_ranges, n_requests):
    server.content, server.knows_ranges = b'a page that says that one has to log in', knows_ranges
    if there:
        path.with_name('input.txt.part').write_bytes(there)
    with pytest.raises(
        ValueError, match=r'is not the expected file: its sha256 is \w+, not \w+; nothing was kept'
    ):
        files.download(server.url, path, DIGEST, NAME)
    assert len(server.requests) == n_requests and left(path) == {}


def test_behind_a_host_with_a_wrong_file_the_next_is_asked(server, path, mirror, capsys):
    server.content = b'a page that says that one has to log in'
    files.download([server.url, (mirror / NAME).as_uri()], path, DIGEST, NAME)
    assert path.read_bytes() == TEXT and 'is not the expected file' in capsys.readouterr().out


@pytest.mark.parametrize('value', [None, '/nowhere', 'http://127.0.0.1:9'])
def test_no_network_is_said_at_once_with_what_to_do(path, pauses, monkeypatch, value):
    if value:
        monkeypatch.setenv('NANOGPT_MIRROR', value)
    with pytest.raises(
        OSError, match=r'cannot download .*put the file at .*input\.txt by hand, or set NANO'
    ) as raised:
        files.download(NOWHERE, path, DIGEST, NAME)
    assert left(path) == {} and pauses == [] and '\n' not in str(raised.value)


def test_what_the_host_answers_is_said(server, path):
    server.content = b''
    path.with_name('input.txt.part').write_bytes(b'so that it is asked for the rest')
    server.answer = lambda request: request.send_error(403)
    with pytest.raises(OSError, match='HTTP Error 403: Forbidden.*32 bytes are kept'):
        files.download(server.url, path, DIGEST, NAME)


def test_a_full_disk_is_one_line_and_keeps_what_has_come(server, path):
    resource = pytest.importorskip('resource', reason="only Unix limits the size of files")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    try:
        with pytest.raises(
            OSError,
            match=rf'cannot write .*\.part: {os.strerror(errno.EFBIG)}; what was downloaded is kept',
        ):
            files.download(server.url, path, DIGEST, NAME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert left(path) == {'input.txt.part': 1_000_000}
    files.download(server.url, path, DIGEST, NAME)
    assert server.requests == [None, 'bytes=1000000-'] and path.read_bytes() == TEXT


def test_a_text_of_ones_own_is_not_downloaded_over(server, path):
    path.write_text("my own words")
    with pytest.raises(ValueError, match='input.txt exists, but is not'):
        files.download(server.url, path, DIGEST, NAME)
    assert path.read_text() == "my own words" and server.requests == []


# ---- atomic files --------------------------------------------------------------------------------


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, OSError])
def test_atomic_writing_leaves_the_old_file_and_no_litter(tmp_path, error):
    path = tmp_path / 'file'
    for content in (b'old', None):
        with pytest.raises(error), files.replacing(path) as file:
            file.write(b'new, but not')
            raise error('the disk is full, say')
        assert list(tmp_path.iterdir()) == ([path] if content is None else [])
        path.write_bytes(b'old')
    assert path.read_bytes() == b'old'
    with files.replacing(path) as file:
        file.write(b'new')
    assert path.read_bytes() == b'new' and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with (
        pytest.raises(OSError, match=r'cannot write .*no/file'),
        files.replacing(tmp_path / 'no/file'),
    ):
        pass
