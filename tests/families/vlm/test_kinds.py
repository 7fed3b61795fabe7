"""Model types of classes that load several, of processors that want more than we give, and those refused."""

import json
import shutil
from importlib.util import find_spec

import pytest

from caption_train.cli.commands import train_main
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import get_family
from caption_train.families.loading import load_model
from caption_train.families.vlm.checkpoint import find_model_class
from caption_train.families.vlm.processor import _put_together, load_processor
from tests.fixtures.runs import write_pairs
from tests.fixtures.vlm import ROPE, make_text, save_vlm


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def test_a_type_is_loaded_as_itself_by_the_class_of_another(tmp_path):
    text = make_text("glm4v_text", 300, rope_parameters={**ROPE, "mrope_section": [2, 3, 3]})
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 64}
    config = {"model_type": "glmga", "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    config, model_class = find_model_class(tmp_path, "x")
    model_class._from_config(config).save_pretrained(tmp_path)
    model = load_model(model_class, str(tmp_path), config=config)
    assert (type(model).__name__, model.config.model_type) == ("Glm46VForConditionalGeneration", "glmga")


@pytest.mark.parametrize("kind", ["t5gemma2", "pix2struct", "udop"])
def test_a_model_with_an_encoder_for_the_prompt_is_refused(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}), "utf-8")
    with pytest.raises(UsageError, match=f"a {kind} model reads the prompt in an encoder"):
        find_model_class(tmp_path, "some/model")


def test_a_processor_that_needs_torchvision_is_named(tmp_path):
    if find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed")
    folder = save_vlm("llava", tmp_path / "base", weights=False)
    rewrite(folder / "processor_config.json", processor_class="PixtralProcessor")
    with pytest.raises(UsageError, match=r"PixtralProcessor needs torchvision: pip install torchvision$"):
        load_processor(folder, *find_model_class(folder, "x"), "x")


def test_a_library_that_a_part_needs_is_named(tmp_path):
    if find_spec("timm") is not None:
        pytest.skip("timm is installed")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3n"}), "utf-8")
    with pytest.raises(CaptionTrainError, match=r"TimmWrapperModel needs timm: pip install timm$"):
        get_family("vlm").describe(str(tmp_path))


def test_an_image_token_that_the_tokenizer_does_not_know_is_named(tmp_path):
    folder = save_vlm("llava", tmp_path / "base", weights=False)
    rewrite(folder / "processor_config.json", image_token="<picture>")
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text("utf-8").replace("<image>", "<picture>"), "utf-8")
    with pytest.raises(UsageError, match="its tokenizer does not know the image token <picture>"):
        load_processor(folder, *find_model_class(folder, "x"), "x")


def test_the_image_processor_stands_in_for_one_of_videos_while_a_processor_is_made():
    class Wants:
        """As MiniCPM-V's: asks the part for videos for its settings."""

        def __init__(self, image_processor, video_processor, tokenizer):
            self.mode = video_processor["mode"] if isinstance(video_processor, dict) else video_processor.mode
            self.video_processor = video_processor

        @classmethod
        def get_attributes(cls):
            return ["image_processor", "video_processor", "tokenizer"]

        @classmethod
        def from_args_and_dict(cls, arguments, settings):
            return cls(*arguments)

    made = _put_together(Wants, {"image_processor": {"mode": "tiles"}, "tokenizer": "T"}, {})
    assert made.mode == "tiles" and made.video_processor is None


def test_a_model_that_cannot_read_its_processor_s_batch_is_one_line(tmp_path, tiny_base, capsys):
    pairs = write_pairs(tmp_path / "pairs", 4)
    folder = tmp_path / "base"
    shutil.copytree(tiny_base("vlm/llava"), folder)
    # One image token too few: the model counts them, and raises.
    rewrite(folder / "processor_config.json", num_additional_image_tokens=-1)
    argv = [pairs, tmp_path / "out", "--model_id", folder, "--epochs", "1", "--device", "cpu"]
    assert train_main("vlm", [*map(str, argv)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "--model_id" in line]
    assert "the model cannot read what its processor makes of an image and a prompt: " in line


def test_weights_are_not_read_for_a_plan(tmp_path, tiny_base, capsys):
    pairs, base = write_pairs(tmp_path / "pairs", 4), tiny_base("vlm/qwen3_vl")
    folder = tmp_path / "base"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    common = ["--epochs", "1", "--device", "cpu", "--plan", "--gradient_checkpointing"]
    for flags in ([], ["--quantize"], ["--train_method", "full"], ["--init_lora_weights", "pissa"]):
        found = []
        for model in (base, folder):
            argv = [pairs, tmp_path / "out", "--model_id", model, *common, *flags]
            assert train_main("vlm", [*map(str, argv)]) == 0
            found.append(
                [line for line in capsys.readouterr().out.splitlines() if "weights" in line or "acti" in line]
            )
        assert found[0] == found[1] and len(found[0]) == 2


def test_a_template_that_refuses_empty_messages_refuses_no_prompt(tmp_path):
    folder = save_vlm("llava", tmp_path / "base", weights=False)
    path = folder / "chat_template.jinja"
    refusal = "{% for m in messages %}{% if not m['content'][-1]['text'] %}{{ raise_exception('Empty') }}"
    path.write_text(f"{refusal}{{% endif %}}{{% endfor %}}{path.read_text('utf-8')}", "utf-8")
    processor = load_processor(folder, *find_model_class(folder, "x"), "x")
    get_family("vlm").configure(processor, {"max_pixels": 2000})
    assert "tokens" in get_family("vlm").describe_inputs(processor)[0]
