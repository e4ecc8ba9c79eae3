"""Prompts as people and machines may write them: words, every kind of space and script, arbitrary code points."""

from __future__ import annotations

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CORPUS = (
    "a red lighthouse on a rocky coast at dusk, two white sailing boats under a full moon. "
    "the old wooden house stands near 12 tall pines; it's snowing and they've seen 3 balloons! "
    "naïve café über straße ñandú чайка над морем 山の上の城 🎈🏰"
)
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789",
    " \t\n\r\u00a0\u2003\u3000\u200b\u0085\x0b\x0c",
    ".,;:!?'\"()[]{}<>|/\\@#$%^&*-_=+~`",
    "éèñüßÅøÆœ\u0301\u0308\u0327ΑβγДжщİıǅﬁ²½Ⅷ١२",
    "日本語漢字かなカナ한국어ไทยעבריתالعربية",
    "🎈🏰👩\u200d🚀👍🏽🇫🇷❤\ufe0f\u20e3\U0001f9ff\U00020000",
    "\x00\x01\x7f\ufeff\ufffd\u0378",
]
WORDS = [*CORPUS.split(), "it's", "we'll", "THEY'RE", BOS, EOS, EOS.upper(), "</w>", "<|", "don't"]


def random_prompt(rng):
    kind = rng.random()
    if kind < 0.3:
        return " ".join(rng.choices(WORDS, k=rng.randrange(0, 30)))
    if kind < 0.4:
        return " ".join(rng.choices(WORDS, k=rng.randrange(60, 200)))
    if kind < 0.5:
        points = (rng.randrange(0x110000) for _ in range(rng.randrange(0, 40)))
        return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
    letters = "".join(rng.sample(ALPHABETS, k=rng.randrange(1, 4)))
    return "".join(rng.choices(letters, k=rng.randrange(0, 60)))
