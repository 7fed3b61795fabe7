"""The decoder against the official one written down again from its description, with fused weights.

Interleaved rotary pairs, one norm before attention and MLP, keys repeated for the heads that share them.
"""

import pytest
import torch
from moondream_fixtures import make_small_model
from torch.nn import functional as F

from caption_train.families.moondream_checkpoint import to_official

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


def decode(weights, states, heads, kv_heads, layers, prefix):
    """Return the logits [T, vocabulary] of embedded tokens [T, D]; the first `prefix` see each other."""
    mask = torch.ones(len(states), len(states), dtype=torch.bool).tril()
    mask[:prefix, :prefix] = True

    def linear(name, inputs):
        return inputs @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, inputs):
        return F.layer_norm(
            inputs, inputs.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5
        )

    for layer in range(layers):
        block = f"blocks.{layer}"
        normed = norm(f"{block}.ln", states)
        attention = attend(normed, lambda n, x, b=block: linear(f"{b}.{n}", x), heads, kv_heads, mask)
        inner = F.gelu(linear(f"{block}.mlp.fc1", normed), approximate="tanh")
        states = states + attention + linear(f"{block}.mlp.fc2", inner)
    return linear("lm_head", norm("post_ln", states))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_logits_are_those_of_the_fused_decoder(kv_heads):
    model, _ = make_small_model(text={"dim": 256, "n_heads": 4, "n_kv_heads": kv_heads}, region=None)
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    official = to_official(model.state_dict(), model.config)
    weights = {name.removeprefix("model.text."): tensor for name, tensor in official.items()}
    image, prompt = torch.randn(1, 9, 256), [1, 32, 2, 21, 3]
    ids = torch.tensor([[0, *[model.config.image_token_id] * 9, *prompt]])
    embedded = torch.cat([weights["wte"][[0]], image[0], weights["wte"][prompt]])
    with torch.no_grad():
        ours = model(input_ids=ids, image_embeds=image).logits[0]
    expected = decode(weights, embedded, 4, kv_heads, layers=2, prefix=10)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
