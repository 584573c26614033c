"""Whatever follows the masks to their end is JSON of the schema, and nothing that users send stops the server."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gshardx.data.tokenizer import Tokenizer, build_tokenizer, train_bpe
from gshardx.errors import BadInput
from gshardx.infer.grammar import MAX_SCHEMA, Grammars

PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer"}, "mood": {"enum": ["calm", "wild"]}},
    "required": ["age", "mood"],
    "additionalProperties": False,
}
MATRIX = {"type": "array", "minItems": 1, "items": {"type": "array", "items": {"type": "number"}}}
OBJECT = {"type": "object"}
JSON_LIKE = [
    '{"age": 31, "mood": "calm", "friends": [{"age": 7, "mood": "wild"}, {"age": 70, "mood": "calm"}]}',
    '[[1.5, 2, 3e8], [], [-4, 0.25]] and "words": {"name": "Ada", "city": "London", "born": 1815}',
    'He said: "all is calm", and she: "the wild is wilder". {"a": true, "b": null, "c": ["x", "y"]}',
]
BYTES = build_tokenizer("bytes", 0, [])
BPE = train_bpe(400, JSON_LIKE * 3)
VOCAB = {BYTES: 300, BPE: 448}  # the model's is larger
GRAMMARS = {tokenizer: Grammars(tokenizer, vocab) for tokenizer, vocab in VOCAB.items()}
EITHER = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])


def start(schema, tokenizer=BYTES):
    return GRAMMARS[tokenizer].start(schema if isinstance(schema, str) else json.dumps(schema))


def allowed(constraint):
    return np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little"))


def write(constraint, text):
    for token in BYTES.encode(text):
        constraint.accept(int(token))


def texts(constraint):
    """What may come next, each a byte."""
    return {"END" if token == BYTES.end else BYTES.decode([token]) for token in allowed(constraint)}


def walk(constraint, tokenizer, seed, free):
    """The text after ``free`` random steps, and then the shortest way to its end that is easily found."""
    rng, tokens = np.random.default_rng(seed), []
    ways_out = [tokenizer.end, *(int(tokenizer.encode(text)[0]) for text in '"}],:0')]
    for step in range(free + 200):
        found = allowed(constraint)
        assert found.max() < tokenizer.vocab_size
        way_out = [token for token in ways_out if token in found] if step >= free else []
        token = way_out[0] if way_out else int(rng.choice(found))
        constraint.accept(token)
        if token == tokenizer.end:
            return tokenizer.decode(tokens)
        tokens.append(token)
    raise AssertionError(f"no end: {tokenizer.decode(tokens)!r}")


def is_person(value):
    return set(value) == {"age", "mood"} and type(value["age"]) is int and value["mood"] in ("calm", "wild")


def is_matrix(value):
    numbers = [number for row in value for number in row]
    return type(value) is list and len(value) > 0 and all(type(number) in (int, float) for number in numbers)


@EITHER
@pytest.mark.parametrize(
    ("schema", "satisfied"),
    [(PERSON, is_person), (MATRIX, is_matrix), (OBJECT, lambda value: type(value) is dict)],
    ids=["person", "matrix", "JSON mode"],
)
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), free=st.integers(0, 60))
def test_a_text_that_follows_the_masks_satisfies_the_schema(tokenizer, schema, satisfied, seed, free):
    assert satisfied(json.loads(walk(start(schema, tokenizer), tokenizer, seed, free)))


@EITHER
@pytest.mark.parametrize(
    ("schema", "text"), [(PERSON, '{"age": 31, "mood":"wild"}'), (MATRIX, "[[1.5, -2],\n []]"), (OBJECT, '{"é": []}')]
)
def test_a_text_of_the_schema_is_accepted_however_it_is_cut(tokenizer, schema, text):
    constraint = start(schema, tokenizer)
    for token in tokenizer.encode(text):
        assert token in allowed(constraint)
        constraint.accept(int(token))
    assert list(allowed(constraint)) == [tokenizer.end]


@EITHER
def test_the_mask_is_as_wide_as_the_model_and_never_allows_what_the_tokenizer_lacks(tokenizer):
    mask = start(OBJECT, tokenizer).mask()
    assert (mask.dtype, mask.shape) == (np.uint32, (-(-VOCAB[tokenizer] // 32),))
    text = start({"type": "string"}, tokenizer)
    text.accept(int(tokenizer.encode('"')[0]))
    assert allowed(text).max() < tokenizer.vocab_size
    assert tokenizer.end not in allowed(text)


def test_the_end_may_come_where_the_text_may_end_and_alone_where_it_must():
    number = start({"type": "integer"})
    assert "END" not in texts(number)
    write(number, "1")
    assert texts(number) == {"END", *"0123456789"}
    value = start(OBJECT)
    write(value, "{}")
    assert texts(value) == {"END"}
    value.accept(BYTES.end)
    assert texts(value) == {"END"}


@pytest.mark.parametrize("token", [int(BYTES.encode("x")[0]), BYTES.end, -1, 257, 299, 300, 10**9])
def test_a_token_outside_the_mask_is_refused_and_changes_nothing(token):
    constraint = start(PERSON)
    write(constraint, "{")
    before = constraint.mask()
    with pytest.raises(ValueError, match=f"token {token} may not come next"):
        constraint.accept(token)
    np.testing.assert_array_equal(constraint.mask(), before)


def test_constraints_of_one_schema_are_independent():
    one, other = start(PERSON), start(PERSON)
    write(one, '{"age":')
    assert texts(other) == {"{"}
    assert texts(start(PERSON)) == {"{"}
    write(other, '{"age":1')
    assert "," not in texts(one)


def test_threads_may_share_the_grammars():
    grammars = Grammars(BYTES, 257)

    def one(seed):
        return json.loads(walk(grammars.start(json.dumps(OBJECT)), BYTES, seed, 20))

    with ThreadPoolExecutor(4) as pool:
        assert all(type(value) is dict for value in pool.map(one, range(40)))


def test_whitespace_ends():
    constraint = start(OBJECT)
    write(constraint, "{" + " \n\t\r" * 16)
    assert texts(constraint) == {'"', "}"}


def test_a_schema_cant_change_what_json_looks_like():
    strange = OBJECT | {"x-guidance": {"key_separator": "=", "item_separator": ";", "whitespace_pattern": "X"}}
    constraint = start(strange)
    write(constraint, '{"a"')
    assert texts(constraint) == {":", " ", "\n", "\t", "\r"}
    with pytest.raises(BadInput, match=r'Unimplemented keys: \["not"\]'):
        start({"not": {}, "x-guidance": {"lenient": True}})


CHAIN = {f"d{number}": {"items": {"$ref": f"#/$defs/d{number + 1}"}} for number in range(1400)}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("{", "not JSON"),
        ("[" * 30_000, "not JSON"),
        ('{"maxLength": ' + "9" * 5000 + "}", "not JSON"),
        ('"object"', "not an object"),
        ("{}, {}", "not JSON"),
        ({"type": "thing"}, "Invalid type: thing"),
        ({"minimum": "a"}, "minimum"),
        ({"const": "\ud800"}, "hex escape"),
        ({"const": float("nan")}, "expected value"),
        ({"not": {}}, "Unimplemented keys"),
        ({"pattern": "(?=a)b"}, "look-around"),
        ({"pattern": "(" * 9000 + "a" + ")" * 9000}, "nest"),
        ({"$ref": "http://127.0.0.1:9/schema"}, "does not fetch"),
        ({"$ref": "file:///dev/stdin"}, "does not fetch"),
        ({"$ref": "#"}, "no JSON satisfies it"),
        ({"allOf": [{"type": "string"}, {"type": "object"}]}, "incompatible types"),
        ({"enum": ["x" * MAX_SCHEMA]}, "at most 65,536"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"$defs": CHAIN | {"d1400": {}}, "$ref": "#/$defs/d0"}, "too deep"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "",
)
def test_a_schema_that_cant_be_used_is_refused_in_a_line(schema, said):
    with pytest.raises(BadInput, match=said) as refused:
        start(schema)
    assert str(refused.value).startswith("json_schema: ")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.slow
@pytest.mark.parametrize("divisor", [500_009, 900_001])
def test_a_schema_of_endless_work_is_refused_after_seconds(divisor):
    with pytest.raises(BadInput, match="too much time or memory"):
        start({"type": "integer", "multipleOf": divisor})


def test_a_text_that_becomes_too_complex_ends_in_a_line():
    constraint = start({"type": "string", "pattern": "^" + "[a-z ]?" * 3000 + "$"})
    for _ in range(2):
        with pytest.raises(BadInput, match="too many expressions"):
            write(constraint, '"abc')
    with pytest.raises(BadInput, match="too many expressions"):
        constraint.mask()


def test_without_the_library_there_is_a_mend(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(BadInput, match=r"pip install 'gshardx\[serve\]'"):
        Grammars(BYTES, 257).start("{}")


def test_a_tokenizer_that_the_library_cant_read_is_named():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    with pytest.raises(BadInput, match="this run's tokenizer"):
        Grammars(Tokenizer(words, "words"), 2).start("{}")
