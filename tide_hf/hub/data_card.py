"""The card of a prepared dataset."""

import yaml

from ..data import PreparationReport
from .card import BEGIN, END, adopt_edits, values_table
from .sources import is_hub_name


def dataset_card(
    repo_id: str,
    reports: dict[str, PreparationReport],
    sources: list[str],
    student_tokenizer: str,
    teacher_tokenizer: str | None,
    settings: dict,
    license: str | None = None,
    languages: list[str] | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    existing: str = "",
) -> str:
    """The card of a dataset prepared by [`~tide_hf.data.prepare_dataset`].

    Args:
        repo_id (`str`): where it is pushed.
        reports (`dict[str, PreparationReport]`): split -> what became of its rows.
        sources (`list[str]`): Hub names of the conversations; local ones stay unnamed.
        student_tokenizer, teacher_tokenizer (`str`): whose ids its columns hold; None without a teacher.
        settings (`dict`): plain values it was prepared with.
        license (`str`, *optional*), languages (`list[str]`, *optional*): of the conversations.
        license_name, license_link (`str`, *optional*): with the license `other`.
        existing (`str`): the card it replaces: metadata and text that are not written here are kept.
    """
    published = [name for name in sources if is_hub_name(name)]
    metadata = {
        "license": license,
        "license_name": license_name,
        "license_link": license_link,
        "language": languages or None,
        "source_datasets": published,  # an empty one too: that of an earlier push must not outlive it
        "tags": ["tide", "diffusion-lm", "tokenized"],
    }
    metadata = {name: value for name, value in metadata.items() if value is not None}
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()
    lines = [f"- {name}: {report}" for name, report in reports.items()]
    names = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in published)
    teacher = f" and of the teacher's, `{teacher_tokenizer}`" if teacher_tokenizer else ""
    card = f"""---
{head}
---

{BEGIN}

# {repo_id.split("/")[-1]}

Conversations{f" of {names}" if names else ""}, rendered, tokenized and aligned by `tide_hf` for distilling a diffusion
language model. Its ids are those of the student's tokenizer, `{student_tokenizer}`{teacher}: it serves no others.

```python
from datasets import load_dataset

rows = load_dataset("{repo_id}", split="{next(iter(reports), "train")}")
```

`TIDETrainer` takes it as `train_dataset` as it stands. Columns: `row_key`, a hash of the row, keys the noise;
`input_ids` and `labels` (−100 = not trained on); `teacher_input_ids`; `chunk_ids` and `teacher_chunk_ids`, the number
of the span of equal bytes that a token belongs to, −1 for none.

## What became of the rows

{chr(10).join(lines)}

## Settings

{values_table(settings)}

{END}
"""
    return adopt_edits(card, existing)
