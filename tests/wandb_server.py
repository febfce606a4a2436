"""A stand-in for the W&B server on loopback: it answers what the real client asks, and keeps what it is sent."""

import gzip
import json
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

KEY = "0123456789" * 4  # the client wants 40 letters or more
TEAM = "team"


@dataclass
class StoredRun:
    """What the server has been told of one run."""

    id: str
    about: dict[str, Any] = field(default_factory=dict)  # groupName, jobType, displayName, tags, notes, …
    lines: dict[str, list[str]] = field(default_factory=dict)  # the streamed files, by name
    files: dict[str, bytes] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        return {key: node["value"] for key, node in json.loads(self.about.get("config") or "{}").items()}

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines.get("wandb-history.jsonl", [])]

    @property
    def summary(self) -> dict[str, Any]:
        told = self.lines.get("wandb-summary.json")
        return json.loads(told[-1]) if told else {}

    def take(self, told: dict[str, Any]) -> None:
        """Write streamed lines at their offset, as W&B does: a client that counts wrong overwrites."""
        for name, part in (told.get("files") or {}).items():
            at, lines = part.get("offset", 0), part["content"]
            self.lines.setdefault(name, [])[at : at + len(lines)] = lines
        if told.get("complete"):
            self.exit_codes.append(told["exitcode"])


