"""The playground on a real server, in a real browser; what the page does by itself is in test_page.py."""

import pytest

from gshardx.infer.request import Request, SamplingParams
from tests.infer.answers import answered
from tests.infer.server.conftest import ROOMY
from tests.infer.server.test_page import answer, browser, chromium, enter, load, panel, tokens, until  # noqa: F401
from tests.infer.server.test_page import pytestmark as needs_chromium

pytestmark = [pytest.mark.slow, *([needs_chromium] if not isinstance(needs_chromium, list) else needs_chromium)]


def test_tokens_of_the_real_engine_wear_the_colours_of_their_experts(browser, served, tiny):  # noqa: F811
    said = answer(browser, served.url, "To be", 20)
    assert "20 tokens" in said
    params = SamplingParams(max_new_tokens=20, temperature=1.0, seed=0, experts=True)
    expected = answered(tiny.engine(ROOMY), [Request("x", tiny.tokenizer.encode("To be"), params)])["x", 0]
    fills = [bar["fill"] for bar in load(browser)]
    shown = tokens(browser)
    assert len(shown) == 20
    for token, chosen in zip(shown, expected.experts[1:], strict=False):
        assert token["fill"] == fills[chosen[0][0]]
    counted = until(browser, lambda: served.server.engine.stats.expert_load.sum())
    assert counted > 0
    browser.get("about:blank")
