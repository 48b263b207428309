"""Uploads a model that merge-gate has published to the Hugging Face Hub, in one commit.

    python hub_upload.py DIRECTORY OWNER/NAME PARENT

PARENT is the commit that the repository must still have on its main branch: another commit in between stops the upload.
The token comes from HF_TOKEN; give it to this step alone. Needs huggingface_hub.

1. Every file must be as merge-gate.json lists it, and there must be no other file.
2. One commit adds these files, and deletes all others of the repository, such as shards of an earlier model.
3. The new commit must hold exactly these files, by the digests that the Hub computed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

MANIFEST = "merge-gate.json"
KEPT = (".gitattributes",)
"""Files of the repository that stay."""


def listed_files(directory: Path) -> dict[str, str]:
    """The files of a published directory with their SHA-256. Ends the program if one is not as listed."""
    manifest = json.loads((directory / MANIFEST).read_bytes())
    listed = {file["path"]: file["sha256"] for file in manifest["files"]}
    below = [path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir()]
    found = {path.relative_to(directory).as_posix() for path in below} - {MANIFEST}
    wrong = set(listed) ^ found | {name for name in found if (directory / name).is_symlink()}
    wrong |= {name for name in set(listed) & found - wrong if sha256(directory / name) != listed[name]}
    if manifest.get("verdict") != "passed" or not listed or wrong:
        sys.exit(f"{directory} differs from its {MANIFEST}: {', '.join(sorted(wrong)) or 'not a published model'}")
    return {**listed, MANIFEST: sha256(directory / MANIFEST)}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_id(path: Path) -> str:
    """The id that git gives to a file that is not in Git LFS."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def upload(directory: Path, repo_id: str, parent: str) -> str:
    """Make the commit, and return its id."""
    files = listed_files(directory)
    api = HfApi()
    old = {file.rfilename for file in api.model_info(repo_id, revision=parent).siblings or ()}
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationDelete(path_in_repo=name) for name in sorted(old - set(files) - set(KEPT))
    ]
    operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=directory / name) for name in sorted(files)]
    message = f"Publish {directory.name}, merged and checked by merge-gate"
    commit = api.create_commit(repo_id, operations, commit_message=message, revision="main", parent_commit=parent).oid
    compare(api, repo_id, commit, directory, files)
    return commit


def compare(api: HfApi, repo_id: str, commit: str, directory: Path, files: dict[str, str]) -> None:
    """Ends the program if the commit does not hold exactly these files."""
    siblings = api.model_info(repo_id, revision=commit, files_metadata=True).siblings or ()
    there = {file.rfilename: file for file in siblings if file.rfilename not in KEPT}
    wrong = set(there) ^ set(files)
    for name in set(there) & set(files):
        lfs = there[name].lfs
        same = lfs.sha256 == files[name] if lfs is not None else there[name].blob_id == git_id(directory / name)
        if not same:
            wrong.add(name)
    if wrong:
        sys.exit(f"the commit {commit} of {repo_id} is not the published model: {', '.join(sorted(wrong))}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Upload a published model to the Hub, in one commit.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("repo_id", metavar="OWNER/NAME")
    parser.add_argument("parent", help="the commit that main must still have")
    arguments = parser.parse_args()
    sys.stdout.write(f"{upload(arguments.directory, arguments.repo_id, arguments.parent)}\n")


if __name__ == "__main__":
    main()
