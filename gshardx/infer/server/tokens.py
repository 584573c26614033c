"""What single tokens are called in answers."""

import functools

from tokenizers import pre_tokenizers

from gshardx.data.tokenizer import Tokenizer


class TokenTexts:
    """Texts and bytes of a tokenizer's tokens. Byte-level tokens may be parts of characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = _byte_of_char() if "ByteLevel" in type(tokenizer.inner.decoder).__name__ else {}
        self.text = functools.lru_cache(1 << 16)(self._text)

    def bytes(self, token: int) -> bytes:
        """UTF-8, or a part of it."""
        name = self._tokenizer.inner.id_to_token(token)
        if name is None:  # the model's vocabulary may be wider than the tokenizer's
            return b""
        if name and all(char in self._bytes for char in name):
            return bytes(self._bytes[char] for char in name)
        return str(self._tokenizer.inner.decode([token], skip_special_tokens=False)).encode()

    def _text(self, token: int) -> str:
        """As it is read; a part of a character as OpenAI writes it: bytes:\\xe2\\x82."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _byte_of_char() -> dict[str, int]:
    """How byte-level tokenizers write each byte as a printable character (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet())
    return table
