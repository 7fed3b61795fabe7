"""Caption scores against those of pycocoevalcap 1.2 with its Java tokenizer."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caption_train.config.values import METRICS
from caption_train.metrics.coco import bleu, cider, rouge_l, score_captions
from caption_train.metrics.ptb_tokenizer import tokenize

GENERATED = [
    "A man rides a wave on top of a surfboard.",
    "style, large red circle, blue square",
    "Two dogs aren't sleeping",
    "a bowl of fruit (apples) on a table",
]
REFERENCES = [
    ["A surfer rides a wave.", "A man riding a wave on top of a surfboard."],
    ["style, large red circle, small blue square, left of"],
    ["Two dogs are sleeping on a couch.", "two dogs sleep", "The dogs aren't awake."],
    ["A bowl of fruit (apples) on a table"],
]

WORDS = ("a", "man", "red", "dog", "on", "the", "table", "with", "two", "cats")

# Of pycocoevalcap 1.2 and its PTBTokenizer; the fourth caption is right but for its first letter.
PUBLISHED = {
    "cider": 5.533118707686809,
    "bleu": 0.7390544726961749,
    "rouge_l": 0.846923605182078,
    "exact_match": 0.0,
}

# Captions, and what Stanford's PTBTokenizer 3.4.1 (-preserveLines -lowerCase) makes of them once
# pycocoevalcap has dropped the punctuation.
TOKENIZED = {
    "A man's dog isn't sleeping on the couch, it's running.": (
        "a man 's dog is n't sleeping on the couch it 's running"
    ),
    'Two women (one with a hat) walk - slowly -- past a "big" sign...': (
        "two women -lrb- one with a hat -rrb- walk slowly past a big sign"
    ),
    "A black-and-white photo; 3.5 meters tall, 1,000 people at 2:30 p.m.": (
        "a black-and-white photo 3.5 meters tall 1,000 people at 2:30 p.m."
    ),
    "style, red circle, blue square, top-left": "style red circle blue square top-left",
    "I cannot believe they're gonna go, don't you?": "i can not believe they 're gon na go do n't you",
    "shapes_style, large red circle, C++ code & 50% off $20 #1 @home": (
        "shapes_style large red circle c++ code & 50 % off $ 20 # 1 @home"
    ),
    "Mr. Smith's U.S. flag and/or 1/2 of the dogs' toys.": (
        "mr. smith 's u.s. flag and/or 1/2 of the dogs toys"
    ),
    "a colourful grey theatre 🙂 with café naïve": "a colourful grey theatre with café naïve",
    "image of [a cat] {and} <loc_12> <b>dog</b>": (
        "image of -lsb- a cat -rsb- -lcb- and -rcb- <loc_12> <b> dog </b>"
    ),
    "t-shirt, v-neck, 70's style o'clock 'tis": "t-shirt v-neck 70 's style o'clock 't is",
    "hello.world http://x.com/a?b=1 me@x.org a.b,c 10-20 20th 5'6\" 24/7": (
        "hello.world http://x.com/a?b=1 me@x.org a.b c 10-20 20th 5 6 24/7"
    ),
    "「日本」 a*b x=y ~ ^ | \\ / _ + it's. end.": "日本 a * b x = y ~ ^ | \\ / _ + it 's end",
    "O'Brien and d'Artagnan play rock 'n' roll with ma'am at AT&T, H&M and r&b": (
        "o'brien and d'artagnan play rock 'n' roll with ma'am at at&t h&m and r & b"
    ),
    "Why?! Oh!!! no... yes… Inc. Jan. 5 Ph.D. e.g. i.e. U.S. plan B.": (
        "why ?! oh !!! no yes inc. jan. 5 ph.d. e.g. i.e. u.s. plan b."
    ),
    "½ cup at 20°C © ™ 2×4 → ★ €10 £3 50¢ US$5 -5 +3 f/2.8 v2.0 12:30pm": (
        "1/2 cup at 20 ° c © ™ 2 × 4 → ★ $ 10 # 3 50 cents us$ 5 -5 +3 f/2 .8 v2 .0 12:30 pm"
    ),
    "#tag :) ;-) &amp; &lt; **bold** the '80s no. 5, don’t “quote” ‘it’": (
        "#tag :-rrb- ;--rrb- & < ** bold ** the '80s no. 5 do n't quote it"
    ),
    "हिन्दी שָׁלוֹם привет мир! 日本語 の 猫 👍🏽": "हिन्दी שָׁלוֹם привет мир 日本語 の 猫",
    "she'll he'd we've I'm wanna gotta": "she 'll he 'd we 've i 'm wan na got ta",
    # Tag lists.
    "1girl, solo, (best quality:1.2), ((masterpiece)), [low quality:0.8], {detailed}": (
        "1girl solo -lrb- best quality :1.2 -rrb- -lrb- -lrb- masterpiece -rrb- -rrb- "
        "-lsb- low quality :0.8 -rsb- -lcb- detailed -rcb-"
    ),
    "name_(series), rem_(re:zero), jojo's_bizarre_adventure, girls'_frontline, fate/stay_night": (
        "name _ -lrb- series -rrb- rem _ -lrb- re zero -rrb- jojo 's _ bizarre_adventure "
        "girls _ frontline fate/stay _ night"
    ),
    ":3, ^_^, >_<, @_@, =_=, o_o, (^_^), (x_x), >:), :[, :d, :o, :P, ;q": (
        ":3 ^_^ >_< @_ @ =_= o_o -lrb-^_^-rrb- -lrb-x_x-rrb- >:-rrb- :[ :d o :p q"
    ),
    "1girl,1boy,t-shirt,blue eyes": ("1girl,1boy,t-shirt blue eyes"),
    "(a, b:1.2), [a:b:0.5], <lora:add_detail:0.8>, <hypernet:a b:1>": (
        "-lrb- a b :1.2 -rrb- -lsb- a b :0.5 -rsb- <lora:add_detail:0.8> <hypernet:a\xa0b:1>"
    ),
    "__wildcard__, a__b, _a, a_, 6+girls, 4k, f/1.8, 16:9, score_8_up, k/da_(league_of_legends)": (
        "__ wildcard __ a __ b _ a a _ 6 + girls 4k f/1 .8 16:9 score_8_up k/da _ -lrb- "
        "league_of_legends -rrb-"
    ),
    "a\\(b\\), \\m/, <<, >>, ---, x,@user, #tag_name, @user_name, U.S._flag, can't_stop": (
        "a \\ -lrb- b \\ -rrb- \\ m / << >> x,@user, #tag _ name @user_name u.s. _ flag ca n't _ stop"
    ),
}


@pytest.mark.parametrize("caption", TOKENIZED)
def test_tokens_are_those_of_the_penn_treebank_tokenizer(caption):
    assert " ".join(tokenize(caption)) == TOKENIZED[caption]


def test_scores_are_pycocoevalcaps():
    scores = score_captions(GENERATED, REFERENCES, METRICS)
    assert scores == pytest.approx(PUBLISHED, abs=1e-9)


def test_rouge_l_is_that_of_lins_example():
    killed = [["police", "killed", "the", "gunman"]]
    for caption, score in (
        ("police kill the gunman", 3 / 4),
        ("the gunman kill police", 2 / 4),
        ("the gunman police killed", 2 / 4),
    ):
        assert rouge_l([caption.split()], [killed]) == pytest.approx(score)


def test_bleu_is_that_of_papinenis_first_candidate():
    # The sentences of the paper's first example, the score that NLTK's documentation gives for them.
    candidate = (
        "It is a guide to action which ensures that the military always obeys the commands of the party"
    )
    references = (
        "It is a guide to action that ensures that the military will forever heed Party commands",
        "It is the guiding principle which guarantees the military forces always being under the command of "
        "the Party",
        "It is the practical guide for the army always to heed the directions of the party",
    )
    assert bleu([candidate.split()], [[r.split() for r in references]]) == pytest.approx(0.5045666840058485)


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_pycocoevalcaps_where_it_is_installed(seed):
    package = pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    assert package
    rng = random.Random(seed)

    def write() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))

    generated = {i: [write()] for i in range(rng.randint(2, 8))}
    references = {i: [write() for _ in range(rng.randint(1, 4))] for i in generated}
    ours = (
        [caption.split() for (caption,) in generated.values()],
        [[reference.split() for reference in refs] for refs in references.values()],
    )
    assert cider(*ours) == pytest.approx(Cider().compute_score(references, generated)[0], abs=1e-12)
    theirs = Bleu(4).compute_score(references, generated, verbose=0)[0][3]
    assert bleu(*ours) == pytest.approx(theirs, abs=1e-12)
    assert rouge_l(*ours) == pytest.approx(Rouge().compute_score(references, generated)[0], abs=1e-12)


def test_a_perfect_caption_scores_all_there_is():
    captions = [refs[0] for refs in REFERENCES]
    scores = score_captions(captions, [[caption] for caption in captions], METRICS)
    assert scores == pytest.approx({"cider": 10, "bleu": 1, "rouge_l": 1, "exact_match": 1})


def test_empty_captions_score_nothing_and_break_nothing():
    scores = score_captions(["", "."], [["a dog"], ["a cat"]], METRICS)
    assert scores == pytest.approx(dict.fromkeys(METRICS, 0.0))
    # pycocoevalcap takes no words for one empty word, which is right where the reference has none.
    assert rouge_l([[], ["a"]], [[["a"], []], [["b"]]]) == 0.5


@given(st.lists(st.tuples(st.text(), st.lists(st.text(), min_size=1, max_size=3)), min_size=1, max_size=5))
def test_any_text_has_scores_within_their_bounds(rows):
    scores = score_captions([row[0] for row in rows], [row[1] for row in rows], METRICS)
    for name, value in scores.items():
        assert 0 <= value <= (10 if name == "cider" else 1) + 1e-9
