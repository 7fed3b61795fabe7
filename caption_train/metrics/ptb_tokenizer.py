"""Splits captions into the tokens that COCO's metrics count, without Java. Standard library only.

`tokenize` does what Stanford's PTBTokenizer 3.4.1 does as pycocoevalcap 1.2 calls it (-preserveLines
-lowerCase), and drops the same punctuation. The rules were found by comparing with that program;
docs/validation.md says how often the two agree.
"""

import re

_SPELLED = str.maketrans(
    {"’": "'", "‘": "'", "…": "...", "£": "#", "€": "$", "¤": "$", "¢": " cents ", "\xad": None}
    | {"½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "}
)
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&nbsp;": " "}
_ENTITY = re.compile("|".join(_ENTITIES))
_JOINED = re.compile(
    r"\b(?:(can)(not)|(gon)(na)|(got)(ta)|(wan)(na)|(lem)(me)|(gim)(me))\b(?!')|(?<!\w)('t)(is|was)\b", re.I
)
_NEGATED = re.compile(r"(?<=\w)(n't)\b", re.I)
# Letters, digits, the combining marks of other scripts, and the non-breaking hyphen.
_W = (
    r"[\w\u0300-\u036f\u0483-\u0487\u0591-\u05c7\u064b-\u065e\u0670\u0900-\u0903\u093a-\u094f\u0e31"
    r"\u0e34-\u0e3a\u0e47-\u0e4e\u2011]"
)
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
    https?://[^\s"()<>]*[^\s"()<>.,!?;:'] | [\w.+-]+@[\w-]+(?:\.[\w-]+)+    # addresses
  | </?[a-z][^<>]*>                                                        # tags such as <loc_12>
  | [:;=]-?[()] | [:;=]-?[dp](?!\w)                                         # :-)
  | (?-i:[A-Z]+(?:[&+][A-Z]+)+) | (?:ph|ed)\.d\.
  | (?!i\.(?!\w))(?:[a-z]\.)+(?!\w) | (?:{_ABBREVIATIONS})\.(?!\w) | no\.(?=\s*\d|[,;])
  | ma'am | o'clock | [dljo]'(?!s\b){_W}+ | y'(?=all\b) | ol'(?!\w) | 'n' | '(?:n|em)(?!\w) | '\d\ds?\b
  | n't\b | '(?:s|m|d|ll|re|ve|t)\b                                         # split off before
  | c\+\+ | (?:us|hk|[ac])\$ | [@#][a-z]\w* | [!?]{{2,}} | \*+
  | [-+]?\d+(?:[.,:]\d+)+ | [-+]\d+ | (?<=\w)\.\d+
  | {_W}+(?:[-/](?={_W}){_W}+ | (?<=[^\W\d])[.!?](?=[^\W\d]){_W}+)*
  | [()\[\]{{}}] | {_SYMBOL}
    """,
    re.VERBOSE | re.IGNORECASE,
)
_BRACKETS = str.maketrans(
    {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
)
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
    tokens = _TOKEN.findall(_NEGATED.sub(r" \1", text))
    return [token.translate(_BRACKETS).lower() for token in tokens if token not in _DROPPED]
