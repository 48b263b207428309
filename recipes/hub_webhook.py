"""Forwards pushes on the Hugging Face Hub to GitHub, as the event `hub-push` that recipes/hub-push.yml handles.

The script receives the Hub's webhook and compares its secret. It then sends a repository_dispatch event with the name
of the repository and the new commit of its main branch, and forwards nothing else. It uses only the standard library.

Environment variables:

- `WEBHOOK_SECRET`: the secret in the Hub's settings of the webhook.
- `HUB_REPOS`: the repositories to check, separated by commas, such as `acme/support-lora,acme/billing-lora`.
- `GITHUB_REPOSITORY`: OWNER/NAME of the repository with the workflow.
- `GITHUB_TOKEN`: a fine-grained token for that repository. Events need read and write access to contents.
- `PORT`: the port to listen on. The default is 7860, which Spaces expect.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MOST_BYTES = 1024 * 1024
MAIN = "refs/heads/main"


def pushed(payload: Any, repos: frozenset[str]) -> dict[str, str] | None:
    """The repository and commit to check; None for any other event."""
    try:
        name, scope = payload["repo"]["name"], payload["event"]["scope"]
        heads = [ref["newSha"] for ref in payload.get("updatedRefs", ()) if ref["ref"] == MAIN]
    except (KeyError, TypeError, AttributeError):
        return None
    if name not in repos or not str(scope).startswith("repo.content") or not heads:
        return None
    return {"repo": name, "revision": heads[0]} if re.fullmatch(r"[0-9a-f]{40}", str(heads[0])) else None


def dispatch(payload: dict[str, str]) -> None:
    """Send the event to GitHub. Raises OSError."""
    api = os.environ.get("GITHUB_API_URL", "https://api.github.com")
    request = urllib.request.Request(
        f"{api}/repos/{os.environ['GITHUB_REPOSITORY']}/dispatches",
        data=json.dumps({"event_type": "hub-push", "client_payload": payload}).encode(),
        headers={
            "Authorization": f"Bearer {os.environ['GITHUB_TOKEN']}",
            "Accept": "application/vnd.github+json",
            "Content-Type": "application/json",
        },
    )
    with urllib.request.urlopen(request, timeout=30):
        pass


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        given = self.headers.get("X-Webhook-Secret", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, os.environ["WEBHOOK_SECRET"].encode()):
            self._answer(401, "wrong secret")
            return
        try:
            size = int(self.headers.get("Content-Length", ""))
            payload = json.loads(self.rfile.read(size)) if 0 <= size <= MOST_BYTES else None
        except ValueError:
            self._answer(400, "no JSON")
            return
        wanted = pushed(payload, frozenset(os.environ["HUB_REPOS"].split(",")))
        if wanted is None:
            self._answer(200, "nothing to gate")
            return
        try:
            dispatch(wanted)
        except OSError as error:  # the Hub shows the answer, and can send the event again
            self._answer(502, f"GitHub did not take it: {error}")
            return
        self._answer(202, f"gating {wanted['repo']} at {wanted['revision']}")

    def _answer(self, status: int, text: str) -> None:
        body = f"{text}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    missing = [
        name
        for name in ("WEBHOOK_SECRET", "HUB_REPOS", "GITHUB_REPOSITORY", "GITHUB_TOKEN")
        if not os.environ.get(name)
    ]
    if missing:
        raise SystemExit(f"not set: {', '.join(missing)}")
    with ThreadingHTTPServer(("", int(os.environ.get("PORT", "7860"))), Handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
