"""A stand-in for W&B's server on loopback: it answers what wandb's client asks, and keeps the history of each run."""

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Server:
    """url; history: the lines of each run, by its id, where the client put them; ends: what it said at each end"""

    url: str = ""
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    ends: list[dict[str, Any]] = field(default_factory=list)

    def query(self, text: str, values: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "UA==", "name": "p", "entity": {"id": "RQ==", "name": "e"}}
        run_id = values.get("name") or "none"
        lines = self.history.get(run_id)
        bucket = {"id": "QQ==", "name": run_id, "displayName": run_id, "historyLineCount": len(lines or [])}
        if "UpsertBucket" in text:
            self.history.setdefault(run_id, [])
            return {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": lines is None}}
        if "RunResumeStatus" in text:
            last = json.dumps(lines[-1]) if lines else "{}"
            counts = {"logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "tags": [], "config": "{}"}
            tail = {"historyTail": json.dumps([last] if lines else []), "summaryMetrics": last}
            found = {**bucket, **counts, **tail, "wandbConfig": '{"t": 1}'}
            return {"model": {**project, "bucket": None if lines is None else found}}
        if "CreateRunFiles" in text:
            files = [{"name": name, "uploadUrl": f"{self.url}/file"} for name in values["files"]]
            return {"createRunFiles": {"runID": "QQ==", "uploadHeaders": [], "files": files}}
        return {}

    def stream(self, run_id: str, sent: dict[str, Any]) -> None:
        rows = sent.get("files", {}).get("wandb-history.jsonl")
        if rows is not None:
            self.history[run_id][rows["offset"] :] = map(json.loads, rows["content"])
        if sent.get("complete") or sent.get("preempting"):
            self.ends.append({key: value for key, value in sent.items() if key not in ("files", "uploaded")})


@contextlib.contextmanager
def wandb_server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def _answer(self, value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self._answer({})

        def do_PUT(self) -> None:
            self._body()
            self._answer({})

        def do_POST(self) -> None:
            body = json.loads(self._body())
            if self.path.endswith("/file_stream"):
                state.stream(self.path.split("/")[-2], body)
                self._answer({})
            else:
                self._answer({"data": state.query(body["query"], body.get("variables") or {})})

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield state
        server.shutdown()
