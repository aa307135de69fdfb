"""Exact yes/no properties of the text so far: what a neuron can know beyond its token.

    TextStates(tokenizer).of(ids)   (T, P) bool, for the tokens of one context and P = len(NAMES)

The list is frozen: scores of two models are comparable only on the same properties, so any change
of a name or of a value is a new VERSION (a test holds the values on a text). The text so far is
what the model reads: it begins where the context begins, not where the document does. A property
is read at the first byte of a token that is not white space, with all bytes before it and the
token itself known and nothing after; for a token of white space, behind it. There is no tagger:
word classes are closed lists, and texts are bytes, so that half a character is a text as well. A
word is a run of ASCII letters, digits, _ and bytes of other characters but those of U+2000 to
U+2FFF (quotes, dashes, arrows), which are signs; an empty line closes all brackets and quotes, so
that a stray one does not hold for ever.
"""

import numpy as np

VERSION = 1
RECENT = 64  # tokens
RECENT_BIGRAMS = 200  # tokens
EARLY, LATE = 8, 64  # tokens of the context
LINE_START, LINE_END = 20, 60  # bytes of a line
SENTENCE_START, SENTENCE_END = 5, 20  # words of a sentence

DETERMINERS = "a an the this that these those his her its their our my your each every some any no"
PREPOSITIONS = (
    "of in on at by for with from into onto over under between through during before after about "
    "against among without within upon across along around behind beyond near since toward until"
)
MODALS = "can could may might must shall should will would"
PRONOUNS = "i you he she it we they me him them us who which what"
AUXILIARIES = "is are was were be been being am has have had do does did"
CONJUNCTIONS = "and or but nor so yet because if while when although though unless whereas than as"
NEGATIONS = "not no never none nor cannot without neither"
QUESTIONS = "what who whom whose which when where why how"
TOPICS = (
    "film war city music team church government school river king "
    "file class return import error string function list"
)

BEFORE = {  # word class: its words
    "a determiner": frozenset(DETERMINERS.encode().split()),
    "a preposition": frozenset(PREPOSITIONS.encode().split()),
    "to": frozenset([b"to"]),
    "a modal": frozenset(MODALS.encode().split()),
    "a pronoun": frozenset(PRONOUNS.encode().split()),
    "an auxiliary": frozenset(AUXILIARIES.encode().split()),
    "a conjunction": frozenset(CONJUNCTIONS.encode().split()),
}
NEGATION_WORDS = frozenset(NEGATIONS.encode().split())
QUESTION_WORDS = frozenset(QUESTIONS.encode().split())
TOPIC_WORDS = tuple(TOPICS.encode().split())

BLANK = frozenset(b" \t\r\n\v\f")
DIGITS = frozenset(b"0123456789")
CAPITALS = frozenset(range(65, 91))
LETTERS = CAPITALS | frozenset(range(97, 123))
SIGN_LEAD = 0xE2  # the first of the three bytes of U+2000 to U+2FFF
WORD_BYTES = LETTERS | DIGITS | frozenset(b"_") | frozenset(range(128, 256)) - {SIGN_LEAD}
OPENING = {ord("("): "round", ord("["): "square", ord("{"): "curly"}
CLOSING = {ord(")"): "round", ord("]"): "square", ord("}"): "curly"}
SENTENCE_ENDS = frozenset(b".!?")
CONTINUATION = range(0x80, 0xC0)
OPENING_QUOTE, CLOSING_QUOTE = b"\x80\x9c", b"\x80\x9d"  # the other two, of curly quotes


