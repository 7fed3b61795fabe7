"""What every family must do, whatever it is made of; one row of tests per line of the registry."""

import json
import pickle
import shutil

import pytest
import torch
from PIL import Image

from caption_train.adapters.lora import count_parameters, wrap_with_lora
from caption_train.cli.commands import caption_main, train_main
from caption_train.data.images import open_image
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import FAMILIES, get_family
from caption_train.families.labels import IGNORE_INDEX
from caption_train.families.vlm.processor import VlmProcessor
from caption_train.training.monitor.health import copy_lora_b, find_dead_modules
from tests.fixtures.sample_set import CAPTIONS
from tests.fixtures.vlm import KINDS, load_saved_processor

WITHOUT_END = {"blip": 1}
"""Tokens of an encoded prompt that generation drops: BLIP's `generate` cuts the `[SEP]`."""


BASES = [name for name in FAMILIES if name != "vlm"] + [f"vlm/{kind}" for kind in KINDS]
"""Families, and behind a slash the kinds of checkpoints that a family of many is tested with."""


@pytest.fixture(scope="module", params=BASES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def family(name):
    return get_family(name.partition("/")[0])


@pytest.fixture(scope="module")
def facts(name, family, tiny_base):
    return family.describe(str(tiny_base(name)))


@pytest.fixture(scope="module")
def loaded(name, family, tiny_base):
    return family.load(str(tiny_base(name)))


@pytest.fixture(scope="module")
def items():
    return [
        {"image": Image.new("RGB", (40, 30), colour), "caption": caption}
        for colour, caption in CAPTIONS.items()
    ]


@pytest.fixture(scope="module")
def collate(family, loaded, facts):
    return family.make_collator(loaded[1], prompt=facts.default_prompt, max_length=64)


def end_of(processor) -> int:
    if isinstance(processor, VlmProcessor):
        return processor.chat.end_ids[-1]
    tokenizer = processor.tokenizer
    return tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id


def test_padding_does_not_change_the_loss(loaded, collate, items):
    model, _ = loaded
    with torch.no_grad():
        singles = [collate([item]) for item in items]
        losses = torch.stack([model(**batch).loss for batch in singles])
        counts = torch.tensor([int((batch["labels"] != IGNORE_INDEX).sum()) for batch in singles])
        together = model(**collate(items)).loss
    assert len(set(counts.tolist())) > 1, "nothing was padded"
    torch.testing.assert_close(together, (losses * counts).sum() / counts.sum(), atol=1e-5, rtol=1e-5)


def test_labels_are_the_caption_and_its_end_and_no_padding(loaded, collate, items):
    _, processor = loaded
    for label, item in zip(collate(items)["labels"], items, strict=True):
        kept = label[label != IGNORE_INDEX]
        assert kept[-1] == end_of(processor)
        assert (kept == end_of(processor)).sum() == 1
        text = processor.tokenizer.decode(kept, skip_special_tokens=True)
        assert text.replace(" ", "") == item["caption"].replace(" ", "")


def test_a_caption_that_is_too_long_is_cut_before_its_end(family, loaded, items, facts):
    _, processor = loaded
    collate = family.make_collator(processor, prompt=facts.default_prompt, max_length=4)
    labels = collate([items[2]])["labels"][0]
    kept = labels[labels != IGNORE_INDEX]
    assert len(kept) <= 4 and kept[-1] == end_of(processor)


def test_captions_are_counted_without_the_weights_as_training_learns_them(
    name, family, facts, items, tiny_base, tmp_path
):
    folder = tmp_path / "no weights"
    shutil.copytree(tiny_base(name), folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    processor = family.load_text_processor(str(folder))
    _, loaded = family.load(str(tiny_base(name)))
    assert processor.tokenizer.model_max_length == loaded.tokenizer.model_max_length
    for item in items[1:]:
        ids = family.tokenize_caption(processor, item["caption"])
        assert ids == family.tokenize_caption(loaded, item["caption"])
        length = len(ids) + family.count_frame_tokens(processor)
        for most, kept in ((length + 5, length), (length, length), (length - 1, length - 1)):
            collate = family.make_collator(loaded, prompt=facts.default_prompt, max_length=most)
            labels = collate([item])["labels"][0]
            assert (labels != IGNORE_INDEX).sum() == kept


def test_a_caption_beyond_the_models_positions_is_cut_to_them(family, loaded, items, facts):
    model, processor = loaded
    collate = family.make_collator(processor, prompt=facts.default_prompt, max_length=1000)
    batch = collate([items[0] | {"caption": "red and green " * 300}])
    limit = model.config.text_config.max_position_embeddings
    assert max(batch[key].shape[1] for key in ("input_ids", "labels")) == limit
    assert batch["labels"][0, -1] == end_of(processor)
    with torch.no_grad():
        assert model(**batch).loss.isfinite()


def test_a_prompt_beyond_the_models_positions_is_one_line(family, loaded, items):
    model, processor = loaded
    image, caption = items[0]["image"], items[0]["caption"]
    words = model.config.text_config.max_position_embeddings * 2
    while words:
        prompt = "a " * words
        try:
            batch = family.encode(processor, [image], [prompt])
            break
        except UsageError as error:
            assert str(error).startswith("--prompt: ") and "\n" not in str(error)
            words -= 1 if words < 300 else 50
    assert words, "no prompt fits"
    assert len(family.generate(model, processor, batch, max_new_tokens=64, num_beams=1)) == 1
    train_batch = family.make_collator(processor, prompt=prompt, max_length=64)(
        [{"image": image, "caption": caption}]
    )
    with torch.no_grad():
        assert model(**train_batch).loss.isfinite()


def test_a_model_that_is_not_cached_is_one_line_without_the_network(family, monkeypatch, tmp_path):
    def connect(*args, **keywords):
        raise ConnectionError("Name or service not known")

    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", asked.append)
    monkeypatch.setattr("socket.getaddrinfo", connect)
    with pytest.raises(CaptionTrainError, match="the hub cannot be reached") as caught:
        family.load("nobody/nothing")
    assert "\n" not in str(caught.value)
    assert not asked, "it waited to ask the hub again"


def test_an_empty_caption_trains_the_end_alone(loaded, collate, items):
    model, processor = loaded
    batch = collate([items[0] | {"caption": ""}])
    assert end_of(processor) in batch["labels"]
    assert model(**batch).loss.isfinite()


def test_training_reads_the_prompt_that_generation_reads(family, loaded, collate, items, facts):
    _, processor = loaded
    encoded = family.encode(processor, [items[0]["image"]], [facts.default_prompt])
    trained = collate([items[0]])
    assert torch.equal(trained["pixel_values"], encoded["pixel_values"])
    length = encoded["input_ids"].shape[1] - WITHOUT_END.get(family.name, 0)
    assert length > 0
    assert torch.equal(trained["input_ids"][:, :length], encoded["input_ids"][:, :length])


def test_the_collator_survives_pickling(collate, items):
    again = pickle.loads(pickle.dumps(collate))(items)
    expected = collate(items)
    assert again.keys() == expected.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in expected.items())


def test_a_batch_generates_what_each_image_does_alone(family, loaded, items, facts):
    model, processor = loaded
    images, prompts = [item["image"] for item in items], ["", "a", "a b c", ""]
    prompts = [prompt or facts.default_prompt for prompt in prompts]
    batch = family.encode(processor, images, prompts)
    together = family.generate(model, processor, batch, num_beams=1, max_new_tokens=8)
    for image, prompt, result in zip(images, prompts, together, strict=True):
        alone = family.encode(processor, [image], [prompt])
        assert family.generate(model, processor, alone, num_beams=1, max_new_tokens=8) == [result]


def test_parts_are_the_model_and_do_not_overlap(family, loaded, facts):
    import re

    model, _ = loaded
    holders = [
        name
        for name, module in model.named_modules()
        if any(weight.dim() > 1 for weight in module.parameters(recurse=False))
    ]
    owners = [[part for part, regex in facts.parts.items() if re.fullmatch(regex, name)] for name in holders]
    assert {part for parts in owners for part in parts} == {"vision", "projector", "language"}
    assert all(len(parts) <= 1 for parts in owners)


def test_one_step_moves_every_lora_and_nothing_else(family, tiny_base, items, facts, name):
    model, processor = family.load(str(tiny_base(name)))
    parts = [facts.parts[part] for part in family.train_defaults.get("train_parts", [])]
    model = wrap_with_lora(model, facts.lora_target_modules, rank=2, alpha=4, dropout=0, parts=parts)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in key for key in trained)
    assert count_parameters(model)[0] == sum(model.get_parameter(key).numel() for key in trained)

    before = {key: p.detach().clone() for key, p in model.named_parameters() if key not in trained}
    lora_b = copy_lora_b(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    collate = family.make_collator(processor, prompt=facts.default_prompt, max_length=64)
    model.train()
    model(**collate(items)).loss.backward()
    optimizer.step()
    assert lora_b and find_dead_modules(model, lora_b) == []
    assert all(torch.equal(model.get_parameter(key), value) for key, value in before.items())


def test_what_is_trained_is_what_is_generated(family, overfitted, pairs_folder, tmp_path, name):
    output = tmp_path / "captions.jsonl"
    flags = ["--images", pairs_folder, "--peft_model", overfitted(name), "--output", output]
    assert caption_main(family.name, [*map(str, flags), "--device", "cpu", "--num_workers", "0"]) == 0
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    captions = [next(value for key, value in row.items() if key in ("text", "caption")) for row in rows]
    assert captions == list(CAPTIONS.values())


PLAIN_PROMPTS = {"blip": {}, "florence": {"text": "<CAPTION>"}, "moondream": {}}


def make_plain_inputs(family, folder, images, prompt):
    """Return each image's inputs as others make them, from the files in the adapter's folder."""
    if family.name == "vlm":
        # AutoProcessor needs torchvision for most of these; tests/families/vlm opens the files by hand.
        processor = load_saved_processor(folder)
        family.configure(processor, json.loads((folder / "training.json").read_text("utf-8"))["settings"])
        return processor.tokenizer, [family.encode(processor, [image], [prompt]) for image in images]
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    texts = PLAIN_PROMPTS[family.name]
    return processor.tokenizer, [processor(images=image, return_tensors="pt", **texts) for image in images]


def test_the_adapter_works_in_plain_peft_and_transformers(
    name, family, facts, overfitted, tiny_base, pairs_folder
):
    """Processor and LoRA from output_dir, the base through the auto class; then the LoRA merged into it."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    folder = overfitted(name)
    base = AutoModelForImageTextToText.from_pretrained(tiny_base(name))
    model = PeftModel.from_pretrained(base, folder).eval()
    images = [open_image(path) for path in sorted(pairs_folder.glob("*.png"))]
    tokenizer, inputs = make_plain_inputs(family, folder, images, facts.default_prompt)

    def generate(model):
        settings = {"num_beams": 1, "max_new_tokens": 40, "do_sample": False}
        return [model.generate(**row, **settings)[0].tolist() for row in inputs]

    tokens = generate(model)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
    assert all(text.strip().endswith(caption) for text, caption in zip(texts, CAPTIONS.values(), strict=True))
    assert generate(model.merge_and_unload()) == tokens


def test_the_saved_folder_says_where_it_comes_from(family, overfitted, tiny_base, facts, name):
    folder = overfitted(name)
    record = json.loads((folder / "training.json").read_text("utf-8"))
    assert record["family"] == family.name
    assert record["base_model"] == str(tiny_base(name).resolve())
    assert record["prompt"] == facts.default_prompt
    assert record["options"]["rank"] == 32
    assert record["dataset"]["pairs"] == len(CAPTIONS)
    assert {"torch", "transformers", "peft", "caption-train"} <= record["versions"].keys()
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == record["base_model"]
    card = (folder / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: peft\n") and "pipeline_tag: image-to-text" in card


def test_an_adapter_of_another_family_is_refused_before_anything_loads(
    family, overfitted, pairs_folder, tmp_path, capsys, monkeypatch, name
):
    other = next(name for name in FAMILIES if name != family.name)
    folder = shutil.copytree(overfitted(name), tmp_path / "lora")
    monkeypatch.setattr(type(get_family(other)), "load", lambda *args, **keywords: pytest.fail("loaded"))
    assert caption_main(other, ["--images", str(pairs_folder), "--peft_model", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder) in line and family.name in line


def test_a_target_that_matches_nothing_is_named_with_what_is_close(
    family, tiny_base, pairs_folder, tmp_path, capsys, facts, name
):
    target = facts.lora_target_modules[0]
    flags = ["--dataset_dir", pairs_folder, "--output_dir", tmp_path, "--model_id", tiny_base(name)]
    flags = [*map(str, flags), "--device", "cpu", "--target_modules", target + "x", target]
    assert train_main(family.name, flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--target_modules {target}x" in line and "did you mean" in line
