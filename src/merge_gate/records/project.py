"""The address of the project, in one place, and the addresses that follow from it.

In: nothing. Out: addresses, or None while there is no address. Imports only the standard library: the packaging
runs this file by itself.
"""

from __future__ import annotations

PROJECT_URL = ""
"""`https://github.com/OWNER/REPOSITORY`, without a slash at its end. Empty until the project has a public address."""


def documentation_url(version: str) -> str | None:
    """The address of a version's documentation, with a slash at its end: the repository's GitHub Pages."""
    if not PROJECT_URL:
        return None
    *_, owner, repository = PROJECT_URL.split("/")
    return f"https://{owner.lower()}.github.io/{repository}/{version}/"


def check_url(check: str, version: str) -> str | None:
    """The address of a check's page."""
    documentation = documentation_url(version)
    return f"{documentation}checks/{check}/" if documentation else None


def kind_url(kind: str, version: str, page: str = "verify") -> str | None:
    """The address of the section on an answer of `merge-gate verify`, on this page of the guides."""
    documentation = documentation_url(version)
    return f"{documentation}guides/{page}/#{kind}" if documentation else None
