"""merge-gate.json: written, read back strictly, and compared with the files; and the model card made of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cmarkgfm
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_gate._internal.errors import UsageError
from merge_gate.features.publish.manifest import (
    Difference,
    differences,
    model_card,
    parse_manifest,
    read_manifest,
    render,
)
from merge_gate.records.config import Combine
from merge_gate.records.files import CARD_NAME, MANIFEST_NAME
from tests.support import published, reports


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    adapter = reports.adapter(findings=(reports.ROUNDING,), revision="abc")
    written = published.publish(tmp_path, adapter=adapter, max_shard_bytes=5_000_000_000)
    assert read_manifest(tmp_path) == read_manifest(tmp_path / MANIFEST_NAME) == written
    assert written.warnings == ("rounding-loss",)
    assert written.adapters[0].revision == "abc"
    assert [file.path for file in written.files] == sorted((*published.FILES, CARD_NAME))
    assert differences(tmp_path, written) == {}


def test_a_manifest_has_no_time_and_no_machine(tmp_path: Path) -> None:
    text = render(published.publish(tmp_path)).decode()
    assert str(tmp_path) not in text
    assert render(published.publish(tmp_path)).decode() == text


def test_a_combination_lists_its_members() -> None:
    combine = Combine(method="ties", adapters=("one", "two"), weights=(0.5, 1.0), density=0.5)
    manifest = published.manifest(published.facts(combine=combine))
    assert [adapter.name for adapter in manifest.adapters] == ["one", "two"]
    assert manifest.combination.weights == (0.5, 1.0)


def test_every_difference_has_its_kind(tmp_path: Path) -> None:
    manifest = published.publish(tmp_path)
    (tmp_path / "config.json").write_bytes(b"[]")
    (tmp_path / "more.py").write_bytes(b"")
    (tmp_path / "additional_chat_templates" / "x.jinja").unlink()
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-elsewhere")
    (tmp_path / "model.safetensors").rename(elsewhere)
    (tmp_path / "model.safetensors").symlink_to(elsewhere)
    assert [*differences(tmp_path, manifest).items()] == [
        ("additional_chat_templates", Difference.ADDED),  # the folder is empty now
        ("additional_chat_templates/x.jinja", Difference.MISSING),
        ("config.json", Difference.CHANGED),
        ("model.safetensors", Difference.NO_FILE),
        ("more.py", Difference.ADDED),
    ]


@pytest.mark.attempt("P04b", "merge-gate.json of an earlier publication is edited", "noticed by its digest on the card")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"max_shard_bytes": null', b'"max_shard_bytes": 1000'),
        (b'"warnings": []', b'"warnings": ["headroom"]'),
        (b"{", b'{"a later key": 1,'),
        (b"{", b" {"),
        (b"{", b'{"large": 1e999,'),
        (b'"name"', b'"\\u006eame"'),
    ],
)
def test_an_edited_manifest_is_a_difference(tmp_path: Path, old: bytes, new: bytes) -> None:
    published.publish(tmp_path)
    place = tmp_path / MANIFEST_NAME
    assert old in place.read_bytes()
    place.write_bytes(place.read_bytes().replace(old, new, 1))
    assert [*differences(tmp_path, read_manifest(tmp_path)).items()] == [(MANIFEST_NAME, Difference.NOT_ON_CARD)]


def test_a_card_that_is_gone_cannot_vouch_for_the_manifest(tmp_path: Path) -> None:
    manifest = published.publish(tmp_path)
    (tmp_path / CARD_NAME).unlink()
    assert [*differences(tmp_path, manifest).items()] == [(CARD_NAME, Difference.MISSING)]
    without = replace(manifest, files=tuple(file for file in manifest.files if file.path != CARD_NAME))
    (tmp_path / MANIFEST_NAME).write_bytes(render(without))
    assert [*differences(tmp_path, without).items()] == [(MANIFEST_NAME, Difference.NOT_ON_CARD)]


def test_weights_may_be_compared_by_their_size(tmp_path: Path) -> None:
    manifest = published.publish(tmp_path)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes(bytes(len(published.FILES[name])))
    assert [*differences(tmp_path, manifest)] == ["config.json", "model.safetensors"]
    assert [*differences(tmp_path, manifest, weights=False)] == ["config.json"]


_OUTSIDE = ["../x", "/etc/x", "a/../x", "a//x", "./x", "a\\x", "a/", "", ".", "a\0", MANIFEST_NAME]
_WRONG: list[Callable[[dict[str, Any]], object]] = [
    lambda one: one.update(verdict="failed"),
    lambda one: one.update(files=[]),
    lambda one: one.update(files=one["files"] * 2),
    lambda one: one.update(schema_version="2.0"),
    lambda one: one.update(adapters=[]),
    lambda one: one.update(tool={"name": "other", "version": "1"}),
    lambda one: one.update(combination={"method": "ties", "weights": []}),
    lambda one: one.update(dtype=3),
    *(lambda one, name=name: one["files"][0].update(path=name) for name in _OUTSIDE),
]


@pytest.mark.parametrize("change", _WRONG)
def test_what_a_run_cannot_have_written_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(render(published.publish(tmp_path)))
    later = document | {"a later key": 1, "schema_version": "1.9"}
    assert parse_manifest(json.dumps(later).encode(), "x")
    change(document)
    with pytest.raises(UsageError):
        parse_manifest(json.dumps(document).encode(), "x")


@pytest.mark.attempt("T12d", "an adapter has the combination's name", "exit 2")
def test_a_member_with_the_name_of_the_combination_is_refused(tmp_path: Path) -> None:
    combine = Combine(method="linear", adapters=("a", "b"), weights=(1.0, 1.0))
    document = json.loads(render(published.publish(tmp_path, combine=combine)))
    assert parse_manifest(json.dumps(document).encode(), "x").combination
    document["adapters"][0]["name"] = document["name"]
    with pytest.raises(UsageError, match="adapters"):
        parse_manifest(json.dumps(document).encode(), "x")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"a": NaN}', b"\xff"])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(UsageError):
        parse_manifest(data, "x")


# --- the card --------------------------------------------------------------------------------------------------------

_HOSTILE = st.text(alphabet=st.sampled_from("<>&|`[]()!*_#@:\n-\u202e\u200b ab'\"\\{}/"), max_size=40)


@given(name=_HOSTILE, source=_HOSTILE)
def test_foreign_names_form_no_markup_in_the_card(name: str, source: str) -> None:
    card = model_card(published.manifest(published.facts(reports.adapter(name, source=source)))).decode()
    head, front, text = card.split("---\n", 2)
    assert head == ""
    assert front == "library_name: transformers\ntags: [merge-gate, peft]\n"
    html = cmarkgfm.github_flavored_markdown_to_html(text)
    assert html.count("<tr>") == 7
    assert html.count("<h1>") == 1
    assert not {"<a ", "<img", "<script", "<em>", "\u202e"} & {
        tag for tag in ("<a ", "<img", "<script", "<em>", "\u202e") if tag in html
    }


def test_the_card_names_a_base_of_the_hub_for_the_hub() -> None:
    base = replace(reports.report(reports.adapter()).bases[0], model="acme/base-1b", revision="0123abc")
    card = model_card(published.manifest(published.facts(base=base))).decode()
    assert 'base_model: "acme/base-1b"\n' in card.split("---\n")[1]


def test_the_card_states_a_cast_and_the_warnings() -> None:
    adapter = reports.adapter(findings=(reports.ROUNDING,))
    card = model_card(published.manifest(published.facts(adapter, dtype="bfloat16"))).decode()
    assert "| dtype | all floating tensors cast to `bfloat16` |" in card
    assert "| warnings | `rounding-loss` |" in card
