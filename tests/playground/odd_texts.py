"""A hundred texts on which two tokenizers may disagree."""

import random

WRITTEN = [
    "",
    " ",
    "\n",
    "a",
    "The quick brown fox's tail, and they'll say I'd've gone.",
    "'S 'LL 'll 've're'd'm't's",
    "don't DON'T o'clock 'tis",
    "  two   three    four     ",
    "a  b\t\tc\n\n\nd\r\ne\rf",
    "trailing space ",
    "trailing spaces    \n",
    " \t\n\x0b\x0c\r\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2028\u2029\u202f\u205f\u3000x",
    "\ufeffBOM\ufeff inside\ufeff",
    "\u200bzero\u200bwidth\u200d\u2060",
    "NEL\x85NEL \x85 \x85\x85x",
    "qzx \ufeff !\x85 \u2028! \x85\x85\x85",
    "nul\x00nul\x01\x7f",
    "<|endoftext|>",
    "<script>alert(1)</script> & &amp; \"quotes\" 'single'",
    "</script><!--]]>",
    "naïve café cafe\u0301 Å Å ﬁ ß ẞ ſ",
    "Ελληνικά кириллица עברית العربية हिन्दी ไทย 한국어 日本語 漢字かなカナ",
    "١٢٣ ۴۵۶ १२३ Ⅷ ½ ² ³ ① 一二三",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 e\u0301\u0302\u0303",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𒀀 🄰",
    "lone \ud800 surrogate \udc00 and \udc00\ud800 turned",
    "\U00010000\ufffd\ufffe\uffff",
    "def f(x):\n    return x**2 + 1\n\n\nclass A(B):\n\tpass\n",
    "0.1e-5 1,000,000 3.14159 0x1F 1_000",
    "snake_case camelCase kebab-case UPPER",
    "!!!???...---___===+++***///\\\\\\",
    " ! ? . - _ = + * / \\ | ~ ` @ # $ % ^ & ( ) [ ] { } < > : ;",
    "a" * 300,
    "ab" * 150,
    " " * 200 + "x",
    "\n" * 100,
    "9" * 120,
    "\u202eright to left\u202c",
]
ALPHABET = [
    *"abcdeTHEing   \n\t'.,-_()<>&\"0123",
    "'s",
    "'ll",
    "é",
    "ß",
    "я",
    "漢",
    "٣",
    "Ⅷ",
    "\u0301",
    "\xa0",
    "\x85",
    "\ufeff",
    "\u3000",
    "😀",
    "\u200d",
    "\ud83d",
]


def odd_texts(count=100):
    draws = random.Random(0)
    texts = list(WRITTEN)
    while len(texts) < count:
        texts.append("".join(draws.choices(ALPHABET, k=draws.randint(1, 60))))
    return texts
