"""Florence-2 with random weights: what it reads, what it is trained on, what it answers."""

import json
import pickle
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from caption_train.cli.commands import caption_main, train_main
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import get_family
from caption_train.families.florence.family import Florence


@pytest.fixture(scope="module")
def family():
    return get_family("florence")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from examples.tiny_florence import make_model

    torch.manual_seed(0)
    model, processor = make_model()
    path = tmp_path_factory.mktemp("florence")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(family, folder):
    return family.load(str(folder))


@pytest.fixture
def items():
    images = [Image.effect_noise((40, 30), 90).convert("RGB") for _ in range(2)]
    captions = ["a red circle", "a green square above a red circle"]
    return [{"image": image, "caption": text} for image, text in zip(images, captions, strict=True)]


def test_labels_are_start_caption_end(family, loaded, items):
    _, processor = loaded
    labels = family.make_collator(processor, prompt="<CAPTION>", max_length=64)(items)["labels"]
    tokenizer = processor.tokenizer
    rows = [row[row != -100].tolist() for row in labels]
    assert [tokenizer.decode(row) for row in rows] == [f"<s>{item['caption']}</s>" for item in items]
    assert rows == [tokenizer(item["caption"])["input_ids"] for item in items]


def test_a_cut_caption_keeps_its_end(family, loaded, items):
    _, processor = loaded
    labels = family.make_collator(processor, prompt="<CAPTION>", max_length=4)(items)["labels"]
    assert labels.shape == (2, 4)
    assert (labels[:, -1] == processor.tokenizer.eos_token_id).all()


def test_padding_does_not_change_loss(family, loaded, items):
    model, processor = loaded
    items[1]["prompt"] = "Describe with a paragraph what is shown in the image."
    collate = family.make_collator(processor, prompt="<CAPTION>", max_length=64)
    with torch.no_grad():
        alone = [model(**collate([item])) for item in items]
        batch = collate(items)
        logits = model(**batch).logits
    for row, single in enumerate(alone):
        length = single.logits.shape[1]
        torch.testing.assert_close(logits[row, :length], single.logits[0], atol=2e-5, rtol=0)
    counts = [(collate([item])["labels"] != -100).sum() for item in items]
    mean = sum(count * single.loss for count, single in zip(counts, alone, strict=True)) / sum(counts)
    torch.testing.assert_close(model(**batch).loss.detach(), mean, atol=1e-5, rtol=0)


def test_loss_is_not_shifted_twice(loaded, items, family):
    model, processor = loaded
    batch = family.make_collator(processor, prompt="<CAPTION>", max_length=64)(items)
    with torch.no_grad():
        output = model(**batch)
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten())
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_trained_and_generated_prompts_are_one(family, loaded, items):
    _, processor = loaded
    collate = family.make_collator(processor, prompt="<CAPTION>", max_length=64)
    encoded = family.encode(processor, [item["image"] for item in items], ["<CAPTION>"] * 2)
    trained = collate(items)
    assert all(torch.equal(trained[name], encoded[name]) for name in encoded)
    start = processor.tokenizer.decode(encoded["input_ids"][0][processor.num_image_tokens :])
    assert start == "<s>What does the image describe?</s>"


def test_a_task_can_take_a_region(family, loaded, items):
    _, processor = loaded
    prompt = "<REGION_TO_DESCRIPTION><loc_1><loc_2><loc_3><loc_4>"
    encoded = family.encode(processor, [items[0]["image"]], [prompt])["input_ids"][0]
    text = processor.tokenizer.decode(encoded[processor.num_image_tokens :])
    assert text == "<s>What does the region <loc_1><loc_2><loc_3><loc_4> describe?</s>"


def test_the_collator_survives_pickling(family, loaded, items):
    _, processor = loaded
    collate = family.make_collator(processor, prompt="<CAPTION>", max_length=64)
    again = pickle.loads(pickle.dumps(collate))(items)
    assert all(torch.equal(tensor, again[name]) for name, tensor in collate(items).items())


def test_generation_is_the_same_alone_and_in_a_padded_batch(family, loaded, items):
    model, processor = loaded
    images, prompts = [item["image"] for item in items], ["<CAPTION>", "<MORE_DETAILED_CAPTION>"]
    together = family.generate(
        model, processor, family.encode(processor, images, prompts), num_beams=2, max_new_tokens=8
    )
    for image, prompt, result in zip(images, prompts, together, strict=True):
        batch = family.encode(processor, [image], [prompt])
        assert family.generate(model, processor, batch, num_beams=2, max_new_tokens=8) == [result]


def test_a_caption_cut_at_the_limit_is_not_finished(family, loaded, items):
    model, processor = loaded
    batch = family.encode(processor, [items[0]["image"]], ["<CAPTION>"])
    for forced in (None, processor.tokenizer.eos_token_id):
        settings = {"num_beams": 1, "max_new_tokens": 2, "forced_eos_token_id": forced}
        (result,) = family.generate(model, processor, batch, **settings)
        assert not result.finished


