"""adapter_config.json is not valid, or contradicts the tensors.

**Fires when** `adapter_config.json` has one of these faults:

- it is not strict JSON, for example because of NaN or a duplicate key;
- it has no `peft_type`, or a value of the wrong type;
- its rank differs from that of every tensor;
- a tensor holds integers or booleans, and the same tensor of PEFT's own model does not;
- a tensor is complex, and an imaginary part is not zero: PEFT would load the real part only. `run` finds it;
- it sets a key that this version of PEFT would ignore silently. Only `run` finds such keys: `check` does not load PEFT.

```text
r in adapter_config.json is 8, but each of the 4 lora_A tensors has another rank (4):
'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight' has shape [4, 32]
```

**Why it matters.** Config and weights are from different runs, or the config was edited. The scaling is `lora_alpha /
r`. A wrong `r` that loads would merge with the wrong strength.

**What to do.** Restore the config that was saved with these weights. If PEFT does not know a key, the key is a typo, or
it comes from another trainer or a newer PEFT. Remove the key, or run the gate with the newer PEFT. If the config names
a newer PEFT, the verdict is `error` and not `failed`.

**It happened.**

- [ymcui/Chinese-LLaMA-Alpaca#618](https://github.com/ymcui/Chinese-LLaMA-Alpaca/issues/618): the config next to the
  weights had rank 64, and the training had used 8. Users tried both to find out which one loads.
- [peft#2275](https://github.com/huggingface/peft/issues/2275): a key of a newer PEFT (`eva_config`). The thread's
  advice is to delete keys until the adapter loads.
"""

from __future__ import annotations

from merge_gate._internal.tensor_names import module_of
from merge_gate._internal.text import counted, quoted
from merge_gate.judging.checks.check import ERROR, Check, Symptom
from merge_gate.judging.checks.phrases import describe_pattern
from merge_gate.judging.not_judged import not_judged
from merge_gate.records.files import Pattern
from merge_gate.records.terms import Finding, Origin

# PEFT may load such an adapter: it reads the values itself, and what it rejects is a finding again.
CONFIG_INVALID = Check(
    "config-invalid", ERROR, Origin.CONFIG, Symptom.BAD_CONFIG, blame=80, page=__doc__, allows_loading=True
)

_SETTINGS = 6
"""Ignored settings that one message lists."""

_MOST_DIGITS = 10


def pattern_refused(pattern: Pattern | None, names: int, seconds: float, problem: str | None = None) -> Finding:
    """A regular expression is not valid, or did not end within `seconds` on `names` names; `pattern` may be unknown.

    `problem` says why it is not valid; None for an endless one.
    """
    if problem is not None:
        what = describe_pattern(pattern) if pattern else "adapter_config.json holds an expression"
        message = f"{what}, which is not a valid regular expression: {problem}"
        return CONFIG_INVALID.finding(message, "use plain names")
    what = f"{describe_pattern(pattern)}, a" if pattern else "adapter_config.json holds a"
    return CONFIG_INVALID.finding(
        f"{what} regular expression that was not matched against the {names:,} module names of the base within "
        f"{seconds:g} s of computing; PEFT would not finish",
        "write it without a repetition inside of a repetition, or use a list of names",
    )


def ignored_settings(
    settings: tuple[str, ...], peft: str, saved_by: str, near: tuple[tuple[str, str], ...] = ()
) -> Finding:
    """PEFT drops unknown keys with a warning. A key that is set may change the result of the adapter.

    `settings` are `key=value`. `near` has pairs of such a key and the key of PEFT's that it is probably a misspelling
    of, which is not set.
    """
    listed = ", ".join(settings[:_SETTINGS])
    message = f"adapter_config.json sets {listed}, which PEFT {peft} does not know and would ignore"
    if _release(saved_by) > _release(peft):
        hint = f"the adapter was saved by PEFT {saved_by}: run the gate with that version or newer"
        return not_judged(message, hint, origin=Origin.CONFIG)
    hints = [f"did you mean {quoted(known)}? then rename {quoted(key)}" for key, known in near[:_SETTINGS]]
    if len(near) < len(settings):
        remove = "for any other key: remove it" if hints else "remove the key"
        hints.append(
            f"{remove} if it is a mistake or another trainer's own; if it changes what is computed, "
            "merge with the program that wrote it: the gate needs PEFT 0.21 or newer"
        )
    return CONFIG_INVALID.finding(message, "; ".join(hints))


def dtype_clash(name: str, got: str, expected: str) -> Finding:
    """A tensor has no floating dtype, and PEFT would cast it to `expected`."""
    return CONFIG_INVALID.finding(
        f"{name} has the dtype {got}, expected a floating one: it is {expected} in PEFT's own model",
        "a conversion has cast it, so its fractions are lost: save the adapter again with save_pretrained",
        module=module_of(name),
        tensor=name,
        origin=Origin.ADAPTER,
    )


def imaginary_parts(name: str, dtype: str, count: int) -> Finding:
    """A tensor is complex, and PEFT would drop `count` imaginary parts that are not zero."""
    return CONFIG_INVALID.finding(
        f"{name} has the dtype {dtype}, expected a floating one: PEFT would drop {counted(count, 'imaginary part')} "
        f"that {'is' if count == 1 else 'are'} not zero",
        "find the program that wrote complex numbers: no method of PEFT trains them",
        module=module_of(name),
        tensor=name,
        origin=Origin.ADAPTER,
    )


def _release(text: str) -> tuple[int, ...]:
    """The numbers of a release, none for other text. The adapter states it, and `int` raises on "²" or many digits."""
    parts = text.split(".")[:3]
    return tuple(map(int, parts)) if all(part.isdecimal() and len(part) < _MOST_DIGITS for part in parts) else ()


REFUSALS = (pattern_refused, ignored_settings, dtype_clash, imaginary_parts)
