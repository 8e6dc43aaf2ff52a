"""A Hugging Face hub on this machine: its cache on disk, and a server with the part of its API that downloads use."""

import contextlib
import http.server
import json
import pathlib
import threading
import urllib.parse

COMMIT = "4567cdef" * 5


def add_to_cache(cache, folder, revision="main", commit="0123abcd", repository="someone/embedder"):
    """Adds a folder to a hub cache as a revision of a repository, as the hub's client lays it out."""
    repository = cache / f"models--{repository.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    for path in (repository / "refs", blobs):
        path.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    for number, file in enumerate(path for path in pathlib.Path(folder).rglob("*") if path.is_file()):
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        (blobs / f"{commit}-{number}").write_bytes(file.read_bytes())
        link.symlink_to(blobs / f"{commit}-{number}")


@contextlib.contextmanager
def serving(repository, files, revisions, token):
    """Serves {name: bytes} as the private model `repository`, at every one of `revisions`. Yields the address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            api, page = f"/api/models/{repository}/", f"/{repository}/resolve/{COMMIT}/"
            if self.headers["Authorization"] != f"Bearer {token}":
                self.answer(401, b"{}", **{"X-Error-Code": "RepoNotFound"})
            elif path.startswith(f"{api}revision/"):
                known = path.removeprefix(f"{api}revision/") in revisions
                value = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                missing = {} if known else {"X-Error-Code": "RevisionNotFound"}
                self.answer(200 if known else 404, json.dumps(value).encode(), **missing)
            elif path.startswith(f"{api}tree/"):
                rows = [
                    {"type": "file", "path": name, "size": len(content), "oid": f"{number:040}"}
                    for number, (name, content) in enumerate(files.items())
                ]
                self.answer(200, json.dumps(rows).encode())
            elif (name := path.removeprefix(page)) in files:
                etag = f'"{list(files).index(name):040}"'
                self.answer(200, files[name], **{"ETag": etag, "X-Repo-Commit": COMMIT})
            else:
                self.answer(404, b"{}", **{"X-Error-Code": "EntryNotFound"})

        do_HEAD = do_GET

        def answer(self, status, content, **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(content), "Content-Type": "application/json", **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
