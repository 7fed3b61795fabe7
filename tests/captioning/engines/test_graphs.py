"""Recorded decoding steps, on a CPU: a recorder of torch's operators stands in for a GPU's graphs."""

import re

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from caption_train.captioning.engines.graphs import DecodeGraphs, can_be_recorded
from caption_train.errors import UsageError
from caption_train.families import get_family
from tests.fixtures.vlm import save_vlm


class Recorder(TorchDispatchMode):
    """Notes operators with the tensors they take and make; `replay` runs them again on these tensors."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value was read, which a GPU refuses while it records")
        result = operator(*args, **(kwargs or {}))
        self.operators.append((operator, args, kwargs or {}, result))
        return result

    def replay(self):
        for operator, args, kwargs, result in self.operators:
            taken = {find_place(leaf) for leaf in tree_leaves((args, kwargs)) if is_tensor(leaf)}
            made = operator(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(made), strict=True):
                # Views, and what is changed in place, stay where they are.
                if is_tensor(old) and find_place(old) not in taken:
                    old.copy_(new)


def is_tensor(leaf):
    return isinstance(leaf, torch.Tensor)


def find_place(tensor):
    return tensor.untyped_storage().data_ptr()


def record(work):
    """Record, and take back the token that was counted: a GPU computes nothing while it records."""
    recorder = Recorder()
    with recorder:
        result = work()
    changed = (args[0] for operator, args, _, _ in recorder.operators if operator._schema.is_mutable)
    for length in {id(tensor): tensor for tensor in changed if tensor.ndim == 0}.values():
        length.sub_(1)
    return recorder.replay, result


@pytest.fixture(scope="module", params=["florence", "qwen3_vl", "llava"])
def loaded(request, tiny_base, tmp_path_factory):
    """A family, its tiny model and its processor."""
    if request.param == "florence":
        family, base = get_family("florence"), tiny_base("florence")
    else:
        family = get_family("vlm")
        base = save_vlm(request.param, tmp_path_factory.mktemp(request.param))
    model, processor = family.load(str(base))
    family.set_up(processor, str(base), {}, [family.facts.default_prompt])
    return family, model, processor


@pytest.fixture(scope="module")
def batches():
    """Batches of images of other contents; the last one is smaller."""
    images = [Image.effect_noise((60 + 20 * i, 90), 200).convert("RGB") for i in range(5)]
    return [images[:2], images[2:4], images[1:3], images[4:]]


def caption(loaded, images, graphs=None, **changes):
    family, model, processor = loaded
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": 10, "min_new_tokens": 10} | changes
    inputs = family.encode(processor, images, [family.facts.default_prompt] * len(images))
    with torch.inference_mode():
        if graphs is None:
            made = family.generate(model, processor, inputs, **settings)
        else:
            with graphs.decoding(inputs, settings) as more:
                made = family.generate(model, processor, inputs, **settings, **more)
    return [one.token_ids for one in made]


@pytest.mark.parametrize("beams", [1, 3])
def test_replayed_steps_give_the_captions_of_plain_ones(loaded, batches, beams):
    graphs = DecodeGraphs(loaded[1], record)
    for images in batches:
        assert caption(loaded, images, graphs, num_beams=beams) == caption(loaded, images, num_beams=beams)
    assert (graphs.recorded, graphs.failure) == (2, "")  # one for each size of a batch


def test_the_model_is_as_before_afterwards(loaded, batches):
    plain = caption(loaded, batches[0])
    caption(loaded, batches[1], DecodeGraphs(loaded[1], record))
    assert "forward" not in vars(loaded[1])
    assert caption(loaded, batches[0]) == plain


def test_a_step_that_cannot_be_recorded_is_run_plainly_and_said_once(loaded, batches, capsys):
    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphs = DecodeGraphs(loaded[1], refuse)
    for images in batches[:2]:
        assert caption(loaded, images, graphs) == caption(loaded, images)
    said = capsys.readouterr().err
    assert re.findall("--cuda_graphs.*", said) == [
        "--cuda_graphs: going on without, operation not permitted when stream is capturing"
    ]


def test_a_recorded_step_with_other_scores_never_serves(loaded, batches):
    def record_wrongly(work):
        replay, output = record(work)
        return lambda: (replay(), output.logits.add_(1)), output

    graphs = DecodeGraphs(loaded[1], record_wrongly)
    for images in batches[:2]:
        assert caption(loaded, images, graphs) == caption(loaded, images)
    assert (graphs.recorded, graphs.failure) == (0, "a recorded step gives other scores")


def test_sliding_windows_are_not_recorded(tmp_path):
    model, _ = get_family("vlm").load(str(save_vlm("gemma3", tmp_path)))
    assert not can_be_recorded(model)


def test_a_run_without_a_gpu_refuses_the_flag(tiny_base, tmp_path):
    from caption_train.captioning.job import caption_folder
    from caption_train.config.captioning import CaptionOptions

    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    options = CaptionOptions(
        images=[str(tmp_path)], base_model=str(tiny_base("florence")), device="cpu", cuda_graphs=True
    )
    with pytest.raises(UsageError, match="--cuda_graphs: needs an NVIDIA GPU, and this runs on cpu"):
        caption_folder(options, get_family("florence"))
