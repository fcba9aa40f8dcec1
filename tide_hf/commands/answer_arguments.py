"""What decides a teacher's answers: its name and how it is loaded, and the flags of `--teacher_answers`."""

import json
import os
from dataclasses import dataclass, field, fields

import torch
from transformers import AutoConfig, AutoTokenizer

from ..teachers import load_teacher
from ..teachers.answers import AnswerDecoding, kind_of, load_writer


@dataclass
class AnswerArguments:
    """How a teacher writes answers. Its fields are flags of [`parse_prepare_arguments`]."""

    teacher_answers: str | None = field(
        default=None,
        metadata={
            "help": "Have the teacher write the answers that are prepared, instead of the dataset's own: greedy (its "
            "most probable tokens), or sample (drawn). Any causal LM of transformers, or a diffusion LM.",
            "choices": ["greedy", "sample"],
        },
    )
    num_answers: int = field(default=1, metadata={"help": "Answers to each prompt; more than one only with sample."})
    answer_temperature: float = field(default=1.0, metadata={"help": "Temperature of sample."})
    answer_top_p: float = field(default=1.0, metadata={"help": "Nucleus of sample; 1 is off."})
    answer_top_k: int = field(default=0, metadata={"help": "Most probable tokens that sample draws from; 0 is off."})
    max_new_tokens: int = field(default=512, metadata={"help": "Most tokens of an answer."})
    answer_batch_size: int = field(
        default=16,
        metadata={"help": "Answers written together; those that a diffusion teacher draws are written one by one."},
    )
    answer_seed: int = field(default=42, metadata={"help": "Seed of sample."})
    answer_settings: dict | str | None = field(
        default=None,
        metadata={"help": 'Further arguments of the teacher\'s generate (JSON), such as {"steps_per_block": 8}.'},
    )
    keep_unfinished: bool = field(
        default=False,
        metadata={
            "help": "Keep answers that the teacher did not end within max_new_tokens; students learn to end there."
        },
    )
    distinct_answers: bool = field(
        default=False, metadata={"help": "Drop an answer that equals an earlier one to the same row."}
    )
    answers_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the answers as raw rows, which any student can be prepared from (default: output_dir "
            "with -answers behind it, or output_dir itself without a student)."
        },
    )
    prompts_per_part: int = field(
        default=256, metadata={"help": "Rows answered at a time, the most that an interruption loses per process."}
    )

    def __post_init__(self):
        if isinstance(self.answer_settings, str):
            try:
                self.answer_settings = json.loads(self.answer_settings)
            except json.JSONDecodeError as error:
                raise ValueError(f"answer_settings={self.answer_settings!r} is not valid JSON: {error}.") from None
        if not isinstance(self.answer_settings, dict | None):
            raise ValueError(f"answer_settings is {self.answer_settings!r}; expected a mapping of names.")
        changed = [knob.name for knob in fields(self) if getattr(self, knob.name) != knob.default]
        if self.teacher_answers is None and changed:
            raise ValueError(
                f"{', '.join(changed)} {'says' if len(changed) == 1 else 'say'} how a teacher writes answers, and "
                "teacher_answers is not given: set it to greedy or sample, or leave the rest out."
            )
        for name in ("num_answers", "prompts_per_part", "answer_batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.teacher_answers == "greedy":
            drawn = [
                name for name in ("num_answers", "answer_temperature", "answer_top_p", "answer_top_k", "answer_seed")
            ]
            if given := [name for name in drawn if name in changed]:
                raise ValueError(
                    f"{', '.join(given)} {'has' if len(given) == 1 else 'have'} no meaning with "
                    "teacher_answers=greedy, which draws nothing: leave it out, or set teacher_answers to sample."
                )
        if self.teacher_answers == "sample" and self.answer_temperature <= 0:
            raise ValueError(
                f"answer_temperature={self.answer_temperature} must be above 0 to draw: for the most probable tokens "
                "set teacher_answers to greedy."
            )

    def decoding(self) -> AnswerDecoding:
        """The same for [`AnswerWriter`]."""
        temperature = self.answer_temperature if self.teacher_answers == "sample" else 0.0
        narrowing = (self.answer_top_p, self.answer_top_k)
        return AnswerDecoding(temperature, *narrowing, self.max_new_tokens, self.answer_settings or {})

    def in_words(self) -> str:
        """The decoding as a card names it."""
        text = "greedy"
        if self.teacher_answers == "sample":
            text = f"{self.num_answers} per prompt drawn at temperature {self.answer_temperature:g}"
            text += f", top_p {self.answer_top_p:g}" if self.answer_top_p < 1 else ""
            text += f", top_k {self.answer_top_k}" if self.answer_top_k else ""
            text += f", seed {self.answer_seed}"
        return f"{text}, at most {self.max_new_tokens} tokens"


@dataclass(frozen=True)
class TeacherModel:
    """A teacher that writes or predicts, by name.

    Args:
        name (`str`): Hub name or folder.
        dtype (`str`), load_in_4bit (`bool`), init_kwargs (`dict`): how it is loaded, see [`load_writer`].
    """

    name: str
    dtype: str = "auto"
    load_in_4bit: bool = False
    init_kwargs: dict = field(default_factory=dict)

    def config(self):
        """Its config alone."""
        return AutoConfig.from_pretrained(self.name, revision=self.init_kwargs.get("revision"))

    def tokenizer(self):
        """Its tokenizer."""
        return AutoTokenizer.from_pretrained(self.name, revision=self.init_kwargs.get("revision"))

    def load(self):
        """The model to write with, on this process's device unless `device_map` says where."""
        return load_writer(self.name, kind_of(self.config()), self.dtype, self.load_in_4bit, **self._placed())

    def load_to_predict(self):
        """The model as training would load it, placed in the same way."""
        return load_teacher(self.name, self.dtype, self.load_in_4bit, **self._placed())

    def _placed(self) -> dict:
        kwargs = dict(self.init_kwargs)
        if not self.load_in_4bit and "device_map" not in kwargs:
            kwargs["device_map"] = {"": _device()}
        return kwargs


def launched() -> tuple[int, int]:
    """Number of this process, and how many accelerate or torchrun started.

    They never have to talk to each other, so that no process group is opened, whose calls would time out while one
    process still writes.
    """
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _device() -> torch.device:
    """This process's accelerator, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else torch.device(found.type, int(os.environ.get("LOCAL_RANK", 0)))
