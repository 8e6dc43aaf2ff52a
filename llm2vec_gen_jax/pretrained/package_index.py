"""Downloads a wheel from a Python package index without pip: simple repository API, JSON or HTML (PEP 503, 691)."""

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
# Environment variables from which uv and pip read the index.
VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
_ACCEPTED = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_TIMEOUT = 30  # seconds without data
_MAX_PAGE_BYTES = 20_000_000
_MAX_WHEEL_BYTES = 1_000_000_000
_CHUNK_BYTES = 1 << 20


def index_url() -> str:
    """Returns the URL of the index: from the variables of uv and pip, otherwise PyPI."""
    for name in VARIABLES:
        if value := os.environ.get(name, "").strip():
            return re.sub(r"^[\w.-]+=(?=\w+://)", "", value).rstrip("/")  # uv allows NAME=URL
    return DEFAULT_INDEX


def fetch_wheel(package: str, version: str, folder: pathlib.Path) -> tuple[pathlib.Path, None] | tuple[None, str]:
    """Downloads the platform-independent wheel of a version into a folder, with a progress bar.

    The file must have the SHA-256 of the index, if the index states one. Returns (path, None) or (None, reason).
    """
    index = index_url()
    shown = _without_password(index)
    page = f"{index}/{re.sub('[-_.]+', '-', package).lower()}/"
    start = f"{re.sub('[-_.]+', '_', package).lower()}-{version}-"
    try:
        links = _links(page)
        wheels = [link for link in links if link[0].lower().startswith(start) and link[0].endswith("-none-any.whl")]
        if not wheels:
            return None, f"the index {shown} has no wheel of {package}=={version}"
        name, url, sha256 = wheels[0]
        path = folder / pathlib.PurePosixPath(name).name
        digest = _download(url, path)
    except urllib.error.HTTPError as error:
        return None, f"the index {shown} responded with {error.code} {error.reason}"
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        return None, f"the index {shown} cannot be read ({_without_password(str(error))})"
    if sha256 and digest != sha256:
        return None, f"{name}: wrong SHA-256: the index {shown} states {sha256}, found {digest}"
    return path, None


def _links(page):
    """Returns [(file name, URL, SHA-256 or None)] from the page of a project."""
    with _open(page, _ACCEPTED) as response:
        content, base = response.read(_MAX_PAGE_BYTES), _with_login(response.url, page)
        kind = response.headers.get_content_type()
    if kind.endswith("json"):
        try:
            files = json.loads(content)["files"]
            links = [(file["filename"], file["url"], file.get("hashes", {}).get("sha256")) for file in files]
        except (KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{page} is not a list of files") from None
    else:
        parser = _LinkParser()
        parser.feed(content.decode("utf-8", errors="replace"))
        links = []
        for url in parser.urls:
            url, _, fragment = url.partition("#")
            name = pathlib.PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
            sha256 = re.fullmatch("sha256=([0-9a-f]{64})", fragment)
            links.append((name, url, sha256 and sha256[1]))
    return [(name, _with_login(urllib.parse.urljoin(base, url), page), sha256) for name, url, sha256 in links]


class _LinkParser(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.urls = []

    def handle_starttag(self, tag, attrs):
        if tag == "a" and (url := dict(attrs).get("href")):
            self.urls.append(url)


def _download(url, path):
    """Downloads a URL to a file; returns the SHA-256."""
    digest = hashlib.sha256()
    with _open(url, "*/*") as response, open(path, "wb") as file:
        size = int(response.headers.get("Content-Length") or 0) or None
        with bar(size, "B", f"downloading {path.name}", scale=True) as progress:
            while chunk := response.read(_CHUNK_BYTES):
                if file.tell() > _MAX_WHEEL_BYTES:
                    raise OSError(f"{path.name} is larger than {_MAX_WHEEL_BYTES} bytes")
                file.write(chunk)
                digest.update(chunk)
                progress.update(len(chunk))
    if size and path.stat().st_size != size:
        raise OSError(f"{path.name} ended after {path.stat().st_size} of {size} bytes")
    return digest.hexdigest()


def _open(url, accept):
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"{url}: not an http or https URL")
    headers = {"Accept": accept, "User-Agent": "llm2vec-gen-jax"}
    if parts.username is not None:
        login = ":".join(urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
        url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)


def _with_login(url, page):
    """Returns `url` with the user and password of `page` if both are on the same server."""
    parts, page_parts = urllib.parse.urlsplit(url), urllib.parse.urlsplit(page)
    login, _, server = page_parts.netloc.rpartition("@")
    same_server = (parts.scheme, parts.netloc) == (page_parts.scheme, server)
    return parts._replace(netloc=page_parts.netloc).geturl() if login and same_server else url


def _without_password(text):
    return re.sub(r"://[^/@\s]*@", "://", text)
