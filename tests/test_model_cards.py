"""The committed cards: what the library writes of the committed reports, and nothing else."""

import json
from pathlib import Path

import pytest
from embedded.cards import report_card
from huggingface_hub import ModelCard

from tide_hf.hub import check_card

ROOT = Path(__file__).parents[1]
NUM_HELD_OUT = 400
# file -> report, its row, recipe, day of the run
CARDS = {
    "sorting-ce": ("sorting", "ce", "dense_teacher", "2026-11-27"),
    "sorting-kl": ("sorting", "kl", "dense_teacher", "2026-11-27"),
    "sorting-tide-shared": ("sorting", "tide_raw", "dense_teacher", "2026-11-27"),
    "sorting-tide-shared-normalized": ("sorting", "tide", "dense_teacher", "2026-11-27"),
    "sorting-across-tokenizers-ce": ("sorting_across_tokenizers", "ce", "moe_teacher", "2026-11-27"),
    "sorting-across-tokenizers-calm": ("sorting_across_tokenizers", "calm", "moe_teacher", "2026-11-27"),
    "sorting-across-tokenizers-tide-cross": ("sorting_across_tokenizers", "tide_cross", "moe_teacher", "2026-11-27"),
    "sorting-across-tokenizers-tide-shared": (
        "sorting_across_tokenizers",
        "tide_shared_raw",
        "moe_teacher",
        "2026-11-27",
    ),
}


def written(name: str) -> str:
    """The card as the library writes it now."""
    report, row, recipe, day = CARDS[name]
    return report_card(
        json.loads((ROOT / "recipes" / "reports" / f"{report}.json").read_text()),
        row,
        f"accelerate launch recipes/{recipe}.py",
        f"outputs/{recipe}/runs/{row}-seed0",
        NUM_HELD_OUT,
        day,
        alignment="token" if recipe == "dense_teacher" else "chunk",
    )


def test_every_card_is_one_of_these():
    """Catches a card that nothing checks."""
    assert {path.stem for path in (ROOT / "model_cards").glob("*.md")} == set(CARDS)


@pytest.mark.parametrize("name", CARDS)
def test_card_is_what_the_library_writes(name):
    """Catches an edited number, a card older than its report, and one that lacks what people need."""
    text = (ROOT / "model_cards" / f"{name}.md").read_text()
    assert text == written(name)
    assert check_card(text) == []
    data = ModelCard(text).data.to_dict()
    report = json.loads((ROOT / "recipes" / "reports" / f"{CARDS[name][0]}.json").read_text())
    measured = next(row for row in report["rows"] if row["name"] == CARDS[name][1])
    values = [metric["value"] for result in data["model-index"][0]["results"] for metric in result["metrics"]]
    assert measured["exact_match"]["mean"] in values
    if "calm" in name or "cross" in name.split("tokenizers")[-1]:
        assert "in 9,092 chunks, which cover 100.0% of the answer bytes" in text
    assert data["license"] == "apache-2.0" and "embedded-run" in data["tags"] and "embedded comparison" in text


if __name__ == "__main__":  # python tests/test_model_cards.py writes them anew
    for name in CARDS:
        (ROOT / "model_cards" / f"{name}.md").write_text(written(name))
