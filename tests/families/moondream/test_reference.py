"""Tower, projector and decoder against the official ones written down again from their description.

Fused weights; patches flattened by hand; bins averaged one by one; interleaved rotary pairs; one norm before
attention and MLP; keys repeated for the heads that share them.
"""

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from caption_train.families.moondream.legacy.names import to_legacy
from tests.fixtures.moondream import make_small_model

HEAD = 64


def rotate(states, positions):
    """Rotate the first 32 dimensions; pairs are read half-split and written interleaved, as officially."""
    angles = positions[:, None] * 10000 ** (-torch.arange(16) / 16)
    first, second = states[..., :16], states[..., 16:32]
    turned = [
        first * angles.cos() - second * angles.sin(),
        first * angles.sin() + second * angles.cos(),
    ]
    return torch.cat([torch.stack(turned, dim=-1).flatten(-2), states[..., 32:]], dim=-1)


def attend(states, linear, heads, kv_heads, mask):
    length = states.shape[0]
    fused = linear("attn.qkv", states)
    q, k, v = fused.split([heads * HEAD, kv_heads * HEAD, kv_heads * HEAD], dim=-1)
    q, k, v = (part.view(length, -1, HEAD).transpose(0, 1) for part in (q, k, v))
    positions = torch.arange(length)
    q, k = rotate(q, positions), rotate(k, positions)
    k, v = (part.repeat_interleave(heads // kv_heads, dim=0) for part in (k, v))
    scores = (q @ k.transpose(1, 2) / HEAD**0.5).masked_fill(~mask, -torch.inf)
    return linear("attn.proj", (scores.softmax(dim=-1) @ v).transpose(0, 1).flatten(1))


def linear_of(weights):
    return lambda name, inputs: inputs @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm_of(weights):
    return lambda name, inputs: F.layer_norm(
        inputs, inputs.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5
    )


def see(weights, crops, heads, layers):
    """Return the features [C, N, V] of crops [C, 3, S, S]."""
    linear, norm = linear_of(weights), norm_of(weights)
    patches = F.unfold(crops, 14, stride=14).transpose(1, 2)  # in the order channel, row, column
    states = linear("patch_emb", patches) + weights["pos_emb"]
    for layer in range(layers):
        block = f"blocks.{layer}"
        fused = linear(f"{block}.attn.qkv", norm(f"{block}.ln1", states)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in fused)
        attention = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v
        states = states + linear(f"{block}.attn.proj", attention.transpose(1, 2).flatten(2))
        inner = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.ln2", states)), approximate="tanh")
        states = states + linear(f"{block}.mlp.fc2", inner)
    return norm("post_ln", states)


def average(grid, side):
    """Average a grid [H, W, V] to [side², V]: bin i is rows ⌊iH/side⌋ to ⌈(i + 1)H/side⌉."""
    height, width = grid.shape[:2]
    bins = [[(i * n // side, -(-(i + 1) * n // side)) for i in range(side)] for n in (height, width)]
    return torch.stack([grid[a:b, c:d].mean(dim=(0, 1)) for a, b in bins[0] for c, d in bins[1]])


def decode(weights, states, heads, kv_heads, layers, prefix):
    """Return the logits [T, vocabulary] of embedded tokens [T, D]; the first `prefix` see each other."""
    mask = torch.ones(len(states), len(states), dtype=torch.bool).tril()
    mask[:prefix, :prefix] = True
    linear, norm = linear_of(weights), norm_of(weights)
    for layer in range(layers):
        block = f"blocks.{layer}"
        normed = norm(f"{block}.ln", states)
        attention = attend(normed, lambda n, x, b=block: linear(f"{b}.{n}", x), heads, kv_heads, mask)
        inner = F.gelu(linear(f"{block}.mlp.fc1", normed), approximate="tanh")
        states = states + attention + linear(f"{block}.mlp.fc2", inner)
    return linear("lm_head", norm("post_ln", states))


def randomise(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return to_legacy(model.state_dict(), model.config)


def test_image_embeddings_are_those_of_the_fused_tower():
    """Crops of three patches a side; windows share two of them, one of each neighbour's being cut away."""
    model, processor = make_small_model(region=None)
    official = randomise(model)
    weights = {name.removeprefix("model.vision."): tensor for name, tensor in official.items()}
    image = Image.effect_noise((60, 100), 90).convert("RGB")
    batch = processor.image_processor.preprocess(image, return_tensors="pt")
    rows, columns = batch["tilings"][0].tolist()
    assert rows > columns > 1
    features = see(weights, batch["pixel_values"], heads=2, layers=2)
    grid = torch.zeros(rows + 2, columns + 2, features.shape[-1])
    for index, window in enumerate(features[1:].unflatten(1, (3, 3))):
        row, column = divmod(index, columns)
        top, left = (1 if row else 0), (1 if column else 0)
        bottom, right = (3 if row == rows - 1 else 2), (3 if column == columns - 1 else 2)
        grid[row + top : row + bottom, column + left : column + right] = window[top:bottom, left:right]
    joined = torch.cat([features[0], average(grid, 3)], dim=-1)
    linear = linear_of(weights)
    expected = linear("proj_mlp.fc2", F.gelu(linear("proj_mlp.fc1", joined), approximate="tanh"))
    with torch.no_grad():
        ours = model.get_image_features(batch["pixel_values"], batch["tilings"])[0]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_logits_are_those_of_the_fused_decoder(kv_heads):
    model, _ = make_small_model(text={"dim": 256, "n_heads": 4, "n_kv_heads": kv_heads}, region=None)
    official = randomise(model)
    weights = {name.removeprefix("model.text."): tensor for name, tensor in official.items()}
    image, prompt = torch.randn(1, 9, 256), [1, 32, 2, 21, 3]
    ids = torch.tensor([[0, *[model.config.image_token_id] * 9, *prompt]])
    embedded = torch.cat([weights["wte"][[0]], image[0], weights["wte"][prompt]])
    with torch.no_grad():
        ours = model(input_ids=ids, image_embeds=image).logits[0]
    expected = decode(weights, embedded, 4, kv_heads, layers=2, prefix=10)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