class TextState:
    """The state of one text, fed byte by byte; `values` reads the properties."""

    def __init__(self):
        self.word = bytearray()  # that is being written
        self.last = b""  # complete word of the sentence, in lower case; the one before it:
        self.second_last = b""
        self.last_was_capital = False
        self.last_byte = -1
        self.last_visible = -1  # byte that is not blank
        self.sign = None  # the bytes after SIGN_LEAD, while they come
        self.said = set()  # topic words
        self.line_was_indented = False  # the line before this one; what it ended with:
        self.line_ended_with = -1
        self.paragraph_begins = True
        self.close_all()
        self.begin_line()
        self.begin_sentence()

    def close_all(self):
        self.open = {"round": 0, "square": 0, "curly": 0}
        self.double_quotes = False
        self.single_quotes = False
        self.backticks = False

    def begin_line(self):
        self.column = 0
        self.indent = 0
        self.line_first = -1  # its first byte that is not blank
        self.line_has = set()  # of the signs = : #

    def begin_sentence(self):
        self.sentence_words = 0
        self.sentence_first = b""
        self.comma = False
        self.number = False
        self.negation = False
        self.last = b""
        self.second_last = b""
        self.last_was_capital = False

    # ---- bytes -----------------------------------------------------------------------------------

    def feed(self, byte):
        """Take the next byte of the text."""
        if self.continues_word(byte):
            if not self.word:
                self.sentence_words += 1
            self.word.append(byte)
        else:
            self.end_word()
            if byte in BLANK:
                self._feed_blank(byte)
            else:
                self._feed_sign(byte)
        if byte not in CONTINUATION and byte != SIGN_LEAD:
            self.sign = None
        if byte not in BLANK:
            if self.line_first < 0:
                self.line_first = byte
                self.indent = self.column
            self.last_visible = byte
        if byte != 10:
            self.column += 4 if byte == 9 else 1
        self.last_byte = byte

    def continues_word(self, byte):
        """Whether the next byte would be part of a word."""
        if self.sign is not None and byte in CONTINUATION:
            return False
        return byte in WORD_BYTES

    def end_word(self):
        """Complete the word that is being written, if there is one."""
        if not self.word:
            return
        word = bytes(self.word).lower()
        self.last_was_capital = self.word[0] in CAPITALS
        self.second_last = self.last
        self.last = word
        self.word = bytearray()
        if not self.sentence_first:
            self.sentence_first = word
        if word[0] in DIGITS:
            self.number = True
        if word in NEGATION_WORDS:
            self.negation = True
        if word in TOPIC_WORDS:
            self.said.add(word)

    def _feed_blank(self, byte):
        if self.last_byte in SENTENCE_ENDS:
            self.begin_sentence()
        if byte != 10:
            return
        is_empty = self.line_first < 0
        self.single_quotes = False
        self.paragraph_begins = is_empty
        if is_empty:
            self.close_all()
            self.begin_sentence()
        else:
            self.line_was_indented = self.indent >= 4
            self.line_ended_with = self.last_visible
        self.begin_line()

    def _feed_sign(self, byte):
        if byte == SIGN_LEAD:
            self.sign = b""
        elif byte in CONTINUATION:
            self._feed_curly(byte)
        elif byte in OPENING:
            self.open[OPENING[byte]] += 1
        elif byte in CLOSING:
            kind = CLOSING[byte]
            self.open[kind] = max(0, self.open[kind] - 1)
        elif byte == ord('"'):
            self.double_quotes = not self.double_quotes
        elif byte == ord("`"):
            self.backticks = not self.backticks
        elif byte == ord("'"):
            after_word = self.last_byte in WORD_BYTES
            self.single_quotes = not self.single_quotes and not after_word
        elif byte == ord(","):
            self.comma = True
        elif byte in b"=:#":
            self.line_has.add(byte)

    def _feed_curly(self, byte):
        self.sign += bytes([byte])
        if self.sign == OPENING_QUOTE:
            self.double_quotes = True
        elif self.sign == CLOSING_QUOTE:
            self.double_quotes = False
        if len(self.sign) == 2:
            self.sign = None

    # ---- properties ------------------------------------------------------------------------------

    def values(self, token):
        """{property: bool} where the token (bytes) stands; its white space has been fed.

        Only those that follow from bytes; see TextStates for those that follow from ids.
        """
        is_word = bool(token) and self.continues_word(token[0])
        if not is_word:
            self.end_word()
        return self._enclosed() | self._in_line() | self._in_sentence() | self._after(is_word)

    def _enclosed(self):
        depth = sum(self.open.values())
        return {
            "in round brackets": self.open["round"] > 0,
            "in square brackets": self.open["square"] > 0,
            "in curly brackets": self.open["curly"] > 0,
            "in nested brackets": depth > 1,
            "in double quotes": self.double_quotes,
            "in single quotes": self.single_quotes,
            "in backticks": self.backticks,
        }

    def _in_line(self):
        first = self.line_first
        return {
            "first word of the line": first < 0 and not self.word,
            "start of the line": self.column < LINE_START,
            "end of a long line": self.column >= LINE_END,
            "indented line": (self.indent if first >= 0 else self.column) >= 4,
            "after an indented line": self.line_was_indented,
            "after a line that ends in a colon": self.line_ended_with == ord(":"),
            "first line of a paragraph": self.paragraph_begins,
            "capitalised line": first in CAPITALS,
            "line that begins with a digit": first in DIGITS,
            "line that begins with a sign": first >= 0 and first not in WORD_BYTES,
            "after = in the line": ord("=") in self.line_has,
            "after : in the line": ord(":") in self.line_has,
            "after # in the line": ord("#") in self.line_has,
        }

    def _in_sentence(self):
        earlier_words = self.sentence_words - bool(self.word)
        return {
            "first word of the sentence": earlier_words == 0,
            "start of the sentence": earlier_words < SENTENCE_START,
            "end of a long sentence": earlier_words >= SENTENCE_END,
            "after a comma in the sentence": self.comma,
            "after a number in the sentence": self.number,
            "after a negation in the sentence": self.negation,
            "sentence that begins with a pronoun": self.sentence_first in BEFORE["a pronoun"],
            "sentence that begins with a question word": self.sentence_first in QUESTION_WORDS,
        }

    def _after(self, is_word):
        last = self.last
        runs_on = bool(self.word) and is_word
        values = {
            "inside a word": runs_on,
            "inside a capitalised word": runs_on and self.word[0] in CAPITALS,
            "inside a number": runs_on and self.word[-1] in DIGITS,
            "inside a name with _": runs_on and b"_" in self.word,
            "after a sign without a space": self.last_byte not in BLANK and not self.word,
            "after a comma": self.last_visible == ord(","),
            "after a dot without a space": self.last_byte == ord("."),
            "after a capitalised word": self.last_was_capital,
            "after a number": last[:1].isdigit(),
            "after a word in -ing": last.endswith(b"ing"),
            "after a word in -ly": last.endswith(b"ly"),
            "after a word in -ed": last.endswith(b"ed"),
            "two words after a determiner": self.second_last in BEFORE["a determiner"],
        }
        for name, words in BEFORE.items():
            values[f"after {name}"] = last in words
        for topic in TOPIC_WORDS:
            values[f"text has said {topic.decode()}"] = topic in self.said
        return values


