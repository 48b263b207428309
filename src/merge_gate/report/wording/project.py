"""The address of the project, in one place. In: nothing. Out: the addresses that follow from it.

Imports nothing but the standard library, because the packaging reads it too.
"""

from __future__ import annotations

PROJECT_URL = ""
"""`https://github.com/OWNER/REPOSITORY`, without a slash at its end. Empty until the project has a public address."""


def owner() -> str | None:
    """The owner of the repository."""
    return PROJECT_URL.split("/")[-2] if PROJECT_URL else None


def documentation_url(version: str) -> str | None:
    """The address of a version's documentation, with a slash at its end: GitHub Pages of the repository."""
    if not PROJECT_URL:
        return None
    *_, owner_name, repository = PROJECT_URL.split("/")
    return f"https://{owner_name.lower()}.github.io/{repository}/{version}/"


def check_url(check: str, version: str) -> str | None:
    """The address of a check's page."""
    documentation = documentation_url(version)
    return f"{documentation}checks/{check}/" if documentation else None
