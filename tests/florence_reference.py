"""The legacy Florence-2 as plain functions of its tensors: what the numbers of any checkpoint should be.

Written from the facts about the original (FACTS.md beside the fixtures) and checked against its goldens. It
shares no line with transformers' class. Legend: B images, N places of a grid, C channels, T tokens, D width.
"""

import torch
from torch.nn import functional as F


class Reference:
    """A legacy checkpoint: `tensors` by their names, `config` as the file has it."""

    def __init__(self, tensors, config):
        self.tensors = tensors
        self.vision, self.text = config["vision_config"], config["text_config"]

    def __call__(self, pixel_values, input_ids, labels):
        """Return logits [B, T, V] of single, unpadded rows; input_ids [B, T] without image tokens."""
        shared = self["language_model.model.shared.weight"]
        encoded = self.encode(torch.cat([self.see(pixel_values), shared[input_ids]], dim=1))
        start = torch.full_like(labels[:, :1], self.text["decoder_start_token_id"])
        decoded = self.decode(shared[torch.cat([start, labels[:, :-1]], dim=1)], encoded)
        return decoded @ self.tensors.get("language_model.lm_head.weight", shared).mT

    def __getitem__(self, name):
        return self.tensors[name]

    def linear(self, x, name):
        return F.linear(x, self[f"{name}.weight"], self[f"{name}.bias"])

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"])

    def conv(self, x, name, **settings):
        return F.conv2d(x, self[f"{name}.weight"], self[f"{name}.bias"], **settings)

    def see(self, x):
        """Return image features [B, 1 + N, D] of pixels [B, 3, H, W]: the average, then every place."""
        for stage, depth in enumerate(self.vision["depths"]):
            x = self.embed_patches(x, stage)
            for block in range(depth):
                for kind in ("spatial_block", "channel_block"):
                    x = self.attend_and_mix(x, stage, f"vision_tower.blocks.{stage}.{block}.{kind}")
        _, _, height, width = x.shape
        columns = self["image_pos_embed.column_embeddings.weight"][:width].expand(height, -1, -1)
        rows = self["image_pos_embed.row_embeddings.weight"][:height, None].expand(-1, width, -1)
        places = (x.permute(0, 2, 3, 1) + torch.cat([columns, rows], dim=-1)).flatten(1, 2)
        # The first frame's embedding: sines of 0 and cosines of 0 in turn.
        places = places + torch.tensor([0.0, 1.0]).repeat(places.shape[-1] // 2)
        features = torch.cat([places.mean(dim=1, keepdim=True), places], dim=1)
        return self.norm(features @ self["image_projection"], "image_proj_norm")

    def embed_patches(self, x, stage):
        name, before = f"vision_tower.convs.{stage}", self.vision["patch_prenorm"][stage]
        norm = lambda x: self.norm(x.permute(0, 2, 3, 1), f"{name}.norm").permute(0, 3, 1, 2)  # noqa: E731
        stride, padding = self.vision["patch_stride"][stage], self.vision["patch_padding"][stage]
        x = self.conv(norm(x) if before else x, f"{name}.proj", stride=stride, padding=padding)
        return x if before else norm(x)

    def attend_and_mix(self, x, stage, name):
        """x [B, C, H, W] → the same; attention within windows or between channels, then the MLP."""
        attend = self.attend_windows if name.endswith("spatial_block") else self.attend_channels
        kind = "window_attn" if name.endswith("spatial_block") else "channel_attn"
        x = x + self.conv(x, f"{name}.conv1.fn.dw", padding=1, groups=x.shape[1])
        y = self.norm(x.permute(0, 2, 3, 1), f"{name}.{kind}.norm")
        x = x + attend(y, stage, f"{name}.{kind}.fn").permute(0, 3, 1, 2)
        x = x + self.conv(x, f"{name}.conv2.fn.dw", padding=1, groups=x.shape[1])
        y = self.norm(x.permute(0, 2, 3, 1), f"{name}.ffn.norm")
        y = self.linear(F.gelu(self.linear(y, f"{name}.ffn.fn.net.fc1")), f"{name}.ffn.fn.net.fc2")
        return x + y.permute(0, 3, 1, 2)

    def attend_windows(self, x, stage, name):
        """x [B, H, W, C]; windows at the lower and right edge are filled up with zeros, which take part."""
        size, heads = self.vision["window_size"], self.vision["num_heads"][stage]
        _, height, width, _ = x.shape
        x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
        out = torch.empty_like(x)
        for top in range(0, x.shape[1], size):
            for left in range(0, x.shape[2], size):
                window = x[:, top : top + size, left : left + size].flatten(1, 2)
                q, k, v = self.linear(window, f"{name}.qkv").chunk(3, dim=-1)
                mixed = self.linear(attend(q, k, v, heads), f"{name}.proj")
                out[:, top : top + size, left : left + size] = mixed.unflatten(1, (size, size))
        return out[:, :height, :width]

    def attend_channels(self, x, stage, name):
        groups, shape = self.vision["num_groups"][stage], x.shape[1:3]
        q, k, v = (
            part.unflatten(-1, (groups, -1))
            for part in self.linear(x.flatten(1, 2), f"{name}.qkv").chunk(3, -1)
        )
        scores = torch.einsum("bngc,bngd->bgcd", q, k) * q.shape[1] ** -0.5
        mixed = torch.einsum("bgcd,bngd->bngc", scores.softmax(dim=-1), v)
        return self.linear(mixed.flatten(2).unflatten(1, shape), f"{name}.proj")

    def encode(self, x):
        """x [B, T, D]: what the encoder makes of image features and prompt."""
        x = self.place(x, "encoder")
        for layer in range(self.text["encoder_layers"]):
            name = f"language_model.model.encoder.layers.{layer}"
            x = self.attention(x, x, name, "self_attn", "encoder")
            x = self.feed(x, name)
        return x

    def decode(self, x, encoded):
        x = self.place(x, "decoder")
        for layer in range(self.text["decoder_layers"]):
            name = f"language_model.model.decoder.layers.{layer}"
            x = self.attention(x, x, name, "self_attn", "decoder", causal=True)
            x = self.attention(x, encoded, name, "encoder_attn", "decoder")
            x = self.feed(x, name)
        return x

    def place(self, x, part):
        name = f"language_model.model.{part}"
        positions = self[f"{name}.embed_positions.weight"][2 : 2 + x.shape[1]]
        return self.norm(x + positions, f"{name}.layernorm_embedding")

    def attention(self, x, other, name, kind, part, causal=False):
        q, k, v = (
            self.linear(t, f"{name}.{kind}.{p}_proj") for t, p in ((x, "q"), (other, "k"), (other, "v"))
        )
        mixed = attend(q, k, v, self.text[f"{part}_attention_heads"], causal)
        return self.norm(x + self.linear(mixed, f"{name}.{kind}.out_proj"), f"{name}.{kind}_layer_norm")

    def feed(self, x, name):
        activate = getattr(F, self.text["activation_function"])
        y = self.linear(activate(self.linear(x, f"{name}.fc1")), f"{name}.fc2")
        return self.norm(x + y, f"{name}.final_layer_norm")


def attend(q, k, v, heads, causal=False):
    """Softmax attention of q [B, T, C] over k, v [B, S, C]."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