class Repetitions:
    """Properties that follow from the ids so far: repetition, and the place in the context."""

    def __init__(self):
        self.position = -1
        self.before = None  # the id before
        self.counts = {}  # id: occurrences
        self.seen = {}  # id: where last
        self.pairs = {}  # (id, id): where last
        self.was_recent = False

    def values(self, id):
        """{property: bool} of the next id, which is then part of the text."""
        self.position += 1
        t = self.position
        pair = (self.before, id)
        recent = t - self.seen.get(id, -RECENT - 1) <= RECENT
        values = {
            "token seen in the last 64": recent,
            "bigram seen in the last 200": t - self.pairs.get(pair, -t - 999) <= RECENT_BIGRAMS,
            "third or later occurrence of the token": self.counts.get(id, 0) >= 2,
            "after a token seen in the last 64": self.was_recent,
            "first 8 tokens of the context": t < EARLY,
            "beyond 64 tokens of the context": t >= LATE,
        }
        self.counts[id] = self.counts.get(id, 0) + 1
        self.seen[id] = t
        self.pairs[pair] = t
        self.before = id
        self.was_recent = recent
        return values


class TextStates:
    """The properties of texts of one tokenizer; token_bytes: from an id to its bytes."""

    def __init__(self, token_bytes):
        self.token_bytes = token_bytes

    def rows(self, ids):
        """Yield {property: bool} for each id of a context; later ids do not matter."""
        text, repetitions = TextState(), Repetitions()
        for id in ids:
            token = self.token_bytes(id)
            visible = token.lstrip()  # of the same white space as BLANK
            for byte in token[: len(token) - len(visible)]:
                text.feed(byte)
            yield text.values(visible) | repetitions.values(id)
            for byte in visible:
                text.feed(byte)

    def of(self, ids):
        """(T, P) bool for the ids (T,) of one context."""
        rows = [tuple(row.values()) for row in self.rows(np.asarray(ids).tolist())]
        return np.array(rows, bool).reshape(len(rows), len(NAMES))


NAMES = tuple(TextState().values(b"") | Repetitions().values(0))
