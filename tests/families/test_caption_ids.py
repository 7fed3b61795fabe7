"""No caption becomes a control token, in any family and with any kind of tokenizer; others keep their ids."""

import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from caption_train.families import FAMILIES, get_family
from caption_train.families.caption_ids import caption_ids, control_ids
from caption_train.families.labels import IGNORE_INDEX
from tests.fixtures.vlm import KINDS

BASES = [name for name in FAMILIES if name != "vlm"] + [f"vlm/{kind}" for kind in KINDS]
ORDINARY = (
    *("a red fox, sitting", "1girl, solo, :3, ^_^", "name_(series), (best quality:1.2)", "x < y > z </b>"),
    *("日本語のキャプション、猫", "naïve — Ünïcode 😀", "two  spaces   three", "[brackets] {braces} |pipes|"),
)


@pytest.fixture(scope="module", params=BASES)
def loaded(request, tiny_base):
    family = get_family(request.param.partition("/")[0])
    return family, family.load(str(tiny_base(request.param)))[1]


def read_labels(family, processor, caption, max_length=400):
    collate = family.make_collator(processor, prompt="", max_length=max_length)
    labels = collate([{"image": Image.new("RGB", (32, 32)), "caption": caption}])["labels"][0]
    return labels[labels != IGNORE_INDEX].tolist()


def test_the_name_of_a_control_token_in_a_caption_stays_text(loaded):
    family, processor = loaded
    tokenizer = processor.tokenizer
    names = {tokenizer.convert_ids_to_tokens(id) for id in control_ids(tokenizer)} - {None}
    assert len(names) > 1
    around = read_labels(family, processor, "a b")
    for name in names:
        caption = f"a {name} b"
        kept = read_labels(family, processor, caption)
        assert sum(id in control_ids(tokenizer) for id in kept) == sum(
            id in control_ids(tokenizer) for id in around
        ), name
        text = tokenizer.decode(kept, skip_special_tokens=True).lower().replace(" ", "")
        assert text == caption.lower().replace(" ", "")


def test_an_ordinary_caption_has_the_ids_that_its_tokenizer_gives_it(loaded):
    family, processor = loaded
    tokenizer = processor.tokenizer
    for caption in ORDINARY:
        assert caption_ids(tokenizer, caption) == tokenizer(caption, add_special_tokens=False)["input_ids"]
        kept, ids = read_labels(family, processor, caption), family.tokenize_caption(processor, caption)
        assert any(kept[start : start + len(ids)] == ids for start in range(3)), caption


def test_cut_lengths_are_counted_in_the_ids_that_are_trained(loaded):
    family, processor = loaded
    name = processor.tokenizer.eos_token or processor.tokenizer.sep_token
    ids = family.tokenize_caption(processor, f"a {name} b")
    kept = read_labels(family, processor, f"a {name} b")
    assert any(kept[start : start + len(ids)] == ids for start in range(3))
    assert len(ids) > len(processor.tokenizer(f"a {name} b", add_special_tokens=False)["input_ids"])


def test_places_in_a_florence_caption_stay_tokens(tiny_base):
    family = get_family("florence")
    _, processor = family.load(str(tiny_base("florence")))
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<loc_0>", "<loc_9>", "<poly>"]})
    ids = family.tokenize_caption(processor, "fox<loc_0><loc_9></s><poly>")
    shown = processor.tokenizer.convert_ids_to_tokens(ids)
    assert shown[-7:] == ["<loc_0>", "<loc_9>", "<", "/", "s", ">", "<poly>"]
    assert ids[-1] == processor.tokenizer.convert_tokens_to_ids("<poly>")


@pytest.fixture
def bytes_tokenizer():
    """A tokenizer of bytes with added tokens of each kind, those of words and spaces not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<|end|>"])
    backend.add_tokens([AddedToken("<|fim|>", normalized=False), "<b>", AddedToken("    ", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def test_added_tokens_that_are_text_stay_tokens_and_marks_become_text(bytes_tokenizer):
    tokenizer = bytes_tokenizer
    for caption in ("a    b <b>bold", *ORDINARY):
        assert caption_ids(tokenizer, caption) == tokenizer(caption)["input_ids"]
    shown = tokenizer.convert_ids_to_tokens(caption_ids(tokenizer, "a    <b><|fim|><|end|>"))
    assert shown == ["a", "    ", "<b>", *"<|fim|><|end|>"]


def test_a_vocabulary_that_holds_the_name_itself_gives_it_no_more():
    """As T5's: its model finds `</s>` in the text even where no special token is looked for."""
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((c, -3.0) for c in "</s>ab")]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert 1 in tokenizer("a </s> b", split_special_tokens=True)["input_ids"]
    ids = caption_ids(tokenizer, "a </s> b")
    assert not {0, 1} & set(ids)
    assert "".join(tokenizer.convert_ids_to_tokens(ids)).replace("▁", "") == "a</s>b"


def test_a_tokenizer_without_a_rust_backend_splits_them_too(tmp_path):
    from transformers import PreTrainedTokenizer

    class Characters(PreTrainedTokenizer):
        vocab_size = 300

        def get_vocab(self):
            return {chr(code): code for code in range(256)} | self.added_tokens_encoder

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return ord(token)

        def _convert_id_to_token(self, id):
            return chr(id)

    tokenizer = Characters(eos_token="</s>")
    end = tokenizer.eos_token_id
    assert end in tokenizer("a</s>b", add_special_tokens=False)["input_ids"]
    assert caption_ids(tokenizer, "a</s>b") == list(map(ord, "a</s>b"))
    assert caption_ids(tokenizer, "ab") == [97, 98]
