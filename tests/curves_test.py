import numpy as np
import pytest
from PIL import Image

from ffl_jax.methods.base import KNOWLEDGE, LABELS
from ffl_jax.workdir.curves import draw_curves  # before the fixture of all tests stands in for it

# A method's own names, one of which no prediction has.
TERMS = {"right/alpha": (LABELS, "alpha"), "echo": (KNOWLEDGE, "blend"), "goal": (LABELS, "")}
PREDICTIONS = ("alpha", "blend")
TRAIN = [{"epoch": x, "split": "train", "right/alpha": 1 / x, "echo": 0.1, "goal": 0.5} for x in (1.0, 2.0)]
TEST = [{"epoch": x, "split": "test", "alpha/top1": 0.4 * x, "blend/top1": 0.5} for x in (1.0, 2.0)]
DIVERSITY = {"diversity/disagreement": 0.1, "diversity/kl": 0.2, "diversity/cka": 0.9}


def draw(folder, rows, terms=TERMS, predictions=PREDICTIONS, headline="alpha"):
    draw_curves(folder / "curves.png", rows, "title", headline, predictions, terms)
    assert [path.name for path in folder.iterdir()] == ["curves.png"]
    with Image.open(folder / "curves.png") as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_every_curve_shows_whatever_its_name(tmp_path):
    """A picture changes with each of them; so it does with a kind, and with what is thicker."""
    rows = [*TRAIN, *TEST]
    whole = draw(tmp_path, rows)
    for others in (
        {"predictions": ("alpha",)},
        *({"terms": {name: TERMS[name] for name in TERMS if name != out}} for out in TERMS),
        {"terms": TERMS | {"echo": (LABELS, "blend")}},
        {"headline": "blend"},
    ):
        other = draw(tmp_path, rows, **others)
        assert other.shape == whole.shape
        assert (other != whole).any(), others
    unchanged = draw(tmp_path, rows, TERMS | {"weight": ("", "")})
    assert (unchanged == whole).all()


def test_how_subnetworks_differ_is_a_panel_of_its_own(tmp_path):
    assert draw(tmp_path, [TEST[0] | DIVERSITY]).shape[1] > draw(tmp_path, TEST).shape[1]


@pytest.mark.parametrize("rows", [[], TRAIN[:1], [{"epoch": 1.0, "split": "test"}, *TEST]])
def test_curves_of_a_run_that_has_only_begun_or_lost_lines(tmp_path, rows):
    draw(tmp_path, rows)


def test_a_line_that_covers_little_makes_no_spike(tmp_path):
    """It is drawn with the next one: whatever it says of three steps, it weighs as much as they do."""
    rows = [
        TRAIN[0],
        {**TRAIN[1], "epoch": 1.06, "echo": 0.4},
        {**TRAIN[1], "epoch": 2.0, "echo": 0.1},
        *TEST,
    ]
    mean = (0.06 * 0.4 + 0.94 * 0.1) / 1.0
    joined = [TRAIN[0], {**TRAIN[1], "echo": mean}, *TEST]
    assert (draw(tmp_path, rows) == draw(tmp_path, joined)).all()
