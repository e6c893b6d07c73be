"""Servers of this machine: one that gives out a file, also by halves, and one like the Hugging Face
Hub."""

import hashlib
import http.server
import json
import threading

COMMIT = 'c0ffee' * 6 + 'c0de'


class Handler(http.server.BaseHTTPRequestHandler):
    """Passes a request to its server's `answer`."""

    def do_GET(self):
        self.server.answer(self)

    do_HEAD = do_GET

    def reply(self, status, content=b'', headers=(), part=None):
        """part: how many bytes of the content are sent before the connection breaks."""
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(content[:part])

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Answers at `url` inside of a `with`."""

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.requests = []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()
        return super().__enter__()

    def __exit__(self, *error):
        self.shutdown()
        super().__exit__(*error)

    def answer(self, request):
        raise NotImplementedError


class FileServer(Server):
    """Answers any path with `content`; `requests` are the Ranges asked for.

    knows_ranges: otherwise each answer begins at the start. broken: how many of the next answers
    break off after `most` bytes; the rest are whole.
    """

    def __init__(self, content=b'', name='file'):
        super().__init__()
        self.url = f'{self.url}/{name}'
        self.content = content
        self.most = None
        self.broken = 0
        self.knows_ranges = True

    def answer(self, request):
        asked = request.headers['Range']
        self.requests.append(asked)
        start = 0
        if asked and self.knows_ranges:
            start = int(asked.removeprefix('bytes=').removesuffix('-'))
        if asked and start >= len(self.content):
            request.send_error(416)
            return
        part = None
        if self.broken > 0:
            part = self.most
            self.broken -= 1
        request.reply(206 if start else 200, self.content[start:], part=part)


class Hub(Server):
    """The Hub: the dataset own/set of {name: bytes} `files`, and the models in a folder.

    What has `gated` or `closed` in its name is not open to everybody. `requests` are
    'METHOD path', and everything is of COMMIT.
    """

    def __init__(self, models):
        super().__init__()
        self.models = models
        self.files = {}

    def answer(self, request):
        path = request.path.partition('?')[0]
        self.requests.append(f'{request.command} {path}')
        if 'gated' in path or path.startswith('/closed'):
            return request.reply(403, headers={'X-Error-Code': 'GatedRepo'})
        if path in ('/api/datasets/own/set', f'/api/datasets/own/set/revision/{COMMIT}'):
            return request.reply(200, self.listing())
        content, error = self.find(path)
        if content is None:
            return request.reply(404, headers={'X-Error-Code': error, 'X-Repo-Commit': COMMIT})
        headers = {'X-Repo-Commit': COMMIT, 'ETag': f'"{hashlib.sha256(content).hexdigest()}"'}
        request.reply(200, content, headers)

    def listing(self):
        """What the Hub's interface says of own/set."""
        siblings = [
            {'rfilename': name, 'size': len(content)} for name, content in self.files.items()
        ]
        return json.dumps({'id': 'own/set', 'sha': COMMIT, 'siblings': siblings}).encode()

    def find(self, path):
        """(a file's content, or None; then the Hub's word for what is missing)."""
        repository, _, rest = path.lstrip('/').partition('/resolve/')
        revision, _, name = rest.partition('/')
        if repository == 'datasets/own/set' and revision == COMMIT:
            return self.files.get(name), 'EntryNotFound'
        file = self.models / repository / name
        if file.is_file():
            return file.read_bytes(), ''
        if repository and (self.models / repository).is_dir():
            return None, 'EntryNotFound'
        return None, 'RepoNotFound'
