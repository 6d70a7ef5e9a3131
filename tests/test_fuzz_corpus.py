"""Every input that fuzzing kept goes through its parser; `make fuzz` looks for new ones."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "fuzz"
sys.path.insert(0, str(HERE))

from parsers import PARSERS  # noqa: E402


@pytest.mark.parametrize("name", PARSERS)
def test_the_corpus_of_each_parser_holds_what_is_accepted_and_what_is_refused(name):
    inputs = sorted((HERE / "corpus" / name).iterdir())
    accepted = [PARSERS[name](path.read_bytes()) for path in inputs]
    assert True in accepted
    assert False in accepted
