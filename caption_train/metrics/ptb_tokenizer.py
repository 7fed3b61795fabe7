"""Splits captions into the tokens that COCO's metrics count, without Java. Standard library only.

`tokenize` does what Stanford's PTBTokenizer 3.4.1 does as pycocoevalcap 1.2 calls it (-preserveLines
-lowerCase), and drops the same punctuation. The rules were found by comparing with that program;
docs/validation.md says how often the two agree.
"""

import re
from collections.abc import Iterator

_SPELLED = str.maketrans(
    {"’": "'", "‘": "'", "…": "...", "£": "#", "€": "$", "¤": "$", "¢": " cents ", "\xad": None}
    | {"½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "}
)
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&nbsp;": " "}
_ENTITY = re.compile("|".join(_ENTITIES))
_JOINED = re.compile(
    r"\b(?:(can)(not)|(gon)(na)|(got)(ta)|(wan)(na)|(lem)(me)|(gim)(me))\b(?!')|(?<!\w)('t)(is|was)\b", re.I
)
_NEGATED = re.compile(r"(?<=[^\W_])(n't)(?![^\W_])", re.I)
# Letters, digits, the combining marks of other scripts, and the non-breaking hyphen.
_A = (
    r"(?:[^\W_]|[\u0300-\u036f\u0483-\u0487\u0591-\u05c7\u064b-\u065e\u0670\u0900-\u0903\u093a-\u094f\u0e31"
    r"\u0e34-\u0e3a\u0e47-\u0e4e\u2011])"
)
_L = rf"(?!\d){_A}"
_SYMBOL = (
    r"[#-&+/<-@\\^|~\xa1\xa5-\xa9\xac\xae-\xb1\xb4\xb6-\xb8\xbf\xd7\xf7\u2016\u2020-\u2023\u2030-\u2038\u203b"
    r"\u2042\u2044\u2100-\u214f\u2190-\u245f\u2500-\u2775\u2794-\u2bff\u3001\u3002\u30fb\uff01-\uff0f"
    r"\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"
)
_ABBREVIATIONS = (
    "mr|mrs|ms|drs?|profs?|sens?|reps?|lt|col|gen|govs?|adm|rev|maj|sgt|cpl|pvt|capt|ste?|ave|pres|hon|jr|sr|bros|"
    "blvd|rd|esq|inc|cos?|corp|ltd|plc|univ|etc|vs|al|mt|ft|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|"
    "wed|thurs?|fri|calif|fla|cf"
)
_TOKEN = re.compile(
    rf"""
    https?://[^\s"()<>]*[^\s"()<>.,!?;:']
  | <?[a-z0-9][^\s"<>|(){{}}]*@(?:[^\s"<>|().{{}}]+\.)*[^\s"<>|().{{}}]+>?              # addresses
  | </?[a-z][^<>]*>                                                        # tags such as <loc_12>
  | (?-i:[<>]?[:;=][-o*']?[()DPdpO\\{{@|\[\]])(?![a-z0-9])                        # :-)
  | (?-i:[-^=~<>']_[-^=~<>'] | \([-^x=~<>'][_.]?[-^x=~<>']\)
      | \([\^x=~<>']-[\^x=~<>'`]\))                                          # ^_^
  | (?-i:[A-Z]+(?:[&+][A-Z]+)+) | (?:ph|ed)\.d\.
  | (?!i\.(?![^\W_]))(?:[a-z]\.)+(?![^\W_]) | (?:{_ABBREVIATIONS})\.(?![^\W_]) | no\.(?=\s*\d|[,;])
  | ma'am | o'clock | [dljo]'(?!s\b){_A}+ | y'(?=all\b) | ol'(?![^\W_])
  | 'n' | '(?:n|em)(?![^\W_]) | '\d\ds?\b
  | n't(?![^\W_]) | '(?:s|m|d|ll|re|ve|t)(?![^\W_])                         # split off before
  | c\+\+ | (?:us|hk|[ac])\$ | @[a-z_]\w* | \#[a-z][^\W_]* | [!?]{{2,}} | \*+
  | [-+]?\d*(?:[.,:]\d+)+ | [-+]\d+
  | (?P<word>{_A}) | _+ | (?P<dash>-{{2,}})
  | [()\[\]{{}}] | << | >> | {_SYMBOL}
    """,
    re.VERBOSE | re.IGNORECASE,
)
_WORDS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"{_A}+(?:[-_]{_A}+)*",
        rf"{_L}{_A}*(?:[.!?]{_L}{_A}*)*",
        r"[a-z0-9][a-z0-9.,]*(?:-[a-z0-9]+)+",
        r"[a-z0-9]+(?:-[a-z]+){0,2}(?:\\?/[a-z0-9]+(?:-[a-z]+){0,2}){1,2}",
    )
]
"""What a word may be; the longest counts."""
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = {"?", "!"}


def tokenize(caption: str) -> list[str]:
    """Return a caption's tokens in lower case, without punctuation.

    Brackets stay, as -lrb- and so on, and so does "!!". pycocoevalcap keeps them by mistake; they are kept
    here so that scores can be compared.

    >>> tokenize("A dog (brown) isn't running.")
    ['a', 'dog', '-lrb-', 'brown', '-rrb-', 'is', "n't", 'running']
    """
    text = _ENTITY.sub(lambda match: _ENTITIES[match[0]], caption).translate(_SPELLED)
    text = _JOINED.sub(lambda match: " ".join(filter(None, match.groups())), text)
    tokens = _find_tokens(_NEGATED.sub(r" \1", text))
    return [_BRACKETS.get(token) or _name_round(token).lower() for token in tokens if token not in _DROPPED]


def _name_round(token: str) -> str:
    """Write the round brackets of a smiley as the program does, which leaves its other ones."""
    return token.replace("(", "-lrb-").replace(")", "-rrb-")


def _find_tokens(text: str) -> Iterator[str]:
    position = 0
    while found := _TOKEN.search(text, position):
        start, position = found.span()
        if found["word"]:
            words = (pattern.match(text, start) for pattern in _WORDS)
            position = max(word.end() for word in words if word)
        # The program writes a space within a tag as one that does not break.
        if not found["dash"]:
            yield text[start:position].replace(" ", "\xa0")
