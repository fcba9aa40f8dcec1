"""The committed cards: what the library writes of the committed reports, and nothing else.

`PYTHONPATH=recipes python tests/test_model_cards.py` writes them anew; `embedded.cards` says how the card of any other
network is made.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from embedded.cards import card_of
from huggingface_hub import ModelCard

from tide_hf.hub import check_card

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / "recipes" / "reports"
# file -> report, its row, day of the run: the published objectives, one per pipeline
CARDS = {
    "sorting-tide-shared": ("sorting", "tide_raw", "2026-11-27"),
    "sorting-across-tokenizers-tide-cross": ("sorting_across_tokenizers", "tide_cross", "2026-11-27"),
}


def report_of(name: str) -> dict:
    return json.loads((REPORTS / f"{name}.json").read_text())


def written(name: str) -> str:
    """The card as the library writes it now."""
    report, row, day = CARDS[name]
    return card_of(report_of(report), row, day)


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
    report, row, _ = CARDS[name]
    measured = next(entry for entry in report_of(report)["rows"] if entry["name"] == row)
    results = [metric for result in data["model-index"][0]["results"] for metric in result["metrics"]]
    assert measured["exact_match"]["mean"] in [metric["value"] for metric in results]
    assert {metric["args"]["num_samples"] for metric in results} == {400}
    chunks = {"token": "2,400", "chunk": "9,092"}[data["distillation"]["alignment"]]
    assert f"in {chunks} chunks, which cover 100.0% of the answer bytes" in text
    assert data["license"] == "apache-2.0" and "embedded-run" in data["tags"] and "embedded comparison" in text


@pytest.mark.slow
def test_any_other_card_has_its_command():
    """Catches a network of a report whose card cannot be made, or is made of another row."""
    command = [sys.executable, "-m", "embedded.cards", "reports/sorting.json", "kl", "--date", "2026-11-27"]
    done = subprocess.run(command, cwd=ROOT / "recipes", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == card_of(report_of("sorting"), "kl", "2026-11-27")
    assert check_card(done.stdout) == [] and "# Embedded comparison sorting: kl" in done.stdout


if __name__ == "__main__":
    for name in CARDS:
        (ROOT / "model_cards" / f"{name}.md").write_text(written(name))
