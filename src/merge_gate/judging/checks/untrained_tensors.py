"""Tensors of the merged model are absent from the base's files and from the adapter's.

**Fires when** the merged model has tensors that are in no file of the base or the adapter. When transformers loads
the model, it fills them with new values and only writes a line to its log. Examples:

- a head or a pooler of the class that the adapter's task needs;
- a weight that the base's files lack. The adapter adds a delta to it, but the rest of the weight is random;
- an embedding or a head with new rows for an enlarged vocabulary, if the adapter brings only one of the two.

If the index of a base leaves out a numbered shard that the model needs, the verdict is `error`.

```text
5 tensors of BertLMHeadModel are absent from the base's files and the adapter's: cls.predictions.bias,
cls.predictions.transform.LayerNorm.bias, cls.predictions.transform.LayerNorm.weight,
cls.predictions.transform.dense.bias, cls.predictions.transform.dense.weight; every load fills them with new values
```

**Why it matters.** Every load fills these tensors with other random values. Everything that reads them, such as the
scores of a head, is noise, and differs after each load.

**What to do.** Name a base that has these tensors, or train them and save them with the adapter (`modules_to_save`). If
your application does not read them, switch the check off. An example is the pooler of a model whose token vectors you
average.

**It happened.**

- [peft#310](https://github.com/huggingface/peft/issues/310): a classifier's adapter was saved without its head.
- [peft#577](https://github.com/huggingface/peft/issues/577): the head was trained under a name that PEFT did not save,
  so it was random again after loading.
- [transformers#8887](https://github.com/huggingface/transformers/issues/8887): the files of a base lack the pooler, and
  accuracy varied from one training to the next.
"""

from __future__ import annotations

from collections.abc import Iterator

from merge_gate._internal.text import listing
from merge_gate.judging.checks.check import WARNING, Check, MergeCase, Symptom
from merge_gate.judging.checks.phrases import are, tensors
from merge_gate.records.terms import Finding, Origin


@Check("untrained-tensors", WARNING, Origin.ADAPTER, Symptom.UNTRAINED_MERGE, blame=240, page=__doc__).on_merge
def untrained_tensors(case: MergeCase) -> Iterator[Finding]:
    evidence = case.evidence
    names = tuple(name for name in evidence.initialized if name not in evidence.base.incomplete)
    if not names:
        return
    yield untrained_tensors.finding(
        f"{tensors(names)} of {evidence.base.loaded_as} {are(names)} absent from the base's files and the adapter's: "
        f"{listing(names)}; every load fills {'it' if len(names) == 1 else 'them'} with new values",
        "name a base that has them, or train them and save them with the adapter (modules_to_save). If the model does "
        "not read them (an unused pooler), turn this check off",
        module=names[0].rpartition(".")[0],
        tensor=names[0],
        tensors=len(names),
    )
