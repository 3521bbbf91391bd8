"""
A small Hub on loopback: what `huggingface_hub` needs to create, fill, read and refuse model repositories over HTTP.

It answers as huggingface.co does: commits are NDJSON, large files go through git LFS, small files are reached by a
relative redirect and large ones by one to another host. An anonymous reader of a private or missing repository gets
401, one who is logged in 404, and a gated repository answers 401 or 403.

    with HubServer() as hub:
        subprocess.run(command, env={**os.environ, **hub.environment("writer"), "HF_HOME": cache})
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id


LFS_SUFFIXES = (".safetensors", ".bin", ".png")
# Whoever has the first may do all, the second is known but was never let into a private or gated repository
WRITER, STRANGER = "hf_writer", "hf_stranger"
TOKENS = {"writer": WRITER, "stranger": STRANGER, "nobody": ""}


@dataclass
class Repository:
    """`commits`: commit -> path -> SHA of the content; `branches`: name -> commit."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return self.branches["main"]

    def add_commit(self, message: str, files: dict[str, str], branch: str = "main") -> str:
        commit = hashlib.sha1(json.dumps([len(self.commits), message, files]).encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        self.messages.append(message)
        return commit


@dataclass
class Request:
    """One answered request: bytes of its body and of the answer's."""

    path: str
    received: int
    sent: int


class Refusal(Exception):
    def __init__(self, status: int, code: str, message: str):
        self.status, self.code, self.message = status, code, message


class HubServer:
    """
    Attributes:
        repositories: by `org/name`; to be changed at will, as their owners would.
        requests: all that were answered, in order.
        interruptions: SHA-256 of a large file -> how many of its next downloads get no answer.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.contents: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.interruptions: dict[str, int] = {}
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # Another host to the client, as the servers for large files are, to which it must not show its token
        self.storage_url = f"http://localhost:{self.server.server_port}/lfs"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, user: str) -> dict[str, str]:
        """For a process that is to take this for the Hub, as `"writer"`, `"stranger"` or `"nobody"`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKENS[user],
            "HF_HUB_OFFLINE": "0",
            # The Hub's newer way for large files, with servers of its own; LFS is what it offers without
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def store(self, content: bytes, is_large: bool) -> str:
        """Keeps content under the SHA that it has on the Hub: of a git blob, or SHA-256 of a large file."""
        prefix = b"" if is_large else b"blob %d\0" % len(content)
        sha = (hashlib.sha256 if is_large else hashlib.sha1)(prefix + content).hexdigest()
        self.contents[sha] = content
        return sha

    def read(self, repo_id: str, path: str) -> bytes:
        repository = self.repositories[repo_id]
        return self.contents[repository.commits[repository.head][path]]

    def files(self, repo_id: str) -> dict[str, int]:
        """Paths and sizes on `main`, without the `.gitattributes` that each repository begins with."""
        repository = self.repositories[repo_id]
        found = repository.commits[repository.head].items()
        return {path: len(self.contents[sha]) for path, sha in found if path != ".gitattributes"}


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True  # head and body in one piece, or each answer waits 40 ms
    routes = [
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/models/(.+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/(.+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/api/models/(.+/[^/]+)/branch/([^/]+)", "branch"),
        ("POST", r"/(.+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(\w+)", "lfs_upload"),
        ("POST", r"/lfs/(\w+)/verify", "lfs_verify"),
        ("GET", r"/lfs/(\w+)", "lfs_download"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", "tree"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("GET", r"/api/resolve-cache/models/([^/]+/[^/]+)/(\w+)/(.+)", "small_file"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    ]

    def log_message(self, *_):
        pass

    def handle_request(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        try:
            for method, pattern, name in self.routes:
                # HEAD is GET without the body
                if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                    with self.hub.lock:
                        answer = getattr(self, name)(*(part and unquote(part) for part in match.groups()))
                    return self.answer(*answer)
            self.answer(404, {"error": f"{self.command} {path} is nothing that this server knows."})
        except ConnectionAbortedError:
            self.close_connection = True
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self.answer(refusal.status, {"error": refusal.message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self, status: int, content: bytes | dict | list = b"", headers: dict[str, str] | None = None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        sent = b"" if self.command == "HEAD" else content
        self.hub.requests.append(Request(self.path, len(self.body), len(sent)))
        self.wfile.write(sent)

    # --- who may see what ---

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def find(self, repo_id: str, content: bool = False) -> Repository:
        """The repository, for its description or for its `content`, if this reader may have it."""
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.token != WRITER):
            # Alike, so that nobody learns which private repositories there are
            raise Refusal(404 if self.token else 401, "RepoNotFound", "Repository not found")
        if content and repository.gated and self.token != WRITER:
            message = f"Access to model {repo_id} is restricted and you are not in the authorized list."
            raise Refusal(403 if self.token else 401, "GatedRepo", message)
        return repository

    def commit_at(self, repository: Repository, revision: str) -> str:
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def require_writer(self):
        if self.token != WRITER:
            raise Refusal(403 if self.token else 401, "", "You don't have the rights to do this")

    # --- writing ---

    def create(self):
        self.require_writer()
        asked = json.loads(self.body)
        repo_id = f"{asked['organization'] or 'writer'}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repositories:
            return 409, {**answer, "error": "You already created this model repo"}
        repository = self.hub.repositories[repo_id] = Repository(private=asked.get("visibility") == "private")
        patterns = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repository.add_commit("initial commit", {".gitattributes": self.hub.store(patterns.encode(), False)})
        return 200, answer

    def validate_yaml(self):
        """What the Hub's own check refuses in the head of a README.md, for the fields that we write."""
        head = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], flags=re.DOTALL)
        if head is None:
            return 200, {"warnings": [{"message": "empty or missing yaml metadata in repo card"}], "errors": []}
        metadata, errors = yaml.safe_load(head[1]), []
        for name in ("base_model", "datasets"):
            for value in metadata.get(name) or []:
                try:
                    validate_repo_id(value)
                except HFValidationError:
                    errors.append({"message": f'"{name}" with value "{value}" is not valid. Use a model id.'})
        for result in (result for model in metadata.get("model-index", []) for result in model["results"]):
            parts = (result["task"], {"type"}), (result["dataset"], {"type", "name"})
            parts += tuple((metric, {"type", "value"}) for metric in result["metrics"])
            if not all(names <= part.keys() for part, names in parts):
                errors.append({"message": f"model-index: a result is not complete: {result}"})
        return 400 if errors else 200, {"warnings": [], "errors": errors}

    def preupload(self, repo_id: str, revision: str):
        self.require_writer()
        repository = self.find(repo_id)
        present = repository.commits[self.commit_at(repository, revision)]
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths}
        answer = [{"path": path, "uploadMode": modes[path], "oid": present.get(path)} for path in paths]
        return 200, {"files": [{**file, "shouldIgnore": False} for file in answer]}

    def lfs_batch(self, repo_id: str):
        self.require_writer()
        self.find(repo_id)
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.contents:
                place = f"{self.hub.storage_url}/{wanted['oid']}"
                wanted["actions"] = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
        return 200, {"transfer": "basic", "objects": objects}

    def lfs_upload(self, sha: str):
        if hashlib.sha256(self.body).hexdigest() != sha:
            raise Refusal(400, "", "The content is not what its SHA-256 says.")
        self.hub.store(self.body, is_large=True)
        return (200,)

    def lfs_verify(self, sha: str):
        found = len(self.hub.contents.get(sha, b"")) == json.loads(self.body)["size"]
        return (200 if found else 404,)

    def commit(self, repo_id: str, revision: str):
        self.require_writer()
        repository = self.find(repo_id)
        files = dict(repository.commits[self.commit_at(repository, revision)])
        message = ""
        for line in self.body.splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]), is_large=False)
            elif key == "lfsFile" and value["oid"] in self.hub.contents:
                files[value["path"]] = value["oid"]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, "", f"{key} of a file that was not uploaded, or unknown here")
        commit = repository.add_commit(message, files, revision)
        return 200, {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit}"}

    def branch(self, repo_id: str, name: str):
        self.require_writer()
        repository = self.find(repo_id)
        if name in repository.branches:
            return 409, {"error": f"Branch {name} already exists"}
        repository.branches[name] = repository.head
        return (200,)

    # --- reading ---

    def info(self, repo_id: str, revision: str | None):
        repository = self.find(repo_id)
        commit = self.commit_at(repository, revision or "main")
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        return 200, {"id": repo_id, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []}

    def tree(self, repo_id: str, revision: str, folder: str | None):
        repository = self.find(repo_id)
        files = repository.commits[self.commit_at(repository, revision)]
        files = {path: sha for path, sha in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if not files:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist")
        entries = []
        for path, sha in files.items():
            size = len(self.hub.contents[sha])
            entry = {"type": "file", "path": path, "size": size, "oid": sha}
            entries.append(entry | ({"lfs": {"oid": sha, "size": size, "pointerSize": 134}} if len(sha) == 64 else {}))
        return 200, entries

    def resolve(self, repo_id: str, revision: str, path: str):
        repository = self.find(repo_id, content=True)
        commit = self.commit_at(repository, revision)
        headers = {"X-Repo-Commit": commit}
        sha = repository.commits[commit].get(path)
        if sha is None:
            return 404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"}
        headers |= {"X-Linked-Size": str(len(self.hub.contents[sha])), "X-Linked-Etag": f'"{sha}"'}
        if len(sha) == 64:
            return 302, b"", {**headers, "Location": f"{self.hub.storage_url}/{sha}"}
        return 307, b"", {**headers, "Location": f"/api/resolve-cache/models/{repo_id}/{commit}/{path}"}

    def small_file(self, repo_id: str, commit: str, path: str):
        sha = self.find(repo_id, content=True).commits[commit][path]
        return 200, self.hub.contents[sha], {"X-Repo-Commit": commit, "ETag": f'"{sha}"'}

    def lfs_download(self, sha: str):
        if sha not in self.hub.contents:
            raise Refusal(404, "EntryNotFound", "There is no such object.")
        if self.hub.interruptions.get(sha):
            self.hub.interruptions[sha] -= 1
            raise ConnectionAbortedError
        return 200, self.hub.contents[sha], {"ETag": f'"{sha}"'}
