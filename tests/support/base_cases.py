"""What a case of a base is, and the tables of `bases_broken.py` and `bases_good.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.bases import Draft

FORMAT, INCOMPLETE, INCONSISTENT = "base-format", "base-incomplete", "base-inconsistent"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A base, an adapter on it, and what the gate must say of the two.

    `cause` is the check that decides (or those of which one must), None if the adapter must pass. Each of `names` is in
    the message or the hint of the cause, each of `notes` in a note. `asked` is what the config asks of the base.
    `dtype` and `quantization` are what the report must state.
    """

    name: str
    draft: Callable[[], Draft]
    cause: str | tuple[str, ...] | None = None
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    asked: dict[str, Any] = field(default_factory=dict)
    adapter: str = "llama"
    dtype: str | None = None
    quantization: str | None = None


class Cases:
    """A table that functions enter by a decorator: the function's name is the case's."""

    def __init__(self) -> None:
        self.table: dict[str, Case] = {}

    def add(
        self, cause: str | tuple[str, ...] | None = None, /, **settings: Any
    ) -> Callable[[Callable[[], Draft]], Callable[[], Draft]]:
        def enter(draft: Callable[[], Draft]) -> Callable[[], Draft]:
            name = settings.get("name") or draft.__name__.replace("_", "-")  # type: ignore[attr-defined]
            assert name not in self.table, name
            self.table[name] = Case(**settings | {"name": name, "draft": draft, "cause": cause})
            return draft

        return enter
