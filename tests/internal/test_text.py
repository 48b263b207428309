"""What a reader does not see, and how foreign text and lists stand in a sentence."""

import os
import sys
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_gate._internal.tensor_names import module_of
from merge_gate._internal.text import (
    COMMIT,
    counted,
    has_hidden,
    is_hidden,
    is_inside,
    listing,
    quoted,
    repeatable,
    unusable,
    without_credentials,
)
from merge_gate.report.formats.json_report import render
from merge_gate.report.wording.untrusted import one_line, safe_text
from tests.support.reports import adapter, report

HIDDEN = [chr(code) for code in range(sys.maxunicode + 1) if is_hidden(chr(code))]


def test_what_is_hidden() -> None:
    for (
        character
    ) in "\0\t\n\x1b\x7f\x85\u00ad\u061c\u180e\u200b\u202e\u2066\u2028\ufeff\ufff9\U000e0041\ud800\u115f\u3164\u2800":
        assert is_hidden(character), repr(character)
    for character in "a ~ß名é\u0301🙂\ue000":
        assert not is_hidden(character), repr(character)


def test_what_can_be_a_name() -> None:
    for name in ("a", ".", "./a b", "acme/name", "名" * 85, "x" * 255, "a/" * 2000, "adapters/*", "-x"):
        assert unusable(name) == "", name
    for name in ("", "  ", "a\0", "\ud800", "\udcff", "名" * 86, "x" * 256, "a/" * 2048):
        assert unusable(name), name


def test_every_place_means_the_same_by_it() -> None:
    """What the configuration refuses is what the report replaces for people and escapes for programs."""
    for character in HIDDEN:
        assert has_hidden(f"a{character}b")
        assert character not in quoted(character)
        assert character not in one_line(f"a{character}b")
    shown = [character for character in HIDDEN if character != "\n" and unicodedata.category(character) != "Cs"]
    text = render(report(adapter("a" + "".join(shown))))
    assert [character for character in shown if character in text] == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", '"plain"'),
        ("a\nb", '"a\\nb"'),
        ("\u202eb", '"\\u202eb"'),
        ("\u3164", '"\\u3164"'),
        ("x" * 99, f'"{"x" * 59}…"'),
    ],
)
def test_quoted_text_is_short_and_visible(text: str, shown: str) -> None:
    assert quoted(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("acme/llama@v1?", "acme/llama@v1?"),
        ("see https://host/a#b", "see https://host/a#b"),
        ("https://user:SECRET@host/a: 404", "https://…@host/a: 404"),
        ("git+ssh://SECRET@host/a", "git+ssh://…@host/a"),
        ("(https://user:SEC/R@E#T@host/a)", "(https://…@host/a)"),
        ("https://host/a?token=SECRET&b=c, then", "https://host/a?…, then"),
        ("https://user:SECRET@host/a?token=SECRET", "https://…@host/a?…"),
        ("https://host/?mail=a@b&token=SECRET", "https://…"),
        ("https://user:SEC?RET@host", "https://…@host"),
        ('"https://u:SECRET@a" "https://u:SECRET@b"', '"https://…@a" "https://…@b"'),
        ("https://u:SECRET@a,https://u:SECRET@b", "https://…@b"),
        ("'https://u:SEC'RET@a'.", "'https://…@a'."),
        ('"https://u:SEC"RET@a?b=SECRET"', '"https://…@a?…"'),
        ("/srv/https:/u:SECRET@host/a", "/srv/https:/…@host/a"),
        ("x='s3://SECRET@host'", "x='s3://…@host'"),
        ("C:/a@b and http://host/a", "C:/a@b and http://host/a"),
        ("https://user:a SECRET@host/a", "https://…@host/a"),
        ("https://a user:a SECRET@host/a", "https://…@host/a"),
        ("https://user:a SECRET@host/a is gone: no", "https://…@host/a is gone: no"),
        ("user:SECRET@host/a", "…@host/a"),
        ("cannot reach 'user:SEC@RET@host': no", "cannot reach '…@host': no"),
        ("user:a SECRET@host/a", "…@host/a"),
        ("(user:SEC@RET SECRET a SECRET@host)", "(…@host)"),
        ("https://user:SEC@RET SECRET@host/a", "https://…@host/a"),
        ("https://u:a SECRET@a https://u:a SECRET@b", "https://…@a https://…@b"),
        ("x='s3://u:a SECRET@a'", "x='s3://…@a'"),
        ("user: a@host", "user: a@host"),
        ("base=user:SECRET@[::1]/a", "base=…@[::1]/a"),
        ("acme/gate:1.0@sha256:ab", "acme/gate:1.0@sha256:ab"),
        ("gate:1.0@sha256:ab", "gate:1.0@sha256:ab"),
        ("C:\\models\\a@b", "C:\\models\\a@b"),
        ("see https://host: mail a@b", "see https://host: mail a@b"),
        ("gate.yml:3: base acme/a@v1", "gate.yml:3: base acme/a@v1"),
        ("gate.yml:3:5: base acme/a@v1", "gate.yml:3:5: base acme/a@v1"),
        ("user:SECRET @host/a", "…@host/a"),
        ("user:a\t  SECRET@host/a", "…@host/a"),
    ],
)
def test_urls_lose_their_credentials(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
    assert quoted(text, 200, "") == shown
    assert one_line(text) == safe_text(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        *(part * 100_000 for part in ("a:", "@ a://b:", "a:b@ ", "@https://a:b ", "'a:", "a@b:c")),
        *(f"@ a:b{part * 100_000}" for part in (" ", " \t", " \tc ", "c://")),
        *(f"@ : {part * 100_000}" for part in ("a", "a+", "a=", "'", "-a")),
    ],
    ids=lambda text: repr(text[:12]),
)
def test_credentials_are_found_in_linear_time(text: str) -> None:
    began_s = time.process_time()
    quoted(text)
    assert time.process_time() - began_s < 2