class Server:
    """The server in a thread: `with Server() as server`, then server.environment for the client's process."""

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.views: list[dict[str, Any]] = []  # saved dashboards
        self.alerts: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        self.artifact_files: dict[tuple[str, str], bytes] = {}  # by the artifact's number and the file's name
        self.sweep: dict[str, Any] = {}  # for `wandb agent`: its config, and what is left to do
        self.points: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []  # names of GraphQL operations, in order
        self.received: list[bytes] = []
        self.answering = threading.Event()
        self.answering.set()
        self.faults: list[BaseException] = []
        self._http = _HTTP(("127.0.0.1", 0), _Handler)
        self._http.stand_in = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.environment = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.answering.set()
        self._http.shutdown()
        self._http.server_close()
        assert not self.faults, self.faults

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """What is said to a request."""
        if path == "/vanish":  # asked by a run that tests want to lose the server in its midst
            self.answering.clear()
            return {}
        self.received.append(body)
        if path == "/graphql":
            asked = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            self.asked.append(name[1] if name else "")
            reply = getattr(self, f"_{self.asked[-1]}", None)
            if reply is None:
                return {"data": None, "errors": [{"message": f"the stand-in does not know {self.asked[-1]}"}]}
            return {"data": reply(asked.get("variables") or {})}
        stream = re.fullmatch(rf"/files/{TEAM}/[^/]+/([^/]+)/file_stream", path)
        if stream:
            self.runs[stream[1]].take(json.loads(body))
        upload = re.fullmatch(r"/upload/([^/]+)/(.+)", path)
        if upload:
            self.runs[upload[1]].files[upload[2]] = body
        part = re.fullmatch(r"/artifact/([^/]+)/(.+)", path)
        if part:
            self.artifact_files[part[1], part[2]] = body
        return {}

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": TEAM}}]}
        return {"viewer": {"id": "1", "entity": TEAM, "username": "me", "email": "", "flags": "{}", "teams": teams}}

    def _GetDefaultEntity(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "1", "entity": TEAM}}

    def _Runs(self, told: dict[str, Any]) -> dict[str, Any]:
        """The runs of a project with the ids of the filter; without any run a project is not there."""
        known = [run for run in self.runs.values() if run.about.get("project") == told["project"]]
        if not known or told["entity"] != TEAM:
            return {"project": None}
        found = [run.id for run in known if run.id in json.loads(told["filters"])["name"]["$in"]]
        user = {"name": "me", "username": "me"}
        node = dict.fromkeys(("displayName", "sweepName", "group", "jobType", "commit", "description", "notes"))
        node |= {"projectId": "1", "id": "1", "tags": [], "state": "finished", "readOnly": False, "user": user}
        node |= {"createdAt": "2026-11-24T02:45:09", "heartbeatAt": "2026-11-24T02:45:09", "historyLineCount": 0}
        edges = [{"node": node | {"name": name}, "cursor": name} for name in found]
        pages = {"endCursor": None, "hasNextPage": False}
        runs = {"edges": edges, "pageInfo": pages}
        return {"project": {"internalId": "1", "runCount": len(found), "readOnly": False, "runs": runs}}

    def _UpsertView2(self, told: dict[str, Any]) -> dict[str, Any]:
        if told.get("id"):
            self.views[int(told["id"]) - 1] = told
        else:
            self.views.append(told)
        return {"upsertView": {"view": {"id": str(len(self.views)), "name": told["name"]}, "inserted": True}}

    def _View(self, told: dict[str, Any]) -> dict[str, Any]:
        found = [
            {"node": {"id": str(i), "displayName": view["displayName"], "spec": view["spec"]}}
            for i, view in enumerate(self.views, 1)
            if view["name"] == told["viewName"]
        ]
        return {"project": {"allViews": {"edges": found}}}

    def _SweepWithRuns(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"sweep": {"config": json.dumps(self.sweep), "runs": {"edges": []}}}}

    def _CreateAgent(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": "1"}}}

    def _Heartbeat(self, told: dict[str, Any]) -> dict[str, Any]:
        """An agent that has nothing to do gets a point, or is sent home."""
        commands: list[dict[str, Any]] = []
        if told["runState"] == "{}":
            commands = [{"type": "exit"}]
            for name in [*self.points][:1]:
                args = {key: {"value": value} for key, value in self.points.pop(name).items()}
                commands = [{"type": "run", "run_id": name, "program": "kdx", "args": args}]
        return {"agentHeartbeat": {"agent": {"id": "1"}, "commands": json.dumps(commands)}}

    def _NotifyScriptableRunAlert(self, told: dict[str, Any]) -> dict[str, Any]:
        self.alerts.append(told)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _ArtifactType(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _CreateArtifact(self, told: dict[str, Any]) -> dict[str, Any]:
        self.artifacts.append(told.get("input") or told)
        about = {"id": str(len(self.artifacts)), "state": "PENDING"}
        return {"createArtifact": {"artifact": about | {"artifactSequence": {"id": "1", "latestArtifact": None}}}}

    def _CreateArtifactManifest(self, told: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "1", "name": told["name"], "displayName": told["name"], "uploadHeaders": []}
        file["uploadUrl"] = f"{self.url}/artifact/{told['artifactID']}/{told['name']}"
        return {"createArtifactManifest": {"artifactManifest": {"id": "1", "file": file}}}

    def _CreateArtifactFiles(self, told: dict[str, Any]) -> dict[str, Any]:
        nodes = []
        for i, spec in enumerate(told["input"]["artifactFiles"]):
            url = f"{self.url}/artifact/{spec['artifactID']}/{spec['name']}"
            about = {"id": str(i), "name": spec["name"], "displayName": spec["name"], "storagePath": None}
            nodes.append(
                {"node": about | {"uploadUrl": url, "uploadHeaders": [], "artifact": {"id": spec["artifactID"]}}}
            )
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _CommitArtifact(self, told: dict[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": told["artifactID"], "digest": ""}}}

    def _ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _UpsertBucket(self, told: dict[str, Any]) -> dict[str, Any]:
        name = told.get("name") or told["id"]
        is_new = name not in self.runs
        run = self.runs.setdefault(name, StoredRun(name))
        run.about |= {key: value for key, value in told.items() if value is not None}
        project = {"id": "1", "name": run.about.get("project"), "entity": {"id": "1", "name": TEAM}}
        bucket = {"id": name, "name": name, "project": project, "historyLineCount": len(run.history)}
        bucket |= {"displayName": run.about.get("displayName"), "config": run.about.get("config")}
        return {"upsertBucket": {"bucket": bucket | {"description": "", "sweepName": None}, "inserted": is_new}}

    def _RunResumeStatus(self, told: dict[str, Any]) -> dict[str, Any]:
        model = {"id": "1", "name": told["project"], "entity": {"id": "1", "name": TEAM}, "bucket": None}
        run = self.runs.get(told["name"])
        if run is not None:
            history, events = (run.lines.get(f"wandb-{name}.jsonl", []) for name in ("history", "events"))
            model["bucket"] = {
                "id": run.id, "name": run.id, "displayName": run.about.get("displayName"), "tags": run.about.get("tags"),
                "notes": run.about.get("notes"), "config": run.about.get("config"), "wandbConfig": '{"t": {}}',
                "summaryMetrics": json.dumps(run.summary), "logLineCount": 0, "historyLineCount": len(history),
                "eventsLineCount": len(events), "historyTail": json.dumps(history[-1:]),
                "eventsTail": json.dumps(events[-1:]),
            }  # fmt: skip
        return {"model": model}

    def _CreateRunFiles(self, told: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{told['run']}/{name}"} for name in told["files"]]
        return {"createRunFiles": {"runID": told["run"], "uploadHeaders": [], "files": files}}


class _HTTP(ThreadingHTTPServer):
    stand_in: Server

    def handle_error(self, *_: object) -> None:
        """Keep what goes wrong here for the end of the test; a client may hang up."""
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):
            self.stand_in.faults.append(error)


class _Handler(BaseHTTPRequestHandler):
    server: _HTTP

    def do_POST(self) -> None:
        stand_in = self.server.stand_in
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        stand_in.answering.wait()
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        reply = json.dumps(stand_in.answer(self.path, body)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_PUT = do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Keep requests out of the tests' output."""
