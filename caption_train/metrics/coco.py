"""Scores captions as COCO's evaluation does: CIDEr, BLEU-4, ROUGE-L; also exact match.

The formulas are those of pycocoevalcap 1.2, with equal results to the last digit, on the tokens of
`ptb_tokenizer.tokenize`. CIDEr: Vedantam et al., arXiv 1411.5726, with CIDEr-D's clipping and length penalty.
BLEU: Papineni et al., ACL 2002. ROUGE-L: Lin, ACL 2004, with beta 1.2.
"""

import math
from collections import Counter
from collections.abc import Sequence

from caption_train.metrics.ptb_tokenizer import tokenize

ORDER = 4
SIGMA = 6.0
BETA = 1.2
SMALL, TINY = 1e-9, 1e-15


def score_captions(
    generated: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str]
) -> dict[str, float]:
    """Score N captions against their references.

    Exact match compares texts after evening out white space; the other metrics compare tokens. CIDEr weighs
    each word by how few images have it, so for a single image it is 0.

    >>> score_captions(["a cat"], [["a dog", "a  cat"]], ["exact_match", "bleu"])["exact_match"]
    1.0

    Args:
        generated: N captions.
        references: N lists of one or more reference captions.
        metrics: names from `METRICS`.

    Returns:
        Name → score, in the order of `metrics`. Scores go from 0 to 1, CIDEr from 0 to 10.
    """
    scores = {}
    if "exact_match" in metrics:
        hits = match_each(generated, references)
        scores["exact_match"] = sum(hits) / len(hits)
    tokens = [tokenize(caption) for caption in generated]
    reference_tokens = [[tokenize(reference) for reference in refs] for refs in references]
    for name, measure in {"cider": cider, "bleu": bleu, "rouge_l": rouge_l}.items():
        if name in metrics:
            scores[name] = measure(tokens, reference_tokens)
    return {name: scores[name] for name in metrics}


def match_each(generated: Sequence[str], references: Sequence[Sequence[str]]) -> list[bool]:
    """Return whether each of N captions is one of its references, white space aside."""
    return [_even(c) in map(_even, refs) for c, refs in zip(generated, references, strict=True)]


def cider(generated: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """Return the mean CIDEr-D, 0-10, of N token lists against N lists of reference token lists."""
    scores = cider_each(generated, references)
    return sum(scores) / len(scores)


def cider_each(
    generated: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> list[float]:
    """Return the CIDEr-D of each of N captions, with word weights from all N images' references."""
    counts = [_count_ngrams(tokens) for tokens in generated]
    reference_counts = [[_count_ngrams(tokens) for tokens in refs] for refs in references]
    # In how many images' references each n-gram occurs.
    frequency = Counter(ngram for refs in reference_counts for ngram in set().union(*refs))
    images = math.log(len(references))

    def weigh(counts: Counter) -> tuple[list[dict], list[float], int]:
        vectors = [{} for _ in range(ORDER)]
        for ngram, count in counts.items():
            vectors[len(ngram) - 1][ngram] = count * (images - math.log(max(1, frequency[ngram])))
        norms = [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in vectors]
        # pycocoevalcap takes the number of bigrams for the length of the caption.
        return vectors, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)

    def compare(one: tuple, other: tuple) -> float:
        penalty = math.exp(-((one[2] - other[2]) ** 2) / (2 * SIGMA**2))
        total = 0.0
        for ours, theirs, *norms in zip(one[0], other[0], one[1], other[1], strict=True):
            shared = ours.keys() & theirs.keys()
            # Sorted, because the order of a set, and with it the rounding, differs from run to run.
            product = sum(min(ours[ngram], theirs[ngram]) * theirs[ngram] for ngram in sorted(shared))
            total += (product / math.prod(norms) if all(norms) else product) * penalty
        return total / ORDER

    scores = []
    for hypothesis, refs in zip(counts, reference_counts, strict=True):
        weighed = weigh(hypothesis)
        scores.append(10 * sum(compare(weighed, weigh(ref)) for ref in refs) / len(refs))
    return scores


def bleu(generated: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """Return BLEU-4, 0-1, over all N captions together.

    Each caption's length is compared with the length of its closest reference.

    Args:
        generated: N token lists.
        references: N lists of reference token lists.
    """
    totals = [sum(column) for column in zip(*count_bleu(generated, references), strict=True)]
    length, reference_length, guesses, correct = (
        totals[0],
        totals[1],
        totals[2 : 2 + ORDER],
        totals[2 + ORDER :],
    )
    score = math.prod((c + TINY) / (g + SMALL) for c, g in zip(correct, guesses, strict=True)) ** (1 / ORDER)
    ratio = (length + TINY) / (reference_length + SMALL)
    return score * math.exp(1 - 1 / ratio) if ratio < 1 else score


def count_bleu(
    generated: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> list[list[int]]:
    """Return what BLEU-4 sums up over N captions, a row of ten counts each.

    A row: length, length of the closest reference, n-grams of orders 1-4, those of them in a reference.
    """
    rows = []
    for tokens, refs in zip(generated, references, strict=True):
        closest = min((abs(len(ref) - len(tokens)), len(ref)) for ref in refs)[1]
        most, correct = Counter(), [0] * ORDER
        for ref in refs:
            most |= _count_ngrams(ref)
        for ngram, count in _count_ngrams(tokens).items():
            correct[len(ngram) - 1] += min(most[ngram], count)
        guesses = [max(0, len(tokens) - order) for order in range(ORDER)]
        rows.append([len(tokens), closest, *guesses, *correct])
    return rows


def rouge_l(generated: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """Return the mean ROUGE-L, 0-1, of N token lists against N lists of reference token lists.

    ROUGE-L is the F measure of the longest common subsequence; recall weighs beta² = 1.44 times as much.
    """
    scores = rouge_l_each(generated, references)
    return sum(scores) / len(scores)


def rouge_l_each(
    generated: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> list[float]:
    """Return the ROUGE-L of each of N captions."""
    scores = []
    for tokens, refs in zip(generated, references, strict=True):
        # In pycocoevalcap, a caption without words counts as one empty word.
        tokens, refs = tokens or [""], [ref or [""] for ref in refs]
        common = [_common_length(tokens, ref) for ref in refs]
        precision = max(common) / len(tokens)
        recall = max(count / len(ref) for count, ref in zip(common, refs, strict=True))
        both = precision * recall
        scores.append((1 + BETA**2) * both / (recall + BETA**2 * precision) if both else 0.0)
    return scores


def _count_ngrams(tokens: Sequence[str]) -> Counter:
    return Counter(
        tuple(tokens[start : start + order])
        for order in range(1, ORDER + 1)
        for start in range(len(tokens) - order + 1)
    )


def _common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for token in one:
        diagonal = 0
        for index, candidate in enumerate(other, 1):
            above = row[index]
            row[index] = diagonal + 1 if token == candidate else max(above, row[index - 1])
            diagonal = above
    return row[-1]


def _even(text: str) -> str:
    return " ".join(text.split())