def test_a_long_url_is_cut_after_its_credentials() -> None:
    assert "SECRET" not in quoted(f"https://user:{'SECRET' * 99}@host/a")


@pytest.mark.parametrize(("text", "shown"), [
    ("x" * 300 + ": no", "x" * 300 + ": no"),
    ("'" + "x" * 999 + "', no", "'" + "x" * 298 + "…', no"),
    (f"a https://u:{'SECRET' * 99}@h b", "a https://…@h b"),
    ("x y" * 999, "x y" * 999),
])  # fmt: skip
def test_a_long_word_of_a_message_is_cut(text: str, shown: str) -> None:
    assert repeatable(text) == shown


def test_a_list_says_how_many_it_leaves_out() -> None:
    assert listing([]) == ""
    assert listing(["a", "b"], 2) == "a, b"
    assert listing((str(n) for n in range(2000)), 2) == "0, 1 and 1,998 more"


def test_counts_have_the_noun_that_goes_with_them() -> None:
    assert counted(0, "tensor") == "0 tensors"
    assert counted(1, "tensor") == "1 tensor"
    assert counted(2000, "tensor") == "2,000 tensors"
    assert (counted(1, "entry", "entries"), counted(2, "entry", "entries")) == ("1 entry", "2 entries")


@given(st.lists(st.sampled_from(["a", "..", ".", "", "b c"]), max_size=4).map("/".join))
def test_a_name_that_is_inside_has_one_spelling(name: str) -> None:
    inside = os.path.normpath(f"/top/{name}")
    assert is_inside(name) == (inside == f"/top/{name}" and inside != "/top")


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/../x", "a//x", "./x", "a\\x", "a/", "", ".", "a\0", "a\n", "\ud800", "a" * 256, 7, None],
)
def test_a_name_that_leads_elsewhere_or_is_impossible_is_refused(name: object) -> None:
    assert not is_inside(name)


@pytest.mark.parametrize("name", ["model.safetensors", "sub/model.safetensors", "..a", "a..b", "名.json", "a" * 255])
def test_other_names_are_not(name: str) -> None:
    assert is_inside(name)


@pytest.mark.parametrize(
    ("name", "is_commit"),
    [
        ("0a" * 20, True),
        ("0a" * 32, False),
        ("0A" * 20, False),
        ("0a" * 19, False),
        ("0a" * 20 + "\n", False),
        ("main", False),
    ],
)
def test_a_commit_is_a_digest(name: str, is_commit: bool) -> None:
    assert bool(COMMIT.fullmatch(name)) == is_commit


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("base_model.model.model.layers.5.self_attn.q_proj.lora_A.weight", "model.layers.5.self_attn.q_proj"),
        ("base_model.model.embed.lora_embedding_A", "embed"),
        ("base_model.model.experts.base_layer.lora_B.weight", "experts"),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "model.embed_tokens"),
        ("base_model.model.lm_head.modules_to_save.weight", "lm_head"),
        ("base_model.model.model.norm.weight", "model.norm"),
        ("stray", ""),
    ],
)
def test_it_is_what_stands_before_pefts_own_parts(name: str, module: str) -> None:
    assert module_of(name) == module


def test_a_word_of_marks_is_cut_at_once() -> None:
    assert repeatable(f"see {')' * 1_000_000} here") == "see )))) here"
