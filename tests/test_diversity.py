import zlib

import pytest

from kl_alliteration import diversity


def test_different_share_by_hand():
    assert diversity.different_share(["a", "b", "a", "c"]) == 0.75
    assert diversity.different_share([]) == 0.0


def test_distinct_by_hand():
    # pairs: the tall, tall tree | the tall, tall tall, tall tall: 3 different of 5
    assert diversity.distinct_n(["The tall tree.", "the tall tall, tall"], 2) == pytest.approx(3 / 5)
    assert diversity.distinct_n(["a b", "c"], 1) == 1.0
    assert diversity.distinct_n(["word"], 2) == 0.0


def test_compression_ratio_against_zlib():
    text = "to the tall tall tall " * 50
    assert diversity.compression_ratio([text]) == len(text) / len(zlib.compress(text.encode(), 9)) > 20
    assert diversity.compression_ratio([]) == 0.0
