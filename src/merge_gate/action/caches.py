"""Plans the caches that the action keeps in GitHub's cache: cached verdicts, and files of the Hub.

The variables of the runner go in: the action's inputs, the event, and everything that may hold a token of the Hub.
Directories and keys come out, for the steps of action.yml that use actions/cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.action.workflow import read_event

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_SUBJECT = ("config", "adapters", "base", "dtype", "verify", "shard", "working-directory")
_TOKEN_VARIABLES = ("HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")
"""Variables besides HF_TOKEN from which huggingface_hub takes a token (utils/_auth.py, constants.py)."""
_TOKEN_FILES = ("token", "stored_tokens")
"""Files of the directory HF_HOME from which it takes one."""
_LEAST_TOKEN = 8
_PUBLIC_HUB = "https://huggingface.co"
MOST_BYTES = 10 * 1000**3
"""GitHub keeps 10 GB of caches for a repository, and removes the oldest ones above that."""


@dataclass(frozen=True)
class PlannedCache:
    """A directory that actions/cache restores and saves.

    Attributes:
        directory: where it is; the same in each run, because actions/cache looks a cache up by key and path.
        prefix: the start of its keys. The newest cache with this start is restored; empty for none.
        saves: whether this run may save it.
    """

    directory: Path
    prefix: str
    saves: bool

    def key(self) -> str:
        """The key of the content; empty if it must not be saved: an empty directory, or more than `MOST_BYTES`."""
        listed = sorted(_files(self.directory)) if self.saves else []
        if not listed or sum(size for _, size in listed) > MOST_BYTES:
            return ""
        return f"{self.prefix}{_digest(listed)}"


def written(environ: Mapping[str, str], name: str) -> str:
    """What the workflow gives an input; empty if nothing."""
    return environ.get(f"MERGE_GATE_INPUT_{name.upper().replace('-', '_')}", "")


def verdicts(environ: Mapping[str, str]) -> PlannedCache | None:
    """The cached verdicts, if `cache` is `true`."""
    if written(environ, "cache") != "true":
        return None
    return PlannedCache(
        _temporary(environ) / "merge-gate-verdicts", _prefix("verdicts", environ), read_event(environ).is_trusted
    )


def hub(environ: Mapping[str, str]) -> PlannedCache | None:
    """The Hub's cache (`HF_HOME/hub`), if `hf-cache` is `true`.

    A run that may read private repositories has a directory of its own. In a public repository its files are not saved,
    and not restored: anyone can open a pull request, whose runs can read the caches of the default branch.
    """
    home = hub_home(environ)
    if home is None:
        return None
    event, access = read_event(environ), private_access(environ)
    if access and not event.is_private:
        return PlannedCache(home / "hub", "", saves=False)
    return PlannedCache(home / "hub", _prefix(f"hub{access}", environ), event.is_trusted)


def hub_home(environ: Mapping[str, str]) -> Path | None:
    """The directory HF_HOME of this run, if `hf-cache` is `true`."""
    if written(environ, "hf-cache") != "true":
        return None
    return _temporary(environ) / f"merge-gate-hub{private_access(environ)}"


def tokens(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The tokens of the Hub that no output may show. A shorter word may be part of any text."""
    given = (written(environ, "hf-token").strip(), environ.get("HF_TOKEN", "").strip())
    return tuple(token for token in given if len(token) >= _LEAST_TOKEN)


def private_access(environ: Mapping[str, str]) -> str:
    """How the gate may get files that are not public: `-token`, `-mirror` (another Hub without a token), or empty.

    In a container, only the token of the input or of HF_TOKEN arrives. Without one, huggingface_hub also takes a token
    from other variables, and from files of the runner's user.
    """
    if written(environ, "hf-token").strip() or environ.get("HF_TOKEN", "").strip():
        return "-token"
    if written(environ, "runtime") != "docker" and _has_stored_token(environ):
        return "-token"
    return "" if environ.get("HF_ENDPOINT", "").rstrip("/") in {"", _PUBLIC_HUB} else "-mirror"


def _has_stored_token(environ: Mapping[str, str]) -> bool:
    if any(environ.get(name, "").strip() for name in _TOKEN_VARIABLES):
        return True
    home = Path(environ.get("HOME") or Path.home())
    homes = {
        Path(environ.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface",
        home / ".cache" / "huggingface",
        home / ".huggingface",
        *([Path(environ["HF_HOME"])] if environ.get("HF_HOME") else []),
    }
    return any(os.path.lexists(folder / name) for folder in homes for name in _TOKEN_FILES)


def outputs(environ: Mapping[str, str]) -> dict[str, str]:
    """The outputs of the first step: places and keys for actions/cache, and names that are the same in each run."""
    given = {}
    for name, cache in (("verdicts", verdicts(environ)), ("hub", hub(environ))):
        given[f"{name}-path"] = str(cache.directory) if cache else ""
        given[f"{name}-prefix"] = cache.prefix if cache else ""
    job = [environ.get(name, "") for name in ("GITHUB_WORKFLOW", "GITHUB_JOB", "MERGE_GATE_JOB_INDEX")]
    given["comment-id"] = _digest([*job, *_subject(environ)])
    verify, config, shard = (written(environ, name) for name in ("verify", "config", "shard"))
    subject = verify or ("adapters" if written(environ, "adapters") else config)
    category = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(filter(None, ["merge-gate", subject, shard])))
    given["category"] = category.strip("-")
    return given


def key_outputs(environ: Mapping[str, str]) -> dict[str, str]:
    """The outputs of the gate's step: the keys under which its caches are saved; empty to save none."""
    planned = (("verdicts", verdicts(environ)), ("hub", hub(environ)))
    return {f"{name}-cache-key": cache.key() if cache else "" for name, cache in planned}


def why_not_saved(environ: Mapping[str, str]) -> str:
    """A sentence if the Hub's cache is asked for, and private files keep it from being saved; else empty."""
    cache = hub(environ)
    if cache is None or cache.prefix:
        return ""
    return (
        "the Hub's cache is not used: this run may read private repositories of the Hub, the event does not show that "
        "this repository is private, and a pull request from a fork could read the cache"
    )


def _temporary(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("RUNNER_TEMP") or environ.get("GITHUB_WORKSPACE") or Path.cwd()).resolve()


def _prefix(kind: str, environ: Mapping[str, str]) -> str:
    """Trusted runs alone save caches. The word keeps them apart from caches that other steps may have saved."""
    return f"merge-gate-{kind}-trusted-{platform.system()}-{platform.machine()}-{_digest(_subject(environ))}-"


def _subject(environ: Mapping[str, str]) -> list[str]:
    return [written(environ, name) for name in _SUBJECT]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _files(directory: Path) -> Iterator[tuple[str, int]]:
    """Names and sizes of the files below a directory. Links are not followed."""
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            if not name.endswith(".lock"):
                with contextlib.suppress(OSError):
                    yield str(path.relative_to(directory)), path.lstat().st_size
