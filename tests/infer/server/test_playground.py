"""The playground on a real server, in a real browser; what the page does by itself is in test_page.py."""

import pytest

from gshardx.infer.request import Request, SamplingParams
from tests.infer.answers import answered
from tests.infer.server.conftest import ROOMY
from tests.infer.server.test_page import answer, browser, chromium, load, needs_chromium, tokens  # noqa: F401

pytestmark = [needs_chromium, pytest.mark.slow]


def test_tokens_of_the_real_engine_wear_the_colours_of_their_experts(browser, served, tiny):  # noqa: F811
    said = answer(browser, served.url, "To be", 20)
    assert "20 tokens" in said
    params = SamplingParams(max_new_tokens=20, temperature=1.0, seed=0, experts=True)
    expected = answered(tiny.engine(ROOMY), [Request("x", tiny.tokenizer.encode("To be"), params)])["x", 0]
    fills = [bar["fill"] for bar in load(browser)]
    shown = tokens(browser)
    assert len(shown) == 20
    for token, chosen in zip(shown[:-1], expected.experts[1:], strict=True):  # the last one went to none
        assert token["fill"] == fills[chosen[0][0]]
    browser.get("about:blank")
