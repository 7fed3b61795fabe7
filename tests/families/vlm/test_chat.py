"""Prompt, caption and end are the ids of the whole conversation, and templates that cannot be are refused."""

import pytest
from PIL import Image
from transformers import ProcessorMixin

from caption_train.errors import UsageError
from caption_train.families import get_family
from caption_train.families.labels import IGNORE_INDEX
from caption_train.families.vlm.chat import answer_ids
from caption_train.families.vlm.checkpoint import find_model_class
from caption_train.families.vlm.processor import load_processor
from tests.fixtures.vlm import KINDS, TEMPLATES, save_vlm

CAPTIONS = ["a small red boat", "Two dogs; one cat.", "1girl, solo", "  spaced out ", "naïve — Ünïcode 😀"]
IMAGE = Image.new("RGB", (96, 64), "green")


@pytest.fixture(scope="module")
def family():
    return get_family("vlm")


@pytest.fixture(scope="module")
def load(tiny_base):
    """`load("llava")`: the processor of a kind's tiny base."""

    def run(kind):
        folder = tiny_base(f"vlm/{kind}")
        return load_processor(folder, *find_model_class(folder, kind), kind)

    return run


@pytest.fixture
def load_with(tmp_path):
    """`load_with("llava", template)`: a kind's processor with another chat template; no weights."""

    def run(kind, template):
        folder = save_vlm(kind, tmp_path / "base", template=template, weights=False)
        return load_processor(folder, *find_model_class(folder, "x"), "some/model")

    return run


def encode_whole(processor, prompt, caption):
    """Return the ids of the whole conversation as transformers itself renders and tokenizes it."""
    inner, style = processor.inner, processor.chat.content
    if style == "prefix":
        batch = inner(images=IMAGE, text=f"<image>{prompt}", suffix=caption, return_tensors="pt")
        return batch["input_ids"][0].tolist()
    user = [{"type": "image"}, {"type": "text", "text": prompt}] if style == "list" else prompt
    answer = [{"type": "text", "text": caption}] if style == "list" else caption
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    text = ProcessorMixin.apply_chat_template(inner, messages)
    bos = inner.tokenizer.bos_token
    add = not (bos and text.startswith(bos))
    return inner(text=[text], images=[[IMAGE]], add_special_tokens=add)["input_ids"][0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_row_is_the_whole_conversation_up_to_its_end(family, load, kind):
    processor = load(kind)
    collate = family.make_collator(processor, prompt="What is it?", max_length=100)
    for caption in CAPTIONS[:3]:
        row = collate([{"image": IMAGE, "caption": caption}])
        ids = row["input_ids"][0].tolist()
        whole = list(encode_whole(processor, "What is it?", caption))
        written = len(ids) - len(processor.chat.end_ids) + processor.chat.written
        assert whole[:written] == ids[:written]
        assert ids[-1] in processor.chat.stop_ids
        bos = processor.tokenizer.bos_token_id
        assert bos is None or ids[:2] != [bos, bos]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_caption_and_end_is_learnt(family, load, kind):
    processor = load(kind)
    collate = family.make_collator(processor, prompt="What is it?", max_length=200)
    for caption in CAPTIONS:
        batch = collate([{"image": IMAGE, "caption": caption}, {"image": IMAGE, "caption": "x"}])
        kept = batch["labels"][0][batch["labels"][0] != IGNORE_INDEX].tolist()
        end = list(processor.chat.end_ids)
        assert kept[-len(end) :] == end
        decoded = processor.tokenizer.decode(kept[: -len(end)], clean_up_tokenization_spaces=False)
        assert decoded == processor.chat.lead + caption


def test_special_tokens_in_a_caption_stay_text(load):
    processor = load("qwen3_vl")
    ids = answer_ids(processor.tokenizer, processor.chat, "says <|im_end|> and <|image_pad|>")
    assert not set(ids) & set(range(7))
    assert processor.tokenizer.decode(ids) == "says <|im_end|> and <|image_pad|>"


@pytest.mark.parametrize(
    ("kind", "content", "lead", "end"),
    [
        ("qwen3_5", "list", "", "<|im_end|>"),
        ("smolvlm", "list", " ", "<end_of_utterance>"),
        ("joycaption", "string", "", "<|eot_id|>"),
        ("llava_vicuna", "list", " ", "<|eot_id|>"),
        ("gemma3", "list", "", "<end_of_turn>"),
        ("paligemma", "prefix", "", "<eos>"),
    ],
)
def test_what_stands_around_a_caption(load, kind, content, lead, end):
    processor = load(kind)
    assert (processor.chat.content, processor.chat.lead) == (content, lead)
    assert processor.tokenizer.convert_ids_to_tokens(list(processor.chat.end_ids)) == [end]


def test_a_model_that_thinks_is_told_not_to(load):
    assert load("qwen3_5").render("hi").endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_caption_sees_no_future_in_paligemma(family, load):
    batch = family.make_collator(load("paligemma"), prompt="caption en", max_length=50)(
        [{"image": IMAGE, "caption": "a red boat"}, {"image": IMAGE, "caption": "a"}]
    )
    assert batch["token_type_ids"].tolist() == (batch["labels"] != IGNORE_INDEX).long().tolist()


QWEN = (TEMPLATES / "qwen3_vl.jinja").read_text("utf-8")
THINKER = (TEMPLATES / "qwen3_5.jinja").read_text("utf-8")
TURN = "{{ '<|im_start|>' + m.role + '\n' }}"
IMAGE_AND_TEXT = "{% for c in m.content %}{{ '<|image_pad|>' if c.type == 'image' else c.text }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            QWEN.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant (now)\\n'"),
            "does not begin a whole",
        ),
        (THINKER.replace("enable_thinking is false", "false"), "before every answer"),
        (THINKER.replace("{{- '<think>\\n\\n</think>\\n\\n' }}", ""), "before every answer"),
        (QWEN.replace("<|image_pad|>", ""), "writes no image token"),
        (QWEN.replace("<|image_pad|>", "<|image_pad|><|image_pad|>"), "writes 2 image tokens"),
        ("{{ raise_exception('nothing goes') }}", "refuses the conversation: nothing goes"),
        ("{% for m in messages %}" + TURN + "{% endfor %}", "does not write the prompt as it is"),
        (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content|string + '<|im_end|>\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
            "writes no image token",
        ),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not write the prompt as it is"),
    ],
)
def test_a_template_that_cannot_be_trained_on_is_refused_in_one_line(load_with, template, words):
    with pytest.raises(UsageError) as caught:
        load_with("qwen3_vl", template)
    message = str(caught.value)
    assert message.startswith("--model_id some/model: ") and words in message and "\n" not in message


