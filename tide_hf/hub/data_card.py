"""The card of a prepared dataset."""

from ..data import PreparationReport
from ..data.answers import AnswerRecord, describe_answers
from .card_edits import adopt_edits, assemble_card
from .card_text import render_template, values_table
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
    predictions: str | None = None,
) -> str:
    """The card of a dataset prepared by [`~tide_hf.data.prepare_dataset`].

    Args:
        repo_id (`str`): the repository that it is pushed to.
        reports (`dict[str, PreparationReport]`): split -> what became of its rows.
        sources (`list[str]`): Hub names of the conversations; a local one is not mentioned.
        student_tokenizer (`str`): the tokenizer of `input_ids`.
        teacher_tokenizer (`str`, *optional*): the tokenizer of `teacher_input_ids`; None without a teacher.
        settings (`dict`): plain values it was prepared with.
        license (`str`, *optional*), languages (`list[str]`, *optional*): of the conversations.
        license_name, license_link (`str`, *optional*): name and address of the license `other`.
        existing (`str`): the card it replaces; [`~tide_hf.hub.card_edits`] says what is kept of it.
        predictions (`str`, *optional*): whose predictions the rows carry, if they carry any.
    """
    published = [name for name in sources if is_hub_name(name)]
    metadata = {
        "license": license,
        "license_name": license_name,
        "license_link": license_link,
        "language": languages or None,
        "source_datasets": published,  # also if empty: the sources of an earlier push must not outlive it
        "tags": ["tide", "diffusion-lm", "tokenized"],
    }
    text = render_template(
        "data_card_template.md",
        repo_id=repo_id,
        reports=reports,
        links=[f"[{name}](https://huggingface.co/datasets/{name})" for name in published],
        student_tokenizer=student_tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        settings=values_table(settings),
        predictions=predictions,
        answers={name: describe_answers(report.answers) for name, report in reports.items() if report.answers},
    )
    card = assemble_card({name: value for name, value in metadata.items() if value is not None}, text)
    return adopt_edits(card, existing)


def answers_card(
    record: AnswerRecord,
    repo_id: str,
    sources: tuple[str, ...] = (),
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
) -> str:
    """The card of a dataset of answers that a teacher wrote.

    Args:
        record ([`~tide_hf.data.answers.AnswerRecord`]): who wrote them, how, and what became of them.
        repo_id (`str`): the repository or folder that it describes.
        sources (`tuple[str, ...]`): Hub names of the answered datasets; a local one is not mentioned.
        license, license_name, license_link (`str`, *optional*): that follow from those of teacher and prompts.
    """
    published = [name for name in sources if is_hub_name(name)]
    metadata = {
        "license": license,
        "license_name": license_name,
        "license_link": license_link,
        "source_datasets": published or None,
        "tags": ["tide", "synthetic"],
    }
    text = render_template(
        "answers_card_template.md",
        repo_id=repo_id,
        links=[f"[{name}](https://huggingface.co/datasets/{name})" for name in published],
        splits={name: describe_answers(record.of_split(name)) for name in record.counts},
        settings=values_table(record.settings),
    )
    return assemble_card({name: value for name, value in metadata.items() if value is not None}, text)