@pytest.mark.parametrize(
    "prompt",
    ["<CAPTION> of a car", "<OPEN_VOCABULARY_DETECTION>", "<image>", "an <image> and <OD>"],
)
def test_a_prompt_that_cannot_work_is_refused(family, loaded, items, prompt):
    _, processor = loaded
    with pytest.raises(UsageError, match=r"prompt|after it"):
        family.encode(processor, [items[0]["image"]], [prompt])


@pytest.mark.parametrize("prompt", ["<OD> cat", "<image>", "<REGION_TO_OCR>"])
def test_a_prompt_that_cannot_work_is_refused_before_anything_loads(
    prompt, monkeypatch, pairs_folder, tmp_path
):
    def load(*args, **keywords):
        raise AssertionError("it loads")

    monkeypatch.setattr(Florence, "load", load)
    flags = ["--prompt", prompt]
    output = ["--output_dir", str(tmp_path / "out")]
    assert train_main("florence", ["--dataset_dir", str(pairs_folder), *output, *flags]) == 2
    assert caption_main("florence", ["--images", str(pairs_folder), *flags]) == 2


@pytest.fixture
def asking_folder(tmp_path):
    """Four pictures, each captioned for another region of it, the last one held out."""
    rows = []
    for number in range(4):
        Image.new("RGB", (40, 30), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": "red"})
        rows[-1]["prompt"] = f"<REGION_TO_DESCRIPTION><loc_{number}><loc_0><loc_9><loc_9>"
    rows[-1]["split"] = "validation"
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_every_row_is_trained_on_and_validated_with_its_own_prompt(
    folder, asking_folder, tmp_path, monkeypatch
):
    asked, encode = [], Florence.encode

    def note(self, processor, images, prompts):
        asked.extend(prompts)
        return encode(self, processor, images, prompts)

    monkeypatch.setattr(Florence, "encode", note)
    paths = ["--dataset_dir", asking_folder, "--output_dir", tmp_path / "out", "--model_id", folder]
    flags = ["--epochs", "1", "--num_workers", "0", "--eval_every_n_epochs", "1", "--metrics", "exact_match"]
    flags += ["--sample_every_n_epochs", "1"]
    assert train_main("florence", [*map(str, paths), *flags]) == 0
    regions = [f"<REGION_TO_DESCRIPTION><loc_{number}><loc_0><loc_9><loc_9>" for number in range(4)]
    assert set(asked[2:]) == set(regions)
    # The loss, the metric and a sample, before and after.
    assert asked[2:].count(regions[3]) == 6


def test_a_rows_prompt_that_cannot_work_is_named_by_its_row(folder, asking_folder, tmp_path, capsys):
    with (asking_folder / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "0.png", "text": "red", "prompt": "<OD> of cars"}')
    paths = ["--dataset_dir", asking_folder, "--output_dir", tmp_path / "out", "--model_id", folder]
    assert train_main("florence", list(map(str, paths))) == 2
    assert "metadata.jsonl:5: prompt: <OD> takes no further text" in capsys.readouterr().err


@pytest.mark.parametrize("max_length", [1, 2])
def test_a_caption_must_have_room_for_a_word(family, loaded, max_length):
    with pytest.raises(UsageError, match="--max_length must be 3 or more"):
        family.make_collator(loaded[1], prompt="<CAPTION>", max_length=max_length)


def test_a_transformers_that_shifts_labels_twice_is_refused(family, folder, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.12.1")
    with pytest.raises(CaptionTrainError, match="shifts Florence-2's labels twice"):
        family.load(str(folder))


def test_a_tensor_that_is_left_over_is_named(family, folder, tmp_path):
    odd = shutil.copytree(folder, tmp_path / "odd")
    tensors = load_file(odd / "model.safetensors") | {"model.vision_tower.neck.weight": torch.ones(2)}
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CaptionTrainError, match=r"1 tensors .* no part .* model\.vision_tower\.neck\.weight"):
        family.load(str(odd))


def test_settings_that_got_lost_are_put_back(family, folder, tmp_path):
    """What transformers saves of a converted model says nothing of beams and bans: it starts to repeat."""
    lost = shutil.copytree(folder, tmp_path / "lost")
    settings = json.loads((lost / "generation_config.json").read_text())
    del settings["forced_bos_token_id"]
    (lost / "generation_config.json").write_text(json.dumps(settings))
    config = family.load(str(lost))[0].generation_config
    assert (config.no_repeat_ngram_size, config.num_beams, config.forced_bos_token_id) == (3, 3, 0)


def test_settings_that_a_file_chose_are_kept(loaded):
    config = loaded[0].generation_config
    assert config.no_repeat_ngram_size is None
    assert config.forced_bos_token_id == 0


def test_a_missing_folder_and_an_uncached_model_are_one_line(family, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for model_id in ("/no/such/folder", "nobody/florence-2-nothing"):
        with pytest.raises(CaptionTrainError, match=model_id) as caught:
            family.load(model_id)
        assert "\n" not in str(caught.value)