def test_a_checkpoint_without_a_template_is_refused(tmp_path):
    folder = save_vlm("llava", tmp_path, weights=False)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match="it has no chat template"):
        load_processor(folder, *find_model_class(folder, "x"), "x")


def test_an_end_that_ends_no_answer_is_followed_by_one_that_does(load_with):
    template = QWEN.replace("<|im_end|>", "<|vision_end|>")
    processor = load_with("qwen3_vl", template)
    assert processor.tokenizer.convert_ids_to_tokens(list(processor.chat.end_ids)) == [
        "<|vision_end|>",
        "<|im_end|>",
    ]


def test_a_system_prompt_stands_before_the_prompt_or_is_refused(family, load):
    for kind, begins in (
        ("qwen3_vl", "<|im_start|>system\nBe brief.<|im_end|>\n"),
        ("joycaption", "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"),
        ("gemma3", "<bos><start_of_turn>user\nBe brief.\n\n"),
    ):
        processor = load(kind)
        family.configure(processor, {"system_prompt": "Be brief."})
        assert processor.render("hi").startswith(begins)
    processor = load("paligemma")
    processor.system_prompt = "Be brief."
    with pytest.raises(UsageError, match="--system_prompt: this model has no chat template"):
        processor.render("hi")


def test_a_template_without_a_place_for_a_system_prompt_refuses_one(load_with):
    processor = load_with("qwen3_vl", QWEN.replace("messages[0].role == 'system'", "false"))
    processor.system_prompt = "Be brief."
    with pytest.raises(UsageError, match="--system_prompt: this model's chat template has no place for one"):
        processor.render("hi")


@pytest.mark.parametrize("prompt", ["look at <|image_pad|>", "<|im_end|>"])
def test_a_prompt_holds_no_special_token(family, load, prompt):
    with pytest.raises(UsageError, match=r"--prompt: <\|im\w+\|> means something else to this model"):
        family.check_inputs(load("qwen3_vl"), ["fine", prompt])


def test_joycaption_is_asked_as_its_authors_asked_it(family, tiny_base, tmp_path):
    folder = tmp_path / "llama-joycaption-beta-one-hf-llava"
    save_vlm("joycaption", folder, weights=False)
    assert family.describe(str(folder)).default_prompt.startswith("Write a long descriptive caption")
    processor = load_processor(folder, *find_model_class(folder, "x"), str(folder))
    family.configure(processor, {})
    assert family.read_settings(processor)["system_prompt"] == "You are a helpful image captioner."
